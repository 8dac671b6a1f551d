// SPDX-License-Identifier: GPL-2.0
//! The guest sees a punched hole, at the right place and nowhere else.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::guest::Command;
use crate::ktap::CaseResult;
use crate::pattern::{Pattern, Rng, seed};
use crate::pressure::base_pages;
use crate::support::backend::Backend;
use crate::support::setup::{GUEST, LAYOUTS, SHARED, Setup, check_view};
use crate::sys::{allocate, file_size, punch};
use crate::{MIB, PAGE, conformance};

conformance!(
    "punch",
    [
        hole_reads_zeros_and_data_outside_stays,
        second_vcpu_sees_the_hole,
        hole_in_first_and_last_page,
        hole_over_the_whole_slot,
        hole_below_the_slot_changes_nothing,
        hole_above_the_slot_changes_nothing,
        hole_across_the_start_of_the_slot,
        hole_across_the_end_of_the_slot,
        hole_around_the_slot,
        hole_may_be_written_again,
        hole_in_a_hole_changes_nothing,
        hole_past_the_end_of_the_file_is_allowed,
        random_holes_hit_exactly_their_pages,
        vcpu_that_reads_meanwhile_sees_the_hole_at_once,
        hole_flushes_the_tlb_a_bounded_number_of_times,
        fallocate_over_live_memory_changes_no_byte,
    ],
    converting: [hole_leaves_the_shared_view_alone],
    huge: all,
    hidden: all,
    small: [file_outlives_its_vm],
    // The other holes differ in where they lie, not in what becomes of the page.
    gigantic: [
        second_vcpu_sees_the_hole,
        vcpu_that_reads_meanwhile_sees_the_hole_at_once,
        hole_flushes_the_tlb_a_bounded_number_of_times,
        fallocate_over_live_memory_changes_no_byte,
        hole_leaves_the_shared_view_alone,
    ],
);

/// The value that the guest writes to a hole.
const AGAIN: Pattern = Pattern::Generation(3000);

/// Punch `[start, end)`, bytes relative to the slot's part of the file and perhaps outside of it,
/// at every layout; then exactly the pages inside read as zeros.
fn punch_and_check(on: &'static Backend, size: u64, start: i64, end: i64) -> CaseResult {
    for layout in LAYOUTS {
        let mut s = Setup::at(on, size, layout)?;
        let from = layout.offset.saturating_add_signed(start);
        let to = layout.offset.saturating_add_signed(end);
        if from == to {
            // There is no page below offset 0.
            continue;
        }
        let hole = (from.max(layout.offset), to.min(layout.offset + size));
        s.fill_both()?;
        punch(&s.fd, from, to - from)
            .with_context(|| format!("punch [{from:#x}, {to:#x})"))
            .and_then(|()| match hole.1.checked_sub(hole.0) {
                Some(len) if len > 0 => check_hole(&mut s, hole.0 - layout.offset, len),
                _ => s.vcpu.verify(s.slot.gpa, size, GUEST),
            })
            .and_then(|()| check_view(&s.slot, 0, size, SHARED))
            .with_context(|| format!("{layout:x?}"))?;
    }
    Ok(())
}

/// The guest reads zeros in `[start, start + len)` of the slot and its own data elsewhere; and its
/// later writes to the hole go to new pages. (A stale mapping would look right again once the same
/// page is allocated again.)
fn check_hole(s: &mut Setup, start: u64, len: u64) -> Result<()> {
    let (gpa, end) = (s.slot.gpa, start + len);
    s.vcpu.verify(gpa, start, GUEST).context("below the hole")?;
    s.vcpu.verify(gpa + start, len, Pattern::ZERO).context("in the hole")?;
    s.vcpu.verify(gpa + end, s.slot.size - end, GUEST).context("above the hole")?;
    s.vcpu.fill(gpa + start, len, AGAIN)?;
    s.vcpu.verify(gpa + start, len, AGAIN).context("in the hole, written again")
}

fn hole_reads_zeros_and_data_outside_stays(on: &'static Backend) -> CaseResult {
    punch_and_check(on, MIB, 16 * 4096, 48 * 4096)
}

