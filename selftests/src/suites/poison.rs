// SPDX-License-Identifier: GPL-2.0
//! A memory error costs the guest one page, with an exit that says so, and no other page (rule 20).

use std::ffi::CString;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::consumer::{Consumer, Mode, Span};
use crate::guest::Command;
use crate::ktap::{CaseResult, skip};
use crate::pattern::Pattern;
use crate::pressure::{
    self, Accounts, Cgroup, Counts, Disk, Failing, KPF_DIRTY, KPF_HWPOISON, KPF_LOCKED, KPF_LRU,
    KPF_SWAPCACHE, KPF_WRITEBACK, MovableZone, Setting, Swap, frames, mapped_at,
};
use crate::support::backend::Backend;
use crate::support::directmap::{Hidden, memory, pfns};
use crate::support::setup::{BOTH, GUEST, HIDDEN, MOVABLE, PINNED, RECLAIMABLE, Setup};
use crate::sys::*;
use crate::vm::{Exit, Private, Vcpu};
use crate::{HUGE, MIB, PAGE, conformance, mem};

conformance!(
    "poison",
    [
        next_access_exits_and_the_rest_lives_on,
        hole_and_touch_give_a_fresh_page,
        every_vcpu_loses_the_page,
        prefault_stops_there,
        teardown_leaves_the_frame_out_of_use,
    ],
    converting: [shared_side_is_another_page],
    memfile: [
        page_of_a_huge_page_goes_alone,
        page_of_a_huge_page_that_cannot_be_split,
        poisoned_page_is_neither_moved_nor_swapped,
        page_that_nobody_has_written_is_not_cleared: 120,
        page_of_a_huge_page_that_nobody_has_written_is_not_cleared: 120,
        hole_in_a_huge_page_does_not_touch_the_broken_page,
        hole_around_a_broken_page_brings_no_neighbour_into_the_map,
        broken_copy_of_a_swapped_page_is_replaced: 120,
        broken_page_that_swap_could_not_take_is_lost: 120,
        swapoff_ends_at_a_page_with_a_memory_error: 120,
        error_in_a_page_that_is_isolated_is_told: 120,
        block_with_a_broken_page_does_not_go_offline: 120,
    ],
    // Those with huge pages of hugetlbfs are in the suite hugetlb.
);

const SIZE: u64 = 4 * MIB;
/// The page that gets the memory error.
const BROKEN: u64 = HUGE + 37 * PAGE;
const CHOICES: [u64; 5] = [PINNED, HIDDEN, MOVABLE, RECLAIMABLE, BOTH];

/// A page frame with a memory error, until this is dropped. It must be unused by then.
struct Broken(u64);

impl Drop for Broken {
    fn drop(&mut self) {
        if let Err(e) = pressure::unpoison(self.0) {
            println!("frame {:#x} stays broken: {e:#}", self.0);
        }
    }
}

/// A guest that has lost the page at [`BROKEN`]. Field order: the guest ends before the frame works
/// again.
struct Victim {
    s: Setup,
    frame: Broken,
}

impl Victim {
    /// See [`expect_lost`].
    fn expect_lost(&mut self) -> CaseResult {
        expect_lost(self.s.on, &mut self.s.vcpu, self.s.slot.gpa + BROKEN)
    }
}

/// What VMs choose for their memfiles, one after the other. For other memory there is no choice.
fn choices(on: &Backend, flags: &[u64]) -> Vec<Option<u64>> {
    match on.kind {
        Private::Memfile => flags.iter().copied().map(Some).collect(),
        Private::GuestMemfd => vec![None],
    }
}

/// The settings of huge pages. Other memory than a memfile has no huge pages.
fn page_sizes(on: &Backend) -> &'static [&'static str] {
    match on.kind {
        Private::Memfile => &["never", "always"],
        Private::GuestMemfd => &["never"],
    }
}

/// A guest whose VM makes this choice.
fn guest(on: &'static Backend, choice: Option<u64>) -> Result<Setup> {
    match choice {
        Some(flags) => Setup::with_flags_on(on, flags, SIZE),
        None => Setup::new(on, SIZE),
    }
}

