// SPDX-License-Identifier: GPL-2.0
//! What several suites need, and no one else does.

pub mod inject;
pub mod setup;
pub mod stress;
pub mod uffd;
pub mod uring;

/// What the controls of the runner change that leave a knob turned, and to what.
pub const KNOB_PATH: &str = "/proc/sys/vm/swappiness";
pub const KNOB_VALUE: &str = "7";
