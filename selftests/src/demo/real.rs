// SPDX-License-Identifier: GPL-2.0
//! The story with a real Linux in a real QEMU, on memory of every kind.
//!
//! The guest boots, works (files in its page cache, processes, memory of its own), gives most of
//! that up and reports what is free. Then the host wants half of what is left, and compacts. The
//! guest checks its data all the way.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::story::{Course, Meter, Step, Story};
use super::unless_missing;
use crate::pressure::{self, Cgroup, Pool, Swap};
use crate::qemu::{Config, Kind, Lab, Layout, Machine, Memory};
use crate::sys::{self, Mapping, lock_own_memory};
use crate::{HUGE, MIB, PAGE, mem};

/// Bytes of the memory in question, and of ordinary memory for the guest's kernel.
const SIZE: u64 = 512 * MIB;
const LOW: u64 = 512 * MIB;
/// The areas that the guest fills: memory that it keeps, files and processes that it gives up.
const KEPT: u64 = 64 * MIB;
const FILES: u64 = 96 * MIB;
const PROCESSES: u64 = 8;
const PROCESS: u64 = 4 * MIB;
/// The part of it that must come back before the host goes on; the rest is in small pieces.
const GIVEN_BACK: u64 = (FILES + PROCESSES * PROCESS) / 2;
const PATIENCE: Duration = Duration::from_secs(20);
/// Memory of the host's with a hole in every other page.
const RAGGED: u64 = 128 * MIB;

/// Name, kind, and whether all of it is allocated before the guest runs.
const KINDS: [(&str, Kind, bool); 9] = [
    ("anonymous memory", Kind::Anonymous, false),
    ("shared memfd", Kind::SharedMemfd, false),
    ("private, prealloc", Kind::PINNED, true),
    ("private, pinned", Kind::PINNED, false),
    ("private, movable", Kind::MOVABLE, false),
    ("private, reclaimable", Kind::RECLAIMABLE, false),
    ("private, movable + reclaimable", Kind::BOTH, false),
    ("private, huge pages", Kind::Huge, false),
    ("guest_memfd", Kind::GuestMemfd, false),
];

/// The results.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Real {
    /// Kernel release.
    pub kernel: String,
    /// Bytes of memory in the machine.
    pub machine: u64,
    /// The guests' kernel release.
    pub guest: String,
    pub story: Story,
}

impl Real {
    /// Did every guest read the right content?
    pub fn is_right(&self) -> bool {
        self.story.courses.iter().all(|course| course.own_data)
    }
}

/// Run the story on each kind of memory.
pub fn tell(lab: &Lab, progress: &mut dyn FnMut(&str)) -> Result<Real> {
    lock_own_memory()?;
    let mut real = Real {
        kernel: sys::kernel_release()?,
        machine: mem::meminfo("MemTotal")?,
        guest: String::new(),
        story: Story::new(SIZE),
    };
    let _swap = Swap::on(SIZE)?;
    for (name, kind, prealloc) in KINDS {
        progress(&format!("a real guest: {name}"));
        let memory = Memory { kind, layout: Layout::Dimm { low: LOW }, size: SIZE, prealloc };
        let course = course(lab, name, memory, &mut real.guest);
        real.story.courses.extend(unless_missing(course, name, &mut real.story.missing)?);
    }
    Ok(real)
}

fn course(lab: &Lab, name: &str, memory: Memory, release: &mut String) -> Result<Course> {
    pressure::drop_caches()?;
    pressure::compact()?;
    let pool = match memory.kind {
        Kind::Huge => Some(Pool::of(HUGE)?),
        _ => None,
    };
    let _filled = pool.as_ref().map(|pool| pool.fill(SIZE / pool.page)).transpose()?;
    let mut meter = Meter::of(Cgroup::new()?, pool)?;
    let config = Config::new(memory).with_balloon(true).within(meter.cgroup());
    let mut machine = Machine::start(lab, &config)?;
    let read = |meter: &mut Meter, machine: &Machine, step| {
        let allocated = memory.kind.is_memfile().then(|| machine.private()).transpose()?;
        meter.sample(step, allocated.map(|(bytes, _)| bytes))
    };
    read(&mut meter, &machine, Step::Created)?;
    machine.boot()?;
    machine.guest().release().clone_into(release);
    read(&mut meter, &machine, Step::Booted)?;

    let guest = machine.guest();
    guest.hold("memory", "kept", KEPT, 1)?;
    guest.hold("file", "files", FILES, 2)?;
    guest.fork("memory", PROCESSES, PROCESS, 3)?;
    let mut own_data = guest.verify("files", 2).is_ok() && guest.check_processes().is_ok();
    let worked = read(&mut meter, &machine, Step::Worked)?;

    let guest = machine.guest();
    guest.release_area("files")?;
    own_data &= guest.join().is_ok();
    guest.tidy()?;
    let end = Instant::now() + PATIENCE;
    while meter.resident()? + GIVEN_BACK > worked.resident && Instant::now() < end {
        thread::sleep(Duration::from_millis(100));
    }
    let freed = read(&mut meter, &machine, Step::Freed)?;

    // As much as possible: the first look at a page may find it used.
    let goal = freed.resident / 2;
    for _ in 0..8 {
        let resident = meter.resident()?;
        if resident <= goal {
            break;
        }
        pressure::drop_caches()?;
        meter.cgroup().reclaim(resident - goal)?;
    }
    read(&mut meter, &machine, Step::Reclaimed)?;
    {
        let _ragged = ragged_memory(RAGGED)?;
        pressure::compact()?;
    }
    read(&mut meter, &machine, Step::Compacted)?;
    own_data &= machine.guest().verify("kept", 1).is_ok();
    machine.shut_down().context("the guest's end")?;
    meter.sample(Step::Gone, None)?;
    Ok(Course { name: name.into(), samples: meter.samples(), own_data })
}

/// Memory of this process, locked or not, with a hole in every other page, so that there is memory
/// to compact.
pub fn ragged_memory(size: u64) -> Result<Mapping> {
    let mapping = Mapping::anonymous(size)?;
    let _ = mapping.madvise(0, size, libc::MADV_NOHUGEPAGE);
    for at in (0..size).step_by(PAGE as usize) {
        mapping.store(at, 1);
    }
    for at in (0..size).step_by(2 * PAGE as usize) {
        mapping.madvise(at, PAGE, libc::MADV_DONTNEED_LOCKED).context("make holes")?;
    }
    Ok(mapping)
}
