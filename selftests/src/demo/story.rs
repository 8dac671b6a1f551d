// SPDX-License-Identifier: GPL-2.0
//! The same guest under the same pressure, on memory that may move, be swapped out, both, or none.
//!
//! The guest writes all its memory. Then the host wants half of it back, in small bites, while the
//! guest keeps using a quarter. Then the guest reads everything, gives three of four pages back as
//! a balloon would, the host compacts, and the guest uses all its memory again.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::backing::{Backing, GPA, Memory};
use super::missing::{Missing, unless_missing};
use crate::guest::MAX_VCPUS;
use crate::mem;
use crate::pattern::Pattern;
use crate::pressure::{self, Cgroup, Counts, Pool, Setting, Swap};
use crate::skip::missing_memfile;
use crate::sys::Errno;
use crate::uapi::{KVM_CAP_MEMFILE, MEMFILE_F_ALL, MEMFILE_F_UNMOVABLE, MEMFILE_F_UNRECLAIMABLE};
use crate::vm::{Vcpu, Vm};
use crate::{HUGE, MIB, PAGE};

/// Bytes of the guest's memory.
const SIZE: u64 = 64 * MIB;
/// Bytes, from the first on, that the guest keeps using.
const WORKING_SET: u64 = SIZE / 4;
/// Bytes of one request of the host.
const BITE: u64 = 2 * MIB;
/// Number of requests before the figures are read.
const BITES: u64 = 4;
/// Number of such steps.
const ROUNDS: u64 = 4;
/// The guest keeps one page in this many when it gives memory back.
const KEEP: u64 = 4;
/// Bytes of swap.
const SWAP: u64 = 2 * SIZE;

/// The courses: name, backing, and `MEMFILE_F_*` that the VM chooses.
const KINDS: [(&str, Backing, Option<u64>); 7] = [
    ("anonymous memory", Backing::Anonymous, None),
    ("memfile, pinned", Backing::MemfileOnDemand, Some(MEMFILE_F_ALL)),
    ("memfile, movable", Backing::MemfileOnDemand, Some(MEMFILE_F_ALL & !MEMFILE_F_UNMOVABLE)),
    (
        "memfile, reclaimable",
        Backing::MemfileOnDemand,
        Some(MEMFILE_F_ALL & !MEMFILE_F_UNRECLAIMABLE),
    ),
    (
        "memfile, movable + reclaimable",
        Backing::MemfileOnDemand,
        Some(MEMFILE_F_ALL & !MEMFILE_F_UNMOVABLE & !MEMFILE_F_UNRECLAIMABLE),
    ),
    ("memfile on hugetlbfs, 2M", Backing::MemfileHuge, None),
    ("guest_memfd", Backing::GuestMemfd, None),
];

/// A step of the story; figures are read after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// VM and slot exist.
    Created,
    /// The guest has written all its memory.
    Written,
    /// The host has asked for [`BITES`] times [`BITE`], the guest read its working set before each.
    Reclaimed,
    /// The guest has read all its memory.
    Read,
    /// The guest has returned all but one of [`KEEP`] pages.
    Punched,
    /// The host has compacted its memory.
    Compacted,
    /// The guest has read what it kept and written the rest.
    Rewritten,
    /// VM, slot and file are gone.
    Gone,
    /// Of a real guest: its process 1 runs.
    Booted,
    /// It has files in its page cache, processes, and memory of its own.
    Worked,
    /// It has freed most of that, and the host has the pages that it reported.
    Freed,
}

impl Step {
    /// Its name in one word.
    pub fn name(self) -> &'static str {
        match self {
            Step::Created => "created",
            Step::Written => "written",
            Step::Reclaimed => "reclaimed",
            Step::Read => "read",
            Step::Punched => "given back",
            Step::Compacted => "compacted",
            Step::Rewritten => "rewritten",
            Step::Gone => "gone",
            Step::Booted => "booted",
            Step::Worked => "worked",
            Step::Freed => "given back",
        }
    }
}

