// SPDX-License-Identifier: GPL-2.0
//! A slow disk: null_blk, which keeps its content in memory.

use std::ffi::CStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::MIB;
use crate::knobs::{raw_write, read, write};
use crate::skip::skip;
use crate::sys::{Errno, check, require_root};

const CONFIGFS: &CStr = c"/sys/kernel/config";
const DISKS: &str = "/sys/kernel/config/nullb";

/// Bytes of a sector, the unit of `badblocks` and the like.
const SECTOR: u64 = 512;

/// A disk, until it is dropped.
pub struct Disk {
    /// Its folder in configfs.
    folder: PathBuf,
    name: String,
    size: u64,
}

impl Disk {
    /// A disk of `size` bytes that completes each request after `delay`, and never within the call
    /// that makes it. SKIP without null_blk and configfs.
    pub fn new(size: u64, delay: Duration) -> Result<Disk> {
        require_root()?;
        mount_configfs()?;
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("memfile-{}-{number}", std::process::id());
        let folder = Path::new(DISKS).join(&name);
        fs::create_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
        let disk = Disk { folder, name, size };
        disk.set("size", size.div_ceil(MIB))?;
        disk.set("memory_backed", 1)?;
        // A timer completes the requests.
        disk.set("irqmode", 2)?;
        disk.set("completion_nsec", u64::try_from(delay.as_nanos())?)?;
        // A deep queue, so that no request of a test waits for another.
        disk.set("hw_queue_depth", 4096)?;
        disk.set("power", 1)?;
        Ok(disk)
    }

    fn set(&self, attribute: &str, value: u64) -> Result<()> {
        write(self.folder.join(attribute), &value.to_string())
    }

    pub fn path(&self) -> String {
        format!("/dev/{}", self.name)
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads and writes in flight.
    pub fn in_flight(&self) -> Result<(u64, u64)> {
        let text = read(format!("/sys/block/{}/inflight", self.name))?;
        let mut words = text.split_whitespace().map(str::parse);
        match (words.next(), words.next()) {
            (Some(Ok(reads)), Some(Ok(writes))) => Ok((reads, writes)),
            _ => anyhow::bail!("inflight reads {text}"),
        }
    }

    /// Wait until no write is in flight.
    pub fn wait_for_writes(&self) -> Result<()> {
        while self.in_flight()?.1 > 0 {
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Make all requests fail that touch the disk from byte `start` on, or none.
    pub fn fail(&self, start: u64, fails: bool) -> Result<()> {
        let sign = if fails { '+' } else { '-' };
        let range = format!("{sign}{}-{}", start / SECTOR, self.size / SECTOR - 1);
        write(self.folder.join("badblocks"), &range)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = raw_write(&self.folder.join("power"), "0");
        if let Err(e) = fs::remove_dir(&self.folder) {
            println!("{} stays: {e}", self.folder.display());
        }
    }
}

fn mount_configfs() -> Result<()> {
    if Path::new(DISKS).exists() {
        return Ok(());
    }
    let nothing = std::ptr::null();
    // SAFETY: The names are C strings, and configfs takes no options.
    let result = check(unsafe {
        libc::mount(c"config".as_ptr(), CONFIGFS.as_ptr(), c"configfs".as_ptr(), 0, nothing)
    });
    match result {
        Ok(_) | Err(Errno::EBUSY | Errno::ENOENT | Errno::ENODEV) => {}
        Err(errno) => return Err(errno).context("mount configfs"),
    }
    if Path::new(DISKS).exists() { Ok(()) } else { skip("the kernel has no null_blk in configfs") }
}
