// SPDX-License-Identifier: GPL-2.0
//! The private and the shared page of a gfn, which share a page table. An invalidation of the
//! private page unmaps the shared one as well, so the host may find no mapping of it. It then frees
//! the shared page without a flush. That must be safe: no task releases `mmu_lock` between a zap
//! and its flush (rule 14).
//!
//! An emulated CPU flushes everything at each exit, so that a stale entry is never used there. Hence
//! most cases count KVM's requests to flush.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};

use crate::consumer::{Consumer, Mode, Span};
use crate::ktap::{CaseResult, Suite};
use crate::pattern::{Pattern, Rng, seed};
use crate::pressure::{self, Cgroup, Counts, MovableZone, Setting, Swap};
use crate::support::setup::{BOTH, GUEST, LAYOUTS, PINNED, SHARED, Setup, fill_view};
use crate::support::stress::{Action, Bench, EVERYTHING, Length, Other, PAGES};
use crate::support::wait::wait_until;
use crate::sys::*;
use crate::vm::{CONVERT_BY, ConvertBy, Private, Slot, Stats, Vcpu, Vm};
use crate::{GIB, MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "border",
    [
        unmapped_is_flushed_before_others_are_told,
        host_takes_shared_pages_beside_holes,
        host_converts_pages_beside_holes,
        hole_over_many_slots_flushes_once,
        hole_over_many_slots_of_two_vms_flushes_each_once,
        conversion_over_many_slots_flushes_once,
        merged_pages_come_apart_beside_holes,
        host_changes_the_shared_side_pinned: 240,
        host_changes_the_shared_side_both: 240,
    ]
);

const GPA: u64 = 4 * GIB;
const FLUSHES: &str = "remote_tlb_flush_requests";

/// A VM with several slots that lie side by side in one file, all of it shared, with all private pages
/// still there.
struct Border {
    vm: Vm,
    vcpu: Vcpu,
    fd: OwnedFd,
    slots: Vec<Slot>,
    stats: Stats,
    rng: Rng,
}

/// Ways in which the host takes one shared page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taking {
    /// `madvise(MADV_DONTNEED)`.
    Discard,
    /// The gfn becomes private.
    Convert(ConvertBy),
}

impl Border {
    const SLOTS: u64 = 8;
    /// Pages of each slot.
    const EACH: u64 = 4;
    const PAGES: u64 = Self::SLOTS * Self::EACH;
    const SIZE: u64 = Self::PAGES * PAGE;

    fn new() -> Result<Border> {
        let rng = Rng::new(seed());
        let fd = memfile(Self::SIZE)?;
        let vm = Vm::protected()?;
        let len = Self::EACH * PAGE;
        let mut slots = Vec::new();
        for n in 0..Self::SLOTS {
            let (id, at) = (1 + n as u32, n * len);
            slots.push(vm.add_private(id, GPA + at, len, Private::Memfile, &fd, at)?);
        }
        vm.set_private(GPA, Self::SIZE)?;
        let mut vcpu = vm.vcpu(0)?;
        vcpu.fill(GPA, Self::SIZE, GUEST)?;
        vm.set_shared(GPA, Self::SIZE)?;
        let stats = vm.stats()?;
        Ok(Border { vm, vcpu, fd, slots, stats, rng })
    }

    fn flushes(&self) -> Result<u64> {
        self.stats.get(FLUSHES)
    }

    /// The vCPU writes to all shared pages, so that it has them mapped: how many flushes there were.
    fn touch(&mut self, pattern: Pattern) -> Result<u64> {
        self.vcpu.fill(GPA, Self::SIZE, pattern)?;
        let mapped = self.stats.get("pages_4k")?;
        ensure!(mapped >= Self::PAGES, "{mapped} pages are mapped");
        self.flushes()
    }

    /// Take one shared page away; its mapping is flushed when this returns.
    fn take(&self, taking: Taking, page: u64, before: u64) -> CaseResult {
        match taking {
            Taking::Discard => {
                let slot = &self.slots[(page / Self::EACH) as usize];
                let offset = page % Self::EACH * PAGE;
                slot.view.madvise(offset, PAGE, libc::MADV_DONTNEED).context("MADV_DONTNEED")?;
            }
            Taking::Convert(by) => self.vm.convert(by, GPA + page * PAGE, PAGE, true)?,
        }
        let flushes = self.flushes()? - before;
        ensure!(flushes > 0, "{taking:?} of page {page}: it was given away without a flush");
        Ok(())
    }

