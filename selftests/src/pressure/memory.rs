// SPDX-License-Identifier: GPL-2.0
//! Physical memory as the kernel sees it.
//!
//! `/dev/mem` reads a page frame through the direct map, by `copy_from_kernel_nofault()`, and gives
//! EFAULT where the direct map has none.

use std::fs::{self, File};

use anyhow::{Context, Result, bail, ensure};

use crate::PAGE;
use crate::pattern::Pattern;
use crate::skip::skip;
use crate::sys::{Errno, pread, require_root};

/// Bytes that are looked for at once.
const LINE: usize = 64;

/// Physical memory through the direct map.
pub struct Memory(File);

impl Memory {
    /// SKIP where no process may read it.
    pub fn open() -> Result<Memory> {
        require_root()?;
        match File::open("/dev/mem") {
            Ok(file) => Ok(Memory(file)),
            Err(_) => skip("the kernel has no /dev/mem"),
        }
    }

    /// The content of a frame, if the direct map has it.
    pub fn frame(&self, pfn: u64) -> Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; PAGE as usize];
        match pread(&self.0, &mut bytes, pfn * PAGE) {
            Ok(read) => {
                ensure!(read as u64 == PAGE, "{read} bytes of frame {pfn:#x}");
                Ok(Some(bytes))
            }
            Err(Errno::EFAULT) => Ok(None),
            Err(e) => bail!("frame {pfn:#x} in /dev/mem: {e}"),
        }
    }

    /// Is a frame in the direct map?
    pub fn has(&self, pfn: u64) -> Result<bool> {
        Ok(self.frame(pfn)?.is_some())
    }

    /// Fail unless all frames of a guest are in the direct map, or none.
    pub fn expect_all(&self, pfns: &[u64], there: bool, when: &str) -> Result<()> {
        for pfn in pfns {
            let has = self.has(*pfn)?;
            ensure!(has == there, "{when}: frame {pfn:#x} is in the direct map: {has}");
        }
        Ok(())
    }

    /// Look for 64 bytes of `pattern` at any address in `[start, start + len)`, in all of memory,
    /// at multiples of 64. Returns how often they are there, and how many frames are not in the
    /// direct map.
    ///
    /// The words are computed one by one: this process never has 64 bytes of them.
    pub fn search(&self, pattern: Pattern, start: u64, len: u64) -> Result<(u64, u64)> {
        let mut chunk = vec![0; 64 << 10];
        let (mut found, mut absent) = (0, 0);
        for (mut at, end) in system_ram()? {
            while at < end {
                let size = (end - at).min(chunk.len() as u64);
                let bytes = &mut chunk[..size as usize];
                match pread(&self.0, bytes, at) {
                    Ok(read) => {
                        ensure!(read as u64 == size, "{read} of {size} bytes at {at:#x}");
                        found += hits(bytes, pattern, start, len);
                    }
                    Err(Errno::EFAULT) => {
                        for page in (at..at + size).step_by(PAGE as usize) {
                            match self.frame(page / PAGE)? {
                                Some(bytes) => found += hits(&bytes, pattern, start, len),
                                None => absent += 1,
                            }
                        }
                    }
                    Err(e) => bail!("{at:#x} in /dev/mem: {e}"),
                }
                at += size;
            }
        }
        Ok((found, absent))
    }

    /// Does any frame begin with 64 bytes of `pattern` as it is in `[start, start + len)`? Looks at
    /// no more of each frame: for what fills whole pages.
    pub fn finds(&self, pattern: Pattern, start: u64, len: u64) -> Result<bool> {
        let mut line = [0; LINE];
        for (first, end) in system_ram()? {
            for at in (first..end).step_by(PAGE as usize) {
                match pread(&self.0, &mut line, at) {
                    Ok(_) if hits(&line, pattern, start, len) > 0 => return Ok(true),
                    Ok(_) | Err(Errno::EFAULT) => {}
                    Err(e) => bail!("{at:#x} in /dev/mem: {e}"),
                }
                line.fill(0);
            }
        }
        Ok(false)
    }

    /// Fail unless a frame that has left the file is in the direct map, with nothing of `pattern` as
    /// it is at `[start, start + len)`.
    pub fn expect_empty(&self, pfn: u64, pattern: Pattern, start: u64, len: u64) -> Result<()> {
        let Some(bytes) = self.frame(pfn)? else {
            bail!("frame {pfn:#x} is not in the direct map");
        };
        let hits = hits(&bytes, pattern, start, len);
        ensure!(hits == 0, "frame {pfn:#x} still has the content");
        Ok(())
    }

    /// Fail unless that many frames are not in the direct map.
    pub fn expect_absent(&self, wanted: u64, when: &str) -> Result<()> {
        let now = self.absent()?;
        ensure!(now == wanted, "{when}: {now} frames are not in the direct map, not {wanted}");
        Ok(())
    }

    /// How many frames are not in the direct map.
    pub fn absent(&self) -> Result<u64> {
        Ok(self.search(Pattern::Generation(0), 0, 0)?.1)
    }
}

/// The word at an offset.
pub fn word(bytes: &[u8], offset: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_ne_bytes(word)
}

/// How often 64 bytes of `pattern` as it is in `[start, start + len)` are in `bytes`.
pub fn hits(bytes: &[u8], pattern: Pattern, start: u64, len: u64) -> u64 {
    // A caller that counts absent frames needs no hits, and a search of all memory takes long.
    if len == 0 {
        return 0;
    }
    // The inverse of what pattern.word() multiplies the address by.
    let step = pattern.step(1);
    let inverse =
        (0..6).fold(step, |x: u64, _| x.wrapping_mul(2u64.wrapping_sub(step.wrapping_mul(x))));
    let base = pattern.word(0);
    let mut found = 0;
    for line in bytes.chunks_exact(LINE) {
        let addr = word(line, 0).wrapping_sub(base).wrapping_mul(inverse);
        let inside = addr.wrapping_sub(start) < len;
        let all = || (0..LINE).step_by(8).all(|n| word(line, n) == pattern.word(addr + n as u64));
        found += u64::from(inside && all());
    }
    found
}

/// Ranges of physical addresses that are memory, whole pages.
fn system_ram() -> Result<Vec<(u64, u64)>> {
    let text = fs::read_to_string("/proc/iomem").context("/proc/iomem")?;
    let mut ranges = Vec::new();
    for line in text.lines().filter(|line| line.ends_with(" : System RAM")) {
        let range = line.trim().split(' ').next().and_then(|range| range.split_once('-'));
        let (first, last) = range.context("a line of /proc/iomem")?;
        let (first, last) = (u64::from_str_radix(first, 16)?, u64::from_str_radix(last, 16)?);
        ranges.push((first.next_multiple_of(PAGE), (last + 1) / PAGE * PAGE));
    }
    ensure!(!ranges.is_empty(), "/proc/iomem has no System RAM");
    Ok(ranges)
}