/// Inject an error into a frame that the guest uses.
fn break_frame(on: &Backend, pfn: u64) -> Result<Broken> {
    let counts = match on.kind {
        Private::Memfile => Some(Counts::now()?),
        Private::GuestMemfd => None,
    };
    let result = pressure::raw_poison(pfn)?;
    let frame = Broken(pfn);
    on.works("injected memory error", result)?;
    if let Some(counts) = counts {
        counts.expect_grown(&["memfile.poison", "memfile.invalidate"], 1)?;
    }
    ensure!(pressure::page_flags(pfn)? & KPF_HWPOISON != 0, "frame {pfn:#x} is not poisoned");
    Ok(frame)
}

/// Let the guest fill its memory, and break [`BROKEN`].
fn break_page(on: &'static Backend, choice: Option<u64>) -> Result<Victim> {
    let mut s = guest(on, choice)?;
    let gpa = s.slot.gpa;
    let pfn = mapped_at(gpa + BROKEN, || s.vcpu.fill(gpa, SIZE, GUEST))?;
    Ok(Victim { frame: break_frame(on, pfn)?, s })
}

/// The guest touches the broken page at `gpa`. It gets no content, and the exit names the page.
fn expect_lost(on: &Backend, vcpu: &mut Vcpu, gpa: u64) -> CaseResult {
    let exit = vcpu.touch_no_page(gpa)?;
    let lost = "memory fault exit, private, EHWPOISON";
    on.expect("access to the broken page", exit.told(), lost.to_owned())
}

/// The guest has all but the page that is `broken`.
fn expect_rest(s: &mut Setup, broken: u64) -> Result<()> {
    let (gpa, after) = (s.slot.gpa, broken + PAGE);
    s.vcpu.verify(gpa, broken, GUEST)?;
    s.vcpu.verify(gpa + after, s.slot.size - after, GUEST)
}

fn loses_one_page(on: &'static Backend) -> CaseResult {
    for choice in choices(on, &CHOICES) {
        let mut v = break_page(on, choice)?;
        let gpa = v.s.slot.gpa;
        v.expect_lost()?;
        expect_rest(&mut v.s, BROKEN)?;
        v.s.vcpu.fill(gpa, BROKEN, Pattern::Generation(5))?;
        v.s.vcpu.verify(gpa, BROKEN, Pattern::Generation(5))?;
        v.expect_lost()?;
    }
    Ok(())
}

fn next_access_exits_and_the_rest_lives_on(on: &'static Backend) -> CaseResult {
    loses_one_page(on)
}

fn page_of_a_huge_page_goes_alone(on: &'static Backend) -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    let counts = Counts::now()?;
    loses_one_page(on)?;
    counts.expect_grown(&["thp_split_page"], CHOICES.len() as u64)
}

/// The neighbours stay accessible, and no mapping reaches over the broken page.
fn page_of_a_huge_page_that_cannot_be_split(_: &'static Backend) -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    for flags in [PINNED, HIDDEN, BOTH] {
        let mut s = Setup::with_flags(flags, SIZE)?;
        s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
        let pfn = frames(&s.vcpu, &s.slot, &s.fd)?.get(&BROKEN).context("no frame")?.pfn;
        let frame = break_unsplit(pfn)?;
        let gpa = s.slot.gpa;
        s.vcpu.expect_lost(gpa + BROKEN)?;
        expect_rest(&mut s, BROKEN)?;
        ensure!(s.vm.stats()?.get("pages_2m")? == 1, "the broken page is in a mapping of 2 MiB");
        punch(&s.fd, BROKEN, PAGE).context("punch")?;
        s.vcpu.verify(gpa + BROKEN, PAGE, Pattern::ZERO)?;
        expect_rest(&mut s, BROKEN)?;
        drop(s);
        drop(frame);
    }
    Ok(())
}