/// The kernel's figures after a step. Bytes unless said otherwise; events are counted from the
/// beginning of the course.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    pub step: Step,
    /// In memory or in swap: `st_blocks` of the file, or `Rss` and `Swap` of the mapping in smaps.
    /// None if the kernel has no figure.
    pub allocated: Option<u64>,
    /// `anon` and `file` in the cgroup's `memory.stat`, and what is in use of a pool of huge pages.
    pub resident: u64,
    /// The cgroup's `memory.swap.current`.
    pub swapped: u64,
    /// Pages: `workingset_refault_anon` in `memory.stat`.
    pub refaults: u64,
    /// Pages of the whole machine: `pgmigrate_success` in `/proc/vmstat`.
    pub migrated: u64,
    /// Free blocks of 2 MiB and more in the machine, counted in 2 MiB, from `/proc/buddyinfo`.
    pub free_2m_blocks: u64,
    /// Counters of memfile.ko: `migrate`, `swap_out`, `young`. None without the module.
    pub memfile: Option<[u64; 3]>,
}

/// The story on one kind of memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Course {
    pub name: String,
    pub samples: Vec<Sample>,
    /// The guest always read its own content, and zeros from pages that it gave back.
    pub own_data: bool,
}

impl Course {
    /// The last figures that were read after such a step.
    pub fn last(&self, step: Step) -> Option<&Sample> {
        self.samples.iter().rfind(|sample| sample.step == step)
    }
}

/// The parameters, in bytes, and the figures.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Story {
    pub size: u64,
    pub working_set: u64,
    /// How much the host requested in each of the steps [`Step::Reclaimed`].
    pub wanted: u64,
    /// The guest kept one page in this many.
    pub keep: u64,
    pub courses: Vec<Course>,
    pub missing: Vec<Missing>,
}

impl Story {
    /// A story without courses.
    pub(super) fn new(size: u64) -> Story {
        Story {
            size,
            working_set: WORKING_SET,
            wanted: BITES * BITE,
            keep: KEEP,
            courses: Vec::new(),
            missing: Vec::new(),
        }
    }
}

/// The host's state during the story.
fn prepare() -> Result<(Swap, Setting)> {
    // Pages in the lists of CPUs are in no free block: keep the lists short.
    let few = Setting::set("/proc/sys/vm/percpu_pagelist_high_fraction", "1000000")?;
    Ok((Swap::on(SWAP)?, few))
}

/// Run the story on each kind of memory.
pub fn tell(progress: &mut dyn FnMut(&str)) -> Result<Story> {
    let mut story = Story::new(SIZE);
    let Some(_host) = unless_missing(prepare(), "the story", &mut story.missing)? else {
        return Ok(story);
    };
    for (name, backing, flags) in KINDS {
        progress(&format!("under pressure: {name}"));
        let course = course(name, backing, flags);
        story.courses.extend(unless_missing(course, name, &mut story.missing)?);
    }
    Ok(story)
}

/// Reads the figures.
pub(super) struct Meter {
    cgroup: Cgroup,
    /// The pool that the guest's memory comes from: it is charged to no cgroup.
    pool: Option<Pool>,
    migrated: u64,
    counts: Option<Counts>,
    samples: Vec<Sample>,
}

impl Meter {
    /// Charges of this cgroup are the guest's memory, and pages in use of this pool.
    pub(super) fn of(cgroup: Cgroup, pool: Option<Pool>) -> Result<Meter> {
        Ok(Meter {
            cgroup,
            pool,
            migrated: mem::vmstat("pgmigrate_success")?,
            counts: Counts::now().ok(),
            samples: Vec::new(),
        })
    }

    fn read(&mut self, step: Step, memory: Option<&Memory>) -> Result<()> {
        let allocated = memory.map(Memory::allocated).transpose()?.flatten();
        self.sample(step, allocated).map(drop)
    }

    pub(super) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    pub(super) fn resident(&self) -> Result<u64> {
        let of = |key| self.cgroup.line("memory.stat", key);
        let huge = match &self.pool {
            Some(pool) => pool.usage()?.used() * pool.page,
            None => 0,
        };
        Ok(of("anon")? + of("file")? + huge)
    }

    pub(super) fn samples(self) -> Vec<Sample> {
        self.samples
    }

