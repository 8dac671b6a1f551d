// SPDX-License-Identifier: GPL-2.0
//! One file, several slots and several VMs; ends in any order.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::thread;

use anyhow::{Context, Result, anyhow};

use crate::ktap::CaseResult;
use crate::pattern::Pattern;
use crate::support::backend::Backend;
use crate::support::setup::{GUEST, Setup};
use crate::sys::*;
use crate::vm::{Slot, Vm};
use crate::{GIB, MIB, PAGE, conformance};

conformance!(
    "sharing",
    [
        slots_of_one_vm_see_their_own_part,
        hole_across_two_slots_hits_both,
        slots_may_be_deleted_in_any_order,
        slot_deleted_while_another_thread_punches,
        many_slots_on_one_file: 120,
    ],
    memfile: [
        vms_see_their_own_part,
        hole_across_two_vms_hits_both,
        content_passes_from_one_vm_to_the_next,
        vm_destroyed_while_another_thread_punches,
        file_closed_first_then_vm,
    ],
    huge: all,
    // Slots and VMs that share one page. Those that free all of the file in a loop would clear it as
    // often; a thousand slots are as many on pages of any size.
    gigantic: [
        slots_of_one_vm_see_their_own_part,
        hole_across_two_slots_hits_both,
        hole_across_two_vms_hits_both,
        content_passes_from_one_vm_to_the_next,
    ],
);

const PART: u64 = MIB;

/// A VM whose slots 1, 2, … are the given parts of a file, in that order from 1 GiB on, 2 GiB
/// apart, all private.
fn vm_on(on: &Backend, fd: &OwnedFd, parts: &[u64]) -> Result<(Vm, Vec<Slot>)> {
    let vm = on.vm()?;
    let slots = add_parts(on, &vm, fd, parts)?;
    Ok((vm, slots))
}

/// The same slots in a VM of the caller's.
fn add_parts(on: &Backend, vm: &Vm, fd: &OwnedFd, parts: &[u64]) -> Result<Vec<Slot>> {
    let mut slots = Vec::new();
    for (id, part) in (1..).zip(parts) {
        let gpa = GIB + u64::from(id) * 2 * GIB;
        slots.push(vm.add_private(id, gpa, PART, on.kind, fd, part * PART)?);
        on.set_private(vm, gpa, PART)?;
    }
    Ok(slots)
}

/// A VM with a file of as many parts, and the slots.
fn all_on(on: &Backend, parts: &[u64]) -> Result<(OwnedFd, Vm, Vec<Slot>)> {
    let vm = on.vm()?;
    let fd = on.create(&vm, parts.len() as u64 * PART)?;
    let slots = add_parts(on, &vm, &fd, parts)?;
    Ok((fd, vm, slots))
}

fn slots_of_one_vm_see_their_own_part(on: &'static Backend) -> CaseResult {
    let (fd, vm, slots) = all_on(on, &[3, 0, 2, 1])?;
    let mut vcpu = vm.vcpu(0)?;
    for (n, slot) in (0..).zip(&slots) {
        vcpu.fill(slot.gpa, slot.size, Pattern::Generation(n))?;
    }
    for (n, slot) in (0..).zip(&slots) {
        vcpu.verify(slot.gpa, slot.size, Pattern::Generation(n))?;
    }
    on.expect_allocated(&fd, (4 * PART).next_multiple_of(on.page), "all parts touched")?;
    // The file's third part is slot 3, and no other.
    punch(&fd, 2 * PART, PART)?;
    for (n, slot) in (0..).zip(&slots) {
        let wanted = if n == 2 { Pattern::ZERO } else { Pattern::Generation(n) };
        vcpu.verify(slot.gpa, slot.size, wanted).with_context(|| format!("slot {}", n + 1))?;
    }
    Ok(())
}

