// SPDX-License-Identifier: GPL-2.0
//! A driver gets the contiguous memory (CMA) that it needs, because movable pages make room (rules
//! 18 and 19): a guest's movable pages lie in the area, and leave it, at the latest when they
//! become unmovable; other pages are never there.
//!
//! The machine needs such an area, see [`Area`]: `scripts/check` boots one for this suite.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::guest::Command;
use crate::ktap::{CaseResult, Suite};
use crate::pattern::Pattern;
use crate::pressure::{
    self, Accounts, Area, Cgroup, Counts, Disk, Failing, Frame, MOVED, Pool, Setting, Swap, Trace,
    Victim, frames, moved, shmem_huge,
};
use crate::support::backend::{self, MEMFILE};
use crate::support::hugetlb::{Guest, frames_of};
use crate::support::setup::{
    BOTH, GUEST, LAYOUTS, Layout, MOVABLE, PINNED, RECLAIMABLE, SLOT, Setup, vm_with_flags,
};
use crate::support::stress::{Action, Bench, EVERYTHING, Host, Length, PAGES};
use crate::sys::*;
use crate::uapi::KVM_CAP_MEMFILE;
use crate::vm::{Exit, Private, Vm, region, small_pages};
use crate::{GIB, HUGE, MIB, PAGE, mem, suite};

pub static SUITE: Suite = suite!(
    "contiguous",
    [
        movable_pages_leave_the_area,
        movable_huge_pages_leave_the_area,
        running_guest_reads_nothing_old,
        pinned_pages_are_never_in_the_area,
        pages_older_than_their_binding_are_never_in_the_area,
        guest_memfd_is_never_in_the_area,
        pages_that_were_moved_there_leave_it_when_they_are_pinned,
        pages_leave_the_area_when_they_are_pinned,
        huge_pages_leave_the_area_when_they_are_pinned,
        pages_come_back_from_swap_outside_of_the_area_when_they_are_pinned: 120,
        pages_of_others_leave_the_area_when_one_pins_the_file,
        pinning_without_room_elsewhere_is_refused,
        allocation_without_room_elsewhere_loses_nothing,
        allocation_that_fails_halfway_loses_nothing,
        movable_pages_of_hugetlbfs_leave_the_area,
        pinned_pages_of_hugetlbfs_are_never_in_the_area,
        gigantic_page_of_the_area_is_for_movable_memory: 300,
        broken_part_of_a_huge_page_is_not_copied,
    ]
);

const SIZE: u64 = 4 * MIB;

/// A guest with content, and its frames: in the area, except for other pages that a CPU has kept.
fn guest_inside(area: &Area, flags: u64, size: u64) -> Result<(Setup, BTreeMap<u64, Frame>)> {
    let mut s = Setup::with_flags(flags, size)?;
    empty(area)?;
    s.vcpu.fill_pages(s.slot.gpa, s.slot.size, GUEST)?;
    let frames = frames(&s.vcpu, &s.slot, &s.fd)?;
    let inside = inside(area, &frames);
    println!("{inside} of {} pages are in the area", frames.len());
    ensure!(frames.len() as u64 == size / PAGE, "{} pages were traced", frames.len());
    ensure!(inside >= size / PAGE * 7 / 8, "only {inside} pages are in the area");
    Ok((s, frames))
}

/// Empty the area, and the lists of the CPUs, which are used first.
fn empty(area: &Area) -> CaseResult {
    // The first time, CPUs fetch pages in exchange for those in the area, and keep the rest.
    drop(area.take()?);
    drop(area.take()?);
    Ok(())
}

/// How many of the frames are in the area.
fn inside(area: &Area, frames: &BTreeMap<u64, Frame>) -> u64 {
    frames.values().filter(|frame| area.holds(frame.pfn)).count() as u64
}

/// How many pages of the area were given out, by a trace of `kmem:mm_page_alloc`.
fn taken(area: &Area, trace: &Trace) -> Result<u64> {
    let events = trace.events()?;
    let pfns = events.iter().filter_map(|event| event.hex("pfn"));
    Ok(pfns.filter(|pfn| area.holds(*pfn)).count() as u64)
}

