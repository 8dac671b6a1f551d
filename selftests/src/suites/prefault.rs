// SPDX-License-Identifier: GPL-2.0
//! KVM_PRE_FAULT_MEMORY on private slots.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::ktap::CaseResult;
use crate::pattern::Pattern;
use crate::pressure::base_pages;
use crate::support::backend::Backend;
use crate::support::setup::{GUEST, LAYOUTS, SHARED, SLOT, Setup, fill_view};
use crate::sys::*;
use crate::{HUGE, MIB, PAGE, conformance};

conformance!(
    "prefault",
    [
        keeps_content,
        stops_at_the_end_of_the_slot,
        unaligned_or_empty_range_is_refused,
        works_at_every_layout,
        runs_against_punch,
        runs_against_slot_deletion,
    ],
    converting: [private_range_without_backing_is_efault],
    huge: all,
    small: [maps_private_memory, allocates_what_was_asked_for],
    // The others are about the range that is asked for, and not about pages.
    gigantic: [keeps_content, runs_against_punch],
);

/// Pre-fault a range that must work.
fn pre_fault(s: &Setup, gpa: u64, size: u64) -> Result<()> {
    let (result, left) = s.vcpu.raw_pre_fault(gpa, size);
    result.with_context(|| format!("pre-fault [{gpa:#x}, +{size:#x}), {left} bytes left"))
}

fn maps_private_memory(on: &'static Backend) -> CaseResult {
    let _pages = base_pages()?;
    let mut s = Setup::new(on, 4 * MIB)?;
    let stats = s.vm.stats()?;
    let before = stats.get("pages_4k")?;
    pre_fault(&s, s.slot.gpa, s.slot.size)?;
    let mapped = stats.get("pages_4k")? - before;
    ensure!(mapped == s.slot.size / PAGE, "{mapped} pages were mapped");
    let faults = s.vcpu.stats()?;
    let before = faults.get("pf_taken")?;
    s.vcpu.fill_pages(s.slot.gpa, s.slot.size, GUEST)?;
    let taken = faults.get("pf_taken")? - before;
    // A few for mailbox and stack at most.
    ensure!(taken < 16, "the guest still took {taken} faults");
    Ok(())
}

fn allocates_what_was_asked_for(on: &'static Backend) -> CaseResult {
    let _pages = base_pages()?;
    let s = Setup::new(on, 4 * MIB)?;
    pre_fault(&s, s.slot.gpa + PAGE, 3 * PAGE)?;
    on.expect_allocated(&s.fd, 3 * PAGE, "three pages")?;
    pre_fault(&s, s.slot.gpa, 8 * PAGE)?;
    on.expect_allocated(&s.fd, 8 * PAGE, "eight pages")
}

fn keeps_content(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, on.whole())?;
    s.fill_both()?;
    for _ in 0..3 {
        pre_fault(&s, s.slot.gpa, s.slot.size)?;
    }
    s.expect_whole()?;
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)
}

/// The table of upstream's test: a slot of 2 MiB and a page.
fn stops_at_the_end_of_the_slot(on: &'static Backend) -> CaseResult {
    let s = Setup::new(on, HUGE + PAGE)?;
    let gpa = s.slot.gpa;
    // Private where there is no slot, so that the end is an error and not emulated I/O.
    let expected = [
        (0, HUGE, None, 0),
        (HUGE, 2 * PAGE, Some(Errno::ENOENT), PAGE),
        (HUGE + PAGE, PAGE, Some(Errno::ENOENT), PAGE),
    ];
    for (offset, size, errno, left) in expected {
        let (result, got) = s.vcpu.raw_pre_fault(gpa + offset, size);
        ensure!(
            (result.err(), got) == (errno, left),
            "[+{offset:#x}, +{size:#x}): {result:?}, {got:#x} left, wanted {errno:?} and {left:#x}"
        );
    }
    Ok(())
}

