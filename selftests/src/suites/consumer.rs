// SPDX-License-Identifier: GPL-2.0
//! The callbacks of consumers, seen by one that records them (rules 6 to 9, 13 to 15, 17 and 21).
//!
//! The consumer is a module of its own, `rust/test`; KVM is the other one.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use crate::consumer::{Consumer, DEVICE_FRAMES, Event, MAPPER, Mode, Span};
use crate::ktap::{CaseResult, Suite, skip};
use crate::module::Module;
use crate::pattern::{Pattern, Rng, seed};
use crate::pressure::base_pages;
use crate::support::setup::{GUEST, Setup};
use crate::support::wait::{sleeps_in, wait_for_vain_faults, wait_until};
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{Private, Vm};
use crate::{GIB, MIB, PAGE, mem, suite};

pub static SUITE: Suite = suite!(
    "consumer",
    [
        bad_bindings_are_refused,
        mapper_needs_a_writable_file_and_an_observer_does_not,
        mappers_exclude_each_other,
        mapper_and_kvm_exclude_each_other,
        observers_overlap_anything,
        observers_are_no_bindings_and_bring_no_flags,
        mapper_brings_its_flags,
        hole_is_one_start_and_one_end,
        hole_is_clipped_to_the_binding_and_told_in_frames,
        each_overlapping_binding_is_notified_of_its_own_part,
        allocation_and_refused_holes_notify_nobody,
        mapper_gets_the_same_page_until_it_is_punched,
        mapper_gets_no_page_outside_of_its_binding,
        page_reference_does_not_hold_up_a_hole,
        memory_failure_is_notified_and_the_page_is_refused,
        device_loses_what_is_punched_and_faults_it_in_again,
        device_never_keeps_a_page_that_left_the_file,
        pages_stay_until_the_callback_returns,
        vcpu_is_held_off_until_the_hole_is_done,
        unbinding_waits_for_the_callback_that_runs,
        unbinding_elsewhere_waits_for_nothing,
        binding_waits_for_a_hole_in_its_pages_only,
        vm_destruction_waits_for_no_other_consumer,
        no_callback_comes_after_unbinding,
        file_lives_as_long_as_its_observer,
        closing_the_device_unbinds,
        everything_goes_in_any_order,
        unload_is_refused_while_bound,
    ]
);

const FILE: u64 = MIB;
const PAGES: u64 = FILE / PAGE;
const ALL: Span = Span::same(0, PAGES);

fn punch_pages(fd: &OwnedFd, pages: std::ops::Range<u64>) -> Result<()> {
    let (offset, len) = (pages.start * PAGE, (pages.end - pages.start) * PAGE);
    punch(fd, offset, len).with_context(|| format!("punch pages {pages:?}"))
}

fn observer(fd: impl AsFd, span: Span) -> Result<Consumer> {
    Consumer::bound(fd, Mode::Observer, span)
}

/// A slot with all of the file.
fn bind_slot(vm: &Vm, fd: &OwnedFd) -> SysResult<()> {
    let view = Mapping::anonymous(FILE).map_err(|_| Errno::ENOMEM)?;
    vm.raw_set_region(&crate::vm::region(1, GIB, &view, Some((Private::Memfile, fd.as_fd(), 0))))
}

fn bad_bindings_are_refused() -> CaseResult {
    let module = Module::memfile()?;
    let fd = memfile(FILE)?;
    let consumer = Consumer::new()?;
    for mode in [Mode::Observer, MAPPER] {
        let refused = |what: &str, file: &OwnedFd, span: Span, wanted| {
            let what = format!("{mode:?} of {what}");
            expect_errno(&what, consumer.bind(file, mode, span), &[wanted])
        };
        refused("no page", &fd, Span::same(0, 0), Errno::EINVAL)?;
        refused("past the end", &fd, Span::same(1, PAGES), Errno::EINVAL)?;
        refused("behind the end", &fd, Span::same(PAGES, 1), Errno::EINVAL)?;
        let wraps = Span { pgoff: u64::MAX, pages: 2, frame: 0 };
        refused("pages that wrap", &fd, wraps, Errno::EINVAL)?;
        let wraps = Span { pgoff: 0, pages: 2, frame: u64::MAX };
        refused("frames that wrap", &fd, wraps, Errno::EINVAL)?;
        refused("an ordinary memfd", &memfd(FILE)?, ALL, Errno::EINVAL)?;
        refused("a pipe", &pipe()?.0, ALL, Errno::EINVAL)?;
        refused("a file without a size", &memfile_unsized()?, ALL, Errno::EINVAL)?;
        expect_errno("no file", consumer.raw_bind(9999, mode, ALL), &[Errno::EBADF])?;
    }
    for flags in [0, MEMFILE_F_UNMOVABLE, 1 << 4 | MEMFILE_F_ALL, 1 << 63 | MEMFILE_F_ALL] {
        let result = consumer.bind(&fd, Mode::Mapper(flags), ALL);
        expect_errno(&format!("flags {flags:#x}"), result, &[Errno::EINVAL])?;
    }
    // None of them left a binding behind.
    consumer.bind(&fd, MAPPER, ALL).context("the good one")?;
    drop((consumer, fd));
    module.expect_unused()
}

