// SPDX-License-Identifier: GPL-2.0
//! A guest checks every word it reads while the host compacts, reclaims, takes memory blocks away,
//! punches and converts: for each choice of flags, page size and number of vCPUs (rules 14 to 19).
//!
//! [`crate::support::stress`] describes how a wrong word is found; its controls test these cases as
//! well.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::guest::Command;
use crate::ktap::{Case, CaseResult, Suite};
use crate::pattern::{Pattern, Rng};
use crate::pressure::{self, Cgroup, Counts, MovableZone, Pool, Swap, frames};
use crate::support::backend::{self, Backend};
use crate::support::hugetlb::{Broken, pool};
use crate::support::setup::{
    BOTH, GUEST, LAYOUTS, Layout, MOVABLE, PINNED, RECLAIMABLE, Setup, vm_with_flags,
};
use crate::support::stress::{Action, Bench, EVERYTHING, Host, Length, Other, PAGES};
use crate::sys::*;
use crate::vm::Exit;
use crate::{GIB, HUGE, MIB, PAGE, suite};

/// How long each lasts.
const DURATION: Duration = Duration::from_millis(1500);

/// Times that each action is done on hugetlbfs, and that a page of the other VM breaks.
const ROUNDS: u64 = 5;

/// Actions of the host in addition to [`EVERYTHING`].
const MOTION: [Action; 3] = [Action::Compact, Action::Reclaim, Action::Take];

fn checked(flags: u64, huge: &str, vcpus: u64) -> CaseResult {
    lock_own_memory()?;
    let _huge = pressure::shmem_huge(huge)?;
    let _swap = Swap::on(64 * MIB)?;
    let (cgroup, zone) = (Cgroup::enter()?, MovableZone::make(2)?);
    let host = Host { cgroup, take: Box::new(move || zone.shuffle()) };
    let s = Setup::with_flags(flags, PAGES * PAGE)?;
    let counts = Counts::now()?;
    let mut bench = Bench::of(s, LAYOUTS[0], Some(host), Length::Time(DURATION))?;
    // The vCPUs find all pages in swap, if they may go there.
    for _ in 0..4 {
        bench.host()?.cgroup.reclaim(PAGES * PAGE)?;
    }
    bench.run(vcpus, &[&MOTION[..], &EVERYTHING].concat())?;
    // Each allowed event has happened, and no other.
    let happened = |names: &[&str], may: bool| match may {
        true => counts.expect_grown(names, 1),
        false => counts.expect_same(names),
    };
    happened(&["memfile.migrate"], flags == MOVABLE || flags == BOTH)?;
    happened(&["memfile.swap_out"], flags == RECLAIMABLE || flags == BOTH).context("swap")?;
    if huge == "always" {
        counts.expect_grown(&["thp_file_alloc"], 1)?;
    }
    counts.expect_grown(&["memfile.punch", "memfile.get_pfn"], 1)
}

/// Declare a case per line.
macro_rules! cases {
    ($($name:ident: $flags:ident $huge:literal $vcpus:literal,)*) => {
        pub static SUITE: Suite = Suite {
            name: "motion",
            cases: &[$(Case {
                name: stringify!($name),
                func: || checked($flags, $huge, $vcpus),
                limit: crate::ktap::TIME_LIMIT,
            }),*],
            hidden: false,
            together: false,
        };
    };
}

cases! {
    pinned_4k_one_vcpu: PINNED "never" 1,
    pinned_4k_several_vcpus: PINNED "never" 3,
    pinned_huge_one_vcpu: PINNED "always" 1,
    pinned_huge_several_vcpus: PINNED "always" 3,
    movable_4k_one_vcpu: MOVABLE "never" 1,
    movable_4k_several_vcpus: MOVABLE "never" 3,
    movable_huge_one_vcpu: MOVABLE "always" 1,
    movable_huge_several_vcpus: MOVABLE "always" 3,
    reclaimable_4k_one_vcpu: RECLAIMABLE "never" 1,
    reclaimable_4k_several_vcpus: RECLAIMABLE "never" 3,
    reclaimable_huge_one_vcpu: RECLAIMABLE "always" 1,
    reclaimable_huge_several_vcpus: RECLAIMABLE "always" 3,
    both_4k_one_vcpu: BOTH "never" 1,
    both_4k_several_vcpus: BOTH "never" 3,
    both_huge_one_vcpu: BOTH "always" 1,
    both_huge_several_vcpus: BOTH "always" 3,
}