    /// Everything is shared, and holds `pattern` but for the page that was taken.
    fn check(&mut self, taking: Taking, page: u64, pattern: Pattern) -> CaseResult {
        let gpa = GPA + page * PAGE;
        let content = match taking {
            Taking::Discard => Pattern::ZERO,
            Taking::Convert(by) => {
                // The private page was punched.
                self.vcpu.verify(gpa, PAGE, Pattern::ZERO)?;
                self.vm.convert(by, gpa, PAGE, false)?;
                pattern
            }
        };
        self.vcpu.verify(GPA, page * PAGE, pattern)?;
        self.vcpu.verify(gpa, PAGE, content)?;
        self.vcpu.verify(gpa + PAGE, Self::SIZE - (page + 1) * PAGE, pattern)
    }
}

/// All ways to take a page.
fn takings() -> impl Iterator<Item = Taking> {
    [Taking::Discard].into_iter().chain(CONVERT_BY.map(Taking::Convert))
}

/// An observer delays a hole after KVM's callback. A task that takes a shared page now finds no
/// mapping, and rightly does not flush.
fn unmapped_is_flushed_before_others_are_told() -> CaseResult {
    let mut b = Border::new()?;
    for (n, taking) in (0..).zip(takings()) {
        let observer = Consumer::bound(&b.fd, Mode::Observer, Span::same(0, Border::PAGES))?;
        for round in 0..4 {
            let pattern = Pattern::Generation(100 * n + round);
            let page = b.rng.below(Border::PAGES);
            let before = b.touch(pattern)?;
            observer.unbind()?;
            observer.bind(&b.fd, Mode::Observer, Span::same(0, Border::PAGES))?;
            observer.block(true)?;
            let result = thread::scope(|scope| {
                let puncher = scope.spawn(|| punch(&b.fd, 0, Border::SIZE));
                let result = observer.wait_until_called().and_then(|()| {
                    let flushes = b.flushes()? - before;
                    ensure!(flushes > 0, "KVM has unmapped the pages, and not flushed");
                    b.take(taking, page, before)
                });
                observer.block(false)?;
                let punched = puncher.join().map_err(|_| anyhow!("the puncher panicked"))?;
                punched.context("punch")?;
                result
            });
            result.with_context(|| format!("{taking:?}, round {round}"))?;
            b.check(taking, page, pattern)?;
            allocate(&b.fd, 0, Border::SIZE)?;
        }
    }
    Ok(())
}

/// One thread punches all private pages, another one takes a shared page: the first one has flushed
/// when the second one is done.
fn beside_holes(takings: &[Taking]) -> CaseResult {
    let mut b = Border::new()?;
    let (rounds, barrier) = (96, Barrier::new(2));
    for round in 0..rounds {
        let taking = takings[round as usize % takings.len()];
        let pattern = Pattern::Generation(round);
        let (page, late) = (b.rng.below(Border::PAGES), b.rng.below(64));
        allocate(&b.fd, 0, Border::SIZE)?;
        let before = b.touch(pattern)?;
        let result = thread::scope(|scope| {
            let puncher = scope.spawn(|| {
                barrier.wait();
                punch(&b.fd, 0, Border::SIZE)
            });
            barrier.wait();
            // Not always at the same moment.
            (0..late).for_each(|_| thread::yield_now());
            let result = b.take(taking, page, before);
            let punched = puncher.join().map_err(|_| anyhow!("the puncher panicked"))?;
            punched.context("punch")?;
            result
        });
        result.with_context(|| format!("round {round}"))?;
        b.check(taking, page, pattern).with_context(|| format!("round {round}"))?;
    }
    Ok(())
}

fn host_takes_shared_pages_beside_holes() -> CaseResult {
    beside_holes(&[Taking::Discard])
}

fn host_converts_pages_beside_holes() -> CaseResult {
    beside_holes(&CONVERT_BY.map(Taking::Convert))
}