/// Fail unless some of the guest's pages have left the area, and others have not.
fn expect_halfway(area: &Area, s: &Setup, before: &BTreeMap<u64, Frame>) -> CaseResult {
    let after = frames(&s.vcpu, &s.slot, &s.fd)?;
    let moved = moved(before, &after);
    println!("{moved} of {} pages moved", before.len());
    ensure!(moved > 0 && inside(area, &after) > 0, "none of them moved, or all of them");
    Ok(())
}

fn leave_the_area(flags: u64) -> CaseResult {
    let area = Area::find()?;
    let (mut s, before) = guest_inside(&area, flags, SIZE)?;
    let mut second = s.vm.vcpu(1)?;
    second.verify_pages(s.slot.gpa, s.slot.size, GUEST)?;
    let (counts, accounts) = (Counts::now()?, Accounts::now()?);
    let heads = before.values().filter(|frame| area.holds(frame.pfn));
    let folios = heads.map(|frame| frame.pfn >> frame.order);
    let folios = folios.collect::<std::collections::BTreeSet<_>>().len() as u64;

    let taken = area.take()?;
    counts.expect_grown(&MOVED, folios)?;
    let after = frames(&s.vcpu, &s.slot, &s.fd)?;
    ensure!(inside(&area, &after) == 0, "pages are still in the area: {after:x?}");
    ensure!(moved(&before, &after) >= inside(&area, &before), "pages are where they were");
    let next = Pattern::Generation(7);
    s.vcpu.verify_pages(s.slot.gpa, s.slot.size, GUEST)?;
    s.vcpu.fill(s.slot.gpa, s.slot.size, next)?;
    second.verify(s.slot.gpa, s.slot.size, next).context("the other vCPU")?;
    accounts.expect_back(MIB)?;
    expect_allocated(&s.fd, SIZE, "without the area")?;

    drop(taken);
    second.verify(s.slot.gpa, s.slot.size, next).context("the area is back")
}

fn movable_pages_leave_the_area() -> CaseResult {
    leave_the_area(MOVABLE)?;
    leave_the_area(BOTH)
}

fn movable_huge_pages_leave_the_area() -> CaseResult {
    let _huge = shmem_huge("always")?;
    let counts = Counts::now()?;
    leave_the_area(MOVABLE)?;
    leave_the_area(BOTH)?;
    counts.expect_grown(&["thp_file_alloc"], 2 * SIZE / HUGE)
}

/// Several vCPUs check each word while the area is taken, pages are punched and converted.
fn running_guest_reads_nothing_old() -> CaseResult {
    lock_own_memory()?;
    let area = Area::find()?;
    let counts = Counts::now()?;
    let s = Setup::with_flags(MOVABLE, PAGES * PAGE)?;
    let take = Box::new(move || area.take().map(drop));
    let host = Host { cgroup: Cgroup::enter()?, take };
    let length = Length::Time(std::time::Duration::from_secs(2));
    let mut bench = Bench::of(s, LAYOUTS[0], Some(host), length)?;
    bench.run(3, &[&[Action::Take][..], &EVERYTHING].concat())?;
    counts.expect_grown(&MOVED, 1)?;
    counts.expect_grown(&["memfile.punch"], 1)
}

/// A guest that never moves and has no page in the area.
fn stays_outside(area: &Area, mut s: Setup, what: &str) -> CaseResult {
    s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
    let before = frames(&s.vcpu, &s.slot, &s.fd)?;
    ensure!(before.len() as u64 == SIZE / PAGE, "{what}: {} pages were traced", before.len());
    ensure!(inside(area, &before) == 0, "{what}: pages are in the area: {before:x?}");
    let counts = Counts::now()?;
    drop(area.take().context(what.to_owned())?);
    ensure!(frames(&s.vcpu, &s.slot, &s.fd)? == before, "{what}: pages have moved");
    counts.expect_same(&["memfile.migrate", "memfile.swap_out", "memfile.invalidate"])?;
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)
}

fn pinned_pages_are_never_in_the_area() -> CaseResult {
    let area = Area::find()?;
    for huge in ["never", "always"] {
        let _huge = shmem_huge(huge)?;
        for flags in [PINNED, RECLAIMABLE] {
            let s = Setup::with_flags(flags, SIZE)?;
            stays_outside(&area, s, &format!("flags {flags:#x}, huge pages {huge}"))?;
        }
    }
    Ok(())
}

