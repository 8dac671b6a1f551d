// SPDX-License-Identifier: GPL-2.0
//! Private memory that the kernel does not see, `MEMFILE_F_KERNEL_INACCESSIBLE` (rule 25).

use std::ffi::CString;
use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};

use crate::consumer::{Consumer, Mode, Span};
use crate::guest::Command;
use crate::ktap::{CaseResult, Suite, skip};
use crate::pattern::Pattern;
use crate::pressure::{self, Cgroup, Counts, Failing, Memory, Swap, expect_online, word};
use crate::support::directmap::{
    Flushes, Hidden, Reader, Splits, direct_map, memory, pfns, populate_hidden,
};
use crate::support::inject::{Injector, SHORTAGES, Shortage};
use crate::support::setup::{
    BOTH, GUEST, HIDDEN, LAYOUTS, MOVABLE, PINNED, RECLAIMABLE, SLOT, Setup, content, vm_with_flags,
};
use crate::support::vmm::Vmm;
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{Exit, Private, Slot, Vm, small_pages};
use crate::{GIB, HUGE, MIB, PAGE, mem, suite};

pub static SUITE: Suite = suite!(
    "directmap",
    [
        // First, because it wants entries of the direct map that are whole.
        page_that_cannot_leave_the_map_is_not_given_out: 240,
        // Likewise.
        binding_that_fails_does_not_claim_a_file_for_one_vm: 120,
        page_is_there_without_the_flag,
        page_is_not_there_whatever_made_it,
        kcore_does_not_have_the_content,
        count_is_that_of_the_pages_in_files,
        hole_gives_the_frame_back_empty,
        hole_in_a_huge_page_keeps_its_neighbours_out,
        hole_in_a_huge_page_that_cannot_be_split,
        hole_in_a_huge_page_without_memory_keeps_its_neighbours_out: 240,
        parts_of_a_split_page_stay_out,
        part_beyond_the_end_of_the_file_comes_back,
        content_of_an_earlier_binding_leaves,
        hole_in_a_swapped_huge_page_brings_nothing_into_the_map,
        fallocate_brings_no_content_into_the_map: 120,
        swapoff_brings_no_content_into_the_map,
        swapoff_without_memory_loses_nothing: 120,
        file_keeps_the_flag_as_long_as_it_has_pages,
        flag_is_not_for_a_file_that_others_use,
        flag_is_for_pinned_pages_only,
        kvm_has_no_access,
        initial_content_stays_out,
        fallocate_after_binding_takes_pages_out,
        prefault_flushes_once_for_many_pages,
        prefault_allocates_what_it_maps,
        page_that_nobody_wrote_is_not_dropped_while_it_is_hidden: 120,
        allocation_that_fails_changes_nothing: 120,
        batch_without_memory_is_made_page_by_page: 240,
        binding_that_fails_can_be_repeated: 120,
        broken_page_does_not_come_back_with_others,
        page_does_not_move_when_its_block_is_wanted: 240,
        secret_is_nowhere_in_memory: 400,
        secret_of_a_killed_vmm_is_nowhere_in_memory: 240,
        thousand_lives_leak_nothing: 240,
    ]
);

const SIZE: u64 = 4 * MIB;
const PAGES: u64 = SIZE / PAGE;

fn page_is_there_without_the_flag() -> CaseResult {
    let (memory, reader) = (memory()?, Reader::load()?);
    let hidden = Hidden::now()?;
    for flags in [PINNED, MOVABLE, BOTH] {
        let s = Setup::filled(flags, SIZE)?;
        let pfns = pfns(&s)?;
        reader.expect_pattern(&pfns, GUEST, s.slot.gpa, &format!("{flags:#x}"))?;
        memory.expect_all(&pfns, true, &format!("{flags:#x}"))?;
        let bytes = memory.frame(pfns[3])?.context("no content")?;
        ensure!(word(&bytes, 64) == GUEST.word(s.slot.gpa + 3 * PAGE + 64), "another content");
        hidden.expect(0, "no flag")?;
    }
    Ok(())
}

fn page_is_not_there_whatever_made_it() -> CaseResult {
    let (memory, reader) = (memory()?, Reader::load()?);
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let on_demand = || Setup::with_flags(HIDDEN, SIZE);
        let before = || Setup::allocated_first(HIDDEN, SIZE);
        let after = || {
            let s = on_demand()?;
            allocate(&s.fd, 0, SIZE).context("fallocate")?;
            Ok(s)
        };
        let ahead = || {
            let s = on_demand()?;
            s.vcpu.raw_pre_fault(s.slot.gpa, SIZE).0.context("pre-fault")?;
            Ok(s)
        };
        let ways: [(&str, &dyn Fn() -> Result<Setup>); 4] = [
            ("touched", &on_demand),
            ("allocated, then bound", &before),
            ("bound, then allocated", &after),
            ("faulted in ahead", &ahead),
        ];
        for (name, way) in ways {
            let mut s = way()?;
            s.vcpu.verify(s.slot.gpa, SIZE, Pattern::ZERO)?;
            s.vcpu.fill(s.slot.gpa, SIZE, GUEST)?;
            let pfns = pfns(&s)?;
            let when = format!("{name}, huge pages {huge}");
            reader.expect_fault(&pfns, &when)?;
            memory.expect_all(&pfns, false, &when)?;
            s.vcpu.verify(s.slot.gpa, SIZE, GUEST)?;
        }
    }
    Ok(())
}

fn kcore_does_not_have_the_content() -> CaseResult {
    require_root()?;
    let Ok(core) = File::open("/proc/kcore") else {
        return skip("the kernel has no /proc/kcore");
    };
    for flags in [PINNED, HIDDEN] {
        let s = Setup::filled(flags, SIZE)?;
        let mut bytes = vec![0; PAGE as usize];
        let offset = pressure::kcore_offset(&core, pfns(&s)?[3] * PAGE)?;
        core.read_exact_at(&mut bytes, offset).context("read /proc/kcore")?;
        let there = word(&bytes, 64) == GUEST.word(s.slot.gpa + 3 * PAGE + 64);
        ensure!(there == (flags == PINNED), "{flags:#x}: /proc/kcore has the content: {there}");
        let empty = bytes.iter().all(|byte| *byte == 0);
        ensure!(empty == (flags == HIDDEN), "{flags:#x}: /proc/kcore has zeros: {empty}");
    }
    Ok(())
}

