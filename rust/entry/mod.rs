// SPDX-License-Identifier: GPL-2.0

//! What C calls: pointers become references, errors become errnos. Nothing is decided here.

pub(crate) mod exports;
pub(crate) mod ops;
