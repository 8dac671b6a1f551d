// SPDX-License-Identifier: GPL-2.0

//! C as safe Rust: the kernel's objects as types whose invariants are written down.
//!
//! Each type wraps an object of C; its constructor is `unsafe` and states what the caller must
//! guarantee, its methods are safe. This layer does not know what a memfile does with these
//! objects.

pub(crate) mod allocation;
pub(crate) mod base;
mod cfi;
pub(crate) mod debugfs;
pub(crate) mod file;
pub(crate) mod folio;
pub(crate) mod foreign;
pub(crate) mod hugetlb;
pub(crate) mod inode;
pub(crate) mod invalidation;
pub(crate) mod lock;
pub(crate) mod notifier;
pub(crate) mod percpu;
pub(crate) mod registry;
pub(crate) mod shmem;
pub(crate) mod task;
pub(crate) mod trace;
mod uapi;

use crate::policy::Refusal;
use kernel::error::{
    code::*,
    Error, //
};

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Invalid => EINVAL,
            Refusal::NotPermitted => EPERM,
            Refusal::Exists => EEXIST,
            Refusal::NotSupported => base::eopnotsupp(),
        }
    }
}
