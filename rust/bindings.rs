// SPDX-License-Identifier: GPL-2.0

//! The bindings to C: the kernel crate's types, and bindgen's for the rest.

#![allow(
    clashing_extern_declarations,
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
use kernel::ffi as ctypes;

/// C's `enum migrate_mode`, which is a `u32` in the kernel crate. Control-flow integrity tells the
/// two apart, see `abi/cfi.rs`: it knows an enum by its name, as it does a `repr(C)` type, which
/// x86-64 passes like the integer.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct migrate_mode(ctypes::c_uint);

impl migrate_mode {
    /// C's `MIGRATE_SYNC`: as long as it takes.
    pub(crate) const SYNC: Self = Self(migrate_mode_MIGRATE_SYNC);
}

include!(env!("MEMFILE_BINDINGS"));

/// C's `THIS_MODULE`, for tables of callbacks that name their owner.
pub(crate) const THIS_MODULE: *mut module = {
    extern "C" {
        static __this_module: kernel::types::Opaque<module>;
    }
    // SAFETY: The kernel made it when it loaded the module, and it stays as long as that.
    unsafe { __this_module.get() }
};
