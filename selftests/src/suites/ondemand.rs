// SPDX-License-Identifier: GPL-2.0
//! Private memory is allocated when the guest touches it, and all of it comes back (rule 10).

use anyhow::{Context, ensure};

use crate::ktap::CaseResult;
use crate::mem;
use crate::pattern::{Pattern, Rng, seed};
use crate::pressure::{base_pages, drop_caches, shmem_huge};
use crate::support::backend::Backend;
use crate::support::setup::{GUEST, LAYOUTS, SLOT, Setup};
use crate::sys::*;
use crate::{GIB, HUGE, MIB, PAGE, conformance};

conformance!(
    "ondemand",
    [
        file_grows_by_what_the_guest_touches,
        a_read_allocates_as_well,
        punched_memory_comes_back_on_touch,
        fallocate_first_allocates_everything_once,
        file_shrinks_to_nothing_when_all_is_punched,
        slot_of_32_gib_costs_what_is_touched: 120,
    ],
    converting: [shared_accesses_allocate_nothing, slot_and_conversion_allocate_nothing],
    huge: all,
    // The kernel's figures do not count pages of hugetlbfs as content: see `accounting_huge`.
    small: [memory_returns_when_everything_is_closed, memory_returns_when_the_vm_goes_last],
    shmem: [huge_page_past_the_end_is_split_under_the_guest],
);

fn file_grows_by_what_the_guest_touches(on: &'static Backend) -> CaseResult {
    let _pages = base_pages()?;
    let mut rng = Rng::new(seed());
    for layout in LAYOUTS {
        let mut s = Setup::at(on, 4 * MIB, layout)?;
        let mut touched = std::collections::HashSet::new();
        on.expect_allocated(&s.fd, 0, "before the first touch")?;
        for _ in 0..40 {
            let page = rng.below(s.slot.size / PAGE);
            s.vcpu.store(s.slot.gpa + page * PAGE + 8 * rng.below(PAGE / 8), 1)?;
            touched.insert((layout.offset + page * PAGE) / on.page);
            on.check_allocated(&s.fd, touched.len() as u64 * on.page, "after a touch")?;
        }
    }
    Ok(())
}

fn a_read_allocates_as_well(on: &'static Backend) -> CaseResult {
    let _pages = base_pages()?;
    let mut s = Setup::new(on, MIB)?;
    ensure!(s.vcpu.load(s.slot.gpa + PAGE)? == 0);
    on.expect_allocated(&s.fd, on.page, "after a read")
}

fn shared_accesses_allocate_nothing(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, MIB)?;
    s.vm.set_shared(s.slot.gpa, s.slot.size)?;
    s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
    on.expect_allocated(&s.fd, 0, "after shared writes")
}

fn slot_and_conversion_allocate_nothing(on: &'static Backend) -> CaseResult {
    let s = Setup::new(on, 16 * MIB)?;
    for private in [false, true, false, true] {
        s.vm.convert(crate::vm::ConvertBy::Attributes, s.slot.gpa, s.slot.size, private)?;
        on.expect_allocated(&s.fd, 0, "after a conversion")?;
    }
    ensure!(mem::resident(&s.slot.view)? == 0, "the shared side was touched");
    Ok(())
}

fn punched_memory_comes_back_on_touch(on: &'static Backend) -> CaseResult {
    let _pages = base_pages()?;
    let mut s = Setup::new(on, MIB.max(4 * on.page))?;
    let (gpa, size) = (s.slot.gpa, s.slot.size);
    s.vcpu.fill(gpa, size, GUEST)?;
    on.expect_allocated(&s.fd, size, "all touched")?;
    punch(&s.fd, 0, size / 2)?;
    on.expect_allocated(&s.fd, size / 2, "half punched")?;
    s.vcpu.verify(gpa, PAGE, Pattern::ZERO)?;
    on.expect_allocated(&s.fd, size / 2 + on.page, "one page touched again")
}

fn fallocate_first_allocates_everything_once(on: &'static Backend) -> CaseResult {
    let _pages = base_pages()?;
    let size = MIB.max(2 * on.page);
    let mut s = Setup::new(on, size)?;
    allocate(&s.fd, 0, size)?;
    on.expect_allocated(&s.fd, size, "after fallocate")?;
    s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
    on.expect_allocated(&s.fd, size, "after the guest wrote")?;
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)
}

