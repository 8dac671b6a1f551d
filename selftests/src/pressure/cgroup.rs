// SPDX-License-Identifier: GPL-2.0
//! A memory cgroup of the test's own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::{Setting, drop_caches, raw_write, read, read_number, write};
use crate::skip::skip;
use crate::sys::{Errno, SysResult, require_root};

/// Where cgroups are mounted.
pub const ROOT: &str = "/sys/fs/cgroup";

/// A cgroup that the calling process is in, until it is dropped.
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Make one and move there. SKIP without cgroup v2 and its memory controller.
    pub fn enter() -> Result<Cgroup> {
        let cgroup = Cgroup::new()?;
        cgroup.join()?;
        Ok(cgroup)
    }

    /// Make one without a process.
    pub fn new() -> Result<Cgroup> {
        Cgroup::with("memory")
    }

    /// Make one with this controller, without a process.
    pub fn with(controller: &str) -> Result<Cgroup> {
        Cgroup::with_all(&[controller])
    }

    /// Make one with these controllers, without a process.
    pub fn with_all(controllers: &[&str]) -> Result<Cgroup> {
        require_root()?;
        for controller in controllers {
            if !read(format!("{ROOT}/cgroup.controllers"))?.contains(controller) {
                return skip(format!("cgroup v2 has no {controller} controller here"));
            }
            write(format!("{ROOT}/cgroup.subtree_control"), &format!("+{controller}"))?;
        }
        let pid = std::process::id();
        // A case may need several, and a case that was killed leaves its own behind.
        let path = (0..)
            .map(|n| PathBuf::from(format!("{ROOT}/memfile-{pid}-{n}")))
            .find(|path| !path.exists())
            .context("no free name for a cgroup")?;
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        Ok(Cgroup { path })
    }

    /// Move the calling process here. Its allocations from now on are charged here.
    pub fn join(&self) -> Result<()> {
        write(self.path.join("cgroup.procs"), "0")
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Set `memory.max`, `memory.high`, `memory.swap.max`.
    pub fn set(&self, name: &str, bytes: u64) -> Result<()> {
        write(self.path.join(name), &bytes.to_string())
    }

    /// Change a setting until the returned value is dropped.
    pub fn setting(&self, name: &str, value: &str) -> Result<Setting> {
        Setting::set(self.path.join(name), value)
    }

    /// Its number in `/proc/kpagecgroup`.
    pub fn number(&self) -> Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(fs::metadata(&self.path).with_context(|| self.path.display().to_string())?.ino())
    }

    /// Take such a limit away.
    pub fn unlimit(&self, name: &str) -> Result<()> {
        write(self.path.join(name), "max")
    }

    /// A file with one number.
    pub fn get(&self, name: &str) -> Result<u64> {
        read_number(self.path.join(name))
    }

    /// Bytes charged.
    pub fn current(&self) -> Result<u64> {
        self.get("memory.current")
    }

    /// A line of a file with several, as `memory.stat` and `memory.events` are.
    pub fn line(&self, file: &str, key: &str) -> Result<u64> {
        let text = read(self.path.join(file))?;
        let value = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' '));
        let value = value.with_context(|| format!("{file} has no {key}"))?;
        value.parse().with_context(|| format!("{key} in {file}"))
    }

    /// Reclaim that much from it; `EAGAIN` if it gave less.
    pub fn raw_reclaim(&self, bytes: u64) -> SysResult<()> {
        raw_write(&self.path.join("memory.reclaim"), &bytes.to_string())
            .map_err(|e| Errno(e.raw_os_error().unwrap_or(0)))
    }

    /// Reclaim at most that much: whether it gave all of it.
    pub fn reclaim(&self, bytes: u64) -> Result<bool> {
        match self.raw_reclaim(bytes) {
            Ok(()) => Ok(true),
            Err(Errno::EAGAIN) => Ok(false),
            Err(Errno::ENOENT) => skip("cgroups have no memory.reclaim here"),
            Err(errno) => Err(errno).context("memory.reclaim"),
        }
    }

    /// The same for pages that are not in use. Reclaim does not see pages on their way to the
    /// lists, so caches are dropped first; and active pages stay active while the statistics are
    /// old, so these are read first. The first look at a page may find it used, the second does
    /// not.
    pub fn reclaim_unused(&self, bytes: u64) -> Result<bool> {
        drop_caches()?;
        self.line("memory.stat", "active_anon")?;
        self.reclaim(bytes)
    }

    /// Drop the copies in memory of pages that are in swap and written.
    pub fn forget(&self, bytes: u64) -> Result<()> {
        for _ in 0..64 {
            if self.line("memory.stat", "swapcached")? == 0 {
                return Ok(());
            }
            self.reclaim_unused(bytes)?;
        }
        bail!("{} bytes stay", self.line("memory.stat", "swapcached")?)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The process must leave first. Remaining charges go to the parent.
        let _ = raw_write(format!("{ROOT}/cgroup.procs").as_ref(), "0");
        if let Err(e) = fs::remove_dir(&self.path) {
            println!("{} stays: {e}", self.path.display());
        }
    }
}