    /// The kernel's figures now.
    pub(super) fn sample(&mut self, step: Step, allocated: Option<u64>) -> Result<Sample> {
        mem::refresh_counters();
        let cgroup = &self.cgroup;
        let memfile = self.counts.as_ref().map(|before| -> Result<[u64; 3]> {
            let grown = |name| before.grown(&format!("memfile.{name}"));
            Ok([grown("migrate")?, grown("swap_out")?, grown("young")?])
        });
        let sample = Sample {
            step,
            allocated,
            resident: self.resident()?,
            swapped: cgroup.get("memory.swap.current")?,
            refaults: cgroup.line("memory.stat", "workingset_refault_anon")?,
            migrated: mem::vmstat("pgmigrate_success")? - self.migrated,
            free_2m_blocks: pressure::free_huge_blocks()?,
            memfile: memfile.transpose()?,
        };
        self.samples.push(sample);
        Ok(sample)
    }
}

fn choose(vm: &Vm, flags: u64) -> Result<()> {
    match vm.raw_enable_cap(KVM_CAP_MEMFILE, flags) {
        Err(Errno::EINVAL) => missing_memfile("KVM has no KVM_CAP_MEMFILE"),
        result => result.context("KVM_CAP_MEMFILE"),
    }
}

fn course(name: &str, backing: Backing, flags: Option<u64>) -> Result<Course> {
    // All courses start from the same state.
    pressure::drop_caches()?;
    pressure::compact()?;

    let vm = backing.vm()?;
    flags.map(|flags| choose(&vm, flags)).transpose()?;
    let mut vcpu = vm.vcpu(MAX_VCPUS - 1)?;
    // Charges from now on are the guest's memory.
    let pool = (backing == Backing::MemfileHuge).then(|| Pool::of(HUGE)).transpose()?;
    let mut meter = Meter::of(Cgroup::enter()?, pool)?;
    let memory = Memory::create(backing, &vm, GPA, SIZE, &[(0, SIZE)])?;
    meter.read(Step::Created, Some(&memory))?;

    let first = Pattern::Generation(1);
    // In parts, each of which is quick on a slow machine as well.
    let parts = || (GPA..GPA + SIZE).step_by(BITE as usize);
    for at in parts() {
        vcpu.fill(at, BITE, first).context("the guest writes")?;
    }
    meter.read(Step::Written, Some(&memory))?;

    let mut own_data = true;
    for _ in 0..ROUNDS {
        for _ in 0..BITES {
            own_data &= vcpu.verify_pages(GPA, WORKING_SET, first).is_ok();
            // The figures show whether there was that much.
            meter.cgroup.reclaim(BITE)?;
        }
        meter.read(Step::Reclaimed, Some(&memory))?;
    }
    for at in parts() {
        own_data &= vcpu.verify(at, BITE, first).is_ok();
    }
    meter.read(Step::Read, Some(&memory))?;

    let chunk = KEEP * PAGE;
    for offset in (0..SIZE).step_by(chunk as usize) {
        memory.punch(offset + PAGE, chunk - PAGE).context("punch")?;
    }
    meter.read(Step::Punched, Some(&memory))?;
    pressure::compact()?;
    meter.read(Step::Compacted, Some(&memory))?;

    own_data &= rewrite(&mut vcpu, chunk, first)?;
    meter.read(Step::Rewritten, Some(&memory))?;

    drop((vcpu, vm, memory));
    meter.read(Step::Gone, None)?;
    Ok(Course { name: name.into(), samples: meter.samples, own_data })
}

/// The guest reads one page of each chunk as `kept` and zeros from the rest, writes the rest, and
/// reads everything again: whether all content was right.
fn rewrite(vcpu: &mut Vcpu, chunk: u64, kept: Pattern) -> Result<bool> {
    let mut right = true;
    let again = Pattern::Generation(2);
    let chunks = || (GPA..GPA + SIZE).step_by(chunk as usize);
    for at in chunks() {
        right &= vcpu.verify(at, PAGE, kept).is_ok();
        right &= vcpu.verify_pages(at + PAGE, chunk - PAGE, Pattern::ZERO).is_ok();
        vcpu.fill(at + PAGE, chunk - PAGE, again).context("the guest writes again")?;
    }
    for at in chunks() {
        right &= vcpu.verify(at, PAGE, kept).is_ok();
        right &= vcpu.verify(at + PAGE, chunk - PAGE, again).is_ok();
    }
    Ok(right)
}
