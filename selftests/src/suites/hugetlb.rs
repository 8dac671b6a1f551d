// SPDX-License-Identifier: GPL-2.0
//! Memfiles on hugetlbfs: pages come from the pool on demand, go back to it as wholes, and are
//! mapped in their full size (rule 24).
//!
//! The same cases run with pages of 2 MiB, and of 1 GiB on a machine that reserves one at boot
//! (`hugetlb_1g`), or two if one of them is to move (`hugetlb_pair_1g`): `scripts/check` boots
//! them. The suites `…_huge` test what memfiles on all stores have in common.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Barrier, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::consumer::{Consumer, MAPPER, Mode, Span};
use crate::guest::Command;
use crate::ktap::{CaseResult, Suite};
use crate::pattern::Pattern;
use crate::pressure::{self, Block, Cgroup, Counts, Failing, Isolation, Pool, Swap, Trace, moved};
use crate::support::hugetlb::{
    Broken, Guest, break_at, file, frames_of, movable_pool, pool, suites,
};
use crate::support::inject::{Injector, SHORTAGES};
use crate::support::setup::{
    BOTH, GUEST, HIDDEN, Layout, MOVABLE, PINNED, RECLAIMABLE, SHARED, SLOT, vm_with_flags,
};
use crate::support::storm::in_a_storm;
use crate::support::wait::wait_for_vain_faults;
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{CONVERT_BY, Exit, Private, Vcpu, region, small_pages};
use crate::{GIB, HUGE, MIB, PAGE, mem};

suites! {
    [SUITE, "hugetlb", HUGE]: [
        every_size_of_the_machine_can_be_had,
        size_is_set_once_to_whole_huge_pages,
        every_access_to_the_content_is_refused,
        sealed_from_the_beginning,
        pages_come_from_the_pool_when_they_are_touched,
        file_may_be_larger_than_the_pool: 300,
        new_pages_are_zeroed,
        run_without_a_page_in_the_pool_says_enospc_and_goes_on,
        pool_may_grow_as_the_administrator_says,
        pool_that_shrinks_takes_no_page_in_use,
        last_page_is_for_all_who_want_it,
        limit_of_the_cgroup_is_enospc_and_its_charge_returns,
        no_page_and_no_reservation_is_left_behind,
        fallocate_reserves_and_says_enospc,
        fallocate_survives_a_storm: 120,
        allocation_that_fails_leaves_the_pool_as_it_was: 120,
        whole_pages_are_freed_by_a_hole,
        hole_of_a_part_reads_zeros_and_frees_nothing,
        kvm_maps_whole_pages_where_everything_agrees,
        kvm_maps_less_where_file_and_guest_do_not_agree,
        kvm_maps_less_where_attributes_differ,
        conversion_of_a_part_keeps_every_neighbour,
        faults_are_held_off_in_the_whole_page,
        pre_fault_maps_whole_pages,
        memory_error_costs_one_small_page,
        another_error_in_the_same_page_costs_one_more,
        error_in_a_page_that_is_about_to_move_is_told: 120,
        hole_does_not_touch_a_broken_page,
        never_reclaimed_whatever_the_flags,
        movable_pages_move_and_keep_content,
        pinned_pages_are_never_in_the_way,
        pages_that_become_pinned_leave_movable_memory,
        allocation_before_binding_takes_what_the_pool_has,
        offset_in_the_middle_of_a_page_is_bound_as_well,
        other_consumers_get_whole_pages,
        figures_are_those_of_any_memfile,
        file_for_one_vm_is_refused_to_another,
        pinning_waits_for_no_allocation_of_another_file,
    ]
    [SUITE_1G, "hugetlb_1g", GIB]: [
        size_is_set_once_to_whole_huge_pages,
        pages_come_from_the_pool_when_they_are_touched,
        run_without_a_page_in_the_pool_says_enospc_and_goes_on: 120,
        pool_that_shrinks_takes_no_page_in_use,
        last_page_is_for_all_who_want_it: 300,
        limit_of_the_cgroup_is_enospc_and_its_charge_returns,
        no_page_and_no_reservation_is_left_behind: 120,
        allocation_that_fails_leaves_the_pool_as_it_was: 600,
        whole_pages_are_freed_by_a_hole,
        hole_of_a_part_reads_zeros_and_frees_nothing,
        kvm_maps_whole_pages_where_everything_agrees: 120,
        kvm_maps_less_where_file_and_guest_do_not_agree,
        kvm_maps_less_where_attributes_differ,
        conversion_of_a_part_keeps_every_neighbour,
        faults_are_held_off_in_the_whole_page,
        pre_fault_maps_whole_pages,
        memory_error_costs_one_small_page,
        another_error_in_the_same_page_costs_one_more,
        hole_does_not_touch_a_broken_page,
        page_without_another_to_move_to_stays,
        other_consumers_get_whole_pages,
    ]
    [SUITE_PAIR, "hugetlb_pair_1g", GIB]: [
        movable_page_moves_to_another_and_keeps_content: 120,
        vcpu_that_writes_while_the_page_moves_loses_nothing: 120,
        pinned_page_stays_although_there_is_another,
    ]
}

/// The access that the vCPU has begun ends with this errno and names the page.
fn expect_exit(exit: &Exit, errno: Errno, gpa: u64) -> CaseResult {
    let wanted = Exit::MemoryFault { errno, gpa, size: PAGE, flags: KVM_MEMORY_EXIT_FLAG_PRIVATE };
    ensure!(*exit == wanted, "KVM_RUN ended with {exit:x?}, not {wanted:x?}");
    Ok(())
}

fn every_size_of_the_machine_can_be_had(_: u64) -> CaseResult {
    drop(memfile_unsized()?);
    let sizes = Pool::sizes()?;
    ensure!(!sizes.is_empty(), "the machine has no huge pages of any size");
    for page in &sizes {
        let fd =
            memfd_create(memfile_huge_flags(*page)).with_context(|| format!("{page} bytes"))?;
        ensure!(fstat(&fd)?.st_blksize as u64 == *page, "st_blksize is another");
        ensure!(allocated(&fd)? == 0);
    }
    // The default size, and a size that no machine has: as of ordinary memfds.
    drop(memfd_create(MFD_CLOEXEC | MFD_INACCESSIBLE | MFD_HUGETLB).context("the default size")?);
    let none = 17 << MFD_HUGE_SHIFT;
    let ordinary = memfd_create(MFD_HUGETLB | none).expect_err("there are pages of 128 KiB");
    expect_errno("no such size", memfd_create(MFD_INACCESSIBLE | MFD_HUGETLB | none), &[ordinary])?;
    // MFD_HUGETLB is missing.
    expect_errno("a size alone", memfd_create(MFD_INACCESSIBLE | none), &[Errno::EINVAL])
}

fn size_is_set_once_to_whole_huge_pages(page: u64) -> CaseResult {
    drop(memfile_unsized()?);
    let fd = memfd_create(memfile_huge_flags(page))?;
    for size in [1, PAGE, page - PAGE, page + PAGE, page + 1] {
        expect_errno(&format!("{size:#x} bytes"), ftruncate(&fd, size), &[Errno::EINVAL])?;
    }
    ftruncate(&fd, 3 * page).context("three huge pages")?;
    for size in [0, page, 3 * page, 4 * page, 5] {
        expect_errno(&format!("then {size:#x} bytes"), ftruncate(&fd, size), &[Errno::EPERM])?;
    }
    let past = fallocate(&fd, 0, 3 * page, page);
    expect_errno("allocate past the end", past, &[Errno::EINVAL])?;
    expect_errno("unaligned hole", punch(&fd, 1, page), &[Errno::EINVAL])?;
    ensure!(file_size(&fd)? == 3 * page);
    expect_allocated(&fd, 0, "after refusals")
}