fn private_range_without_backing_is_efault(on: &'static Backend) -> CaseResult {
    let s = Setup::new(on, MIB)?;
    let gpa = s.slot.gpa + MIB;
    s.vm.set_private(gpa, MIB)?;
    let (result, left) = s.vcpu.raw_pre_fault(gpa, MIB);
    on.errno("pre-fault without a slot", result, &[Errno::EFAULT])?;
    ensure!(left == MIB, "{left} bytes left");
    let (result, left) = s.vcpu.raw_pre_fault(gpa - PAGE, 2 * PAGE);
    on.errno("pre-fault across the end", result, &[Errno::EFAULT])?;
    ensure!(left == PAGE, "{left} bytes left");
    Ok(())
}

fn unaligned_or_empty_range_is_refused(on: &'static Backend) -> CaseResult {
    let s = Setup::new(on, MIB)?;
    let gpa = s.slot.gpa;
    for (start, size) in [(gpa + 1, PAGE), (gpa, PAGE + 1), (gpa, PAGE - 1), (gpa, 0)] {
        let (result, _) = s.vcpu.raw_pre_fault(start, size);
        on.errno("unaligned or empty range", result, &[Errno::EINVAL])
            .with_context(|| format!("[{start:#x}, +{size:#x})"))?;
    }
    let (result, _) = s.vcpu.raw_pre_fault(!(PAGE - 1), 2 * PAGE);
    on.errno("range that overflows", result, &[Errno::EINVAL])
}

fn works_at_every_layout(on: &'static Backend) -> CaseResult {
    for layout in LAYOUTS {
        let mut s = Setup::at(on, MIB, layout)?;
        fill_view(&s.slot, SHARED);
        let check = pre_fault(&s, s.slot.gpa, s.slot.size)
            .and_then(|()| s.vcpu.verify(s.slot.gpa, s.slot.size, Pattern::ZERO))
            .and_then(|()| s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST))
            .and_then(|()| s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST));
        check.with_context(|| format!("{layout:x?}"))?;
    }
    Ok(())
}

fn runs_against_punch(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, on.whole())?;
    let fd = &s.fd;
    thread::scope(|scope| {
        let puncher = scope.spawn(move || -> Result<()> {
            for n in 0..500 {
                punch(fd, (n % 16) * 16 * PAGE, 16 * PAGE)?;
            }
            Ok(())
        });
        let mut result = Ok(());
        while result.is_ok() && !puncher.is_finished() {
            result = pre_fault(&s, s.slot.gpa, s.slot.size);
        }
        puncher.join().map_err(|_| anyhow!("the puncher panicked"))??;
        result
    })?;
    s.vcpu.verify(s.slot.gpa, s.slot.size, Pattern::ZERO)?;
    s.fill_both()?;
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)
}

fn runs_against_slot_deletion(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, MIB)?;
    let (vm, vcpu, fd) = (&s.vm, &s.vcpu, &s.fd);
    let mut slot = s.slot;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let faulter = scope.spawn(|| -> Result<(u32, u32)> {
            let (mut done, mut cut) = (0, 0);
            while !stop.load(Ordering::Relaxed) {
                match vcpu.raw_pre_fault(LAYOUTS[0].gpa, 8 * PAGE).0 {
                    Ok(()) => done += 1,
                    // The slot is missing at the moment, or is being deleted.
                    Err(Errno::EFAULT | Errno::EAGAIN | Errno::ENOENT) => cut += 1,
                    Err(errno) => bail!("pre-fault: {errno}"),
                }
            }
            Ok((done, cut))
        });
        let delete_often = || -> CaseResult {
            for _ in 0..40 {
                thread::sleep(Duration::from_millis(5));
                vm.delete(slot)?;
                slot = vm.add_private(SLOT, LAYOUTS[0].gpa, MIB, on.kind, fd, 0)?;
            }
            Ok(())
        };
        let result = delete_often();
        stop.store(true, Ordering::Relaxed);
        let (done, cut) = faulter.join().map_err(|_| anyhow!("the vCPU thread panicked"))??;
        println!("{done} ranges were mapped completely, {cut} not");
        result?;
        ensure!(done > 0, "no range was ever mapped");
        Ok(())
    })?;
    s.vcpu.fill(LAYOUTS[0].gpa, MIB, GUEST)?;
    s.vcpu.verify(LAYOUTS[0].gpa, MIB, GUEST)
}
