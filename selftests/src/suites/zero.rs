// SPDX-License-Identifier: GPL-2.0
//! No guest ever sees what a page held before: fresh pages are zero, whichever way they come.
//!
//! What they held before is another guest's secret: the page allocator gives out first what it got
//! back last.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};

use super::setup::Setup;
use crate::ktap::CaseResult;
use crate::pattern::Pattern;
use crate::pressure::frames;
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

/// A VM that has no memory yet, and the pages that another one had.
struct Heir {
    s: Setup,
    kind: Private,
    soiled: BTreeSet<u64>,
}

impl Heir {
    fn new(kind: Private) -> Result<Heir> {
        let mut s = Setup::new(kind, 2 * SIZE)?;
        s.vcpu.fill(s.slot.gpa, 2 * SIZE, SECRET)?;
        let soiled = pfns(kind, &s)?;
        drop(s);
        Ok(Heir { s: Setup::new(kind, SIZE)?, kind, soiled })
    }

    /// Fail unless most of the guest's pages were the other's.
    fn expect_inherited(&self) -> CaseResult {
        let pages = pfns(self.kind, &self.s)?;
        let inherited = pages.intersection(&self.soiled).count();
        println!("{inherited} of {} pages were another guest's", pages.len());
        ensure!(inherited * 2 >= pages.len(), "too few to say anything");
        Ok(())
    }
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
    let mut heir = Heir::new(kind)?;
    heir.s.vcpu.verify(heir.s.slot.gpa, SIZE, Pattern::ZERO)?;
    heir.expect_inherited()
}

fn fresh_pages_after_fallocate(kind: Private) -> CaseResult {
    let mut heir = Heir::new(kind)?;
    allocate(&heir.s.fd, 0, SIZE)?;
    heir.s.vcpu.verify(heir.s.slot.gpa, SIZE, Pattern::ZERO)?;
    heir.expect_inherited()
}

fn fresh_pages_after_pre_fault(kind: Private) -> CaseResult {
    let mut heir = Heir::new(kind)?;
    let (result, left) = heir.s.vcpu.raw_pre_fault(heir.s.slot.gpa, SIZE);
    result.with_context(|| format!("KVM_PRE_FAULT_MEMORY, {left} bytes left"))?;
    heir.s.vcpu.verify(heir.s.slot.gpa, SIZE, Pattern::ZERO)?;
    heir.expect_inherited()
}

/// These pages were the guest's own, but what they held is gone as well.
fn fresh_pages_after_punch(kind: Private) -> CaseResult {
    let mut heir = Heir::new(kind)?;
    let (s, part) = (&mut heir.s, SIZE / 2);
    s.vcpu.fill(s.slot.gpa, part, SECRET)?;
    punch(&s.fd, 0, part)?;
    s.vcpu.verify(s.slot.gpa, part, Pattern::ZERO)?;
    allocate(&s.fd, part, part)?;
    punch(&s.fd, part, part)?;
    allocate(&s.fd, part, part)?;
    s.vcpu
        .verify(s.slot.gpa + part, part, Pattern::ZERO)
        .context("allocated, punched, allocated")?;
    heir.expect_inherited()
}

/// A page that was allocated for one word must not bring others' words along.
fn fresh_pages_next_to_written_ones(kind: Private) -> CaseResult {
    let mut heir = Heir::new(kind)?;
    let s = &mut heir.s;
    s.vcpu.fill_pages(s.slot.gpa, SIZE, Pattern::Constant(1))?;
    for page in (0..SIZE).step_by(16 * PAGE as usize) {
        let gpa = s.slot.gpa + page;
        s.vcpu.verify(gpa, 8, Pattern::Constant(1))?;
        s.vcpu.verify(gpa + 8, PAGE - 8, Pattern::ZERO)?;
    }
    match kind {
        Private::Memfile => heir.expect_inherited(),
        Private::GuestMemfd => Ok(()),
    }
}