fn mapper_needs_a_writable_file_and_an_observer_does_not() -> CaseResult {
    let fd = memfile(FILE)?;
    let reader = reopen(&fd, libc::O_RDONLY)?;
    let consumer = Consumer::new()?;
    expect_errno("mapper", consumer.bind(&reader, MAPPER, ALL), &[Errno::EACCES])?;
    consumer.bind(&reader, Mode::Observer, ALL).context("observer")?;
    punch_pages(&fd, 0..1)?;
    consumer.expect_callbacks(&[(0, 1)])
}

/// Ranges that overlap pages 64 to 128, in every way.
const OVERLAPS: [(u64, u64); 8] =
    [(64, 64), (80, 8), (64, 1), (127, 1), (0, PAGES), (0, 65), (127, 32), (63, 66)];
/// Ranges beside them.
const NEIGHBOURS: [(u64, u64); 4] = [(0, 64), (128, 128), (63, 1), (128, 1)];

fn mappers_exclude_each_other() -> CaseResult {
    let fd = memfile(FILE)?;
    let first = Consumer::bound(&fd, MAPPER, Span::same(64, 64))?;
    let second = Consumer::new()?;
    for (pgoff, pages) in OVERLAPS {
        let span = Span { pgoff, pages, frame: 1 << 40 };
        let what = format!("pages {pgoff}+{pages}");
        expect_errno(&what, second.bind(&fd, MAPPER, span), &[Errno::EEXIST])?;
    }
    for (pgoff, pages) in NEIGHBOURS {
        let span = Span { pgoff, pages, frame: 64 };
        second.bind(&fd, MAPPER, span).with_context(|| format!("pages {pgoff}+{pages}"))?;
        second.unbind()?;
    }
    first.unbind()?;
    second.bind(&fd, MAPPER, ALL).context("all pages once they are free")
}

fn mapper_and_kvm_exclude_each_other() -> CaseResult {
    let fd = memfile(FILE)?;
    let vm = Vm::protected()?;
    let slot = vm.add_private(1, GIB, 64 * PAGE, Private::Memfile, &fd, 64 * PAGE)?;
    let mapper = Consumer::new()?;
    for (pgoff, pages) in OVERLAPS {
        let result = mapper.bind(&fd, MAPPER, Span::same(pgoff, pages));
        expect_errno(&format!("pages {pgoff}+{pages}"), result, &[Errno::EEXIST])?;
    }
    for (pgoff, pages) in NEIGHBOURS {
        let result = mapper.bind(&fd, MAPPER, Span::same(pgoff, pages));
        result.with_context(|| format!("pages {pgoff}+{pages}"))?;
        mapper.unbind()?;
    }
    vm.delete(slot)?;
    mapper.bind(&fd, MAPPER, Span::same(100, 1)).context("once the slot is gone")?;
    expect_errno("slot over a mapper", bind_slot(&vm, &fd), &[Errno::EEXIST])?;
    mapper.unbind()?;
    bind_slot(&vm, &fd).context("slot once the mapper is gone")?;
    drop(vm);
    mapper.bind(&fd, MAPPER, ALL).context("once the VM is gone")
}

fn observers_overlap_anything() -> CaseResult {
    let fd = memfile(FILE)?;
    let vm = Vm::protected()?;
    let before = observer(&fd, ALL)?;
    bind_slot(&vm, &fd).context("slot over an observer")?;
    let after = observer(&fd, ALL)?;
    vm.raw_delete(1)?;
    let mapper = Consumer::bound(&fd, MAPPER, ALL)?;
    let inside = observer(&fd, Span::same(10, 10))?;
    let same = observer(&fd, Span::same(10, 10))?;
    punch_pages(&fd, 12..13)?;
    for consumer in [&before, &after, &mapper, &inside, &same] {
        consumer.expect_callbacks(&[(12, 13)])?;
    }
    Ok(())
}

