// SPDX-License-Identifier: GPL-2.0
//! How costs grow: with the number of slots and files, with the size of holes and of files, with the
//! number of observers.
//!
//! Each series measures one operation, whose work is the same at all sizes: no size may cost much
//! more than another.

use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::machine::{Bench, GPA};
use super::measure::{Cost, Report, Subject, count};
use super::private::{KINDS, subject};
use crate::consumer::{Consumer, Mode, Span};
use crate::pattern::Pattern;
use crate::pressure::{self, Cgroup, Idle, Swap, frames};
use crate::sys::{self, Mapping};
use crate::uapi::{KVM_CAP_MEMFILE, MEMFILE_F_UNMOVABLE, MEMFILE_F_USER_INACCESSIBLE};
use crate::vm::{Private, Vm, VmType, region, small_pages};
use crate::{GIB, HUGE, MIB, PAGE};

const TIB: u64 = 1024 * GIB;
/// How many slots and files there are.
const MANY: [u64; 5] = [1, 10, 100, 1000, 10_000];
const OBSERVERS: [u64; 4] = [1, 4, 16, 64];
/// VMs that bind one file.
const SHARERS: [u64; 4] = [1, 4, 16, 64];
/// Slots of each of two VMs.
const EACH: [u64; 4] = [1, 10, 100, 1000];
const AT_A_TIME: [u64; 3] = [1, 8, 64];
const HOLES: [u64; 4] = [PAGE, HUGE, GIB, 64 * GIB];
const FILES: [u64; 4] = [PAGE, GIB, TIB, 16 * TIB];
/// How often each operation is measured.
const TIMES: u64 = 16;
/// What only memfiles do, ordinary memory of VMs does in its way.
const ORDINARY: Subject = Subject { name: "memfd of a VM", page: PAGE };

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
const VMS: [&str; 3] = [
    "punch all of a file, by VMs that bind a page each",
    "punch 1 page, by VMs that bind the file",
    "bind and unbind a page more, by VMs that bind the file",
];
const HALVES: &str = "punch all of a file, by slots with which two VMs bind a half each";
const RUNNING: [&str; 2] = [
    "punch 1 page, by running invalidations of the file",
    "bind and unbind a slot more, by running invalidations of the file",
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
    for private in [true, false] {
        for many in SHARERS {
            vms(private, many, report).with_context(|| format!("{many} VMs on a file"))?;
        }
        for slots in EACH {
            halves(private, slots, report).with_context(|| format!("{slots} slots of two VMs"))?;
        }
    }
    for many in AT_A_TIME {
        let result = running(many, report);
        report.unless_missing(&RUNNING, subject(Private::Memfile), result)?;
    }
    for (private, subject) in [(true, subject(Private::Memfile)), (false, ORDINARY)] {
        for pages in [1, HUGE / PAGE] {
            let result = asked(private, pages, report);
            report.unless_missing(&[ASKED], subject, result)?;
        }
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

/// A file that several VMs use: a memfile, or for comparison an ordinary memfd as ordinary memory.
struct Common {
    fd: OwnedFd,
    /// All of the memfd; of a memfile an empty shared side.
    view: Mapping,
    private: bool,
}

impl Common {
    fn new(private: bool, size: u64) -> Result<Common> {
        let fd = if private { sys::memfile(size)? } else { sys::memfd(size)? };
        let view = if private { small_pages(size)? } else { Mapping::shared(&fd, 0, size)? };
        Ok(Common { fd, view, private })
    }

    fn subject(&self) -> Subject {
        if self.private { subject(Private::Memfile) } else { ORDINARY }
    }

    fn vm(&self) -> Result<Vm> {
        if self.private { Vm::protected() } else { Vm::new(VmType::Default) }
    }

    /// `pages` slots of one page each, for the pages of the file from `first` on.
    fn bind(&self, vm: &Vm, first: u64, pages: u64) -> Result<()> {
        for n in 0..pages {
            let offset = (first + n) * PAGE;
            let private = self.private.then_some((Private::Memfile, self.fd.as_fd(), offset));
            let mut region = region(n as u32 + 1, GPA + n * PAGE, &self.view, private);
            region.userspace_addr = self.view.addr() + offset;
            region.memory_size = PAGE;
            vm.raw_set_region(&region).with_context(|| format!("slot {}", n + 1))?;
        }
        Ok(())
    }
}

/// One page for each VM, and one more; a guest_memfd is of one VM. A hole of all pages is told to
/// each VM.
fn vms(private: bool, many: u64, report: &mut Report) -> Result<()> {
    if !report.wants(&VMS) {
        return Ok(());
    }
    let size = (many + 1) * PAGE;
    let file = Common::new(private, size)?;
    let (fd, subject) = (&file.fd, file.subject());
    let vms = (0..many).map(|_| file.vm()).collect::<Result<Vec<_>>>()?;
    for (page, vm) in (0..).zip(&vms) {
        file.bind(vm, page, 1)?;
    }
    let (mut all, mut one) = (Cost::default(), Cost::default());
    // A hole first puts new pages on their lists: so that of the last page comes before.
    let fill = || -> Result<()> {
        sys::allocate(fd, 0, size)?;
        Ok(sys::punch(fd, many * PAGE, PAGE)?)
    };
    for n in 0..TIMES {
        fill()?;
        all += count(|| Ok(sys::punch(fd, 0, many * PAGE)?))?;
        fill()?;
        one += count(|| Ok(sys::punch(fd, n * many / TIMES * PAGE, PAGE)?))?;
    }
    report.grow_with_work(VMS[0], subject, (many, many), all, TIMES);
    report.grow(VMS[1], subject, many, one, TIMES);
    let (mut both, another) = (Cost::default(), file.vm()?);
    for _ in 0..TIMES {
        both += count(|| {
            file.bind(&another, many, 1)?;
            Ok(another.raw_delete(1)?)
        })?;
    }
    report.grow(VMS[2], subject, many, both, TIMES);
    Ok(())
}

/// One VM has the first half of the file, the other one the second.
fn halves(private: bool, slots: u64, report: &mut Report) -> Result<()> {
    if !report.wants(&[HALVES]) {
        return Ok(());
    }
    let size = 2 * slots * PAGE;
    let file = Common::new(private, size)?;
    let fd = &file.fd;
    let vms = [file.vm()?, file.vm()?];
    for (half, vm) in (0..).zip(&vms) {
        file.bind(vm, half * slots, slots)?;
    }
    let (mut total, times) = (Cost::default(), 4);
    for _ in 0..times {
        sys::allocate(fd, 0, size)?;
        total += count(|| Ok(sys::punch(fd, 0, size)?))?;
    }
    report.grow_with_work(HALVES, file.subject(), (slots, 2 * slots), total, times);
    Ok(())
}

/// An observer holds up so many tasks, each of which swaps out a page of the file.
fn running(many: u64, report: &mut Report) -> Result<()> {
    if !report.wants(&RUNNING) {
        return Ok(());
    }
    // Reclaim wants to leave eight times as many pages as it has isolated, 32 for each task.
    const HELD: u64 = 96 * MIB;
    let _pages = pressure::base_pages()?;
    let _swap = Swap::on(64 * MIB)?;
    let cgroup = Cgroup::enter()?;
    let (vm, size) = (Vm::protected()?, 2 * (HELD + TIMES * PAGE));
    let reclaimable = MEMFILE_F_USER_INACCESSIBLE | MEMFILE_F_UNMOVABLE;
    vm.raw_enable_cap(KVM_CAP_MEMFILE, reclaimable).context("choose the flags")?;
    let mut b = Bench::partly_on(vm, sys::memfile(size)?, size, 2, 1)?;
    b.prepare(|b| b.allocate(0, size / 2))?;
    pressure::drop_caches()?;
    let observer = Consumer::bound(&b.fd, Mode::Observer, Span::same(0, HELD / PAGE))?;
    observer.block(true)?;
    thread::scope(|scope| {
        let tasks: Vec<_> =
            (0..many).map(|_| scope.spawn(|| cgroup.reclaim(PAGE).map(drop))).collect();
        let result = beside(&mut b, &observer, many, HELD, report);
        observer.block(false)?;
        for task in tasks {
            task.join().map_err(|_| anyhow!("a task has panicked"))??;
        }
        result
    })
}

/// The operations, when all tasks are held up.
fn beside(
    b: &mut Bench,
    observer: &Consumer,
    many: u64,
    held: u64,
    report: &mut Report,
) -> Result<()> {
    let limit = Instant::now() + Duration::from_secs(60);
    while observer.callbacks()?.starts < many {
        ensure!(Instant::now() < limit, "{} of {many} are held up", observer.callbacks()?.starts);
        thread::sleep(Duration::from_millis(10));
    }
    let (mut hole, mut both) = (Cost::default(), Cost::default());
    for n in 0..TIMES {
        hole += b.count(|b| b.punch(held + n * PAGE, PAGE))?;
        both += b.count_bind_last()?;
        both += b.count_unbind_last()?;
    }
    ensure!(observer.callbacks()?.ends == 0, "a task was not held up");
    report.grow(RUNNING[0], subject(Private::Memfile), many, hole, TIMES);
    report.grow(RUNNING[1], subject(Private::Memfile), many, both, TIMES);
    Ok(())
}

/// Idle page tracking asks KVM for all pages of a folio at once.
fn asked(private: bool, pages: u64, report: &mut Report) -> Result<()> {
    if !report.wants(&[ASKED]) {
        return Ok(());
    }
    let _huge = pressure::shmem_huge(if pages == 1 { "never" } else { "always" })?;
    let idle = Idle::open()?;
    let file = Common::new(private, HUGE)?;
    let vm = file.vm()?;
    let mut vcpu = vm.vcpu(0)?;
    let (_slot, pfn) = if private {
        let slot = vm.add_private(1, GPA, HUGE, Private::Memfile, &file.fd, 0)?;
        vm.set_private(GPA, HUGE)?;
        let frame = frames(&vcpu, &slot, &file.fd)?.get(&0).context("no frame")?.pfn;
        (slot, frame)
    } else {
        let slot = vm.add_shared(1, GPA, Mapping::shared(&file.fd, 0, HUGE)?)?;
        vcpu.fill_pages(GPA, HUGE, Pattern::Constant(1))?;
        let frame = *pressure::mapped_frames(&slot.view)?.first().context("no frame")?;
        (slot, frame)
    };
    idle.mark_all([pfn])?;
    let mut total = Cost::default();
    for _ in 0..TIMES {
        total += count(|| idle.mark(pfn))?;
    }
    report.grow(ASKED, file.subject(), pages, total, TIMES);
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
