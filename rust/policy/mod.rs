// SPDX-License-Identifier: GPL-2.0

//! The rules of memfile, as plain Rust.
//!
//! No `unsafe`, no `kernel::`: these files also compile on the host (`rust/host`), where `cargo
//! test` runs the same tests that KUnit runs when the module is loaded, and property tests besides.

pub(crate) mod claim;
pub(crate) mod clock;
pub(crate) mod context;
pub(crate) mod file;
pub(crate) mod flags;
pub(crate) mod range;

/// Why a request is refused; each variant is an errno of C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// `-EINVAL`
    Invalid,
    /// `-EPERM`
    NotPermitted,
    /// `-EEXIST`
    Exists,
    /// `-EOPNOTSUPP`
    NotSupported,
}
