// SPDX-License-Identifier: GPL-2.0
//! As the suite `directmap`, for memfiles on hugetlbfs: whole huge pages leave the kernel's direct
//! map and come back to it (rules 24 and 25).
//!
//! The same cases run with pages of 2 MiB, and of 1 GiB on a machine that reserves one at boot.

use anyhow::{Context, Result, ensure};

use crate::consumer::{Consumer, Mode, Span};
use crate::ktap::{CaseResult, Suite};
use crate::pattern::Pattern;
use crate::pressure::{self, Memory};
use crate::support::directmap::{
    Hidden, Reader, Splits, direct_map, every_pfn, memory, populate_hidden,
};
use crate::support::hugetlb::{Broken, Guest, break_at, file, frames_of, pool, suites};
use crate::support::setup::{GUEST, HIDDEN, Layout, PINNED, SLOT, vm_with_flags};
use crate::support::vmm::Vmm;
use crate::sys::*;
use crate::vm::Private;
use crate::{GIB, HUGE, PAGE};

suites! {
    [SUITE, "directmap_huge", HUGE]: [
        page_is_there_without_the_flag,
        page_is_not_there_whatever_made_it,
        count_is_that_of_the_pages_in_files,
        hole_gives_the_frame_back_empty,
        hole_in_a_huge_page_keeps_its_neighbours_out,
        content_of_an_earlier_binding_leaves,
        initial_content_stays_out,
        direct_map_is_not_split,
        broken_page_does_not_come_back_with_others: 120,
        pages_of_the_pool_are_not_moved,
        secret_is_nowhere_in_memory: 240,
        secret_of_a_killed_vmm_is_nowhere_in_memory: 240,
        thousand_lives_leak_nothing: 240,
    ]
    [SUITE_1G, "directmap_1g", GIB]: [
        page_is_there_without_the_flag: 120,
        page_is_not_there_whatever_made_it: 240,
        count_is_that_of_the_pages_in_files: 120,
        hole_gives_the_frame_back_empty: 120,
        hole_in_a_huge_page_keeps_its_neighbours_out: 120,
        content_of_an_earlier_binding_leaves: 120,
        initial_content_stays_out: 120,
        direct_map_is_not_split: 240,
    ]
}

/// The part of each huge page that guests fill.
const SPAN: u64 = HUGE;
/// Where guests have their memory, and in the file.
const ALL: Layout = Layout { gpa: 4 * GIB, offset: 0 };

/// Frames of a guest all over its memory, those of [`SPAN`] first.
fn pfns(guest: &Guest) -> Result<Vec<u64>> {
    let pages = guest.size / PAGE;
    let all = every_pfn(frames_of(guest)?, guest.size)?;
    let wanted = |n: u64| n < SPAN / PAGE || n % (pages / 512) == 0 || n == pages - 1;
    Ok((0..).zip(all).filter(|(n, _)| wanted(*n)).map(|(_, pfn)| pfn).collect())
}

/// A guest of `count` huge pages that has filled the beginning of its memory.
fn filled(flags: u64, page: u64, count: u64) -> Result<Guest> {
    let mut guest = Guest::new(flags, page, count)?;
    guest.vcpu.fill(guest.gpa, SPAN, GUEST)?;
    Ok(guest)
}

fn page_is_there_without_the_flag(page: u64) -> CaseResult {
    let (memory, hidden, reader) = (memory()?, Hidden::now()?, Reader::load()?);
    let (_pool, _filled) = pool(page, 1)?;
    let guest = filled(PINNED, page, 1)?;
    let pfns = pfns(&guest)?;
    let written = &pfns[..(SPAN / PAGE) as usize];
    reader.expect_pattern(written, GUEST, guest.gpa, "without the flag")?;
    memory.expect_all(&pfns, true, "without the flag")?;
    hidden.expect(0, "without the flag")
}

fn page_is_not_there_whatever_made_it(page: u64) -> CaseResult {
    let (memory, reader) = (memory()?, Reader::load()?);
    let (_pool, _filled) = pool(page, 1)?;
    let on_demand = || Guest::new(HIDDEN, page, 1);
    let before = || {
        let fd = file(page, 1)?;
        allocate(&fd, 0, page).context("fallocate")?;
        Guest::on(HIDDEN, page, fd, page, ALL)
    };
    let after = || {
        let guest = on_demand()?;
        allocate(&guest.fd, 0, page).context("fallocate")?;
        Ok(guest)
    };
    let ahead = || {
        let guest = on_demand()?;
        guest.vcpu.raw_pre_fault(guest.gpa, page).0.context("pre-fault")?;
        Ok(guest)
    };
    let ways: [(&str, &dyn Fn() -> Result<Guest>); 4] = [
        ("touched", &on_demand),
        ("allocated, then bound", &before),
        ("bound, then allocated", &after),
        ("faulted in ahead", &ahead),
    ];
    for (name, way) in ways {
        let mut guest = way()?;
        guest.vcpu.verify(guest.gpa, SPAN, Pattern::ZERO)?;
        guest.vcpu.fill(guest.gpa, SPAN, GUEST)?;
        let pfns = pfns(&guest)?;
        reader.expect_fault(&pfns, name)?;
        memory.expect_all(&pfns, false, name)?;
        guest.vcpu.verify(guest.gpa, SPAN, GUEST)?;
    }
    Ok(())
}

