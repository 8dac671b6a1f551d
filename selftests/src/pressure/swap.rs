// SPDX-License-Identifier: GPL-2.0
//! Swap on a device of the test's own.

use std::ffi::{CStr, CString};
use std::fs;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use super::{Disk, Setting, raw_write, read_number, write};
use crate::PAGE;
use crate::skip::skip;
use crate::sys::{Errno, SysResult, check, require_root};

/// A device with swap on it, until it is dropped. Others may have swap as well.
pub struct Swap {
    device: Device,
    on: bool,
    size: u64,
    _willing: Option<Setting>,
}

/// The device of the swap.
enum Device {
    /// zram with this number: a read takes no time.
    Zram(u64),
    /// A slow disk.
    Disk(Disk),
}

impl Swap {
    /// Swap of `size` bytes on zram. SKIP without zram.
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
        let swap = Swap { device: Device::Zram(id), on: false, size, _willing: None };
        write(zram_attribute(id, "disksize"), &size.to_string())?;
        swap.start(0)
    }

    /// Swap on a disk, with the highest priority.
    pub fn on_disk(disk: Disk) -> Result<Swap> {
        const SWAP_FLAG_PREFER: i32 = 0x8000;
        let size = disk.size();
        let swap = Swap { device: Device::Disk(disk), on: false, size, _willing: None };
        swap.start(SWAP_FLAG_PREFER | 100)
    }

    fn start(mut self, flags: i32) -> Result<Swap> {
        self.write_header()?;
        let device = CString::new(self.device())?;
        // SAFETY: The path is a C string.
        check(unsafe { libc::swapon(device.as_ptr(), flags) }).context("swapon")?;
        self.on = true;
        // At 0 nothing is swapped before memory has run out.
        self._willing = Setting::unless_so("/proc/sys/vm/swappiness", "60")?;
        Ok(self)
    }

    /// The device's path.
    pub fn device(&self) -> String {
        match &self.device {
            Device::Zram(id) => format!("/dev/zram{id}"),
            Device::Disk(disk) => disk.path(),
        }
    }

    /// The disk that it is on.
    ///
    /// # Panics
    ///
    /// If it was not made by [`Swap::on_disk`].
    pub fn disk(&self) -> &Disk {
        match &self.device {
            Device::Zram(_) => panic!("swap is on zram"),
            Device::Disk(disk) => disk,
        }
    }

    /// The header of mkswap: version, last page, signature; no bad pages, no label.
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

    /// Bring all pages back and give the device up. `ENOMEM` if they do not fit.
    pub fn off(&mut self) -> Result<()> {
        let device = CString::new(self.device())?;
        self.raw_off(&device).context("swapoff")
    }

    /// The same, with the device's path, without an allocation in userspace.
    pub fn raw_off(&mut self, device: &CStr) -> SysResult<()> {
        // SAFETY: The path is a C string.
        match check(unsafe { libc::swapoff(device.as_ptr()) }) {
            Ok(_) | Err(Errno::EINVAL) => self.on = false,
            Err(errno) => return Err(errno),
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
        if let Device::Zram(id) = self.device {
            let _ = raw_write(zram_attribute(id, "reset").as_ref(), "1");
            let _ = raw_write("/sys/class/zram-control/hot_remove".as_ref(), &id.to_string());
        }
    }
}

fn zram_attribute(id: u64, name: &str) -> String {
    format!("/sys/block/zram{id}/{name}")
}
