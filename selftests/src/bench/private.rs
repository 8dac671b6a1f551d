// SPDX-License-Identifier: GPL-2.0
//! memfile against guest_memfd, by pages of 4 KiB.

use anyhow::Result;

use super::machine::{Bench, GPA};
use super::measure::{Report, Subject, undisturbed};
use crate::vm::Private;
use crate::{GIB, HUGE, MIB, PAGE};

/// Pages of a measurement of single pages.
const PAGES: u64 = 1024;
/// Both kinds; the reference is the last one.
pub const KINDS: [Private; 2] = [Private::Memfile, Private::GuestMemfd];

const FAULTS: [&str; 4] = [
    "4K first-touch fault, exit to resume",
    "4K fault of a page that is there",
    "fallocate, per page",
    "pre-fault, per page",
];
const CONVERSIONS: [&str; 2] =
    ["conversion of 1 page, there and back", "conversion of 512 pages, there and back"];
const BALLOON: &str = "balloon of 64 MiB: holes of 1 page in a row, each";
const TEARDOWN: [&str; 2] = ["delete the only slot of 1 GiB", "end a VM of 1 GiB, per page"];

/// Small pages of this kind.
pub fn subject(kind: Private) -> Subject {
    let name = match kind {
        Private::Memfile => "memfile",
        Private::GuestMemfd => "guest_memfd",
    };
    Subject { name, page: PAGE }
}

/// All operations.
pub fn private(report: &mut Report) -> Result<()> {
    for kind in KINDS {
        faults(kind, &mut report.scratch())?;
        faults(kind, report)?;
        conversions(kind, report)?;
        for bindings in [1, 4096] {
            punch_page(kind, bindings, report)?;
        }
        bind(kind, 4096, report)?;
    }
    // In turns, because the cost of a hole also depends on the fragmentation of free memory.
    for bindings in [1, 100, 1000] {
        for kind in KINDS {
            punch_all(kind, bindings, report)?;
        }
    }
    for kind in KINDS {
        balloon(kind, report)?;
    }
    for kind in KINDS {
        teardown(kind, report)?;
    }
    Ok(())
}

/// The fault of a page that is not allocated, and of one that is; allocation without the guest.
fn faults(kind: Private, report: &mut Report) -> Result<()> {
    if !report.wants(&FAULTS) {
        return Ok(());
    }
    let size = PAGES * PAGE;
    let mut b = Bench::new(kind, size + HUGE, 1)?;
    // The page tables of the first pages, and the cost of one command.
    b.prepare(|b| b.touch(0, HUGE, PAGE))?;
    let first = b.count(|b| b.touch(HUGE, size, PAGE))?;
    let again = b.count(|b| b.touch(HUGE, size, PAGE))?;
    report.add(FAULTS[0], subject(kind), first - &again, PAGES);

    b.prepare(|b| b.punch(HUGE, size))?;
    b.prepare(|b| b.allocate(HUGE, size))?;
    let present = b.count(|b| b.touch(HUGE, size, PAGE))?;
    report.add(FAULTS[1], subject(kind), present - &again, PAGES);

    b.prepare(|b| b.punch(HUGE, size))?;
    let allocate = b.count(|b| b.allocate(HUGE, size))?;
    report.add(FAULTS[2], subject(kind), allocate, PAGES);
    b.prepare(|b| b.punch(HUGE, size))?;
    let populate = b.count(|b| b.populate())?;
    report.add(FAULTS[3], subject(kind), populate, PAGES);
    Ok(())
}

/// Private to shared and back.
fn conversions(kind: Private, report: &mut Report) -> Result<()> {
    if !report.wants(&CONVERSIONS) {
        return Ok(());
    }
    let mut b = Bench::new(kind, HUGE + PAGES * PAGE, 1)?;
    for (name, len) in CONVERSIONS.into_iter().zip([PAGE, HUGE]) {
        let (total, times) = undisturbed(32, |_| {
            b.prepare(|b| b.touch(HUGE, HUGE, PAGE))?;
            let mut cost = b.count(|b| b.vm.set_shared(GPA + HUGE, len))?;
            cost += b.count(|b| b.vm.set_private(GPA + HUGE, len))?;
            Ok(cost)
        })?;
        report.add(name, subject(kind), total, times);
    }
    Ok(())
}

/// A hole of one page in a file of many bindings.
fn punch_page(kind: Private, bindings: u64, report: &mut Report) -> Result<()> {
    let s = if bindings == 1 { "" } else { "s" };
    let name = format!("punch 1 page, {bindings} binding{s} on the file");
    if !report.wants(&[&name]) {
        return Ok(());
    }
    let mut b = Bench::new(kind, 4096 * 2 * PAGE, bindings)?;
    let (total, times) = undisturbed(64, |n| {
        let offset = n * 64 * 2 * PAGE;
        b.prepare(|b| b.touch(offset, 2 * PAGE, PAGE))?;
        b.count(|b| b.punch(offset, PAGE))
    })?;
    report.add(name, subject(kind), total, times);
    Ok(())
}

/// A hole of 1 GiB of pages that the guest can reach without a fault.
fn punch_all(kind: Private, bindings: u64, report: &mut Report) -> Result<()> {
    let s = if bindings == 1 { "" } else { "s" };
    let name = format!("punch 1 GiB, {bindings} slot{s} bound, per page");
    if !report.wants(&[&name]) {
        return Ok(());
    }
    let mut b = Bench::new(kind, GIB, bindings)?;
    b.prepare(|b| b.populate())?;
    let total = b.count(|b| b.punch(0, GIB))?;
    report.add(name, subject(kind), total, GIB / PAGE);
    Ok(())
}

/// What QEMU does when a guest inflates its balloon: it frees pages one after the other.
fn balloon(kind: Private, report: &mut Report) -> Result<()> {
    if !report.wants(&[BALLOON]) {
        return Ok(());
    }
    let size = 64 * MIB;
    let mut b = Bench::new(kind, size, 1)?;
    b.prepare(|b| b.populate())?;
    let inflate =
        b.count(|b| (0..size).step_by(PAGE as usize).try_for_each(|page| b.punch(page, PAGE)))?;
    report.add(BALLOON, subject(kind), inflate, size / PAGE);
    Ok(())
}

/// The slot of a full file is deleted; a VM ends with its full file. A guest_memfd keeps its VM.
fn teardown(kind: Private, report: &mut Report) -> Result<()> {
    if !report.wants(&TEARDOWN) {
        return Ok(());
    }
    let mut b = Bench::new(kind, GIB, 1)?;
    b.prepare(|b| b.populate())?;
    report.add(TEARDOWN[0], subject(kind), b.count_unbind()?, 1);

    b.count_bind()?;
    b.prepare(|b| b.populate())?;
    report.add(TEARDOWN[1], subject(kind), b.count_end()?, GIB / PAGE);
    Ok(())
}

/// Slots are bound and unbound.
fn bind(kind: Private, bindings: u64, report: &mut Report) -> Result<()> {
    let names =
        ["bind", "unbind", "bind and unbind"].map(|what| format!("{what} {bindings} slots, each"));
    if !report.wants(&names) {
        return Ok(());
    }
    let b = Bench::new(kind, bindings * PAGE, bindings)?;
    let unbind = b.count_unbind()?;
    let bind = b.count_bind()?;
    let mut both = bind.clone();
    both += unbind.clone();
    for (name, cost) in names.into_iter().zip([bind, unbind, both]) {
        report.add(name, subject(kind), cost, bindings);
    }
    Ok(())
}