/// The same on hugetlbfs, whose pages break as well.
pub static SUITE_HUGE: Suite = suite!(
    "motion_huge",
    [
        pinned_pages_break_and_stay: 120,
        movable_pages_break_and_move: 120,
        errors_meet_holes_and_conversions: 120,
    ]
);

fn pinned_pages_break_and_stay() -> CaseResult {
    checked_huge(PINNED)
}

fn movable_pages_break_and_move() -> CaseResult {
    checked_huge(BOTH)
}

/// The same on a page of 1 GiB, which can move nowhere while the pool has no other.
pub static SUITE_1G: Suite = suite!(
    "motion_1g",
    [
        pinned_page_is_wanted_elsewhere_and_stays: 120,
        movable_page_is_wanted_elsewhere_and_stays: 120,
        errors_meet_holes_and_conversions_in_1g: 120,
    ]
);

fn pinned_page_is_wanted_elsewhere_and_stays() -> CaseResult {
    checked_gigantic(PINNED)
}

fn movable_page_is_wanted_elsewhere_and_stays() -> CaseResult {
    checked_gigantic(BOTH)
}

fn checked_gigantic(flags: u64) -> CaseResult {
    lock_own_memory()?;
    let _page = backend::GIGANTIC.prepare()?;
    let mut s = Setup::with_flags_on(&backend::GIGANTIC, flags, PAGES * PAGE)?;
    s.vcpu.store(s.slot.gpa, 1)?;
    let place = frames(&s.vcpu, &s.slot, &s.fd)?.get(&0).context("the page has no frame")?.pfn;
    let take = move || -> CaseResult {
        ensure!(pressure::soft_offline(place).is_err(), "the only page was given up");
        Ok(())
    };
    let host = Host { cgroup: Cgroup::enter()?, take: Box::new(take) };
    let counts = Counts::now()?;
    let mut bench = Bench::of(s, LAYOUTS[0], Some(host), Length::Time(2 * DURATION))?;
    bench.run(2, &[&[Action::Compact, Action::Take][..], &EVERYTHING].concat())?;
    counts.expect_same(&["memfile.migrate"])?;
    counts.expect_grown(&["memfile.punch", "memfile.get_pfn"], 1)
}

/// Pages of hugetlbfs, of which the host takes the memory away or tries to. In the last huge page
/// of the file is another VM, whose pages break one after the other.
fn checked_huge(flags: u64) -> CaseResult {
    lock_own_memory()?;
    let zone = MovableZone::make(2)?;
    let pool = Pool::of(HUGE)?;
    let _pool = [pool.fill(8)?, pool.overcommit(8)?];
    // Nothing moves between the look at a page's place and the error there.
    let moving = Arc::new(Mutex::new(()));
    let guard = moving.clone();
    let take = move || -> CaseResult {
        let _moving = guard.lock();
        for block in &zone.blocks {
            // A block with a broken page stays until its file gives the page up.
            if block.raw_offline().is_ok() {
                block.give_back("online_movable")?;
            }
        }
        Ok(())
    };
    let host = Host { cgroup: Cgroup::enter()?, take: Box::new(take) };
    let s = Setup::with_flags_on(&backend::HUGE, flags, PAGES * PAGE)?;
    let breaking = breaking(&s, flags, moving)?;
    let counts = Counts::now()?;
    let length = Length::Rounds(2 * DURATION, ROUNDS);
    let mut bench = Bench::of(s, LAYOUTS[0], Some(host), length)?;
    let actions = [&[Action::Compact, Action::Take][..], &EVERYTHING].concat();
    bench.run_beside(2, &actions, vec![breaking])?;
    match flags {
        PINNED => counts.expect_same(&["memfile.migrate"])?,
        _ => counts.expect_grown(&["memfile.migrate"], 1)?,
    }
    // Each round of the other VM has at least one of each.
    counts.expect_grown(&["memfile.punch", "memfile.get_pfn", "memfile.poison"], ROUNDS)
}

