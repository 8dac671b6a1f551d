// SPDX-License-Identifier: GPL-2.0
//! The tests. One file per subject; each case is named after what it promises.

use crate::ktap::Suite;

mod control;
mod infra;

/// Every suite, in the order in which they run.
pub static SUITES: &[&Suite] = &[&infra::SUITE, &control::SUITE, &control::EMPTY, &control::OOPS];
