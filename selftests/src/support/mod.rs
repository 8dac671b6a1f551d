// SPDX-License-Identifier: GPL-2.0
//! Helpers that several suites share.

pub mod backend;
pub mod crash;
pub mod directmap;
pub mod hugetlb;
pub mod inject;
pub mod nested;
pub mod setup;
pub mod storm;
pub mod stress;
pub mod uffd;
pub mod uring;
pub mod vmm;
pub mod wait;

/// The knob that some controls of the runner leave changed, and its value.
pub const KNOB_PATH: &str = "/proc/sys/vm/swappiness";
pub const KNOB_VALUE: &str = "7";
