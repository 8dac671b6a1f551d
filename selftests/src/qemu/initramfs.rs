// SPDX-License-Identifier: GPL-2.0
//! The archive that a guest's kernel unpacks as its first root: cpio, "newc".

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};

const FOLDER: u32 = 0o040755;
const PROGRAM: u32 = 0o100755;
const LINK: u32 = 0o120777;
const DEVICE: u32 = 0o020600;

/// An archive in the making.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    entries: u32,
}

impl Archive {
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8], device: (u32, u32)) -> Result<()> {
        self.entries += 1;
        let (size, name_size) = (u32::try_from(content.len())?, u32::try_from(name.len() + 1)?);
        // Inode, mode, owner, group, links, time, size, device of the file system, device, length
        // of the name, sum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08X}").bytes());
        }
        self.bytes.extend(name.bytes().chain([0]));
        self.pad();
        self.bytes.extend(content);
        self.pad();
        Ok(())
    }

    /// Add the folders of `name` that are not there yet.
    fn folders_of(&mut self, name: &str) -> Result<()> {
        for (end, _) in name.match_indices('/') {
            self.folder(&name[..end])?;
        }
        Ok(())
    }

    pub fn folder(&mut self, name: &str) -> Result<()> {
        if self.folders.insert(name.into()) {
            self.entry(name, FOLDER, &[], (0, 0))?;
        }
        Ok(())
    }

    /// A file that anyone may read and execute.
    pub fn file(&mut self, name: &str, content: &[u8]) -> Result<()> {
        self.folders_of(name)?;
        self.entry(name, PROGRAM, content, (0, 0))
    }

    /// The same with the content of a file here.
    pub fn copy(&mut self, name: &str, from: &Path) -> Result<()> {
        let content = std::fs::read(from).with_context(|| format!("read {}", from.display()))?;
        self.file(name, &content)
    }

    /// Another name for what lies beside it.
    pub fn link(&mut self, name: &str, target: &str) -> Result<()> {
        self.folders_of(name)?;
        self.entry(name, LINK, target.as_bytes(), (0, 0))
    }

    /// A character device: before anything is mounted the kernel opens its console.
    pub fn device(&mut self, name: &str, major: u32, minor: u32) -> Result<()> {
        self.folders_of(name)?;
        self.entry(name, DEVICE, &[], (major, minor))
    }

    /// The whole archive.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[], (0, 0))?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpio_reads_it() {
        use std::io::Write;
        use std::process::{Command, Stdio};
        let mut archive = Archive::default();
        archive.file("a/b/c", b"content").unwrap();
        archive.file("a/b/d", b"").unwrap();
        archive.device("dev/console", 5, 1).unwrap();
        let bytes = archive.finish().unwrap();
        let mut cpio = Command::new("cpio");
        cpio.arg("-t").stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let Ok(mut cpio) = cpio.spawn() else { return };
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = cpio.wait_with_output().unwrap();
        let names = String::from_utf8(output.stdout).unwrap();
        assert_eq!(names, "a\na/b\na/b/c\na/b/d\ndev\ndev/console\n");
        assert!(output.status.success());
    }
}
