// SPDX-License-Identifier: GPL-2.0
//! Every page is counted while it exists and not afterwards, whichever user of the file ends last.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::guest::Command;
use crate::ktap::{CaseResult, Suite};
use crate::mem;
use crate::pressure::{self, Cgroup, Pool};
use crate::support::backend::Backend;
use crate::support::setup::{GUEST, Setup};
use crate::sys::*;
use crate::uapi::KVM_MEMORY_EXIT_FLAG_PRIVATE;
use crate::vm::{Exit, Slot, Vcpu, Vm};
use crate::{MIB, PAGE, conformance};

pub static SUITES: &[Suite] = &[
    conformance!(
        @suite MEMFILE, "accounting",
        [
            every_order_of_ends_gives_all_pages_back,
            cgroup_is_charged_for_what_is_there,
            charge_is_the_allocators_until_the_page_goes,
            neighbours_of_two_cgroups_are_counted_apart,
            many_lives_leave_nothing_behind,
        ]
    ),
    conformance!(
        @suite HUGE, "accounting_huge",
        [
            every_order_of_ends_gives_all_pages_back,
            cgroup_is_charged_for_what_is_there,
            charge_is_the_allocators_until_the_page_goes,
            many_lives_leave_nothing_behind,
            memory_limit_is_enospc_and_leaves_nothing_behind,
        ]
    ),
    // Of one page only; hugetlb_1g.no_page_and_no_reservation_is_left_behind has the orders of ends.
    conformance!(
        @suite GIGANTIC, "accounting_1g",
        [
            charge_is_the_allocators_until_the_page_goes,
        ]
    ),
    conformance!(
        @suite HIDDEN, "accounting_hidden",
        [
            every_order_of_ends_gives_all_pages_back,
            cgroup_is_charged_for_what_is_there,
            many_lives_leave_nothing_behind,
        ]
    ),
];

/// Bytes of a guest. Half of it is allocated by fallocate, half by the guest's touch.
fn size_of(on: &Backend) -> u64 {
    MIB.max(4 * on.page)
}