fn vms_see_their_own_part(on: &'static Backend) -> CaseResult {
    let fd = on.file(2 * PART)?;
    let (a, slots) = vm_on(on, &fd, &[1])?;
    let (b, _other) = vm_on(on, &fd, &[0])?;
    let gpa = slots[0].gpa;
    let (mut a, mut b) = (a.vcpu(0)?, b.vcpu(0)?);
    a.fill(gpa, PART, Pattern::Generation(1))?;
    b.verify(gpa, PART, Pattern::ZERO)?;
    b.fill(gpa, PART, Pattern::Generation(2))?;
    a.verify(gpa, PART, Pattern::Generation(1))
}

fn hole_across_two_slots_hits_both(on: &'static Backend) -> CaseResult {
    // The later part of the file lies lower in guest memory.
    let (fd, vm, slots) = all_on(on, &[1, 0])?;
    let mut vcpu = vm.vcpu(0)?;
    for slot in &slots {
        vcpu.fill(slot.gpa, PART, GUEST)?;
    }
    punch(&fd, PART - 2 * PAGE, 4 * PAGE)?;
    let (late, early) = (slots[0].gpa, slots[1].gpa);
    vcpu.verify(early, PART - 2 * PAGE, GUEST)?;
    vcpu.verify(early + PART - 2 * PAGE, 2 * PAGE, Pattern::ZERO)?;
    vcpu.verify(late, 2 * PAGE, Pattern::ZERO)?;
    vcpu.verify(late + 2 * PAGE, PART - 2 * PAGE, GUEST)
}

fn hole_across_two_vms_hits_both(on: &'static Backend) -> CaseResult {
    let fd = on.file(2 * PART)?;
    let (vm_a, slots) = vm_on(on, &fd, &[0])?;
    let (vm_b, _slots_b) = vm_on(on, &fd, &[1])?;
    let gpa = slots[0].gpa;
    let (mut a, mut b) = (vm_a.vcpu(0)?, vm_b.vcpu(0)?);
    a.fill(gpa, PART, GUEST)?;
    b.fill(gpa, PART, GUEST)?;
    punch(&fd, PART - PAGE, 2 * PAGE)?;
    a.verify(gpa, PART - PAGE, GUEST)?;
    a.verify(gpa + PART - PAGE, PAGE, Pattern::ZERO)?;
    b.verify(gpa, PAGE, Pattern::ZERO)?;
    b.verify(gpa + PAGE, PART - PAGE, GUEST)
}

fn slots_may_be_deleted_in_any_order(on: &'static Backend) -> CaseResult {
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]] {
        let (fd, vm, slots) = all_on(on, &[2, 0, 1])?;
        let mut vcpu = vm.vcpu(0)?;
        for slot in &slots {
            vcpu.fill(slot.gpa, PART, GUEST)?;
        }
        let mut left: Vec<_> = slots.into_iter().map(Some).collect();
        for n in order {
            vm.delete(left[n].take().context("deleted twice")?)?;
            // A hole over the whole file still finds the existing slots.
            punch(&fd, 0, 3 * PART)?;
            for slot in left.iter().flatten() {
                vcpu.verify(slot.gpa, PART, Pattern::ZERO)?;
                vcpu.fill(slot.gpa, PART, GUEST)?;
            }
        }
    }
    Ok(())
}

fn content_passes_from_one_vm_to_the_next(on: &'static Backend) -> CaseResult {
    let fd = on.file(PART)?;
    let (vm, slots) = vm_on(on, &fd, &[0])?;
    let gpa = slots[0].gpa;
    vm.vcpu(0)?.fill(gpa, PART, GUEST)?;
    drop((vm, slots));
    let (vm, _slots) = vm_on(on, &fd, &[0])?;
    vm.vcpu(0)?.verify(gpa, PART, GUEST)
}

/// After so many holes in a file of huge pages a tenth of the rounds is enough.
const MANY_HOLES: u32 = 4000;

