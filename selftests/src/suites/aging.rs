// SPDX-License-Identifier: GPL-2.0
//! A task that asks whether a guest has used a page delays no other task, and gets the answer for
//! that page.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};

use crate::consumer::{Consumer, Event, Mode, Span};
use crate::ktap::{CaseResult, Suite};
use crate::pressure::{self, ENTRY_CHANGED, Frame, Idle, Trace, frames};
use crate::skip::skip;
use crate::support::setup::{BOTH, GUEST, PINNED, SHARED, SLOT, Setup, fill_view, vm_with_flags};
use crate::sys::*;
use crate::vm::Private;
use crate::{GIB, HUGE, MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "aging",
    [
        asks_without_mmu_lock,
        faults_do_not_wait_for_it,
        large_folio_is_asked_for_at_once,
        use_of_a_shared_page_is_not_use_of_the_private_one,
        look_at_a_shared_page_does_not_make_the_private_one_idle,
        look_at_a_huge_shared_page_makes_no_private_one_idle,
    ]
);

const SIZE: u64 = 4 * MIB;

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
        let trace = Trace::start(&[ENTRY_CHANGED])?;
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

/// The host asks for the page that the VMM has at the address of a private one.
fn look_at_a_shared_page_does_not_make_the_private_one_idle() -> CaseResult {
    let idle = Idle::open()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let (mut s, frames) = guest(BOTH)?;
        let folio = if huge == "always" { HUGE } else { PAGE };
        fill_view(&s.slot, SHARED);
        let shared = pressure::mapped_frames(&s.slot.view)?;
        ensure!(shared.len() as u64 == SIZE / PAGE, "{} pages are there", shared.len());
        let known = |at: u64| {
            let private = frames.get(&(at / folio * folio))?.pfn;
            let shared = shared[(at / PAGE) as usize];
            (idle.knows(private) && idle.knows(shared)).then_some((at, private, shared))
        };
        let at = (37 * PAGE..SIZE).step_by(PAGE as usize).find_map(known);
        let (at, private, shared) = at.context("the bitmap knows no page of both sides")?;
        let at = s.slot.gpa + at;
        for round in 0..2 {
            idle.mark_all([private, shared])?;
            s.vcpu.load(at)?;
            let shared_idle = idle.get(shared)?;
            ensure!(
                !idle.get(private)?,
                "the private page is idle, as the shared one was looked at; the shared one is idle: \
                 {shared_idle}, huge pages {huge}, round {round}"
            );
            ensure!(shared_idle, "use of the private page counted, huge pages {huge}");
        }
        // It still counts if it is used itself.
        s.vm.set_shared(at, PAGE)?;
        idle.mark_all([private, shared])?;
        s.vcpu.load(at)?;
        ensure!(!idle.get(shared)?, "use of the shared page did not count, huge pages {huge}");
        ensure!(idle.get(private)?, "use of the shared page counted, huge pages {huge}");
    }
    Ok(())
}

/// Of a huge page of the VMM the guest sees a part; the rest is at the addresses of private pages.
fn look_at_a_huge_shared_page_makes_no_private_one_idle() -> CaseResult {
    let idle = Idle::open()?;
    let _files = pressure::base_pages()?;
    let _anonymous = pressure::anonymous_huge("madvise")?;
    let (gpa, pages) = (4 * GIB, HUGE / PAGE);
    let vm = vm_with_flags(PINNED)?;
    let fd = memfile(HUGE)?;
    let view = Mapping::anonymous_aligned(HUGE, HUGE)?;
    view.madvise(0, HUGE, libc::MADV_HUGEPAGE).context("MADV_HUGEPAGE")?;
    let slot = vm.add(SLOT, gpa, view, Some((Private::Memfile, fd.as_fd(), 0)))?;
    fill_view(&slot, SHARED);
    let view = pressure::mapped_frames(&slot.view)?;
    let shared = *view.first().context("nothing is mapped")?;
    if !view.iter().copied().eq(shared..shared + pages) || !idle.knows(shared) {
        return skip("the VMM got no huge page that the bitmap knows");
    }
    let mut vcpu = vm.vcpu(0)?;
    vm.set_private(gpa, HUGE)?;
    vcpu.fill(gpa, HUGE, GUEST)?;
    let frames = frames(&vcpu, &slot, &fd)?;
    for range in [0..256, 256..512, 100..101, 1..511] {
        let (start, end) = (range.start * PAGE, range.end * PAGE);
        vm.set_shared(gpa, HUGE)?;
        vm.set_private(gpa + start, end - start)?;
        let private: Vec<_> = frames.range(start..end).map(|(_, frame)| frame.pfn).collect();
        ensure!(private.len() as u64 == range.end - range.start, "{} frames", private.len());
        let known: Vec<_> = private.iter().copied().filter(|pfn| idle.knows(*pfn)).collect();
        ensure!(!known.is_empty(), "the bitmap knows no private page");
        // KVM has all of them mapped.
        for (from, to, side) in [(0, start, SHARED), (start, end, GUEST), (end, HUGE, SHARED)] {
            vcpu.verify_pages(gpa + from, to - from, side)?;
        }

        idle.mark_all(known.iter().copied().chain([shared]))?;
        vcpu.verify_pages(gpa + start, end - start, GUEST)?;
        let shared_idle = idle.get(shared)?;
        for pfn in &known {
            ensure!(
                !idle.get(*pfn)?,
                "a private page is idle, as the shared one was looked at; the shared one is idle: \
                 {shared_idle}, private pages {range:?}"
            );
        }
        ensure!(shared_idle, "use of private pages {range:?} counted");

        // The last page that the guest sees of it.
        idle.mark_all(known.iter().copied().chain([shared]))?;
        vcpu.load(gpa + if end < HUGE { HUGE } else { start } - PAGE)?;
        ensure!(
            !idle.get(shared)?,
            "use of the shared page did not count, private pages {range:?}"
        );
        for pfn in &known {
            ensure!(idle.get(*pfn)?, "use of the shared page counted, private pages {range:?}");
        }
    }
    Ok(())
}