/// A file that is not bound has no final flags yet.
fn pages_older_than_their_binding_are_never_in_the_area() -> CaseResult {
    let area = Area::find()?;
    for flags in [PINNED, MOVABLE, RECLAIMABLE, BOTH] {
        let s = Setup::allocated_first(flags, SIZE)?;
        stays_outside(&area, s, &format!("flags {flags:#x}"))?;
    }
    Ok(())
}

/// Pages of a file that is not bound lie elsewhere, until a request moves them into the area: to
/// take their frames out of use, say.
fn pages_that_were_moved_there_leave_it_when_they_are_pinned() -> CaseResult {
    const PAGES: u64 = 64;
    let _pages = pressure::base_pages()?;
    let (cgroup, area) = (Cgroup::enter()?, Area::find()?);
    let fd = memfile(PAGES * PAGE)?;
    let reserve = || allocate(&fd, 0, PAGES * PAGE).context("reserve");
    let old = pressure::reserved_by(&cgroup, reserve)?;
    ensure!(old.len() as u64 == PAGES, "{} frames were found", old.len());
    ensure!(!old.iter().any(|pfn| area.holds(*pfn)), "a page of an unbound file is in the area");
    empty(&area)?;
    let counts = Counts::now()?;
    let take_out = || old.iter().try_for_each(|pfn| pressure::soft_offline(*pfn));
    let new = pressure::reserved_by(&cgroup, take_out)?;
    counts.expect_grown(&["memfile.migrate"], PAGES)?;
    let inside_before = new.iter().filter(|pfn| area.holds(**pfn)).count();
    println!("{inside_before} of {} pages were moved into the area", new.len());
    ensure!(inside_before > 0, "no page was moved into the area");

    let vm = vm_with_flags(PINNED)?;
    let layout = Layout { gpa: LAYOUTS[0].gpa, offset: 0 };
    let mut s = Setup::on_file(vm, &MEMFILE, fd, PAGES * PAGE, layout)?;
    s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
    let after = frames(&s.vcpu, &s.slot, &s.fd)?;
    ensure!(inside(&area, &after) == 0, "pinned pages are in the area: {after:x?}");
    drop(area.take().context("nothing of the guest is in it")?);
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
    drop(s);
    old.into_iter().try_for_each(pressure::unpoison)
}

/// For comparison. KVM does not show where its pages are, but the allocations meanwhile are known.
fn guest_memfd_is_never_in_the_area() -> CaseResult {
    let area = Area::find()?;
    let given_out = |s: &mut Setup| -> Result<u64> {
        empty(&area)?;
        let trace = Trace::start(&["kmem:mm_page_alloc"])?;
        s.vcpu.fill_pages(s.slot.gpa, s.slot.size, GUEST)?;
        taken(&area, &trace)
    };
    let pages = SIZE / PAGE;
    let movable = given_out(&mut Setup::with_flags(MOVABLE, SIZE)?)?;
    let mut s = Setup::new(Private::GuestMemfd, SIZE)?;
    let private = given_out(&mut s)?;
    println!("of the area, in pages: movable memfile {movable}, guest_memfd {private}, of {pages}");
    ensure!(movable >= pages * 7 / 8, "a movable memfile has only {movable} pages of the area");
    ensure!(private < pages / 8, "guest_memfd has {private} pages of the area");
    let _taken = area.take()?;
    s.vcpu.verify_pages(s.slot.gpa, s.slot.size, GUEST)
}

