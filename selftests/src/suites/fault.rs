// SPDX-License-Identifier: GPL-2.0
//! Memory runs out: a call that fails returns an error, changes and leaks nothing, and works once
//! there is memory again.
//!
//! Most cases make a call with less memory than it needs, and a little more each time, until it has
//! enough: see [`Injector::sweep`].

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::consumer::{Consumer, Mode, Span};
use crate::guest::Command;
use crate::ktap::{CaseResult, Suite};
use crate::mem::{self, counter};
use crate::pattern::{Pattern, Rng, seed};
use crate::pressure::{self, Cgroup, Counts, Failing, Setting, Swap, base_pages, shmem_huge};
use crate::support::backend::Backend;
use crate::support::directmap::Hidden;
use crate::support::hugetlb::{Guest, frames_of, movable_pool};
use crate::support::inject::{Injector, SHORTAGES, Shortage, until_one_fails};
use crate::support::setup::{
    GUEST, HIDDEN, Layout, MOVABLE, PINNED, RECLAIMABLE, SHARED, SLOT, Setup, fill_view,
    fill_view_part, vm_with_flags,
};
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{CONVERT_BY, Exit, Private, Slot, region, small_pages};
use crate::{GIB, HUGE, MIB, PAGE, conformance};

pub static SUITES: &[Suite] = &[
    conformance!(
        @suite MEMFILE, "fault",
        [
            memfd_create_that_fails_leaves_nothing,
            size_and_seal_that_fail_change_nothing,
            fallocate_that_fails_undoes_what_it_did,
            fallocate_that_fails_spares_what_the_guest_touches_meanwhile,
            hole_needs_no_memory,
            hole_between_allocated_pages_needs_no_memory,
            hole_in_a_huge_page_needs_no_memory,
            hole_that_cannot_read_what_it_cuts_changes_nothing,
            hole_that_reclaim_overtakes_leaves_no_content,
            binding_that_fails_changes_nothing,
            deletion_that_fails_changes_nothing,
            conversion_that_fails_changes_nothing,
            conversion_back_to_shared_needs_no_memory,
            conversion_of_a_part_that_fails_changes_nothing,
            pre_fault_that_fails_says_enomem,
            private_fault_that_fails_exits_with_enomem_and_resumes,
            huge_private_fault_falls_back_or_exits_with_enomem,
            private_fault_over_the_limit_of_the_cgroup_is_enomem,
            private_fault_over_the_limit_is_killed_for_as_a_memfd_is,
            private_fault_over_the_commit_limit_is_enospc,
        ]
    ),
    // Allocations and faults: hugetlb.allocation_that_fails_leaves_the_pool_as_it_was.
    conformance!(
        @suite HUGE, "fault_huge",
        [
            memfd_create_that_fails_leaves_nothing,
            hole_between_allocated_pages_needs_no_memory,
            binding_that_fails_changes_nothing,
            binding_that_fails_loses_no_page_that_had_to_move,
            deletion_that_fails_changes_nothing,
            conversion_back_to_shared_needs_no_memory,
            conversion_of_a_part_that_fails_changes_nothing,
            pre_fault_that_fails_says_enomem,
        ]
    ),
];

const KIND: Private = Private::Memfile;

/// The resources that memfile has in use, and the process's open descriptors.
#[derive(Debug, PartialEq, Eq)]
struct Usage {
    files: u64,
    bindings: u64,
    pages: u64,
    module: String,
    descriptors: usize,
    /// The pool that the pages come from.
    pool: Option<pressure::Usage>,
}

impl Usage {
    fn now(on: &Backend) -> Result<Usage> {
        let pairs = [("create", "destroy"), ("bind", "unbind"), ("get_pfn", "put_pfn")];
        let mut used = [0; 3];
        for (used, (more, less)) in used.iter_mut().zip(pairs) {
            *used = counter(more)?.wrapping_sub(counter(less)?);
        }
        let [files, bindings, pages] = used;
        let module = std::fs::read_to_string("/sys/module/memfile/refcnt").context("refcnt")?;
        let descriptors = std::fs::read_dir("/proc/self/fd").context("/proc/self/fd")?.count();
        Ok(Usage { files, bindings, pages, module, descriptors, pool: on.pool()? })
    }

    /// Fail unless the state is unchanged.
    fn expect_unchanged(&self, on: &Backend) -> Result<()> {
        let now = Usage::now(on)?;
        ensure!(now == *self, "in use before: {self:?}, now: {now:?}");
        Ok(())
    }
}

/// An [`Injector`]; SKIP where there is no memfile either.
fn injector() -> Result<Injector> {
    drop(memfile(PAGE)?);
    Injector::new()
}

/// The binding of a file, as fdinfo shows it.
fn expect_bindings(fd: impl AsFd, wanted: &str) -> Result<()> {
    let got = mem::fdinfo(fd, "memfile-bindings")?.context("fdinfo has no memfile-bindings")?;
    ensure!(got == wanted, "fdinfo says {got} bindings, wanted {wanted}");
    Ok(())
}

