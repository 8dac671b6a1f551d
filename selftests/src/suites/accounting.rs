// SPDX-License-Identifier: GPL-2.0
//! Every page is counted while it exists and not afterwards, whichever user of the file ends last.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::ktap::{CaseResult, Suite};
use crate::pressure::{self, Cgroup};
use crate::support::backend::Backend;
use crate::support::setup::{GUEST, Setup};
use crate::sys::*;
use crate::vm::{Slot, Vcpu, Vm};
use crate::{MIB, conformance, mem};

/// The kinds of private memory whose pages the kernel counts one by one.
pub static SUITES: &[Suite] = &[
    conformance!(@suite MEMFILE, "accounting", [
        every_order_of_ends_gives_all_pages_back,
        cgroup_is_charged_for_what_is_there,
        charge_is_the_allocators_until_the_page_goes,
        many_lives_leave_nothing_behind,
    ]),
    conformance!(@suite HIDDEN, "accounting_hidden", [
        every_order_of_ends_gives_all_pages_back,
        cgroup_is_charged_for_what_is_there,
        many_lives_leave_nothing_behind,
    ]),
];

/// Half of it is allocated by fallocate, half by the guest's touch.
const SIZE: u64 = MIB;

/// A memfile and a guest, whose parts end one after the other.
struct Life {
    fd: Option<OwnedFd>,
    slot: Option<Slot>,
    vm: Option<(Vcpu, Vm)>,
    /// Bytes that the file holds.
    held: u64,
}

/// The ways to end a part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Punch,
    CloseFile,
    DeleteSlot,
    CloseVm,
}

/// All four, in every order.
fn orders() -> impl Iterator<Item = [End; 4]> {
    const ENDS: [End; 4] = [End::Punch, End::CloseFile, End::DeleteSlot, End::CloseVm];
    (0..256)
        .map(|n| [n & 3, n >> 2 & 3, n >> 4 & 3, n >> 6].map(|which: usize| ENDS[which]))
        .filter(|order| ENDS.iter().all(|end| order.contains(end)))
}

impl Life {
    /// Half is allocated, then the guest touches the other half.
    fn begin(on: &'static Backend) -> Result<Life> {
        let Setup { vm, mut vcpu, fd, slot, .. } = Setup::new(on, SIZE)?;
        allocate(&fd, 0, SIZE / 2).context("fallocate")?;
        vcpu.fill_pages(slot.gpa + SIZE / 2, SIZE / 2, GUEST)?;
        Ok(Life { fd: Some(fd), slot: Some(slot), vm: Some((vcpu, vm)), held: SIZE })
    }

    /// Do one operation, if it is still possible.
    fn end(&mut self, end: End) -> Result<()> {
        match end {
            End::Punch => {
                if let Some(fd) = &self.fd {
                    // A bit of either half.
                    punch(fd, SIZE / 4, SIZE / 2).context("punch")?;
                    self.held -= SIZE / 2;
                }
            }
            End::CloseFile => drop(self.fd.take()),
            End::DeleteSlot => {
                if let (Some((_, vm)), Some(slot)) = (&self.vm, self.slot.take()) {
                    vm.delete(slot)?;
                }
            }
            End::CloseVm => drop(self.vm.take()),
        }
        let bound = self.vm.is_some() && self.slot.is_some();
        if self.fd.is_none() && !bound {
            self.held = 0;
        }
        Ok(())
    }
}

/// The kernel's exact counters of the whole machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counted {
    shmem: u64,
    unevictable: u64,
}

impl Counted {
    fn now() -> Result<Counted> {
        // Pages wait in lists of each CPU before they are counted. 1 empties these, 4 prints
        // nothing.
        for value in ["4", "1"] {
            pressure::write("/proc/sys/vm/drop_caches", value)?;
        }
        mem::refresh_counters();
        Ok(Counted { shmem: mem::meminfo("Shmem")?, unevictable: mem::meminfo("Unevictable")? })
    }
}

fn every_order_of_ends_gives_all_pages_back(on: &'static Backend) -> CaseResult {
    let _pages = pressure::base_pages()?;
    drop(Life::begin(on)?);
    for order in orders() {
        let before = Counted::now()?;
        let mut life = Life::begin(on)?;
        let during = Counted::now()?;
        ensure!(during.shmem - before.shmem == SIZE, "{during:?}, {before:?} before");
        let unevictable = during.unevictable - before.unevictable;
        ensure!((SIZE / 2..=SIZE).contains(&unevictable), "{during:?}, {before:?} before");
        for (n, end) in order.into_iter().enumerate() {
            life.end(end)?;
            let held = Counted::now()?.shmem - before.shmem;
            let when = || format!("after {:?}", &order[..=n]);
            ensure!(held == life.held, "{} KiB are counted {}", held >> 10, when());
            if let Some(fd) = &life.fd {
                expect_allocated(fd, life.held, &when())?;
            }
        }
        let after = Counted::now()?;
        ensure!(after == before, "{after:?} after {order:?}, {before:?} before");
    }
    Ok(())
}