fn hole_and_touch_give_a_fresh_page(on: &'static Backend) -> CaseResult {
    for huge in page_sizes(on) {
        let _huge = pressure::shmem_huge(huge)?;
        for choice in choices(on, &CHOICES) {
            let corrupted = mem::meminfo("HardwareCorrupted")?;
            let mut v = break_page(on, choice)?;
            let gpa = v.s.slot.gpa;
            let now = mem::meminfo("HardwareCorrupted")?;
            ensure!(now == corrupted + PAGE, "HardwareCorrupted went from {corrupted} to {now}");
            v.expect_lost()?;
            on.check_allocated(&v.s.fd, SIZE, "before the hole")?;
            punch(&v.s.fd, BROKEN, PAGE).context("punch")?;
            on.check_allocated(&v.s.fd, SIZE - PAGE, "after the hole")?;
            let touch = || v.s.vcpu.verify(gpa + BROKEN, PAGE, Pattern::ZERO);
            let pfn = mapped_at(gpa + BROKEN, touch)?;
            on.check_allocated(&v.s.fd, SIZE, "touched again")?;
            ensure!(pfn != v.frame.0, "the broken frame {pfn:#x} was given out again");
            v.s.vcpu.fill(gpa + BROKEN, PAGE, GUEST)?;
            v.s.vcpu.verify(gpa, SIZE, GUEST)?;
            drop(v);
            let now = mem::meminfo("HardwareCorrupted")?;
            ensure!(now == corrupted, "HardwareCorrupted is {now}, was {corrupted}");
        }
    }
    Ok(())
}

fn every_vcpu_loses_the_page(on: &'static Backend) -> CaseResult {
    for huge in page_sizes(on) {
        let _huge = pressure::shmem_huge(huge)?;
        for choice in choices(on, &[BOTH, HIDDEN]) {
            let mut s = guest(on, choice)?;
            let gpa = s.slot.gpa;
            let mut others = (1..4).map(|id| s.vm.vcpu(id)).collect::<Result<Vec<_>>>()?;
            let pfn = mapped_at(gpa + BROKEN, || {
                s.vcpu.fill(gpa, SIZE, GUEST)?;
                others.iter_mut().try_for_each(|vcpu| vcpu.verify(gpa, SIZE, GUEST))
            })?;
            let frame = break_frame(on, pfn)?;
            for vcpu in &mut others {
                expect_lost(on, vcpu, gpa + BROKEN)?;
                vcpu.verify(gpa, BROKEN, GUEST)?;
            }
            drop((others, s));
            drop(frame);
        }
    }
    Ok(())
}

fn prefault_stops_there(on: &'static Backend) -> CaseResult {
    for choice in choices(on, &[PINNED, HIDDEN]) {
        let v = break_page(on, choice)?;
        let (result, left) = v.s.vcpu.raw_pre_fault(v.s.slot.gpa, SIZE);
        on.errno("pre-fault", result, &[Errno::EHWPOISON])?;
        ensure!(left == SIZE - BROKEN, "{left:#x} bytes are left");
    }
    Ok(())
}

fn poisoned_page_is_neither_moved_nor_swapped(on: &'static Backend) -> CaseResult {
    lock_own_memory()?;
    let (cgroup, swap) = (Cgroup::enter()?, Swap::on(64 * MIB)?);
    let mut v = break_page(on, Some(BOTH))?;
    let gpa = v.s.slot.gpa;
    for _ in 0..4 {
        pressure::compact()?;
        cgroup.reclaim(SIZE)?;
    }
    ensure!(swap.used()? <= SIZE - PAGE, "{} bytes in swap", swap.used()?);
    ensure!(swap.used()? > 0, "nothing was swapped");
    v.expect_lost()?;
    expect_rest(&mut v.s, BROKEN)?;
    punch(&v.s.fd, 0, SIZE)?;
    swap.expect_used(0, "all punched")?;
    v.s.vcpu.verify(gpa, SIZE, Pattern::ZERO)
}

fn shared_side_is_another_page(on: &'static Backend) -> CaseResult {
    for choice in choices(on, &[BOTH, HIDDEN]) {
        let mut v = break_page(on, choice)?;
        let (gpa, pattern) = (v.s.slot.gpa + BROKEN, Pattern::Generation(6));
        v.s.vm.set_shared(gpa, PAGE)?;
        v.s.vcpu.fill(gpa, PAGE, pattern)?;
        v.s.vcpu.verify(gpa, PAGE, pattern)?;
        v.s.vm.set_private(gpa, PAGE)?;
        v.expect_lost()?;
    }
    Ok(())
}

fn teardown_leaves_the_frame_out_of_use(on: &'static Backend) -> CaseResult {
    for huge in page_sizes(on) {
        let _huge = pressure::shmem_huge(huge)?;
        for choice in choices(on, &[BOTH, HIDDEN]) {
            drop(break_page(on, choice)?);
            let before = Accounts::now()?;
            let Victim { s, frame } = break_page(on, choice)?;
            drop(s);
            let state = pressure::page_flags(frame.0)?;
            ensure!(state & KPF_HWPOISON != 0, "the frame has flags {state:#x}");
            drop(frame);
            before.expect_back(MIB)?;
        }
    }
    Ok(())
}