/// A file that was movable first, and is bound again as unmovable: its pages leave the area before.
fn pinned_anew(huge: &str) -> CaseResult {
    let _huge = shmem_huge(huge)?;
    let area = Area::find()?;
    for (first, second) in [(MOVABLE, PINNED), (BOTH, PINNED), (BOTH, RECLAIMABLE)] {
        let (s, before) = guest_inside(&area, first, SIZE)?;
        let counts = Counts::now()?;
        let mut s = s.pass_on(second)?;
        counts.expect_grown(&MOVED, 1)?;
        let after = frames(&s.vcpu, &s.slot, &s.fd)?;
        ensure!(inside(&area, &after) == 0, "pages are still in the area: {after:x?}");
        ensure!(moved(&before, &after) >= inside(&area, &before), "pages are where they were");
        s.vcpu.verify_pages(s.slot.gpa, s.slot.size, GUEST)?;
        expect_allocated(&s.fd, SIZE, "pinned")?;

        let counts = Counts::now()?;
        let taken = area.take().context("nothing of the guest is in it")?;
        counts.expect_same(&["memfile.migrate", "memfile.swap_out", "memfile.invalidate"])?;
        ensure!(frames(&s.vcpu, &s.slot, &s.fd)? == after, "pages have moved");
        drop(taken);
        // New pages are not in it either.
        punch(&s.fd, 0, SIZE)?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, Pattern::ZERO)?;
        ensure!(inside(&area, &frames(&s.vcpu, &s.slot, &s.fd)?) == 0, "new pages are in the area");
    }
    Ok(())
}

fn pages_leave_the_area_when_they_are_pinned() -> CaseResult {
    pinned_anew("never")
}

fn huge_pages_leave_the_area_when_they_are_pinned() -> CaseResult {
    pinned_anew("always")
}

/// While the file is pinned its pages are in swap, and readahead has brought copies of them into the
/// area. The guest gets others.
fn pages_come_back_from_swap_outside_of_the_area_when_they_are_pinned() -> CaseResult {
    lock_own_memory()?;
    let area = Area::find()?;
    let swap = Swap::on_disk(Disk::new(64 * MIB, Duration::from_millis(1))?)?;
    let _readahead = Setting::set("/proc/sys/vm/page-cluster", "3")?;
    let cgroup = Cgroup::enter()?;
    let (mut s, _) = guest_inside(&area, BOTH, SIZE)?;
    s.swap_out(&cgroup, SIZE)?;
    swap.disk().wait_for_writes()?;
    cgroup.forget(SIZE)?;
    empty(&area)?;
    let trace = Trace::start(&["kmem:mm_page_alloc"])?;
    // Each request reads a window of eight pages.
    for page in (0..SIZE / PAGE).step_by(64) {
        let gpa = s.slot.gpa + page * PAGE;
        s.vcpu.verify_pages(gpa, PAGE, GUEST)?;
    }
    let read = taken(&area, &trace)?;
    let copies = cgroup.line("memory.stat", "swapcached")? / PAGE;
    println!("{read} pages of the area are taken, {copies} copies are in memory");
    ensure!(read > 0 && copies > 0, "nothing was read ahead into the area");

    let mut s = s.pass_on(PINNED)?;
    let after = frames(&s.vcpu, &s.slot, &s.fd)?;
    ensure!(inside(&area, &after) == 0, "pages are in the area: {after:x?}");
    s.vcpu.verify_pages(s.slot.gpa, s.slot.size, GUEST)?;
    let _taken = area.take().context("nothing of the guest is in it")?;
    s.vcpu.verify_pages(s.slot.gpa, s.slot.size, GUEST)
}

/// A VM binds the end of [`Setup`]'s file, which has no pages, with flags of its own.
fn bind_the_rest(s: &Setup, flags: u64) -> Result<(Vm, SysResult<()>)> {
    let vm = Vm::protected()?;
    vm.raw_enable_cap(KVM_CAP_MEMFILE, flags).context("choose the flags")?;
    let view = small_pages(HUGE)?;
    let rest = Some((Private::Memfile, s.fd.as_fd(), s.slot.size));
    let result = vm.raw_set_region(&region(SLOT, GIB, &view, rest));
    Ok((vm, result))
}

/// The flags of a file, as fdinfo has them.
fn expect_flags(s: &Setup, wanted: u64, when: &str) -> CaseResult {
    let got = mem::fdinfo(&s.fd, "memfile-flags")?.context("fdinfo has no memfile-flags")?;
    ensure!(got == format!("{wanted:#x}"), "{when}: the flags are {got}, wanted {wanted:#x}");
    Ok(())
}