fn every_access_to_the_content_is_refused(page: u64) -> CaseResult {
    let (pool, _filled) = pool(page, 2)?;
    let fd = file(page, 2)?;
    allocate(&fd, 0, page)?;
    let again = reopen(&fd, libc::O_RDWR).context("reopen")?;
    // A file of another file system; one of the same that anybody may read; and one of its kind.
    let (elsewhere, twin) = (memfd(2 * page)?, file(page, 2)?);
    let readable = memfd_create(memfile_huge_flags(page) & !MFD_INACCESSIBLE)?;
    ftruncate(&readable, 2 * page)?;
    for fd in [&fd, &again] {
        copying_is_refused(fd, [&elsewhere, &readable, &twin], page)?;
        let mut byte = [0x5a];
        expect_errno("pread", pread(fd, &mut byte, 0), &[Errno::EPERM])?;
        expect_errno("pwrite", pwrite(fd, &byte, 0), &[Errno::EPERM])?;
        ensure!(byte == [0x5a]);
        for protection in [libc::PROT_NONE, libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE] {
            for flags in [libc::MAP_SHARED, libc::MAP_PRIVATE] {
                for huge in [0, libc::MAP_HUGETLB] {
                    let map = Mapping::map(page, protection, flags | huge, Some((fd.as_fd(), 0)));
                    expect_errno("mmap", map.map(drop), &[Errno::EPERM])?;
                }
            }
        }
        // SAFETY: Takes no pointer but an offset that is none.
        let sent =
            check(unsafe { libc::sendfile(2, fd.as_raw_fd(), std::ptr::null_mut(), 16) as i64 });
        expect_errno("sendfile", sent, &[Errno::EPERM])?;
    }
    expect_errno(
        "truncate when opening",
        reopen(&fd, libc::O_RDWR | libc::O_TRUNC),
        &[Errno::EPERM],
    )?;
    expect_allocated(&elsewhere, 0, "the other file")?;
    pool.expect_used(1, "after the attempts")
}

/// There is neither a `copy_file_range` nor a `remap_file_range` operation. The VFS refuses both with
/// EXDEV where the file systems differ. Otherwise it copies by splice, which asks the file that is
/// read first: a memfile refuses with EPERM, and an ordinary file of hugetlbfs gives no pages to
/// splice (EINVAL), not even to a file that takes them. For a clone there is no such fallback.
fn copying_is_refused(
    fd: &OwnedFd,
    [elsewhere, readable, twin]: [&OwnedFd; 3],
    page: u64,
) -> CaseResult {
    let all = [
        ("to another file system", fd, elsewhere, Errno::EXDEV, Errno::EXDEV),
        ("from another file system", elsewhere, fd, Errno::EXDEV, Errno::EXDEV),
        ("to a readable file", fd, readable, Errno::EPERM, Errno::EOPNOTSUPP),
        ("from a readable file", readable, fd, Errno::EINVAL, Errno::EOPNOTSUPP),
        ("to one of its kind", fd, twin, Errno::EPERM, Errno::EOPNOTSUPP),
        ("from one of its kind", twin, fd, Errno::EPERM, Errno::EOPNOTSUPP),
        ("within it", fd, fd, Errno::EPERM, Errno::EOPNOTSUPP),
    ];
    for (what, from, to, copied, cloned) in all {
        for (at, to_at, len) in [(0, page, PAGE), (page, 0, page)] {
            let copy = copy_file_range(from, at, to, to_at, len);
            expect_errno(&format!("copy_file_range {what}"), copy, &[copied])?;
            let clone = clone_range(from, at, to, to_at, len);
            expect_errno(&format!("FICLONERANGE {what}"), clone, &[cloned])?;
        }
        expect_errno(&format!("FICLONE {what}"), clone_file(from, to), &[cloned])?;
    }
    Ok(())
}

fn sealed_from_the_beginning(page: u64) -> CaseResult {
    drop(memfile_unsized()?);
    let fd = file(page, 1)?;
    ensure!(get_seals(&fd)? & F_SEAL_SEAL != 0, "seals read {:#x}", get_seals(&fd)?);
    for seal in [F_SEAL_WRITE, F_SEAL_AUTO_ALLOCATE] {
        expect_errno("add a seal", add_seals(&fd, seal), &[Errno::EPERM])?;
    }
    let sealable = memfd_create(memfile_huge_flags(page) | MFD_ALLOW_SEALING);
    expect_errno("with sealing", sealable, &[Errno::EINVAL])
}

fn pages_come_from_the_pool_when_they_are_touched(page: u64) -> CaseResult {
    let count = if page == GIB { 1 } else { 8 };
    let (pool, _filled) = pool(page, count)?;
    let before = pool.usage()?.used();
    let mut guest = Guest::new(PINNED, page, count)?;
    pool.expect_used(before, "nothing is touched")?;
    for n in [count - 1, 0, count / 2] {
        guest.vcpu.store(guest.gpa + n * page + PAGE, 7)?;
        let touched = mem::resident_pages(&guest.fd)? * PAGE;
        pool.expect_used(before + touched / page, "after a touch")?;
        expect_allocated(&guest.fd, touched, "after a touch")?;
    }
    ensure!(mem::resident_pages(&guest.fd)? * PAGE == count.min(3) * page);
    drop(guest);
    pool.expect_used(before, "the guest is gone")
}

fn file_may_be_larger_than_the_pool(page: u64) -> CaseResult {
    let (pool, _filled) = pool(page, 2)?;
    let count = 32 * GIB / page;
    let mut guest = Guest::new(BOTH, page, count)?;
    for n in [0, count - 1] {
        guest.vcpu.store(guest.gpa + n * page, n + 1)?;
    }
    pool.expect_used(2, "two pages are touched")?;
    ensure!(
        guest.vcpu.load(guest.gpa)? == 1
            && guest.vcpu.load(guest.gpa + (count - 1) * page)? == count
    );
    Ok(())
}

/// The pages had another guest's content before.
fn new_pages_are_zeroed(page: u64) -> CaseResult {
    let (_pool, _filled) = pool(page, 2)?;
    for allocate_first in [false, true] {
        let mut guest = Guest::new(PINNED, page, 2)?;
        guest.vcpu.fill(guest.gpa, guest.size, GUEST)?;
        drop(guest);
        let fd = file(page, 2)?;
        if allocate_first {
            allocate(&fd, 0, 2 * page)?;
        }
        let layout = Layout { gpa: 4 * GIB, offset: 0 };
        let mut guest = Guest::on(PINNED, page, fd, 2 * page, layout)?;
        guest.vcpu.verify(guest.gpa, guest.size, Pattern::ZERO)?;
    }
    Ok(())
}

fn run_without_a_page_in_the_pool_says_enospc_and_goes_on(page: u64) -> CaseResult {
    let (pool, filled) = pool(page, 1)?;
    let free = pool.usage()?.free;
    let mut guest = Guest::new(PINNED, page, free + 1)?;
    for n in 0..free {
        guest.vcpu.store(guest.gpa + n * page, 7)?;
    }
    let gpa = guest.gpa + free * page;
    let exit = guest.vcpu.start(Command::Store, &[gpa + 8, 78])?;
    for _ in 0..3 {
        expect_exit(&exit, Errno::ENOSPC, gpa)?;
        ensure!(guest.vcpu.run()? == exit, "the next KVM_RUN ends otherwise");
    }
    // Once there is one, the same access succeeds.
    let more = match filled {
        Some(_) => Some(pool.fill(2)?),
        None => {
            punch(&guest.fd, 0, page)?;
            None
        }
    };
    ensure!(guest.vcpu.run()? == Exit::Done);
    ensure!(guest.vcpu.load(gpa + 8)? == 78 && guest.vcpu.load(gpa)? == 0);
    drop(guest);
    drop(more);
    pool.expect_used(pool.usage()?.total - free, "the guest is gone")
}

fn pool_may_grow_as_the_administrator_says(page: u64) -> CaseResult {
    let (pool, _filled) = pool(page, 1)?;
    let _more = pool.overcommit(2)?;
    let mut guest = Guest::new(PINNED, page, 4)?;
    for n in 0..3 {
        guest.vcpu.store(guest.gpa + n * page, 7)?;
        let usage = pool.usage()?;
        ensure!(usage.surplus == n, "{n} pages more than the pool had: {usage:?}");
    }
    let exit = guest.vcpu.start(Command::Store, &[guest.gpa + 3 * page, 7])?;
    expect_exit(&exit, Errno::ENOSPC, guest.gpa + 3 * page)?;
    drop(guest);
    let usage = pool.usage()?;
    ensure!((usage.surplus, usage.total, usage.free) == (0, 1, 1), "{usage:?}");
    Ok(())
}