fn count_is_that_of_the_pages_in_files() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let hidden = Hidden::now()?;
    let mut s = Setup::with_flags(HIDDEN, SIZE)?;
    hidden.expect(0, "nothing is touched")?;
    s.vcpu.fill(s.slot.gpa, 7 * PAGE, GUEST)?;
    hidden.expect(7, "7 pages")?;
    allocate(&s.fd, 0, 10 * PAGE)?;
    hidden.expect(10, "10 are allocated")?;
    punch(&s.fd, PAGE, 5 * PAGE)?;
    hidden.expect(5, "5 are punched")?;
    s.vm.raw_delete(SLOT)?;
    hidden.expect(5, "without the slot")?;
    let second = Setup::filled(HIDDEN, MIB)?;
    hidden.expect(5 + MIB / PAGE, "a second VM")?;
    drop(s);
    hidden.expect(MIB / PAGE, "the first VM is gone")?;
    drop(second);
    hidden.expect(0, "the second, too")
}

/// [`Memory::expect_empty`] for what a guest has had.
fn expect_empty(memory: &Memory, pfn: u64, pattern: Pattern, s: &Setup) -> Result<()> {
    memory.expect_empty(pfn, pattern, s.slot.gpa, s.slot.size)
}

fn hole_gives_the_frame_back_empty() -> CaseResult {
    let (memory, reader) = (memory()?, Reader::load()?);
    let hidden = Hidden::now()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let mut s = Setup::filled(HIDDEN, SIZE)?;
        let pfns = pfns(&s)?;
        let (stay, go) = pfns.split_at((HUGE / PAGE) as usize);
        punch(&s.fd, HUGE, HUGE)?;
        reader.expect_cleared(go, go.len() / 4)?;
        for pfn in go {
            expect_empty(&memory, *pfn, GUEST, &s)?;
        }
        reader.expect_fault(stay, "the other half")?;
        memory.expect_all(stay, false, "the other half")?;
        hidden.expect(HUGE / PAGE, "half is left")?;
        s.vcpu.verify(s.slot.gpa + HUGE, HUGE, Pattern::ZERO)?;
        drop(s);
        hidden.expect(0, "the VM is gone")?;
    }
    Ok(())
}

/// A guest with content on huge pages only.
fn huge_guest() -> Result<Setup> {
    let counts = Counts::now()?;
    let s = Setup::filled(HIDDEN, SIZE)?;
    counts.expect_grown(&["thp_file_alloc"], SIZE / HUGE)?;
    Ok(s)
}

fn hole_in_a_huge_page_keeps_its_neighbours_out() -> CaseResult {
    let memory = memory()?;
    let _huge = pressure::shmem_huge("always")?;
    let hidden = Hidden::now()?;
    let mut s = huge_guest()?;
    let pfns = pfns(&s)?;
    let gpa = s.slot.gpa;
    for (start, len) in [(5, 3), (509, 5), (0, 1), (1023, 1)] {
        punch(&s.fd, start * PAGE, len * PAGE)?;
    }
    hidden.expect(PAGES - 10, "10 pages are punched")?;
    let punched = |page: u64| matches!(page, 0 | 5..8 | 509..514 | 1023);
    for (page, pfn) in (0..).zip(&pfns) {
        if punched(page) {
            expect_empty(&memory, *pfn, GUEST, &s)?;
        } else {
            ensure!(!memory.has(*pfn)?, "page {page} has come back");
        }
    }
    // Only now: the guest may get the same frames again.
    for page in (0..PAGES).filter(|page| punched(*page)) {
        s.vcpu.verify(gpa + page * PAGE, PAGE, Pattern::ZERO)?;
    }
    for (start, end) in [(1, 5), (8, 509), (514, 1023)] {
        s.vcpu.verify(gpa + start * PAGE, (end - start) * PAGE, GUEST)?;
    }
    drop(s);
    hidden.expect(0, "the VM is gone")
}

fn hole_in_a_huge_page_that_cannot_be_split() -> CaseResult {
    let memory = memory()?;
    let _huge = pressure::shmem_huge("always")?;
    let hidden = Hidden::now()?;
    let mut s = huge_guest()?;
    let (pfns, gpa) = (pfns(&s)?, s.slot.gpa);
    let counts = Counts::now()?;
    let failing = Failing::splits()?;
    let result = punch(&s.fd, 5 * PAGE, 3 * PAGE);
    drop(failing);
    result.context("punch")?;
    counts.expect_grown(&["thp_split_page_failed"], 1)?;
    hidden.expect(PAGES, "none has left the file")?;
    memory.expect_all(&pfns, false, "after the hole")?;
    s.vcpu.verify(gpa, 5 * PAGE, GUEST)?;
    s.vcpu.verify(gpa + 5 * PAGE, 3 * PAGE, Pattern::ZERO)?;
    s.vcpu.verify(gpa + 8 * PAGE, SIZE - 8 * PAGE, GUEST)?;
    drop(s);
    hidden.expect(0, "the VM is gone")
}

/// The hole splits two huge pages. Of what that allocates one fails, or all from one on, and then a
/// page is split only half-way, or not at all. What stays in the file is cleared where it is.
fn hole_in_a_huge_page_without_memory_keeps_its_neighbours_out() -> CaseResult {
    let memory = memory()?;
    let absent = memory.absent()?;
    let _huge = pressure::shmem_huge("always")?;
    let injector = Injector::new()?;
    let (hidden, counts) = (Hidden::now()?, Counts::now()?);
    for shortage in SHORTAGES {
        for n in 1.. {
            ensure!(n < 200, "{shortage:?}: it never has enough");
            let mut s = huge_guest()?;
            let frames = pfns(&s)?;
            let counts = Counts::now()?;
            let hole = || punch(&s.fd, HOLE.start * PAGE, (HOLE.end - HOLE.start) * PAGE);
            let not_split = |_: &_| counts.expect_same(&["thp_split_page_failed"]).is_err();
            let (result, short) = injector.call(shortage, n, hole, not_split)?;
            let tried = format!("{shortage:?} {n}: {result:?}");
            result.with_context(|| tried.clone())?;
            expect_hole(&memory, &hidden, &mut s, &frames).context(tried)?;
            drop(s);
            hidden.expect(0, "the VM is gone")?;
            if !short {
                println!("{shortage:?}: {} tries with too little", n - 1);
                break;
            }
        }
    }
    counts.expect_grown(&["thp_split_page_failed", "thp_split_page"], 4)?;
    memory.expect_absent(absent, "in the end")
}

