// SPDX-License-Identifier: GPL-2.0
//! KVM maps huge pages of shmem where all conditions hold, and nowhere else (rule 12); an operation
//! on a part of one leaves the rest unchanged.

use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};

use crate::ktap::{CaseResult, Suite};
use crate::pattern::{Pattern, Rng, seed};
use crate::pressure::{self, Cgroup, Counts, Failing, MovableZone, Setting, Swap, frames};
use crate::support::setup::{
    BOTH, GUEST, HIDDEN, LAYOUTS, Layout, MOVABLE, PINNED, RECLAIMABLE, SHARED, SLOT, Setup,
};
use crate::support::setup::{check_view, fill_view};
use crate::sys::*;
use crate::vm::{CONVERT_BY, Private, Vm, region};
use crate::{GIB, HUGE, MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "huge",
    [
        policies_of_shmem_apply,
        kvm_maps_2m_where_everything_agrees,
        kvm_maps_4k_where_file_and_guest_do_not_agree,
        kvm_maps_4k_across_the_ends_of_a_binding,
        kvm_maps_4k_where_attributes_differ,
        kvm_maps_4k_what_the_guest_executes_if_it_must,
        new_huge_page_is_zeroed,
        partial_hole_keeps_every_neighbour,
        partial_hole_in_a_page_that_cannot_be_split,
        partial_conversion_keeps_every_neighbour,
        split_changes_nothing_for_the_guest,
        parts_of_a_split_page_move_and_swap_alone,
        second_vcpu_sees_every_part_go,
    ]
);

const SIZE: u64 = 8 * MIB;
const COUNT: u64 = SIZE / HUGE;
const CHOICES: [u64; 5] = [PINNED, HIDDEN, MOVABLE, RECLAIMABLE, BOTH];

/// A guest with content on huge pages.
fn guest(flags: u64) -> Result<Setup> {
    let counts = Counts::now()?;
    let mut s = Setup::with_flags(flags, SIZE)?;
    s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
    let got = counts.grown("thp_file_alloc")?;
    ensure!(got >= COUNT, "{got} huge pages, wanted {COUNT}");
    Ok(s)
}

/// Pages that KVM has mapped with one entry of 2 MiB.
fn mapped_2m(vm: &Vm) -> Result<u64> {
    vm.stats()?.get("pages_2m")
}

fn expect_2m(vm: &Vm, wanted: u64, when: &str) -> Result<()> {
    let got = mapped_2m(vm)?;
    ensure!(got == wanted, "{when}: {got} pages of 2 MiB are mapped, not {wanted}");
    Ok(())
}

fn policies_of_shmem_apply() -> CaseResult {
    // advise: there is no mapping that could carry the advice.
    for (policy, huge) in [
        ("never", false),
        ("always", true),
        ("within_size", true),
        ("advise", false),
        ("deny", false),
        ("force", true),
    ] {
        let _huge = pressure::shmem_huge(policy)?;
        for flags in [PINNED, HIDDEN] {
            let mut s = Setup::with_flags(flags, SIZE)?;
            s.vcpu.fill_pages(s.slot.gpa, s.slot.size, GUEST)?;
            let orders = frames(&s.vcpu, &s.slot, &s.fd)?;
            let largest = orders.values().map(|frame| frame.order).max();
            let wanted = if huge { 9 } else { 0 };
            ensure!(largest == Some(wanted), "{policy}: the largest order is {largest:?}");
            expect_2m(&s.vm, if huge { COUNT } else { 0 }, policy)?;
        }
    }
    Ok(())
}

fn kvm_maps_2m_where_everything_agrees() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    for flags in CHOICES {
        let mut s = guest(flags)?;
        expect_2m(&s.vm, COUNT, "after the guest wrote")?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
    }
    for layout in &LAYOUTS[..4] {
        let mut s = Setup::at(Private::Memfile, SIZE, *layout)?;
        s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
        expect_2m(&s.vm, COUNT, &format!("{layout:x?}"))?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
    }
    Ok(())
}