/// The administrator lowers the pool, and has its gigantic pages split: what a guest has is not theirs.
fn pool_that_shrinks_takes_no_page_in_use(page: u64) -> CaseResult {
    let (pool, _filled) = pool(page, 1)?;
    let _rest = all_but_one(&pool)?;
    let before = pool.usage()?;
    let mut guest = Guest::new(PINNED, page, 1)?;
    guest.touch(page, GUEST)?;
    let frames = frames_of(&guest)?;
    {
        let _lowered = pool.lower(0)?;
        let usage = pool.usage()?;
        let all = before.total;
        ensure!((usage.total, usage.free, usage.surplus) == (all, 0, all), "{usage:?}");
        guest.expect(page, GUEST)?;
    }
    if page == GIB {
        println!("demote: {:?}", pool.demote(1));
        ensure!(pool.usage()?.total == before.total, "a page in use was split");
    }
    guest.expect(page, GUEST)?;
    guest.expect_mapped(page, 1, "nothing was taken")?;
    ensure!(frames_of(&guest)? == frames, "the page is elsewhere");
    drop(guest);
    pool.expect_same(before)
}

/// A file that has all free pages of the pool but one.
fn all_but_one(pool: &Pool) -> Result<OwnedFd> {
    let spare = pool.usage()?.free - 1;
    let rest = file(pool.page, spare.max(1))?;
    if spare != 0 {
        allocate(&rest, 0, spare * pool.page)?;
    }
    Ok(rest)
}

/// Two vCPUs want the same page at once, and the pool has one: neither gets an error.
fn last_page_is_for_all_who_want_it(page: u64) -> CaseResult {
    let (pool, _filled) = pool(page, 1)?;
    let rounds = if page == GIB { 3 } else { 100 };
    let _rest = all_but_one(&pool)?;
    let guest = Guest::new(PINNED, page, 1)?;
    let gpa = guest.gpa;
    let mut other = guest.vm.vcpu(1)?;
    let Guest { vcpu: mut first, fd, .. } = guest;
    for round in 0..rounds {
        let barrier = Barrier::new(2);
        let touch = |vcpu: &mut Vcpu, offset: u64| -> CaseResult {
            barrier.wait();
            vcpu.store(gpa + offset, round).with_context(|| format!("round {round}"))
        };
        thread::scope(|scope| -> CaseResult {
            let one = scope.spawn(|| touch(&mut first, 0));
            touch(&mut other, page - 8)?;
            one.join().map_err(|_| anyhow!("the thread panicked"))?
        })?;
        ensure!(first.load(gpa + page - 8)? == round && other.load(gpa)? == round);
        ensure!(pool.usage()?.free == 0, "{:?}", pool.usage()?);
        punch(&fd, 0, page)?;
        ensure!(pool.usage()?.free == 1, "{:?}", pool.usage()?);
    }
    Ok(())
}

fn limit_of_the_cgroup_is_enospc_and_its_charge_returns(page: u64) -> CaseResult {
    let (count, few) = if page == GIB { (1, 0) } else { (4, 2) };
    let (pool, _filled) = pool(page, count)?;
    let before = pool.usage()?.used();
    let cgroup = Cgroup::with("hugetlb")?;
    cgroup.join()?;
    let file = |name: &str| pool.charge_file(name);
    cgroup.set(&file("max"), few * page)?;
    let mut guest = Guest::new(PINNED, page, count)?;
    for n in 0..few {
        guest.vcpu.store(guest.gpa + n * page, 7)?;
    }
    ensure!(cgroup.get(&file("current"))? == few * page);
    let gpa = guest.gpa + few * page;
    let exit = guest.vcpu.start(Command::Store, &[gpa, 7])?;
    expect_exit(&exit, Errno::ENOSPC, gpa)?;
    expect_errno("fallocate", allocate(&guest.fd, few * page, page), &[Errno::ENOSPC])?;
    pool.expect_used(before + few, "at the limit")?;
    cgroup.set(&file("max"), (few + 1) * page)?;
    ensure!(guest.vcpu.run()? == Exit::Done);
    ensure!(cgroup.get(&file("current"))? == (few + 1) * page, "the page is not charged");
    punch(&guest.fd, 0, page)?;
    ensure!(cgroup.get(&file("current"))? == few * page, "a hole returns the charge");
    drop(guest);
    for file in ["current", "rsvd.current"].map(file) {
        ensure!(cgroup.get(&file)? == 0, "{file} is {}", cgroup.get(&file)?);
    }
    pool.expect_used(before, "the guest is gone")
}

/// A file, its guest, its slot and its descriptor end in every order.
fn no_page_and_no_reservation_is_left_behind(page: u64) -> CaseResult {
    let count = if page == GIB { 1 } else { 4 };
    let (pool, _filled) = pool(page, count)?;
    let before = pool.usage()?;
    for order in 0..6 {
        for allocate_first in [false, true] {
            let fd = file(page, count)?;
            if allocate_first {
                allocate(&fd, 0, count * page)?;
            }
            let layout = Layout { gpa: 4 * GIB, offset: 0 };
            let mut guest = Guest::on(BOTH, page, fd, count * page, layout)?;
            guest.vcpu.store(guest.gpa, 7)?;
            let Guest { vm, vcpu, fd, view, .. } = guest;
            match order {
                0 => {
                    drop(fd);
                    drop((vcpu, vm));
                }
                1 => {
                    drop((vcpu, vm));
                    drop(fd);
                }
                2 => {
                    vm.raw_delete(SLOT)?;
                    drop(fd);
                }
                3 => {
                    drop(fd);
                    vm.raw_delete(SLOT)?;
                }
                4 => punch(&fd, 0, count * page)?,
                _ => {
                    punch(&fd, 0, page)?;
                    vm.raw_delete(SLOT)?;
                    allocate(&fd, 0, count * page)?;
                }
            }
            drop(view);
        }
        let now = pool.usage()?;
        ensure!(now == before, "order {order}: the pool was {before:?} and is {now:?}");
    }
    Ok(())
}

fn fallocate_reserves_and_says_enospc(page: u64) -> CaseResult {
    let (pool, _filled) = pool(page, 4)?;
    let fd = file(page, 8)?;
    // Any byte of a huge page stands for all of it.
    allocate(&fd, page + 5, 1)?;
    pool.expect_used(1, "one byte")?;
    allocate(&fd, page - 1, 2)?;
    pool.expect_used(2, "two bytes in two pages")?;
    expect_errno("more than there are", allocate(&fd, 0, 8 * page), &[Errno::ENOSPC])?;
    // The pages that were allocated before the error are there.
    let held = allocated(&fd)?;
    ensure!(held == 4 * page, "the file holds {held} bytes");
    let mut guest = Guest::on(PINNED, page, fd, 8 * page, Layout { gpa: 4 * GIB, offset: 0 })?;
    guest.vcpu.fill(guest.gpa, held, GUEST)?;
    guest.vcpu.verify(guest.gpa, held, GUEST)?;
    expect_errno("again", allocate(&guest.fd, 0, 8 * page), &[Errno::ENOSPC])?;
    guest.vcpu.verify(guest.gpa, held, GUEST)
}

fn fallocate_survives_a_storm(page: u64) -> CaseResult {
    let (pool, _filled) = pool(page, 32)?;
    let fd = file(page, 32)?;
    in_a_storm(|| allocate(&fd, 0, 32 * page))?.context("fallocate")?;
    pool.expect_used(32, "after the storm")
}

/// Every allocation of the kernel on the way fails once, and all of them from some point on: the
/// call says so, takes no page and no reservation, and works when there is memory again.
fn allocation_that_fails_leaves_the_pool_as_it_was(page: u64) -> CaseResult {
    allocation_that_fails(page, PINNED)?;
    // That of 1 GiB has to be split.
    allocation_that_fails(page, HIDDEN)
}

