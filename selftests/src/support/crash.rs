// SPDX-License-Identifier: GPL-2.0
//! Contents of the guests of a kernel that crashes: for `memfile-crash`, which makes them,
//! and for the suite that looks for them in the dump.

use crate::MIB;
use crate::pattern::Pattern;

/// The patterns that they wrote to [`SIZE`] bytes each: to memory that is out of the direct map, and
/// to memory that is pinned only.
pub const HIDDEN: Pattern = Pattern::Generation(7101);
pub const PINNED: Pattern = Pattern::Generation(7102);
pub const SIZE: u64 = 4 * MIB;