fn count_is_that_of_the_pages_in_files(page: u64) -> CaseResult {
    let hidden = Hidden::now()?;
    let count = if page == GIB { 1 } else { 4 };
    let (_pool, _filled) = pool(page, count)?;
    let mut guest = Guest::new(HIDDEN, page, count)?;
    hidden.expect(0, "nothing is touched")?;
    guest.vcpu.store(guest.gpa + 8, 7)?;
    hidden.expect(page / PAGE, "one is touched")?;
    allocate(&guest.fd, 0, count * page)?;
    hidden.expect(count * page / PAGE, "all are allocated")?;
    punch(&guest.fd, 0, page)?;
    hidden.expect((count - 1) * page / PAGE, "one is punched")?;
    guest.vm.raw_delete(SLOT)?;
    hidden.expect((count - 1) * page / PAGE, "without the slot")?;
    drop(guest);
    hidden.expect(0, "the VM is gone")
}

fn hole_gives_the_frame_back_empty(page: u64) -> CaseResult {
    let (memory, hidden, reader) = (memory()?, Hidden::now()?, Reader::load()?);
    let (_pool, _filled) = pool(page, 1)?;
    for whole in [true, false] {
        let mut guest = filled(HIDDEN, page, 1)?;
        let (pfns, gpa) = (pfns(&guest)?, guest.gpa);
        // The hole, or the end of the file.
        if whole {
            punch(&guest.fd, 0, page)?;
        } else {
            guest.vcpu.verify(gpa, SPAN, GUEST)?;
            drop(guest);
        }
        hidden.expect(0, "gone")?;
        // They are in the pool again.
        reader.expect_cleared(&pfns, 0)?;
        for pfn in pfns {
            memory.expect_empty(pfn, GUEST, gpa, page)?;
        }
    }
    Ok(())
}

fn hole_in_a_huge_page_keeps_its_neighbours_out(page: u64) -> CaseResult {
    let (memory, hidden) = (memory()?, Hidden::now()?);
    let (_pool, _filled) = pool(page, 1)?;
    let mut guest = filled(HIDDEN, page, 1)?;
    let (pfns, gpa) = (pfns(&guest)?, guest.gpa);
    let pages = page / PAGE;
    for (start, len) in [(0, 1), (5, 3), (510, 2)] {
        punch(&guest.fd, start * PAGE, len * PAGE)?;
        hidden.expect(pages, "a hole of a part frees nothing")?;
        memory.expect_all(&pfns, false, "after the hole")?;
        guest.vcpu.verify(gpa + start * PAGE, len * PAGE, Pattern::ZERO)?;
    }
    for (start, end) in [(1, 5), (8, 510)] {
        guest.vcpu.verify(gpa + start * PAGE, (end - start) * PAGE, GUEST)?;
    }
    if page > HUGE {
        // Whole entries of the direct map, and parts of them before and behind.
        guest.vcpu.fill(gpa + 4 * HUGE, 4 * HUGE, GUEST)?;
        punch(&guest.fd, 5 * HUGE - PAGE, 2 * HUGE + 2 * PAGE)?;
        guest.vcpu.verify(gpa + 4 * HUGE, HUGE - PAGE, GUEST)?;
        guest.vcpu.verify(gpa + 5 * HUGE - PAGE, 2 * HUGE + 2 * PAGE, Pattern::ZERO)?;
        guest.vcpu.verify(gpa + 7 * HUGE + PAGE, HUGE - PAGE, GUEST)?;
        memory.expect_all(&pfns, false, "after a large hole")?;
    }
    drop(guest);
    hidden.expect(0, "the VM is gone")?;
    for pfn in pfns {
        memory.expect_empty(pfn, GUEST, gpa, page)?;
    }
    Ok(())
}

