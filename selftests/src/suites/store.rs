// SPDX-License-Identifier: GPL-2.0
//! A store of another module: its registration, its files, and the lifetime of the modules (rules
//! 7, 13, 14 and 21).
//!
//! The store is a module of its own, `rust/test/memfile_store.rs`; the consumers are KVM and
//! memfile_test.ko.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::consumer::{Consumer, Event, MAPPER, Mode, Span};
use crate::guest::Command;
use crate::ktap::{CaseResult, Suite};
use crate::module::Module;
use crate::pattern::Pattern;
use crate::pressure::base_pages;
use crate::store::{self, Store, Wanted};
use crate::support::hugetlb::{file, pool};
use crate::support::setup::{BOTH, GUEST, LAYOUTS, MOVABLE, PINNED, RECLAIMABLE, SLOT, Setup};
use crate::sys::*;
use crate::uapi::{KVM_CAP_MEMFILE, MFD_INACCESSIBLE};
use crate::vm::{Exit, Private, Vm, region, small_pages};
use crate::{GIB, HUGE, MIB, PAGE, mem, suite};

pub static SUITE: Suite = suite!(
    "store",
    [
        guest_runs_on_its_pages,
        guest_runs_on_both_stores_at_once,
        consumer_is_notified_of_its_holes,
        consumer_gets_the_same_page_until_it_is_punched,
        page_that_is_held_outlives_its_hole,
        memory_comes_back,
        gets_the_flags_that_consumers_want,
        pages_migrate_unless_they_are_pinned,
        page_that_a_consumer_uses_does_not_migrate,
        consumer_is_asked_before_swap_and_notified_of_it,
        broken_page_is_lost_until_it_is_punched,
        error_that_no_consumer_knows_is_eio,
        files_keep_the_rules_of_memfiles,
        device_pins_no_page_of_a_memfile,
        device_gets_a_page_that_fallocate_left_cleared,
        file_with_the_page_cache_of_a_memfile_is_that_memfile,
        exclusive_ranges_are_each_files_own,
        files_without_a_store_are_still_refused,
        registered_twice_is_ebusy,
        unregistered_one_keeps_its_bindings_and_gets_no_new_ones,
        unregistering_races_with_binding,
        modules_stay_while_they_are_used,
        store_cannot_be_loaded_without_memfile,
    ]
);

const FILE: u64 = MIB;
const PAGES: u64 = FILE / PAGE;
const ALL: Span = Span::same(0, PAGES);

/// memfile_store.ko beside memfile.ko.
struct Stores {
    // Dropped in this order: each uses the next.
    store: Store,
    module: Module,
    core: Module,
}

impl Stores {
    fn new() -> Result<Stores> {
        let core = Module::memfile()?;
        let module = Module::store()?;
        module.load().context("load memfile_store.ko")?;
        Ok(Stores { store: Store::open()?, module, core })
    }

    fn file(&self) -> Result<OwnedFd> {
        self.store.create(FILE)
    }
}

/// Punch a hole into a file that the guest has filled, and look at both sides of its edges.
fn punch_and_verify(s: &mut Setup, offset: u64) -> Result<()> {
    punch(&s.fd, offset + 8 * PAGE, 8 * PAGE)?;
    let gpa = s.slot.gpa;
    s.vcpu.verify(gpa, 8 * PAGE, GUEST)?;
    s.vcpu.verify(gpa + 8 * PAGE, 8 * PAGE, Pattern::ZERO)?;
    s.vcpu.verify(gpa + 16 * PAGE, s.slot.size - 16 * PAGE, GUEST)
}