/// The flags belong to the file: another VM pins pages that a guest is using.
fn pages_of_others_leave_the_area_when_one_pins_the_file() -> CaseResult {
    let area = Area::find()?;
    let (mut s, before) = guest_inside(&area, MOVABLE, SIZE)?;
    let mut second = s.vm.vcpu(1)?;
    second.verify_pages(s.slot.gpa, s.slot.size, GUEST)?;
    let (other, result) = bind_the_rest(&s, PINNED)?;
    result.context("pin the file")?;
    expect_flags(&s, PINNED, "both are bound")?;
    let after = frames(&s.vcpu, &s.slot, &s.fd)?;
    ensure!(inside(&area, &after) == 0, "pages are still in the area: {after:x?}");
    ensure!(moved(&before, &after) >= inside(&area, &before), "pages are where they were");
    second.verify_pages(s.slot.gpa, s.slot.size, GUEST)?;
    s.vcpu.fill(s.slot.gpa, s.slot.size, Pattern::Generation(8))?;
    second.verify(s.slot.gpa, s.slot.size, Pattern::Generation(8))?;
    drop(other);
    let _taken = area.take().context("nothing of the guest is in it")?;
    second.verify(s.slot.gpa, s.slot.size, Pattern::Generation(8))
}

/// An attempt to pin the file has failed: flags and content are unchanged, and the guest still gets
/// new pages from the area.
fn expect_as_before(area: &Area, s: &mut Setup) -> CaseResult {
    expect_flags(s, MOVABLE, "after the attempt")?;
    let bindings = mem::fdinfo(&s.fd, "memfile-bindings")?;
    ensure!(bindings.as_deref() == Some("1"), "{bindings:?} bindings");
    s.vcpu.verify_pages(s.slot.gpa, s.slot.size, GUEST)?;
    expect_allocated(&s.fd, s.slot.size, "after the attempt")?;
    empty(area)?;
    s.vcpu.verify_pages(s.slot.gpa, s.slot.size, GUEST)?;
    punch(&s.fd, 0, s.slot.size)?;
    s.vcpu.fill_pages(s.slot.gpa, s.slot.size, GUEST)?;
    let pages = inside(area, &frames(&s.vcpu, &s.slot, &s.fd)?);
    ensure!(pages > 0, "no new page is in the area");
    let (_other, result) = bind_the_rest(s, PINNED)?;
    result.context("pin the file with nothing in the way")?;
    ensure!(inside(area, &frames(&s.vcpu, &s.slot, &s.fd)?) == 0, "pages are still in the area");
    s.vcpu.verify_pages(s.slot.gpa, s.slot.size, GUEST)
}

fn pinning_without_room_elsewhere_is_refused() -> CaseResult {
    let area = Area::find()?;
    let accounts = Accounts::now()?;
    let (mut s, before) = guest_inside(&area, MOVABLE, SIZE)?;
    let failing = Failing::after_pages(SIZE / PAGE / 2)?;
    let result = bind_the_rest(&s, PINNED);
    drop(failing);
    expect_errno("pin the file", result?.1, &[Errno::ENOMEM])?;
    let moved = moved(&before, &frames(&s.vcpu, &s.slot, &s.fd)?);
    println!("{moved} of {} pages moved", before.len());
    ensure!(moved > 0, "the attempt failed before it began to move pages");
    expect_as_before(&area, &mut s)?;
    drop(s);
    accounts.expect_back(MIB).context("after the guest")
}

/// Free memory outside the area, without the lists of the CPUs; whole huge pages, in bytes.
fn outside() -> Result<u64> {
    mem::refresh_counters();
    Ok((mem::meminfo("MemFree")? - mem::meminfo("CmaFree")?) & !(HUGE - 1))
}