fn memfd_create_that_fails_leaves_nothing(on: &'static Backend) -> CaseResult {
    let injector = injector()?;
    let before = Usage::now(on)?;
    injector.sweep_that_fails(
        "memfd_create",
        &mut (),
        // The file system returns ENOSPC if it gets no inode, for any memfd.
        |()| {
            let result = on.raw_unsized();
            result.map_err(|e| if e == Errno::ENOSPC { Errno::ENOMEM } else { e })
        },
        |(), result| {
            if let Ok(fd) = result {
                ftruncate(&fd, on.page).context("the file that was made")?;
            }
            before.expect_unchanged(on)
        },
    )?;
    Ok(())
}

fn size_and_seal_that_fail_change_nothing(_: &'static Backend) -> CaseResult {
    let injector = injector()?;
    injector.sweep(
        "ftruncate",
        &mut memfile_unsized()?,
        |fd| ftruncate(fd, MIB),
        |fd, result| {
            let size = file_size(&*fd)?;
            ensure!(size == if result.is_ok() { MIB } else { 0 }, "the size is {size:#x}");
            *fd = memfile_unsized()?;
            Ok(())
        },
    )?;
    let sealable = || memfd_create(MFD_CLOEXEC | MFD_ALLOW_SEALING).context("memfd_create");
    injector.sweep(
        "F_ADD_SEALS",
        &mut sealable()?,
        |fd| add_seals(fd, F_SEAL_AUTO_ALLOCATE),
        |fd, result| {
            let seals = get_seals(&*fd)?;
            let wanted = if result.is_ok() { F_SEAL_AUTO_ALLOCATE } else { 0 };
            ensure!(seals == wanted, "the seals are {seals:#x}");
            *fd = sealable()?;
            Ok(())
        },
    )?;
    Ok(())
}

/// The guest's pages stay, and stay mapped: no consumer is called (rule 16).
fn fallocate_that_fails_undoes_what_it_did(on: &'static Backend) -> CaseResult {
    fallocate_that_fails(on, PINNED)?;
    fallocate_that_fails(on, HIDDEN)
}

fn fallocate_that_fails(on: &Backend, flags: u64) -> CaseResult {
    let _pages = base_pages()?;
    let injector = injector()?;
    let size = 64 * PAGE;
    let hidden = Hidden::now()?;
    let mut s = Setup::with_flags(flags, size)?;
    let (live, len) = (s.slot.gpa + 20 * PAGE, 8 * PAGE);
    s.vcpu.fill(live, len, GUEST)?;
    let stats = s.vm.stats()?;
    let mapped = stats.get("pages_4k")?;
    let usage = Usage::now(on)?;
    let invalidated = counter("invalidate")?;
    let call = |s: &mut Setup| allocate(&s.fd, 0, size);
    let check = |s: &mut Setup, result: SysResult<()>| {
        usage.expect_unchanged(on)?;
        if result.is_ok() {
            expect_allocated(&s.fd, size, "after success")?;
            punch(&s.fd, 0, 20 * PAGE)?;
            punch(&s.fd, 28 * PAGE, size - 28 * PAGE)?;
        } else {
            ensure!(counter("invalidate")? == invalidated, "consumers were told");
            ensure!(stats.get("pages_4k")? == mapped, "the guest lost mappings");
        }
        expect_allocated(&s.fd, len, "in the end")?;
        hidden.expect(if flags == HIDDEN { len / PAGE } else { 0 }, "in the end")?;
        s.vcpu.verify(live, len, GUEST)
    };
    // Each page that is missing is the one that fails.
    until_one_fails(|| {
        let failed = injector.sweep("fallocate", &mut s, call, check)?;
        Ok(if u64::from(failed) >= (size - len) / PAGE { failed } else { 0 })
    })
    .map(drop)
}

/// A page that the guest touches before the undo reaches it stays.
fn fallocate_that_fails_spares_what_the_guest_touches_meanwhile(
    on: &'static Backend,
) -> CaseResult {
    let _pages = base_pages()?;
    drop(injector()?);
    let size = 2 * MIB;
    let mut rng = Rng::new(seed());
    let mut s = Setup::new(on, size)?;
    let (fd, vcpu, gpa) = (&s.fd, &mut s.vcpu, s.slot.gpa);
    // Calls that failed, and those of them during which the guest got pages.
    let (stop, failed, met) = (AtomicBool::new(false), AtomicU32::new(0), AtomicU32::new(0));
    // The two take turns on one CPU, in shorter turns than emulated CPUs do.
    stay_on_this_cpu()?;
    thread::scope(|scope| {
        let allocator = scope.spawn(|| -> Result<()> {
            let injector = Injector::new()?;
            while !stop.load(Ordering::Relaxed) {
                let n = 1 + rng.below(2 * size / PAGE) as u32;
                let call = || allocate(fd, 0, size);
                let before = counter("get_pfn")?;
                match injector.call(Shortage::Once, n, call, SysResult::is_err)?.0 {
                    Ok(()) => {}
                    Err(Errno::ENOMEM) => {
                        failed.fetch_add(1, Ordering::Relaxed);
                        let touched = counter("get_pfn")? > before;
                        met.fetch_add(u32::from(touched), Ordering::Relaxed);
                    }
                    Err(errno) => return Err(errno).context("fallocate"),
                }
            }
            Ok(())
        });
        let mut touch = || -> Result<()> {
            for round in 0.. {
                if round >= 12 && met.load(Ordering::Relaxed) > 0 || allocator.is_finished() {
                    break;
                }
                vcpu.fill_pages(gpa, size, Pattern::Generation(round))?;
                vcpu.verify_pages(gpa, size, Pattern::Generation(round))
                    .with_context(|| format!("round {round}"))?;
                punch(fd, 0, size)?;
            }
            Ok(())
        };
        let result = touch();
        stop.store(true, Ordering::Relaxed);
        allocator.join().map_err(|_| anyhow!("the allocator panicked"))??;
        println!("fallocate failed {failed:?} times, beside the guest {met:?} times");
        result
    })
}