/// Flags and bindings of a file, as fdinfo has them.
fn expect_fdinfo(fd: &OwnedFd, flags: u64, bindings: u64, when: &str) -> Result<()> {
    let line = |key: &str| -> Result<String> {
        mem::fdinfo(fd, key)?.with_context(|| format!("fdinfo has no {key}"))
    };
    let got = (line("memfile-flags")?, line("memfile-bindings")?);
    let wanted = (format!("{flags:#x}"), bindings.to_string());
    ensure!(got == wanted, "{when}: flags and bindings are {got:?}, wanted {wanted:?}");
    Ok(())
}

fn observers_are_no_bindings_and_bring_no_flags() -> CaseResult {
    let fd = memfile(FILE)?;
    let observer = observer(&fd, ALL)?;
    expect_fdinfo(&fd, MEMFILE_F_USER_INACCESSIBLE, 0, "with an observer")?;
    let mapper = Consumer::bound(&fd, MAPPER, ALL)?;
    expect_fdinfo(&fd, MEMFILE_F_ALL, 1, "with a mapper as well")?;
    mapper.unbind()?;
    expect_fdinfo(&fd, MEMFILE_F_ALL, 0, "with the observer left")?;
    // An observer does not keep a mapper from asking for less.
    let mapper = Consumer::bound(&fd, Mode::Mapper(MEMFILE_F_USER_INACCESSIBLE), ALL)?;
    expect_fdinfo(&fd, MEMFILE_F_USER_INACCESSIBLE, 1, "with another mapper")?;
    mapper.unbind()?;
    observer.unbind()?;
    expect_fdinfo(&fd, MEMFILE_F_USER_INACCESSIBLE, 0, "without a binding")
}

fn mapper_brings_its_flags() -> CaseResult {
    let fd = memfile(FILE)?;
    let vm = Vm::protected()?;
    let flags = MEMFILE_F_USER_INACCESSIBLE | MEMFILE_F_UNMOVABLE;
    let first = Consumer::bound(&fd, Mode::Mapper(flags), Span::same(0, 1))?;
    expect_fdinfo(&fd, flags, 1, "the first mapper")?;
    let second = Consumer::new()?;
    let less = Mode::Mapper(MEMFILE_F_USER_INACCESSIBLE);
    expect_errno("less", second.bind(&fd, less, Span::same(1, 1)), &[Errno::EINVAL])?;
    second.bind(&fd, Mode::Mapper(flags), Span::same(1, 1)).context("the same flags")?;
    first.unbind()?;
    expect_fdinfo(&fd, flags, 1, "the second mapper alone")?;
    let view = Mapping::anonymous(PAGE)?;
    let slot = crate::vm::region(1, GIB, &view, Some((Private::Memfile, fd.as_fd(), 2 * PAGE)));
    vm.raw_set_region(&slot).context("KVM's default flags, which are more")?;
    expect_fdinfo(&fd, MEMFILE_F_ALL, 2, "with KVM")?;
    second.unbind()?;
    let same = second.bind(&fd, Mode::Mapper(flags), Span::same(1, 1));
    expect_errno("what it had, beside KVM", same, &[Errno::EINVAL])?;
    vm.raw_delete(1)?;
    second.bind(&fd, Mode::Mapper(flags), Span::same(1, 1)).context("with no binding or page")?;
    expect_fdinfo(&fd, flags, 1, "the second mapper again")
}

fn hole_is_one_start_and_one_end() -> CaseResult {
    let fd = memfile(FILE)?;
    for mode in [Mode::Observer, MAPPER] {
        // One start and one end, however many pages it has.
        for allocated in [0, 1, PAGES] {
            (0..allocated).try_for_each(|page| allocate(&fd, page * PAGE, PAGE))?;
            let consumer = Consumer::bound(&fd, mode, ALL)?;
            punch_pages(&fd, 0..PAGES)?;
            let callbacks = consumer.callbacks()?.events;
            let wanted = [Event::Start(0, PAGES), Event::End(0, PAGES)];
            ensure!(callbacks == wanted, "{mode:?}, {allocated} pages allocated: {callbacks:?}");
        }
    }
    Ok(())
}

fn hole_is_clipped_to_the_binding_and_told_in_frames() -> CaseResult {
    let fd = memfile(FILE)?;
    // Frames below, at and above the file's pages.
    for frame in [0, 32, 1000, u64::MAX - 16] {
        let consumer = observer(&fd, Span { pgoff: 32, pages: 16, frame })?;
        let callbacks = |start: u64, end: u64| (frame + start, frame + end);
        let holes = [
            (0..32, None),
            (48..PAGES, None),
            (48..PAGES + 10, None),
            (0..33, Some(callbacks(0, 1))),
            (47..64, Some(callbacks(15, 16))),
            (31..33, Some(callbacks(0, 1))),
            (40..41, Some(callbacks(8, 9))),
            (32..48, Some(callbacks(0, 16))),
            (0..PAGES, Some(callbacks(0, 16))),
            (0..PAGES + 10, Some(callbacks(0, 16))),
        ];
        for (hole, _) in &holes {
            punch_pages(&fd, hole.clone())?;
        }
        let wanted: Vec<_> = holes.iter().filter_map(|&(_, callbacks)| callbacks).collect();
        consumer.expect_callbacks(&wanted).with_context(|| format!("frame {frame}"))?;
    }
    Ok(())
}

