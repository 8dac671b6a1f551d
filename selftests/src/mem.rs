// SPDX-License-Identifier: GPL-2.0
//! The kernel's figures of memory use. In bytes unless said otherwise.

use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result};

use crate::PAGE;
use crate::sys::Mapping;

/// A figure of `/proc/meminfo`.
pub fn meminfo(key: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
    kib_of(&text, key).with_context(|| format!("/proc/meminfo has no {key}"))
}

/// A figure of all memory of this process, in bytes: a line of `/proc/self/smaps_rollup`.
pub fn own(key: &str) -> Result<u64> {
    let path = "/proc/self/smaps_rollup";
    let text = std::fs::read_to_string(path).context(path)?;
    kib_of(&text, key).with_context(|| format!("{path} has no {key}"))
}

/// The value of a line `key:   123 kB`, in bytes.
pub fn kib_of(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// A figure of `/proc/vmstat`, in the kernel's unit.
pub fn vmstat(key: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/vmstat").context("/proc/vmstat")?;
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' '));
    line.and_then(|l| l.trim().parse().ok()).with_context(|| format!("/proc/vmstat has no {key}"))
}

/// How many interrupts of a kind there have been, on all CPUs; a line of `/proc/interrupts`.
pub fn interrupts(kind: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/interrupts").context("/proc/interrupts")?;
    let line = text.lines().find_map(|l| l.trim_start().strip_prefix(kind)?.strip_prefix(':'));
    let line = line.with_context(|| format!("/proc/interrupts has no {kind}"))?;
    Ok(line.split_whitespace().map_while(|n| n.parse::<u64>().ok()).sum())
}

/// Do the CPUs have this feature, in the words of `/proc/cpuinfo`?
pub fn cpu_has(feature: &str) -> Result<bool> {
    let text = std::fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
    let flags = text.lines().find(|l| l.starts_with("flags")).context("/proc/cpuinfo: no flags")?;
    Ok(flags.split_whitespace().any(|flag| flag == feature))
}

/// Free memory, with what is in the lists of the CPUs. Calls [`refresh_counters`] first.
pub fn free() -> Result<u64> {
    refresh_counters();
    let text = std::fs::read_to_string("/proc/zoneinfo").context("/proc/zoneinfo")?;
    let listed = text.lines().filter_map(|line| line.trim().strip_prefix("count:"));
    let listed: u64 = listed.filter_map(|pages| pages.trim().parse::<u64>().ok()).sum();
    Ok(meminfo("MemFree")? + listed * PAGE)
}

/// A counter of memfile.ko: how often something has happened since it was loaded.
pub fn counter(key: &str) -> Result<u64> {
    let path = "/sys/kernel/debug/memfile/counters";
    let text = std::fs::read_to_string(path).context(path)?;
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' '));
    line.and_then(|l| l.parse().ok()).with_context(|| format!("memfile has no counter {key}"))
}

/// Pages of memfiles that are out of the kernel's direct map.
pub fn hidden_pages() -> Result<u64> {
    number("/sys/kernel/debug/memfile/hidden")
}

/// The number that is all of a file of the kernel's.
pub fn number(path: &str) -> Result<u64> {
    let text = std::fs::read_to_string(path).with_context(|| path.to_owned())?;
    text.trim().parse().with_context(|| format!("{path} has no number"))
}

/// Fold the per-CPU parts of the counters in; best effort, needs root.
pub fn refresh_counters() {
    let _ = std::fs::write("/proc/sys/vm/stat_refresh", "1");
}

/// Memory with content of userspace or of files. A guest's memory counts as such with every
/// backing. Calls [`refresh_counters`] first.
pub fn content() -> Result<u64> {
    refresh_counters();
    Ok(meminfo("Cached")? + meminfo("AnonPages")? + huge_pages_in_use()?)
}

/// Huge pages of the default size that are taken from their pool, in bytes. 0 without a pool.
fn huge_pages_in_use() -> Result<u64> {
    // These two are no KiB.
    let (Ok(total), Ok(free)) = (meminfo("HugePages_Total"), meminfo("HugePages_Free")) else {
        return Ok(0);
    };
    Ok(((total - free) >> 10) * meminfo("Hugepagesize")?)
}

/// Resident part of one mapping of this process.
pub fn resident(mapping: &Mapping) -> Result<u64> {
    smaps(mapping, "Rss")
}

/// A figure of one mapping of this process, from `/proc/self/smaps`.
pub fn smaps(mapping: &Mapping, key: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/smaps").context("/proc/self/smaps")?;
    let range = mapping.addr()..mapping.addr() + mapping.len();
    let mut inside = false;
    let mut sum = 0;
    for line in text.lines() {
        if let Some(start) = vma_start(line) {
            inside = range.contains(&start);
        } else if inside {
            sum += kib_of(line, key).unwrap_or(0);
        }
    }
    Ok(sum)
}

/// Start address if this line of smaps opens a mapping.
fn vma_start(line: &str) -> Option<u64> {
    let (start, _) = line.split_whitespace().next()?.split_once('-')?;
    u64::from_str_radix(start, 16).ok()
}

/// A line of `/proc/self/fdinfo` of a descriptor, without its key.
pub fn fdinfo(fd: impl AsFd, key: &str) -> Result<Option<String>> {
    let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
    let text = std::fs::read_to_string(&path).context(path)?;
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(":\t"));
    Ok(line.map(str::to_owned))
}

/// Pages of a memfile that are in memory.
pub fn resident_pages(fd: impl AsFd) -> Result<u64> {
    let pages = fdinfo(fd, "memfile-pages")?.context("fdinfo has no memfile-pages")?;
    pages.parse().context("memfile-pages")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MIB;

    #[test]
    fn reads_proc() {
        assert!(meminfo("MemTotal").unwrap() > MIB);
        assert!(meminfo("NoSuchThing").is_err());
        assert!(vmstat("nr_free_pages").unwrap() > 0);
    }

    #[test]
    fn resident_follows_touch() {
        let mapping = Mapping::anonymous(8 * PAGE).unwrap();
        let _ = mapping.madvise(0, 8 * PAGE, libc::MADV_NOHUGEPAGE);
        assert_eq!(resident(&mapping).unwrap(), 0);
        mapping.store(0, 1);
        mapping.store(5 * PAGE, 1);
        assert_eq!(resident(&mapping).unwrap(), 2 * PAGE);
    }
}