/// VMs whose slots take turns in one file, a slot a page: how often each flushes for one hole over all.
///
/// KVM flushes as well when another task wants its lock or the CPU while it is unmapping: sometimes
/// there are two.
fn flushes_of_a_hole(vms: usize) -> CaseResult {
    const SLOTS: u64 = 64;
    let fd = memfile(SLOTS * PAGE)?;
    let vms = (0..vms).map(|_| Vm::protected()).collect::<Result<Vec<_>>>()?;
    let mut slots = Vec::new();
    for n in 0..SLOTS {
        let vm = &vms[n as usize % vms.len()];
        // Not side by side in the guest.
        let gpa = GPA + n * MIB;
        slots.push(vm.add_private(1 + n as u32, gpa, PAGE, Private::Memfile, &fd, n * PAGE)?);
        vm.set_private(gpa, PAGE)?;
    }
    let mut vcpus = vms.iter().map(|vm| vm.vcpu(0)).collect::<Result<Vec<_>>>()?;
    let stats = vms.iter().map(Vm::stats).collect::<Result<Vec<_>>>()?;
    let flushes = || stats.iter().map(|stats| stats.get(FLUSHES)).collect::<Result<Vec<_>>>();
    let mut least = u64::MAX;
    for round in 0..8 {
        for (n, slot) in slots.iter().enumerate() {
            let vcpu = &mut vcpus[n % vms.len()];
            vcpu.fill(slot.gpa, PAGE, Pattern::Generation(round))?;
        }
        let before = flushes()?;
        punch(&fd, 0, SLOTS * PAGE)?;
        let counts: Vec<u64> =
            flushes()?.iter().zip(&before).map(|(now, then)| now - then).collect();
        println!("a hole over {SLOTS} slots: flushes {counts:?}");
        ensure!(counts.iter().all(|count| (1..=2).contains(count)), "{counts:?} flushes");
        least = least.min(counts.iter().copied().max().unwrap_or(0));
        for (n, slot) in slots.iter().enumerate() {
            vcpus[n % vms.len()].verify(slot.gpa, PAGE, Pattern::ZERO)?;
        }
    }
    ensure!(least == 1, "never one flush for each VM");
    Ok(())
}

fn hole_over_many_slots_flushes_once() -> CaseResult {
    flushes_of_a_hole(1)
}

fn hole_over_many_slots_of_two_vms_flushes_each_once() -> CaseResult {
    flushes_of_a_hole(2)
}

/// A kernel with CONFIG_KVM_PROVE_MMU complains if KVM may give its lock away before that.
fn conversion_over_many_slots_flushes_once() -> CaseResult {
    const SLOTS: u64 = 64;
    let vm = Vm::protected()?;
    let fd = memfile(SLOTS * PAGE)?;
    let mut slots = Vec::new();
    for n in 0..SLOTS {
        let gpa = GPA + n * MIB;
        slots.push(vm.add_private(1 + n as u32, gpa, PAGE, Private::Memfile, &fd, n * PAGE)?);
        fill_view(&slots[n as usize], SHARED);
    }
    let all = SLOTS * MIB;
    let mut vcpu = vm.vcpu(0)?;
    let stats = vm.stats()?;
    let mut least = u64::MAX;
    for round in 0..4 {
        for (to, pattern) in [(true, GUEST), (false, SHARED)] {
            let before = stats.get(FLUSHES)?;
            vm.convert(CONVERT_BY[round % CONVERT_BY.len()], GPA, all, to)?;
            let count = stats.get(FLUSHES)? - before;
            if round > 0 || !to {
                println!("{SLOTS} slots became private: {to}; flushes: {count}");
                // A walk that yields flushes before.
                ensure!((1..SLOTS).contains(&count), "{count} flushes");
                least = least.min(count);
            }
            // All of them are mapped before the next conversion.
            for slot in &slots {
                if to && round == 0 {
                    vcpu.fill(slot.gpa, PAGE, pattern)?;
                }
                vcpu.verify(slot.gpa, PAGE, pattern)?;
            }
        }
    }
    ensure!(least == 1, "never one flush for all slots");
    Ok(())
}

/// How many pages of the guest are merged.
fn merged(view: &Mapping) -> Result<u64> {
    let mut count = 0;
    for pfn in pressure::mapped_frames(view)? {
        count += u64::from(pressure::page_flags(pfn)? & pressure::KPF_KSM != 0);
    }
    Ok(count)
}