fn hole_needs_no_memory(on: &'static Backend) -> CaseResult {
    let _pages = base_pages()?;
    let injector = injector()?;
    let mut s = Setup::new(on, MIB)?;
    let (gpa, size) = (s.slot.gpa, s.slot.size);
    s.vcpu.fill_pages(gpa, size, GUEST)?;
    let usage = Usage::now(on)?;
    let failed = injector.sweep(
        "a hole",
        &mut s,
        |s| punch(&s.fd, 5 * PAGE, 100 * PAGE),
        |s, _| {
            usage.expect_unchanged(on)?;
            expect_allocated(&s.fd, size - 100 * PAGE, "after the hole")?;
            s.vcpu.verify_pages(gpa + 5 * PAGE, 100 * PAGE, Pattern::ZERO)?;
            s.vcpu.fill_pages(gpa + 5 * PAGE, 100 * PAGE, GUEST)?;
            s.vcpu.verify_pages(gpa, size, GUEST)
        },
    )?;
    ensure!(failed == 0, "{failed} holes were not punched for want of memory");
    Ok(())
}

/// On hugetlbfs the entry of what is allocated has to be split for each of them.
fn hole_between_allocated_pages_needs_no_memory(on: &'static Backend) -> CaseResult {
    const COUNT: u64 = 16;
    let _pages = base_pages()?;
    let injector = injector()?;
    let page = on.page;
    let mut s = Setup::new(on, COUNT * page)?;
    let gpa = s.slot.gpa;
    let every_other = || (1..COUNT).step_by(2).map(|n| n * page);
    let punch_all = |s: &Setup| every_other().try_for_each(|at| punch(&s.fd, at, page));
    s.vcpu.fill_pages(gpa, COUNT * page, GUEST)?;
    punch_all(&s)?;
    let usage = Usage::now(on)?;
    for at in every_other() {
        s.vcpu.fill_pages(gpa + at, page, GUEST)?;
    }
    let failed = injector.sweep(
        "holes between pages",
        &mut s,
        |s| punch_all(s),
        |s, _| {
            usage.expect_unchanged(on)?;
            expect_allocated(&s.fd, COUNT / 2 * page, "after the holes")?;
            let resident = s.resident()? * PAGE;
            ensure!(resident == COUNT / 2 * page, "fdinfo says that it holds {resident} bytes");
            for at in every_other() {
                s.vcpu.verify_pages(gpa + at - page, page, GUEST)?;
                s.vcpu.verify_pages(gpa + at, page, Pattern::ZERO)?;
                s.vcpu.fill_pages(gpa + at, page, GUEST)?;
            }
            s.vcpu.verify_pages(gpa, COUNT * page, GUEST)
        },
    )?;
    ensure!(failed == 0, "{failed} holes were not punched for want of memory");
    Ok(())
}

/// The huge page is split. If there is no memory for that it stays, and the hole is cleared.
fn hole_in_a_huge_page_needs_no_memory(on: &'static Backend) -> CaseResult {
    let injector = injector()?;
    let _policy = shmem_huge("always")?;
    let mut s = Setup::new(on, HUGE)?;
    let gpa = s.slot.gpa;
    let (at, len) = (7 * PAGE, 3 * PAGE);
    s.vcpu.fill_pages(gpa, HUGE, GUEST)?;
    expect_allocated(&s.fd, HUGE, "a huge page")?;
    let usage = Usage::now(on)?;
    let (mut split, mut whole) = (0, 0);
    let failed = injector.sweep(
        "a hole in a huge page",
        &mut s,
        |s| punch(&s.fd, at, len),
        |s, _| {
            usage.expect_unchanged(on)?;
            match allocated(&s.fd)? {
                HUGE => whole += 1,
                held if held == HUGE - len => split += 1,
                held => bail!("{} KiB are held", held >> 10),
            }
            s.vcpu.verify(gpa + at, len, Pattern::ZERO)?;
            s.vcpu.verify_pages(gpa, at, GUEST)?;
            s.vcpu.verify_pages(gpa + at + len, HUGE - at - len, GUEST)?;
            punch(&s.fd, 0, HUGE)?;
            expect_allocated(&s.fd, 0, "all punched")?;
            s.vcpu.fill_pages(gpa, HUGE, GUEST)
        },
    )?;
    println!("{split} times the huge page was split, {whole} times it stayed");
    ensure!(failed == 0, "{failed} holes were not punched for want of memory");
    ensure!(split > 0 && whole > 0, "only one of them was tried");
    Ok(())
}