fn allocation_that_fails(page: u64, flags: u64) -> CaseResult {
    // The guest touches another page than fallocate got, or the only one after a hole.
    let count = if page == GIB { 1 } else { 2 };
    let (pool, _filled) = pool(page, count)?;
    let before = pool.usage()?.used();
    let injector = Injector::new()?;
    let mut refused = (0, 0);
    for shortage in SHORTAGES {
        let (mut n, mut short) = (0, true);
        while short {
            n += 1;
            let words = format!("{shortage:?} {n}");
            let fd = file(page, count)?;
            let call = || allocate(&fd, 0, page);
            let (result, first) = injector.call(shortage, n, call, |r| r.is_err())?;
            if let Err(errno) = result {
                ensure!(errno == Errno::ENOMEM, "{words}: fallocate says {errno}");
                pool.expect_used(before, &words)?;
                expect_allocated(&fd, 0, &words)?;
                refused.0 += 1;
            } else if count == 1 {
                punch(&fd, 0, page)?;
            }
            let layout = Layout { gpa: 4 * GIB, offset: 0 };
            let mut guest = Guest::on(flags, page, fd, count * page, layout)?;
            let (used, gpa) = (pool.usage()?, guest.gpa + (count - 1) * page);
            guest.vcpu.post(Command::Store, &[gpa, 77])?;
            let vcpu = &mut guest.vcpu;
            let (exit, second) =
                injector.call(shortage, n, || vcpu.enter(), |r| *r != Ok(Exit::Done))?;
            let exit = exit.context("a signal")?;
            if exit != Exit::Done {
                // KVM's own allocations fail without an address.
                let named = matches!(exit, Exit::MemoryFault { errno: Errno::ENOMEM, .. });
                ensure!(named || exit == Exit::Error(Errno::ENOMEM), "{words}: {exit:x?}");
                refused.1 += u32::from(named);
                ensure!(!named || pool.usage()? == used, "{words}: a page was taken");
                ensure!(guest.vcpu.run()? == Exit::Done, "{words}: there is memory again");
            }
            ensure!(guest.vcpu.load(gpa)? == 77, "{words}");
            drop(guest);
            pool.expect_used(before, &words)?;
            short = first || second;
        }
    }
    println!("fallocate was refused {} times, a fault {}", refused.0, refused.1);
    ensure!(refused.0 > 0 && refused.1 > 0, "nothing was ever refused");
    Ok(())
}

fn whole_pages_are_freed_by_a_hole(page: u64) -> CaseResult {
    let count = if page == GIB { 1 } else { 4 };
    let (pool, _filled) = pool(page, count)?;
    let used = |n: u64| -> CaseResult {
        let usage = pool.usage()?;
        ensure!(usage.free == n, "{usage:?}, {n} were to be free");
        Ok(())
    };
    let free = pool.usage()?.free;
    let mut guest = Guest::new(MOVABLE, page, count)?;
    guest.touch(page, GUEST)?;
    used(free - count)?;
    punch(&guest.fd, 0, page)?;
    used(free - count + 1)?;
    guest.expect_mapped(page, count - 1, "after the hole")?;
    ensure!(guest.vcpu.load(guest.gpa + page / 2)? == 0, "old content");
    used(free - count)?;
    // A hole that has a part of a page at either end frees what lies between.
    if count == 4 {
        punch(&guest.fd, page - PAGE, 2 * page + 2 * PAGE)?;
        used(free - count + 2)?;
        ensure!(guest.vcpu.load(guest.gpa + 3 * page)? == 0);
        let last = guest.gpa + 4 * page - 8;
        ensure!(guest.vcpu.load(last)? == GUEST.word(last));
    }
    Ok(())
}

fn hole_of_a_part_reads_zeros_and_frees_nothing(page: u64) -> CaseResult {
    let (pool, _filled) = pool(page, 1)?;
    for flags in [PINNED, BOTH] {
        let mut guest = Guest::new(flags, page, 1)?;
        // The first, some, and the last small pages of the huge one.
        let span = 8 * MIB.min(page / 8);
        guest.vcpu.fill(guest.gpa, span, GUEST)?;
        guest.vcpu.fill(guest.gpa + page - span, span, GUEST)?;
        let (usage, held) = (pool.usage()?, allocated(&guest.fd)?);
        for (start, len) in
            [(0, PAGE), (5 * PAGE, 3 * PAGE), (span - PAGE, PAGE), (page - PAGE, PAGE)]
        {
            punch(&guest.fd, start, len)?;
            let gpa = guest.gpa + start;
            guest.vcpu.verify(gpa, len, Pattern::ZERO).with_context(|| format!("+{start:#x}"))?;
            ensure!(pool.usage()? == usage && allocated(&guest.fd)? == held, "a part was freed");
            if start + len < span {
                guest.vcpu.verify(gpa + len, PAGE, GUEST).context("behind the hole")?;
            }
            guest.vcpu.fill(gpa, len, GUEST)?;
        }
        guest.vcpu.verify(guest.gpa, span, GUEST)?;
        guest.vcpu.verify(guest.gpa + page - span, span, GUEST)?;
    }
    Ok(())
}

fn kvm_maps_whole_pages_where_everything_agrees(page: u64) -> CaseResult {
    let count = if page == GIB { 1 } else { 4 };
    let (_pool, _filled) = pool(page, count)?;
    for flags in [PINNED, MOVABLE, RECLAIMABLE, BOTH] {
        let mut guest = Guest::new(flags, page, count)?;
        guest.touch(page, GUEST)?;
        guest.expect_mapped(page, count, "after the guest wrote")?;
        guest.expect(page, GUEST)?;
        guest.expect_mapped(page, count, "after the guest read")?;
    }
    Ok(())
}

fn kvm_maps_less_where_file_and_guest_do_not_agree(page: u64) -> CaseResult {
    let (_pool, _filled) = pool(page, 1)?;
    let less = if page == GIB { HUGE } else { PAGE };
    // Not congruent: by what the next smaller level can still map, and by one page.
    for (shift, level) in [(less, less), (PAGE, PAGE)] {
        let layout = Layout { gpa: 4 * GIB + shift, offset: 0 };
        let mut guest = Guest::on(PINNED, page, file(page, 1)?, page, layout)?;
        // The guest's program lies in small pages of its own.
        guest.vcpu.load(guest.gpa)?;
        let before = guest.mapped(level)?;
        guest.vcpu.store(guest.gpa, 7)?;
        guest.vcpu.store(guest.gpa + page / 2, 8)?;
        guest.expect_mapped(page, 0, "not congruent")?;
        guest.expect_mapped(level, before + 1, "not congruent")?;
        ensure!(guest.vcpu.load(guest.gpa)? == 7 && guest.vcpu.load(guest.gpa + page / 2)? == 8);
    }
    Ok(())
}

fn kvm_maps_less_where_attributes_differ(page: u64) -> CaseResult {
    let (_pool, _filled) = pool(page, 1)?;
    for by in CONVERT_BY {
        let mut guest = Guest::new(PINNED, page, 1)?;
        let gpa = guest.gpa;
        guest.touch(page, GUEST)?;
        guest.expect_mapped(page, 1, "all is private")?;
        guest.vm.convert(by, gpa + 5 * PAGE, PAGE, false)?;
        guest.expect(page, GUEST)?;
        guest.expect_mapped(page, 0, "a page is shared")?;
        guest.vm.convert(by, gpa + 5 * PAGE, PAGE, true)?;
        ensure!(guest.vcpu.load(gpa + 5 * PAGE)? == 0);
        guest.expect(page, GUEST)?;
        // KVM maps all of it again when it faults anew.
        punch(&guest.fd, 6 * PAGE, PAGE)?;
        guest.expect(page, GUEST)?;
        guest.expect_mapped(page, 1, "all is private again")?;
    }
    Ok(())
}

fn conversion_of_a_part_keeps_every_neighbour(page: u64) -> CaseResult {
    let (_pool, _filled) = pool(page, 1)?;
    let span = 2 * MIB;
    // The first bytes of the page and the last ones, which of a page of 2 MiB are the same.
    let ends = if page == GIB { vec![0, page - span] } else { vec![0] };
    let parts = [(0, PAGE), (7 * PAGE, PAGE), (span - 2 * PAGE, 2 * PAGE)];
    for by in CONVERT_BY {
        let mut guest = Guest::new(BOTH, page, 1)?;
        let gpa = guest.gpa;
        for end in &ends {
            guest.vcpu.fill(gpa + end, span, GUEST)?;
        }
        let places = ends.iter().flat_map(|end| parts.map(|(start, len)| (*end, start, len)));
        for (end, start, len) in places {
            let words = format!("{by:?}, +{:#x}", end + start);
            guest.expect_mapped(page, 1, &words)?;
            let (first, at) = (gpa + end, gpa + end + start);
            guest.vm.convert(by, at, len, false)?;
            // The shared side is what the VMM has there.
            guest.vcpu.fill(at, len, SHARED)?;
            guest.vcpu.verify(at, len, SHARED)?;
            guest.vcpu.verify(first, start, GUEST).with_context(|| words.clone())?;
            let behind = start + len;
            guest.vcpu.verify(first + behind, span - behind, GUEST).context(words.clone())?;
            guest.expect_mapped(page, 0, &words)?;
            // The rest of the huge page is mapped by the next smaller size.
            for other in ends.iter().filter(|other| **other != end) {
                guest.vcpu.verify(gpa + other, span, GUEST).context(words.clone())?;
                guest.expect_mapped(HUGE, 1, &words)?;
            }
            guest.vm.convert(by, at, len, true)?;
            for end in &ends {
                guest.vcpu.verify(gpa + end, span, GUEST).context(words.clone())?;
            }
        }
    }
    Ok(())
}