fn guest_runs_on_its_pages() -> CaseResult {
    let stores = Stores::new()?;
    for layout in [LAYOUTS[0], LAYOUTS[4]] {
        let fd = stores.store.create(layout.offset + 2 * FILE)?;
        let vm = Vm::protected()?;
        let mut s = Setup::on_file(vm, Private::Memfile, fd, FILE, layout)?;
        mem::refresh_counters();
        let before = mem::meminfo("Shmem")?;
        s.vcpu.verify(s.slot.gpa, FILE, Pattern::ZERO)?;
        s.fill_both()?;
        let given = mem::counter("get_pfn")?;
        punch_and_verify(&mut s, layout.offset).with_context(|| format!("{layout:x?}"))?;
        let again = mem::counter("get_pfn")? - given;
        ensure!(again >= 8, "{again} pages given for a hole of 8");
        mem::refresh_counters();
        let grown = mem::meminfo("Shmem")?.saturating_sub(before);
        ensure!(grown < FILE, "shmem has grown by {grown} bytes");
        // The flags belong to the file, not to the slot.
        s.vm.raw_delete(SLOT)?;
        s.bind_again()?;
        s.vcpu.verify(s.slot.gpa + 8 * PAGE, 8 * PAGE, Pattern::ZERO)?;
        s.vcpu.verify(s.slot.gpa + 16 * PAGE, FILE - 16 * PAGE, GUEST)?;
    }
    Ok(())
}

/// Two slots of one VM, a hole in one file and then in the other: the guest loses only these pages.
fn guest_runs_on_both_stores_at_once() -> CaseResult {
    let _pages = base_pages()?;
    const HOLE: u64 = 64 * PAGE;
    let stores = Stores::new()?;
    let files = [memfile(FILE)?, stores.file()?];
    let vm = Vm::protected()?;
    // Next to each other, so that the guest goes from one to the other.
    let slots = [GIB, GIB + FILE];
    for (id, (fd, gpa)) in (1..).zip(files.iter().zip(slots)) {
        vm.add_private(id, gpa, FILE, Private::Memfile, fd, 0)?;
    }
    vm.set_private(GIB, 2 * FILE)?;
    let mut vcpu = vm.vcpu(0)?;
    vcpu.fill(GIB, 2 * FILE, GUEST)?;
    vcpu.verify(GIB, 2 * FILE, GUEST)?;
    expect_allocated(&files[0], FILE, "shmem has the pages of its own slot only")?;
    punch(&files[1], 0, HOLE)?;
    vcpu.verify(GIB, FILE, GUEST).context("a hole in the other store's file")?;
    vcpu.verify(slots[1], HOLE, Pattern::ZERO)?;
    punch(&files[0], FILE - HOLE, HOLE)?;
    vcpu.verify(GIB, FILE - HOLE, GUEST)?;
    vcpu.verify(slots[1] - HOLE, 2 * HOLE, Pattern::ZERO).context("a hole beside the other")?;
    vcpu.verify(slots[1] + HOLE, FILE - HOLE, GUEST)
}

fn consumer_is_notified_of_its_holes() -> CaseResult {
    let stores = Stores::new()?;
    let fd = stores.file()?;
    let mapper = Consumer::bound(&fd, MAPPER, Span { pgoff: 8, pages: 8, frame: 100 })?;
    let observer = Consumer::bound(&fd, Mode::Observer, ALL)?;
    for (start, len) in [(0, 8), (16, PAGES), (10, 2), (0, 9), (10, PAGES)] {
        punch(&fd, start * PAGE, len * PAGE)?;
    }
    expect_errno("unaligned", punch(&fd, 1, PAGE), &[Errno::EINVAL])?;
    expect_errno("allocation", allocate(&fd, 0, PAGE), &[Errno::EOPNOTSUPP])?;
    mapper.expect_callbacks(&[(102, 104), (100, 101), (102, 108)])?;
    observer.expect_callbacks(&[(0, 8), (16, PAGES), (10, 12), (0, 9), (10, PAGES)])
}