/// Neither huge pages nor enough small ones are free outside: some pages move, others stay.
fn allocation_without_room_elsewhere_loses_nothing() -> CaseResult {
    let _huge = shmem_huge("always")?;
    let area = Area::find()?;
    let accounts = Accounts::now()?;
    let victim = Victim::with(8 * MIB)?;
    let size = 64 * MIB;
    let (mut s, before) = guest_inside(&area, MOVABLE, size)?;
    let counts = Counts::now()?;

    // An unbound memfile has no movable pages, so it fills the memory outside of the area, except
    // for three quarters of the guest's size; the kernel keeps a part of that for itself, which
    // must stay the same.
    let _boost = Setting::set("/proc/sys/vm/watermark_boost_factor", "0")?;
    let reserve = Setting::set("/proc/sys/vm/min_free_kbytes", "16384")?;
    let file = memfile(outside()?)?;
    let mut filled = 0;
    // In steps, so that the file's other memory is counted as well.
    while let Some(room) = outside()?.checked_sub(size / 4 * 3).filter(|room| *room >= HUGE) {
        let step = (room / 2).max(HUGE) & !(HUGE - 1);
        allocate(&file, filled, step).context("fill what is outside")?;
        filled += step;
    }
    let result = area.raw_take().map(drop);
    drop((file, reserve));

    expect_errno("take the area", result, &[Errno::ENOMEM])?;
    counts.expect_grown(&["pgmigrate_fail", "memfile.migrate"], 1)?;
    // Not by pgmigrate_success: compaction moves pages of others meanwhile as well.
    expect_halfway(&area, &s, &before)?;
    s.vcpu.verify_pages(s.slot.gpa, s.slot.size, GUEST)?;
    expect_allocated(&s.fd, size, "after the attempt")?;
    let _taken = area.take().context("with room elsewhere")?;
    s.vcpu.verify_pages(s.slot.gpa, s.slot.size, GUEST)?;
    // Its memory may be gone already.
    drop((s, victim));
    accounts.expect_back(MIB).context("after the guest")
}

fn allocation_that_fails_halfway_loses_nothing() -> CaseResult {
    let area = Area::find()?;
    for huge in ["never", "always"] {
        let _huge = shmem_huge(huge)?;
        let accounts = Accounts::now()?;
        let (mut s, before) = guest_inside(&area, BOTH, SIZE)?;
        let counts = Counts::now()?;
        // Enough for a huge page and a few small ones.
        let failing = Failing::after_pages(SIZE / PAGE / 2 + 100)?;
        let result = area.raw_take().map(drop);
        drop(failing);
        expect_errno("take the area", result, &[Errno::ENOMEM])?;
        counts.expect_grown(&["pgmigrate_fail"], 1)?;
        expect_halfway(&area, &s, &before)?;
        s.vcpu.verify_pages(s.slot.gpa, s.slot.size, GUEST)?;
        expect_allocated(&s.fd, SIZE, "after the attempt")?;
        s.vcpu.fill(s.slot.gpa, s.slot.size, Pattern::Generation(9))?;
        let _taken = area.take().context("without the failures")?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, Pattern::Generation(9))?;
        drop(s);
        accounts.expect_back(MIB).context("after the guest")?;
    }
    Ok(())
}

/// Pages of the pool that lie in the area, and as many more that may be taken from free memory.
fn pool_inside(area: &Area) -> Result<[Setting; 2]> {
    empty(area)?;
    let pool = Pool::of(HUGE)?;
    Ok([pool.fill(4)?, pool.overcommit(8)?])
}

/// A driver requests the memory in which pages of the pool lie, and guests use these.
fn movable_pages_of_hugetlbfs_leave_the_area() -> CaseResult {
    let area = Area::find()?;
    for flags in [MOVABLE, BOTH] {
        let _pool = pool_inside(&area)?;
        let size = 4 * HUGE;
        let mut s = Setup::with_flags_on(&backend::HUGE, flags, size)?;
        s.vcpu.fill_pages(s.slot.gpa, size, GUEST)?;
        let before = frames(&s.vcpu, &s.slot, &s.fd)?;
        println!("{} of {} pages are in the area", inside(&area, &before), before.len());
        ensure!(inside(&area, &before) != 0, "no page of the guest is in the area");
        let counts = Counts::now()?;
        let taken = area.take()?;
        counts.expect_grown(&["memfile.migrate"], 1)?;
        let after = frames(&s.vcpu, &s.slot, &s.fd)?;
        ensure!(inside(&area, &after) == 0, "pages are still in the area");
        s.vcpu.verify_pages(s.slot.gpa, size, GUEST)?;
        expect_allocated(&s.fd, size, "without the area")?;
        drop(taken);
        s.vcpu.verify_pages(s.slot.gpa, size, GUEST)?;
    }
    Ok(())
}

