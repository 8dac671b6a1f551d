// SPDX-License-Identifier: GPL-2.0
//! Idle page tracking: it reports the page frames that were used since they were marked idle.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

use super::drop_caches;
use crate::skip::skip;
use crate::sys::require_root;

const BITMAP: &str = "/sys/kernel/mm/page_idle/bitmap";

/// The bitmap. Of a large folio only the first page frame is in it.
pub struct Idle(File);

impl Idle {
    /// SKIP without idle page tracking.
    pub fn open() -> Result<Idle> {
        require_root()?;
        match OpenOptions::new().read(true).write(true).open(BITMAP) {
            Ok(file) => Ok(Idle(file)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                skip(format!("the kernel has no {BITMAP}"))
            }
            Err(e) => Err(e).context(BITMAP),
        }
    }

    /// Whether it covers a page frame. It lacks the last few of the memory if they do not fill a
    /// word.
    pub fn knows(&self, pfn: u64) -> bool {
        matches!(self.0.read_at(&mut [0; 8], place(pfn).0), Ok(8))
    }

    /// Mark a page frame idle.
    pub fn mark(&self, pfn: u64) -> Result<()> {
        let (at, bit) = place(pfn);
        // A short write: the last few, which are marked nevertheless.
        self.0.write_at(&bit.to_ne_bytes(), at).with_context(|| format!("mark {pfn:#x} idle"))?;
        Ok(())
    }

    /// Mark these, also those that have not reached the lists yet.
    pub fn mark_all(&self, pfns: impl IntoIterator<Item = u64>) -> Result<()> {
        drop_caches()?;
        pfns.into_iter().try_for_each(|pfn| self.mark(pfn))
    }

    /// Whether it was not used since it was marked. Asks the page tables and the consumers.
    pub fn get(&self, pfn: u64) -> Result<bool> {
        let (at, bit) = place(pfn);
        let mut word = [0; 8];
        self.0.read_exact_at(&mut word, at).with_context(|| format!("is {pfn:#x} idle?"))?;
        Ok(u64::from_ne_bytes(word) & bit != 0)
    }
}

/// The place of a page frame in the bitmap: byte of the word, and its bit there.
fn place(pfn: u64) -> (u64, u64) {
    (pfn / 64 * 8, 1 << (pfn % 64))
}