fn consumer_gets_the_same_page_until_it_is_punched() -> CaseResult {
    let stores = Stores::new()?;
    let fd = stores.file()?;
    let mapper = Consumer::bound(&fd, MAPPER, Span { pgoff: 8, pages: 8, frame: 100 })?;
    let pages = (100..108).map(|frame| mapper.get(frame)).collect::<SysResult<Vec<_>>>()?;
    for (i, page) in pages.iter().enumerate() {
        ensure!(!pages[..i].contains(page), "one page for two frames: {pages:?}");
        ensure!(page.order == 0, "{page:?}");
    }
    let again = (100..108).map(|frame| mapper.get(frame)).collect::<SysResult<Vec<_>>>()?;
    ensure!(again == pages, "{again:?}, and {pages:?} before");
    for frame in [0, 8, 99, 108, u64::MAX] {
        expect_errno(&format!("frame {frame}"), mapper.get(frame), &[Errno::EINVAL])?;
    }
    // Each file has its own pages.
    let other = Consumer::bound(&stores.file()?, MAPPER, ALL)?;
    ensure!(!pages.contains(&other.get(8)?), "one page for two files");
    punch(&fd, 8 * PAGE, PAGE)?;
    mapper.get(100).context("the page that was punched")?;
    ensure!(mapper.get(101)? == pages[1], "the hole took its neighbour");
    Ok(())
}

/// Rule 13: the reference keeps the memory. The debug kernel detects a double release.
fn page_that_is_held_outlives_its_hole() -> CaseResult {
    let stores = Stores::new()?;
    let fd = stores.file()?;
    let mapper = Consumer::bound(&fd, MAPPER, ALL)?;
    let given = mem::counter("get_pfn")?;
    thread::scope(|scope| {
        let holder = scope.spawn(|| mapper.hold(5));
        while mem::counter("get_pfn")? == given && !holder.is_finished() {
            thread::yield_now();
        }
        while !holder.is_finished() {
            punch(&fd, 5 * PAGE, PAGE)?;
        }
        holder.join().map_err(|_| anyhow!("the holder panicked"))??;
        mapper.expect_balanced()
    })?;
    let pages = (0..PAGES).map(|frame| mapper.get(frame)).collect::<SysResult<Vec<_>>>()?;
    let mut pfns: Vec<u64> = pages.iter().map(|page| page.pfn).collect();
    pfns.sort_unstable();
    pfns.dedup();
    ensure!(pfns.len() as u64 == PAGES, "{} different pages for {PAGES} frames", pfns.len());
    Ok(())
}

fn memory_comes_back() -> CaseResult {
    const SIZE: u64 = 32 * MIB;
    const NOISE: u64 = 4 * MIB;
    let stores = Stores::new()?;
    let before = mem::free()?;
    let fd = stores.store.create(SIZE)?;
    let mapper = Consumer::bound(&fd, MAPPER, Span::same(0, SIZE / PAGE))?;
    (0..SIZE / PAGE).try_for_each(|frame| mapper.get(frame).map(drop))?;
    let expect_used = |wanted: u64, when: &str| -> Result<()> {
        let used = before.saturating_sub(mem::free()?);
        ensure!(used.abs_diff(wanted) < NOISE, "{when}: {used} bytes used, wanted {wanted}");
        Ok(())
    };
    expect_used(SIZE, "all pages given")?;
    punch(&fd, 0, SIZE / 2)?;
    expect_used(SIZE / 2, "half of it punched")?;
    drop(fd);
    expect_used(SIZE / 2, "closed while it is bound")?;
    mapper.unbind()?;
    expect_used(0, "closed and unbound")
}

fn gets_the_flags_that_consumers_want() -> CaseResult {
    let stores = Stores::new()?;
    let fd = stores.file()?;
    let expect = |flags: u64, movable: bool, left: u64, when: &str| -> Result<()> {
        let (wanted, told) = (Wanted { flags, movable, left }, store::wanted(&fd)?);
        ensure!(told == wanted, "{when}: told {told:x?}, wanted {wanted:x?}");
        Ok(())
    };
    let mapper = Consumer::bound(&fd, Mode::Mapper(BOTH), Span::same(0, 8))?;
    expect(BOTH, true, 0, "bound as movable and reclaimable")?;
    mapper.unbind()?;
    expect(BOTH, false, 0, "unbound")?;
    // Pages may lie in areas for movable memory, and have to leave them from now on.
    mapper.bind(&fd, MAPPER, Span::same(0, 8))?;
    expect(PINNED, false, 1, "bound as pinned")?;
    let observer = Consumer::bound(&fd, Mode::Observer, ALL)?;
    observer.unbind()?;
    expect(PINNED, false, 1, "observed")
}