fn each_overlapping_binding_is_notified_of_its_own_part() -> CaseResult {
    let fd = memfile(FILE)?;
    let consumers = (0..16)
        .map(|i| {
            let mode = if i % 2 == 0 { MAPPER } else { Mode::Observer };
            Consumer::bound(&fd, mode, Span { pgoff: 8 * i, pages: 8, frame: 100 * i })
        })
        .collect::<Result<Vec<_>>>()?;
    punch_pages(&fd, 20..44)?;
    for (i, consumer) in (0..).zip(&consumers) {
        let (start, end) = ((8 * i).max(20), (8 * i + 8).min(44));
        let frames = |page: u64| 100 * i + page - 8 * i;
        let wanted = (start < end).then(|| (frames(start), frames(end)));
        consumer.expect_callbacks(wanted.as_slice()).with_context(|| format!("consumer {i}"))?;
    }
    Ok(())
}

fn allocation_and_refused_holes_notify_nobody() -> CaseResult {
    let fd = memfile(FILE)?;
    let mapper = Consumer::bound(&fd, MAPPER, ALL)?;
    let observer = observer(&fd, ALL)?;
    allocate(&fd, 0, FILE)?;
    allocate(&fd, 0, FILE)?;
    mapper.get(3)?;
    expect_errno("unaligned hole", punch(&fd, 1, PAGE), &[Errno::EINVAL])?;
    expect_errno("truncation", ftruncate(&fd, 0), &[Errno::EPERM])?;
    expect_errno("allocation past the end", allocate(&fd, FILE, PAGE), &[Errno::EINVAL])?;
    mapper.expect_callbacks(&[])?;
    observer.expect_callbacks(&[])
}

fn mapper_gets_the_same_page_until_it_is_punched() -> CaseResult {
    let _pages = base_pages()?;
    let fd = memfile(FILE)?;
    let mapper = Consumer::bound(&fd, MAPPER, Span { pgoff: 8, pages: 8, frame: 1000 })?;
    let first = mapper.get(1002)?;
    expect_allocated(&fd, PAGE, "the page got was allocated")?;
    for _ in 0..3 {
        ensure!(mapper.get(1002)? == first, "another page");
    }
    ensure!(mapper.get(1003)?.pfn != first.pfn, "one page for two frames");
    // Only file page 10 was allocated.
    punch_pages(&fd, 10..11)?;
    expect_allocated(&fd, PAGE, "one of two punched")?;
    mapper.get(1002)?;
    expect_allocated(&fd, 2 * PAGE, "got again")
}

fn mapper_gets_no_page_outside_of_its_binding() -> CaseResult {
    let fd = memfile(FILE)?;
    let mapper = Consumer::bound(&fd, MAPPER, Span { pgoff: 8, pages: 8, frame: 1000 })?;
    for frame in [0, 8, 999, 1008, u64::MAX] {
        expect_errno(&format!("frame {frame}"), mapper.get(frame), &[Errno::EINVAL])?;
    }
    expect_allocated(&fd, 0, "refused")
}

/// Rule 13: only the notifier keeps a page valid. A reference keeps the memory, not the page.
fn page_reference_does_not_hold_up_a_hole() -> CaseResult {
    let _pages = base_pages()?;
    let fd = memfile(FILE)?;
    let mapper = Consumer::bound(&fd, MAPPER, ALL)?;
    thread::scope(|scope| {
        let holder = scope.spawn(|| mapper.hold(5));
        // The page is there once it is held; the next hole lets it go.
        while allocated(&fd)? == 0 && !holder.is_finished() {
            thread::yield_now();
        }
        while !holder.is_finished() {
            punch_pages(&fd, 5..6)?;
        }
        holder.join().map_err(|_| anyhow!("the holder panicked"))??;
        expect_allocated(&fd, 0, "punched while it was held")?;
        mapper.expect_balanced()
    })
}

