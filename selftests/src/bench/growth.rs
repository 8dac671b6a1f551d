// SPDX-License-Identifier: GPL-2.0
//! How costs grow: with the number of slots and files, with the size of holes and of files, with the
//! number of observers.
//!
//! Each series measures one operation, whose work is the same at all sizes: no size may cost much
//! more than another.

use anyhow::{Context, Result};

use super::machine::{Bench, GPA};
use super::measure::{Cost, Report, count};
use super::private::{KINDS, subject};
use crate::consumer::{Consumer, Mode, Span};
use crate::pressure::{self, Idle, frames};
use crate::sys;
use crate::vm::{Private, Vm};
use crate::{GIB, HUGE, PAGE};

const TIB: u64 = 1024 * GIB;
/// How many slots and files there are.
const MANY: [u64; 5] = [1, 10, 100, 1000, 10_000];
const OBSERVERS: [u64; 4] = [1, 4, 16, 64];
const HOLES: [u64; 4] = [PAGE, HUGE, GIB, 64 * GIB];
const FILES: [u64; 4] = [PAGE, GIB, TIB, 16 * TIB];
/// How often each operation is measured.
const TIMES: u64 = 16;

const SLOTS: [&str; 3] = [
    "punch 1 page, by slots on the file",
    "first-touch fault, by slots of the VM",
    "bind and unbind a slot more, by slots on the file",
];
const FILE: &str = "make, bind, unbind and close a file more, by files bound";
const HOLE: &str = "hole around one page in a file of 1 TiB, by size of the hole";
const WHOLE: [&str; 2] = [
    "punch all of a file of one page, by size of the file",
    "close a file of one page, by its size",
];
const ASKED: &str = "ask whether a folio was used, by its pages";
const OBSERVED: &str = "punch 1 page, by observers of the file";

/// All series.
pub fn growth(report: &mut Report) -> Result<()> {
    for kind in KINDS {
        for many in MANY {
            slots(kind, many, report).with_context(|| format!("{many} slots"))?;
            files(kind, many, report).with_context(|| format!("{many} files"))?;
        }
        for hole in HOLES {
            holes(kind, hole, report).with_context(|| format!("a hole of {hole} bytes"))?;
        }
        for size in FILES {
            whole(kind, size, report).with_context(|| format!("a file of {size} bytes"))?;
        }
    }
    for pages in [1, HUGE / PAGE] {
        let result = asked(pages, report);
        report.unless_missing(&[ASKED], subject(Private::Memfile), result)?;
    }
    for many in OBSERVERS {
        let result = observers(many, report);
        report.unless_missing(&[OBSERVED], subject(Private::Memfile), result)?;
    }
    Ok(())
}

/// A file with `many` slots of two pages.
fn slots(kind: Private, many: u64, report: &mut Report) -> Result<()> {
    if !report.wants(&SLOTS) {
        return Ok(());
    }
    // One part more, for a slot that comes and goes; at least as many pages as are touched.
    let size = (many.max(TIMES) + 1) * 2 * PAGE;
    let mut b = Bench::partly_bound(kind, size, many + 1, many)?;
    let (mut fault, mut again, mut hole) = (Cost::default(), Cost::default(), Cost::default());
    // Page tables, caches.
    b.prepare(|b| b.touch(0, PAGE, PAGE))?;
    for n in 0..TIMES {
        let offset = (n * many / TIMES) * (size / (many + 1) / PAGE * PAGE);
        b.prepare(|b| b.punch(offset, PAGE))?;
        fault += b.count(|b| b.touch(offset, PAGE, PAGE))?;
        again += b.count(|b| b.touch(offset, PAGE, PAGE))?;
        hole += b.count(|b| b.punch(offset, PAGE))?;
    }
    report.grow(SLOTS[0], subject(kind), many, hole, TIMES);
    report.grow(SLOTS[1], subject(kind), many, fault - &again, TIMES);
    let mut both = Cost::default();
    for _ in 0..TIMES {
        both += b.count_bind_last()?;
        both += b.count_unbind_last()?;
    }
    report.grow(SLOTS[2], subject(kind), many, both, TIMES);
    Ok(())
}

