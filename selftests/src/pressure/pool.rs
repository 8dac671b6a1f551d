// SPDX-License-Identifier: GPL-2.0
//! A pool of huge pages, as the administrator sees it.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use super::{Setting, read_number};
use crate::skip::skip;
use crate::sys::require_root;
use crate::{GIB, MIB, PAGE};

/// The pool of the huge pages of one size.
pub struct Pool {
    path: PathBuf,
    /// The size of its pages, in bytes.
    pub page: u64,
}

/// The figures of a pool, in huge pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub total: u64,
    pub free: u64,
    pub reserved: u64,
    pub surplus: u64,
}

impl Usage {
    /// Pages in use.
    pub fn used(&self) -> u64 {
        self.total - self.free
    }
}

impl Pool {
    /// The pool of the pages of `page` bytes. SKIP if the machine has no such pages.
    pub fn of(page: u64) -> Result<Pool> {
        require_root()?;
        let path = PathBuf::from(format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page >> 10));
        if !path.exists() {
            return skip(format!("the machine has no huge pages of {} KiB", page >> 10));
        }
        Ok(Pool { path, page })
    }

    /// The sizes of huge pages that the machine has, in bytes.
    pub fn sizes() -> Result<Vec<u64>> {
        let mut sizes = Vec::new();
        for entry in std::fs::read_dir("/sys/kernel/mm/hugepages").context("huge pages")? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let kib = name.strip_prefix("hugepages-").and_then(|n| n.strip_suffix("kB"));
            sizes.push(kib.and_then(|n| n.parse::<u64>().ok()).context(name.clone())? << 10);
        }
        Ok(sizes)
    }

    /// A file of its pages in a cgroup of the controller `hugetlb`.
    pub fn charge_file(&self, name: &str) -> String {
        let size = if self.page < GIB {
            format!("{}MB", self.page / MIB)
        } else {
            format!("{}GB", self.page / GIB)
        };
        format!("hugetlb.{size}.{name}")
    }

    /// The order of its pages.
    pub fn order(&self) -> u32 {
        (self.page / PAGE).ilog2()
    }

    /// Give it exactly `count` pages, until the returned value is dropped. SKIP if there is no
    /// room for them.
    pub fn fill(&self, count: u64) -> Result<Setting> {
        let setting = Setting::set(self.path.join("nr_hugepages"), &count.to_string())?;
        let total = self.usage()?.total;
        if total < count {
            return skip(format!("there is room for {total} huge pages, not for {count}"));
        }
        ensure!(total == count, "the pool has {total} pages, not {count}");
        Ok(setting)
    }

    /// Let it take `count` pages more from free memory when it is empty.
    pub fn overcommit(&self, count: u64) -> Result<Setting> {
        Setting::set(self.path.join("nr_overcommit_hugepages"), &count.to_string())
    }

    /// Lower it to `count` pages, as far as none of them is in use, until the returned value is
    /// dropped: those in use are surplus.
    pub fn lower(&self, count: u64) -> Result<Setting> {
        Setting::set(self.path.join("nr_hugepages"), &count.to_string())
    }

    /// Split `count` of its free pages into smaller ones.
    pub fn demote(&self, count: u64) -> Result<()> {
        super::write(self.path.join("demote"), &count.to_string())
    }

    /// Its figures.
    pub fn usage(&self) -> Result<Usage> {
        let figure = |name: &str| read_number(self.path.join(name));
        Ok(Usage {
            total: figure("nr_hugepages")?,
            free: figure("free_hugepages")?,
            reserved: figure("resv_hugepages")?,
            surplus: figure("surplus_hugepages")?,
        })
    }

    /// Fail unless `used` pages are in use, and none is reserved.
    pub fn expect_used(&self, used: u64, when: &str) -> Result<()> {
        let now = self.usage()?;
        ensure!(
            now.used() == used && now.reserved == 0,
            "{when}: {} pages are in use, not {used}: {now:?}",
            now.used()
        );
        Ok(())
    }

    /// Fail unless the figures are those of `before`: no page stays in use, and none reserved.
    pub fn expect_same(&self, before: Usage) -> Result<()> {
        let now = self.usage()?;
        ensure!(now == before, "the pool was {before:?} and is {now:?}");
        Ok(())
    }
}