/// The content of a frame that must not be touched.
const UNTOUCHED: [u8; PAGE as usize] = [0xa5; PAGE as usize];

fn expect_untouched(frame: &Broken, content: &[u8], when: &str) -> Result<()> {
    let now = pressure::read_frame(frame.0)?;
    let changed = now.iter().zip(content).filter(|(now, before)| now != before).count();
    ensure!(changed == 0, "{when}: {changed} bytes of the broken frame have changed");
    Ok(())
}

/// Reserve `size` bytes around [`BROKEN`], break the page before any of them is used, and let the
/// guest, fallocate() and KVM_PRE_FAULT_MEMORY touch it first.
fn break_unwritten(flags: u64, size: u64, first: First, failing: bool) -> Result<()> {
    let cgroup = Cgroup::enter()?;
    let mut s = Setup::with_flags(flags, SIZE)?;
    let (gpa, start) = (s.slot.gpa, BROKEN / size * size);
    pressure::drop_caches()?;
    let reserved =
        pressure::reserved_by(&cgroup, || allocate(&s.fd, start, size).context("reserve"))?;
    let pfn = reserved.first().context("no page was reserved")? + (BROKEN - start) / PAGE;
    ensure!(reserved.len() as u64 == size / PAGE, "{} pages are reserved", reserved.len());
    ensure!(reserved.contains(&pfn), "the pages are not one after the other");
    pressure::write_frame(pfn, &UNTOUCHED)?;
    let counts = Counts::now()?;
    if failing {
        let failing = Failing::splits()?;
        let result = pressure::poison(pfn);
        drop(failing);
        println!("poison: {result:?}");
        counts.expect_grown(&["thp_split_page_failed"], 1)?;
    } else {
        pressure::poison(pfn)?;
    }
    let frame = Broken(pfn);
    counts.expect_grown(&["memfile.poison"], 1)?;
    expect_untouched(&frame, &UNTOUCHED, "the error")?;
    match first {
        First::Guest => {}
        First::Fallocate => {
            println!("fallocate: {:?}", allocate(&s.fd, 0, SIZE));
            expect_untouched(&frame, &UNTOUCHED, "fallocate")?;
        }
        First::Prefault => {
            let (result, left) = s.vcpu.raw_pre_fault(gpa, SIZE);
            expect_errno("pre-fault", result, &[Errno::EHWPOISON])?;
            ensure!(left == SIZE - BROKEN, "{left:#x} bytes are left");
        }
        First::Neighbour => s.vcpu.verify(gpa + BROKEN + PAGE, PAGE, Pattern::ZERO)?,
    }
    for _ in 0..2 {
        s.vcpu.expect_lost(gpa + BROKEN)?;
        expect_untouched(&frame, &UNTOUCHED, "the touch")?;
    }
    // The others are there, and are zero.
    s.vcpu.verify(gpa, BROKEN, Pattern::ZERO)?;
    s.vcpu.verify(gpa + BROKEN + PAGE, SIZE - BROKEN - PAGE, Pattern::ZERO)?;
    s.vcpu.fill(gpa, BROKEN, GUEST)?;
    s.vcpu.verify(gpa, BROKEN, GUEST)?;
    s.vcpu.expect_lost(gpa + BROKEN)?;
    punch(&s.fd, start, size).context("punch")?;
    expect_untouched(&frame, &UNTOUCHED, "the hole")?;
    // A block that could not be split goes as a whole, with the broken page, and a new one may take
    // its place.
    let exit = s.vcpu.start(Command::Load, &[gpa + BROKEN])?;
    if failing && exit != Exit::Done {
        s.vcpu.restart()?;
        s.vcpu.expect_lost(gpa + BROKEN)?;
    } else {
        ensure!(exit == Exit::Done, "{exit:x?}");
        s.vcpu.verify(gpa + BROKEN, PAGE, Pattern::ZERO)?;
    }
    s.vcpu.verify(gpa + start, BROKEN - start, Pattern::ZERO)?;
    s.vcpu.verify(gpa + BROKEN + PAGE, start + size - BROKEN - PAGE, Pattern::ZERO)?;
    expect_untouched(&frame, &UNTOUCHED, "the touch after the hole")?;
    drop(s);
    drop(frame);
    Ok(())
}

