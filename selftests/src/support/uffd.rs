// SPDX-License-Identifier: GPL-2.0
//! The part of userfaultfd that the tests of the seal use.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};

use crate::PAGE;
use crate::skip::skip;
use crate::sys::{Errno, Mapping, SysResult, check, ioctl_mut};

const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;

/// A userfaultfd on which one mapping is registered for missing pages.
pub struct Userfault(OwnedFd);

impl Userfault {
    /// Register all of a mapping; SKIP where there is no userfaultfd.
    pub fn on(view: &Mapping) -> Result<Userfault> {
        // Only a descriptor that does not block can be polled.
        let open = |flags: libc::c_int| {
            let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | flags;
            // SAFETY: Takes no pointer.
            check(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })
        };
        // Kernel accesses as well, if we may.
        let fd = match open(0).or_else(|_| open(UFFD_USER_MODE_ONLY)) {
            Ok(fd) => fd,
            Err(Errno::ENOSYS | Errno::EPERM) => return skip("the kernel has no userfaultfd"),
            Err(errno) => bail!("userfaultfd: {errno}"),
        };
        // SAFETY: A new descriptor that nobody else owns.
        let uffd = Userfault(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) });
        uffd.ioctl(UFFDIO_API, &mut [UFFD_API, 0, 0]).context("UFFDIO_API")?;
        let mut register = [view.addr(), view.len(), UFFDIO_REGISTER_MODE_MISSING, 0];
        uffd.ioctl(UFFDIO_REGISTER, &mut register).context("UFFDIO_REGISTER")?;
        Ok(uffd)
    }

    fn ioctl<const N: usize>(&self, request: u64, words: &mut [u64; N]) -> SysResult {
        // SAFETY: All structures of these requests are made of that many 64-bit words.
        unsafe { ioctl_mut(self.0.as_fd(), request, words) }
    }

    /// Put a copy of the first page of `source` at byte `offset` of the mapping.
    pub fn copy(&self, view: &Mapping, offset: u64, source: &Mapping) -> SysResult {
        self.ioctl(UFFDIO_COPY, &mut [view.addr() + offset, source.addr(), PAGE, 0, 0])
    }

    /// Put a page of zeros at byte `offset` of the mapping.
    pub fn zero(&self, view: &Mapping, offset: u64) -> SysResult {
        self.ioctl(UFFDIO_ZEROPAGE, &mut [view.addr() + offset, PAGE, 0, 0])
    }

    /// Whether a fault is waiting.
    pub fn has_event(&self) -> Result<bool> {
        let mut fd = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: The entry outlives the call.
        check(unsafe { libc::poll(&mut fd, 1, 0) }).context("poll")?;
        ensure!(fd.revents & !libc::POLLIN == 0, "poll says {:#x}", fd.revents);
        Ok(fd.revents != 0)
    }
}