/// While a hole is made in one part of a huge page, no consumer maps the page: a fault in another
/// part is repeated until the hole is there.
fn faults_are_held_off_in_the_whole_page(page: u64) -> CaseResult {
    let (_pool, _filled) = pool(page, 1)?;
    let mut guest = Guest::new(PINNED, page, 1)?;
    guest.touch(page, GUEST)?;
    let far = guest.gpa + page - 8;
    // An observer that keeps the hole from being made; KVM has unmapped by then.
    let observer = Consumer::bound(&guest.fd, Mode::Observer, Span::same(0, page / PAGE))?;
    observer.block(true)?;
    let stats = guest.vcpu.stats()?;
    let before = stats.get("pf_taken")?;
    let (vcpu, fd) = (&mut guest.vcpu, &guest.fd);
    thread::scope(|scope| -> CaseResult {
        let hole = scope.spawn(move || punch(fd, 0, PAGE));
        observer.wait_until_called()?;
        let access = scope.spawn(move || vcpu.load(far));
        let faulted = wait_for_vain_faults(&stats, before, || access.is_finished());
        let early = access.is_finished();
        observer.block(false)?;
        faulted?;
        let joined = |_| anyhow!("the thread panicked");
        hole.join().map_err(joined)?.context("punch")?;
        let got = access.join().map_err(joined)??;
        ensure!(!early, "the page was mapped while a hole was being made in it");
        ensure!(got == GUEST.word(far), "the guest reads {got:#x}");
        Ok(())
    })?;
    ensure!(guest.vcpu.load(guest.gpa)? == 0, "the hole has content");
    Ok(())
}

fn pre_fault_maps_whole_pages(page: u64) -> CaseResult {
    let count = if page == GIB { 1 } else { 4 };
    let (pool, _filled) = pool(page, count)?;
    let free = pool.usage()?.free;
    let mut guest = Guest::new(PINNED, page, count)?;
    let (result, left) = guest.vcpu.raw_pre_fault(guest.gpa, guest.size);
    result.with_context(|| format!("pre-fault, {left} bytes left"))?;
    guest.expect_mapped(page, count, "after the pre-fault")?;
    ensure!(pool.usage()?.free == free - count);
    guest.vcpu.verify(guest.gpa, PAGE, Pattern::ZERO)
}

fn expect_broken(guest: &mut Guest, offset: u64) -> CaseResult {
    guest.vcpu.expect_lost(guest.gpa + offset)
}

/// The file holds so many huge pages, by st_blocks and by fdinfo, and the pool has `used` in use.
fn expect_account(pool: &Pool, guest: &Guest, held: u64, used: u64, when: &str) -> CaseResult {
    expect_allocated(&guest.fd, held * pool.page, when)?;
    let (got, wanted) = (mem::resident_pages(&guest.fd)?, held * pool.page / PAGE);
    ensure!(got == wanted, "{when}: memfile-pages reads {got}, wanted {wanted}");
    pool.expect_used(used, when)
}

/// The guest gives up its only huge page, which is broken, and ends. The kernel keeps a reference to
/// a broken page: it is no file's any more, and stays in use all the same until it is mended.
fn give_up_broken(pool: &Pool, lost: Broken, guest: Guest, before: u64) -> CaseResult {
    punch(&guest.fd, 0, pool.page)?;
    expect_account(pool, &guest, 0, before + 1, "after a hole of the broken page")?;
    drop(guest);
    pool.expect_used(before + 1, "the guest is gone, the page is broken")?;
    drop(lost);
    pool.expect_used(before, "the page is mended")
}

fn memory_error_costs_one_small_page(page: u64) -> CaseResult {
    for flags in [PINNED, BOTH] {
        let (pool, _filled) = pool(page, 1)?;
        let before = pool.usage()?.used();
        let mut lost = Broken::none(page);
        let mut guest = Guest::new(flags, page, 1)?;
        let span = 2 * MIB;
        guest.vcpu.fill(guest.gpa, span, GUEST)?;
        guest.expect_mapped(page, 1, "before the error")?;
        expect_account(&pool, &guest, 1, before + 1, "before the error")?;
        let broken = 37 * PAGE;
        let trace = Trace::start(&["memfile:memfile_poison"])?;
        lost.frames.push(break_at(&guest, broken)?);
        expect_recorded(&trace, &guest.fd, "memfile_poison")?;
        drop(trace);
        // All of the huge page stays in the file.
        expect_account(&pool, &guest, 1, before + 1, "after the error")?;
        expect_broken(&mut guest, broken)?;
        guest.vcpu.verify(guest.gpa, broken, GUEST)?;
        guest.vcpu.verify(guest.gpa + broken + PAGE, span - broken - PAGE, GUEST)?;
        guest.expect_mapped(page, 0, "nothing is mapped across the broken page")?;
        expect_broken(&mut guest, broken)?;
        let again = Pattern::Generation(9);
        guest.vcpu.fill(guest.gpa, broken, again)?;
        guest.vcpu.verify(guest.gpa, broken, again)?;
        expect_account(&pool, &guest, 1, before + 1, "after more use")?;
        give_up_broken(&pool, lost, guest, before)?;
    }
    Ok(())
}

fn another_error_in_the_same_page_costs_one_more(page: u64) -> CaseResult {
    let (pool, _filled) = pool(page, 1)?;
    let before = pool.usage()?.used();
    let mut lost = Broken::none(page);
    let mut guest = Guest::new(PINNED, page, 1)?;
    guest.vcpu.fill(guest.gpa, 2 * MIB, GUEST)?;
    for broken in [3 * PAGE, 200 * PAGE, 201 * PAGE] {
        // The guest uses it up to now.
        guest.vcpu.verify(guest.gpa + broken, PAGE, GUEST)?;
        let first = lost.frames.first().copied();
        let frame = match first {
            // A page that is broken already cannot be faulted in with the rest.
            Some(frame) => frame - 3 + broken / PAGE,
            None => frames_of(&guest)?.get(&broken).context("no frame")?.pfn,
        };
        let counts = Counts::now()?;
        // The kernel says EHWPOISON when the huge page is broken already; it has taken note.
        let told = pressure::poison(frame);
        ensure!(told.is_ok() || first.is_some(), "{told:?}");
        counts.expect_grown(&["memfile.poison", "memfile.invalidate"], 1)?;
        lost.frames.push(frame);
        expect_broken(&mut guest, broken)?;
        guest.vcpu.verify(guest.gpa + broken + 2 * PAGE, PAGE, GUEST)?;
        // One reference is kept, however many errors the page has.
        let when = format!("after the error at +{broken:#x}");
        expect_account(&pool, &guest, 1, before + 1, &when)?;
    }
    expect_broken(&mut guest, 3 * PAGE)?;
    give_up_broken(&pool, lost, guest, before)
}