/// A huge page that is in swap has to come back before it can be cut.
fn hole_that_cannot_read_what_it_cuts_changes_nothing(_on: &'static Backend) -> CaseResult {
    // None is the first page, which is where the entry of a huge page in swap begins.
    const CUT: u64 = 5 * PAGE;
    const LEN: u64 = 100 * PAGE;
    lock_own_memory()?;
    let _policy = shmem_huge("always")?;
    let swap = Swap::on(16 * MIB)?;
    let cgroup = Cgroup::enter()?;
    // The begin of the hole cuts it, its end, and both.
    for (at, len) in [(CUT, HUGE - CUT), (0, LEN), (CUT, LEN)] {
        let mut s = Setup::filled(RECLAIMABLE, HUGE)?;
        let counts = Counts::now()?;
        s.swap_out(&cgroup, HUGE)?;
        cgroup.forget(HUGE)?;
        counts.expect_grown(&["thp_swpout"], 1)?;
        swap.expect_used(HUGE, "all is in swap")?;
        let gpa = s.slot.gpa;
        s.vcpu.post(Command::Load, &[gpa + CUT])?;
        let failing = Failing::pages(100, 1000)?;
        let (hole, exit) = (punch(&s.fd, at, len), s.vcpu.enter());
        drop(failing);
        expect_errno("punch", hole, &[Errno::ENOMEM])?;
        // Nor can the guest read it.
        let flags = KVM_MEMORY_EXIT_FLAG_PRIVATE;
        let wanted = Exit::MemoryFault { errno: Errno::ENOMEM, gpa: gpa + CUT, size: PAGE, flags };
        ensure!(exit == Ok(wanted), "{exit:x?}");
        s.vcpu.restart()?;
        s.vcpu.verify_pages(gpa, HUGE, GUEST)?;
        punch(&s.fd, at, len).context("once there is memory")?;
        s.vcpu.verify_pages(gpa, at, GUEST)?;
        s.vcpu.verify_pages(gpa + at, len, Pattern::ZERO)?;
        s.vcpu.verify_pages(gpa + at + len, HUGE - at - len, GUEST)?;
    }
    Ok(())
}

/// Reclaim takes the huge page that the hole cuts when consumers have been told, and before it is cut.
fn hole_that_reclaim_overtakes_leaves_no_content(_on: &'static Backend) -> CaseResult {
    const LEN: u64 = 100 * PAGE;
    lock_own_memory()?;
    let _policy = shmem_huge("always")?;
    let swap = Swap::on(16 * MIB)?;
    let cgroup = Cgroup::enter()?;
    for has_memory in [true, false] {
        let mut s = Setup::with_flags(RECLAIMABLE, 2 * HUGE)?;
        let gpa = s.slot.gpa + HUGE;
        s.vcpu.fill(gpa, HUGE, GUEST)?;
        // It knows nothing of the huge page, so it holds up the hole alone.
        let beside = Span::same(HUGE / PAGE - 1, 1);
        let observer = Consumer::bound(&s.fd, Mode::Observer, beside)?;
        observer.block(true)?;
        let hole = thread::scope(|scope| -> Result<_> {
            let hole = scope.spawn(|| -> Result<_> {
                let failing = if has_memory { None } else { Some(Failing::pages(100, 1000)?) };
                let result = punch(&s.fd, HUGE - PAGE, LEN + PAGE);
                drop(failing);
                Ok(result)
            });
            let meanwhile = || -> CaseResult {
                observer.wait_until_called()?;
                let counts = Counts::now()?;
                s.swap_out(&cgroup, HUGE)?;
                cgroup.forget(HUGE)?;
                counts.expect_grown(&["thp_swpout"], 1)?;
                swap.expect_used(HUGE, "the huge page is in swap")
            };
            let result = meanwhile();
            observer.block(false)?;
            let hole = hole.join().map_err(|_| anyhow!("the thread panicked"))?;
            result.and(hole)
        })?;
        let mut left = GUEST;
        if has_memory {
            hole.context("punch")?;
            left = Pattern::ZERO;
        } else {
            expect_errno("punch", hole, &[Errno::ENOMEM])?;
        }
        s.vcpu.verify_pages(gpa, LEN, left)?;
        s.vcpu.verify_pages(gpa + LEN, HUGE - LEN, GUEST)?;
        punch(&s.fd, HUGE - PAGE, LEN + PAGE).context("once there is memory")?;
        s.vcpu.verify_pages(gpa, LEN, Pattern::ZERO)?;
        s.vcpu.verify_pages(gpa + LEN, HUGE - LEN, GUEST)?;
    }
    Ok(())
}

