// SPDX-License-Identifier: GPL-2.0
//! No guest ever sees what a page held before: fresh pages are zero, whichever way they come.

use anyhow::{Context, ensure};

use super::setup::Setup;
use crate::ktap::{CaseResult, Suite};
use crate::pattern::Pattern;
use crate::sys::{allocate, punch};
use crate::vm::Private;
use crate::{MIB, PAGE, mem, private_suite};

pub static SUITE: Suite = private_suite!("zero", Memfile, [fresh_pages_are_zero: 180]);
/// The same on guest_memfd: proves the test on every kernel.
pub static GMEM: Suite = private_suite!("zero_gmem", GuestMemfd, [fresh_pages_are_zero: 180]);

/// All memory that the machine has free is filled with a pattern first, which takes a while; so
/// one case takes pages in every way there is, each from memory that nobody had since.
fn fresh_pages_are_zero(kind: Private) -> CaseResult {
    let way = 64 * MIB;
    let mut s = Setup::new(kind, 5 * way)?;
    let bytes = mem::soil_free_memory(0xdead_c0de_dead_c0de)?;
    println!("soiled {} MiB of free memory", bytes >> 20);
    ensure!(bytes >= 10 * way, "too little memory to say anything");
    let at = |n| (s.slot.gpa + n * way, n * way);

    let (gpa, _) = at(0);
    s.vcpu.verify(gpa, way, Pattern::ZERO).context("on demand")?;

    let (gpa, offset) = at(1);
    allocate(&s.fd, offset, way)?;
    s.vcpu.verify(gpa, way, Pattern::ZERO).context("after fallocate")?;

    let (gpa, _) = at(2);
    let (result, left) = s.vcpu.raw_pre_fault(gpa, way);
    result.with_context(|| format!("KVM_PRE_FAULT_MEMORY, {left} bytes left"))?;
    s.vcpu.verify(gpa, way, Pattern::ZERO).context("after a pre-fault")?;

    // A page that was allocated for one word must not bring others' words along.
    let (gpa, offset) = at(3);
    s.vcpu.fill_pages(gpa, way, Pattern::Constant(1))?;
    for page in (0..way).step_by(64 * PAGE as usize) {
        let gpa = gpa + page;
        s.vcpu.verify(gpa, 8, Pattern::Constant(1))?;
        s.vcpu.verify(gpa + 8, PAGE - 8, Pattern::ZERO).context("next to a written word")?;
    }

    punch(&s.fd, offset, way)?;
    s.vcpu.verify(gpa, way, Pattern::ZERO).context("after a punch")?;

    let (gpa, offset) = at(4);
    allocate(&s.fd, offset, way)?;
    punch(&s.fd, offset, way)?;
    allocate(&s.fd, offset, way)?;
    s.vcpu.verify(gpa, way, Pattern::ZERO).context("after fallocate, punch, fallocate")
}
