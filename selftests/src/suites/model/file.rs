// SPDX-License-Identifier: GPL-2.0
//! A naive model of a file of shmem or hugetlbfs, page by page, as a program sees it.
//!
//! No swap, no limits. Memory is counted in pages of the file, which are huge ones on
//! hugetlbfs; content is kept in small pages, and only where there is any. Each call returns the
//! result that the kernel must give.

use std::collections::{BTreeMap, BTreeSet};

use crate::sys::{Errno, SysResult};
use crate::uapi::*;

const PAGE: usize = crate::PAGE as usize;

/// A write looks at F_SEAL_GROW once for a chunk of this many bytes.
const CHUNK: u64 = crate::HUGE;

/// A file.
#[derive(Clone, Debug)]
pub struct File {
    size: u64,
    /// Small pages in a page of the file; they come and go together.
    unit: u64,
    /// The pages of the file that take memory, those past its end, too.
    held: BTreeSet<u64>,
    /// The small pages that have been used. The others are zeros, and of shmem holes to SEEK_DATA.
    used: BTreeMap<u64, Box<[u8; PAGE]>>,
    seals: u32,
}

/// The pages that contain the bytes `[start, end)`, each with its part of them.
fn pieces(start: u64, end: u64) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
    let page = PAGE as u64;
    (start / page..end.div_ceil(page)).map(move |index| {
        let from = start.max(index * page) - index * page;
        let to = end.min((index + 1) * page) - index * page;
        (index, from as usize..to as usize)
    })
}

impl File {
    pub fn new(size: u64, seals: u32) -> File {
        File { size, unit: 1, held: BTreeSet::new(), used: BTreeMap::new(), seals }
    }