/// Statistics of a cgroup lag behind by a batch for each CPU; the pages of a test are many more.
const LAG: u64 = MIB;

/// The cgroup has this many bytes of shmem.
fn expect_charged(cgroup: &Cgroup, wanted: u64, when: &str) -> Result<()> {
    let shmem = cgroup.line("memory.stat", "shmem")?;
    ensure!(shmem.abs_diff(wanted) < LAG, "{when}: charged for {shmem} bytes, wanted {wanted}");
    ensure!(cgroup.current()? + LAG > wanted, "{when}: memory.current is too small");
    Ok(())
}

/// The charge returns to its old value. Memory that RCU frees takes a moment.
fn expect_uncharged(cgroup: &Cgroup, before: u64) -> Result<()> {
    let start = Instant::now();
    loop {
        let left = cgroup.current()?.saturating_sub(before);
        if left < LAG {
            println!("{} KiB stay charged", left >> 10);
            return Ok(());
        }
        ensure!(start.elapsed() < Duration::from_secs(20), "{} KiB stay charged", left >> 10);
        std::thread::yield_now();
    }
}

fn cgroup_is_charged_for_what_is_there(on: &'static Backend) -> CaseResult {
    drop(memfile_unsized()?);
    let size = 16 * MIB;
    let cgroup = Cgroup::enter()?;
    drop(Life::begin(on)?);
    let before = cgroup.current()?;
    let mut s = Setup::new(on, size)?;
    expect_charged(&cgroup, 0, "nothing yet")?;
    allocate(&s.fd, 0, size / 2).context("fallocate")?;
    expect_charged(&cgroup, size / 2, "half allocated")?;
    s.vcpu.fill_pages(s.slot.gpa, size, GUEST)?;
    expect_charged(&cgroup, size, "all touched")?;
    punch(&s.fd, size / 4, size / 2).context("punch")?;
    expect_charged(&cgroup, size / 2, "half punched")?;
    drop((s.vcpu, s.vm));
    expect_charged(&cgroup, size / 2, "without the VM")?;
    drop(s.fd);
    drop(s.slot);
    expect_charged(&cgroup, 0, "all gone")?;
    expect_uncharged(&cgroup, before)
}

/// v5 charged the current task at the allocation, and uncharged the current task at the punch.
fn charge_is_the_allocators_until_the_page_goes(_: &'static Backend) -> CaseResult {
    let size = 16 * MIB;
    let fd = memfile(size)?;
    let (ours, theirs) = (Cgroup::enter()?, Cgroup::new()?);
    // SAFETY: The child makes system calls and exits.
    let pid = check(unsafe { libc::fork() })? as libc::pid_t;
    if pid == 0 {
        let done = theirs.join().is_ok() && allocate(&fd, 0, size).is_ok();
        // SAFETY: Ends the child.
        unsafe { libc::_exit(i32::from(!done)) };
    }
    let mut status = 0;
    // SAFETY: The status outlives the call.
    check(unsafe { libc::waitpid(pid, &mut status, 0) })?;
    ensure!(status == 0, "the child ended with {status:#x}");
    expect_charged(&theirs, size, "theirs, allocated")?;
    expect_charged(&ours, 0, "ours, allocated by them")?;
    punch(&fd, 0, size).context("punch")?;
    expect_charged(&theirs, 0, "theirs, punched by us")?;
    expect_charged(&ours, 0, "ours, in the end")
}

/// Memory that one cycle leaves in the kernel shows after many.
fn many_lives_leave_nothing_behind(on: &'static Backend) -> CaseResult {
    drop(memfile_unsized()?);
    let cgroup = Cgroup::enter()?;
    for order in orders().take(4) {
        live(on, order)?;
    }
    let (before, counted) = (cgroup.current()?, Counted::now()?);
    for order in orders() {
        live(on, order)?;
    }
    let after = Counted::now()?;
    ensure!(after == counted, "{after:?}, {counted:?} before");
    expect_uncharged(&cgroup, before)
}

fn live(on: &'static Backend, order: [End; 4]) -> Result<()> {
    let mut life = Life::begin(on)?;
    order.into_iter().try_for_each(|end| life.end(end))
}