/// Memory that is being taken away is isolated as a whole, and then moved page by page. While a page
/// is isolated the kernel does not handle its errors, but takes note of them: its consumers are
/// notified all the same.
fn error_in_a_page_that_is_about_to_move_is_told(page: u64) -> CaseResult {
    const COUNT: u64 = 8;
    // More than a block has.
    let others = Block::size()? / page + 1;
    let (zone, _pool, _filled) = movable_pool(COUNT + others)?;
    let mut lost = Broken::none(page);
    let mut guest = Guest::new(MOVABLE, page, COUNT)?;
    guest.vcpu.fill(guest.gpa, guest.size, GUEST)?;
    let frames = frames_of(&guest)?;
    let pfn = |offset: u64| -> Result<u64> { Ok(frames.get(&offset).context("no frame")?.pfn) };
    let mut heads = Vec::new();
    for n in 0..COUNT {
        heads.push((pfn(n * page)?, n * page));
    }
    heads.sort_unstable();
    let pair = |block: &Block| {
        let mut own = heads.iter().filter(|(pfn, _)| block.holds(*pfn).unwrap_or(false));
        Some((own.next()?.1, own.next()?.1))
    };
    let mut pairs = zone.blocks.iter().filter_map(|block| Some((block, pair(block)?)));
    let (block, (first, second)) = pairs.next().context("no two pages in a movable block")?;

    // Of the free pages all but one are in the block: the guest's first page there can move, its
    // second finds no place.
    let rest = memfd_create(memfile_huge_flags(page) & !MFD_INACCESSIBLE)?;
    ftruncate(&rest, others * page)?;
    let view = Mapping::shared(&rest, 0, others * page)?;
    (0..others).for_each(|n| view.store(n * page, 1));
    let places = pressure::mapped_frames(&view)?;
    let places = (0..).zip(places.iter().step_by((page / PAGE) as usize));
    let (inside, elsewhere): (Vec<_>, Vec<_>) =
        places.partition(|(_, pfn)| block.holds(**pfn).unwrap_or(false));
    let one = elsewhere.first().context("no page outside of the block")?;
    for (n, _) in inside.iter().chain([one]) {
        punch(&rest, n * page, page)?;
    }

    let span = |offset: u64| Span::same(offset / PAGE, page / PAGE);
    let delaying = Consumer::bound(&guest.fd, Mode::Observer, span(first))?;
    let told = Consumer::bound(&guest.fd, Mode::Observer, span(second))?;
    delaying.block(true)?;
    let broken = second + 37 * PAGE;
    let frame = pfn(broken)?;
    thread::scope(|scope| -> CaseResult {
        let (sender, receiver) = mpsc::channel();
        let taking = scope.spawn(move || -> Result<SysResult<()>> {
            sender.send(Interrupter::of_this_thread())?;
            let _failing = Failing::pages(100, 1_000_000)?;
            Ok(block.raw_offline_until_interrupted())
        });
        let interrupter = receiver.recv()?;
        let result = delaying.wait_until_called().and_then(|()| {
            let noted = pressure::poison(frame);
            lost.frames.push(frame);
            ensure!(
                noted.is_err(),
                "the second page was not isolated: the kernel handled its error"
            );
            let calls = told.callbacks()?;
            ensure!(calls.starts != 0 && calls.starts == calls.ends, "told: {calls:?}");
            ensure!(delaying.callbacks()?.ends == 0, "the delay has ended already");
            Ok(())
        });
        // This ends the delay as well.
        while !taking.is_finished() {
            // It may have just ended.
            let _ = interrupter.interrupt();
            thread::sleep(Duration::from_millis(10));
        }
        let taken = taking.join().map_err(|_| anyhow!("the thread panicked"))??;
        ensure!(taken.is_err(), "the block is offline with a page in it");
        result
    })?;
    expect_broken(&mut guest, broken)?;
    guest.vcpu.verify(guest.gpa + second, 37 * PAGE, GUEST)?;
    guest.vcpu.verify(guest.gpa + first, page, GUEST)?;
    drop(guest);
    Ok(())
}

fn hole_does_not_touch_a_broken_page(page: u64) -> CaseResult {
    let (pool, _filled) = pool(page, if page == GIB { 1 } else { 2 })?;
    let _rest = if page == GIB { Some(all_but_one(&pool)?) } else { None };
    let mut lost = Broken::none(page);
    let mut guest = Guest::new(PINNED, page, 1)?;
    guest.vcpu.fill(guest.gpa, HUGE, GUEST)?;
    let broken = 37 * PAGE;
    let frame = break_at(&guest, broken)?;
    lost.frames.push(frame);
    let content = pressure::read_frame(frame)?;
    let used = pool.usage()?.used();
    punch(&guest.fd, broken - 2 * PAGE, 5 * PAGE)?;
    ensure!(pressure::read_frame(frame)? == content, "the broken page was cleared");
    expect_account(&pool, &guest, 1, used, "after a hole of a part")?;
    guest.vcpu.verify(guest.gpa + broken - 2 * PAGE, 2 * PAGE, Pattern::ZERO)?;
    guest.vcpu.verify(guest.gpa + broken + PAGE, 2 * PAGE, Pattern::ZERO)?;
    guest.vcpu.verify(guest.gpa + broken + 3 * PAGE, PAGE, GUEST)?;
    expect_broken(&mut guest, broken)?;
    // The work is that of the hole, not that of the whole page for each small one.
    let kept = page - HUGE / 2;
    guest.vcpu.fill(guest.gpa + kept, PAGE, GUEST)?;
    punch(&guest.fd, 0, kept)?;
    ensure!(pressure::read_frame(frame)? == content, "a large hole cleared the broken page");
    guest.vcpu.verify(guest.gpa, broken, Pattern::ZERO)?;
    guest.vcpu.verify(guest.gpa + kept - PAGE, PAGE, Pattern::ZERO)?;
    guest.vcpu.verify(guest.gpa + kept, PAGE, GUEST)?;
    expect_account(&pool, &guest, 1, used, "after a large hole")?;
    // A hole of the whole huge page gets rid of it: the next touch takes another one, if there is one.
    punch(&guest.fd, 0, page)?;
    // The kernel keeps the broken one: it does not return to those that are free.
    expect_account(&pool, &guest, 0, used, "after a hole of all")?;
    if page == GIB {
        let exit = guest.vcpu.start(Command::Load, &[guest.gpa])?;
        expect_exit(&exit, Errno::ENOSPC, guest.gpa)?;
        ensure!(pool.usage()?.free == 0, "the broken page is free: {:?}", pool.usage()?);
    } else {
        guest.vcpu.verify(guest.gpa, page, Pattern::ZERO)?;
        guest.vcpu.fill(guest.gpa, page, GUEST)?;
        ensure!(frames_of(&guest)?.values().all(|f| f.pfn != frame), "the broken page is back");
        expect_account(&pool, &guest, 1, used + 1, "with another page")?;
    }
    drop(guest);
    pool.expect_used(used, "the guest is gone, the page is broken")
}

fn never_reclaimed_whatever_the_flags(page: u64) -> CaseResult {
    let (pool, _filled) = pool(page, 2)?;
    let _swap = Swap::on(64 * MIB)?;
    for flags in [PINNED, MOVABLE, RECLAIMABLE, BOTH] {
        let cgroup = Cgroup::enter()?;
        let mut guest = Guest::new(flags, page, 2)?;
        guest.vcpu.fill(guest.gpa, guest.size, GUEST)?;
        let shown = mem::fdinfo(&guest.fd, "memfile-flags")?.context("fdinfo")?;
        let wanted = format!("{:#x}", flags | MEMFILE_F_UNRECLAIMABLE);
        ensure!(shown == wanted, "fdinfo says {shown}, wanted {wanted}");
        let counts = Counts::now()?;
        // It may find something else to reclaim, or nothing.
        let _ = cgroup.raw_reclaim(16 * MIB);
        counts.expect_same(&["memfile.swap_out", "memfile.invalidate"])?;
        pool.expect_used(2, "after reclaim")?;
        guest.vcpu.verify(guest.gpa, guest.size, GUEST)?;
        // Another VM may ask for less than the pages have anyway.
        let mut guest = guest.in_another_vm(flags & !MEMFILE_F_UNRECLAIMABLE, page)?;
        guest.vcpu.verify(guest.gpa, guest.size, GUEST)?;
    }
    Ok(())
}

fn movable_pages_move_and_keep_content(page: u64) -> CaseResult {
    let (zone, _pool, _filled) = movable_pool(4)?;
    for flags in [MOVABLE, BOTH] {
        pages_move(flags, page, 4, |guest| {
            let mut there = 0;
            for block in &zone.blocks {
                there += frames_of(guest)?
                    .values()
                    .filter(|f| block.holds(f.pfn).unwrap_or(false))
                    .count();
                block.offline()?;
                for frame in frames_of(guest)?.values() {
                    ensure!(!block.holds(frame.pfn)?, "{frame:x?} is in a block that is gone");
                }
                guest.vcpu.verify(guest.gpa, guest.size, GUEST)?;
                block.give_back("online_movable")?;
            }
            println!("{there} small pages lay in blocks that went, {} in all", guest.size / PAGE);
            ensure!(there != 0, "no page of the guest lay in movable memory");
            Ok(())
        })?;
    }
    Ok(())
}

/// The kernel makes no page of 1 GiB to move one to, but takes one that the pool has free.
fn movable_page_moves_to_another_and_keeps_content(page: u64) -> CaseResult {
    let (pool, _filled) = pool(page, 2)?;
    pages_move(MOVABLE, page, 1, |guest| give_up_first(guest, &pool))
}