/// The first user of the page.
#[derive(Clone, Copy)]
enum First {
    Guest,
    Fallocate,
    Prefault,
    /// The guest, on the page beside.
    Neighbour,
}

const FIRST: [First; 4] = [First::Guest, First::Fallocate, First::Prefault, First::Neighbour];

fn page_that_nobody_has_written_is_not_cleared(_: &'static Backend) -> CaseResult {
    let _pages = pressure::base_pages()?;
    // Where pages leave the direct map, fallocate() clears them before that.
    let mut unwritten = CHOICES.iter().filter(|flags| **flags != HIDDEN);
    unwritten.try_for_each(|flags| break_unwritten(*flags, PAGE, First::Guest, false))?;
    FIRST.iter().try_for_each(|first| break_unwritten(BOTH, PAGE, *first, false))
}

/// SKIP if the kernel itself clears the pages of a huge page that it frees, broken or not.
fn leaves_freed_pages_alone() -> Result<()> {
    if pressure::read("/proc/cmdline")?.contains("init_on_free=1") {
        return skip("the kernel clears what it frees");
    }
    Ok(())
}

fn page_of_a_huge_page_that_nobody_has_written_is_not_cleared(_: &'static Backend) -> CaseResult {
    leaves_freed_pages_alone()?;
    let _huge = pressure::shmem_huge("always")?;
    for failing in [false, true] {
        for first in FIRST {
            break_unwritten(BOTH, HUGE, first, failing)?;
        }
    }
    Ok(())
}

/// Inject the error into a frame of a huge page of a memfile, which cannot be split for that.
fn break_unsplit(pfn: u64) -> Result<Broken> {
    let counts = Counts::now()?;
    let failing = Failing::splits()?;
    let result = pressure::poison(pfn);
    drop(failing);
    let frame = Broken(pfn);
    println!("poison: {result:?}");
    counts.expect_grown(&["thp_split_page_failed", "memfile.poison"], 1)?;
    Ok(frame)
}

/// A hole in a part of a huge page zeroes that part first, in case the page cannot be split.
fn hole_in_a_huge_page_does_not_touch_the_broken_page(_: &'static Backend) -> CaseResult {
    leaves_freed_pages_alone()?;
    let _huge = pressure::shmem_huge("always")?;
    for flags in [PINNED, BOTH] {
        for can_split in [true, false] {
            let mut s = Setup::with_flags(flags, SIZE)?;
            let gpa = s.slot.gpa;
            s.vcpu.fill(gpa, SIZE, GUEST)?;
            let pfn = frames(&s.vcpu, &s.slot, &s.fd)?.get(&BROKEN).context("no frame")?.pfn;
            let content = pressure::read_frame(pfn)?;
            let frame = break_unsplit(pfn)?;
            let (start, len) = (BROKEN - 2 * PAGE, 5 * PAGE);
            let failing = if can_split { None } else { Some(Failing::splits()?) };
            let result = punch(&s.fd, start, len);
            drop(failing);
            result.context("punch")?;
            expect_untouched(&frame, &content, "the hole")?;
            s.vcpu.verify(gpa, start, GUEST)?;
            s.vcpu.verify(gpa + start, BROKEN - start, Pattern::ZERO)?;
            if !can_split {
                s.vcpu.expect_lost(gpa + BROKEN)?;
                expect_untouched(&frame, &content, "the touch")?;
            }
            let after = BROKEN + PAGE;
            s.vcpu.verify(gpa + after, start + len - after, Pattern::ZERO)?;
            s.vcpu.verify(gpa + start + len, SIZE - start - len, GUEST)?;
            drop(s);
            drop(frame);
        }
    }
    Ok(())
}

