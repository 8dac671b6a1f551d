// SPDX-License-Identifier: GPL-2.0

//! C as bindgen sees it: the kernel crate's types, and those it does not have.

#![allow(
    dead_code,
    improper_ctypes,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    reason = "generated"
)]

pub(crate) use kernel::bindings::*;

include!(env!("MEMFILE_BINDINGS"));