/// The end of a huge page, and the beginning of the next.
const HOLE: Range<u64> = 509..514;

/// Fail unless only pages of [`HOLE`] have left a guest that was on `frames`.
fn expect_hole(memory: &Memory, hidden: &Hidden, s: &mut Setup, frames: &[u64]) -> Result<()> {
    let left = s.resident()?;
    hidden.expect(left, "what is in the file")?;
    let mut back = 0;
    for (page, pfn) in (0..).zip(frames) {
        if memory.has(*pfn)? {
            ensure!(HOLE.contains(&page), "page {page} has come back");
            expect_empty(memory, *pfn, GUEST, s)?;
            back += 1;
        }
    }
    ensure!(back + left == PAGES, "{left} pages are left, {back} are back");
    let at = |page: u64| s.slot.gpa + page * PAGE;
    let (start, end, all) = (at(HOLE.start), at(HOLE.end), at(PAGES));
    s.vcpu.verify(start, end - start, Pattern::ZERO)?;
    s.vcpu.verify(s.slot.gpa, start - s.slot.gpa, GUEST)?;
    s.vcpu.verify(end, all - end, GUEST)?;
    hidden.expect(PAGES, "the hole is touched")?;
    memory.expect_all(&pfns(s)?, false, "the hole is touched")
}

fn parts_of_a_split_page_stay_out() -> CaseResult {
    let memory = memory()?;
    let _huge = pressure::shmem_huge("always")?;
    let hidden = Hidden::now()?;
    let mut s = huge_guest()?;
    let pfns = pfns(&s)?;
    let counts = Counts::now()?;
    pressure::write("/sys/kernel/debug/split_huge_pages", "1")?;
    counts.expect_grown(&["thp_split_page"], SIZE / HUGE)?;
    hidden.expect(PAGES, "split")?;
    memory.expect_all(&pfns, false, "split")?;
    s.vcpu.verify(s.slot.gpa, SIZE, GUEST)?;
    for page in [0, 7, 511, 512, 1030 % PAGES] {
        punch(&s.fd, page * PAGE, PAGE)?;
        expect_empty(&memory, pfns[page as usize], GUEST, &s)?;
    }
    drop(s);
    hidden.expect(0, "the VM is gone")
}

/// The last huge page of the file reaches beyond its end. A split drops the part there.
fn part_beyond_the_end_of_the_file_comes_back() -> CaseResult {
    let memory = memory()?;
    let _huge = pressure::shmem_huge("always")?;
    let hidden = Hidden::now()?;
    let absent = memory.absent()?;
    let fd = memfile(HUGE + 5 * PAGE)?;
    let span = Span { pgoff: 0, pages: HUGE / PAGE + 5, frame: 0 };
    let consumer = Consumer::bound(&fd, Mode::Mapper(HIDDEN), span)?;
    let page = consumer.get(HUGE / PAGE + 1)?;
    hidden.expect(HUGE / PAGE, "one huge page")?;
    let first = page.pfn - 1;
    ensure!(!memory.has(first + 100)?, "the part beyond the end is there");
    let counts = Counts::now()?;
    pressure::write("/sys/kernel/debug/split_huge_pages", "1")?;
    counts.expect_grown(&["thp_split_page"], 1)?;
    hidden.expect(5, "the part beyond the end is dropped")?;
    for n in 0..5 {
        ensure!(!memory.has(first + n)?, "page {n} has come back");
    }
    drop((consumer, fd));
    hidden.expect(0, "the file is gone")?;
    memory.expect_absent(absent, "in the end")
}

fn content_of_an_earlier_binding_leaves() -> CaseResult {
    let memory = memory()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        for flags in [PINNED, BOTH] {
            let hidden = Hidden::now()?;
            let s = Setup::filled(flags, SIZE)?;
            let pages = pfns(&s)?;
            memory.expect_all(&pages, true, "without the flag")?;
            // All that the file has leaves at once, also what the new VM does not touch.
            let flushes = Flushes::now()?;
            let mut s = s.pass_on(HIDDEN)?;
            flushes.expect_batches(PAGES, "bind")?;
            hidden.expect(PAGES, "bound anew")?;
            memory.expect_all(&pages, false, "bound anew")?;
            s.vcpu.verify(s.slot.gpa, SIZE, GUEST)?;
            ensure!(pfns(&s)? == pages, "the guest has other pages");
            drop(s);
            hidden.expect(0, "the VM is gone")?;
        }
    }
    Ok(())
}

/// A guest whose memory went to swap before its file was bound with the flag.
fn swapped_out_before(swap: &Swap, hidden: &Hidden) -> Result<(Cgroup, Setup)> {
    let cgroup = Cgroup::enter()?;
    let s = Setup::filled(RECLAIMABLE, SIZE)?;
    for _ in 0..8 {
        cgroup.reclaim(2 * SIZE)?;
    }
    swap.expect_used(SIZE, "after reclaim")?;
    let s = s.pass_on(HIDDEN)?;
    hidden.expect(0, "all is in swap")?;
    Ok((cgroup, s))
}

/// The hole reads what it cuts, which the guest has not touched since the file is bound with the flag.
fn hole_in_a_swapped_huge_page_brings_nothing_into_the_map() -> CaseResult {
    const BEFORE: u64 = 5 * PAGE;
    const LEN: u64 = 100 * PAGE;
    lock_own_memory()?;
    let _huge = pressure::shmem_huge("always")?;
    let swap = Swap::on(16 * MIB)?;
    let hidden = Hidden::now()?;
    let counts = Counts::now()?;
    let (_cgroup, mut s) = swapped_out_before(&swap, &hidden)?;
    counts.expect_grown(&["thp_swpout"], 1)?;
    punch(&s.fd, BEFORE, LEN)?;
    let read = s.resident()?;
    println!("{read} pages are in memory");
    ensure!(read > 0, "the hole has read nothing");
    hidden.expect(read, "what the hole has read")?;
    let gpa = s.slot.gpa;
    s.vcpu.verify(gpa, BEFORE, GUEST)?;
    s.vcpu.verify(gpa + BEFORE, LEN, Pattern::ZERO)?;
    s.vcpu.verify(gpa + BEFORE + LEN, SIZE - BEFORE - LEN, GUEST)?;
    drop(s);
    hidden.expect(0, "the VM is gone")
}