/// Repeats the life of a VM on the huge page behind those of `s`: one of its small pages breaks,
/// the others are as they were, and it gets another huge page for it.
fn breaking(s: &Setup, flags: u64, moving: Arc<Mutex<()>>) -> Result<Other> {
    let fd = s.fd.try_clone().context("dup")?;
    let layout = Layout { gpa: 8 * GIB, offset: (PAGES * PAGE).next_multiple_of(HUGE) };
    let mut rng = Rng::new(crate::pattern::seed());
    Ok(Box::new(move || {
        let vm = vm_with_flags(flags)?;
        let twin = fd.try_clone().context("dup")?;
        let mut s = Setup::on_file(vm, &backend::HUGE, twin, HUGE, layout)?;
        let gpa = s.slot.gpa;
        s.vcpu.fill_pages(gpa, HUGE, GUEST)?;
        let at = PAGE * (1 + rng.below(HUGE / PAGE - 2));
        let staying = moving.lock();
        let places = frames(&s.vcpu, &s.slot, &s.fd)?;
        let place = places.get(&(layout.offset + at)).context("the page has no frame")?.pfn;
        pressure::poison(place)?;
        drop(staying);
        let exit = s.vcpu.start(Command::Load, &[gpa + at])?;
        let broken = matches!(exit, Exit::MemoryFault { errno: Errno::EHWPOISON, .. });
        ensure!(broken, "the broken page can be read: {exit:x?}");
        s.vcpu.restart()?;
        s.vcpu.verify_pages(gpa, at, GUEST)?;
        s.vcpu.verify_pages(gpa + at + PAGE, HUGE - at - PAGE, GUEST)?;
        punch(&s.fd, layout.offset, HUGE).context("give the page up")?;
        s.vcpu.verify_pages(gpa, HUGE, Pattern::ZERO)?;
        punch(&s.fd, layout.offset, HUGE).context("give the new page up")?;
        pressure::mend(place);
        Ok(())
    }))
}

fn errors_meet_holes_and_conversions() -> CaseResult {
    // The rest of the slot's first huge page breaks.
    stress_beside_errors(&backend::HUGE, 400)
}

fn errors_meet_holes_and_conversions_in_1g() -> CaseResult {
    stress_beside_errors(&backend::GIGANTIC, PAGES)
}

/// How many small pages break.
const ERRORS: u64 = 16;

/// One small page after the other breaks behind the first `pages` of a huge page, which the guest uses
/// meanwhile. From the first error on KVM maps all of it in small pages.
fn stress_beside_errors(on: &'static Backend, pages: u64) -> CaseResult {
    lock_own_memory()?;
    for flags in [PINNED, BOTH] {
        let (pool, _filled) = pool(on.page, if on.page == GIB { 1 } else { 4 })?;
        let before = pool.usage()?.used();
        let mut lost = Broken::none(on.page);
        let s = Setup::with_flags_on(on, flags, PAGES * PAGE)?;
        let gpa = s.slot.gpa;
        let length = Length::Rounds(2 * DURATION, ERRORS);
        let mut bench = Bench::of(s, LAYOUTS[0], None, length)?.of_the_first(pages);
        bench.s.expect_whole()?;
        let places = frames(&bench.s.vcpu, &bench.s.slot, &bench.s.fd)?;
        let first = places.get(&0).context("the page has no frame")?.pfn + pages;
        lost.frames = (0..ERRORS).map(|n| first + n).collect();
        let counts = Counts::now()?;
        bench.run_beside(2, &EVERYTHING, vec![breaking_each(lost.frames.clone())])?;
        counts.expect_grown(&["memfile.poison"], ERRORS)?;
        counts.expect_grown(&["memfile.punch", "memfile.get_pfn"], 1)?;
        let level = if on.page == GIB { "pages_1g" } else { "pages_2m" };
        let mapped = bench.s.vm.stats()?.get(level)?;
        ensure!(mapped == 0, "{level} is {mapped}: something is mapped across a broken page");
        for n in 0..ERRORS {
            bench.s.vcpu.expect_lost(gpa + (pages + n) * PAGE)?;
        }
        // What was written before the first error.
        let next = gpa + (pages + ERRORS) * PAGE;
        if pages + ERRORS < PAGES {
            bench.s.vcpu.verify(next, PAGE, Pattern::Generation(1)).context("behind them")?;
        }
        drop(bench);
        pool.expect_used(before + 1, "the guest is gone, the page is broken")?;
        drop(lost);
        pool.expect_used(before, "the page is mended")?;
    }
    Ok(())
}

/// Breaks one frame after the other.
fn breaking_each(frames: Vec<u64>) -> Other {
    let mut frames = frames.into_iter();
    Box::new(move || {
        match frames.next() {
            // The kernel says EBUSY if a vCPU faults in the huge page at that moment, and EHWPOISON if
            // that is broken already; it has taken note.
            Some(frame) => drop(pressure::poison(frame)),
            None => thread::sleep(Duration::from_millis(10)),
        }
        Ok(())
    })
}