/// A hole in a part of a huge page that is out of the direct map clears that part outside, in case
/// the page cannot be split. An error that was injected can be taken back, so the broken page is
/// cleared as well, and comes back with the others if the hole takes it.
fn hole_around_a_broken_page_brings_no_neighbour_into_the_map(_: &'static Backend) -> CaseResult {
    let (memory, hidden) = (memory()?, Hidden::now()?);
    let _huge = pressure::shmem_huge("always")?;
    let (start, len) = (BROKEN - 2 * PAGE, 5 * PAGE);
    let (end, after) = (start + len, BROKEN + PAGE);
    for can_split in [true, false] {
        let mut s = Setup::filled(HIDDEN, SIZE)?;
        let (pfns, gpa) = (pfns(&s)?, s.slot.gpa);
        let pfn = pfns[(BROKEN / PAGE) as usize];
        let frame = break_unsplit(pfn)?;
        memory.expect_all(&pfns, false, "a page is broken")?;

        let failing = if can_split { None } else { Some(Failing::splits()?) };
        let result = punch(&s.fd, start, len);
        drop(failing);
        result.context("punch")?;
        let gone = if can_split { len / PAGE } else { 0 };
        hidden.expect((SIZE / PAGE) - gone, "after the hole")?;
        for (offset, pfn) in (0..).step_by(PAGE as usize).zip(&pfns) {
            if can_split && (start..end).contains(&offset) {
                memory.expect_empty(*pfn, GUEST, gpa, SIZE)?;
            } else {
                ensure!(!memory.has(*pfn)?, "+{offset:#x} has come into the direct map");
            }
        }

        // Where it was split, a new block may have the broken page again.
        if !can_split {
            s.vcpu.expect_lost(gpa + BROKEN)?;
        }
        s.vcpu.verify(gpa, start, GUEST)?;
        s.vcpu.verify(gpa + start, BROKEN - start, Pattern::ZERO)?;
        s.vcpu.verify(gpa + after, end - after, Pattern::ZERO)?;
        s.vcpu.verify(gpa + end, SIZE - end, GUEST)?;
        drop(s);
        hidden.expect(0, "the VM is gone")?;
        for pfn in &pfns {
            memory.expect_empty(*pfn, GUEST, gpa, SIZE)?;
        }
        drop(frame);
    }
    Ok(())
}

/// Bytes of a guest that goes to a disk.
const SMALL: u64 = 16 * PAGE;
/// Its page that gets the memory error.
const SMALL_BROKEN: u64 = 5 * PAGE;

/// A page that was written to swap and is still in memory: the disk has the same content.
fn broken_copy_of_a_swapped_page_is_replaced(_: &'static Backend) -> CaseResult {
    let (_pages, _lists) = (pressure::base_pages()?, pressure::no_generations()?);
    lock_own_memory()?;
    // Reclaim has given up before the disk is ready, and so leaves the pages where they are.
    let swap = Swap::on_disk(Disk::new(64 * MIB, Duration::from_secs(2))?)?;
    let cgroup = Cgroup::enter()?;
    for _ in 0..5 {
        let mut s = Setup::with_flags(BOTH, SMALL)?;
        let gpa = s.slot.gpa;
        s.vcpu.fill(gpa, SMALL, GUEST)?;
        let pfn = frames(&s.vcpu, &s.slot, &s.fd)?.get(&SMALL_BROKEN).context("no frame")?.pfn;
        s.swap_out(&cgroup, PAGE)?;
        swap.disk().wait_for_writes()?;
        let flags = pressure::page_flags(pfn)?;
        if flags & (KPF_SWAPCACHE | KPF_DIRTY | KPF_WRITEBACK) != KPF_SWAPCACHE {
            println!("the frame has flags {flags:#x}, once more");
            continue;
        }
        pressure::poison(pfn)?;
        let frame = Broken(pfn);
        ensure!(pressure::page_flags(pfn)? & KPF_SWAPCACHE == 0, "it is still in use");
        s.vcpu.verify(gpa, SMALL, GUEST)?;
        drop(s);
        drop(frame);
        return Ok(());
    }
    bail!("no page was in the swap cache, and written")
}

/// Likewise, but the disk has failed to take the pages: the only copies are those in the swap cache,
/// and the one of [`SMALL_BROKEN`] is broken. Field order: see [`Victim`].
struct Stranded {
    s: Setup,
    frame: Broken,
    content: Vec<u8>,
    _cgroup: Cgroup,
    swap: Swap,
    _pages: Option<Setting>,
}