/// Of what went to swap before the file's first binding with the flag.
fn swapoff_brings_no_content_into_the_map() -> CaseResult {
    lock_own_memory()?;
    let memory = memory()?;
    let _pages = pressure::base_pages()?;
    let mut swap = Swap::on(16 * MIB)?;
    let hidden = Hidden::now()?;
    let (_cgroup, mut s) = swapped_out_before(&swap, &hidden)?;
    swap.off()?;
    hidden.expect(PAGES, "all came back, untouched")?;
    s.vcpu.verify(s.slot.gpa, SIZE, GUEST)?;
    memory.expect_all(&pfns(&s)?, false, "after swapoff")?;
    drop(s);
    hidden.expect(0, "the VM is gone")
}

/// It needs memory for pages, and to split the direct map; it goes on where it has failed.
fn swapoff_without_memory_loses_nothing() -> CaseResult {
    lock_own_memory()?;
    let memory = memory()?;
    let injector = Injector::new()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let mut swap = Swap::on(16 * MIB)?;
        let (hidden, splits) = (Hidden::now()?, Splits::now()?);
        let (_cgroup, mut s) = swapped_out_before(&swap, &hidden)?;
        let device = CString::new(swap.device())?;
        let off = |swap: &mut Swap| swap.raw_off(&device);
        injector.sweep_that_fails("swapoff", &mut swap, off, |_, _| {
            hidden.expect(s.resident()?, "what has come back, untouched")
        })?;
        println!("huge pages {huge}: {} splits", splits.since()?);
        hidden.expect(PAGES, "all came back, untouched")?;
        s.vcpu.verify(s.slot.gpa, SIZE, GUEST)?;
        memory.expect_all(&pfns(&s)?, false, "after swapoff")?;
        drop(s);
        hidden.expect(0, "the VM is gone")?;
    }
    Ok(())
}

/// It fails half-way, and has brought pages back from swap before.
fn fallocate_brings_no_content_into_the_map() -> CaseResult {
    lock_own_memory()?;
    let memory = memory()?;
    let _pages = pressure::base_pages()?;
    let swap = Swap::on(16 * MIB)?;
    let hidden = Hidden::now()?;
    let (_cgroup, mut s) = swapped_out_before(&swap, &hidden)?;
    let failing = Failing::after_pages(PAGES / 2)?;
    let result = allocate(&s.fd, 0, SIZE);
    drop(failing);
    expect_errno("fallocate", result, &[Errno::ENOMEM])?;
    let read = s.resident()?;
    println!("{read} pages are in memory");
    ensure!(read > 0 && read < PAGES, "it did not fail half-way");
    hidden.expect(read, "what has come back, untouched")?;
    allocate(&s.fd, 0, SIZE).context("fallocate, with memory")?;
    hidden.expect(PAGES, "all came back, untouched")?;
    s.vcpu.verify(s.slot.gpa, SIZE, GUEST)?;
    memory.expect_all(&pfns(&s)?, false, "after fallocate")?;
    drop(s);
    hidden.expect(0, "the VM is gone")
}

fn file_keeps_the_flag_as_long_as_it_has_pages() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let memory = memory()?;
    let s = Setup::filled(HIDDEN, MIB)?;
    let pages = pfns(&s)?;
    s.vm.raw_delete(SLOT)?;
    memory.expect_all(&pages, false, "nothing is bound")?;
    let weaker = |fd: BorrowedFd, what: &str| -> Result<()> {
        let consumer = Consumer::new()?;
        let span = Span::same(0, MIB / PAGE);
        let result = consumer.bind(fd, Mode::Mapper(PINNED), span);
        expect_errno(what, result, &[Errno::EINVAL])
    };
    weaker(s.fd.as_fd(), "weaker")?;
    punch(&s.fd, 0, MIB - PAGE)?;
    weaker(s.fd.as_fd(), "weaker, one page is left")?;
    let mut s = s.pass_on(HIDDEN)?;
    s.vcpu.verify(s.slot.gpa + MIB - PAGE, PAGE, GUEST)?;
    s.vcpu.verify(s.slot.gpa, MIB - PAGE, Pattern::ZERO)?;
    punch(&s.fd, 0, MIB)?;
    s.vm.raw_delete(SLOT)?;
    let mut s = s.pass_on(PINNED)?;
    s.vcpu.fill(s.slot.gpa, MIB, GUEST)?;
    memory.expect_all(&pfns(&s)?, true, "empty, and bound without the flag")?;
    s.vcpu.verify(s.slot.gpa, MIB, GUEST)
}

/// Other consumers of the file may let the kernel use its pages.
fn flag_is_not_for_a_file_that_others_use() -> CaseResult {
    let fd = memfile(SIZE)?;
    let half = PAGES / 2;
    let mut first = Consumer::bound(&fd, Mode::Mapper(PINNED), Span::same(0, half))?;
    let second = Consumer::new()?;
    let other = Span { pgoff: half, pages: half, frame: 0 };
    for flags in [PINNED, HIDDEN] {
        let wanted = if flags == PINNED { HIDDEN } else { PINNED };
        let result = second.bind(&fd, Mode::Mapper(wanted), other);
        expect_errno(&format!("{wanted:#x} beside {flags:#x}"), result, &[Errno::EINVAL])?;
        second.bind(&fd, Mode::Mapper(flags), other).context("the same")?;
        second.unbind()?;
        drop(first);
        first = Consumer::bound(&fd, Mode::Mapper(HIDDEN), Span::same(0, half))?;
    }
    Ok(())
}

fn flag_is_for_pinned_pages_only() -> CaseResult {
    drop(memfile_unsized()?);
    let vm = Vm::protected()?;
    let offered = vm.check_extension(KVM_CAP_MEMFILE) as u64;
    ensure!(offered & MEMFILE_F_KERNEL_INACCESSIBLE != 0, "KVM offers {offered:#x}");
    let fd = memfile(MIB)?;
    let consumer = Consumer::new()?;
    for others in [0, 1, 2, 3, 4, 5, 6] {
        let flags = others | MEMFILE_F_KERNEL_INACCESSIBLE;
        let result = vm.raw_enable_cap(KVM_CAP_MEMFILE, flags);
        expect_errno(&format!("KVM with {flags:#x}"), result, &[Errno::EINVAL])?;
        let result = consumer.bind(&fd, Mode::Mapper(flags), Span::same(0, MIB / PAGE));
        expect_errno(&format!("a consumer with {flags:#x}"), result, &[Errno::EINVAL])?;
    }
    Ok(())
}

