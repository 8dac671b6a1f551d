// SPDX-License-Identifier: GPL-2.0
//! Reports of the host's kernel about another process and its files.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, bail};

/// A memfd that a process has open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memfd {
    pub fd: u32,
    /// Bytes.
    pub size: u64,
    /// Allocated bytes, in memory or in swap.
    pub allocated: u64,
    /// For a memfile only: pages in memory, and the number of bindings.
    pub memfile: Option<(u64, u64)>,
}

/// All memfds of a process.
pub fn memfds(pid: u32) -> Result<Vec<Memfd>> {
    let mut found = Vec::new();
    let folder = format!("/proc/{pid}/fd");
    for entry in fs::read_dir(&folder).with_context(|| folder.clone())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match memfd(pid, &name) {
            Ok(memfd) => found.extend(memfd),
            // It was closed meanwhile.
            Err(e) if e.downcast_ref().map(io::Error::kind) == Some(io::ErrorKind::NotFound) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
}

fn memfd(pid: u32, fd: &str) -> Result<Option<Memfd>> {
    let path = format!("/proc/{pid}/fd/{fd}");
    if !fs::read_link(&path)?.to_string_lossy().starts_with("/memfd:") {
        return Ok(None);
    }
    let data = fs::metadata(&path)?;
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"))?;
    let number = |key| fdinfo(&info, key).and_then(|value| value.parse::<u64>().ok());
    let memfile = number("memfile-pages").zip(number("memfile-bindings"));
    let (size, allocated) = (data.size(), data.blocks() * 512);
    Ok(Some(Memfd { fd: fd.parse()?, size, allocated, memfile }))
}

/// A figure that KVM keeps of the VM of a process.
pub fn kvm_figure(pid: u32, name: &str) -> Result<u64> {
    const FOLDER: &str = "/sys/kernel/debug/kvm";
    for entry in fs::read_dir(FOLDER).context(FOLDER)? {
        let entry = entry?;
        // PID-FD
        if entry.file_name().to_string_lossy().split('-').next() == Some(&pid.to_string()) {
            return crate::knobs::read_number(entry.path().join(name));
        }
    }
    bail!("KVM has no VM of process {pid}")
}

fn fdinfo<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PAGE, sys};

    #[test]
    fn memfds_of_a_process_are_found() {
        let fd = sys::memfd(16 * PAGE).unwrap();
        sys::allocate(&fd, 0, 3 * PAGE).unwrap();
        let found = memfds(std::process::id()).unwrap();
        let ours = |m: &&Memfd| (m.size, m.allocated, m.memfile) == (16 * PAGE, 3 * PAGE, None);
        assert!(found.iter().any(|m| ours(&m)), "{found:?}");
        assert_eq!(fdinfo("pos:\t0\nmemfile-pages:\t7\n", "memfile-pages"), Some("7"));
    }
}