impl Stranded {
    fn new() -> Result<Stranded> {
        let _pages = pressure::base_pages()?;
        lock_own_memory()?;
        let swap = Swap::on_disk(Disk::new(64 * MIB, Duration::from_millis(1))?)?;
        let _cgroup = Cgroup::enter()?;
        let mut s = Setup::with_flags(BOTH, SMALL)?;
        s.vcpu.fill(s.slot.gpa, SMALL, GUEST)?;
        let pfn = frames(&s.vcpu, &s.slot, &s.fd)?.get(&SMALL_BROKEN).context("no frame")?.pfn;
        // All but the head.
        swap.disk().fail(PAGE, true)?;
        s.swap_out(&_cgroup, PAGE)?;
        let limit = Instant::now() + Duration::from_secs(30);
        let state = KPF_SWAPCACHE | KPF_DIRTY;
        while pressure::page_flags(pfn)? & (state | KPF_WRITEBACK) != state {
            let flags = pressure::page_flags(pfn)?;
            ensure!(Instant::now() < limit, "the frame has flags {flags:#x}");
            thread::sleep(Duration::from_millis(1));
        }
        let content = pressure::read_frame(pfn)?;
        pressure::poison(pfn)?;
        Ok(Stranded { s, frame: Broken(pfn), content, _cgroup, swap, _pages })
    }

    /// The guest has lost the page, and no other.
    fn expect_lost(&mut self, when: &str) -> CaseResult {
        let lost = self.s.slot.gpa + SMALL_BROKEN;
        self.s.vcpu.expect_lost(lost).context(when.to_owned())?;
        expect_untouched(&self.frame, &self.content, when)?;
        expect_rest(&mut self.s, SMALL_BROKEN)?;
        self.s.vcpu.expect_lost(lost).context(when.to_owned())
    }

    /// A hole gives the guest a fresh page.
    fn expect_replaced(&mut self) -> CaseResult {
        punch(&self.s.fd, SMALL_BROKEN, PAGE).context("punch")?;
        self.s.vcpu.verify(self.s.slot.gpa + SMALL_BROKEN, PAGE, Pattern::ZERO)?;
        expect_untouched(&self.frame, &self.content, "the hole")
    }
}

fn broken_page_that_swap_could_not_take_is_lost(_: &'static Backend) -> CaseResult {
    let mut stranded = Stranded::new()?;
    let Stranded { s, frame, content, .. } = &mut stranded;
    let gpa = s.slot.gpa;
    for _ in 0..3 {
        s.vcpu.expect_lost(gpa + SMALL_BROKEN)?;
        expect_untouched(frame, content, "the touch")?;
    }
    let (result, left) = s.vcpu.raw_pre_fault(gpa, SMALL);
    expect_errno("pre-fault", result, &[Errno::EHWPOISON])?;
    ensure!(left == SMALL - SMALL_BROKEN, "{left:#x} bytes are left");
    expect_errno("fallocate", allocate(&s.fd, 0, SMALL), &[Errno::EHWPOISON])?;
    stranded.expect_lost("after pre-fault")?;
    stranded.expect_replaced()
}

/// No signal ends swapoff while it looks at a file, nor can the file be closed meanwhile.
fn swapoff_ends_at_a_page_with_a_memory_error(_: &'static Backend) -> CaseResult {
    const LIMIT: Duration = Duration::from_secs(20);
    for punched in [true, false] {
        let mut stranded = Stranded::new()?;
        let Stranded { s, swap, .. } = &mut stranded;
        swap.disk().fail(PAGE, false)?;
        let device = CString::new(swap.device())?;
        let (result, ended) = thread::scope(|scope| -> Result<_> {
            let off = scope.spawn(|| swap.raw_off(&device));
            let limit = Instant::now() + LIMIT * time_factor();
            while !off.is_finished() && Instant::now() < limit {
                thread::sleep(Duration::from_millis(1));
            }
            let ended = off.is_finished();
            if !ended {
                // Without the page nothing keeps it from its end.
                punch(&s.fd, SMALL_BROKEN, PAGE).context("punch")?;
            }
            Ok((off.join().map_err(|_| anyhow!("swapoff panicked"))?, ended))
        })?;
        ensure!(ended, "swapoff goes on as long as the broken page is in the file ({result:?})");
        println!("swapoff: {result:?}");
        if result.is_err() {
            expect_errno("swapoff", result, &[Errno::EIO, Errno::EHWPOISON])?;
        }
        stranded.expect_lost("after swapoff")?;
        if punched {
            stranded.expect_replaced()?;
        }
        let Stranded { s, frame, _cgroup, mut swap, .. } = stranded;
        drop(s);
        // Unless it is off already.
        swap.off()?;
        drop(frame);
    }
    Ok(())
}

