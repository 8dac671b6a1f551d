// SPDX-License-Identifier: GPL-2.0
//! Memory of a guest's process, or files in its page cache, with content that can be verified.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use crate::PAGE;
use crate::pattern::Pattern;
use crate::sys::{Mapping, check};

/// The folder of the areas' files, on tmpfs.
pub const FILES: &str = "/tmp";

/// An area with content.
pub enum Area {
    /// Anonymous memory.
    Memory(Mapping),
    /// Anonymous memory that the guest's kernel does not move.
    Locked(Mapping),
    /// Anonymous memory with a word in each page, and zeros, so that swap on zram is worth it.
    Sparse(Mapping),
    File {
        path: PathBuf,
        size: u64,
    },
}

impl Area {
    /// An area of `size` bytes; only a locked one is allocated at once.
    pub fn new(kind: &str, name: &str, size: u64) -> Result<Area> {
        Ok(match kind {
            "memory" => Area::Memory(Mapping::anonymous(size)?),
            "sparse" => Area::Sparse(Mapping::anonymous(size)?),
            "locked" => {
                let mapping = Mapping::anonymous(size)?;
                // No huge pages: a page of the guest is a page of the host.
                let _ = mapping.madvise(0, size, libc::MADV_NOHUGEPAGE);
                // SAFETY: Only locks what is ours.
                check(unsafe { libc::mlock(mapping.addr() as *const _, size as usize) })
                    .context("mlock")?;
                Area::Locked(mapping)
            }
            "file" => {
                ensure!(!name.contains('/'), "{name} is no name of a file");
                let path = PathBuf::from(FILES).join(name);
                fs::write(&path, "").with_context(|| path.display().to_string())?;
                Area::File { path, size }
            }
            _ => bail!("there are no areas of kind {kind}"),
        })
    }

    fn size(&self) -> u64 {
        match self {
            Area::Memory(mapping) | Area::Locked(mapping) | Area::Sparse(mapping) => mapping.len(),
            Area::File { size, .. } => *size,
        }
    }

    /// The word at a byte offset once the area is written.
    fn word(&self, pattern: Pattern, at: u64) -> u64 {
        match self {
            Area::Sparse(_) if at % PAGE != 0 => 0,
            _ => pattern.word(at),
        }
    }

    /// Write all of it.
    pub fn fill(&self, pattern: Pattern) -> Result<()> {
        match self {
            Area::Memory(mapping) | Area::Locked(mapping) | Area::Sparse(mapping) => {
                let stride = if matches!(self, Area::Sparse(_)) { PAGE } else { 8 };
                for at in (0..mapping.len()).step_by(stride as usize) {
                    mapping.store(at, pattern.word(at));
                }
            }
            Area::File { path, size } => {
                let file = fs::OpenOptions::new().write(true).open(path)?;
                for at in (0..*size).step_by(PAGE as usize) {
                    let words = (at..at + PAGE).step_by(8);
                    let page: Vec<u8> =
                        words.flat_map(|at| pattern.word(at).to_ne_bytes()).collect();
                    file.write_all_at(&page, at)
                        .with_context(|| format!("write {} at {at:#x}", path.display()))?;
                }
            }
        }
        Ok(())
    }

    /// Write one page of a locked area.
    pub fn fill_page(&self, pattern: Pattern, page: u64) -> Result<()> {
        let mapping = self.locked()?;
        for at in (page * PAGE..(page + 1) * PAGE).step_by(8) {
            mapping.store(at, pattern.word(at));
        }
        Ok(())
    }

    /// Read a word of that page of a locked area.
    pub fn touch(&self, page: u64) -> Result<()> {
        self.locked()?.load(page * PAGE);
        Ok(())
    }

    fn locked(&self) -> Result<&Mapping> {
        match self {
            Area::Locked(mapping) => Ok(mapping),
            _ => bail!("the area is not locked"),
        }
    }

    /// Read pages `first..first + pages` of it, or all from `first` on, and fail if the content
    /// differs.
    pub fn verify(&self, pattern: Pattern, first: u64, pages: Option<u64>) -> Result<()> {
        let pages = pages.unwrap_or((self.size() / PAGE).saturating_sub(first));
        let (start, end) = (first * PAGE, (first + pages) * PAGE);
        ensure!(end <= self.size(), "the area ends at {:#x}", self.size());
        let file = match self {
            Area::File { path, .. } => Some(fs::File::open(path)?),
            _ => None,
        };
        let mut page = vec![0; PAGE as usize];
        for at in (start..end).step_by(8) {
            let word = match (self, &file) {
                (Area::Memory(mapping) | Area::Locked(mapping) | Area::Sparse(mapping), _) => {
                    mapping.load(at)
                }
                (_, Some(file)) => {
                    let offset = (at % PAGE) as usize;
                    if offset == 0 {
                        file.read_exact_at(&mut page, at)?;
                    }
                    u64::from_ne_bytes(page[offset..offset + 8].try_into()?)
                }
                (_, None) => bail!("a file that is not open"),
            };
            let wanted = self.word(pattern, at);
            ensure!(word == wanted, "byte {at:#x} of the area reads {word:#x}, not {wanted:#x}");
        }
        Ok(())
    }

    /// The guest's page frames of it, in order.
    pub fn frames(&self) -> Result<Vec<u64>> {
        match self {
            Area::Memory(mapping) | Area::Locked(mapping) | Area::Sparse(mapping) => {
                crate::pressure::mapped_frames(mapping)
            }
            Area::File { .. } => bail!("a file is not mapped"),
        }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        if let Area::File { path, .. } = self {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_hold_what_was_written_and_nothing_else_passes() {
        for kind in ["memory", "sparse", "file"] {
            let name = format!("memfile-area-{}", std::process::id());
            let area = Area::new(kind, &name, 4 * PAGE).unwrap();
            let pattern = Pattern::Generation(3);
            area.fill(pattern).unwrap();
            area.verify(pattern, 0, None).unwrap();
            area.verify(pattern, 1, Some(2)).unwrap();
            assert!(area.verify(Pattern::Generation(4), 3, None).is_err());
            assert!(area.verify(Pattern::ZERO, 0, None).is_err());
            assert!(area.verify(pattern, 3, Some(2)).is_err());
        }
    }
}