fn second_vcpu_sees_the_hole(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, on.whole())?;
    let mut other = s.vm.vcpu(1)?;
    s.fill_both()?;
    other.verify(s.slot.gpa, s.slot.size, GUEST)?;
    punch(&s.fd, 8 * PAGE, 8 * PAGE)?;
    other.verify(s.slot.gpa + 8 * PAGE, 8 * PAGE, Pattern::ZERO)?;
    other.verify(s.slot.gpa, 8 * PAGE, GUEST)?;
    check_hole(&mut s, 8 * PAGE, 8 * PAGE)
}

fn hole_in_first_and_last_page(on: &'static Backend) -> CaseResult {
    punch_and_check(on, MIB, 0, 4096)?;
    punch_and_check(on, MIB, MIB as i64 - 4096, MIB as i64)
}

fn hole_over_the_whole_slot(on: &'static Backend) -> CaseResult {
    punch_and_check(on, MIB, 0, MIB as i64)
}

fn hole_below_the_slot_changes_nothing(on: &'static Backend) -> CaseResult {
    punch_and_check(on, MIB, -16 * 4096, 0)
}

fn hole_above_the_slot_changes_nothing(on: &'static Backend) -> CaseResult {
    punch_and_check(on, MIB, MIB as i64, MIB as i64 + 16 * 4096)
}

fn hole_across_the_start_of_the_slot(on: &'static Backend) -> CaseResult {
    punch_and_check(on, MIB, -4 * 4096, 4 * 4096)
}

fn hole_across_the_end_of_the_slot(on: &'static Backend) -> CaseResult {
    punch_and_check(on, MIB, MIB as i64 - 4 * 4096, MIB as i64 + 4 * 4096)
}

fn hole_around_the_slot(on: &'static Backend) -> CaseResult {
    punch_and_check(on, MIB, -4096, MIB as i64 + 4096)
}

fn hole_may_be_written_again(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, MIB)?;
    let part = (s.slot.gpa + 4 * PAGE, 4 * PAGE);
    for round in 0..8 {
        let pattern = Pattern::Generation(round);
        s.vcpu.fill(part.0, part.1, pattern)?;
        s.vcpu.verify(part.0, part.1, pattern)?;
        punch(&s.fd, 4 * PAGE, 4 * PAGE)?;
        s.vcpu.verify(part.0, part.1, Pattern::ZERO)?;
    }
    Ok(())
}

fn hole_leaves_the_shared_view_alone(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, MIB)?;
    s.fill_both()?;
    s.vm.set_shared(s.slot.gpa, 32 * PAGE)?;
    s.vcpu.verify(s.slot.gpa, 32 * PAGE, SHARED)?;
    punch(&s.fd, 0, 64 * PAGE)?;
    s.vcpu.verify(s.slot.gpa, 32 * PAGE, SHARED)?;
    s.vcpu.verify(s.slot.gpa + 32 * PAGE, 32 * PAGE, Pattern::ZERO)
}

fn hole_in_a_hole_changes_nothing(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, MIB)?;
    punch(&s.fd, 0, MIB)?;
    s.fill_both()?;
    punch(&s.fd, 8 * PAGE, 8 * PAGE)?;
    punch(&s.fd, 8 * PAGE, 8 * PAGE)?;
    punch(&s.fd, 10 * PAGE, PAGE)?;
    check_hole(&mut s, 8 * PAGE, 8 * PAGE)
}

fn hole_past_the_end_of_the_file_is_allowed(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, MIB)?;
    s.fill_both()?;
    let end = file_size(&s.fd)?;
    on.works("hole at the end", punch(&s.fd, end, MIB))?;
    on.works("hole past the end", punch(&s.fd, end + MIB, MIB))?;
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)
}

fn random_holes_hit_exactly_their_pages(on: &'static Backend) -> CaseResult {
    let mut rng = Rng::new(seed());
    for layout in LAYOUTS {
        let mut s = Setup::at(on, MIB, layout)?;
        let pages = s.slot.size / PAGE;
        s.fill_both()?;
        let mut there = vec![true; pages as usize];
        for _ in 0..12 {
            let first = rng.below(pages);
            let len = 1 + rng.below(8.min(pages - first));
            punch(&s.fd, layout.offset + first * PAGE, len * PAGE)?;
            there[first as usize..(first + len) as usize].fill(false);
        }
        for (page, there) in (0..).zip(there) {
            let wanted = if there { GUEST } else { Pattern::ZERO };
            s.vcpu
                .verify(s.slot.gpa + page * PAGE, PAGE, wanted)
                .with_context(|| format!("page {page}, {layout:x?}"))?;
        }
    }
    Ok(())
}

