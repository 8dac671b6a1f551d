// SPDX-License-Identifier: GPL-2.0
//! Pages that go to swap, come back, and move: those of a memfile against ordinary memory of a VM,
//! because guest_memfd's can do neither.
//!
//! The pages are zeros, which swap only notes: compression and devices are not measured.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result, ensure};

use super::machine::GPA;
use super::measure::{Cost, Report, Subject, count};
use crate::guest::Command;
use crate::pattern::Pattern;
use crate::pressure::{self, Area, Cgroup, Counts, Swap};
use crate::sys::{self, Mapping};
use crate::uapi::{KVM_CAP_MEMFILE, MEMFILE_F_USER_INACCESSIBLE};
use crate::vm::{Private, Slot, Vcpu, Vm, VmType, sequence, small_pages};
use crate::{MIB, PAGE};

const OUT: &str = "swap-out, per page";
const IN: &str = "swap-in, per page";
const MOVE: &str = "migration out of an area for contiguous memory, per page";

const SIZE: u64 = 32 * MIB;
const PAGES: u64 = SIZE / PAGE;

#[derive(Clone, Copy)]
enum Kind {
    Memfile,
    Memfd,
    Anonymous,
}

/// The subjects. scripts/memfile/bench/counts.py knows what is compared with what.
const KINDS: [(Kind, Subject); 3] = [
    (Kind::Memfile, Subject { name: "memfile", page: PAGE }),
    (Kind::Memfd, Subject { name: "memfd of a VM", page: PAGE }),
    (Kind::Anonymous, Subject { name: "anonymous memory of a VM", page: PAGE }),
];

/// All operations on all of them.
pub fn motion(report: &mut Report) -> Result<()> {
    let _pages = pressure::base_pages()?;
    for (kind, subject) in KINDS {
        let result =
            swap(kind, subject, &mut report.scratch()).and_then(|()| swap(kind, subject, report));
        report.unless_missing(&[OUT, IN], subject, result)?;
    }
    for (kind, subject) in KINDS {
        let result = migrate(kind, subject, &mut report.scratch())
            .and_then(|()| migrate(kind, subject, report));
        report.unless_missing(&[MOVE], subject, result)?;
    }
    Ok(())
}

/// A VM with memory of this kind.
struct Guest {
    vcpu: Vcpu,
    _vm: Vm,
    _slot: Slot,
    _fd: Option<OwnedFd>,
}

impl Guest {
    fn new(kind: Kind) -> Result<Guest> {
        let (vm, slot, fd) = match kind {
            Kind::Memfile => {
                let (vm, fd) = (Vm::protected()?, sys::memfile(SIZE)?);
                // Pages may move and go to swap.
                vm.raw_enable_cap(KVM_CAP_MEMFILE, MEMFILE_F_USER_INACCESSIBLE)
                    .context("choose the flags")?;
                let slot = vm.add_private(1, GPA, SIZE, Private::Memfile, &fd, 0)?;
                vm.set_private(GPA, SIZE)?;
                (vm, slot, Some(fd))
            }
            Kind::Memfd => {
                let (vm, fd) = (Vm::new(VmType::Default)?, sys::memfd(SIZE)?);
                let slot = vm.add_shared(1, GPA, Mapping::shared(&fd, 0, SIZE)?)?;
                (vm, slot, Some(fd))
            }
            Kind::Anonymous => {
                let vm = Vm::new(VmType::Default)?;
                let slot = vm.add_shared(1, GPA, small_pages(SIZE)?)?;
                (vm, slot, None)
            }
        };
        Ok(Guest { vcpu: vm.vcpu(0)?, _vm: vm, _slot: slot, _fd: fd })
    }

    /// Lets the guest write a zero to each page.
    fn touch(&mut self) -> Result<()> {
        self.vcpu.call(Command::Fill, &sequence(GPA, SIZE, PAGE, Pattern::Constant(0)))
    }
}

/// All pages, which the guest has just used, go to swap, and come back when it uses them again.
fn swap(kind: Kind, subject: Subject, report: &mut Report) -> Result<()> {
    if !report.wants(&[OUT, IN]) {
        return Ok(());
    }
    // Not what is mapped later.
    sys::populate_own_memory()?;
    let swap = Swap::on(2 * SIZE)?;
    let cgroup = Cgroup::enter()?;
    let mut guest = Guest::new(kind)?;
    guest.touch()?;
    pressure::drop_caches()?;
    let mut out = Cost::default();
    for _ in 0..16 {
        if swap.used()? >= SIZE {
            break;
        }
        // Reclaim looks at pages as active until the statistics are new.
        cgroup.line("memory.stat", "active_anon")?;
        out += count(|| cgroup.reclaim(SIZE).map(drop))?;
    }
    let used = swap.used()?;
    ensure!(used >= SIZE, "only {used} of {SIZE} bytes are in swap");
    report.add(OUT, subject, out, PAGES);
    let first = count(|| guest.touch())?;
    let again = count(|| guest.touch())?;
    report.add(IN, subject, first - &again, PAGES);
    Ok(())
}

/// A driver takes the area in which the guest's pages lie, against an area without pages.
fn migrate(kind: Kind, subject: Subject, report: &mut Report) -> Result<()> {
    if !report.wants(&[MOVE]) {
        return Ok(());
    }
    let area = Area::find()?;
    let mut guest = Guest::new(kind)?;
    // The first time, CPUs fetch pages in exchange for those in the area, and keep the rest.
    drop(area.take()?);
    drop(area.take()?);
    guest.touch()?;
    pressure::drop_caches()?;
    let counts = Counts::now()?;
    let mut taken = None;
    let full = count(|| {
        taken = Some(area.take()?);
        Ok(())
    })?;
    let moved = counts.grown("pgmigrate_success")?;
    ensure!(moved >= PAGES * 7 / 8, "only {moved} of {PAGES} pages were in the area");
    drop(taken.take());
    let empty = count(|| {
        taken = Some(area.take()?);
        Ok(())
    })?;
    report.add(MOVE, subject, full - &empty, moved);
    Ok(())
}