/// A guest of these flags on a file of the store, which it has filled.
fn guest_with(flags: u64, stores: &Stores) -> Result<Setup> {
    let vm = Vm::protected()?;
    vm.raw_enable_cap(KVM_CAP_MEMFILE, flags).with_context(|| format!("choose {flags:#x}"))?;
    let mut s = Setup::on_file(vm, Private::Memfile, stores.file()?, FILE, LAYOUTS[0])?;
    s.vcpu.fill(s.slot.gpa, FILE, GUEST)?;
    Ok(s)
}

/// By how much these counters grow during `work`.
fn counted<const N: usize>(
    names: [&str; N],
    work: impl FnOnce() -> Result<()>,
) -> Result<[u64; N]> {
    let read = || -> Result<Vec<u64>> { names.iter().map(|name| mem::counter(name)).collect() };
    let before = read()?;
    work()?;
    let after = read()?;
    Ok(std::array::from_fn(|i| after[i] - before[i]))
}

fn pages_migrate_unless_they_are_pinned() -> CaseResult {
    let stores = Stores::new()?;
    for (flags, moves) in [(PINNED, false), (RECLAIMABLE, false), (MOVABLE, true), (BOTH, true)] {
        let mut s = guest_with(flags, &stores)?;
        let observer = Consumer::bound(&s.fd, Mode::Observer, ALL)?;
        let counts = counted(["migrate", "migrate_error", "get_pfn"], || {
            for index in [0, 3, 3, PAGES - 1] {
                let moved = store::migrate(&s.fd, index);
                if moves {
                    moved.with_context(|| format!("migrate page {index}"))?;
                } else {
                    expect_errno(&format!("page {index}"), moved, &[Errno::EOPNOTSUPP])?;
                }
            }
            s.vcpu.verify(s.slot.gpa, FILE, GUEST)
        })?;
        let callbacks = if moves { &[(0, 1), (3, 4), (3, 4), (PAGES - 1, PAGES)][..] } else { &[] };
        observer.expect_callbacks(callbacks)?;
        // The guest has faulted in again only pages that have moved.
        let wanted = if moves { [4, 0, 3] } else { [0; 3] };
        ensure!(counts == wanted, "flags {flags:#x}: {counts:?}, wanted {wanted:?}");
        let hole = store::migrate(stores.file()?, 0);
        expect_errno("a hole", hole, &[Errno::ENOENT])?;
    }
    Ok(())
}

/// KVM writes to a page to which it has a reference, of which no mapping tells.
fn page_that_a_consumer_uses_does_not_migrate() -> CaseResult {
    let stores = Stores::new()?;
    let file = stores.file()?;
    let user = Consumer::bound(&file, Mode::Mapper(MOVABLE), ALL)?;
    let given = mem::counter("get_pfn")?;
    let (used, attempt) = thread::scope(|scope| -> Result<_> {
        // Until the end of the invalidation that is the attempt's.
        let use_it = scope.spawn(|| user.hold(5));
        while mem::counter("get_pfn")? == given && !use_it.is_finished() {
            thread::yield_now();
        }
        let attempt = store::migrate(&file, 5);
        Ok((use_it.join().map_err(|_| anyhow!("the thread panicked"))?, attempt))
    })?;
    expect_errno("a page that is used", attempt, &[Errno::EAGAIN])?;
    let (used, now) = (used.context("hold")?, user.get(5).context("get")?);
    ensure!(now.pfn == used.pfn, "the page is at {:#x}, not at {:#x}", now.pfn, used.pfn);
    store::migrate(&file, 5).context("a page that nobody uses")
}

