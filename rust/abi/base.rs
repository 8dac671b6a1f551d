// SPDX-License-Identifier: GPL-2.0

//! All differences between the kernels that the module is made for: a move to another kernel begins
//! here. `Documentation/porting.rst` has the steps.
//!
//! Errors: `kernel::error::code` has these since 7.3. An [`Error`] can be made in a constant only
//! there, hence functions. Parameters of modules: their `value()` is the number since 7.3.

#![allow(
    dead_code,
    reason = "each module takes all of this file, and uses some of it"
)]

use core::borrow::Borrow;
use kernel::bindings;
use kernel::error::Error;

/// A page is lost to a memory error.
pub(crate) fn ehwpoison() -> Error {
    error(bindings::EHWPOISON)
}

/// There is no such call.
pub(crate) fn enosys() -> Error {
    error(bindings::ENOSYS)
}

/// The request is not supported.
pub(crate) fn eopnotsupp() -> Error {
    error(bindings::EOPNOTSUPP)
}

/// A parameter of a module, from what its `value()` gives: before 7.3 a reference.
pub(crate) fn parameter(value: impl Borrow<u64>) -> u64 {
    *value.borrow()
}

fn error(errno: u32) -> Error {
    // CAST: It is below `MAX_ERRNO`.
    Error::from_errno(-(errno as i32))
}