/// Let `take` move pages of a guest that may move; there is room for them.
fn pages_move(
    flags: u64,
    page: u64,
    count: u64,
    take: impl FnOnce(&mut Guest) -> CaseResult,
) -> CaseResult {
    let mut guest = Guest::new(flags, page, count)?;
    write_all(&mut guest, page, GUEST)?;
    let counts = Counts::now()?;
    let trace = Trace::start(&["memfile:memfile_migrate"])?;
    take(&mut guest)?;
    expect_recorded(&trace, &guest.fd, "memfile_migrate")?;
    drop(trace);
    expect_all(&mut guest, page, GUEST)?;
    counts.expect_grown(&["memfile.migrate"], 1)?;
    guest.expect_mapped(page, count, "after the move")?;
    let next = Pattern::Generation(7);
    write_all(&mut guest, page, next)?;
    // In the file, and not in the frames that it has left.
    let mut guest = guest.in_another_vm(flags, page)?;
    expect_all(&mut guest, page, next)
}

/// The trace has an event of this name of the file.
fn expect_recorded(trace: &Trace, fd: &OwnedFd, name: &str) -> CaseResult {
    let inode = fstat(fd)?.st_ino;
    let events = trace.events()?;
    let mut of_file = events.iter().filter(|event| event.number("ino") == Some(inode));
    ensure!(of_file.any(|event| event.name == name), "no {name} of inode {inode}");
    Ok(())
}

/// The guest writes to all of its memory; of a page of 1 GiB a word of each small page.
fn write_all(guest: &mut Guest, page: u64, pattern: Pattern) -> CaseResult {
    if page == GIB {
        guest.vcpu.fill_pages(guest.gpa, guest.size, pattern)
    } else {
        guest.vcpu.fill(guest.gpa, guest.size, pattern)
    }
}

/// The guest finds what [`write_all`] wrote.
fn expect_all(guest: &mut Guest, page: u64, pattern: Pattern) -> CaseResult {
    if page == GIB {
        guest.vcpu.verify_pages(guest.gpa, guest.size, pattern)
    } else {
        guest.vcpu.verify(guest.gpa, guest.size, pattern)
    }
}

/// Have the kernel do without the first frame of the guest's only page: the page moves. The pool is
/// as large afterwards: the frame is mended, and a page made of that memory, before anything else
/// has use for it.
fn give_up_first(guest: &Guest, pool: &Pool) -> CaseResult {
    let (before, usage) = (frames_of(guest)?, pool.usage()?);
    let frame = before.get(&0).context("the page has no frame")?.pfn;
    let whole = pool.fill(usage.total)?;
    pressure::soft_offline(frame).context("the page was not given up")?;
    pressure::unpoison(frame)?;
    drop(whole);
    pool.expect_same(usage)?;
    let (after, all) = (frames_of(guest)?, before.len() as u64);
    ensure!(after.len() as u64 == all && moved(&before, &after) == all, "the page is in its place");
    Ok(())
}

/// What a vCPU writes before, during and after the move is in the page that is the guest's then.
fn vcpu_that_writes_while_the_page_moves_loses_nothing(page: u64) -> CaseResult {
    let (pool, _filled) = pool(page, 2)?;
    // A vCPU that is held off tries again and again. It is to leave the CPU to the thread that copies.
    stay_on_this_cpu()?;
    let guest = Guest::new(BOTH, page, 1)?;
    let mut writer = guest.vm.vcpu(1)?;
    let places: Vec<u64> = (0..page).step_by((page / 16) as usize).map(|n| guest.gpa + n).collect();
    let (begun, ended) = (Barrier::new(2), AtomicBool::new(false));
    let counts = Counts::now()?;
    let last = thread::scope(|scope| -> Result<u64> {
        let writing = scope.spawn(|| -> Result<u64> {
            let mut write = |round: u64| -> CaseResult {
                places.iter().try_for_each(|gpa| writer.store(*gpa, round))?;
                for gpa in &places {
                    let got = writer.load(*gpa)?;
                    ensure!(got == round, "round {round}: {gpa:#x} reads {got}");
                }
                Ok(())
            };
            let mut round = 1;
            let first = run_after_others().and_then(|()| write(round));
            begun.wait();
            first?;
            loop {
                // The last round is all after the move.
                let last = ended.load(Ordering::Acquire);
                round += 1;
                write(round)?;
                if last {
                    return Ok(round);
                }
            }
        });
        begun.wait();
        let result = give_up_first(&guest, &pool);
        ended.store(true, Ordering::Release);
        let last = writing.join().map_err(|_| anyhow!("the thread panicked"))??;
        result.map(|()| last)
    })?;
    counts.expect_grown(&["memfile.migrate"], 1)?;
    println!("{last} rounds");
    guest.expect_mapped(page, 1, "after the move")?;
    // In the file, and not in the frames that it has left.
    drop(writer);
    let mut guest = guest.in_another_vm(BOTH, page)?;
    for gpa in places {
        let got = guest.vcpu.load(gpa)?;
        ensure!(got == last, "{gpa:#x} reads {got}, and {last} was written last");
    }
    Ok(())
}

fn pinned_pages_are_never_in_the_way(page: u64) -> CaseResult {
    let (zone, _pool, _filled) = movable_pool(4)?;
    let fresh = Pool::of(page)?;
    let _more = fresh.overcommit(4)?;
    let mut guest = Guest::new(PINNED, page, 4)?;
    guest.vcpu.fill(guest.gpa, guest.size, GUEST)?;
    for frame in frames_of(&guest)?.values() {
        ensure!(!zone.holds(frame.pfn)?, "a pinned page is in movable memory: {frame:x?}");
    }
    let before = frames_of(&guest)?;
    zone.shuffle()?;
    expect_refused(&guest, false)?;
    ensure!(frames_of(&guest)? == before, "a pinned page has moved");
    guest.vcpu.verify(guest.gpa, guest.size, GUEST)
}

/// Not even isolated, though it could move.
fn pinned_page_stays_although_there_is_another(page: u64) -> CaseResult {
    let (pool, _filled) = pool(page, 2)?;
    page_stays(&pool, PINNED, false)
}

/// The kernel makes no page of this size to move one to, and the pool has no other: whoever wants
/// the page away is refused. A pinned page is not even isolated.
fn page_without_another_to_move_to_stays(page: u64) -> CaseResult {
    let (pool, _filled) = pool(page, 1)?;
    let _rest = all_but_one(&pool)?;
    for (flags, isolated) in [(PINNED, false), (MOVABLE, true), (BOTH, true)] {
        page_stays(&pool, flags, isolated).with_context(|| format!("{flags:#x}"))?;
    }
    Ok(())
}

/// The only page of a guest stays when it is wanted away, with its content and its mapping.
fn page_stays(pool: &Pool, flags: u64, isolated: bool) -> CaseResult {
    let page = pool.page;
    let mut guest = Guest::new(flags, page, 1)?;
    guest.touch(page, GUEST)?;
    let (counts, usage) = (Counts::now()?, pool.usage()?);
    expect_refused(&guest, isolated)?;
    counts.expect_same(&["memfile.migrate"])?;
    pool.expect_same(usage)?;
    guest.expect(page, GUEST)?;
    guest.expect_mapped(page, 1, "it stays")
}

/// A request for the guest's first page is refused: after the page was isolated, or before.
fn expect_refused(guest: &Guest, isolated: bool) -> CaseResult {
    let before = frames_of(guest)?;
    let frame = before.get(&0).context("the page has no frame")?.pfn;
    let isolation = Isolation::during(&before, || {
        ensure!(pressure::soft_offline(frame).is_err(), "the page was given up");
        Ok(())
    })?;
    ensure!((isolation.vain != 0) == isolated, "{isolation:?}");
    ensure!(frames_of(guest)? == before, "the page is elsewhere");
    Ok(())
}

fn pages_that_become_pinned_leave_movable_memory(page: u64) -> CaseResult {
    let (zone, pool, _filled) = movable_pool(4)?;
    let mut guest = Guest::new(MOVABLE, page, 4)?;
    guest.vcpu.fill(guest.gpa, guest.size, GUEST)?;
    let inside = |guest: &Guest| -> Result<usize> {
        Ok(frames_of(guest)?.values().filter(|f| zone.holds(f.pfn).unwrap_or(true)).count())
    };
    let there = inside(&guest)?;
    println!("{there} small pages are in movable memory");
    ensure!(there != 0, "no page of the guest lay in movable memory");
    let mut guest = guest.in_another_vm(PINNED, page)?;
    ensure!(inside(&guest)? == 0, "pinned pages are in movable memory");
    guest.vcpu.verify(guest.gpa, guest.size, GUEST)?;
    zone.shuffle()?;
    drop(guest);
    ensure!(pool.usage()?.reserved == 0);
    Ok(())
}