fn kvm_has_no_access() -> CaseResult {
    drop(memfile_unsized()?);
    let vm = Vm::protected()?;
    let access = |on| vm.raw_enable_cap(KVM_CAP_MEMFILE_ACCESS, on);
    let choose = |flags| vm.raw_enable_cap(KVM_CAP_MEMFILE, flags);
    choose(HIDDEN)?;
    expect_errno("access to what is hidden", access(1), &[Errno::EINVAL])?;
    access(0)?;
    choose(PINNED)?;
    access(1)?;
    expect_errno("hide what has access", choose(HIDDEN), &[Errno::EINVAL])?;
    access(0)?;
    Ok(choose(HIDDEN)?)
}

/// A VM that has no vCPU yet, and so may be populated, with a slot of a new file.
fn without_vcpu(size: u64) -> Result<(Vm, OwnedFd, Slot)> {
    let (vm, fd) = (vm_with_flags(HIDDEN)?, memfile(size)?);
    let slot = vm.add_private(SLOT, 4 * GIB, size, Private::Memfile, &fd, 0)?;
    vm.set_private(slot.gpa, size)?;
    Ok((vm, fd, slot))
}

fn initial_content_stays_out() -> CaseResult {
    let memory = memory()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let (vm, fd, slot) = without_vcpu(HUGE)?;
        populate_hidden(&memory, &vm, &slot, &fd, HUGE)?;
    }
    Ok(())
}

fn fallocate_after_binding_takes_pages_out() -> CaseResult {
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let hidden = Hidden::now()?;
        let mut s = Setup::with_flags(HIDDEN, SIZE)?;
        let flushes = Flushes::now()?;
        allocate(&s.fd, 0, SIZE)?;
        flushes.expect_batches(PAGES, "fallocate")?;
        hidden.expect(PAGES, "before anybody touches them")?;
        s.vcpu.verify(s.slot.gpa, SIZE, Pattern::ZERO)?;
        hidden.expect(PAGES, "touched")?;
    }
    Ok(())
}

fn prefault_flushes_once_for_many_pages() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let hidden = Hidden::now()?;
    for step in [PAGE, SIZE] {
        let s = Setup::with_flags(HIDDEN, SIZE)?;
        let flushes = Flushes::now()?;
        for offset in (0..SIZE).step_by(step as usize) {
            s.vcpu.raw_pre_fault(s.slot.gpa + offset, step).0.context("pre-fault")?;
        }
        hidden.expect(PAGES, "faulted in ahead")?;
        if step == SIZE {
            flushes.expect_batches(PAGES, "in one call")?;
            continue;
        }
        let Some(flushes) = flushes.since()? else {
            return skip("no flush can be seen on this machine");
        };
        // An idle CPU may notice without being called.
        ensure!(flushes >= PAGES * 3 / 4, "page by page: {flushes} flushes are seen");
    }
    hidden.expect(0, "the VMs are gone")
}

/// Where shared memory begins, and where the slot ends, pre-fault allocates nothing.
fn prefault_allocates_what_it_maps() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let hidden = Hidden::now()?;
    let s = Setup::with_flags(HIDDEN, SIZE)?;
    let gpa = s.slot.gpa;
    s.vm.set_shared(gpa + 16 * PAGE, 5 * PAGE)?;
    s.vcpu.raw_pre_fault(gpa, 64 * PAGE).0.context("pre-fault")?;
    hidden.expect(59, "5 pages are shared")?;
    // The slot ends in the middle.
    let (result, left) = s.vcpu.raw_pre_fault_once(gpa + SIZE - 8 * PAGE, 64 * PAGE);
    ensure!(result.is_ok() && left == 56 * PAGE, "at the end: {result:?}, {left:#x} bytes left");
    hidden.expect(59 + 8, "8 pages up to the end")?;
    ensure!(allocated(&s.fd)? == (59 + 8) * PAGE, "pages that nobody maps");
    Ok(())
}

fn page_that_nobody_wrote_is_not_dropped_while_it_is_hidden() -> CaseResult {
    let memory = memory()?;
    for huge in ["always", "never"] {
        let _huge = pressure::shmem_huge(huge)?;
        on_cpu(0, || drop_unwritten(&memory, huge))?;
    }
    Ok(())
}

/// Do `work` in a thread on that CPU, or on any if there is no such CPU.
fn on_cpu(cpu: usize, work: impl FnOnce() -> CaseResult + Send) -> CaseResult {
    thread::scope(|scope| {
        let worker = scope.spawn(|| {
            let _ = run_on_cpu(cpu);
            work()
        });
        worker.join().map_err(|_| anyhow!("the thread panicked"))?
    })
}

/// KVM_MEMFILE_POPULATE stops at a page that it has no content for. The next ones are hidden already,
/// and clean. The page allocator must not get what cannot be written to.
fn drop_unwritten(memory: &Memory, huge: &str) -> CaseResult {
    const BATCH: u64 = 64 * PAGE;
    // The page that is written is on a huge page of its own.
    const START: u64 = HUGE - PAGE;
    const END: u64 = START + BATCH;
    let when = &format!("huge pages {huge}");
    let (hidden, absent) = (Hidden::now()?, memory.absent()?);
    let (vm, fd, slot) = without_vcpu(SIZE)?;
    let source = content(slot.gpa + START, BATCH, GUEST)?;
    let populate = |gpa, source| vm.raw_populate(gpa, slot.gpa + END - gpa, source);
    source.protect(PAGE, BATCH - PAGE, libc::PROT_NONE).context("mprotect")?;
    let (result, left) = populate(slot.gpa + START, source.addr());
    expect_errno("one page of a source", result, &[Errno::EFAULT])?;
    ensure!(left == BATCH - PAGE, "{left:#x} bytes left");
    let pages = mem::resident_pages(&fd)?;
    hidden.expect(pages, "announced")?;

    // Frames that a CPU frees are its own first: the allocations here get none of them so far.
    on_cpu(1, pressure::drop_caches)?;
    let left = mem::resident_pages(&fd)?;
    println!("{when}: {left} of {pages} pages are left");
    hidden.expect(left, when)?;
    memory.expect_absent(absent + left, when)?;
    let others = small_pages(64 * MIB)?;
    for offset in (0..others.len()).step_by(PAGE as usize) {
        others.store(offset, 1);
    }
    drop(others);

    source.protect(PAGE, BATCH - PAGE, libc::PROT_READ).context("mprotect")?;
    let (result, left) = populate(slot.gpa + START + PAGE, source.addr() + PAGE);
    result.with_context(|| format!("{when}: the rest, {left:#x} bytes left"))?;
    let mut vcpu = vm.vcpu(0)?;
    vcpu.verify(slot.gpa, START, Pattern::ZERO)?;
    vcpu.verify(slot.gpa + START, BATCH, GUEST)?;
    vcpu.verify(slot.gpa + END, SIZE - END, Pattern::ZERO)?;
    hidden.expect(PAGES, "all are touched")?;
    drop((vcpu, slot, vm, fd));
    hidden.expect(0, "the VM is gone")?;
    memory.expect_absent(absent, when)
}

