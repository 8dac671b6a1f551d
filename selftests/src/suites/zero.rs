// SPDX-License-Identifier: GPL-2.0
//! No guest ever sees the old content of a page: new pages are zero, in whichever way they are
//! allocated.
//!
//! The old content is another guest's secret: the page allocator returns the pages first that were
//! freed last.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};

use crate::ktap::CaseResult;
use crate::pattern::Pattern;
use crate::pressure::frames;
use crate::support::backend::{Backend, MEMFILE};
use crate::support::setup::Setup;
use crate::sys::{allocate, punch};
use crate::{MIB, PAGE, conformance};

conformance!(
    "zero",
    [
        fresh_pages_next_to_written_ones,
        fresh_pages_on_demand,
        fresh_pages_after_fallocate,
        fresh_pages_after_pre_fault,
        fresh_pages_after_punch,
    ],
    huge: all,
    // Each takes the page twice. For one that fallocate made, see punch_1g; pre-fault and demand take
    // the same way.
    gigantic: [fresh_pages_next_to_written_ones],
);

const SIZE: u64 = 8 * MIB;
const SECRET: Pattern = Pattern::Constant(0xdead_c0de_dead_c0de);

/// Let `check` use a VM without memory when another one has just freed its own. Most pages that it
/// gets must have been the other's; if not, once more after a larger VM.
fn inherit(on: &'static Backend, check: fn(&mut Setup) -> CaseResult) -> CaseResult {
    for factor in [2, 4, 8, 16] {
        let mut s = Setup::new(on, factor * SIZE)?;
        s.vcpu.fill(s.slot.gpa, factor * SIZE, SECRET)?;
        let soiled = pfns(on, &s)?;
        drop(s);
        let mut heir = Setup::new(on, SIZE)?;
        check(&mut heir)?;
        let pages = pfns(on, &heir)?;
        let inherited = pages.intersection(&soiled).count();
        println!("{inherited} of {} pages were another guest's", pages.len());
        // A guest_memfd has no such figure.
        if inherited * 2 >= pages.len() {
            return Ok(());
        }
    }
    bail!("too few to say anything")
}

/// The page frames of a guest; those of a guest_memfd are not traced.
fn pfns(on: &'static Backend, s: &Setup) -> Result<BTreeSet<u64>> {
    if on.kind != MEMFILE.kind {
        return Ok(BTreeSet::new());
    }
    Ok(frames(&s.vcpu, &s.slot, &s.fd)?.values().map(|frame| frame.pfn).collect())
}

fn fresh_pages_on_demand(on: &'static Backend) -> CaseResult {
    inherit(on, |s| s.vcpu.verify(s.slot.gpa, SIZE, Pattern::ZERO))
}

fn fresh_pages_after_fallocate(on: &'static Backend) -> CaseResult {
    inherit(on, |s| {
        allocate(&s.fd, 0, SIZE)?;
        s.vcpu.verify(s.slot.gpa, SIZE, Pattern::ZERO)
    })
}

fn fresh_pages_after_pre_fault(on: &'static Backend) -> CaseResult {
    inherit(on, |s| {
        let (result, left) = s.vcpu.raw_pre_fault(s.slot.gpa, SIZE);
        result.with_context(|| format!("KVM_PRE_FAULT_MEMORY, {left} bytes left"))?;
        s.vcpu.verify(s.slot.gpa, SIZE, Pattern::ZERO)
    })
}

/// These pages were the guest's own, but their content is gone as well.
fn fresh_pages_after_punch(on: &'static Backend) -> CaseResult {
    inherit(on, |s| {
        let (gpa, part) = (s.slot.gpa, SIZE / 2);
        s.vcpu.fill(gpa, part, SECRET)?;
        punch(&s.fd, 0, part)?;
        s.vcpu.verify(gpa, part, Pattern::ZERO)?;
        allocate(&s.fd, part, part)?;
        punch(&s.fd, part, part)?;
        allocate(&s.fd, part, part)?;
        s.vcpu.verify(gpa + part, part, Pattern::ZERO).context("allocated, punched, allocated")
    })
}

/// A page that was allocated for one word must not bring others' words along.
fn fresh_pages_next_to_written_ones(on: &'static Backend) -> CaseResult {
    inherit(on, |s| {
        s.vcpu.fill_pages(s.slot.gpa, SIZE, Pattern::Constant(1))?;
        for page in (0..SIZE).step_by(16 * PAGE as usize) {
            let gpa = s.slot.gpa + page;
            s.vcpu.verify(gpa, 8, Pattern::Constant(1))?;
            s.vcpu.verify(gpa + 8, PAGE - 8, Pattern::ZERO)?;
        }
        Ok(())
    })
}