fn kvm_maps_4k_where_file_and_guest_do_not_agree() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    let odd = Layout { gpa: 4 * GIB, offset: PAGE };
    for layout in [LAYOUTS[4], LAYOUTS[5], odd] {
        let mut s = Setup::at(Private::Memfile, SIZE, layout)?;
        s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
        expect_2m(&s.vm, 0, &format!("{layout:x?}"))?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
    }
    Ok(())
}

/// The slot begins and ends in the middle of a huge page of the file; what lies outside of it is
/// another slot's.
fn kvm_maps_4k_across_the_ends_of_a_binding() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    let vm = Vm::protected()?;
    let fd = memfile(SIZE)?;
    let (gpa, middle) = (4 * GIB, SIZE / 2 + MIB);
    let view = crate::vm::small_pages(SIZE)?;
    for (id, start, end) in [(SLOT, 0, middle), (SLOT + 1, middle, SIZE)] {
        let mut request =
            region(id, gpa + start, &view, Some((Private::Memfile, fd.as_fd(), start)));
        // Aligned as the guest's address is: else KVM would have no huge page anyway.
        request.userspace_addr = view.addr() + start;
        request.memory_size = end - start;
        vm.raw_set_region(&request).with_context(|| format!("slot {id}"))?;
    }
    vm.set_private(gpa, SIZE)?;
    let mut vcpu = vm.vcpu(0)?;
    vcpu.fill(gpa, SIZE, GUEST)?;
    expect_2m(&vm, COUNT - 1, "one huge page belongs to two slots")?;
    vm.raw_delete(SLOT)?;
    vcpu.verify(gpa + middle, SIZE - middle, GUEST)?;
    punch(&fd, 0, middle)?;
    vcpu.verify(gpa + middle, SIZE - middle, GUEST)
}

fn kvm_maps_4k_where_attributes_differ() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    for flags in [PINNED, HIDDEN, BOTH] {
        for by in CONVERT_BY {
            let mut s = guest(flags)?;
            let gpa = s.slot.gpa;
            expect_2m(&s.vm, COUNT, "all private")?;
            fill_view(&s.slot, SHARED);
            s.vm.convert(by, gpa + HUGE + 5 * PAGE, PAGE, false)?;
            s.vcpu.verify(gpa + HUGE, 5 * PAGE, GUEST)?;
            s.vcpu.verify(gpa + HUGE + 5 * PAGE, PAGE, SHARED)?;
            s.vcpu.verify(gpa + HUGE + 6 * PAGE, HUGE - 6 * PAGE, GUEST)?;
            expect_2m(&s.vm, COUNT - 1, "one page is shared")?;
            s.vm.convert(by, gpa + HUGE + 5 * PAGE, PAGE, true)?;
            s.vcpu.verify(gpa, SIZE, GUEST)?;
        }
    }
    Ok(())
}

/// On CPUs with a certain defect no huge page may be executed (`nx_huge_pages`).
fn kvm_maps_4k_what_the_guest_executes_if_it_must() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    for (workaround, small) in [("off", 0), ("force", 1)] {
        let _nx = Setting::set("/sys/module/kvm/parameters/nx_huge_pages", workaround)?;
        for flags in [PINNED, HIDDEN, BOTH] {
            let mut s = guest(flags)?;
            let (gpa, code) = (s.slot.gpa, HUGE + 5 * PAGE);
            expect_2m(&s.vm, COUNT, "nothing was executed")?;
            s.vcpu.execute_at(gpa + code, 7)?;
            expect_2m(&s.vm, COUNT - small, workaround)?;
            s.vcpu.verify(gpa, code, GUEST)?;
            s.vcpu.verify(gpa + code + PAGE, SIZE - code - PAGE, GUEST)?;
            punch(&s.fd, code, PAGE)?;
            s.vcpu.verify(gpa + code, PAGE, Pattern::ZERO)?;
            s.vcpu.verify(gpa, code, GUEST)?;
        }
    }
    Ok(())
}

