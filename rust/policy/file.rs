// SPDX-License-Identifier: GPL-2.0

//! Size and space of a file (rule 2). Sizes and offsets are bytes, as in the system calls.

use super::range::{
    page_aligned,
    Range,
    PAGE_SHIFT,
    PAGE_SIZE, //
};
use super::Refusal;

/// May the size change from `old` to `new`? Once, from 0 to whole pages. A store may want more of it.
pub(crate) fn set_size(old: u64, new: u64) -> Result<(), Refusal> {
    if old != 0 {
        return Err(Refusal::NotPermitted);
    }
    if !page_aligned(new) {
        return Err(Refusal::Invalid);
    }
    Ok(())
}

/// The effect of a fallocate().
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    /// Allocate these pages, if there are any, without an invalidation.
    Allocate(Option<Range>),
    /// Free these pages.
    Punch(Range),
}

/// `FALLOC_FL_KEEP_SIZE`
pub(crate) const KEEP_SIZE: u32 = 0x01;
/// `FALLOC_FL_PUNCH_HOLE`
pub(crate) const PUNCH_HOLE: u32 = 0x02;

/// Is fallocate(`mode`, `offset`, `len`) on a file of `size` bytes legal, and what does it do?
///
/// Allocation past the end would have to grow the file, or leave pages that no binding can reach.
/// A hole may lie past the end, as in guest_memfd.
pub(crate) fn fallocate(mode: u32, offset: u64, len: u64, size: u64) -> Result<Space, Refusal> {
    if mode & !(KEEP_SIZE | PUNCH_HOLE) != 0 {
        return Err(Refusal::NotSupported);
    }
    if mode & PUNCH_HOLE != 0 {
        return Range::from_bytes(offset, len).map(Space::Punch);
    }
    match offset.checked_add(len) {
        Some(end) if end <= size => {
            let end = end.checked_add(PAGE_SIZE - 1).ok_or(Refusal::Invalid)?;
            let pages = Range::new(offset >> PAGE_SHIFT, end >> PAGE_SHIFT);
            Ok(Space::Allocate(pages.filter(|_| len != 0)))
        }
        _ => Err(Refusal::Invalid),
    }
}

#[cfg_attr(CONFIG_KUNIT = "y", kernel::macros::kunit_tests(memfile_file))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    #[test]
    fn size_is_set_once_to_whole_pages() {
        assert_eq!(set_size(0, 8192), Ok(()));
        assert_eq!(set_size(0, 0), Ok(()));
        assert_eq!(set_size(0, 8191), Err(Refusal::Invalid));
        assert_eq!(set_size(0, 1), Err(Refusal::Invalid));
        for new in [0, 4096, 8192, 12288, 5] {
            assert_eq!(set_size(8192, new), Err(Refusal::NotPermitted));
        }
    }

    #[test]
    fn allocation_stays_inside_of_the_file() {
        for mode in [0, KEEP_SIZE] {
            let allocates = |start, end| Ok(Space::Allocate(Range::new(start, end)));
            assert_eq!(fallocate(mode, 0, 8192, 8192), allocates(0, 2));
            assert_eq!(fallocate(mode, 4097, 4094, 8192), allocates(1, 2));
            assert_eq!(fallocate(mode, 4095, 2, 8192), allocates(0, 2));
            assert_eq!(fallocate(mode, 4095, 0, 8192), Ok(Space::Allocate(None)));
            assert_eq!(fallocate(mode, 4096, 8192, 8192), Err(Refusal::Invalid));
            assert_eq!(fallocate(mode, 8192, 1, 8192), Err(Refusal::Invalid));
            assert_eq!(fallocate(mode, u64::MAX, 2, 8192), Err(Refusal::Invalid));
        }
    }

    #[test]
    fn holes_are_whole_pages() {
        let mode = PUNCH_HOLE | KEEP_SIZE;
        let hole = Space::Punch(Range::of(1, 3));
        assert_eq!(fallocate(mode, 4096, 8192, 8192), Ok(hole));
        assert_eq!(fallocate(mode, 1, 4096, 8192), Err(Refusal::Invalid));
        assert_eq!(fallocate(mode, 0, 4095, 8192), Err(Refusal::Invalid));
        assert_eq!(fallocate(mode, 0, 4097, 8192), Err(Refusal::Invalid));
    }

    #[test]
    fn other_modes_do_not_exist() {
        for bit in 2..32 {
            let answer = fallocate(1 << bit, 0, 4096, 4096);
            assert_eq!(answer, Err(Refusal::NotSupported));
        }
    }
}