/// Do `round` for `rounds` times while another thread punches all of the file repeatedly.
///
/// A thread that never rests from punching holds off the vCPUs of a file of huge pages
/// for long, so the holes end the case there, not the rounds.
fn while_punching(
    on: &Backend,
    fd: &OwnedFd,
    rounds: u32,
    mut round: impl FnMut() -> Result<()>,
) -> CaseResult {
    let (stop, holes) = (AtomicBool::new(false), AtomicU32::new(0));
    let size = file_size(fd)?;
    thread::scope(|scope| {
        let puncher = scope.spawn(|| -> Result<()> {
            while !stop.load(Relaxed) {
                punch(fd, 0, size)?;
                allocate(fd, 0, 8 * PAGE)?;
                holes.fetch_add(1, Relaxed);
            }
            Ok(())
        });
        let enough = |n| on.page > PAGE && n >= rounds / 10 && holes.load(Relaxed) >= MANY_HOLES;
        let result = (0..rounds).take_while(|&n| !enough(n)).try_for_each(|_| round());
        stop.store(true, Relaxed);
        puncher.join().map_err(|_| anyhow!("the puncher panicked"))??;
        println!("{} holes meanwhile", holes.load(Relaxed));
        result
    })?;
    Ok(punch(fd, 0, size)?)
}

fn vm_destroyed_while_another_thread_punches(on: &'static Backend) -> CaseResult {
    let fd = on.file(2 * PART)?;
    while_punching(on, &fd, 20, || {
        let (vm, slots) = vm_on(on, &fd, &[0, 1])?;
        let mut vcpu = vm.vcpu(0)?;
        vcpu.fill_pages(slots[0].gpa, 16 * PAGE, GUEST)?;
        vcpu.fill_pages(slots[1].gpa, 16 * PAGE, GUEST)?;
        drop(vm);
        drop(vcpu);
        Ok(())
    })?;
    on.expect_allocated(&fd, 0, "in the end")
}

fn slot_deleted_while_another_thread_punches(on: &'static Backend) -> CaseResult {
    let vm = on.vm()?;
    let fd = on.create(&vm, PART)?;
    on.set_private(&vm, GIB, PART)?;
    let mut vcpu = vm.vcpu(0)?;
    while_punching(on, &fd, 100, || {
        let slot = vm.add_private(1, GIB, PART, on.kind, &fd, 0)?;
        vcpu.fill_pages(GIB, 16 * PAGE, GUEST)?;
        vm.delete(slot).map(drop)
    })?;
    on.expect_allocated(&fd, 0, "in the end")
}

fn file_closed_first_then_vm(on: &'static Backend) -> CaseResult {
    for delete in [false, true] {
        let mut s = Setup::new(on, MIB)?;
        drop(s.fd);
        s.vcpu.fill(s.slot.gpa, MIB, GUEST)?;
        s.vcpu.verify(s.slot.gpa, MIB, GUEST)?;
        if delete {
            s.vm.delete(s.slot)?;
        }
    }
    Ok(())
}

fn many_slots_on_one_file(on: &'static Backend) -> CaseResult {
    let count = 1000;
    let vm = on.vm()?;
    let fd = on.create(&vm, count * PAGE)?;
    let mut vcpu = vm.vcpu(0)?;
    on.set_private(&vm, GIB, 2 * count * PAGE)?;
    let mut slots = Vec::new();
    let start = std::time::Instant::now();
    for n in 0..count {
        // Backwards in the file, every other page of guest memory.
        let (gpa, offset) = (GIB + 2 * n * PAGE, (count - 1 - n) * PAGE);
        slots.push(vm.add_private(1 + n as u32, gpa, PAGE, on.kind, &fd, offset)?);
    }
    for slot in &slots {
        vcpu.fill(slot.gpa, PAGE, GUEST)?;
    }
    punch(&fd, 0, count / 2 * PAGE)?;
    for (n, slot) in (0..).zip(&slots) {
        let wanted = if n < count / 2 { GUEST } else { Pattern::ZERO };
        vcpu.verify(slot.gpa, PAGE, wanted).with_context(|| format!("slot {n}"))?;
    }
    println!("made and used {count} slots in {:?}", start.elapsed());
    let start = std::time::Instant::now();
    for slot in slots {
        vm.delete(slot)?;
    }
    println!("deleted them in {:?}", start.elapsed());
    Ok(())
}
