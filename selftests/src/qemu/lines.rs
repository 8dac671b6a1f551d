// SPDX-License-Identifier: GPL-2.0
//! Lines through a socket to QEMU, with a time limit.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// The error if a line did not come in time.
#[derive(Debug)]
pub struct TimeIsUp;

impl fmt::Display for TimeIsUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("time is up")
    }
}

impl std::error::Error for TimeIsUp {}

/// The error if QEMU has closed its end.
#[derive(Debug)]
pub struct Gone;

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("QEMU is gone")
    }
}

impl std::error::Error for Gone {}

/// Our end of the socket.
pub struct Lines {
    stream: UnixStream,
    /// The bytes after the last whole line.
    rest: Vec<u8>,
}

impl Lines {
    pub fn new(stream: UnixStream) -> Lines {
        Lines { stream, rest: Vec::new() }
    }

    pub fn send(&mut self, line: &str) -> Result<()> {
        match self.stream.write_all(line.as_bytes()) {
            Err(e) if e.kind() == ErrorKind::BrokenPipe => Err(Gone.into()),
            sent => sent.context("QEMU does not listen"),
        }
    }

    /// The next line, without its end. An error says that time is up, or that QEMU is gone.
    pub fn next(&mut self, deadline: Instant) -> Result<String> {
        loop {
            if let Some(end) = self.rest.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return Ok(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(TimeIsUp.into());
            }
            // Not so short that it rounds to zero, which means no limit.
            self.stream.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(Gone.into()),
                Ok(count) => self.rest.extend(&bytes[..count]),
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return Err(Gone.into()),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(e) => return Err(e).context("read what QEMU says"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_or_not_at_all() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut lines = Lines::new(ours);
        theirs.write_all(b"one\r\ntw").unwrap();
        let soon = || Instant::now() + Duration::from_millis(5);
        assert_eq!(lines.next(soon()).unwrap(), "one");
        assert_eq!(lines.next(soon()).unwrap_err().to_string(), "time is up");
        theirs.write_all(b"o\n").unwrap();
        assert_eq!(lines.next(soon()).unwrap(), "two");
        drop(theirs);
        assert_eq!(lines.next(soon()).unwrap_err().to_string(), "QEMU is gone");
        assert_eq!(lines.send("three\n").unwrap_err().to_string(), "QEMU is gone");
    }
}