fn consumer_is_asked_before_swap_and_notified_of_it() -> CaseResult {
    let stores = Stores::new()?;
    let mut s = guest_with(BOTH, &stores)?;
    let observer = Consumer::bound(&s.fd, Mode::Observer, ALL)?;
    ensure!(store::referenced(&s.fd, 5)?, "the guest has just written the page");
    ensure!(!store::referenced(&s.fd, 5)?, "used again, while no vCPU runs");
    s.vcpu.verify(s.slot.gpa + 5 * PAGE, PAGE, GUEST)?;
    ensure!(store::referenced(&s.fd, 5)?, "the guest has read the page");
    let counts = counted(["swap_out", "swap_out_undone", "young", "get_pfn"], || {
        store::write_out(&s.fd, 5, false)?;
        store::write_out(&s.fd, 6, true)?;
        s.vcpu.verify(s.slot.gpa, FILE, GUEST)
    })?;
    ensure!(counts == [1, 1, 0, 2], "{counts:?}");
    let callbacks = observer.callbacks()?.events;
    let mut wanted = vec![Event::Young(5, 6); 3];
    wanted.extend([5, 6].iter().flat_map(|&n| [Event::Start(n, n + 1), Event::End(n, n + 1)]));
    ensure!(callbacks == wanted, "callbacks {callbacks:?}, wanted {wanted:?}");
    Ok(())
}

fn broken_page_is_lost_until_it_is_punched() -> CaseResult {
    let stores = Stores::new()?;
    let mut s = guest_with(PINNED, &stores)?;
    let gpa = s.slot.gpa + 9 * PAGE;
    let counts = counted(["poison"], || Ok(store::break_page(&s.fd, 9)?))?;
    ensure!(counts == [1], "{counts:?}");
    for _ in 0..2 {
        let exit = s.vcpu.start(Command::Load, &[gpa])?;
        let Exit::MemoryFault { errno, gpa: at, .. } = exit else {
            bail!("the access ended with {exit:x?}");
        };
        ensure!(errno == Errno::EHWPOISON && at == gpa, "{exit:x?}");
        s.vcpu.restart()?;
    }
    s.vcpu.verify(s.slot.gpa, 9 * PAGE, GUEST)?;
    s.vcpu.verify(gpa + PAGE, FILE - 10 * PAGE, GUEST)?;
    punch(&s.fd, 9 * PAGE, PAGE)?;
    s.vcpu.verify(gpa, PAGE, Pattern::ZERO)
}

/// `EAGAIN` would let KVM wait for a page that it did not get, `EINTR` and `EFAULT` mean something
/// else to a VMM, and 512 is no errno of userspace.
fn error_that_no_consumer_knows_is_eio() -> CaseResult {
    let stores = Stores::new()?;
    let fd = stores.file()?;
    let vm = Vm::protected()?;
    let mut s = Setup::on_file(vm, Private::Memfile, fd, FILE, LAYOUTS[0])?;
    let gpa = s.slot.gpa;
    let known = [Errno::ENOMEM, Errno::ENOSPC, Errno::EHWPOISON, Errno::EIO];
    let unknown = [Errno::EAGAIN, Errno::EBUSY, Errno::EFAULT, Errno::EINTR, Errno(512)];
    for errno in known.into_iter().chain(unknown) {
        let wanted = if known.contains(&errno) { errno } else { Errno::EIO };
        store::fail(&s.fd, errno.0)?;
        let exit = s.vcpu.start(Command::Load, &[gpa])?;
        ensure!(
            matches!(exit, Exit::MemoryFault { errno, gpa: at, .. } if (errno, at) == (wanted, gpa)),
            "{errno}: {exit:x?}"
        );
        expect_errno("a pre-fault", s.vcpu.raw_pre_fault(gpa, PAGE).0, &[wanted])?;
        store::fail(&s.fd, 0)?;
        let exit = s.vcpu.run()?;
        ensure!(exit == Exit::Done && s.vcpu.result(0) == 0, "{errno}, then: {exit:x?}");
        punch(&s.fd, 0, PAGE)?;
    }
    Ok(())
}

