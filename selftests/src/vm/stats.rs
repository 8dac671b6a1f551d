// SPDX-License-Identifier: GPL-2.0
//! KVM's binary statistics.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use crate::sys;
use crate::uapi::KVM_GET_STATS_FD;

/// Statistics of a VM or of a vCPU, by name.
pub struct Stats {
    file: File,
    /// Where each value is in the file, in bytes; only those of a single word.
    offsets: HashMap<String, u64>,
}

impl Stats {
    /// Statistics of the VM or vCPU behind `fd`. They keep it alive.
    pub fn open(fd: BorrowedFd) -> Result<Stats> {
        let file = sys::ioctl_fd(fd, KVM_GET_STATS_FD(), 0).context("KVM_GET_STATS_FD")?;
        let file = File::from(file);
        // Header: flags, size of a name, number of descriptors, offsets of id, descriptors, data.
        let mut head = [0; 24];
        file.read_exact_at(&mut head, 0).context("statistics header")?;
        let name_size = u64::from(word(&head, 4));
        let count = u64::from(word(&head, 8));
        let descriptors = u64::from(word(&head, 16));
        let data = u64::from(word(&head, 20));
        let mut offsets = HashMap::new();
        // Descriptor: flags, exponent and number of values, offset, bucket size, name.
        let mut descriptor = vec![0; 16 + name_size as usize];
        for n in 0..count {
            let at = descriptors + n * (16 + name_size);
            file.read_exact_at(&mut descriptor, at).context("statistics descriptor")?;
            let values = word(&descriptor, 4) >> 16;
            let name = CStr::from_bytes_until_nul(&descriptor[16..]).context("statistics name")?;
            if values == 1 {
                let offset = data + u64::from(word(&descriptor, 8));
                offsets.insert(name.to_string_lossy().into_owned(), offset);
            }
        }
        ensure!(!offsets.is_empty(), "KVM offers no statistics");
        Ok(Stats { file, offsets })
    }

    /// The value now.
    pub fn get(&self, name: &str) -> Result<u64> {
        let offset =
            self.offsets.get(name).with_context(|| format!("KVM has no statistic {name}"))?;
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, *offset).with_context(|| format!("read {name}"))?;
        Ok(u64::from_ne_bytes(value))
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
