// SPDX-License-Identifier: GPL-2.0
//! Memfiles whose pages are not of shmem: `/dev/memfile-store`.
//!
//! `rust/test/memfile_store.rs` of the kernel module is the other side.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

use crate::PAGE;
use crate::module::Module;
use crate::sys::{self, SysResult, ioctl_fd, ioctl_mut, ioctl_val};

const MAGIC: u32 = b'M' as u32;

/// Words of a page frame.
pub const FRAME_WORDS: usize = PAGE as usize / 8;

ioctl_io_nr!(CREATE, MAGIC, 1);
ioctl_io_nr!(REGISTER, MAGIC, 2);
ioctl_io_nr!(UNREGISTER, MAGIC, 3);
ioctl_io_nr!(HARD_ERROR, MAGIC, 11);
ioctl_io_nr!(PIN, MAGIC, 12);
ioctl_iowr_nr!(READ_FRAME, MAGIC, 13, [u64; FRAME_WORDS]);
ioctl_io_nr!(ALIAS, MAGIC, 14);
// Ioctls of the store's files.
ioctl_io_nr!(MIGRATE, MAGIC, 4);
ioctl_io_nr!(REFERENCED, MAGIC, 5);
ioctl_io_nr!(WRITE_OUT, MAGIC, 6);
ioctl_io_nr!(WRITE_OUT_REFUSED, MAGIC, 7);
ioctl_io_nr!(BREAK, MAGIC, 8);
ioctl_io_nr!(WANTED, MAGIC, 9);
ioctl_io_nr!(FAIL, MAGIC, 10);

/// An open `/dev/memfile-store`.
#[derive(Debug)]
pub struct Store(OwnedFd);

impl Store {
    /// The store of memfile_store.ko, which is loaded.
    pub fn open() -> Result<Store> {
        let device = "/dev/memfile-store";
        sys::open(device, libc::O_RDWR).context(device).map(Store)
    }

    /// The same, and the module, which is loaded for that: for cases that let the kernel do something
    /// and need no store. The device is closed first.
    pub fn load() -> Result<(Store, Module)> {
        let module = Module::store()?;
        module.load().context("load memfile_store.ko")?;
        Ok((Store::open()?, module))
    }

    /// A file of `size` bytes without pages, open for writing.
    pub fn create(&self, size: u64) -> Result<OwnedFd> {
        ioctl_fd(&self.0, CREATE(), size / PAGE).context("make a file of the store")
    }

    pub fn register(&self) -> SysResult<()> {
        ioctl_val(&self.0, REGISTER(), 0).map(drop)
    }

    /// Its files get no new bindings then.
    pub fn unregister(&self) -> SysResult<()> {
        ioctl_val(&self.0, UNREGISTER(), 0).map(drop)
    }

    /// Report an error in a page frame as hardware does. The frame is lost until the machine ends,
    /// and the kernel takes no injected error back from now on.
    pub fn hard_error(&self, pfn: u64) -> SysResult<()> {
        ioctl_val(&self.0, HARD_ERROR(), pfn).map(drop)
    }

    /// Pin the first page of any memfd for a device, and let go of it.
    pub fn pin(&self, fd: impl AsFd) -> SysResult<()> {
        ioctl_val(&self.0, PIN(), fd.as_fd().as_raw_fd() as u64).map(drop)
    }

    /// A file with an inode of its own and the page cache of `fd`, open for writing.
    pub fn alias(&self, fd: impl AsFd) -> Result<OwnedFd> {
        ioctl_fd(&self.0, ALIAS(), fd.as_fd().as_raw_fd() as u64).context("make an alias")
    }

    /// Let the kernel read a page frame by `copy_from_kernel_nofault()`: EFAULT if it is not in the
    /// direct map.
    pub fn read_frame(&self, pfn: u64) -> SysResult<[u64; FRAME_WORDS]> {
        let mut arg = [0; FRAME_WORDS];
        arg[0] = pfn;
        // SAFETY: The array is the one of this ioctl.
        unsafe { ioctl_mut(self.0.as_fd(), READ_FRAME(), &mut arg) }?;
        Ok(arg)
    }
}

/// Migrate a page of a file of the store.
pub fn migrate(fd: impl AsFd, index: u64) -> SysResult<()> {
    ioctl_val(fd, MIGRATE(), index).map(drop)
}

/// Has a consumer used the page since the last call?
pub fn referenced(fd: impl AsFd, index: u64) -> SysResult<bool> {
    ioctl_val(fd, REFERENCED(), index).map(|answer| answer != 0)
}

/// Send the page to swap, which may refuse it.
pub fn write_out(fd: impl AsFd, index: u64, refused: bool) -> SysResult<()> {
    let request = if refused { WRITE_OUT_REFUSED() } else { WRITE_OUT() };
    ioctl_val(fd, request, index).map(drop)
}

/// Inject a memory error into the page.
pub fn break_page(fd: impl AsFd, index: u64) -> SysResult<()> {
    ioctl_val(fd, BREAK(), index).map(drop)
}

/// Let the store fail with this errno when it is asked for a page of the file; 0: not any more.
pub fn fail(fd: impl AsFd, errno: i32) -> SysResult<()> {
    ioctl_val(fd, FAIL(), errno as u64).map(drop)
}

/// The core's requests to the store for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// `MEMFILE_F_*`
    pub flags: u64,
    /// New pages may come from areas for movable memory.
    pub movable: bool,
    /// How often pages had to leave these.
    pub left: u64,
}

/// Read the core's requests to the store for a file.
pub fn wanted(fd: impl AsFd) -> SysResult<Wanted> {
    let answer = ioctl_val(fd, WANTED(), 0)? as u64;
    Ok(Wanted { flags: answer & 0xff, movable: answer & 0x100 != 0, left: answer >> 9 })
}

impl AsFd for Store {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
