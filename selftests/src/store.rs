// SPDX-License-Identifier: GPL-2.0
//! Memfiles whose pages are not of shmem: `/dev/memfile-store`.
//!
//! `rust/test/memfile_store.rs` of the kernel module is the other side.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use vmm_sys_util::ioctl_io_nr;

use crate::PAGE;
use crate::sys::{self, SysResult, ioctl_fd, ioctl_val};

const MAGIC: u32 = b'M' as u32;

ioctl_io_nr!(CREATE, MAGIC, 1);
ioctl_io_nr!(REGISTER, MAGIC, 2);
ioctl_io_nr!(UNREGISTER, MAGIC, 3);

/// An open `/dev/memfile-store`.
#[derive(Debug)]
pub struct Store(OwnedFd);

impl Store {
    /// The store of memfile_store.ko, which is loaded.
    pub fn open() -> Result<Store> {
        let device = "/dev/memfile-store";
        sys::open(device, libc::O_RDWR).context(device).map(Store)
    }

    /// A file of `size` bytes, all of it a hole; open for writing.
    pub fn create(&self, size: u64) -> Result<OwnedFd> {
        ioctl_fd(&self.0, CREATE(), size / PAGE).context("make a file of the store")
    }

    pub fn register(&self) -> SysResult<()> {
        ioctl_val(&self.0, REGISTER(), 0).map(drop)
    }

    /// Nothing new can be bound to its files then.
    pub fn unregister(&self) -> SysResult<()> {
        ioctl_val(&self.0, UNREGISTER(), 0).map(drop)
    }
}

impl AsFd for Store {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
