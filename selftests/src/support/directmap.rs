// SPDX-License-Identifier: GPL-2.0
//! The kernel's direct map, and what is out of it.

use anyhow::{Result, ensure};

use crate::mem;
use crate::pressure::Memory;
use crate::sys::memfile_unsized;

/// The kernel's view of physical memory; SKIP where there are no memfiles.
pub fn memory() -> Result<Memory> {
    drop(memfile_unsized()?);
    Memory::open()
}

/// The pages that are out of the direct map because of `work`.
pub struct Hidden(u64);

impl Hidden {
    pub fn now() -> Result<Hidden> {
        drop(memfile_unsized()?);
        mem::hidden_pages().map(Hidden)
    }

    pub fn expect(&self, more: u64, when: &str) -> Result<()> {
        let now = mem::hidden_pages()?;
        ensure!(now == self.0 + more, "{when}: {} pages were out, {now} are", self.0);
        Ok(())
    }
}

/// How much of it has entries of 4 KiB, 2 MiB and 1 GiB, in bytes.
pub fn direct_map() -> Result<[u64; 3]> {
    let part = |name: &str| mem::meminfo(name).unwrap_or(0);
    Ok([part("DirectMap4k"), part("DirectMap2M"), part("DirectMap1G")])
}
