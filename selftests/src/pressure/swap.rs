// SPDX-License-Identifier: GPL-2.0
//! Swap on a zram device of the test's own.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use super::{raw_write, read_number, write};
use crate::PAGE;
use crate::ktap::skip;
use crate::sys::{Errno, check, require_root};

/// A zram device with swap on it, until it is dropped. Others may have swap as well.
pub struct Swap {
    id: u64,
    on: bool,
    size: u64,
}

impl Swap {
    /// Swap of `size` bytes. SKIP without zram.
    pub fn on(size: u64) -> Result<Swap> {
        require_root()?;
        // Reading makes a device.
        let id = match read_number("/sys/class/zram-control/hot_add") {
            Ok(id) => id,
            Err(e) if e.chain().any(|e| e.is::<crate::ktap::Skip>()) => {
                return skip("the kernel has no zram");
            }
            Err(e) => return Err(e),
        };
        let mut swap = Swap { id, on: false, size };
        write(swap.attribute("disksize"), &size.to_string())?;
        swap.write_header()?;
        let device = CString::new(swap.device())?;
        // SAFETY: The path is a C string.
        check(unsafe { libc::swapon(device.as_ptr(), 0) }).context("swapon")?;
        swap.on = true;
        Ok(swap)
    }

    /// The device's path.
    pub fn device(&self) -> String {
        format!("/dev/zram{}", self.id)
    }

    fn attribute(&self, name: &str) -> String {
        format!("/sys/block/zram{}/{name}", self.id)
    }

    /// What mkswap writes: version, last page, signature; no bad pages, no label.
    fn write_header(&self) -> Result<()> {
        let mut page = vec![0u8; PAGE as usize];
        page[1024..1028].copy_from_slice(&1u32.to_ne_bytes());
        let last = u32::try_from(self.size / PAGE - 1).context("swap is too large")?;
        page[1028..1032].copy_from_slice(&last.to_ne_bytes());
        page[PAGE as usize - 10..].copy_from_slice(b"SWAPSPACE2");
        let file = fs::OpenOptions::new().write(true).open(self.device());
        let file = file.with_context(|| self.device())?;
        file.write_all_at(&page, 0).context("write the swap header")?;
        file.sync_all().context("write the swap header")
    }

    /// Bytes in use, from `/proc/swaps`.
    pub fn used(&self) -> Result<u64> {
        let text = fs::read_to_string("/proc/swaps").context("/proc/swaps")?;
        let device = self.device();
        // Filename Type Size Used Priority, in KiB.
        let line = text.lines().find(|l| l.split_whitespace().next() == Some(&device));
        let used = line.and_then(|l| l.split_whitespace().nth(3)?.parse::<u64>().ok());
        Ok(used.with_context(|| format!("{device} is not in /proc/swaps"))? << 10)
    }

    /// Fail unless that much is in use.
    pub fn expect_used(&self, bytes: u64, when: &str) -> Result<()> {
        let used = self.used()?;
        ensure!(used == bytes, "{when}: {} KiB of swap in use, not {}", used >> 10, bytes >> 10);
        Ok(())
    }

    /// Bring everything back and give the device up. `ENOMEM` if it does not fit.
    pub fn off(&mut self) -> Result<()> {
        let device = CString::new(self.device())?;
        // SAFETY: The path is a C string.
        match check(unsafe { libc::swapoff(device.as_ptr()) }) {
            Ok(_) | Err(Errno::EINVAL) => self.on = false,
            Err(errno) => return Err(errno).context("swapoff"),
        }
        Ok(())
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        if self.on && self.off().is_err() {
            println!("{} stays in use", self.device());
            return;
        }
        let _ = raw_write(self.attribute("reset").as_ref(), "1");
        let _ = raw_write("/sys/class/zram-control/hot_remove".as_ref(), &self.id.to_string());
    }
}
