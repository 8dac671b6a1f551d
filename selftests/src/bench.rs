// SPDX-License-Identifier: GPL-2.0
//! The cost of operations, in instructions, on memfile and on guest_memfd in the same boot.
//!
//! Meant for a machine with one CPU whose time stamp counter counts instructions (`scripts/boot
//! --icount`); elsewhere the figures are ticks of that counter and mean nothing.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::pattern::Pattern;
use crate::sys::{self, Mapping};
use crate::vm::{Private, Vcpu, Vm, region, small_pages};
use crate::{GIB, HUGE, PAGE};

/// Guest physical address of the memory under test.
const GPA: u64 = 4 * GIB;
/// First slot under test.
const SLOT: u32 = 1;
/// Pages of a measurement of single pages.
const PAGES: u64 = 1024;
/// The memory that is measured and profiled.
const FAULT: &str = "4K first-touch fault, exit to resume";
/// Both kinds; the reference is the last one.
const KINDS: [Private; 2] = [Private::Memfile, Private::GuestMemfd];

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// The operation.
    pub name: String,
    /// The kind of memory.
    pub subject: &'static str,
    /// Instructions each.
    pub instructions: u64,
    /// The number of operations.
    pub times: u64,
}

/// An operation whose instructions scripts/profile.c counts one by one, in the order of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Profile {
    pub name: String,
    pub subject: &'static str,
    /// The number of operations.
    pub times: u64,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    pub kernel: String,
    pub figures: Vec<Figure>,
    pub profiles: Vec<Profile>,
}

/// The time stamp counter.
fn now() -> u64 {
    // SAFETY: Every x86-64 has it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// A marker for scripts/profile.c: 1 begins a window, 0 ends it. To a CPU it is a no-op.
#[inline(always)]
fn mark<const N: u32>() {
    // SAFETY: A no-op that touches no memory.
    unsafe { std::arch::asm!("nopl 0x4d454d00 + {}(%rax)", const N, options(att_syntax)) }
}

/// The number of instructions of `work`.
fn count(work: impl FnOnce() -> Result<()>) -> Result<u64> {
    let start = now();
    work()?;
    Ok(now() - start)
}

fn subject(kind: Private) -> &'static str {
    match kind {
        Private::Memfile => "memfile",
        Private::GuestMemfd => "guest_memfd",
    }
}

impl Report {
    fn add(&mut self, name: impl Into<String>, subject: &'static str, total: u64, times: u64) {
        let name = name.into();
        let instructions = total / times;
        eprintln!("{name}, {subject}: {instructions}");
        self.figures.push(Figure { name, subject, instructions, times });
    }

    fn profile(
        &mut self,
        name: &str,
        kind: Private,
        times: u64,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let profile = Profile { name: name.into(), subject: subject(kind), times };
        mark::<1>();
        let result = work();
        mark::<0>();
        self.profiles.push(profile);
        result
    }
}

/// All operations of private memory.
pub fn private() -> Result<Report> {
    let mut report = Report { kernel: sys::kernel_release()?, ..Report::default() };
    for kind in KINDS {
        // The first operation of a kind costs more: per-CPU caches, static calls, page tables.
        faults(kind, &mut Report::default())?;
        faults(kind, &mut report)?;
        conversions(kind, &mut report)?;
        for bindings in [1, 4096] {
            punch_page(kind, bindings, &mut report)?;
        }
        bind(kind, 4096, &mut report)?;
    }
    // In turns, because the cost of a hole also depends on the fragmentation of free memory.
    for bindings in [1, 100, 1000] {
        for kind in KINDS {
            punch_all(kind, bindings, &mut report)?;
        }
    }
    for kind in KINDS {
        teardown(kind, &mut report)?;
    }
    Ok(report)
}

/// The profiles: runs the operations within windows.
pub fn profiles() -> Result<Report> {
    let mut report = Report { kernel: sys::kernel_release()?, ..Report::default() };
    let pages = 32 * PAGES;
    for kind in KINDS {
        let mut b = Bench::new(kind, pages * PAGE, 1)?;
        // Once before, so that both find free memory in the same state.
        b.touch(0, pages * PAGE)?;
        b.punch(0, pages * PAGE)?;
        report.profile(FAULT, kind, pages, || b.touch(0, pages * PAGE).map(drop))?;
    }
    for bindings in [1, 100] {
        for kind in KINDS {
            let b = Bench::new(kind, GIB, bindings)?;
            b.populate()?;
            report.profile(&punch_name(bindings), kind, GIB / PAGE, || b.punch(0, GIB))?;
        }
    }
    Ok(report)
}