/// A vCPU has the pages in its TLB all the while. Once the punch has returned, what it loads must
/// be zero: a load of the old word would be a stale mapping.
fn vcpu_that_reads_meanwhile_sees_the_hole_at_once(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, on.whole())?;
    let mut reader = s.vm.vcpu(1)?;
    let (gpa, hole) = (s.slot.gpa, s.slot.gpa + 4 * PAGE);
    for round in 0..20 {
        s.vcpu.fill(gpa, 16 * PAGE, Pattern::Generation(round))?;
        s.expect_whole()?;
        reader.post(Command::Watch, &[hole, hole + 4 * PAGE, PAGE, 0])?;
        let stopper = reader.stopper();
        thread::scope(|scope| {
            let running = scope.spawn(|| reader.run_endless(Command::Watch));
            let wait_for = |rounds| {
                while stopper.rounds() < rounds && !running.is_finished() {
                    thread::sleep(Duration::from_micros(200));
                }
            };
            wait_for(2);
            let before = stopper.watched();
            let punched = punch(&s.fd, 4 * PAGE, 4 * PAGE);
            // The current round began before the hole.
            wait_for(stopper.rounds() + 2);
            let after = stopper.watched();
            stopper.stop();
            running.join().map_err(|_| anyhow!("the vCPU thread panicked"))??;
            punched?;
            ensure!(before != 0, "round {round}: the vCPU read zeros before there was a hole");
            ensure!(after == 0, "round {round}: the vCPU still reads {after:#x} in the hole");
            Ok(())
        })?;
        s.vcpu.verify(hole, 4 * PAGE, Pattern::ZERO)?;
        reader.verify(hole, 4 * PAGE, Pattern::ZERO)?;
        reader.verify(gpa, 4 * PAGE, Pattern::Generation(round))?;
    }
    Ok(())
}

fn hole_flushes_the_tlb_a_bounded_number_of_times(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, 8 * MIB)?;
    let stats = s.vm.stats()?;
    let mut least = u64::MAX;
    // KVM also flushes each time it yields mmu_lock to a task that waits for the CPU, which no hole
    // is to blame for: the quietest one counts.
    for _ in 0..5 {
        s.vcpu.fill_pages(s.slot.gpa, s.slot.size, GUEST)?;
        let before = stats.get("remote_tlb_flush_requests")?;
        punch(&s.fd, MIB, 6 * MIB)?;
        let flushes = stats.get("remote_tlb_flush_requests")? - before;
        println!("a hole of {} pages: {flushes} TLB flushes", 6 * MIB / PAGE);
        ensure!(flushes > 0, "no TLB flush");
        least = least.min(flushes);
    }
    ensure!(least <= 2, "{least} TLB flushes");
    Ok(())
}

fn fallocate_over_live_memory_changes_no_byte(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, on.whole())?;
    s.vcpu.fill(s.slot.gpa, MIB / 2, GUEST)?;
    s.expect_whole()?;
    for _ in 0..2 {
        allocate(&s.fd, 0, MIB)?;
        s.vcpu.verify(s.slot.gpa, MIB / 2, GUEST)?;
        s.vcpu.verify(s.slot.gpa + MIB / 2, MIB / 2, Pattern::ZERO)?;
    }
    Ok(())
}

fn file_outlives_its_vm(on: &'static Backend) -> CaseResult {
    let _pages = base_pages()?;
    let mut s = Setup::new(on, MIB)?;
    s.fill_both()?;
    let Setup { vm, vcpu, fd, slot, .. } = s;
    drop((vm, vcpu, slot));
    punch(&fd, 0, MIB)?;
    allocate(&fd, 0, MIB)?;
    punch(&fd, 0, MIB)?;
    on.expect_allocated(&fd, 0, "after everything was punched")
}