/// The direct map has to be split, which needs memory.
fn allocation_that_fails_changes_nothing() -> CaseResult {
    let memory = memory()?;
    let _huge = pressure::shmem_huge("always")?;
    let injector = Injector::new()?;
    let hidden = Hidden::now()?;
    // Everything but the page tables is there already.
    let file = || -> Result<_> {
        let fd = memfile(16 * HUGE)?;
        allocate(&fd, 0, 16 * HUGE)?;
        Ok(fd)
    };
    let splits = Splits::now()?;
    let mut state = (file()?, Consumer::new()?, 0);
    let span = Span::same(0, 16 * HUGE / PAGE);
    state.1.bind(&state.0, Mode::Mapper(PINNED), span)?;
    state.1.unbind()?;
    let mut failed = 0;
    for round in 0..4 {
        failed += injector.sweep(
            "bind",
            &mut state,
            |(fd, consumer, _)| consumer.bind(fd.as_fd(), Mode::Mapper(HIDDEN), span),
            |(fd, consumer, _), result| {
                if result.is_ok() {
                    hidden.expect(16 * HUGE / PAGE, "bound")?;
                    let page = consumer.get(5)?;
                    ensure!(!memory.has(page.pfn)?, "the page is in the direct map");
                    consumer.unbind()?;
                }
                *fd = file()?;
                hidden.expect(0, "the file is gone")
            },
        )?;
        println!("round {round}: {failed} failed");
    }
    let splits = splits.since()?;
    println!("{splits} times an entry of 2 MiB was split");
    if splits == 0 && failed == 0 {
        return skip("the direct map has no large entries here");
    }
    ensure!(failed > 0, "no allocation was needed");
    Ok(())
}

/// Nobody has had the file, so anybody may try.
fn binding_that_fails_does_not_claim_a_file_for_one_vm() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    let injector = Injector::new()?;
    let splits = Splits::now()?;
    let span = Span::same(0, PAGES);
    /// One of the first allocations of a binding splits an entry of the direct map.
    const FIRST: usize = 8;
    // The pages of each stay, so that the next one gets whole entries of the direct map some time.
    let mut files = Vec::new();
    let mut refused = 0;
    while refused == 0 && files.len() < 3 * FIRST {
        let n = 1 + (files.len() % FIRST) as u32;
        let fd = memfile_for_one_vm(SIZE)?;
        allocate(&fd, 0, SIZE).context("fallocate")?;
        let (first, begun) = (Consumer::new()?, mem::counter("bind")?);
        let bind = || first.bind(&fd, Mode::Mapper(HIDDEN), span);
        let (result, _) = injector.call(Shortage::Once, n, bind, |result| result.is_err())?;
        if result.is_err() {
            expect_errno("bind", result, &[Errno::ENOMEM])?;
            // It had begun, and could not hide the pages.
            refused += u32::from(mem::counter("bind")? > begun);
            first.bind(&fd, Mode::Mapper(HIDDEN), span).context("the next attempt")?;
        }
        first.unbind()?;
        let other = Consumer::new()?.bind(&fd, Mode::Mapper(HIDDEN), span);
        expect_errno("another consumer, once it was bound", other, &[Errno::EPERM])?;
        files.push(fd);
    }
    splits.expect_failures(refused)
}

fn binding_that_fails_can_be_repeated() -> CaseResult {
    let memory = memory()?;
    let injector = Injector::new()?;
    let hidden = Hidden::now()?;
    let s = Setup::filled(PINNED, SIZE)?;
    let pages = pfns(&s)?;
    s.vm.raw_delete(SLOT)?;
    let span = Span::same(0, PAGES);
    let mut consumer = Consumer::new()?;
    injector.sweep(
        "bind",
        &mut consumer,
        |consumer| consumer.bind(&s.fd, Mode::Mapper(HIDDEN), span),
        |consumer, result| {
            if result.is_ok() {
                hidden.expect(PAGES, "bound")?;
                memory.expect_all(&pages, false, "bound")?;
                consumer.unbind()?;
            }
            Ok(())
        },
    )?;
    let mut s = s.pass_on(HIDDEN)?;
    s.vcpu.verify(s.slot.gpa, SIZE, GUEST)?;
    drop(s);
    hidden.expect(0, "the VM is gone")
}

/// A guest, and where it is about to store a word.
struct Toucher {
    s: Setup,
    pending: Option<u64>,
}

impl Toucher {
    /// The guest stores a word, or goes on with what it could not store before.
    fn touch(&mut self, offset: u64) -> SysResult<()> {
        if self.pending.is_none() {
            let post = self.s.vcpu.post(Command::Store, &[self.s.slot.gpa + offset, 77]);
            post.map_err(|_| Errno::EIO)?;
            self.pending = Some(offset);
        }
        match self.s.vcpu.enter()? {
            Exit::Done => {
                self.pending = None;
                Ok(())
            }
            Exit::MemoryFault { errno, .. } | Exit::Error(errno) => Err(errno),
            _ => Err(Errno::EIO),
        }
    }

    fn pre_fault(&mut self, offset: u64) -> SysResult<()> {
        self.s.vcpu.raw_pre_fault(self.s.slot.gpa + offset, PAGE).0
    }

    fn allocate(&mut self, offset: u64) -> SysResult<()> {
        allocate(&self.s.fd, offset, PAGE)
    }
}