fn files_keep_the_rules_of_memfiles() -> CaseResult {
    let stores = Stores::new()?;
    let s = guest_with(PINNED, &stores)?;
    let counts = counted(["punch"], || {
        for (what, offset, len) in [("its start", 1, PAGE), ("its length", 0, PAGE + 8)] {
            expect_errno(what, punch(&s.fd, offset, len), &[Errno::EINVAL])?;
        }
        let past = fallocate(&s.fd, 0, 0, FILE + PAGE);
        expect_errno("allocation past the end", past, &[Errno::EINVAL])?;
        let zero = fallocate(&s.fd, libc::FALLOC_FL_ZERO_RANGE, 0, PAGE);
        expect_errno("another mode", zero, &[Errno::EOPNOTSUPP])?;
        Ok(punch(&s.fd, 0, 4 * PAGE)?)
    })?;
    ensure!(counts == [1], "{counts:?}");
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", s.fd.as_raw_fd()))?;
    for line in [format!("memfile-flags:\t{PINNED:#x}"), "memfile-bindings:\t1".to_owned()] {
        ensure!(info.lines().any(|l| l == line), "no line {line:?} in {info:?}");
    }
    Ok(())
}

/// A request for a slot with all of a file.
fn bind_slot(vm: &Vm, fd: impl AsFd) -> SysResult<()> {
    let view = small_pages(FILE).map_err(|_| Errno::ENOMEM)?;
    vm.raw_set_region(&region(SLOT, GIB, &view, Some((Private::Memfile, fd.as_fd(), 0))))
}

/// The store's module stands for the device.
fn device_pins_no_page_of_a_memfile() -> CaseResult {
    let stores = Stores::new()?;
    stores.store.pin(memfd(FILE)?).context("of an ordinary memfd")?;
    let (private, huge) = (memfile(FILE)?, pool(HUGE, 1)?);
    allocate(&private, 0, FILE)?;
    expect_errno("of a memfile", stores.store.pin(&private), &[Errno::EPERM])?;

    let ordinary = memfd_create(memfile_huge_flags(HUGE) & !MFD_INACCESSIBLE)?;
    ftruncate(&ordinary, HUGE)?;
    stores.store.pin(&ordinary).context("of an ordinary huge page")?;
    drop(ordinary);
    let private = file(HUGE, 1)?;
    allocate(&private, 0, HUGE)?;
    expect_errno("of a memfile's huge page", stores.store.pin(&private), &[Errno::EPERM])?;
    drop(private);
    drop(huge);
    let other = stores.store.pin(stores.file()?);
    expect_errno("of another store", other, &[Errno::EINVAL])
}

/// The shared side of a guest is an ordinary memfd, and fallocate() fills it.
fn device_gets_a_page_that_fallocate_left_cleared() -> CaseResult {
    let (stores, ordinary) = (Stores::new()?, memfd(FILE)?);
    allocate(&ordinary, 0, FILE)?;
    stores.store.pin(&ordinary).context("of an ordinary memfd")
}

/// The inode of some files is not that of their pages. What counts is whose pages they are.
fn file_with_the_page_cache_of_a_memfile_is_that_memfile() -> CaseResult {
    let _pages = base_pages()?;
    let stores = Stores::new()?;
    let vm = Vm::protected()?;
    let ordinary = memfd(FILE)?;
    allocate(&ordinary, 0, FILE)?;
    let alias = stores.store.alias(&ordinary)?;
    let request = |fd: &OwnedFd, view: &Mapping| {
        region(SLOT, LAYOUTS[0].gpa, view, Some((Private::Memfile, fd.as_fd(), 0)))
    };
    let view = small_pages(FILE)?;
    let refused = vm.raw_set_region(&request(&alias, &view));
    expect_errno("that of an ordinary memfd", refused, &[Errno::EINVAL])?;
    expect_errno("to pin it", stores.store.pin(&alias), &[Errno::EINVAL])?;

    let fd = memfile(FILE)?;
    let alias = stores.store.alias(&fd)?;
    let (seals, of_alias) = (get_seals(&fd)?, get_seals(&alias)?);
    ensure!(of_alias == seals, "seals {of_alias:#x}, those of the memfile are {seals:#x}");
    expect_errno("to pin that of a memfile", stores.store.pin(&alias), &[Errno::EPERM])?;
    vm.raw_set_region(&request(&alias, &view)).context("bind that of a memfile")?;
    drop(alias);
    vm.set_private(LAYOUTS[0].gpa, FILE)?;
    let mut vcpu = vm.vcpu(0)?;
    vcpu.fill(LAYOUTS[0].gpa, FILE, GUEST)?;
    expect_allocated(&fd, FILE, "the guest has filled it")?;
    let again = Consumer::new()?.bind(&fd, MAPPER, ALL);
    expect_errno("the memfile itself", again, &[Errno::EEXIST])?;
    punch(&fd, 8 * PAGE, 8 * PAGE)?;
    vcpu.verify(LAYOUTS[0].gpa, 8 * PAGE, GUEST)?;
    vcpu.verify(LAYOUTS[0].gpa + 8 * PAGE, 8 * PAGE, Pattern::ZERO)
}