fn file_shrinks_to_nothing_when_all_is_punched(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, 4 * MIB)?;
    s.vcpu.fill_pages(s.slot.gpa, s.slot.size, GUEST)?;
    punch(&s.fd, 0, file_size(&s.fd)?)?;
    on.expect_allocated(&s.fd, 0, "all punched")
}

/// Use `size` bytes of private memory, let `end` close it, and check that the kernel's own figures
/// return to their old values.
fn expect_returned(on: &'static Backend, size: u64, end: fn(Setup)) -> CaseResult {
    // Once for the memory that the first VM leaves allocated, once for the measurement.
    for (measured, size) in [(false, MIB), (true, size)] {
        let (before, free) = (mem::content()?, mem::free()?);
        let mut s = Setup::new(on, size)?;
        s.vcpu.fill_pages(s.slot.gpa, s.slot.size, GUEST)?;
        let during = mem::content()?;
        end(s);
        let after = mem::content()?;
        if measured {
            let (grown, left) = (during.abs_diff(before), after.abs_diff(before));
            println!("{} KiB in use, {} KiB left", grown >> 10, left >> 10);
            ensure!(grown.abs_diff(size) < 4 * MIB, "only {} MiB were in use", grown >> 20);
            ensure!(left < MIB, "{} KiB did not come back", left >> 10);
            // A page with a remaining reference is content of no file, but not free either.
            let lost = free.saturating_sub(mem::free()?);
            ensure!(lost < size / 4, "{} KiB are not free", lost >> 10);
        }
    }
    Ok(())
}

fn memory_returns_when_everything_is_closed(on: &'static Backend) -> CaseResult {
    expect_returned(on, 64 * MIB, |s| drop((s.vcpu, s.vm, s.slot, s.fd)))
}

fn memory_returns_when_the_vm_goes_last(on: &'static Backend) -> CaseResult {
    expect_returned(on, 64 * MIB, |s| drop((s.fd, s.slot, s.vcpu, s.vm)))
}

/// The guest touches 64 MiB in 64 places of a slot that is larger than the machine.
fn slot_of_32_gib_costs_what_is_touched(on: &'static Backend) -> CaseResult {
    let _pages = base_pages()?;
    let (size, places, touch) = (32 * GIB, 64, MIB);
    let vm = on.vm()?;
    let fd = on.create(&vm, size)?;
    let slot = vm.add_private(SLOT, 4 * GIB, size, on.kind, &fd, 0)?;
    let mut vcpu = vm.vcpu(0)?;
    let place = |n| {
        slot.gpa + n * (size / places) + if n + 1 == places { size / places - touch } else { 0 }
    };
    for n in 0..places {
        on.set_private(&vm, place(n), touch)?;
        vcpu.fill(place(n), touch, Pattern::Generation(n))?;
    }
    on.expect_allocated(&fd, places * touch.max(on.page), "after 64 MiB were touched")?;
    for n in 0..places {
        let seen = vcpu.verify(place(n), touch, Pattern::Generation(n));
        seen.with_context(|| format!("place {n}"))?;
    }
    let total = mem::meminfo("MemTotal")?;
    println!("a slot of {} GiB in a machine of {} MiB", size / GIB, total / MIB);
    punch(&fd, 0, size)?;
    on.expect_allocated(&fd, 0, "all punched")
}

/// Memory pressure frees the part of a huge page past the end of the file. The part before the end
/// stays in its place, and mapped.
fn huge_page_past_the_end_is_split_under_the_guest(on: &'static Backend) -> CaseResult {
    let policy = shmem_huge("always")?;
    let tail = 3 * PAGE;
    let (vm, gpa, size) = (on.vm()?, 4 * GIB, HUGE + tail);
    let fd = on.create(&vm, size)?;
    let _slot = vm.add_private(SLOT, gpa, size, on.kind, &fd, 0)?;
    vm.set_private(gpa, size)?;
    let mut vcpu = vm.vcpu(0)?;
    vcpu.fill_pages(gpa, size, GUEST)?;
    drop(policy);
    on.expect_allocated(&fd, 2 * HUGE, "with a huge page across the end")?;
    let (stats, invalidated) = (vm.stats()?, mem::counter("invalidate")?);
    let mapped = stats.get("pages_4k")?;
    drop_caches()?;
    on.expect_allocated(&fd, size, "after the shrinker")?;
    ensure!(mem::counter("invalidate")? == invalidated, "the guest's mappings were taken away");
    ensure!(stats.get("pages_4k")? == mapped, "the guest lost mappings");
    vcpu.verify_pages(gpa, size, GUEST)
}