/// A memfile and a guest, whose parts end one after the other.
struct Life {
    fd: Option<OwnedFd>,
    slot: Option<Slot>,
    vm: Option<(Vcpu, Vm)>,
    /// Bytes of the guest, and those that the file holds.
    size: u64,
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
        let size = size_of(on);
        let Setup { vm, mut vcpu, fd, slot, .. } = Setup::new(on, size)?;
        allocate(&fd, 0, size / 2).context("fallocate")?;
        vcpu.fill_pages(slot.gpa + size / 2, size / 2, GUEST)?;
        Ok(Life { fd: Some(fd), slot: Some(slot), vm: Some((vcpu, vm)), size, held: size })
    }

    /// Do one operation, if it is still possible.
    fn end(&mut self, end: End) -> Result<()> {
        match end {
            End::Punch => {
                if let Some(fd) = &self.fd {
                    // A bit of either half.
                    punch(fd, self.size / 4, self.size / 2).context("punch")?;
                    self.held -= self.size / 2;
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
    /// Bytes in files: of shmem, or of pages that are not in the pool.
    held: u64,
    /// Bytes that no reclaim takes.
    unevictable: u64,
    /// Bytes of shmem, if the files are not there.
    shmem: u64,
    /// Huge pages that are in the pool, or reserved.
    pool: u64,
    reserved: u64,
}

impl Counted {
    fn now(on: &Backend) -> Result<Counted> {
        // Pages wait in lists of each CPU before they are counted. 1 empties these, 4 prints
        // nothing.
        for value in ["4", "1"] {
            pressure::write("/proc/sys/vm/drop_caches", value)?;
        }
        mem::refresh_counters();
        let (shmem, unevictable) = (mem::meminfo("Shmem")?, mem::meminfo("Unevictable")?);
        let Some(usage) = on.pool()? else {
            return Ok(Counted { held: shmem, unevictable, shmem: 0, pool: 0, reserved: 0 });
        };
        let (held, pool) = (usage.used() * on.page, usage.total - usage.surplus);
        Ok(Counted { held, unevictable, shmem, pool, reserved: usage.reserved })
    }
}

fn every_order_of_ends_gives_all_pages_back(on: &'static Backend) -> CaseResult {
    let _pages = pressure::base_pages()?;
    drop(Life::begin(on)?);
    let size = size_of(on);
    for order in orders() {
        let before = Counted::now(on)?;
        let mut life = Life::begin(on)?;
        let during = Counted::now(on)?;
        ensure!(during.held - before.held == size, "{during:?}, {before:?} before");
        let others = |counted: Counted| (counted.shmem, counted.reserved);
        ensure!(others(during) == others(before), "{during:?}, {before:?} before");
        let unevictable = during.unevictable - before.unevictable;
        let wanted = if on.page == PAGE { size / 2..=size } else { 0..=0 };
        ensure!(wanted.contains(&unevictable), "{during:?}, {before:?} before");
        for (n, end) in order.into_iter().enumerate() {
            life.end(end)?;
            let held = Counted::now(on)?.held - before.held;
            let when = || format!("after {:?}", &order[..=n]);
            ensure!(held == life.held, "{} KiB are counted {}", held >> 10, when());
            if let Some(fd) = &life.fd {
                expect_allocated(fd, life.held, &when())?;
            }
        }
        let after = Counted::now(on)?;
        ensure!(after == before, "{after:?} after {order:?}, {before:?} before");
    }
    Ok(())
}

/// Statistics of a cgroup lag behind by a batch for each CPU; the pages of a test are many more.
const LAG: u64 = MIB;

/// cgroups are charged for huge pages with the rest of their memory, until this is dropped.
struct ChargedForHuge(String);

impl ChargedForHuge {
    fn set(on: &Backend) -> Result<Option<ChargedForHuge>> {
        if on.page == PAGE {
            return Ok(None);
        }
        require_root()?;
        let mounts = std::fs::read_to_string("/proc/mounts").context("/proc/mounts")?;
        let fields = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
        let mut ours = fields.filter(|field| field.get(1) == Some(&pressure::CGROUPS));
        let before = ours.next().and_then(|field| field.get(3).map(|s| (*s).to_owned()));
        let before = before.context("cgroups are not mounted")?;
        let only = ["nsdelegate", "favordynmods", "memory_localevents", "memory_recursiveprot"];
        let kept: Vec<_> = before.split(',').filter(|option| only.contains(option)).collect();
        let this = ChargedForHuge(kept.join(","));
        let with = [&kept[..], &["memory_hugetlb_accounting"]].concat().join(",");
        remount(pressure::CGROUPS, &with).context("memory_hugetlb_accounting")?;
        Ok(Some(this))
    }
}

impl Drop for ChargedForHuge {
    fn drop(&mut self) {
        if let Err(e) = remount(pressure::CGROUPS, &self.0) {
            println!("cgroups stay charged for huge pages: {e}");
        }
    }
}

/// A cgroup for the backend's pages.
fn new_cgroup(on: &Backend) -> Result<Cgroup> {
    if on.page == PAGE { Cgroup::new() } else { Cgroup::with_all(&["memory", "hugetlb"]) }
}

/// The same, and the process is in it.
fn enter_cgroup(on: &Backend) -> Result<Cgroup> {
    let cgroup = new_cgroup(on)?;
    cgroup.join()?;
    Ok(cgroup)
}

/// The cgroup has this many bytes in files.
fn expect_charged(on: &Backend, cgroup: &Cgroup, wanted: u64, when: &str) -> Result<()> {
    let kind = if on.page == PAGE { "shmem" } else { "hugetlb" };
    let held = cgroup.line("memory.stat", kind)?;
    ensure!(held.abs_diff(wanted) < LAG, "{when}: charged for {held} bytes, wanted {wanted}");
    if on.page != PAGE {
        let pages = cgroup.get(&Pool::of(on.page)?.charge_file("current"))?;
        ensure!(pages == wanted, "{when}: {pages} bytes of huge pages are charged, not {wanted}");
    }
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
    let _charged = ChargedForHuge::set(on)?;
    let size = 16 * MIB;
    let cgroup = enter_cgroup(on)?;
    drop(Life::begin(on)?);
    let before = cgroup.current()?;
    let mut s = Setup::new(on, size)?;
    expect_charged(on, &cgroup, 0, "nothing yet")?;
    allocate(&s.fd, 0, size / 2).context("fallocate")?;
    expect_charged(on, &cgroup, size / 2, "half allocated")?;
    s.vcpu.fill_pages(s.slot.gpa, size, GUEST)?;
    expect_charged(on, &cgroup, size, "all touched")?;
    punch(&s.fd, size / 4, size / 2).context("punch")?;
    expect_charged(on, &cgroup, size / 2, "half punched")?;
    drop((s.vcpu, s.vm));
    expect_charged(on, &cgroup, size / 2, "without the VM")?;
    drop(s.fd);
    drop(s.slot);
    expect_charged(on, &cgroup, 0, "all gone")?;
    expect_uncharged(&cgroup, before)
}

/// v5 charged the current task at the allocation, and uncharged the current task at the punch.
fn charge_is_the_allocators_until_the_page_goes(on: &'static Backend) -> CaseResult {
    let size = on.page.max(16 * MIB);
    let fd = on.file(size)?;
    let _charged = ChargedForHuge::set(on)?;
    let (ours, theirs) = (enter_cgroup(on)?, new_cgroup(on)?);
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
    expect_charged(on, &theirs, size, "theirs, allocated")?;
    expect_charged(on, &ours, 0, "ours, allocated by them")?;
    punch(&fd, 0, size).context("punch")?;
    expect_charged(on, &theirs, 0, "theirs, punched by us")?;
    expect_charged(on, &ours, 0, "ours, in the end")
}

/// Pages of a hole go by batches of 31. Here the last one of each belongs to another cgroup than
/// the others.
fn neighbours_of_two_cgroups_are_counted_apart(on: &'static Backend) -> CaseResult {
    const BATCH: u64 = 31;
    let _pages = pressure::base_pages()?;
    let few = 1024;
    let fd = on.file(few * BATCH * PAGE)?;
    let before = Counted::now(on)?;
    let (many, last) = (new_cgroup(on)?, new_cgroup(on)?);
    for n in 0..few {
        many.join()?;
        allocate(&fd, n * BATCH * PAGE, (BATCH - 1) * PAGE)?;
        last.join()?;
        allocate(&fd, ((n + 1) * BATCH - 1) * PAGE, PAGE)?;
    }
    expect_charged(on, &many, few * (BATCH - 1) * PAGE, "many, allocated")?;
    expect_charged(on, &last, few * PAGE, "the last ones, allocated")?;
    punch(&fd, 0, few / 2 * BATCH * PAGE)?;
    expect_charged(on, &many, few / 2 * (BATCH - 1) * PAGE, "many, half punched")?;
    expect_charged(on, &last, few / 2 * PAGE, "the last ones, half punched")?;
    drop(fd);
    expect_charged(on, &many, 0, "many, in the end")?;
    expect_charged(on, &last, 0, "the last ones, in the end")?;
    let after = Counted::now(on)?;
    ensure!(after == before, "{after:?}, {before:?} before");
    Ok(())
}

/// Memory that one cycle leaves in the kernel shows after many.
fn many_lives_leave_nothing_behind(on: &'static Backend) -> CaseResult {
    drop(memfile_unsized()?);
    let _charged = ChargedForHuge::set(on)?;
    let cgroup = enter_cgroup(on)?;
    for order in orders().take(4) {
        live(on, order)?;
    }
    let (before, counted) = (cgroup.current()?, Counted::now(on)?);
    for order in orders() {
        live(on, order)?;
    }
    let after = Counted::now(on)?;
    ensure!(after == counted, "{after:?}, {counted:?} before");
    expect_uncharged(&cgroup, before)
}

fn live(on: &'static Backend, order: [End; 4]) -> Result<()> {
    let mut life = Life::begin(on)?;
    order.into_iter().try_for_each(|end| life.end(end))
}

/// The limit of all memory, where it counts huge pages: the allocating task gets the error, no page
/// and no reservation is taken, and both continue when there is room.
fn memory_limit_is_enospc_and_leaves_nothing_behind(on: &'static Backend) -> CaseResult {
    drop(memfile_unsized()?);
    let _charged = ChargedForHuge::set(on)?;
    let before = Counted::now(on)?;
    let cgroup = enter_cgroup(on)?;
    let mut s = Setup::new(on, 4 * on.page)?;
    s.vcpu.fill_pages(s.slot.gpa, 2 * on.page, GUEST)?;
    // Less than a huge page more.
    cgroup.set("memory.max", cgroup.current()? + on.page / 2)?;
    let gpa = s.slot.gpa + 2 * on.page;
    let exit = s.vcpu.start(Command::Store, &[gpa, 7])?;
    let flags = KVM_MEMORY_EXIT_FLAG_PRIVATE;
    // hugetlb of Linux 7.2 does not tell this limit from missing memory.
    let old = kernel_release()?.starts_with("7.2.");
    let errno = if old { Errno::ENOMEM } else { Errno::ENOSPC };
    let full = Exit::MemoryFault { errno, gpa, size: PAGE, flags };
    ensure!(exit == full, "at the limit: {exit:x?}, not {full:x?}");
    for _ in 0..3 {
        expect_errno("fallocate", allocate(&s.fd, 2 * on.page, on.page), &[errno])?;
        let now = Counted::now(on)?;
        let wanted = Counted { held: before.held + 2 * on.page, ..before };
        ensure!(now == wanted, "{now:?}, wanted {wanted:?}");
        expect_charged(on, &cgroup, 2 * on.page, "at the limit")?;
    }
    cgroup.unlimit("memory.max")?;
    ensure!(s.vcpu.run()? == Exit::Done, "there is room again");
    s.vcpu.verify_pages(s.slot.gpa, 2 * on.page, GUEST)?;
    allocate(&s.fd, 0, 4 * on.page)?;
    drop(s);
    expect_charged(on, &cgroup, 0, "all gone")?;
    let after = Counted::now(on)?;
    ensure!(after == before, "{after:?}, {before:?} before");
    Ok(())
}