fn pinned_pages_of_hugetlbfs_are_never_in_the_area() -> CaseResult {
    let area = Area::find()?;
    let _pool = pool_inside(&area)?;
    let size = 4 * HUGE;
    let mut s = Setup::with_flags_on(&backend::HUGE, PINNED, size)?;
    s.vcpu.fill_pages(s.slot.gpa, size, GUEST)?;
    let before = frames(&s.vcpu, &s.slot, &s.fd)?;
    ensure!(inside(&area, &before) == 0, "a pinned page is in the area");
    drop(area.take()?);
    ensure!(frames(&s.vcpu, &s.slot, &s.fd)? == before, "a pinned page has moved");
    s.vcpu.verify_pages(s.slot.gpa, size, GUEST)
}

/// The pool has one page of 1 GiB, in the area that `hugetlb_cma=` has set aside.
fn gigantic_page_of_the_area_is_for_movable_memory() -> CaseResult {
    let area = Area::find()?;
    empty(&area)?;
    let pool = Pool::of(GIB)?;
    let filled = pool.fill(1)?;
    let mut guest = Guest::new(PINNED, GIB, 1)?;
    let exit = guest.vcpu.start(Command::Store, &[guest.gpa, 7])?;
    let empty = matches!(exit, Exit::MemoryFault { errno: Errno::ENOSPC, .. });
    ensure!(empty, "a pinned file got the page: {exit:x?}");
    expect_errno("fallocate", allocate(&guest.fd, 0, GIB), &[Errno::ENOSPC])?;
    pool.expect_used(0, "for a pinned file")?;
    drop(guest);
    let mut guest = Guest::new(MOVABLE, GIB, 1)?;
    guest.vcpu.store(guest.gpa, 7)?;
    pool.expect_used(1, "for a movable file")?;
    let frame = *frames_of(&guest)?.get(&0).context("the page has no frame")?;
    ensure!(area.holds(frame.pfn), "the page is not in the area: {frame:x?}");
    drop((guest, filled));

    // Nor one that the pool may take from there when it needs it.
    let _more = pool.overcommit(1)?;
    let mut guest = Guest::new(PINNED, GIB, 1)?;
    let exit = guest.vcpu.start(Command::Store, &[guest.gpa, 7])?;
    let none = matches!(exit, Exit::MemoryFault { errno: Errno::ENOSPC, .. });
    ensure!(none, "a pinned file got a page from the area: {exit:x?}");
    drop(guest);
    let mut guest = Guest::new(MOVABLE, GIB, 1)?;
    guest.vcpu.store(guest.gpa, 7)?;
    let frame = *frames_of(&guest)?.get(&0).context("the page has no frame")?;
    ensure!(area.holds(frame.pfn), "the new page is not in the area: {frame:x?}");
    Ok(())
}

/// The kernel would read it to copy it; with an error that is injected the guest would get it back.
fn broken_part_of_a_huge_page_is_not_copied() -> CaseResult {
    const BROKEN: u64 = 37 * PAGE;
    let area = Area::find()?;
    let _huge = shmem_huge("always")?;
    let (mut s, before) = guest_inside(&area, MOVABLE, SIZE)?;
    let gpa = s.slot.gpa;
    let frame = *before.get(&BROKEN).context("no frame")?;
    ensure!(frame.order > 0 && area.holds(frame.pfn), "it is not in a huge page of the area");
    let mut work = || -> CaseResult {
        let counts = Counts::now()?;
        let failing = Failing::splits()?;
        let noted = pressure::raw_poison(frame.pfn)?;
        drop(failing);
        println!("poison: {noted:?}");
        counts.expect_grown(&["thp_split_page_failed", "memfile.poison"], 1)?;
        s.vcpu.expect_lost(gpa + BROKEN)?;
        let taken = area.raw_take().map(drop);
        ensure!(taken.is_err(), "the area is free, and had a broken page");
        s.vcpu.expect_lost(gpa + BROKEN)?;
        s.vcpu.verify_pages(gpa, BROKEN, GUEST)?;
        s.vcpu.verify_pages(gpa + BROKEN + PAGE, SIZE - BROKEN - PAGE, GUEST)
    };
    let result = work();
    drop(s);
    pressure::unpoison(frame.pfn)?;
    result
}