/// `many` files that are bound, and one more.
fn files(kind: Private, many: u64, report: &mut Report) -> Result<()> {
    if !report.wants(&[FILE]) {
        return Ok(());
    }
    let vm = Vm::protected()?;
    let mut slots = Vec::new();
    for n in 0..many {
        let fd = kind.create(&vm, PAGE)?;
        slots.push(vm.add_private(n as u32 + 1, GPA + n * PAGE, PAGE, kind, &fd, 0)?);
    }
    let mut total = Cost::default();
    for _ in 0..TIMES {
        total += count(|| {
            let fd = kind.create(&vm, PAGE)?;
            let slot = vm.add_private(many as u32 + 1, GPA + many * PAGE, PAGE, kind, &fd, 0)?;
            vm.delete(slot).map(drop)
        })?;
    }
    report.grow(FILE, subject(kind), many, total, TIMES);
    Ok(())
}

/// The page is the first of the hole.
fn holes(kind: Private, hole: u64, report: &mut Report) -> Result<()> {
    if !report.wants(&[HOLE]) {
        return Ok(());
    }
    // The guest's physical addresses end at 1 TiB.
    let mut b = Bench::sparse(kind, TIB, 128 * GIB, HUGE)?;
    b.prepare(|b| b.touch(0, PAGE, PAGE))?;
    b.prepare(|b| b.punch(0, hole))?;
    let mut total = Cost::default();
    for _ in 0..TIMES {
        b.prepare(|b| b.touch(0, PAGE, PAGE))?;
        total += b.count(|b| b.punch(0, hole))?;
    }
    report.grow(HOLE, subject(kind), hole, total, TIMES);
    Ok(())
}

/// The page is the last of the file, which is not bound.
fn whole(kind: Private, size: u64, report: &mut Report) -> Result<()> {
    if !report.wants(&WHOLE) {
        return Ok(());
    }
    let vm = Vm::protected()?;
    let (mut punch, mut close) = (Cost::default(), Cost::default());
    for _ in 0..TIMES {
        let fd = kind.create(&vm, size)?;
        sys::allocate(&fd, size - PAGE, PAGE)?;
        punch += count(|| Ok(sys::punch(&fd, 0, size)?))?;
        sys::allocate(&fd, size - PAGE, PAGE)?;
        close += count(|| {
            drop(fd);
            Ok(())
        })?;
    }
    report.grow(WHOLE[0], subject(kind), size, punch, TIMES);
    report.grow(WHOLE[1], subject(kind), size, close, TIMES);
    Ok(())
}

/// Idle page tracking asks KVM for all pages of a folio at once.
fn asked(pages: u64, report: &mut Report) -> Result<()> {
    if !report.wants(&[ASKED]) {
        return Ok(());
    }
    let _huge = pressure::shmem_huge(if pages == 1 { "never" } else { "always" })?;
    let idle = Idle::open()?;
    let vm = Vm::protected()?;
    let (fd, vcpu) = (Private::Memfile.create(&vm, HUGE)?, vm.vcpu(0)?);
    let slot = vm.add_private(1, GPA, HUGE, Private::Memfile, &fd, 0)?;
    vm.set_private(GPA, HUGE)?;
    let pfn = frames(&vcpu, &slot, &fd)?.get(&0).context("no frame")?.pfn;
    idle.mark_all([pfn])?;
    let mut total = Cost::default();
    for _ in 0..TIMES {
        total += count(|| idle.mark(pfn))?;
    }
    report.grow(ASKED, subject(Private::Memfile), pages, total, TIMES);
    Ok(())
}

/// Each of them is notified of the hole.
fn observers(many: u64, report: &mut Report) -> Result<()> {
    if !report.wants(&[OBSERVED]) {
        return Ok(());
    }
    let mut b = Bench::new(Private::Memfile, TIMES * PAGE, 1)?;
    let _observers = (0..many)
        .map(|_| Consumer::bound(&b.fd, Mode::Observer, Span::same(0, TIMES)))
        .collect::<Result<Vec<_>>>()?;
    let mut total = Cost::default();
    for n in 0..TIMES {
        b.prepare(|b| b.touch(n * PAGE, PAGE, PAGE))?;
        total += b.count(|b| b.punch(n * PAGE, PAGE))?;
    }
    report.grow_with_work(OBSERVED, subject(Private::Memfile), (many, many), total, TIMES);
    Ok(())
}
