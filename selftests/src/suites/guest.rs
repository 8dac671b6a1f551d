// SPDX-License-Identifier: GPL-2.0
//! A guest runs on private memory, which only it can see.

use anyhow::{Context, ensure};

use crate::guest::Command;
use crate::ktap::CaseResult;
use crate::pattern::Pattern;
use crate::support::backend::Backend;
use crate::support::setup::{
    GUEST, LAYOUTS, SHARED, SLOT, Setup, check_view, convert_by_hypercall, fill_view,
};
use crate::vm::{ConvertBy, Exit};
use crate::{GIB, HUGE, MIB, PAGE, conformance};

conformance!(
    "guest",
    [
        runs_code_in_private_memory,
        reads_back_what_it_wrote_at_every_layout,
        private_writes_leave_the_shared_view_unchanged,
        shared_writes_leave_private_content_unchanged,
        several_vcpus_see_one_private_content,
        private_memory_starts_as_zeros,
        slot_longer_than_a_huge_page_has_right_edges,
        fd_may_be_closed_while_the_guest_runs,
    ],
    converting: [
        conversion_back_and_forth_keeps_both_sides,
        converted_part_does_not_touch_its_neighbours,
        guest_asks_for_conversion_by_hypercall,
    ],
    huge: all,
    hidden: all,
    // Not those that need a second page, nor those about places where KVM maps no page of 1 GiB: for
    // these there is hugetlb_1g.
    gigantic: [
        private_memory_starts_as_zeros,
        several_vcpus_see_one_private_content,
        converted_part_does_not_touch_its_neighbours,
    ],
);

fn runs_code_in_private_memory(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, MIB)?;
    s.vcpu.execute_at(s.slot.gpa, 7)?;
    s.vcpu.execute_at(s.slot.gpa + 3 * PAGE - 8, 8)?;
    ensure!(s.slot.view.load(0) == 0, "the code is visible to the host");
    Ok(())
}

fn reads_back_what_it_wrote_at_every_layout(on: &'static Backend) -> CaseResult {
    for layout in LAYOUTS {
        let mut s = Setup::at(on, MIB, layout)?;
        s.fill_both()
            .and_then(|()| s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST))
            .and_then(|()| check_view(&s.slot, 0, s.slot.size, SHARED))
            .with_context(|| format!("{layout:x?}"))?;
    }
    Ok(())
}

fn private_writes_leave_the_shared_view_unchanged(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, 4 * MIB)?;
    s.fill_both()?;
    check_view(&s.slot, 0, s.slot.size, SHARED)
}

fn shared_writes_leave_private_content_unchanged(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, 4 * MIB)?;
    s.fill_both()?;
    fill_view(&s.slot, Pattern::Generation(3));
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)
}

fn several_vcpus_see_one_private_content(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, MIB)?;
    let mut others = (1..4).map(|id| s.vm.vcpu(id)).collect::<Result<Vec<_>, _>>()?;
    s.fill_both()?;
    for vcpu in &mut others {
        vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
    }
    for (n, vcpu) in (0..).zip(&mut others) {
        vcpu.store(s.slot.gpa + n * PAGE, n)?;
    }
    for n in 0..others.len() as u64 {
        let got = s.vcpu.load(s.slot.gpa + n * PAGE)?;
        ensure!(got == n, "vCPU 0 reads {got:#x} where another vCPU wrote {n}");
    }
    Ok(())
}

fn private_memory_starts_as_zeros(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, 4 * MIB)?;
    fill_view(&s.slot, SHARED);
    s.vcpu.verify(s.slot.gpa, s.slot.size, Pattern::ZERO)
}

fn conversion_back_and_forth_keeps_both_sides(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, MIB)?;
    s.fill_both()?;
    for round in 0..3 {
        s.vm.set_shared(s.slot.gpa, s.slot.size)?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, SHARED).with_context(|| format!("{round}"))?;
        s.vm.set_private(s.slot.gpa, s.slot.size)?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST).with_context(|| format!("{round}"))?;
    }
    Ok(())
}

fn converted_part_does_not_touch_its_neighbours(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, 2 * HUGE)?;
    let gpa = s.slot.gpa;
    s.fill_both()?;
    for (start, len) in [(0, PAGE), (PAGE, PAGE), (HUGE - PAGE, 2 * PAGE), (HUGE, HUGE)] {
        let end = start + len;
        s.vm.set_shared(gpa + start, len)?;
        s.vcpu.verify(gpa, start, GUEST)?;
        s.vcpu.verify(gpa + start, len, SHARED)?;
        s.vcpu.verify(gpa + end, s.slot.size - end, GUEST)?;
        s.vm.set_private(gpa + start, len)?;
        s.vcpu.verify(gpa, s.slot.size, GUEST)?;
    }
    Ok(())
}

fn guest_asks_for_conversion_by_hypercall(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, MIB)?;
    s.vm.exit_on_map_gpa()?;
    s.fill_both()?;
    let (gpa, len) = (s.slot.gpa + 16 * PAGE, 4 * PAGE);
    for private in [false, true] {
        convert_by_hypercall(&s.vm, &mut s.vcpu, ConvertBy::Attributes, gpa, len, private)?;
        s.vcpu.verify(gpa, len, if private { GUEST } else { SHARED })?;
    }
    Ok(())
}

fn slot_longer_than_a_huge_page_has_right_edges(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, HUGE + PAGE)?;
    s.fill_both()?;
    let (first, last) = (s.slot.gpa, s.slot.gpa + s.slot.size - 8);
    ensure!(s.vcpu.load(first)? == GUEST.word(first));
    ensure!(s.vcpu.load(last)? == GUEST.word(last));
    check_view(&s.slot, 0, s.slot.size, SHARED)
}

/// The slot holds the file.
fn fd_may_be_closed_while_the_guest_runs(on: &'static Backend) -> CaseResult {
    let vm = on.vm()?;
    let fd = on.create(&vm, MIB)?;
    let slot = vm.add_private(SLOT, GIB, MIB, on.kind, &fd, 0)?;
    on.set_private(&vm, slot.gpa, slot.size)?;
    let mut vcpu = vm.vcpu(0)?;
    vcpu.fill(slot.gpa, slot.size, GUEST)?;
    drop(fd);
    // Pages that were freed with the descriptor would belong to another guest now.
    let mut other = Setup::new(on, 8 * MIB)?;
    other.vcpu.fill(other.slot.gpa, other.slot.size, SHARED)?;
    let exit = vcpu.start(Command::Load, &[slot.gpa])?;
    on.expect("access once the descriptor is closed", exit.told(), Exit::Done.told())?;
    if exit != Exit::Done {
        return Ok(());
    }
    vcpu.verify(slot.gpa, slot.size, GUEST)?;
    vcpu.fill(slot.gpa, slot.size, Pattern::Generation(4))?;
    vcpu.verify(slot.gpa, slot.size, Pattern::Generation(4))
}