fn binding_that_fails_changes_nothing(on: &'static Backend) -> CaseResult {
    let injector = injector()?;
    let vm = on.vm()?;
    let mut vcpu = vm.vcpu(0)?;
    let fd = on.create(&vm, MIB)?;
    allocate(&fd, 0, MIB)?;
    vm.set_private(GIB, MIB)?;
    let view = small_pages(MIB)?;
    let request = region(SLOT, GIB, &view, Some((KIND, fd.as_fd(), 0)));
    let usage = Usage::now(on)?;
    let flags = || mem::fdinfo(&fd, "memfile-flags");
    let mut wanted = flags()?;
    injector.sweep_that_fails(
        "binding",
        &mut vcpu,
        |_| vm.raw_set_region(&request),
        |vcpu, result| {
            if result.is_ok() {
                vcpu.fill_pages(GIB, MIB, GUEST)?;
                expect_bindings(&fd, "1")?;
                vm.raw_delete(SLOT)?;
            }
            expect_bindings(&fd, "0")?;
            // The flags of a successful binding stay; a failed one changes none.
            if result.is_ok() {
                wanted = Some(format!("{PINNED:#x}"));
            }
            ensure!(flags()? == wanted, "the file's flags are {:?}, not {wanted:?}", flags()?);
            usage.expect_unchanged(on)?;
            let exit = vcpu.start(Command::Load, &[GIB])?;
            ensure!(matches!(exit, Exit::MemoryFault { errno: Errno::EFAULT, .. }), "{exit:x?}");
            vcpu.restart()
        },
    )?;
    Ok(())
}

/// The page lies in movable memory, which it has to leave for a VM that pins. If there is no memory
/// for that it stays, with its content, and the next binding moves it.
fn binding_that_fails_loses_no_page_that_had_to_move(on: &'static Backend) -> CaseResult {
    let injector = injector()?;
    let page = on.page;
    let (zone, pool, mut filled) = movable_pool(2)?;
    let inside = |guest: &Guest| -> Result<bool> {
        let frame = *frames_of(guest)?.get(&0).context("the page has no frame")?;
        zone.holds(frame.pfn)
    };
    let (mut refused, mut moved) = (0, 0);
    for shortage in SHORTAGES {
        let (mut n, mut short) = (0, true);
        while short {
            n += 1;
            let words = format!("{shortage:?} {n}");
            let mut guest = Guest::new(MOVABLE, page, 1)?;
            guest.vcpu.fill_pages(guest.gpa, page, GUEST)?;
            ensure!(inside(&guest)?, "{words}: the page is not in movable memory");
            let Guest { vm, vcpu, fd, view, gpa, size } = guest;
            drop((vcpu, vm));
            let vm = vm_with_flags(PINNED)?;
            let vcpu = vm.vcpu(0)?;
            vm.set_private(gpa, size)?;
            let mut request = region(SLOT, gpa, &view, Some((KIND, fd.as_fd(), 0)));
            request.memory_size = size;
            let usage = Usage::now(on)?;
            let call = || vm.raw_set_region(&request);
            let (result, now) = injector.call(shortage, n, call, SysResult::is_err)?;
            short = now;
            if let Err(errno) = result {
                ensure!(errno == Errno::ENOMEM, "{words}: the binding says {errno}");
                refused += 1;
                usage.expect_unchanged(on).context(words.clone())?;
                expect_bindings(&fd, "0")?;
                vm.raw_set_region(&request).with_context(|| format!("{words}: once there is"))?;
            }
            expect_allocated(&fd, page, &words)?;
            pool.expect_used(1, &words)?;
            let mut guest = Guest { vm, vcpu, fd, view, gpa, size };
            guest.vcpu.verify_pages(gpa, page, GUEST).context(words.clone())?;
            ensure!(!inside(&guest)?, "{words}: the page is pinned in movable memory");
            moved += 1;
            drop(guest);
            pool.expect_used(0, &words)?;
            // The page that it moved to is the pool's now, and would be the next one.
            drop(filled);
            filled = pool.fill(2)?;
        }
    }
    println!("{refused} bindings were refused, {moved} pages moved");
    ensure!(refused > 0, "no allocation was needed");
    Ok(())
}

fn deletion_that_fails_changes_nothing(on: &'static Backend) -> CaseResult {
    let injector = injector()?;
    let mut s = Setup::new(on, MIB)?;
    let (gpa, size) = (s.slot.gpa, s.slot.size);
    s.vcpu.fill_pages(gpa, size, GUEST)?;
    let request = region(SLOT, gpa, &s.slot.view, Some((KIND, s.fd.as_fd(), 0)));
    let usage = Usage::now(on)?;
    let (vm, fd) = (&s.vm, &s.fd);
    let failed = injector.sweep(
        "deletion",
        &mut s.vcpu,
        |_| vm.raw_delete(SLOT),
        |vcpu, result| {
            if result.is_ok() {
                expect_bindings(fd, "0")?;
                vm.raw_set_region(&request).context("bind it again")?;
            }
            expect_bindings(fd, "1")?;
            usage.expect_unchanged(on)?;
            vcpu.verify_pages(gpa, size, GUEST)
        },
    )?;
    println!("{failed} deletions failed");
    Ok(())
}

