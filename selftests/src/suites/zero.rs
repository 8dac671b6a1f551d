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
use crate::support::setup::Setup;
use crate::sys::{allocate, punch};
use crate::vm::Private;
use crate::{MIB, PAGE, private_suites};

// On guest_memfd only the cheapest.
private_suites!(
    "zero",
    [fresh_pages_next_to_written_ones],
    memfile: [
        fresh_pages_on_demand,
        fresh_pages_after_fallocate,
        fresh_pages_after_pre_fault,
        fresh_pages_after_punch,
    ]
);

const SIZE: u64 = 8 * MIB;
const SECRET: Pattern = Pattern::Constant(0xdead_c0de_dead_c0de);

/// Let `check` use a VM without memory when another one has just freed its own. Most pages that it
/// gets must have been the other's; if not, once more after a larger VM.
fn inherit(kind: Private, check: fn(&mut Setup) -> CaseResult) -> CaseResult {
    for factor in [2, 4, 8, 16] {
        let mut s = Setup::new(kind, factor * SIZE)?;
        s.vcpu.fill(s.slot.gpa, factor * SIZE, SECRET)?;
        let soiled = pfns(kind, &s)?;
        drop(s);
        let mut heir = Setup::new(kind, SIZE)?;
        check(&mut heir)?;
        let pages = pfns(kind, &heir)?;
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
fn pfns(kind: Private, s: &Setup) -> Result<BTreeSet<u64>> {
    match kind {
        Private::Memfile => {
            Ok(frames(&s.vcpu, &s.slot, &s.fd)?.values().map(|frame| frame.pfn).collect())
        }
        Private::GuestMemfd => Ok(BTreeSet::new()),
    }
}

fn fresh_pages_on_demand(kind: Private) -> CaseResult {
    inherit(kind, |s| s.vcpu.verify(s.slot.gpa, SIZE, Pattern::ZERO))
}

fn fresh_pages_after_fallocate(kind: Private) -> CaseResult {
    inherit(kind, |s| {
        allocate(&s.fd, 0, SIZE)?;
        s.vcpu.verify(s.slot.gpa, SIZE, Pattern::ZERO)
    })
}

fn fresh_pages_after_pre_fault(kind: Private) -> CaseResult {
    inherit(kind, |s| {
        let (result, left) = s.vcpu.raw_pre_fault(s.slot.gpa, SIZE);
        result.with_context(|| format!("KVM_PRE_FAULT_MEMORY, {left} bytes left"))?;
        s.vcpu.verify(s.slot.gpa, SIZE, Pattern::ZERO)
    })
}

/// These pages were the guest's own, but their content is gone as well.
fn fresh_pages_after_punch(kind: Private) -> CaseResult {
    inherit(kind, |s| {
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
fn fresh_pages_next_to_written_ones(kind: Private) -> CaseResult {
    inherit(kind, |s| {
        s.vcpu.fill_pages(s.slot.gpa, SIZE, Pattern::Constant(1))?;
        for page in (0..SIZE).step_by(16 * PAGE as usize) {
            let gpa = s.slot.gpa + page;
            s.vcpu.verify(gpa, 8, Pattern::Constant(1))?;
            s.vcpu.verify(gpa + 8, PAGE - 8, Pattern::ZERO)?;
        }
        Ok(())
    })
}
