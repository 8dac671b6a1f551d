// SPDX-License-Identifier: GPL-2.0
//! The messages in the kernel's log.

use std::io::Read;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use memfile_selftests::sys;
use regex_lite::Regex;

/// The kernel's log from where it was opened on.
pub struct KernelLog {
    file: std::fs::File,
    splat: Regex,
}

impl KernelLog {
    /// `splat` is what a message looks like that is a failure.
    pub fn open(splat: &str) -> Result<KernelLog> {
        let fd: OwnedFd =
            sys::open("/dev/kmsg", libc::O_RDONLY | libc::O_NONBLOCK).context("/dev/kmsg")?;
        sys::lseek(&fd, 0, libc::SEEK_END).context("/dev/kmsg")?;
        let splat = Regex::new(splat).context("what a splat looks like")?;
        Ok(KernelLog { file: fd.into(), splat })
    }

    /// The first failure since the last call.
    pub fn failure(&mut self) -> Option<String> {
        let mut found = None;
        let mut record = [0; 8192];
        loop {
            match self.file.read(&mut record) {
                Ok(len) if len > 0 => {
                    let text = String::from_utf8_lossy(&record[..len]);
                    let text = text.split_once(';').map_or("", |(_, text)| text);
                    let line = text.lines().next().unwrap_or("");
                    if self.splat.is_match(line) {
                        found.get_or_insert_with(|| line.to_owned());
                    }
                }
                // EPIPE: messages were overwritten; the next ones are there.
                Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
                _ => return found,
            }
        }
    }
}