    /// The same of pages that are `unit` small pages each; it cannot be sealed.
    pub fn of_pages(unit: u64, size: u64) -> File {
        File { unit, ..File::new(size, 0) }
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn seals(&self) -> u32 {
        self.seals
    }

    /// The bytes of memory that it takes.
    pub fn allocated(&self) -> u64 {
        self.held.len() as u64 * self.bytes()
    }

    fn sealed(&self, seals: u32) -> bool {
        self.seals & seals != 0
    }

    /// Bytes of a page of the file.
    fn bytes(&self) -> u64 {
        self.unit * PAGE as u64
    }

    /// The small pages that have been used.
    pub fn used_pages(&self) -> impl Iterator<Item = u64> {
        self.used.keys().copied()
    }

    /// The small page, made ready for use; EPERM for a hole that only fallocate may fill.
    fn used(&mut self, index: u64) -> SysResult<&mut [u8; PAGE]> {
        let held = self.held.contains(&(index / self.unit));
        if !held && self.sealed(F_SEAL_AUTO_ALLOCATE) {
            return Err(Errno::EPERM);
        }
        self.held.insert(index / self.unit);
        Ok(self.used.entry(index).or_insert_with(|| Box::new([0; PAGE])))
    }

    /// Pages are faulted in, and nobody has used them: `count` small ones from `first` on.
    pub fn populate(&mut self, first: u64, count: u64) {
        for page in first / self.unit..(first + count).div_ceil(self.unit) {
            self.held.insert(page);
            if self.unit == 1 {
                self.used.entry(page).or_insert_with(|| Box::new([0; PAGE]));
            }
        }
    }

    /// `pread`: as many bytes as there are.
    pub fn read(&self, at: u64, len: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (index, piece) in pieces(at, (at + len).min(self.size).max(at)) {
            match self.used.get(&index) {
                Some(page) => bytes.extend_from_slice(&page[piece]),
                None => bytes.resize(bytes.len() + piece.len(), 0),
            }
        }
        bytes
    }

    /// `pwrite` of at least a byte, also by way of a pipe: how many were written.
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> SysResult {
        let end = at + bytes.len() as u64;
        assert!(at / CHUNK == (end - 1) / CHUNK);
        let grows = end > self.size;
        if self.sealed(F_SEAL_WRITE | F_SEAL_FUTURE_WRITE) || grows && self.sealed(F_SEAL_GROW) {
            return Err(Errno::EPERM);
        }
        let mut done = 0;
        for (index, piece) in pieces(at, end) {
            match self.used(index) {
                Ok(page) => page[piece.clone()].copy_from_slice(&bytes[done..done + piece.len()]),
                Err(errno) if done == 0 => return Err(errno),
                Err(_) => break,
            }
            done += piece.len();
            self.size = self.size.max(at + done as u64);
        }
        Ok(done as i64)
    }

    /// `copy_file_range` within the file.
    pub fn copy(&mut self, from: u64, to: u64, len: u64) -> SysResult {
        let bytes = self.read(from, len);
        let len = bytes.len() as u64;
        if len > 0 && to < from + len && from < to + len {
            return Err(Errno::EINVAL);
        }
        if len == 0 { Ok(0) } else { self.write(to, &bytes) }
    }

    /// A fault through a mapping of the page, for reading or writing, shared or private: the page.
    pub fn fault(&mut self, index: u64) -> SysResult<&mut [u8; PAGE]> {
        if index * PAGE as u64 >= self.size {
            return Err(Errno::EFAULT);
        }
        self.used(index).map_err(|_| Errno::EFAULT)
    }

    /// `mmap` of a part.
    pub fn map(&self, shared: bool, writable: bool) -> SysResult<()> {
        if shared && writable && self.sealed(F_SEAL_WRITE | F_SEAL_FUTURE_WRITE) {
            return Err(Errno::EPERM);
        }
        Ok(())
    }

    /// `fallocate`; `mode` is what shmem knows.
    pub fn fallocate(&mut self, mode: i32, offset: u64, len: u64) -> SysResult<()> {
        let end = offset + len;
        if mode == libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE {
            if self.sealed(F_SEAL_WRITE | F_SEAL_FUTURE_WRITE) {
                return Err(Errno::EPERM);
            }
            self.discard(offset, end);
            return Ok(());
        }
        if end > self.size && self.sealed(F_SEAL_GROW) {
            return Err(Errno::EPERM);
        }
        for page in offset / self.bytes()..end.div_ceil(self.bytes()) {
            // Requested twice: shmem makes it ready for use, so that a failure does not free it.
            if !self.held.insert(page) && self.unit == 1 {
                self.used.entry(page).or_insert_with(|| Box::new([0; PAGE]));
            }
        }
        if mode & libc::FALLOC_FL_KEEP_SIZE == 0 {
            self.size = self.size.max(end);
        }
        Ok(())
    }

    /// Free the pages inside of `[start, end)`, and zero its parts of other pages.
    fn discard(&mut self, start: u64, end: u64) {
        let (first, last) = (start.div_ceil(self.bytes()), end / self.bytes());
        let freed = |page: u64| first <= page && page < last;
        self.held.retain(|page| !freed(*page));
        let unit = self.unit;
        self.used.retain(|index, _| !freed(index / unit));
        for (index, page) in self.used.range_mut(start / PAGE as u64..end.div_ceil(PAGE as u64)) {
            let base = index * PAGE as u64;
            let within = |at: u64| (at.clamp(base, base + PAGE as u64) - base) as usize;
            page[within(start)..within(end)].fill(0);
        }
    }

    /// `ftruncate`.
    pub fn truncate(&mut self, size: u64) -> SysResult<()> {
        let seal = if size < self.size { F_SEAL_SHRINK } else { F_SEAL_GROW };
        if size != self.size && self.sealed(seal) {
            return Err(Errno::EPERM);
        }
        // A truncation also frees pages past the end.
        if size <= self.size {
            self.discard(size, u64::MAX);
        }
        self.size = size;
        Ok(())
    }

    /// `F_ADD_SEALS`; `mapped` if there is a writable shared mapping.
    pub fn add_seals(&mut self, seals: u32, mapped: bool) -> SysResult<()> {
        if self.sealed(F_SEAL_SEAL) {
            return Err(Errno::EPERM);
        }
        if mapped && seals & F_SEAL_WRITE != 0 && !self.sealed(F_SEAL_WRITE) {
            return Err(Errno::EBUSY);
        }
        self.seals |= seals;
        Ok(())
    }

    /// `lseek` with SEEK_DATA or SEEK_HOLE.
    pub fn seek(&self, from: u64, data: bool) -> SysResult<u64> {
        if from >= self.size {
            return Err(Errno::ENXIO);
        }
        // hugetlbfs clears a page when it allocates it.
        let has_data = |page: &u64| match self.unit {
            1 => self.used.contains_key(page),
            _ => self.held.contains(page),
        };
        let mut pages = from / self.bytes()..self.size.div_ceil(self.bytes());
        match pages.find(|page| has_data(page) == data) {
            Some(page) => Ok(from.max(page * self.bytes())),
            None if data => Err(Errno::ENXIO),
            None => Ok(self.size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: u64 = PAGE as u64;

    #[test]
    fn holes_reserved_and_used_pages_differ() {
        let mut file = File::new(4 * P, 0);
        file.fallocate(0, P, 1).unwrap();
        file.write(2 * P + 5, b"x").unwrap();
        assert_eq!(file.allocated(), 2 * P);
        assert_eq!((file.seek(0, true), file.seek(2 * P, false)), (Ok(2 * P), Ok(3 * P)));
        assert_eq!(file.read(2 * P + 4, 3), [0, b'x', 0]);
        file.fallocate(0, 0, 2 * P).unwrap();
        assert_eq!(file.seek(0, true), Ok(P));
        assert_eq!(file.seek(4 * P, false), Err(Errno::ENXIO));
    }

    #[test]
    fn hole_and_truncation_clear_what_is_left_of_a_page() {
        let mut file = File::new(0, 0);
        file.write(0, &[1; 3 * PAGE]).unwrap();
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        file.fallocate(punch, 10, 2 * P).unwrap();
        assert_eq!(file.allocated(), 2 * P);
        assert_eq!((file.read(9, 2), file.read(2 * P + 9, 2)), (vec![1, 0], vec![0, 1]));
        file.truncate(2 * P + 20).unwrap();
        file.truncate(3 * P).unwrap();
        assert_eq!(file.read(2 * P + 19, 2), [1, 0]);
    }

    #[test]
    fn small_pages_of_a_huge_one_come_and_go_together() {
        let mut file = File::of_pages(4, 12 * P);
        file.fault(5).unwrap()[0] = 7;
        file.fallocate(0, 9 * P, 1).unwrap();
        assert_eq!(file.allocated(), 8 * P);
        assert_eq!((file.seek(0, true), file.seek(5 * P, false)), (Ok(4 * P), Ok(12 * P)));
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        file.fallocate(punch, 5 * P, 6 * P).unwrap();
        assert_eq!((file.read(5 * P, 1), file.allocated()), (vec![0], 8 * P));
        file.fallocate(punch, 3 * P, 5 * P).unwrap();
        assert_eq!(file.allocated(), 4 * P);
    }

    #[test]
    fn seal_leaves_holes_alone() {
        let mut file = File::new(2 * P, F_SEAL_AUTO_ALLOCATE);
        assert_eq!(file.write(0, b"x"), Err(Errno::EPERM));
        assert_eq!(file.fault(0).err(), Some(Errno::EFAULT));
        file.fallocate(0, 0, P).unwrap();
        assert_eq!(file.write(P - 1, b"xy"), Ok(1));
        assert_eq!(file.allocated(), P);
    }
}