/// A VM, a file, and one or more slots that bind parts of it, as far as possible of equal size.
struct Bench {
    vm: Vm,
    vcpu: Vcpu,
    fd: OwnedFd,
    kind: Private,
    /// The shared side of all slots.
    view: Mapping,
    size: u64,
    bindings: u64,
}

impl Bench {
    fn new(kind: Private, size: u64, bindings: u64) -> Result<Bench> {
        let vm = Vm::protected()?;
        let fd = kind.create(&vm, size)?;
        let vcpu = vm.vcpu(0)?;
        let view = small_pages(size)?;
        let bench = Bench { vm, vcpu, fd, kind, view, size, bindings };
        bench.bind()?;
        bench.vm.set_private(GPA, size)?;
        Ok(bench)
    }

    /// Offset and length of each slot.
    fn parts(&self) -> impl Iterator<Item = (u32, u64, u64)> + use<> {
        let (size, bindings) = (self.size, self.bindings);
        let step = size / bindings / PAGE * PAGE;
        (0..bindings).map(move |n| {
            let len = if n + 1 == bindings { size - n * step } else { step };
            (SLOT + n as u32, n * step, len)
        })
    }

    fn bind(&self) -> Result<()> {
        for (slot, offset, len) in self.parts() {
            let private = Some((self.kind, self.fd.as_fd(), offset));
            let mut region = region(slot, GPA + offset, &self.view, private);
            region.userspace_addr += offset;
            region.memory_size = len;
            self.vm.raw_set_region(&region).with_context(|| format!("add slot {slot}"))?;
        }
        Ok(())
    }

    fn unbind(&self) -> Result<()> {
        for (slot, ..) in self.parts() {
            self.vm.raw_delete(slot).with_context(|| format!("delete slot {slot}"))?;
        }
        Ok(())
    }

    /// Lets the guest write one word in each page: instructions.
    fn touch(&mut self, start: u64, len: u64) -> Result<u64> {
        count(|| self.vcpu.fill_pages(GPA + start, len, Pattern::Constant(1)))
    }

    /// Lets all pages be allocated and mapped.
    fn populate(&self) -> Result<()> {
        let (result, left) = self.vcpu.raw_pre_fault(GPA, self.size);
        result.with_context(|| format!("pre-fault, {left} bytes left"))
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        sys::punch(&self.fd, offset, len).context("punch")
    }
}

/// The fault of a page that is not allocated, and of one that is.
fn faults(kind: Private, report: &mut Report) -> Result<()> {
    let size = PAGES * PAGE;
    let mut b = Bench::new(kind, size + HUGE, 1)?;
    // The page tables of the first pages, and the cost of one command.
    b.touch(0, HUGE)?;
    let first = b.touch(HUGE, size)?;
    let again = b.touch(HUGE, size)?;
    report.add(FAULT, subject(kind), first - again, PAGES);

    b.punch(HUGE, size)?;
    sys::allocate(&b.fd, HUGE, size).context("allocate")?;
    let present = b.touch(HUGE, size)?;
    report.add("4K fault of a page that is there", subject(kind), present - again, PAGES);

    b.punch(HUGE, size)?;
    let allocate = count(|| sys::allocate(&b.fd, HUGE, size).context("allocate"))?;
    report.add("fallocate, per page", subject(kind), allocate, PAGES);
    b.punch(HUGE, size)?;
    let populate = count(|| b.populate())?;
    report.add("pre-fault, per page", subject(kind), populate, PAGES);
    Ok(())
}

/// Private to shared and back.
fn conversions(kind: Private, report: &mut Report) -> Result<()> {
    let mut b = Bench::new(kind, HUGE + PAGES * PAGE, 1)?;
    for (what, len) in [("1 page", PAGE), ("512 pages", HUGE)] {
        let times = 32;
        let mut total = 0;
        for _ in 0..times {
            b.touch(HUGE, HUGE)?;
            total += count(|| b.vm.set_shared(GPA + HUGE, len))?;
            total += count(|| b.vm.set_private(GPA + HUGE, len))?;
        }
        let name = format!("conversion of {what}, there and back");
        report.add(name, subject(kind), total, times);
    }
    Ok(())
}