/// A batch of pages is announced, which may fail as well.
fn batch_without_memory_is_made_page_by_page() -> CaseResult {
    const BATCH: u64 = 64 * PAGE;
    let _pages = pressure::base_pages()?;
    let injector = Injector::new()?;
    let hidden = Hidden::now()?;
    let check = |fd: &OwnedFd, result: SysResult<()>| -> Result<()> {
        if result.is_ok() {
            hidden.expect(BATCH / PAGE, "all are there")?;
        }
        ensure!(hidden.more()? * PAGE <= allocated(fd)?, "more are hidden than there are");
        punch(fd, 0, SIZE)?;
        hidden.expect(0, "punched")
    };
    let mut s = Setup::with_flags(HIDDEN, SIZE)?;
    let gpa = s.slot.gpa;
    let prefault = |s: &mut Setup| s.vcpu.raw_pre_fault(gpa, BATCH).0;
    let failed = injector.sweep("pre-fault", &mut s, prefault, |s, result| check(&s.fd, result))?;
    println!("{failed} failed");

    let (vm, fd, slot) = without_vcpu(SIZE)?;
    let source = content(slot.gpa, BATCH, GUEST)?;
    let populate = |(): &mut ()| vm.raw_populate(slot.gpa, BATCH, source.addr());
    let all = |(result, left): (SysResult<()>, u64)| {
        if result.is_ok() && left > 0 { Err(Errno::ENOMEM) } else { result }
    };
    injector.sweep_that_fails(
        "populate",
        &mut (),
        |state| all(populate(state)),
        |(), result| check(&fd, result),
    )?;
    populate(&mut ()).0.context("there is memory again")?;
    let mut vcpu = vm.vcpu(0)?;
    vcpu.verify(slot.gpa, BATCH, GUEST)?;
    vcpu.verify(slot.gpa + BATCH, SIZE - BATCH, Pattern::ZERO)
}

/// The direct map has to be split then as well, and what fails can be repeated.
fn page_that_cannot_leave_the_map_is_not_given_out() -> CaseResult {
    const BLOCKS: u64 = 8;
    type Way = fn(&mut Toucher, u64) -> SysResult<()>;
    const FALLOCATE: &str = "fallocate";
    let memory = memory()?;
    let _huge = pressure::shmem_huge("always")?;
    let injector = Injector::new()?;
    let before = Hidden::now()?;
    let splits = Splits::now()?;
    let ways: [(&str, Way); 3] = [
        ("touch", Toucher::touch),
        ("pre-fault", Toucher::pre_fault),
        (FALLOCATE, Toucher::allocate),
    ];
    // The pages of each stay, so that the next one gets whole entries of the direct map.
    let mut guests = Vec::new();
    let mut refused = 0;
    for (name, way) in ways {
        let hidden = Hidden::now()?;
        let mut guest = Toucher { s: Setup::with_flags(HIDDEN, BLOCKS * HUGE)?, pending: None };
        for block in 0..BLOCKS {
            let offset = block * HUGE + 5 * PAGE;
            let gpa = guest.s.slot.gpa + offset;
            injector.sweep(
                name,
                &mut guest,
                |guest| way(guest, offset),
                |guest, result| {
                    let fd = &guest.s.fd;
                    let pages = mem::fdinfo(fd, "memfile-pages")?.context("memfile-pages")?;
                    let pages = pages.parse()?;
                    if hidden.more()? < pages {
                        refused += 1;
                        // A page that fallocate cannot hide is hidden before a consumer gets it.
                        ensure!(result.is_err() || name == FALLOCATE, "a page was given out");
                    }
                    if result.is_err() {
                        return Ok(());
                    }
                    if name == FALLOCATE {
                        guest.s.vcpu.store(gpa, 77)?;
                    }
                    hidden.expect(pages, "the page is there")?;
                    Ok(punch(fd, block * HUGE, HUGE)?)
                },
            )?;
            guest.s.vcpu.store(gpa, 77)?;
            ensure!(guest.s.vcpu.load(gpa)? == 77, "the guest's word is lost");
        }
        memory.expect_all(&pfns(&guest.s)?, false, name)?;
        guests.push(guest);
    }
    drop(guests);
    before.expect(0, "the VMs are gone")?;
    splits.expect_failures(refused)
}

fn broken_page_does_not_come_back_with_others() -> CaseResult {
    let memory = memory()?;
    let absent = memory.absent()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let hidden = Hidden::now()?;
        let mut s = Setup::filled(HIDDEN, SIZE)?;
        let (pages, gpa) = (pfns(&s)?, s.slot.gpa);
        pressure::poison(pages[37])?;
        memory.expect_all(&pages, false, "a page is broken")?;
        s.vcpu.verify(gpa, 37 * PAGE, GUEST)?;
        s.vcpu.verify(gpa + 38 * PAGE, SIZE - 38 * PAGE, GUEST)?;
        punch(&s.fd, 36 * PAGE, 3 * PAGE)?;
        hidden.expect(PAGES - 3, "three are punched")?;
        s.vcpu.verify(gpa + 36 * PAGE, 3 * PAGE, Pattern::ZERO)?;
        drop(s);
        hidden.expect(0, "the VM is gone")?;
        // The error was injected, the frame is a good one.
        memory.expect_empty(pages[37], GUEST, gpa, SIZE)?;
        pressure::unpoison(pages[37])?;
    }
    memory.expect_absent(absent, "in the end")
}

/// To migrate or offline memory, the kernel would have to read the pages.
fn page_does_not_move_when_its_block_is_wanted() -> CaseResult {
    let memory = memory()?;
    let mut tried = 0;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let mut s = Setup::filled(HIDDEN, SIZE)?;
        let pages = pfns(&s)?;
        let pfn = pages[3];
        ensure!(pressure::soft_offline(pfn).is_err(), "a hidden page was taken out of use");
        tried += expect_online(&pages)?;
        memory.expect_all(&pages, false, "after the attempts")?;
        s.vcpu.verify(s.slot.gpa, SIZE, GUEST)?;
        ensure!(pfns(&s)? == pages, "the guest has other pages");
    }
    // Until one lies where the kernel tries.
    let mut guests = Vec::new();
    while tried == 0 && guests.len() < 12 {
        let s = Setup::filled(HIDDEN, 64 * MIB)?;
        tried += expect_online(&pfns(&s)?)?;
        guests.push(s);
    }
    println!("{tried} blocks were tried, {} more guests", guests.len());
    if tried == 0 {
        return skip("no page lies in a block that the kernel tries to take offline");
    }
    Ok(())
}