/// All of the pool lies in movable memory, and nothing is bound yet.
fn allocation_before_binding_takes_what_the_pool_has(page: u64) -> CaseResult {
    let (zone, pool, _filled) = movable_pool(4)?;
    for (flags, stays) in [(MOVABLE, true), (PINNED, false)] {
        let fd = file(page, 4)?;
        allocate(&fd, 0, 4 * page).context("before the binding")?;
        pool.expect_used(4, "allocated")?;
        let layout = Layout { gpa: 4 * GIB, offset: 0 };
        let mut guest = Guest::on(flags, page, fd, 4 * page, layout)?;
        guest.vcpu.fill(guest.gpa, guest.size, GUEST)?;
        for frame in frames_of(&guest)?.values() {
            ensure!(stays || !zone.holds(frame.pfn)?, "pinned in movable memory: {frame:x?}");
        }
        guest.vcpu.verify(guest.gpa, guest.size, GUEST)?;
        ensure!(pool.usage()?.surplus == 0, "a page came from elsewhere: {:?}", pool.usage()?);
    }
    Ok(())
}

/// A slot may begin and end anywhere in a huge page, and another VM have the rest.
fn offset_in_the_middle_of_a_page_is_bound_as_well(page: u64) -> CaseResult {
    let (_pool, _filled) = pool(page, 1)?;
    let fd = file(page, 1)?;
    let twin = fd.try_clone().context("dup")?;
    let middle = page / 2 + 3 * PAGE;
    let mut a = Guest::on(PINNED, page, fd, middle, Layout { gpa: 4 * GIB, offset: 0 })?;
    let rest = Layout { gpa: 4 * GIB + middle, offset: middle };
    let mut b = Guest::on(PINNED, page, twin, page - middle, rest)?;
    a.vcpu.fill(a.gpa, a.size, GUEST)?;
    b.vcpu.fill(b.gpa, b.size, SHARED)?;
    a.vcpu.verify(a.gpa, a.size, GUEST)?;
    b.vcpu.verify(b.gpa, b.size, SHARED)?;
    a.expect_mapped(page, 0, "half a page")?;
    punch(&a.fd, 0, middle)?;
    a.vcpu.verify(a.gpa, a.size, Pattern::ZERO)?;
    b.vcpu.verify(b.gpa, b.size, SHARED)
}

fn other_consumers_get_whole_pages(page: u64) -> CaseResult {
    let (_pool, _filled) = pool(page, 1)?;
    let fd = file(page, 1)?;
    let pages = page / PAGE;
    let consumer = Consumer::bound(&fd, MAPPER, Span::same(0, pages))?;
    let got = consumer.get(5)?;
    ensure!(got.order == u64::from(pages.ilog2()), "order {}", got.order);
    punch(&fd, 3 * PAGE, PAGE)?;
    consumer.expect_callbacks(&[(3, 4)])?;
    let taken = Consumer::new()?.bind(&fd, MAPPER, Span::same(1, 1));
    expect_errno("bind it twice", taken, &[Errno::EEXIST])
}

/// fdinfo, the counters and the tracepoints count pages of 4 KiB.
fn figures_are_those_of_any_memfile(page: u64) -> CaseResult {
    let (_pool, _filled) = pool(page, 2)?;
    let fd = file(page, 2)?;
    let twin = fd.try_clone().context("dup")?;
    let fdinfo = |bindings: u64, pages: u64| -> CaseResult {
        for (key, wanted) in [("memfile-bindings", bindings), ("memfile-pages", pages)] {
            let got = mem::fdinfo(&twin, key)?.context(key)?;
            ensure!(got == wanted.to_string(), "{key} reads {got}, wanted {wanted}");
        }
        Ok(())
    };
    fdinfo(0, 0)?;
    let inode = fstat(&twin)?.st_ino;
    let counts = Counts::now()?;
    let events = ["bind", "get_pfn", "invalidate_start", "invalidate_end", "unbind"];
    let names = events.map(|name| format!("memfile:memfile_{name}"));
    let trace = Trace::start(&names.each_ref().map(String::as_str))?;
    let mut guest = Guest::on(BOTH, page, fd, 2 * page, Layout { gpa: 4 * GIB, offset: 0 })?;
    guest.vcpu.store(guest.gpa, 7)?;
    fdinfo(1, page / PAGE)?;
    punch(&guest.fd, PAGE, PAGE)?;
    fdinfo(1, page / PAGE)?;
    punch(&guest.fd, 0, page)?;
    fdinfo(1, 0)?;
    drop(guest);
    fdinfo(0, 0)?;
    for name in events {
        expect_recorded(&trace, &twin, &format!("memfile_{name}"))?;
    }
    let counted = ["bind", "unbind", "get_pfn", "punch", "invalidate"];
    let counted = counted.map(|name| format!("memfile.{name}"));
    counts.expect_grown(&counted.each_ref().map(String::as_str), 1)?;
    let files = std::fs::read_to_string("/sys/kernel/debug/memfile/files").context("files")?;
    ensure!(files.lines().any(|line| line.starts_with(&format!("{inode} "))), "{files}");
    drop(twin);
    counts.expect_grown(&["memfile.destroy"], 1)
}

fn file_for_one_vm_is_refused_to_another(page: u64) -> CaseResult {
    let (_pool, _filled) = pool(page, 2)?;
    let fd = memfd_create(memfile_huge_flags(page) | MFD_ONE_VM).context("MFD_ONE_VM")?;
    ftruncate(&fd, 2 * page)?;
    let twin = fd.try_clone().context("dup")?;
    let mut guest = Guest::on(PINNED, page, fd, page, Layout { gpa: 4 * GIB, offset: 0 })?;
    guest.touch(page, GUEST)?;
    let other = vm_with_flags(PINNED)?;
    let view = small_pages(page)?;
    let refused = |when: &str| {
        // A page without a binding.
        let request = region(SLOT, 4 * GIB, &view, Some((Private::Memfile, twin.as_fd(), page)));
        expect_errno(when, other.raw_set_region(&request), &[Errno::EPERM])
    };
    refused("another VM")?;
    let taken = Consumer::new()?.bind(&twin, MAPPER, Span::same(page / PAGE, 1));
    expect_errno("another consumer", taken, &[Errno::EPERM])?;
    guest.expect(page, GUEST)?;
    drop(guest);
    refused("when the first one is gone")
}

/// Pinning waits until the pages that are being allocated are there, those of the file.
fn pinning_waits_for_no_allocation_of_another_file(page: u64) -> CaseResult {
    // So that it takes long.
    let _pages = pressure::base_pages()?;
    let (_pool, _filled) = pool(page, 2)?;
    for allocate_first in [false, true] {
        // This thread may get no turn while the other one allocates. If it had to wait, it is never in
        // time.
        let mut tries = 0;
        while !pinned_beside_an_allocation(page, allocate_first)
            .with_context(|| format!("allocated first: {allocate_first}"))?
        {
            tries += 1;
            ensure!(tries < 8, "the binding always comes after the other file is allocated");
        }
    }
    Ok(())
}

/// Whether a binding that pins has returned while another file is being allocated.
fn pinned_beside_an_allocation(page: u64, allocate_first: bool) -> Result<bool> {
    let size = 512 * MIB;
    let other = memfile(size)?;
    let fd = file(page, 2)?;
    if allocate_first {
        allocate(&fd, 0, page)?;
    }
    let vm = vm_with_flags(PINNED)?;
    thread::scope(|scope| {
        let allocation = scope.spawn(|| allocate(&other, 0, size));
        while allocated(&other)? == 0 && !allocation.is_finished() {
            thread::yield_now();
        }
        let slot = vm.add_private(SLOT, 4 * GIB, 2 * page, Private::Memfile, &fd, 0);
        let ended = allocation.is_finished();
        allocation.join().map_err(|_| anyhow!("the thread panicked"))??;
        slot.context("bind")?;
        Ok(!ended)
    })
}
