// SPDX-License-Identifier: GPL-2.0

//! The border to C: everything that needs `unsafe`.

mod cfi;
pub(crate) mod debugfs;
pub(crate) mod folio;
pub(crate) mod inode;
#[cfg(CONFIG_KUNIT = "y")]
pub(crate) mod kunit;
pub(crate) mod notifier;
pub(crate) mod ops;
pub(crate) mod record;
pub(crate) mod store;
pub(crate) mod trace;

use crate::engine::stats::Files;
use crate::policy::range;
use crate::policy::Refusal;
use kernel::error::{
    code::*,
    Error, //
};
use kernel::prelude::*;
use kernel::sync::global_lock;

// The policy layer does not know the kernel.
kernel::static_assert!(range::PAGE_SIZE == kernel::page::PAGE_SIZE as u64);

global_lock! {
    /// The files that there are.
    // SAFETY: `ops::Registration::new()` initialises it before there can be a file.
    pub(crate) unsafe(uninit) static FILES: Mutex<Files> = Files::new();
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Invalid => EINVAL,
            Refusal::NotPermitted => EPERM,
            Refusal::Exists => EEXIST,
            Refusal::NotSupported => EOPNOTSUPP,
        }
    }
}