fn secret_is_nowhere_in_memory() -> CaseResult {
    lock_own_memory()?;
    let memory = memory()?;
    let (cgroup, swap) = (Cgroup::enter()?, Swap::on(16 * MIB)?);
    // Reclaim can take these pages, but not the hidden ones beside them.
    let _neighbour = Setup::filled(RECLAIMABLE, MIB)?;
    let mut secret = 5000;
    // Data that an earlier search has read may be anywhere: a new secret each time.
    let mut guest = |flags| -> Result<(Setup, Pattern)> {
        secret += 1;
        let pattern = Pattern::Generation(secret);
        let mut s = Setup::with_flags(flags, SIZE)?;
        s.vcpu.fill(s.slot.gpa, SIZE, pattern)?;
        Ok((s, pattern))
    };
    let search = |s: &Setup, pattern| memory.search(pattern, s.slot.gpa, SIZE);
    let nowhere = |s: &Setup, pattern, when: &str| -> Result<()> {
        let (found, absent) = search(s, pattern)?;
        println!("{when}: found {found} times, {absent} frames are not in the direct map");
        ensure!(found == 0, "{when}: found {found} times");
        Ok(())
    };

    let (s, pattern) = guest(PINNED)?;
    let (found, _) = search(&s, pattern)?;
    ensure!(found >= SIZE / 64, "without the flag it is found {found} times");
    drop(s);

    let absent = memory.absent()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let (mut s, pattern) = guest(HIDDEN)?;
        nowhere(&s, pattern, "written")?;
        if huge == "always" {
            pressure::write("/sys/kernel/debug/split_huge_pages", "1")?;
            nowhere(&s, pattern, "split")?;
        }
        for pfn in [pfns(&s)?[3], pfns(&s)?[700]] {
            ensure!(pressure::soft_offline(pfn).is_err(), "a hidden page was taken out of use");
        }
        pressure::compact()?;
        pressure::drop_caches()?;
        // It wants more than there is.
        let _ = cgroup.raw_reclaim(2 * SIZE);
        swap.expect_used(MIB, "the neighbour is in swap")?;
        nowhere(&s, pattern, "after refused migration, compaction and reclaim")?;
        punch(&s.fd, PAGE, HUGE)?;
        nowhere(&s, pattern, "punched in part")?;
        s.vcpu.verify(s.slot.gpa + PAGE + HUGE, SIZE - PAGE - HUGE, pattern)?;
        s.vm.raw_delete(SLOT)?;
        let Setup { vm, vcpu, fd, slot, .. } = s;
        let gpa = slot.gpa;
        drop((vcpu, vm));
        let (found, _) = memory.search(pattern, gpa, SIZE)?;
        ensure!(found == 0, "the file is there without a VM: found {found} times");
        drop(fd);
        let (found, now) = memory.search(pattern, gpa, SIZE)?;
        ensure!(found == 0, "the VM is gone: found {found} times");
        ensure!(now == absent, "{absent} frames were not in the direct map, now {now}");
    }
    Ok(())
}

/// The VMM dies while its guest runs.
fn secret_of_a_killed_vmm_is_nowhere_in_memory() -> CaseResult {
    lock_own_memory()?;
    let (memory, hidden) = (memory()?, Hidden::now()?);
    let gpa = LAYOUTS[0].gpa;
    let start = |flags, pattern| {
        Vmm::start(|ready| {
            let mut s = Setup::with_flags(flags, SIZE)?;
            s.vcpu.fill(gpa, SIZE, pattern)?;
            ready();
            loop {
                s.vcpu.verify(gpa, SIZE, pattern)?;
            }
        })
    };
    // Data that an earlier search has read may be anywhere: a new secret each time.
    let mut secret = (5100..).map(Pattern::Generation);
    let mut secret = || secret.next().context("no secret");

    let pattern = secret()?;
    let vmm = start(PINNED, pattern)?;
    let (found, absent) = memory.search(pattern, gpa, SIZE)?;
    ensure!(found >= SIZE / 64, "without the flag it is found {found} times");
    vmm.kill()?;

    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let pattern = secret()?;
        let vmm = start(HIDDEN, pattern)?;
        hidden.expect(PAGES, "the guest has its secret")?;
        vmm.kill()?;
        hidden.expect(0, "the VMM is killed")?;
        let (found, now) = memory.search(pattern, gpa, SIZE)?;
        ensure!(found == 0, "the VMM is killed: found {found} times");
        ensure!(now == absent, "{absent} frames were not in the direct map, now {now}");
    }
    Ok(())
}

fn thousand_lives_leak_nothing() -> CaseResult {
    const LIVES: u64 = 1000;
    let memory = memory()?;
    let hidden = Hidden::now()?;
    let (before, absent) = (direct_map()?, memory.absent()?);
    let fd = memfile(LAYOUTS[0].offset + HUGE)?;
    let consumer = Consumer::new()?;
    for life in 0..LIVES {
        if life % 20 == 0 {
            // A VM and a file as well.
            drop(Setup::filled(HIDDEN, MIB)?);
        }
        let policy = if life % 100 == 0 { "never" } else { "always" };
        let _huge = (life % 50 == 0).then(|| pressure::shmem_huge(policy)).transpose()?;
        consumer.bind(&fd, Mode::Mapper(HIDDEN), Span::same(0, HUGE / PAGE))?;
        for page in [0, 3, 200, 511] {
            consumer.get(page)?;
        }
        if life % 3 == 0 {
            allocate(&fd, 10 * PAGE, 20 * PAGE)?;
        }
        punch(&fd, 3 * PAGE, 100 * PAGE)?;
        consumer.unbind()?;
        punch(&fd, 0, HUGE)?;
        hidden.expect(0, &format!("life {life}"))?;
    }
    drop(fd);
    let (after, now) = (direct_map()?, memory.absent()?);
    println!("DirectMap 4k, 2M, 1G in bytes: {before:x?} before, {after:x?} after");
    ensure!(now == absent, "{absent} frames were not in the direct map, now {now}");
    let sum = |parts: [u64; 3]| parts.iter().sum::<u64>();
    ensure!(sum(after) == sum(before), "the direct map has another size");
    Ok(())
}
