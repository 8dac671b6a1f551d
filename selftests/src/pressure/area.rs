// SPDX-License-Identifier: GPL-2.0
//! An area for contiguous memory (CMA): movable pages can lie there, until a driver wants the whole
//! area.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::{raw_write, read_number};
use crate::skip::skip;
use crate::sys::{Errno, SysResult, require_root};

/// The kernel's first area.
pub struct Area {
    path: PathBuf,
    /// First page frame.
    start: u64,
    /// Number of page frames.
    pages: u64,
}

impl Area {
    /// SKIP if the kernel was booted without one. The kernel takes movable pages from an area as
    /// long as most free pages of its zone lie in it.
    pub fn find() -> Result<Area> {
        require_root()?;
        let areas = fs::read_dir("/sys/kernel/debug/cma").ok();
        let Some(area) = areas.and_then(|mut areas| areas.next()) else {
            return skip("there is no area for contiguous memory; boot with hugetlb_cma=1G");
        };
        let path = area.context("/sys/kernel/debug/cma")?.path();
        let (start, pages) =
            (read_number(path.join("ranges/0/base_pfn"))?, read_number(path.join("count"))?);
        let area = Area { path, start, pages };
        // Left by a case that was killed.
        area.give_back();
        Ok(area)
    }

    /// Whether a page frame is in it.
    pub fn holds(&self, pfn: u64) -> bool {
        (self.start..self.start + self.pages).contains(&pfn)
    }

    /// Take all of it, as a driver would: all pages in it have to move. `ENOMEM` if one does not.
    pub fn raw_take(&self) -> SysResult<Taken<'_>> {
        raw_write(&self.path.join("alloc"), &self.pages.to_string())
            .map(|()| Taken(self))
            .map_err(|e| Errno(e.raw_os_error().unwrap_or(0)))
    }

    /// [`Area::raw_take`]; a page that is in use for a moment may be in the way once or twice.
    pub fn take(&self) -> Result<Taken<'_>> {
        let mut result = self.raw_take();
        for _ in 0..4 {
            if result.is_ok() {
                break;
            }
            result = self.raw_take();
        }
        result.context("take the area")
    }

    fn give_back(&self) {
        let result = read_number(self.path.join("used")).and_then(|used| {
            raw_write(&self.path.join("free"), &used.to_string()).context("give the area back")
        });
        if let Err(e) = result {
            println!("{} stays taken: {e:#}", self.path.display());
        }
    }
}

/// An area that is in use by a driver, until this is dropped.
pub struct Taken<'a>(&'a Area);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.give_back();
    }
}