fn memory_failure_is_notified_and_the_page_is_refused() -> CaseResult {
    let inject = "/sys/kernel/debug/hwpoison/corrupt-pfn";
    if !std::path::Path::new(inject).exists() {
        return skip(format!("no {inject}"));
    }
    let fd = memfile(FILE)?;
    let mapper = Consumer::bound(&fd, MAPPER, ALL)?;
    let observer = observer(&fd, Span::same(0, 8))?;
    let page = mapper.get(7)?;
    mapper.get(8)?;
    std::fs::write(inject, format!("{:#x}", page.pfn)).context(inject)?;
    observer.expect_callbacks(&[(7, 8)])?;
    mapper.expect_callbacks(&[(7, 8)])?;
    expect_errno("get the poisoned page", mapper.get(7), &[Errno::EHWPOISON])?;
    mapper.get(8).context("its neighbour")?;
    punch_pages(&fd, 7..8)?;
    ensure!(mapper.get(7)?.pfn != page.pfn, "the poisoned page came back");
    Ok(())
}

fn device_loses_what_is_punched_and_faults_it_in_again() -> CaseResult {
    let _pages = base_pages()?;
    let fd = memfile(FILE)?;
    let device = Consumer::bound(&fd, Mode::Device, ALL)?;
    let pfns = (0..DEVICE_FRAMES).map(|f| device.fault(f)).collect::<SysResult<Vec<_>>>()?;
    expect_allocated(&fd, DEVICE_FRAMES * PAGE, "all frames faulted in")?;
    punch_pages(&fd, 8..24)?;
    for (frame, &pfn) in (0..).zip(&pfns) {
        let wanted = (!(8..24).contains(&frame)).then_some(pfn);
        let got = device.entry(frame)?;
        ensure!(got == wanted, "frame {frame}: entry {got:x?}, wanted {wanted:x?}");
    }
    let pfn = device.fault(8)?;
    ensure!(device.entry(8)? == Some(pfn));
    expect_errno("frame outside", device.fault(DEVICE_FRAMES), &[Errno::EINVAL])
}