fn new_huge_page_is_zeroed() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    let _anonymous = pressure::anonymous_huge("madvise")?;
    // The next allocation takes used memory, in huge pages.
    let used = Mapping::anonymous(8 * SIZE)?;
    used.madvise(0, used.len(), libc::MADV_HUGEPAGE).context("MADV_HUGEPAGE")?;
    for offset in (0..used.len()).step_by(256) {
        used.store(offset, 0x5a5a_5a5a_5a5a_5a5a);
    }
    drop(used);
    for (flags, first) in [(BOTH, false), (BOTH, true), (HIDDEN, false), (HIDDEN, true)] {
        let mut s = Setup::with_flags(flags, SIZE)?;
        if first {
            allocate(&s.fd, 0, SIZE)?;
        }
        let own = 3 * PAGE + 8;
        s.vcpu.store(s.slot.gpa + own, 1)?;
        s.vcpu.verify(s.slot.gpa, own, Pattern::ZERO)?;
        s.vcpu.verify(s.slot.gpa + own + 8, SIZE - own - 8, Pattern::ZERO)?;
    }
    Ok(())
}

/// Holes of all sorts at random places, with a model of what must be left.
fn holes(s: &mut Setup, rng: &mut Rng, exact: bool) -> CaseResult {
    let (gpa, pages) = (s.slot.gpa, SIZE / PAGE);
    let mut there = vec![true; pages as usize];
    for _ in 0..8 {
        let first = rng.below(pages);
        let count = 1 + rng.below(700).min(pages - first - 1);
        punch(&s.fd, first * PAGE, count * PAGE)?;
        there[first as usize..(first + count) as usize].fill(false);
        if exact {
            let left = there.iter().filter(|page| **page).count() as u64;
            expect_allocated(&s.fd, left * PAGE, "after a hole")?;
        }
    }
    let mut first = 0;
    while first < pages {
        let kind = there[first as usize];
        let count = there[first as usize..].iter().take_while(|page| **page == kind).count() as u64;
        let pattern = if kind { GUEST } else { Pattern::ZERO };
        s.vcpu.verify(gpa + first * PAGE, count * PAGE, pattern)?;
        first += count;
    }
    Ok(())
}

fn partial_hole_keeps_every_neighbour() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    let mut rng = Rng::new(seed());
    for flags in CHOICES {
        let counts = Counts::now()?;
        holes(&mut guest(flags)?, &mut rng, true)?;
        counts.expect_grown(&["thp_split_page", "memfile.punch"], 1)?;
    }
    Ok(())
}

/// A page that cannot be split is cleared instead.
fn partial_hole_in_a_page_that_cannot_be_split() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    for flags in [PINNED, HIDDEN, BOTH] {
        let mut s = guest(flags)?;
        let (gpa, hole) = (s.slot.gpa, HUGE + 3 * PAGE);
        let counts = Counts::now()?;
        let failing = Failing::splits()?;
        let result = punch(&s.fd, hole, 2 * PAGE);
        drop(failing);
        result.context("punch")?;
        println!(
            "split {}, failed {}",
            counts.grown("thp_split_page")?,
            counts.grown("thp_split_page_failed")?
        );
        counts.expect_grown(&["thp_split_page_failed"], 1)?;
        s.vcpu.verify(gpa, hole, GUEST)?;
        s.vcpu.verify(gpa + hole, 2 * PAGE, Pattern::ZERO)?;
        s.vcpu.verify(gpa + hole + 2 * PAGE, SIZE - hole - 2 * PAGE, GUEST)?;
        // Now it can be.
        punch(&s.fd, hole, 2 * PAGE)?;
        expect_allocated(&s.fd, SIZE - 2 * PAGE, "split at last")?;
        s.vcpu.verify(gpa + hole, 2 * PAGE, Pattern::ZERO)?;
    }
    Ok(())
}

