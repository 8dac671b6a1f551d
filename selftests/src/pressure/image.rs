// SPDX-License-Identifier: GPL-2.0
//! An image of all memory, as hibernation makes it.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr};

use super::memory::hits;
use crate::PAGE;
use crate::pattern::Pattern;
use crate::skip::skip;
use crate::sys::{Errno, SysResult, ioctl_mut, ioctl_val, require_root};

const MAGIC: u32 = b'3' as u32;

ioctl_io_nr!(SNAPSHOT_FREEZE, MAGIC, 1);
ioctl_iow_nr!(SNAPSHOT_CREATE_IMAGE, MAGIC, 17, std::os::raw::c_int);

/// `/dev/snapshot`. Frozen tasks go on when this is dropped, and the image is gone.
pub struct Image(File);

impl Image {
    /// SKIP where the kernel cannot hibernate.
    pub fn open() -> Result<Image> {
        require_root()?;
        match Image::raw_open() {
            Err(Errno::ENOENT) => skip("the kernel cannot hibernate"),
            other => other.context("/dev/snapshot"),
        }
    }

    /// With the errno.
    pub fn raw_open() -> SysResult<Image> {
        match File::open("/dev/snapshot") {
            Ok(file) => Ok(Image(file)),
            Err(e) => Err(Errno(e.raw_os_error().unwrap_or(0))),
        }
    }

    /// Freeze all other tasks.
    pub fn freeze(&self) -> Result<()> {
        ioctl_val(&self.0, SNAPSHOT_FREEZE(), 0).map(drop).context("SNAPSHOT_FREEZE")
    }

    /// Make the image, with all devices and all other CPUs stopped.
    pub fn raw_create(&self) -> SysResult<()> {
        let mut suspending = 0 as std::os::raw::c_int;
        // SAFETY: The number is the argument of this ioctl.
        unsafe { ioctl_mut(self.0.as_fd(), SNAPSHOT_CREATE_IMAGE(), &mut suspending) }.map(drop)
    }

    /// How often 64 bytes of `pattern` as it is in `[start, start + len)` are in the image, and how
    /// many pages the image has.
    pub fn search(&mut self, pattern: Pattern, start: u64, len: u64) -> Result<(u64, u64)> {
        let mut page = [0; PAGE as usize];
        let (mut found, mut pages) = (0, 0);
        loop {
            // The kernel gives a page at a time.
            match self.0.read(&mut page) {
                Ok(0) => break,
                Ok(read) => {
                    found += hits(&page[..read], pattern, start, len);
                    pages += 1;
                }
                Err(e) => return Err(e).context("read the image"),
            }
        }
        ensure!(pages > 0, "the image is empty");
        Ok((found, pages))
    }
}