/// KSM merges shared pages while the private ones are punched and others are converted; then the guest
/// writes to some of them, and they are its own again.
fn merged_pages_come_apart_beside_holes() -> CaseResult {
    const KSM: &str = "/sys/kernel/mm/ksm";
    const COUNT: u64 = 64;
    const SIZE: u64 = COUNT * PAGE;
    // Behind those that are merged: pages to be converted.
    const OTHERS: u64 = 16 * PAGE;
    let _settings = [
        Setting::set(format!("{KSM}/pages_to_scan"), "1000")?,
        Setting::set(format!("{KSM}/sleep_millisecs"), "1")?,
        Setting::set(format!("{KSM}/run"), "1")?,
    ];
    let mut s = Setup::new(Private::Memfile, SIZE + OTHERS)?;
    let gpa = s.slot.gpa;
    s.fill_both()?;
    s.vm.set_shared(gpa, SIZE)?;
    s.slot.view.madvise(0, SIZE, libc::MADV_MERGEABLE).context("MADV_MERGEABLE")?;
    for round in 0..4 {
        let (same, own) = (Pattern::Constant(1000 + round), Pattern::Generation(round));
        s.vcpu.fill(gpa, SIZE, same)?;
        let over = AtomicBool::new(false);
        let Setup { vm, vcpu, fd, slot, .. } = &mut s;
        let view = &slot.view;
        let holes = thread::scope(|scope| {
            let others = scope.spawn(|| -> Result<u64> {
                let mut holes = 0;
                while holes < 2 || !over.load(Ordering::Relaxed) {
                    let by = CONVERT_BY[holes as usize % 2];
                    vm.convert(by, gpa + SIZE, OTHERS, false)?;
                    punch(&*fd, 0, SIZE + OTHERS).context("punch")?;
                    vm.convert(by, gpa + SIZE, OTHERS, true)?;
                    allocate(&*fd, 0, SIZE).context("fallocate")?;
                    holes += 1;
                }
                Ok(holes)
            });
            let mut work = || -> CaseResult {
                wait_until("pages are merged", || Ok(merged(view)? >= COUNT / 2))?;
                vcpu.verify(gpa, SIZE, same).context("merged")?;
                // Each second page comes apart.
                for page in (0..COUNT).step_by(2) {
                    vcpu.fill(gpa + page * PAGE, PAGE, own)?;
                }
                for page in 0..COUNT {
                    let wanted = if page % 2 == 0 { own } else { same };
                    vcpu.verify(gpa + page * PAGE, PAGE, wanted)?;
                }
                Ok(())
            };
            let result = work();
            over.store(true, Ordering::Relaxed);
            let holes = others.join().map_err(|_| anyhow!("the other thread panicked"))?;
            result.and(holes)
        });
        println!("round {round}: {} holes", holes.with_context(|| format!("round {round}"))?);
        for page in 0..COUNT {
            let wanted = if page % 2 == 0 { own } else { same };
            crate::support::setup::check_view(&s.slot, page * PAGE, PAGE, wanted)?;
        }
    }
    Ok(())
}

/// vCPUs check every word on both sides while one thread punches, converts and discards, and others, at
/// the same time, reclaim, compact, take memory blocks away, and discard shared pages that the first
/// one's holes and conversions unmap. KSM looks for pages as well.
fn host_changes_the_shared_side(flags: u64) -> CaseResult {
    const KSM: &str = "/sys/kernel/mm/ksm";
    /// Shared pages that are discarded all the time.
    const DISCARDED: u64 = 32;
    let _ksm = Setting::set(format!("{KSM}/run"), "1")?;
    let _swap = Swap::on(64 * MIB)?;
    let (cgroup, zone) = (Arc::new(Cgroup::enter()?), MovableZone::make(2)?);
    // The program must not lock its memory: the guest's shared pages go to swap and come back.
    let s = Setup::with_flags(flags, PAGES * PAGE)?;
    s.slot.view.madvise(0, PAGES * PAGE, libc::MADV_MERGEABLE).context("MADV_MERGEABLE")?;
    let counts = Counts::now()?;
    let mut bench = Bench::of(s, LAYOUTS[0], None, Length::Actions(32))?;
    let reclaimed = cgroup.clone();
    let others: Vec<Other> = vec![
        Box::new(move || reclaimed.reclaim(PAGES * PAGE / 4).map(drop)),
        // One after the other: compaction looks at pages of blocks that nobody keeps online, and Linux
        // with CONFIG_DEBUG_VM panics if one goes offline meanwhile.
        Box::new(move || {
            pressure::compact()?;
            zone.shuffle()
        }),
        bench.discards(DISCARDED)?,
    ];
    bench.run_beside(2, &[&[Action::Discard][..], &EVERYTHING].concat(), others)?;
    counts.expect_grown(&["memfile.punch", "memfile.get_pfn", "pgmigrate_success", "pswpout"], 1)
}

fn host_changes_the_shared_side_pinned() -> CaseResult {
    host_changes_the_shared_side(PINNED)
}

fn host_changes_the_shared_side_both() -> CaseResult {
    host_changes_the_shared_side(BOTH)
}