fn content_of_an_earlier_binding_leaves(page: u64) -> CaseResult {
    let (memory, hidden) = (memory()?, Hidden::now()?);
    let (_pool, _filled) = pool(page, 1)?;
    let guest = filled(PINNED, page, 1)?;
    let pages = pfns(&guest)?;
    memory.expect_all(&pages, true, "without the flag")?;
    let Guest { vm, vcpu, fd, .. } = guest;
    drop((vcpu, vm));
    let mut guest = Guest::on(HIDDEN, page, fd, page, ALL)?;
    hidden.expect(page / PAGE, "bound anew")?;
    memory.expect_all(&pages, false, "bound anew")?;
    guest.vcpu.verify(guest.gpa, SPAN, GUEST)?;
    ensure!(pfns(&guest)? == pages, "the guest has other pages");
    drop(guest);
    hidden.expect(0, "the VM is gone")
}

fn initial_content_stays_out(page: u64) -> CaseResult {
    let memory = memory()?;
    let (_pool, _filled) = pool(page, 1)?;
    initial_content(&memory, page)
}

fn initial_content(memory: &Memory, page: u64) -> Result<()> {
    // Before there is a vCPU that has run.
    let (vm, fd) = (vm_with_flags(HIDDEN)?, file(page, 1)?);
    let slot = vm.add_private(SLOT, ALL.gpa, page, Private::Memfile, &fd, 0)?;
    vm.set_private(slot.gpa, page)?;
    populate_hidden(memory, &vm, &slot, &fd, SPAN)
}

/// Nothing costs an entry of 2 MiB: not what concerns parts of a page either.
fn direct_map_is_not_split(page: u64) -> CaseResult {
    let count = if page == GIB { 1 } else { 8 };
    let (_pool, _filled) = pool(page, count)?;
    let memory = memory()?;
    let hidden = Hidden::now()?;
    let (splits, map) = (Splits::now()?, direct_map()?);
    for life in 0..5 {
        if life == 0 || page == HUGE {
            initial_content(&memory, page)?;
        }
        let mut guest = filled(HIDDEN, page, count)?;
        allocate(&guest.fd, 0, count * page)?;
        hidden.expect(count * page / PAGE, &format!("life {life}"))?;
        guest.vcpu.verify(guest.gpa, SPAN, GUEST)?;
        punch(&guest.fd, 5 * PAGE, 3 * PAGE)?;
        guest.vcpu.verify(guest.gpa + 5 * PAGE, 3 * PAGE, Pattern::ZERO)?;
        if life % 2 == 0 {
            punch(&guest.fd, 0, count * page)?;
            hidden.expect(0, "punched")?;
        }
    }
    hidden.expect(0, "all VMs are gone")?;
    let (splits, now) = (splits.since()?, direct_map()?);
    println!("DirectMap 4k, 2M, 1G in bytes: {map:x?} before, {now:x?} after");
    ensure!(splits == 0, "{splits} entries of 2 MiB were split");
    ensure!(now[0] == map[0], "the direct map has more entries of 4 KiB");
    Ok(())
}

fn broken_page_does_not_come_back_with_others(page: u64) -> CaseResult {
    const BROKEN: u64 = 37 * PAGE;
    let (memory, hidden) = (memory()?, Hidden::now()?);
    let absent = memory.absent()?;
    {
        let (_pool, _filled) = pool(page, 1)?;
        let mut lost = Broken::none(page);
        let mut guest = filled(HIDDEN, page, 1)?;
        let (pages, gpa) = (pfns(&guest)?, guest.gpa);
        lost.frames.push(break_at(&guest, BROKEN)?);
        memory.expect_all(&pages, false, "a page is broken")?;
        guest.vcpu.verify(gpa, BROKEN, GUEST)?;
        guest.vcpu.verify(gpa + BROKEN + PAGE, SPAN - BROKEN - PAGE, GUEST)?;
        punch(&guest.fd, BROKEN - PAGE, 3 * PAGE)?;
        memory.expect_all(&pages, false, "a hole around it")?;
        guest.vcpu.verify(gpa + BROKEN - PAGE, PAGE, Pattern::ZERO)?;
        guest.vcpu.verify(gpa + BROKEN + PAGE, PAGE, Pattern::ZERO)?;
        guest.vcpu.verify(gpa + BROKEN + 2 * PAGE, SPAN - BROKEN - 2 * PAGE, GUEST)?;
        drop(guest);
        hidden.expect(0, "the VM is gone")?;
    }
    memory.expect_absent(absent, "in the end")
}

/// To migrate or offline memory, the kernel would have to read the pages.
fn pages_of_the_pool_are_not_moved(page: u64) -> CaseResult {
    let memory = memory()?;
    let (_pool, _filled) = pool(page, 4)?;
    let mut guest = filled(HIDDEN, page, 2)?;
    let pages = pfns(&guest)?;
    pressure::compact()?;
    let soft_offline = "/sys/devices/system/memory/soft_offline_page";
    let refused = std::fs::write(soft_offline, format!("{:#x}", pages[3] * PAGE));
    ensure!(refused.is_err(), "a hidden page was taken out of use");
    memory.expect_all(&pages, false, "after compaction")?;
    guest.vcpu.verify(guest.gpa, SPAN, GUEST)?;
    ensure!(pfns(&guest)? == pages, "the guest has other pages");
    Ok(())
}

