// SPDX-License-Identifier: GPL-2.0

//! The functions that C calls: pointers become references, errors become errnos. No decisions here.

pub(crate) mod exports;
pub(crate) mod ops;