/// Run `work` while other threads punch random holes. Every hole is complete when this returns.
fn while_punching<R>(fd: &OwnedFd, seed: u64, work: impl FnOnce() -> Result<R>) -> Result<R> {
    let stop = AtomicBool::new(false);
    let holes = AtomicU64::new(0);
    thread::scope(|scope| {
        let punchers: Vec<_> = (0..2)
            .map(|i| {
                let mut rng = Rng::new(seed ^ (i + 1));
                let (stop, holes) = (&stop, &holes);
                scope.spawn(move || -> Result<()> {
                    while !stop.load(Ordering::Relaxed) {
                        let start = rng.below(PAGES);
                        punch_pages(fd, start..start + 1 + rng.below(PAGES - start))?;
                        holes.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let result = work();
        stop.store(true, Ordering::Relaxed);
        for puncher in punchers {
            puncher.join().map_err(|_| anyhow!("a puncher panicked"))??;
        }
        println!("{} holes meanwhile", holes.load(Ordering::Relaxed));
        result
    })
}

/// The protocol that every driver must keep, kept by the example: look, get, look again, map. If
/// it did not look again, it would sooner or later map a page that a hole has just taken.
fn device_never_keeps_a_page_that_left_the_file() -> CaseResult {
    let _pages = base_pages()?;
    const ROUNDS: u32 = 1000;
    let seed = seed();
    let fd = memfile(FILE)?;
    let device = Consumer::bound(&fd, Mode::Device, ALL)?;
    let (start, end) = (Barrier::new(2), Barrier::new(2));
    let delay = |rng: &mut Rng| (0..rng.below(2000)).for_each(|_| std::hint::spin_loop());
    let (mut after, mut before, mut wrong) = (0, 0, None);
    thread::scope(|scope| {
        let puncher = scope.spawn(|| -> Result<()> {
            let mut rng = Rng::new(!seed);
            let mut result = Ok(());
            for _ in 0..ROUNDS {
                start.wait();
                delay(&mut rng);
                result = result.and(punch_pages(&fd, 0..1));
                end.wait();
            }
            result
        });
        let mut rng = Rng::new(seed);
        for round in 0..ROUNDS {
            start.wait();
            delay(&mut rng);
            let fault = device.fault(0);
            end.wait();
            match (fault, device.entry(0), allocated(&fd)) {
                (Ok(_), Ok(Some(_)), Ok(PAGE)) => after += 1,
                (Ok(_), Ok(None), Ok(0)) => before += 1,
                other => {
                    wrong.get_or_insert((round, other));
                }
            }
        }
        puncher.join().map_err(|_| anyhow!("the puncher panicked"))?
    })?;
    println!("{after} faults after the hole, {before} before it");
    ensure!(wrong.is_none(), "round, fault, entry, bytes in the file: {wrong:x?}");
    Ok(())
}

/// Hold a hole of these pages in the callback of `consumer`, do `work`, let it go; `work` gets a
/// function that lets it go earlier.
fn with_hole_held_up<R>(
    fd: &OwnedFd,
    consumer: &Consumer,
    pages: std::ops::Range<u64>,
    work: impl FnOnce(&dyn Fn() -> Result<()>) -> Result<R>,
) -> Result<R> {
    consumer.block(true)?;
    thread::scope(|scope| {
        let puncher = scope.spawn(|| punch_pages(fd, pages));
        let result = consumer.wait_until_called().and_then(|()| {
            work(&|| {
                ensure!(!puncher.is_finished(), "the hole did not wait for its callback");
                Ok(consumer.block(false)?)
            })
        });
        consumer.block(false)?;
        puncher.join().map_err(|_| anyhow!("the puncher panicked"))??;
        result
    })
}

/// Do `call` in a thread while a hole is held up, let the hole go once the call waits in the core for
/// it, and say what the call returned, and whether it did so too early.
fn while_it_waits<R: Send>(
    call: impl FnOnce() -> R + Send,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<(R, bool)> {
    let caller = AtomicI32::new(0);
    thread::scope(|scope| {
        let calling = scope.spawn(|| {
            caller.store(thread_id(), Ordering::SeqCst);
            call()
        });
        let waits = || {
            let thread = caller.load(Ordering::SeqCst);
            // Rust's condition variable, by itself or as a part of the function that waits.
            let waits = thread != 0 && sleeps_in(thread, &["memfile_main", "condvar"]);
            Ok(waits || calling.is_finished())
        };
        let waited = wait_until("the call waits", waits);
        let early = calling.is_finished();
        go_on()?;
        let result = calling.join().map_err(|_| anyhow!("the thread panicked"))?;
        waited?;
        Ok((result, early))
    })
}

/// Consumers unmap first (rule 14).
fn pages_stay_until_the_callback_returns() -> CaseResult {
    let _pages = base_pages()?;
    let fd = memfile(FILE)?;
    for mode in [Mode::Observer, MAPPER] {
        allocate(&fd, 0, FILE)?;
        let consumer = Consumer::bound(&fd, mode, ALL)?;
        with_hole_held_up(&fd, &consumer, 0..8, |go_on| {
            expect_allocated(&fd, FILE, "while the callback runs")?;
            go_on()
        })?;
        expect_allocated(&fd, FILE - 8 * PAGE, "after the hole")?;
    }
    Ok(())
}

/// KVM has unmapped the hole and another consumer has not: until then, no vCPU gets the pages back
/// that are about to leave the file.
fn vcpu_is_held_off_until_the_hole_is_done() -> CaseResult {
    let mut s = Setup::new(Private::Memfile, FILE)?;
    let gpa = s.slot.gpa;
    s.vcpu.fill(gpa, FILE, GUEST)?;
    // Mappers are called before observers.
    let slow = observer(&s.fd, ALL)?;
    let stats = s.vcpu.stats()?;
    let before = stats.get("pf_taken")?;
    let (fd, vcpu) = (&s.fd, &mut s.vcpu);
    with_hole_held_up(fd, &slow, 0..8, |go_on| {
        thread::scope(|scope| {
            let reader = scope.spawn(|| vcpu.verify(gpa, 8 * PAGE, Pattern::ZERO));
            let faulted = wait_for_vain_faults(&stats, before, || reader.is_finished());
            let early = reader.is_finished();
            go_on()?;
            reader.join().map_err(|_| anyhow!("the vCPU thread panicked"))??;
            faulted?;
            ensure!(!early, "the guest read a page of the hole while it was being punched");
            Ok(())
        })
    })?;
    s.vcpu.verify(gpa + 8 * PAGE, FILE - 8 * PAGE, GUEST)
}

fn unbinding_waits_for_the_callback_that_runs() -> CaseResult {
    let fd = memfile(FILE)?;
    for mode in [Mode::Observer, MAPPER] {
        let consumer = Consumer::bound(&fd, mode, ALL)?;
        with_hole_held_up(&fd, &consumer, 0..8, |go_on| {
            let unbind = || {
                consumer.unbind()?;
                consumer.callbacks()
            };
            let (callbacks, early) = while_it_waits(unbind, go_on)?;
            let callbacks = callbacks?;
            ensure!(!early, "{mode:?}: unbound while its callback ran");
            // The invalidation had ended when unbinding returned.
            ensure!((callbacks.starts, callbacks.ends) == (1, 1), "{mode:?}: {callbacks:?}");
            Ok(())
        })?;
        consumer.expect_callbacks(&[(0, 8)])?;
    }
    Ok(())
}

/// Bindings that the held hole does not call begin and end as if there were none.
fn unbinding_elsewhere_waits_for_nothing() -> CaseResult {
    let fd = memfile(FILE)?;
    let slow = observer(&fd, Span::same(0, 8))?;
    let beside = observer(&fd, Span::same(8, 8))?;
    let mapper = Consumer::bound(&fd, MAPPER, Span::same(8, 8))?;
    with_hole_held_up(&fd, &slow, 0..8, |go_on| {
        for consumer in [&beside, &mapper] {
            consumer.unbind()?;
            consumer.expect_callbacks(&[])?;
        }
        mapper.bind(&fd, MAPPER, Span::same(100, 8)).context("bind elsewhere")?;
        go_on()
    })?;
    slow.expect_callbacks(&[(0, 8)])
}

fn binding_waits_for_a_hole_in_its_pages_only() -> CaseResult {
    let fd = memfile(FILE)?;
    let slow = observer(&fd, Span::same(0, 1))?;
    for mode in [Mode::Observer, MAPPER] {
        slow.unbind()?;
        slow.bind(&fd, Mode::Observer, Span::same(0, 1))?;
        let late = Consumer::new()?;
        with_hole_held_up(&fd, &slow, 0..8, |go_on| {
            let beside = Consumer::bound(&fd, mode, Span::same(8, 8))?;
            let bind = || late.bind(&fd, mode, Span::same(7, 1));
            let (bound, early) = while_it_waits(bind, go_on)?;
            bound?;
            ensure!(!early, "{mode:?}: bound while its page was being taken away");
            beside.expect_callbacks(&[])
        })?;
        // It got no callback for the hole that began before it, and both for the next one.
        late.expect_callbacks(&[]).with_context(|| format!("{mode:?} after the first hole"))?;
        punch_pages(&fd, 0..8)?;
        late.expect_callbacks(&[(7, 8)]).with_context(|| format!("{mode:?} after the second"))?;
    }
    Ok(())
}

/// A hole that another consumer of the file holds calls KVM as well. A VM that is destroyed
/// meanwhile waits only until it is called no more.
fn vm_destruction_waits_for_no_other_consumer() -> CaseResult {
    let fd = memfile(FILE)?;
    let slow = observer(&fd, Span::same(0, 8))?;
    let vm = Vm::protected()?;
    let half = vm.add_private(1, GIB, FILE / 2, Private::Memfile, &fd, FILE / 2)?;
    with_hole_held_up(&fd, &slow, 0..8, |go_on| {
        vm.delete(half).context("delete a slot beside the hole")?;
        drop(vm);
        go_on()
    })?;
    slow.expect_callbacks(&[(0, 8)])
}

fn no_callback_comes_after_unbinding() -> CaseResult {
    let seed = seed();
    let fd = memfile(FILE)?;
    while_punching(&fd, seed, || {
        thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|i| {
                    let (fd, mut rng) = (&fd, Rng::new(seed.wrapping_add(i)));
                    scope.spawn(move || -> Result<u64> {
                        let consumer = Consumer::new()?;
                        let mut callbacks = 0;
                        for n in 0.. {
                            if n >= 150 && callbacks > 0 {
                                break;
                            }
                            // One third of the file for each thread's mapper, any range for
                            // observers.
                            let third = PAGES / 3;
                            let (mode, first, room) = match rng.below(2) {
                                0 => (MAPPER, i * third, third),
                                _ => (Mode::Observer, 0, PAGES),
                            };
                            let start = rng.below(room);
                            let pages = 1 + rng.below(room - start);
                            let span = Span { pgoff: first + start, pages, frame: 1 << 20 };
                            consumer.bind(fd, mode, span)?;
                            for _ in 0..rng.below(4) {
                                thread::yield_now();
                            }
                            consumer.unbind()?;
                            consumer.expect_balanced()?;
                            let inside = |start: u64, end: u64| {
                                span.frame <= start && start < end && end <= span.frame + pages
                            };
                            for event in consumer.callbacks()?.events {
                                if let Event::Start(start, end) | Event::End(start, end) = event {
                                    ensure!(inside(start, end), "{event:?} is not in {span:?}");
                                }
                            }
                            callbacks += consumer.callbacks()?.starts;
                        }
                        // Later holes do not call it either.
                        thread::sleep(Duration::from_millis(10));
                        consumer.expect_balanced()?;
                        Ok(callbacks)
                    })
                })
                .collect();
            for thread in threads {
                let callbacks = thread.join().map_err(|_| anyhow!("a thread panicked"))??;
                println!("{callbacks} invalidations");
            }
            Ok(())
        })
    })
}

/// The inode is evicted only without bindings, so eviction calls no consumer.
fn file_lives_as_long_as_its_observer() -> CaseResult {
    let size = 16 * MIB;
    let fd = memfile(size)?;
    let observer = observer(&fd, ALL)?;
    allocate(&fd, 0, size)?;
    mem::refresh_counters();
    let there = mem::meminfo("Shmem")?;
    drop(fd);
    mem::refresh_counters();
    let kept = mem::meminfo("Shmem")?;
    ensure!(kept + MIB > there, "pages went with the descriptor: {kept} of {there} bytes are left");
    observer.unbind()?;
    mem::refresh_counters();
    let left = mem::meminfo("Shmem")?;
    ensure!(left + size < there + MIB, "pages stayed: {left} of {there} bytes are left");
    observer.expect_callbacks(&[])
}

fn closing_the_device_unbinds() -> CaseResult {
    let fd = memfile(FILE)?;
    for mode in [MAPPER, Mode::Device] {
        drop(Consumer::bound(&fd, mode, ALL)?);
        expect_fdinfo(&fd, MEMFILE_F_ALL, 0, "the device is closed")?;
    }
    // Also while one of its callbacks is held, and with the memfile closed before.
    let consumer = observer(&fd, ALL)?;
    consumer.block(true)?;
    thread::scope(|scope| {
        let puncher = scope.spawn(|| punch_pages(&fd, 0..1));
        let called = consumer.wait_until_called();
        drop(consumer);
        puncher.join().map_err(|_| anyhow!("the puncher panicked"))??;
        called
    })
}

/// File descriptor, slot, observer, mapper and the VM end in any order: the others go on working,
/// and the module is unused in the end.
fn everything_goes_in_any_order() -> CaseResult {
    let module = Module::memfile()?;
    let mut rng = Rng::new(seed());
    for _ in 0..24 {
        let fd = memfile(2 * FILE)?;
        let spare = reopen(&fd, libc::O_RDWR)?;
        let mut fd = Some(fd);
        let mut vm = Some(Vm::protected()?);
        let mut slot = None;
        if let (Some(vm), Some(fd)) = (&vm, &fd) {
            slot = Some(vm.add_private(1, GIB, FILE, Private::Memfile, fd, FILE)?);
        }
        let mut observer = Some(observer(&spare, ALL)?);
        let mut mapper = Some(Consumer::bound(&spare, MAPPER, ALL)?);
        let mut spare = Some(spare);
        let mut order = [0, 1, 2, 3, 4, 5];
        for i in (1..order.len()).rev() {
            order.swap(i, rng.below(i as u64 + 1) as usize);
        }
        for (step, what) in order.into_iter().enumerate() {
            match what {
                0 => fd = None,
                1 => spare = None,
                2 => observer = None,
                3 => mapper = None,
                4 => vm = None,
                _ => {
                    if let (Some(vm), Some(slot)) = (&vm, slot.take()) {
                        vm.delete(slot)?;
                    }
                }
            }
            let work = || -> Result<()> {
                if let Some(mapper) = &mapper {
                    mapper.get(3)?;
                }
                if let Some(fd) = fd.as_ref().or(spare.as_ref()) {
                    punch(fd, 0, 2 * FILE)?;
                }
                if let Some(observer) = &observer {
                    observer.expect_balanced()?;
                }
                Ok(())
            };
            work().with_context(|| format!("order {order:?}, step {step}"))?;
        }
        // The file has no reference any more, so the module has none.
        module.expect_unused().with_context(|| format!("order {order:?}"))?;
    }
    module.unload()
}

fn unload_is_refused_while_bound() -> CaseResult {
    let (memfile_ko, test_ko) = (Module::memfile()?, Module::test()?);
    for mode in [Mode::Observer, MAPPER, Mode::Device] {
        let fd = memfile(FILE)?;
        let consumer = Consumer::bound(&fd, mode, ALL)?;
        drop(fd);
        memfile_ko.expect_in_use(&format!("{mode:?}"))?;
        test_ko.expect_in_use(&format!("{mode:?}"))?;
        consumer.unbind()?;
        memfile_ko.unload().with_context(|| format!("after {mode:?} is unbound"))?;
        let result = consumer.raw_bind(0, mode, ALL);
        expect_errno("bind without the core", result, &[Errno::EINVAL])?;
        memfile_ko.load()?;
        test_ko.expect_in_use("the device open")?;
        drop(consumer);
        test_ko.unload()?;
        test_ko.load()?;
    }
    Ok(())
}
