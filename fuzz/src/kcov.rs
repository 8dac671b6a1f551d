// SPDX-License-Identifier: GPL-2.0
//! The kernel's record of the code that each thread of a script has run.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use memfile_selftests::script::op::THREADS;
use memfile_selftests::sys::{self, Mapping, ioctl_val};

// Of linux/kcov.h.
const KCOV_INIT_TRACE: u64 = 0x8008_6301;
const KCOV_ENABLE: u64 = 0x6364;
const KCOV_DISABLE: u64 = 0x6365;
const KCOV_TRACE_PC: u64 = 0;

/// Words of a record; the rest is dropped.
const WORDS: u64 = 1 << 17;

/// Steps from one place in the code to the next that are told apart.
pub const STEPS: usize = 1 << 18;

/// The records: one for each thread, shared with the process that runs the script.
pub struct Kcov {
    threads: Vec<(OwnedFd, Mapping)>,
}

impl Kcov {
    /// Nothing if the kernel keeps none.
    pub fn open() -> Result<Option<Kcov>> {
        let path = "/sys/kernel/debug/kcov";
        if !std::path::Path::new(path).exists() {
            return Ok(None);
        }
        let open = |_| {
            let fd = sys::open(path, libc::O_RDWR).context(path)?;
            ioctl_val(fd.as_fd(), KCOV_INIT_TRACE, WORDS).context("KCOV_INIT_TRACE")?;
            let record = Mapping::shared(fd.as_fd(), 0, WORDS * 8)?;
            Ok((fd, record))
        };
        Ok(Some(Kcov { threads: (0..THREADS).map(open).collect::<Result<_>>()? }))
    }

    /// Forget what was recorded.
    pub fn clear(&self) {
        for (_, record) in &self.threads {
            record.store(0, 0);
        }
    }

    /// Mark in `map` the steps that were made; the number of places.
    pub fn mark(&self, map: &mut [u8]) -> u64 {
        let mut places = 0;
        for (_, record) in &self.threads {
            let count = record.load(0).min(WORDS - 1);
            places += count;
            let mut last = 0u64;
            for n in 1..=count {
                let pc = record.load(n * 8);
                let step = (pc ^ last.rotate_left(7)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                map[(step >> (64 - STEPS.ilog2())) as usize] = 1;
                last = pc;
            }
        }
        places
    }
}

impl Kcov {
    /// The calling thread is recorded from here on.
    pub fn enter(&self, thread: usize) {
        // Without a record the script still runs.
        let _ = ioctl_val(self.threads[thread].0.as_fd(), KCOV_ENABLE, KCOV_TRACE_PC);
    }

    /// No longer.
    pub fn leave(&self, thread: usize) {
        let _ = ioctl_val(self.threads[thread].0.as_fd(), KCOV_DISABLE, 0);
    }
}
