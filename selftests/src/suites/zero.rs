// SPDX-License-Identifier: GPL-2.0
//! No guest ever sees what a page held before: fresh pages are zero, whichever way they come.

use anyhow::{Context, Result, ensure};

use super::setup::Setup;
use crate::ktap::CaseResult;
use crate::pattern::Pattern;
use crate::sys::{allocate, punch};
use crate::vm::Private;
use crate::{MIB, PAGE, mem, private_suites};

// On guest_memfd only the cheapest.
private_suites!(
    "zero",
    [fresh_pages_next_to_written_ones: 180],
    memfile: [
        fresh_pages_on_demand: 180,
        fresh_pages_after_fallocate: 180,
        fresh_pages_after_pre_fault: 180,
        fresh_pages_after_punch: 180,
    ]
);

const SIZE: u64 = 128 * MIB;

/// A VM that gets its memory from a machine whose free memory was full of a pattern.
fn soiled(kind: Private) -> Result<Setup> {
    let s = Setup::new(kind, SIZE)?;
    let bytes = mem::soil_free_memory(0xdead_c0de_dead_c0de)?;
    println!("soiled {} MiB of free memory", bytes >> 20);
    ensure!(bytes >= 2 * SIZE, "too little memory to say anything");
    Ok(s)
}

fn fresh_pages_on_demand(kind: Private) -> CaseResult {
    let mut s = soiled(kind)?;
    s.vcpu.verify(s.slot.gpa, SIZE, Pattern::ZERO)
}

fn fresh_pages_after_fallocate(kind: Private) -> CaseResult {
    let mut s = soiled(kind)?;
    allocate(&s.fd, 0, SIZE)?;
    s.vcpu.verify(s.slot.gpa, SIZE, Pattern::ZERO)
}

fn fresh_pages_after_pre_fault(kind: Private) -> CaseResult {
    let mut s = soiled(kind)?;
    let (result, left) = s.vcpu.raw_pre_fault(s.slot.gpa, SIZE);
    result.with_context(|| format!("KVM_PRE_FAULT_MEMORY, {left} bytes left"))?;
    s.vcpu.verify(s.slot.gpa, SIZE, Pattern::ZERO)
}

fn fresh_pages_after_punch(kind: Private) -> CaseResult {
    let mut s = soiled(kind)?;
    let part = SIZE / 4;
    s.vcpu.fill(s.slot.gpa, part, Pattern::Generation(1))?;
    punch(&s.fd, 0, part)?;
    s.vcpu.verify(s.slot.gpa, part, Pattern::ZERO)?;
    allocate(&s.fd, part, part)?;
    punch(&s.fd, part, part)?;
    allocate(&s.fd, part, part)?;
    s.vcpu.verify(s.slot.gpa + part, part, Pattern::ZERO).context("allocated, punched, allocated")
}

/// A page that was allocated for one word must not bring others' words along.
fn fresh_pages_next_to_written_ones(kind: Private) -> CaseResult {
    let mut s = soiled(kind)?;
    let part = SIZE / 4;
    s.vcpu.fill_pages(s.slot.gpa, part, Pattern::Constant(1))?;
    for page in (0..part).step_by(64 * PAGE as usize) {
        let gpa = s.slot.gpa + page;
        s.vcpu.verify(gpa, 8, Pattern::Constant(1))?;
        s.vcpu.verify(gpa + 8, PAGE - 8, Pattern::ZERO)?;
    }
    Ok(())
}