/// A large slot; each try converts another part of it, because memory that a failed one has
/// reserved makes the next one need less.
struct Parts {
    s: Setup,
    n: u64,
}

impl Parts {
    /// Bytes of a part: several nodes of KVM's array of attributes.
    const LEN: u64 = 200 * PAGE;

    fn new(on: &'static Backend) -> Result<Parts> {
        let mut s = Setup::new(on, 128 * HUGE)?;
        s.vm.set_shared(s.slot.gpa, s.slot.size)?;
        s.vcpu.store(s.slot.gpa, 0)?;
        Ok(Parts { s, n: 0 })
    }

    fn slot(&self) -> &Slot {
        &self.s.slot
    }

    /// Where the part is in the slot.
    fn offset(&self) -> u64 {
        self.n * HUGE
    }

    fn gpa(&self) -> u64 {
        self.slot().gpa + self.offset()
    }

    /// Get the next part ready: shared, but for one page.
    fn next(&mut self) -> Result<()> {
        self.n += 1;
        let (gpa, at) = (self.gpa(), self.offset());
        ensure!(at + Self::LEN <= self.slot().size, "the slot is too small");
        for page in (0..Self::LEN).step_by(PAGE as usize) {
            self.slot().view.store(at + page, SHARED.word(gpa + page));
        }
        self.s.vm.set_private(gpa + 9 * PAGE, PAGE)?;
        self.s.vcpu.fill_pages(gpa + 9 * PAGE, PAGE, GUEST)
    }

    /// The part is as [`Parts::next`] left it, or all private.
    fn check(&mut self, private: bool) -> Result<()> {
        let (gpa, len) = (self.gpa(), Self::LEN);
        let pattern = if private { Pattern::ZERO } else { SHARED };
        self.s.vcpu.verify_pages(gpa, 9 * PAGE, pattern)?;
        self.s.vcpu.verify_pages(gpa + 9 * PAGE, PAGE, GUEST)?;
        self.s.vcpu.verify_pages(gpa + 10 * PAGE, len - 10 * PAGE, pattern)
    }
}

fn conversion_that_fails_changes_nothing(on: &'static Backend) -> CaseResult {
    let injector = injector()?;
    let mut parts = Parts::new(on)?;
    for by in CONVERT_BY {
        parts.next()?;
        let usage = Usage::now(on)?;
        injector.sweep_that_fails(
            &format!("conversion by {by:?}"),
            &mut parts,
            |parts| parts.s.vm.raw_convert(by, parts.gpa(), Parts::LEN, true),
            |parts, result| {
                usage.expect_unchanged(on)?;
                parts.check(result.is_ok())?;
                parts.next()
            },
        )?;
    }
    Ok(())
}

fn conversion_back_to_shared_needs_no_memory(on: &'static Backend) -> CaseResult {
    let injector = injector()?;
    let mut s = Setup::new(on, HUGE + PAGE)?;
    let (gpa, size) = (s.slot.gpa, s.slot.size);
    fill_view(&s.slot, SHARED);
    for by in CONVERT_BY {
        s.vcpu.fill_pages(gpa, size, GUEST)?;
        let failed = injector.sweep(
            &format!("conversion to shared by {by:?}"),
            &mut s,
            |s| s.vm.raw_convert(by, gpa, size, false),
            |s, _| {
                s.vcpu.verify_pages(gpa, size, SHARED)?;
                s.vm.set_private(gpa, size)?;
                s.vcpu.verify_pages(gpa, size, GUEST)
            },
        )?;
        ensure!(failed == 0, "{failed} conversions failed");
    }
    Ok(())
}

/// KVM keeps the attributes of a large range in one entry, and first splits the one that a part is
/// taken from.
fn conversion_of_a_part_that_fails_changes_nothing(on: &'static Backend) -> CaseResult {
    const BEFORE: u64 = 5 * PAGE;
    const LEN: u64 = 100 * PAGE;
    let injector = injector()?;
    let mut s = Setup::at(on, 16 * MIB, Layout { gpa: 4 * GIB, offset: 0 })?;
    let (gpa, all) = (s.slot.gpa, s.slot.size);
    let looked_at = 2 * BEFORE + LEN;
    fill_view_part(&s.slot, 0, looked_at, SHARED);
    for by in CONVERT_BY {
        s.vcpu.fill_pages(gpa, looked_at, GUEST)?;
        injector.sweep_that_fails(
            &format!("a part to shared by {by:?}"),
            &mut s,
            |s| s.vm.raw_convert(by, gpa + BEFORE, LEN, false),
            |s, result| {
                let pattern = if result.is_ok() { SHARED } else { GUEST };
                s.vcpu.verify_pages(gpa, BEFORE, GUEST)?;
                s.vcpu.verify_pages(gpa + BEFORE, LEN, pattern)?;
                s.vcpu.verify_pages(gpa + BEFORE + LEN, BEFORE, GUEST)?;
                // One entry again.
                s.vm.set_shared(gpa, all)?;
                s.vm.set_private(gpa, all)
            },
        )?;
    }
    Ok(())
}