fn secret_is_nowhere_in_memory(page: u64) -> CaseResult {
    lock_own_memory()?;
    let memory = memory()?;
    let (_pool, _filled) = pool(page, 2)?;
    let guest = |flags, pattern| -> Result<Guest> {
        let mut guest = Guest::new(flags, page, 2)?;
        guest.vcpu.fill(guest.gpa, guest.size, pattern)?;
        Ok(guest)
    };
    // Data that a search has read may be anywhere: a new secret each time.
    let (first, second) = (Pattern::Generation(6001), Pattern::Generation(6002));
    let s = guest(PINNED, first)?;
    let (found, _) = memory.search(first, s.gpa, s.size)?;
    ensure!(found >= s.size / 64, "without the flag it is found {found} times");
    drop(s);

    let absent = memory.absent()?;
    let s = guest(HIDDEN, second)?;
    let (gpa, size) = (s.gpa, s.size);
    let nowhere = |when: &str| -> Result<u64> {
        let (found, absent) = memory.search(second, gpa, size)?;
        println!("{when}: found {found} times, {absent} frames are not in the direct map");
        ensure!(found == 0, "{when}: found {found} times");
        Ok(absent)
    };
    nowhere("written")?;
    punch(&s.fd, PAGE, 10 * PAGE)?;
    nowhere("punched in part")?;
    s.vm.raw_delete(SLOT)?;
    nowhere("the slot is gone")?;
    drop(s);
    let now = nowhere("the VM is gone")?;
    ensure!(now == absent, "{absent} frames were not in the direct map, now {now}");
    Ok(())
}

/// The VMM dies while its guest runs.
fn secret_of_a_killed_vmm_is_nowhere_in_memory(page: u64) -> CaseResult {
    lock_own_memory()?;
    let (memory, hidden) = (memory()?, Hidden::now()?);
    let (pool, _filled) = pool(page, 2)?;
    let (gpa, size) = (ALL.gpa, 2 * page);
    let start = |flags, pattern| {
        Vmm::start(|ready| {
            let mut guest = Guest::new(flags, page, 2)?;
            guest.vcpu.fill(gpa, size, pattern)?;
            ready();
            loop {
                guest.vcpu.verify(gpa, size, pattern)?;
            }
        })
    };
    // Data that a search has read may be anywhere: a new secret each time.
    let (first, second) = (Pattern::Generation(6101), Pattern::Generation(6102));
    let vmm = start(PINNED, first)?;
    let (found, absent) = memory.search(first, gpa, size)?;
    ensure!(found >= size / 64, "without the flag it is found {found} times");
    vmm.kill()?;

    let vmm = start(HIDDEN, second)?;
    hidden.expect(size / PAGE, "the guest has its secret")?;
    vmm.kill()?;
    hidden.expect(0, "the VMM is killed")?;
    pool.expect_used(0, "the VMM is killed")?;
    let (found, now) = memory.search(second, gpa, size)?;
    ensure!(found == 0, "the VMM is killed: found {found} times");
    ensure!(now == absent, "{absent} frames were not in the direct map, now {now}");
    Ok(())
}

fn thousand_lives_leak_nothing(page: u64) -> CaseResult {
    const LIVES: u64 = 1000;
    let (memory, hidden) = (memory()?, Hidden::now()?);
    let (pool, _filled) = pool(page, 2)?;
    let (before, absent) = (direct_map()?, memory.absent()?);
    let fd = file(page, 2)?;
    let consumer = Consumer::new()?;
    for life in 0..LIVES {
        consumer.bind(&fd, Mode::Mapper(HIDDEN), Span::same(0, 2 * page / PAGE))?;
        consumer.get(3)?;
        if life % 3 == 0 {
            allocate(&fd, 0, 2 * page)?;
        }
        punch(&fd, (life % 500) * PAGE, 10 * PAGE)?;
        consumer.unbind()?;
        punch(&fd, 0, 2 * page)?;
        hidden.expect(0, &format!("life {life}"))?;
        pool.expect_used(0, &format!("life {life}"))?;
    }
    drop(fd);
    let (after, now) = (direct_map()?, memory.absent()?);
    println!("DirectMap 4k, 2M, 1G in bytes: {before:x?} before, {after:x?} after");
    ensure!(now == absent, "{absent} frames were not in the direct map, now {now}");
    ensure!(after == before, "the direct map has other entries");
    Ok(())
}