/// A hole of one page in a file of many bindings.
fn punch_page(kind: Private, bindings: u64, report: &mut Report) -> Result<()> {
    let mut b = Bench::new(kind, 4096 * 2 * PAGE, bindings)?;
    let (mut total, times) = (0, 64);
    for n in 0..times {
        let offset = n * 64 * 2 * PAGE;
        b.touch(offset, 2 * PAGE)?;
        total += count(|| b.punch(offset, PAGE))?;
    }
    let s = if bindings == 1 { "" } else { "s" };
    let name = format!("punch 1 page, {bindings} binding{s} on the file");
    report.add(name, subject(kind), total, times);
    Ok(())
}

fn punch_name(bindings: u64) -> String {
    let s = if bindings == 1 { "" } else { "s" };
    format!("punch 1 GiB, {bindings} slot{s} bound, per page")
}

/// A hole of 1 GiB of pages that the guest can reach without a fault.
fn punch_all(kind: Private, bindings: u64, report: &mut Report) -> Result<()> {
    let b = Bench::new(kind, GIB, bindings)?;
    b.populate()?;
    let total = count(|| b.punch(0, GIB))?;
    report.add(punch_name(bindings), subject(kind), total, GIB / PAGE);
    Ok(())
}

/// The slot of a full file is deleted; a VM ends with its full file. A guest_memfd keeps its VM.
fn teardown(kind: Private, report: &mut Report) -> Result<()> {
    let b = Bench::new(kind, GIB, 1)?;
    b.populate()?;
    let total = count(|| b.unbind())?;
    report.add("delete the only slot of 1 GiB", subject(kind), total, 1);

    b.bind()?;
    b.populate()?;
    let Bench { vm, vcpu, fd, .. } = b;
    let total = count(|| {
        drop((vcpu, vm, fd));
        Ok(())
    })?;
    report.add("end a VM of 1 GiB, per page", subject(kind), total, GIB / PAGE);
    Ok(())
}

/// Slots are bound and unbound.
fn bind(kind: Private, bindings: u64, report: &mut Report) -> Result<()> {
    let b = Bench::new(kind, bindings * PAGE, bindings)?;
    let unbind = count(|| b.unbind())?;
    let bind = count(|| b.bind())?;
    report.add(format!("bind {bindings} slots, each"), subject(kind), bind, bindings);
    report.add(format!("unbind {bindings} slots, each"), subject(kind), unbind, bindings);
    let both = bind + unbind;
    report.add(format!("bind and unbind {bindings} slots, each"), subject(kind), both, bindings);
    Ok(())
}

/// An ordinary memfd, whose cost must not depend on memfile.
pub fn shmem() -> Result<Report> {
    let mut report = Report { kernel: sys::kernel_release()?, ..Report::default() };
    for report in [&mut Report::default(), &mut report] {
        ordinary(report)?;
    }
    Ok(report)
}

fn ordinary(report: &mut Report) -> Result<()> {
    const SUBJECT: &str = "shmem";
    let pages = 8 * PAGES;
    let size = pages * PAGE;
    let fd = File::from(sys::memfd(size)?);
    let punch = || sys::punch(&fd, 0, size).context("punch");

    let view = Mapping::shared(&fd, 0, size)?;
    let fault = count(|| {
        (0..pages).for_each(|page| view.store(page * PAGE, 1));
        Ok(())
    })?;
    report.add("shmem: fault a page", SUBJECT, fault, pages);
    drop(view);
    report.add("shmem: punch, per page", SUBJECT, count(punch)?, pages);

    let buffer = [1; PAGE as usize];
    let write = count(|| {
        (0..pages).try_for_each(|page| fd.write_all_at(&buffer, page * PAGE).context("write"))
    })?;
    report.add("shmem: write a page", SUBJECT, write, pages);
    punch()?;
    let allocate = count(|| sys::allocate(&fd, 0, size).context("allocate"))?;
    report.add("shmem: fallocate, per page", SUBJECT, allocate, pages);
    punch()?;
    sys::allocate(&fd, 0, size)?;
    let punches = count(|| {
        (0..pages).try_for_each(|page| sys::punch(&fd, page * PAGE, PAGE).context("punch"))
    })?;
    report.add("shmem: punch a page", SUBJECT, punches, pages);
    Ok(())
}