/// Reclaim has taken the page from its list, with others of which it writes one: the kernel notes the
/// error in such a page and does no more. The guest must learn of it all the same.
fn error_in_a_page_that_is_isolated_is_told(_: &'static Backend) -> CaseResult {
    let (_pages, _lists) = (pressure::base_pages()?, pressure::no_generations()?);
    let _swap = Swap::on(64 * MIB)?;
    let cgroup = Cgroup::enter()?;
    for _ in 0..20 {
        // Before the guest: see Victim.
        let mut frame = None;
        let mut s = Setup::with_flags(BOTH, SMALL)?;
        let gpa = s.slot.gpa;
        s.vcpu.fill(gpa, SMALL, GUEST)?;
        let pfn = frames(&s.vcpu, &s.slot, &s.fd)?.get(&SMALL_BROKEN).context("no frame")?.pfn;
        let (page, pages) = (SMALL_BROKEN / PAGE, SMALL / PAGE);
        let spans = [Span::same(0, page), Span::same(page + 1, pages - page - 1)];
        let mut delaying = Vec::new();
        for span in spans {
            delaying.push(Consumer::bound(&s.fd, Mode::Observer, span)?);
        }
        let told = Consumer::bound(&s.fd, Mode::Observer, Span::same(page, 1))?;
        delaying.iter().try_for_each(|one| one.block(true))?;
        let counts = Counts::now()?;
        let isolated = thread::scope(|scope| -> Result<bool> {
            let reclaiming = scope.spawn(|| {
                while told.callbacks()?.starts == 0 && mem::resident_pages(&s.fd)? == pages {
                    cgroup.reclaim_unused(SMALL)?;
                }
                Ok::<_, anyhow::Error>(())
            });
            let mut work = || -> Result<bool> {
                let called = || -> Result<bool> {
                    let calls = delaying.iter().map(|one| Ok(one.callbacks()?.starts));
                    Ok(calls.sum::<Result<u64>>()? > 0)
                };
                while !called()? {
                    if reclaiming.is_finished() {
                        return Ok(false);
                    }
                    thread::yield_now();
                }
                if pressure::page_flags(pfn)? & (KPF_LRU | KPF_LOCKED | KPF_SWAPCACHE) != 0 {
                    return Ok(false);
                }
                let noted = pressure::poison(pfn);
                frame = Some(Broken(pfn));
                ensure!(noted.is_err(), "the kernel handled the error in an isolated page");
                let calls = told.callbacks()?;
                ensure!(calls.starts != 0 && calls.starts == calls.ends, "told: {calls:?}");
                counts.expect_grown(&["memfile.poison"], 1)?;
                Ok(true)
            };
            let result = work();
            delaying.iter().try_for_each(|one| one.block(false))?;
            reclaiming.join().map_err(|_| anyhow!("the thread panicked"))??;
            result
        });
        if !isolated? {
            println!("the page was not isolated, once more");
            continue;
        }
        s.vcpu.expect_lost(gpa + SMALL_BROKEN)?;
        return expect_rest(&mut s, SMALL_BROKEN);
    }
    bail!("no page was isolated while another one was written")
}

/// The file keeps its page, so memory management must keep the struct page.
fn block_with_a_broken_page_does_not_go_offline(on: &'static Backend) -> CaseResult {
    let zone = MovableZone::make(1)?;
    let block = zone.blocks.first().context("no block")?;
    let mut v = break_page(on, Some(MOVABLE))?;
    ensure!(zone.holds(v.frame.0)?, "the guest is not in the block for movable memory");
    let result = block.raw_offline();
    if result.is_ok() {
        block.give_back("online_movable")?;
    }
    expect_errno("offline", result, &[Errno::EBUSY])?;
    let gpa = v.s.slot.gpa;
    v.expect_lost()?;
    expect_rest(&mut v.s, BROKEN)?;
    punch(&v.s.fd, BROKEN, PAGE)?;
    v.s.vcpu.verify(gpa + BROKEN, PAGE, Pattern::ZERO)?;
    drop(v);
    // It has no page of a file any more, and is sound.
    block.offline()?;
    block.give_back("online_movable")
}
