// SPDX-License-Identifier: GPL-2.0
//! The common parts of the models of all kinds of files: random places, and comparisons.

use std::collections::VecDeque;
use std::fmt::Debug;

use anyhow::{Result, ensure};

use crate::PAGE;
use crate::pattern::{Rng, seed};
use crate::sys::Errno;

/// Operations on files of small pages start below this.
pub const END: u64 = 48 * PAGE;
/// The longest copy: the size of a pipe.
pub const LONGEST: u64 = 14 * PAGE;
/// Operations on one file.
pub const OPERATIONS: u64 = 250;
pub const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
pub const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;

/// Requests that the VFS or shmem refuses in any state: mode, offset, length.
pub const REFUSED: [(i32, u64, u64, Errno); 10] = [
    (libc::FALLOC_FL_COLLAPSE_RANGE, 0, PAGE, Errno::EOPNOTSUPP),
    (libc::FALLOC_FL_INSERT_RANGE, 0, PAGE, Errno::EOPNOTSUPP),
    (libc::FALLOC_FL_ZERO_RANGE, 0, PAGE, Errno::EOPNOTSUPP),
    (libc::FALLOC_FL_ZERO_RANGE | KEEP, PAGE, PAGE, Errno::EOPNOTSUPP),
    (libc::FALLOC_FL_UNSHARE_RANGE, 0, PAGE, Errno::EOPNOTSUPP),
    (libc::FALLOC_FL_PUNCH_HOLE, 0, PAGE, Errno::EOPNOTSUPP),
    (0, 0, 0, Errno::EINVAL),
    (KEEP, 1 << 63, PAGE, Errno::EINVAL),
    (PUNCH, PAGE, 1 << 63, Errno::EINVAL),
    (KEEP, 1 << 62, 1 << 62, Errno::EFBIG),
];

/// Fail unless both have the same result.
pub fn same<T: PartialEq + Debug>(what: &str, file: T, model: T) -> Result<()> {
    ensure!(file == model, "{what}: the file says {file:?}, the model {model:?}");
    Ok(())
}

/// The same bytes.
pub fn same_bytes(what: &str, file: &[u8], model: &[u8]) -> Result<()> {
    same(&format!("{what}, length"), file.len(), model.len())?;
    let wrong = file.iter().zip(model).position(|(a, b)| a != b);
    wrong.map_or(Ok(()), |at| same(&format!("{what}, byte {at:#x}"), file[at], model[at]))
}

/// Random offsets and lengths, mostly at the edges of pages and of the file.
pub struct Dice {
    rng: Rng,
    /// Operations start below this.
    end: u64,
    /// Small pages in a page of the file.
    unit: u64,
}

impl Dice {
    /// With a seed that is printed.
    pub fn new(end: u64) -> Dice {
        Dice::for_pages(end, 1)
    }

    /// The same for files of pages that are `unit` small pages each.
    pub fn for_pages(end: u64, unit: u64) -> Dice {
        Dice { rng: Rng::new(seed()), end, unit }
    }

    /// Any number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.rng.below(bound)
    }

    pub fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    /// One of `count` small pages, mostly near the edges of pages.
    pub fn page(&mut self, count: u64) -> u64 {
        let any = self.below(count);
        if self.unit == 1 {
            return any;
        }
        let start = any / self.unit * self.unit;
        let page = match self.below(5) {
            0 => any,
            1 | 2 => start + self.below(4),
            _ => start + self.unit - 1 - self.below(4),
        };
        page.min(count - 1)
    }

    pub fn offset(&mut self, size: u64) -> u64 {
        let near = if self.below(4) == 0 { size } else { self.page(self.end / PAGE) * PAGE };
        let at = match self.below(4) {
            0 => near + self.below(PAGE),
            1 => near.saturating_sub(self.below(PAGE)),
            _ => near,
        };
        at.min(self.end)
    }

    /// A range; it often ends at the end of the file.
    pub fn range(&mut self, size: u64) -> (u64, u64) {
        let at = self.offset(size);
        let len = match self.below(5) {
            0 if at < size => (size - at).min(LONGEST),
            _ => self.len(),
        };
        (at, len)
    }

    pub fn len(&mut self) -> u64 {
        if self.unit > 1 && self.below(3) == 0 {
            return (1 + self.below(3)) * self.unit * PAGE;
        }
        match self.below(4) {
            0 => 1 + self.below(16),
            1 => 1 + self.below(PAGE),
            2 => 1 + self.below(LONGEST),
            _ => (1 + self.below(8)) * PAGE,
        }
    }
}

/// Remembers the last operations.
#[derive(Default)]
pub struct Log(VecDeque<String>);

impl Log {
    pub fn add(&mut self, operation: &impl Debug) {
        self.0.push_back(format!("{operation:x?}"));
        if self.0.len() > 12 {
            self.0.pop_front();
        }
    }

    pub fn text(&self) -> String {
        self.0.iter().map(|line| format!("\n  {line}")).collect()
    }
}