/// A VM for each try, because a vCPU keeps its allocations for the next fault. Pages that were done
/// before the shortage count as done.
fn pre_fault_that_fails_says_enomem(on: &'static Backend) -> CaseResult {
    let _pages = base_pages()?;
    let injector = injector()?;
    // Several pages.
    let size = (8 * PAGE).max(2 * on.page);
    let all = MIB.max(size);
    let before = on.pool()?;
    injector.sweep_that_fails(
        "KVM_PRE_FAULT_MEMORY",
        &mut (Setup::new(on, all)?, size),
        |(s, left)| {
            let result;
            (result, *left) = s.vcpu.raw_pre_fault(s.slot.gpa, size);
            // A pool that cannot grow is empty.
            let empty =
                |e: Errno| if on.page != PAGE && e == Errno::ENOSPC { Errno::ENOMEM } else { e };
            result.map_err(empty)
        },
        |(s, left), result| {
            ensure!(result.is_ok() == (*left == 0), "{left} bytes are left");
            expect_allocated(&s.fd, size - *left, "after pre-faulting")?;
            if let (Some(before), Some(now)) = (before, on.pool()?) {
                let taken = now.used() - before.used();
                ensure!(taken * on.page == size - *left && now.reserved == 0, "{now:?}");
            }
            s.vcpu.raw_pre_fault(s.slot.gpa, size).0.context("once there is memory")?;
            s.vcpu.fill(s.slot.gpa, MIB, GUEST)?;
            s.vcpu.verify(s.slot.gpa, MIB, GUEST)?;
            *s = Setup::new(on, all)?;
            Ok(())
        },
    )?;
    Ok(())
}

/// The results of KVM_RUN while memory was short.
#[derive(Debug, Default)]
struct Faults {
    /// Served in another way.
    served: u32,
    /// memfile found no page: an exit with the address.
    store: u32,
    /// KVM found no page for itself.
    kvm: u32,
}

/// The first private access of a vCPU, with less memory than it needs.
fn fault_without_memory(
    on: &'static Backend,
    injector: &Injector,
    shortage: Shortage,
    size: u64,
    command: Command,
) -> Result<Faults> {
    let mut faults = Faults::default();
    let (mut tries, mut short) = (0, true);
    while short {
        tries += 1;
        let mut s = Setup::new(on, size)?;
        let addr = s.slot.gpa + 3 * PAGE;
        let wanted = if command == Command::Store { 77 } else { 0 };
        s.vcpu.post(command, &[addr, wanted])?;
        let (usage, errors) = (Usage::now(on)?, counter("get_pfn_error")?);
        let failed = |result: &SysResult<Exit>| *result != Ok(Exit::Done);
        let (exit, now) = injector.call(shortage, tries, || s.vcpu.enter(), failed)?;
        short = now;
        let errors = counter("get_pfn_error")? - errors;
        let exit = exit.context("a signal")?;
        let words = format!("{shortage:?} {tries}: {exit:x?}, {errors} errors of get_pfn");
        match (exit, errors) {
            (Exit::Done, 0) => faults.served += u32::from(short),
            (Exit::MemoryFault { errno, gpa, size, flags }, 1) => {
                ensure!((errno, size) == (Errno::ENOMEM, PAGE), "{words}");
                ensure!((gpa, flags) == (addr, KVM_MEMORY_EXIT_FLAG_PRIVATE), "{words}");
                faults.store += 1;
            }
            (Exit::Error(Errno::ENOMEM), 0) => faults.kvm += 1,
            _ => bail!("{words}"),
        }
        usage.expect_unchanged(on).context(words.clone())?;
        if exit != Exit::Done {
            expect_allocated(&s.fd, 0, &words)?;
            let exit = s.vcpu.run()?;
            ensure!(exit == Exit::Done, "{words}; there is memory again: {exit:x?}");
        }
        ensure!(s.vcpu.load(addr)? == wanted, "{words}; the access was not done");
        s.vcpu.verify_pages(addr + PAGE, s.slot.size - 4 * PAGE, Pattern::ZERO)?;
    }
    println!("{command:?}, {shortage:?}: {} tries with too little, {faults:?}", tries - 1);
    Ok(faults)
}

fn private_fault_that_fails_exits_with_enomem_and_resumes(on: &'static Backend) -> CaseResult {
    let _pages = base_pages()?;
    let injector = injector()?;
    for (shortage, command) in SHORTAGES.into_iter().zip([Command::Load, Command::Store]) {
        until_one_fails(|| {
            Ok(fault_without_memory(on, &injector, shortage, 16 * PAGE, command)?.store)
        })?;
    }
    Ok(())
}

fn huge_private_fault_falls_back_or_exits_with_enomem(on: &'static Backend) -> CaseResult {
    let injector = injector()?;
    let _policy = shmem_huge("always")?;
    let faults = |shortage| fault_without_memory(on, &injector, shortage, HUGE, Command::Store);
    until_one_fails(|| Ok(faults(Shortage::Once)?.served))?;
    until_one_fails(|| Ok(faults(Shortage::Lasting)?.store))?;
    Ok(())
}