fn exclusive_ranges_are_each_files_own() -> CaseResult {
    let stores = Stores::new()?;
    let (fd, other) = (stores.file()?, stores.file()?);
    let vm = Vm::protected()?;
    bind_slot(&vm, &fd)?;
    let mapper = Consumer::new()?;
    for span in [ALL, Span::same(0, 1), Span::same(PAGES - 1, 1)] {
        expect_errno(&format!("{span:?}"), mapper.bind(&fd, MAPPER, span), &[Errno::EEXIST])?;
    }
    let past = Span::same(1, PAGES);
    expect_errno("past the end", mapper.bind(&fd, MAPPER, past), &[Errno::EINVAL])?;
    drop(Consumer::bound(&fd, Mode::Observer, ALL)?);
    for fd in [&other, &memfile(FILE)?] {
        mapper.bind(fd, MAPPER, ALL).context("another file")?;
        mapper.unbind()?;
    }
    drop(vm);
    mapper.bind(&fd, MAPPER, ALL).context("once the VM is gone")
}

fn files_without_a_store_are_still_refused() -> CaseResult {
    let stores = Stores::new()?;
    let vm = Vm::protected()?;
    let files = [
        ("a memfd", memfd(FILE)?),
        ("a file on tmpfs", tmpfs_file(FILE)?),
        ("a guest_memfd", vm.guest_memfd(FILE)?),
        ("/dev/null", open("/dev/null", libc::O_RDWR)?),
        ("an anonymous inode", vm.fd().try_clone_to_owned()?),
        ("the store's device", stores.store.as_fd().try_clone_to_owned()?),
    ];
    let consumer = Consumer::new()?;
    for (what, fd) in &files {
        expect_errno(what, bind_slot(&vm, fd), &[Errno::EINVAL])?;
        for mode in [Mode::Observer, MAPPER] {
            expect_errno(what, consumer.bind(fd, mode, ALL), &[Errno::EINVAL])?;
        }
    }
    // The refusals had no other cause.
    let fd = stores.file()?;
    bind_slot(&vm, &fd).context("the good one")
}

fn registered_twice_is_ebusy() -> CaseResult {
    let stores = Stores::new()?;
    for _ in 0..3 {
        expect_errno("register it again", stores.store.register(), &[Errno::EBUSY])?;
        drop(Consumer::bound(&stores.file()?, MAPPER, ALL)?);
        stores.store.unregister()?;
        let again = stores.store.unregister();
        expect_errno("unregister it again", again, &[Errno::EINVAL])?;
        stores.store.register()?;
    }
    Ok(())
}

fn unregistered_one_keeps_its_bindings_and_gets_no_new_ones() -> CaseResult {
    let stores = Stores::new()?;
    let vm = Vm::protected()?;
    let mut s = Setup::on_file(vm, Private::Memfile, stores.file()?, FILE, LAYOUTS[0])?;
    let observer = Consumer::bound(&s.fd, Mode::Observer, ALL)?;
    s.vcpu.fill(s.slot.gpa, FILE / 2, GUEST)?;
    stores.store.unregister()?;

    let consumer = Consumer::new()?;
    for (what, fd) in [("the file that is bound", &s.fd), ("a new file", &stores.file()?)] {
        let result = consumer.bind(fd, Mode::Observer, ALL);
        expect_errno(what, result, &[Errno::EINVAL])?;
        expect_errno(what, bind_slot(&Vm::protected()?, fd), &[Errno::EINVAL])?;
    }
    drop(memfile(FILE)?);

    // The guest gets pages that it has not touched yet, and loses those that are punched.
    s.vcpu.fill(s.slot.gpa + FILE / 2, FILE / 2, GUEST)?;
    punch_and_verify(&mut s, 0)?;
    observer.expect_callbacks(&[(8, 16)])?;

    s.vm.raw_delete(SLOT)?;
    ensure!(s.bind_again().is_err(), "bound again to a store that is not registered");
    stores.store.register()?;
    s.bind_again()?;
    s.vcpu.verify(s.slot.gpa + 16 * PAGE, FILE - 16 * PAGE, GUEST)?;
    observer.expect_balanced()
}

