// SPDX-License-Identifier: GPL-2.0
//! Memfiles of huge pages: all of one is allocated and freed together, and a hole of a part of it only
//! reads zeros (rule 24).

use super::memfile::{Shape, run, run_with_guest};
use crate::ktap::{CaseResult, Suite};
use crate::support::backend::{self, Backend};
use crate::support::hugetlb::suites;
use crate::support::setup::LAYOUTS;
use crate::{GIB, HUGE, PAGE};

suites! {
    [SUITE, "model_huge", &backend::HUGE]: [
        memfile_has_the_pages_it_was_told_to_have,
        memfile_of_a_guest_has_what_both_made_of_it: 120,
        memfile_of_a_guest_at_another_place_has_what_both_made_of_it: 120,
    ]
    [SUITE_1G, "model_1g", &backend::GIGANTIC]: [
        memfile_has_the_pages_it_was_told_to_have: 300,
        memfile_of_a_guest_has_what_both_made_of_it: 300,
        memfile_of_a_guest_at_another_place_has_what_both_made_of_it: 300,
    ]
}

/// A slot that lies in its huge pages as the guest's pages do.
fn congruent(on: &'static Backend) -> Shape {
    let gpa = LAYOUTS[0].gpa;
    match on.page {
        // KVM maps the only page as it is.
        GIB => Shape { on, end: GIB, size: GIB, offset: 0, gpa },
        // The first two as they are, and a part of the third.
        _ => Shape { on, end: 6 * HUGE, size: 2 * HUGE + 40 * PAGE, offset: HUGE, gpa },
    }
}

/// A slot that begins and ends within a huge page.
fn within(on: &'static Backend) -> Shape {
    let all = congruent(on);
    match on.page {
        // KVM maps pages of 2 MiB: 4 KiB of a GiB would take it minutes.
        GIB => {
            Shape { size: GIB / 2 + 40 * PAGE, offset: 2 * HUGE, gpa: all.gpa + 2 * HUGE, ..all }
        }
        // It maps small pages.
        _ => Shape { offset: HUGE + 4 * PAGE, gpa: all.gpa + 3 * PAGE, ..all },
    }
}

/// Clearing a page of 1 GiB takes seconds.
fn files(on: &'static Backend, many: u64) -> u64 {
    if on.page == GIB { 1 } else { many }
}

fn memfile_has_the_pages_it_was_told_to_have(on: &'static Backend) -> CaseResult {
    let _pool = on.prepare()?;
    run(congruent(on), files(on, 8))
}

fn memfile_of_a_guest_has_what_both_made_of_it(on: &'static Backend) -> CaseResult {
    let _pool = on.prepare()?;
    run_with_guest(congruent(on), files(on, 2))
}

fn memfile_of_a_guest_at_another_place_has_what_both_made_of_it(
    on: &'static Backend,
) -> CaseResult {
    let _pool = on.prepare()?;
    run_with_guest(within(on), files(on, 2))
}