/// Let the guest write all of its slot, first while it may not: the exit with `errno` has the
/// address, is repeated, and changes nothing.
fn expect_exit_until(
    s: &mut Setup,
    errno: Errno,
    relieve: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let (gpa, size) = (s.slot.gpa, s.slot.size);
    let (word, step) = (GUEST.word(gpa), GUEST.step(PAGE));
    s.vcpu.post(Command::Fill, &[gpa, gpa + size, PAGE, word, step])?;
    // Without a timer, because there may be no memory for it either, nor for a message. The kernel may
    // free memory of its own meanwhile, so that an entry gets further than the one before.
    let entries = [(); 4].map(|()| (s.vcpu.enter(), allocated(&s.fd)));
    relieve()?;
    for (n, (exit, held)) in (0..).zip(entries) {
        let (exit, held) = (exit.context("a signal")?, held?);
        // A page that a fault had left behind would be held as well.
        let (gpa, flags) = (gpa + held, KVM_MEMORY_EXIT_FLAG_PRIVATE);
        let wanted = Exit::MemoryFault { errno, gpa, size: PAGE, flags };
        println!("{exit:x?} with {} of {} KiB", held >> 10, size >> 10);
        ensure!(exit == wanted, "entry {n}, {} KiB are held", held >> 10);
    }
    let exit = s.vcpu.run()?;
    ensure!(exit == Exit::Done, "there is memory again: {exit:x?}");
    expect_allocated(&s.fd, size, "all touched")?;
    s.vcpu.verify_pages(gpa, size, GUEST)
}

/// A memfd gets the same errno at the same limit.
fn private_fault_over_the_limit_of_the_cgroup_is_enomem(on: &'static Backend) -> CaseResult {
    let size = 4 * MIB;
    // Whom nobody may kill tries for ever to get a page for a fault of its own.
    populate_own_memory()?;
    let mut s = Setup::new(on, size)?;
    let usage = Usage::now(on)?;
    let (ballast, plain) = (memfd(size)?, memfd(size)?);
    let cgroup = Cgroup::enter()?;
    let _immortal = Setting::set("/proc/self/oom_score_adj", "-1000")?;
    allocate(&ballast, 0, size)?;
    cgroup.set("memory.swap.max", 0)?;
    cgroup.set("memory.max", cgroup.current()? + size / 2)?;
    expect_errno("fallocate of a memfd", allocate(&plain, 0, size), &[Errno::ENOMEM])?;
    expect_allocated(&plain, 0, "the memfd")?;
    expect_exit_until(&mut s, Errno::ENOMEM, || Ok(punch(&ballast, 0, size)?))?;
    drop((ballast, plain));
    usage.expect_unchanged(on)
}

/// Without protection the OOM killer kills the VMM, like a process that writes too much to a memfd;
/// the memory comes back.
fn private_fault_over_the_limit_is_killed_for_as_a_memfd_is(on: &'static Backend) -> CaseResult {
    let size = 16 * MIB;
    drop(memfile_unsized()?);
    let cgroup = Cgroup::new()?;
    cgroup.set("memory.swap.max", 0)?;
    cgroup.set("memory.max", 6 * MIB)?;
    let of_a_memfd = || Ok(allocate(memfd(size)?, 0, size)?);
    let of_a_guest = || -> CaseResult {
        let mut s = Setup::new(on, size)?;
        s.vcpu.fill_pages(s.slot.gpa, size, GUEST)
    };
    for (what, too_much) in
        [("a memfd", &of_a_memfd as &dyn Fn() -> CaseResult), ("a guest", &of_a_guest)]
    {
        // SAFETY: The child uses too much memory and exits.
        let pid = check(unsafe { libc::fork() })? as libc::pid_t;
        if pid == 0 {
            let result = cgroup.join().and_then(|()| too_much());
            println!("{what}: {result:?}");
            // SAFETY: Ends the child.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: The status outlives the call.
        check(unsafe { libc::waitpid(pid, &mut status, 0) })?;
        let killed = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL;
        ensure!(killed, "{what}: status {status:#x}");
        let held = cgroup.line("memory.stat", "shmem")?;
        ensure!(held <= MIB, "{what}: {} KiB are left", held >> 10);
    }
    Ok(())
}

fn private_fault_over_the_commit_limit_is_enospc(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, 4 * MIB)?;
    let plain = memfd(MIB)?;
    let usage = Usage::now(on)?;
    let ratio = Setting::set("/proc/sys/vm/overcommit_ratio", "0")?;
    let never = Setting::set("/proc/sys/vm/overcommit_memory", "2")?;
    let result = allocate(&plain, 0, PAGE);
    let of_memfile = allocate(&s.fd, 0, s.slot.size);
    expect_exit_until(&mut s, Errno::ENOSPC, || {
        drop((never, ratio));
        Ok(())
    })?;
    expect_errno("fallocate of a memfd", result, &[Errno::ENOSPC])?;
    expect_errno("fallocate of a memfile", of_memfile, &[Errno::ENOSPC])?;
    usage.expect_unchanged(on)
}
