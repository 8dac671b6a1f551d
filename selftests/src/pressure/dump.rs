// SPDX-License-Identifier: GPL-2.0
//! A crash dump: the memory of a crashed kernel as a second kernel finds it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::memory::hits;
use crate::pattern::Pattern;
use crate::skip::skip;
use crate::sys::{check, require_root};

const VMCORE: &str = "/proc/vmcore";
/// Bytes that are read at once.
const CHUNK: u64 = 1 << 20;

/// Prepare a kernel that runs when this one crashes: the paths of kernel and initramfs, and its
/// command line. The kernel has kept memory for it (`crashkernel=`).
pub fn load_crash_kernel(kernel: &Path, initramfs: &Path, command_line: &str) -> Result<()> {
    const KEXEC_FILE_ON_CRASH: u64 = 2;
    let open = |path: &Path| File::open(path).with_context(|| path.display().to_string());
    let (kernel, initramfs) = (open(kernel)?, open(initramfs)?);
    let line = std::ffi::CString::new(command_line)?;
    // SAFETY: The line is a string of that length with its end, and outlives the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            line.as_bytes_with_nul().len(),
            line.as_ptr(),
            KEXEC_FILE_ON_CRASH,
        )
    })
    .map(drop)
    .context("kexec_file_load")
}

/// A part of an ELF file that has memory.
pub(super) struct Segment {
    /// In the file.
    pub(super) offset: u64,
    /// Physical address.
    pub(super) start: u64,
    pub(super) bytes: u64,
}

/// The memory in a file of the form ELF64, such as `/proc/kcore`.
pub(super) fn segments(file: &File) -> Result<Vec<Segment>> {
    let word = |at: u64| -> Result<u64> {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).context("read the headers")?;
        Ok(u64::from_ne_bytes(bytes))
    };
    // e_phoff; e_phentsize and e_phnum, two bytes each.
    let (first, sizes) = (word(32)?, word(54)?);
    let (size, count) = (sizes & 0xffff, sizes >> 16 & 0xffff);
    let mut segments = Vec::new();
    for header in (0..count).map(|n| first + n * size) {
        // p_type and p_flags; p_offset, p_vaddr, p_paddr, p_filesz.
        if word(header)? & 0xffff_ffff == u64::from(libc::PT_LOAD) {
            let (offset, start) = (word(header + 8)?, word(header + 24)?);
            segments.push(Segment { offset, start, bytes: word(header + 32)? });
        }
    }
    Ok(segments)
}

/// All memory of the kernel that has crashed, as `/proc/vmcore` has it.
pub struct Dump {
    file: File,
    segments: Vec<Segment>,
}

impl Dump {
    /// SKIP if this kernel does not run because another has crashed.
    pub fn open() -> Result<Dump> {
        require_root()?;
        let Ok(file) = File::open(VMCORE) else {
            return skip("no kernel has crashed before this one");
        };
        let segments = segments(&file).context(VMCORE)?;
        ensure!(!segments.is_empty(), "{VMCORE} has no memory");
        Ok(Dump { file, segments })
    }

    /// Bytes in it.
    pub fn size(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum()
    }

    /// Read all of it. How often 64 bytes of each pattern, at any address in `[start, start + len)`,
    /// are there.
    pub fn search(&self, patterns: &[Pattern], start: u64, len: u64) -> Result<Vec<u64>> {
        let mut found = vec![0; patterns.len()];
        let mut chunk = vec![0; CHUNK as usize];
        for &Segment { offset: first, bytes, .. } in &self.segments {
            let mut done = 0;
            while done < bytes {
                let part = &mut chunk[..(bytes - done).min(CHUNK) as usize];
                let at = first + done;
                self.file
                    .read_exact_at(part, at)
                    .with_context(|| format!("{VMCORE} at {at:#x}"))?;
                for (found, pattern) in found.iter_mut().zip(patterns) {
                    *found += hits(part, *pattern, start, len);
                }
                done += part.len() as u64;
            }
        }
        Ok(found)
    }
}
