// SPDX-License-Identifier: GPL-2.0
//! Memfiles of huge pages: 2 MiB are allocated and freed together, and a hole of a part of them only
//! reads zeros (rule 24).

use super::memfile::{Shape, run, run_with_guest};
use crate::ktap::{CaseResult, Suite};
use crate::support::backend;
use crate::support::setup::LAYOUTS;
use crate::{HUGE, PAGE, suite};

pub static SUITE: Suite = suite!(
    "model_huge",
    [
        memfile_has_the_pages_it_was_told_to_have,
        memfile_of_a_guest_has_what_both_made_of_it: 120,
        memfile_of_a_guest_at_another_place_has_what_both_made_of_it: 120,
    ]
);

/// KVM maps the first two pages of the slot as they are, and a part of the third.
const CONGRUENT: Shape = Shape {
    on: &backend::HUGE,
    end: 6 * HUGE,
    size: 2 * HUGE + 40 * PAGE,
    offset: HUGE,
    gpa: LAYOUTS[0].gpa,
};

/// KVM maps small pages; the slot begins and ends within a page.
const SHIFTED: Shape =
    Shape { offset: HUGE + 4 * PAGE, gpa: LAYOUTS[0].gpa + 3 * PAGE, ..CONGRUENT };

fn memfile_has_the_pages_it_was_told_to_have() -> CaseResult {
    let _pool = backend::HUGE.prepare()?;
    run(CONGRUENT, 8)
}

fn memfile_of_a_guest_has_what_both_made_of_it() -> CaseResult {
    let _pool = backend::HUGE.prepare()?;
    run_with_guest(CONGRUENT, 2)
}

fn memfile_of_a_guest_at_another_place_has_what_both_made_of_it() -> CaseResult {
    let _pool = backend::HUGE.prepare()?;
    run_with_guest(SHIFTED, 2)
}
