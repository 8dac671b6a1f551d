// SPDX-License-Identifier: GPL-2.0
//! What the guests of a kernel that crashes have in memory: for `memfile-crash`, which makes them,
//! and for the suite that looks for it in the dump.

use crate::MIB;
use crate::pattern::Pattern;

/// What they wrote to as many bytes each: to memory that is out of the direct map, and to memory that
/// is pinned only.
pub const HIDDEN: Pattern = Pattern::Generation(7101);
pub const PINNED: Pattern = Pattern::Generation(7102);
pub const SIZE: u64 = 4 * MIB;
