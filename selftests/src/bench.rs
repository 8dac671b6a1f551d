// SPDX-License-Identifier: GPL-2.0
//! The cost of operations, in instructions: on memfile and on guest_memfd in the same boot, by the
//! size of the pages, out of the direct map and in it, to swap and back, and on ordinary shmem and
//! hugetlbfs; and how costs grow with sizes and numbers.
//!
//! Meant for a machine with one CPU whose time stamp counter counts instructions (`scripts/boot
//! --icount`); elsewhere the figures are ticks of that counter and mean nothing. The plugin
//! `scripts/profile.c` counts other events in windows, which `scripts/bench` joins with the figures.

mod growth;
mod hidden;
mod machine;
mod measure;
mod motion;
mod ordinary;
mod private;
mod stores;

pub use growth::growth;
pub use hidden::hidden;
pub use measure::{Figure, Missing, Point, Report};
pub use motion::motion;
pub use ordinary::ordinary;
pub use private::private;
pub use stores::stores;