fn partial_conversion_keeps_every_neighbour() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    let mut rng = Rng::new(seed());
    for flags in CHOICES {
        let mut s = guest(flags)?;
        fill_view(&s.slot, SHARED);
        let (gpa, pages) = (s.slot.gpa, SIZE / PAGE);
        for n in 0..6 {
            let first = rng.below(pages - 1);
            let count = 1 + rng.below(600).min(pages - first - 1);
            let (start, len) = (first * PAGE, count * PAGE);
            s.vm.convert(CONVERT_BY[n % 2], gpa + start, len, false)?;
            s.vcpu.verify(gpa, start, GUEST)?;
            s.vcpu.verify(gpa + start, len, SHARED)?;
            s.vcpu.verify(gpa + start + len, SIZE - start - len, GUEST)?;
            s.vm.convert(CONVERT_BY[(n + 1) % 2], gpa + start, len, true)?;
            s.vcpu.verify(gpa + start, len, GUEST)?;
        }
        check_view(&s.slot, 0, SIZE, SHARED)?;
        expect_allocated(&s.fd, SIZE, "conversion frees nothing")?;
    }
    Ok(())
}

/// The kernel splits huge pages: their frames and their mappings stay.
fn split_changes_nothing_for_the_guest() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    for flags in CHOICES {
        let mut s = guest(flags)?;
        let before = frames(&s.vcpu, &s.slot, &s.fd)?;
        let counts = Counts::now()?;
        pressure::write("/sys/kernel/debug/split_huge_pages", "1")?;
        counts.expect_grown(&["thp_split_page"], COUNT)?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
        let after = frames(&s.vcpu, &s.slot, &s.fd)?;
        for (offset, frame) in &after {
            let old = before.get(offset).context("a new page")?;
            ensure!(frame.pfn == old.pfn, "+{offset:#x} was {old:x?}, is {frame:x?}");
            ensure!(frame.order == 0, "+{offset:#x} is still {frame:x?}");
        }
        // Holes of one page each under an entry of 2 MiB that KVM may still have.
        for page in [0, 7, 511, 512, 1030] {
            punch(&s.fd, page * PAGE, PAGE)?;
            s.vcpu.verify(s.slot.gpa + page * PAGE, PAGE, Pattern::ZERO)?;
        }
        s.vcpu.verify(s.slot.gpa + 8 * PAGE, 503 * PAGE, GUEST)?;
        s.vcpu.verify(s.slot.gpa + 513 * PAGE, 517 * PAGE, GUEST)?;
        s.vcpu.verify(s.slot.gpa + 1031 * PAGE, SIZE - 1031 * PAGE, GUEST)?;
    }
    Ok(())
}

fn parts_of_a_split_page_move_and_swap_alone() -> CaseResult {
    lock_own_memory()?;
    let _huge = pressure::shmem_huge("always")?;
    let (cgroup, _swap) = (Cgroup::enter()?, Swap::on(64 * MIB)?);
    let zone = MovableZone::make(2)?;
    let mut s = guest(BOTH)?;
    let counts = Counts::now()?;
    pressure::write("/sys/kernel/debug/split_huge_pages", "1")?;
    for generation in 0..3 {
        let pattern = Pattern::Generation(generation);
        s.vcpu.fill(s.slot.gpa, s.slot.size, pattern)?;
        cgroup.reclaim(SIZE / 3)?;
        zone.shuffle()?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, pattern)?;
    }
    counts.expect_grown(&["memfile.migrate", "memfile.swap_out", "pswpin"], 1)
}

fn second_vcpu_sees_every_part_go() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    for flags in [PINNED, HIDDEN, BOTH] {
        let mut s = guest(flags)?;
        let mut second = s.vm.vcpu(1)?;
        let gpa = s.slot.gpa;
        second.verify(gpa, SIZE, GUEST)?;
        for page in (0..SIZE / PAGE).step_by(100) {
            punch(&s.fd, page * PAGE, PAGE)?;
            second.verify(gpa + page * PAGE, PAGE, Pattern::ZERO)?;
            s.vcpu.fill(gpa + page * PAGE, PAGE, SHARED)?;
            second.verify(gpa + page * PAGE, PAGE, SHARED)?;
            second.verify(gpa + (page + 1) * PAGE, 47 * PAGE, GUEST)?;
        }
    }
    Ok(())
}