/// Files are made, bound, punched and closed while the store is registered and unregistered.
fn unregistering_races_with_binding() -> CaseResult {
    let stores = Stores::new()?;
    let stop = AtomicBool::new(false);
    let work = || -> Result<(u32, u32)> {
        let consumer = Consumer::new()?;
        let (mut bound, mut refused) = (0, 0);
        while bound + refused < 300 || bound == 0 || refused == 0 {
            ensure!(bound + refused < 20_000, "bound {bound} times, refused {refused} times");
            let fd = stores.file()?;
            match consumer.bind(&fd, MAPPER, ALL) {
                Ok(()) => bound += 1,
                Err(Errno::EINVAL) => {
                    refused += 1;
                    continue;
                }
                Err(errno) => bail!("bind: {errno}"),
            }
            consumer.get(7)?;
            punch(&fd, 0, FILE)?;
            drop(fd);
            consumer.get(7)?;
            consumer.unbind()?;
            consumer.expect_callbacks(&[(0, PAGES)])?;
        }
        Ok((bound, refused))
    };
    thread::scope(|scope| {
        let registrar = scope.spawn(|| -> Result<u32> {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) {
                stores.store.unregister()?;
                thread::yield_now();
                stores.store.register()?;
                thread::yield_now();
                rounds += 1;
            }
            Ok(rounds)
        });
        let workers: Vec<_> = (0..2).map(|_| scope.spawn(work)).collect();
        let results: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        stop.store(true, Ordering::Relaxed);
        let rounds = registrar.join().map_err(|_| anyhow!("the registrar panicked"))??;
        for result in results {
            let (bound, refused) = result.map_err(|_| anyhow!("a worker panicked"))??;
            println!("bound {bound} times, refused {refused} times");
        }
        println!("registered {rounds} times");
        Ok(())
    })
}

fn modules_stay_while_they_are_used() -> CaseResult {
    let Stores { store, module, core } = Stores::new()?;
    let both_in_use = |what: &str| {
        module.expect_in_use(what)?;
        core.expect_in_use(what)
    };
    both_in_use("the device open")?;
    drop(store);
    core.expect_in_use("a store registered")?;
    let store = Store::open()?;
    store.unregister()?;
    core.expect_in_use("a store loaded")?;
    store.register()?;

    let fd = store.create(FILE)?;
    drop(store);
    both_in_use("a file")?;
    let mapper = Consumer::bound(&fd, MAPPER, ALL)?;
    drop(fd);
    both_in_use("a binding")?;
    mapper.get(3).context("from a file that is closed")?;
    mapper.unbind()?;
    module.unload().context("after the binding")?;
    ensure!(Store::open().is_err(), "the device is still there");

    module.load()?;
    let vm = Vm::protected()?;
    bind_slot(&vm, Store::open()?.create(FILE)?)?;
    vm.set_private(GIB, FILE)?;
    let mut vcpu = vm.vcpu(0)?;
    vcpu.fill(GIB, FILE, GUEST)?;
    both_in_use("a slot")?;
    vcpu.verify(GIB, FILE, GUEST)?;
    drop((vcpu, vm));
    module.unload().context("after the VM")?;
    core.unload().context("after the store")
}

fn store_cannot_be_loaded_without_memfile() -> CaseResult {
    let Stores { store, module, core } = Stores::new()?;
    drop(store);
    module.unload()?;
    core.unload()?;
    expect_errno("load it alone", module.load(), &[Errno::ENOENT])?;
    core.load()?;
    module.load().context("load it again")
}
