// SPDX-License-Identifier: GPL-2.0
//! A task that asks whether a guest has used a page delays no other task, and gets the answer for
//! that page.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};

use crate::consumer::{Consumer, Event, Mode, Span};
use crate::ktap::{CaseResult, Suite};
use crate::pressure::{self, Frame, Idle, Trace, frames};
use crate::support::setup::{BOTH, GUEST, PINNED, Setup};
use crate::sys::*;
use crate::{HUGE, MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "aging",
    [
        asks_without_mmu_lock,
        faults_do_not_wait_for_it,
        large_folio_is_asked_for_at_once,
        use_of_a_shared_page_is_not_use_of_the_private_one,
    ]
);

const SIZE: u64 = 4 * MIB;
/// An entry of a guest's page table changed: by a fault, or because its accessed bit was cleared.
const CHANGED: &str = "kvmmmu:kvm_tdp_mmu_spte_changed";

fn guest(flags: u64) -> Result<(Setup, BTreeMap<u64, Frame>)> {
    let s = Setup::filled(flags, SIZE)?;
    let frames = frames(&s.vcpu, &s.slot, &s.fd)?;
    Ok((s, frames))
}

/// A fault holds mmu_lock when it changes an entry, and one lock more than a task that ages one.
fn asks_without_mmu_lock() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let idle = Idle::open()?;
    for flags in [PINNED, BOTH] {
        let trace = Trace::start(&[CHANGED])?;
        let (s, frames) = guest(flags)?;
        let (gfn, pages) = (s.slot.gpa / PAGE, SIZE / PAGE);
        let depths = || -> Result<Vec<u32>> {
            let events = trace.events()?;
            let mine = events
                .iter()
                .filter(|e| e.hex_after("gfn").is_some_and(|at| (gfn..gfn + pages).contains(&at)));
            Ok(mine.map(|e| e.depth).collect())
        };
        let fault = depths()?.into_iter().min().context("no fault was traced")?;
        trace.clear()?;
        idle.mark_all(frames.values().map(|frame| frame.pfn))?;
        let aged = depths()?;
        let most = aged.iter().max().context("no accessed bit was cleared")?;
        println!("{} entries aged, at most {most} locks held; {fault} in a fault", aged.len());
        ensure!(aged.len() as u64 >= pages, "{} of {pages} pages were asked for", aged.len());
        ensure!(*most < fault, "{most} locks were held, as many as in a fault");
    }
    Ok(())
}

/// Of `lock:contention_begin`: a reader waits for a lock that has writers and spins, as mmu_lock.
const SPIN_READ: u32 = 1 << 0 | 1 << 1;

/// A thread asks for one half of the memory all the time, the guest faults on the other half.
fn faults_do_not_wait_for_it() -> CaseResult {
    let idle = Idle::open()?;
    let (mut s, frames) = guest(BOTH)?;
    let (gpa, half) = (s.slot.gpa, SIZE / 2);
    let mut user = s.vm.vcpu(1)?;
    let pfns: Vec<u64> = frames.range(..half).map(|(_, frame)| frame.pfn).collect();
    let stop = AtomicBool::new(false);
    let readers = format!("common_pid == {} && flags == {SPIN_READ}", thread_id());
    let trace = Trace::only("lock:contention_begin", &readers)?;
    let asked = thread::scope(|scope| -> Result<u64> {
        let asking = scope.spawn(|| -> Result<u64> {
            let mut asked = 0;
            while !stop.load(Ordering::Relaxed) {
                user.verify_pages(gpa, half, GUEST)?;
                pfns.iter().try_for_each(|pfn| idle.mark(*pfn))?;
                asked += pfns.len() as u64;
            }
            Ok(asked)
        });
        let faults = (0..8).try_for_each(|_| -> CaseResult {
            punch(&s.fd, half, half)?;
            trace.clear()?;
            s.vcpu.fill_pages(gpa + half, half, GUEST)?;
            ensure!(trace.events()?.is_empty(), "a fault waited for mmu_lock");
            Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        let asked = asking.join().map_err(|_| anyhow!("the asking thread panicked"))?;
        faults.and(asked)
    })?;
    println!("asked {asked} times");
    ensure!(asked > 0, "the thread asked for no page");
    Ok(())
}

/// A consumer gets one call for the frames of a folio that it has bound, not one for each.
fn large_folio_is_asked_for_at_once() -> CaseResult {
    let idle = Idle::open()?;
    let pages = HUGE / PAGE;
    // The consumer's frames have other numbers than the file's pages.
    let frame = 4 * pages;
    for (huge, order) in [("never", 1), ("always", pages)] {
        let _huge = pressure::shmem_huge(huge)?;
        let (s, frames) = guest(BOTH)?;
        let observer = Consumer::bound(&s.fd, Mode::Observer, Span { pgoff: 0, pages, frame })?;
        let known = frames.range(..HUGE).step_by(order as usize);
        let known = known.map(|(at, place)| (*at / PAGE, place.pfn));
        let known: Vec<_> = known.filter(|(_, pfn)| idle.knows(*pfn)).collect();
        let (at, pfn) = *known.last().context("the bitmap knows no page of the guest")?;
        idle.mark_all([pfn])?;
        let asked = observer.callbacks()?.events;
        ensure!(
            asked == [Event::Young(frame + at, frame + at + order)],
            "huge pages {huge}: {asked:x?} for {order} pages from {at:#x} on"
        );
    }
    Ok(())
}

/// Both are in one page table. A folio that is private in part is asked for page by page.
fn use_of_a_shared_page_is_not_use_of_the_private_one() -> CaseResult {
    let idle = Idle::open()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let (mut s, frames) = guest(BOTH)?;
        let folio = if huge == "always" { HUGE } else { PAGE };
        let known = |at: u64| {
            let frame = frames.get(&(at / folio * folio))?;
            idle.knows(frame.pfn).then_some((at, frame.pfn))
        };
        // In the middle of a folio.
        let at = (37 * PAGE..SIZE).step_by(HUGE as usize).find_map(known);
        let (at, head) = at.context("the bitmap knows no page of the guest")?;
        let at = s.slot.gpa + at;
        s.vm.set_shared(at, PAGE)?;
        idle.mark_all([head])?;
        s.vcpu.store(at, 1)?;
        ensure!(idle.get(head)?, "use of the shared page counted, huge pages {huge}");
        if folio == HUGE {
            s.vcpu.load(at + PAGE)?;
        } else {
            s.vm.set_private(at, PAGE)?;
            s.vcpu.load(at)?;
        }
        ensure!(!idle.get(head)?, "use of the private page did not count, huge pages {huge}");
    }
    Ok(())
}
