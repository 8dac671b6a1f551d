// SPDX-License-Identifier: GPL-2.0

//! Ranges of pages, and the one place that converts file offsets to a consumer's frames.
//!
//! A range is `[start, end)` and counts pages, here and everywhere (rule 17). Four versions of the
//! 2022 series had four different bugs in this arithmetic; consumers of memfile do no such
//! arithmetic: the core gives them frames.

use super::Refusal;

/// Bytes per page, as a shift.
pub(crate) const PAGE_SHIFT: u32 = 12;
/// Bytes per page.
pub(crate) const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// Are these bytes whole pages?
pub(crate) fn page_aligned(bytes: u64) -> bool {
    bytes & (PAGE_SIZE - 1) == 0
}

/// Pages `[start, end)`, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    start: u64,
    end: u64,
}

impl Range {
    /// Pages `[start, end)`, or [`None`] if there are none.
    pub(crate) fn new(start: u64, end: u64) -> Option<Self> {
        (start < end).then_some(Self { start, end })
    }

    /// For tests, with constants.
    #[cfg(any(test, CONFIG_KUNIT = "y"))]
    pub(crate) const fn of(start: u64, end: u64) -> Self {
        assert!(start < end);
        Self { start, end }
    }

    /// The page-aligned bytes `[offset, offset + len)`.
    pub(crate) fn from_bytes(offset: u64, len: u64) -> Result<Self, Refusal> {
        let end = offset.checked_add(len).ok_or(Refusal::Invalid)?;
        if !page_aligned(offset) || !page_aligned(end) {
            return Err(Refusal::Invalid);
        }
        Self::new(offset >> PAGE_SHIFT, end >> PAGE_SHIFT).ok_or(Refusal::Invalid)
    }

    /// First page.
    pub(crate) fn start(self) -> u64 {
        self.start
    }

    /// The page behind the last one.
    pub(crate) fn end(self) -> u64 {
        self.end
    }

    /// Do the two share a page?
    pub(crate) fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// Does it have all pages of `other`?
    pub(crate) fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The pages in both.
    pub(crate) fn intersect(self, other: Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }
}

/// Where a binding lies: file page `pgoff + i` is the consumer's frame `frame + i`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pages: Range,
    frame: u64,
}

impl Span {
    /// The span of a binding of `nr_pages`, from file page `pgoff` on, to the frames from `frame` on.
    /// Neither may wrap, and the pages must lie in a file of `file_pages`.
    pub(crate) fn new(
        pgoff: u64,
        nr_pages: u64,
        frame: u64,
        file_pages: u64,
    ) -> Result<Self, Refusal> {
        let end = pgoff.checked_add(nr_pages).ok_or(Refusal::Invalid)?;
        frame.checked_add(nr_pages).ok_or(Refusal::Invalid)?;
        if end > file_pages {
            return Err(Refusal::Invalid);
        }
        let pages = Range::new(pgoff, end).ok_or(Refusal::Invalid)?;
        Ok(Self { pages, frame })
    }

    /// The same once more: [`Self::new`] must have accepted these numbers.
    pub(crate) fn accepted(pgoff: u64, nr_pages: u64, frame: u64) -> Self {
        let pages = Range {
            start: pgoff,
            end: pgoff.saturating_add(nr_pages),
        };
        Self { pages, frame }
    }

    /// The file pages.
    pub(crate) fn pages(self) -> Range {
        self.pages
    }

    /// The file page behind the consumer's `frame`, if it is bound.
    pub(crate) fn page_of(self, frame: u64) -> Option<u64> {
        let delta = frame.checked_sub(self.frame)?;
        let page = self.pages.start.checked_add(delta)?;
        (page < self.pages.end).then_some(page)
    }

    /// The file pages behind those `frames` that are bound.
    pub(crate) fn pages_of(self, frames: Range) -> Option<Range> {
        let len = self.pages.end.checked_sub(self.pages.start)?;
        let bound = Range::new(self.frame, self.frame.checked_add(len)?)?;
        let hit = bound.intersect(frames)?;
        let start = self.page_of(hit.start)?;
        Range::new(start, start.checked_add(hit.end - hit.start)?)
    }

    /// The consumer's frames of those `pages` that are bound.
    pub(crate) fn frames_of(self, pages: Range) -> Option<Range> {
        let hit = self.pages.intersect(pages)?;
        let start = self.frame.checked_add(hit.start - self.pages.start)?;
        let end = self.frame.checked_add(hit.end - self.pages.start)?;
        Range::new(start, end)
    }

    /// The largest order, at most that of the folio, at which the consumer may map around `frame`:
    /// page and frame have the same place in their naturally aligned blocks, and the binding has
    /// the whole block.
    #[inline(always)]
    pub(crate) fn order_at(self, frame: u64, folio_order: u32) -> u32 {
        if folio_order == 0 {
            return 0;
        }
        let Some(page) = self.page_of(frame) else {
            return 0;
        };
        (1..=folio_order.min(u64::BITS - 1))
            .rev()
            .find(|&order| {
                let mask = (1u64 << order) - 1;
                let first = page & !mask;
                page & mask == frame & mask
                    && first >= self.pages.start
                    && first
                        .checked_add(mask)
                        .is_some_and(|last| last < self.pages.end)
            })
            .unwrap_or(0)
    }
}

#[cfg_attr(CONFIG_KUNIT = "y", kernel::macros::kunit_tests(memfile_range))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    fn bind(pgoff: u64, nr_pages: u64, frame: u64) -> Span {
        Span {
            pages: Range::of(pgoff, pgoff + nr_pages),
            frame,
        }
    }

    #[test]
    fn empty_and_reversed_ranges_do_not_exist() {
        assert!(Range::new(3, 3).is_none());
        assert!(Range::new(4, 3).is_none());
        assert!(Range::new(3, 4).is_some());
    }

    #[test]
    fn byte_ranges_are_page_aligned_and_do_not_wrap() {
        assert_eq!(Range::from_bytes(4096, 8192), Ok(Range::of(1, 3)));
        assert_eq!(Range::from_bytes(1, 4096), Err(Refusal::Invalid));
        assert_eq!(Range::from_bytes(4096, 1), Err(Refusal::Invalid));
        assert_eq!(Range::from_bytes(4096, 0), Err(Refusal::Invalid));
        let last = u64::MAX - (PAGE_SIZE - 1);
        assert_eq!(
            Range::from_bytes(last, 2 * PAGE_SIZE),
            Err(Refusal::Invalid)
        );
    }

    #[test]
    fn neighbours_do_not_overlap() {
        assert!(!Range::of(0, 4).overlaps(Range::of(4, 8)));
        assert!(!Range::of(4, 8).overlaps(Range::of(0, 4)));
        assert!(Range::of(0, 5).overlaps(Range::of(4, 8)));
        assert!(Range::of(5, 6).overlaps(Range::of(4, 8)));
    }

    #[test]
    fn bindings_lie_in_the_file_and_do_not_wrap() {
        assert!(Span::new(0, 4, 100, 4).is_ok());
        assert_eq!(Span::new(1, 4, 100, 4), Err(Refusal::Invalid));
        assert_eq!(Span::new(0, 0, 100, 4), Err(Refusal::Invalid));
        assert_eq!(Span::new(u64::MAX, 2, 0, u64::MAX), Err(Refusal::Invalid));
        assert_eq!(Span::new(0, 2, u64::MAX, 4), Err(Refusal::Invalid));
    }

    #[test]
    fn invalidations_below_above_and_astride_the_binding_are_clipped() {
        // Frames below, at and above the file offset.
        for frame in [0, 10, 1000] {
            let span = bind(10, 10, frame);
            let frames = |start, end| Some(Range::of(frame + start, frame + end));
            assert_eq!(span.frames_of(Range::of(0, 10)), None);
            assert_eq!(span.frames_of(Range::of(20, 30)), None);
            assert_eq!(span.frames_of(Range::of(0, 11)), frames(0, 1));
            assert_eq!(span.frames_of(Range::of(19, 99)), frames(9, 10));
            assert_eq!(span.frames_of(Range::of(0, 99)), frames(0, 10));
            assert_eq!(span.frames_of(Range::of(12, 14)), frames(2, 4));
        }
    }

    #[test]
    fn frames_outside_of_the_binding_have_no_page() {
        let span = bind(10, 10, 100);
        assert_eq!(span.page_of(99), None);
        assert_eq!(span.page_of(100), Some(10));
        assert_eq!(span.page_of(109), Some(19));
        assert_eq!(span.page_of(110), None);
        assert_eq!(span.page_of(u64::MAX), None);
    }

    #[test]
    fn frames_below_above_and_astride_the_binding_are_clipped() {
        for frame in [0, 10, 1000] {
            let span = bind(10, 10, frame);
            let of = |start, end| span.pages_of(Range::of(frame + start, frame + end));
            assert_eq!(of(0, 10), Some(Range::of(10, 20)));
            assert_eq!(of(2, 4), Some(Range::of(12, 14)));
            assert_eq!(of(9, 99), Some(Range::of(19, 20)));
            assert_eq!(of(10, 11), None);
            if frame > 0 {
                assert_eq!(span.pages_of(Range::of(0, frame)), None);
                assert_eq!(
                    span.pages_of(Range::of(0, frame + 1)),
                    Some(Range::of(10, 11))
                );
            }
        }
        let last = bind(10, 10, u64::MAX - 10);
        assert_eq!(
            last.pages_of(Range::of(0, u64::MAX)),
            Some(Range::of(10, 20))
        );
    }

    #[test]
    fn huge_only_where_offset_and_frame_are_congruent() {
        let span = bind(512, 1536, 0x100000);
        assert_eq!(span.order_at(0x100058, 9), 9);
        assert_eq!(span.order_at(0x100058, 4), 4);
        let skewed = bind(512, 1536, 0x100001);
        assert_eq!(skewed.order_at(0x100058, 9), 0);
        let half = bind(512, 1536, 0x100100);
        assert_eq!(half.order_at(0x100158, 9), 8);
    }

    #[test]
    fn huge_only_where_the_binding_has_all_of_it() {
        let span = bind(513, 1023, 0x100001);
        assert_eq!(span.order_at(0x1001ff, 9), 8);
        assert_eq!(span.order_at(0x100200, 9), 9);
        let short = bind(512, 511, 0x100000);
        assert_eq!(short.order_at(0x100000, 9), 8);
        assert_eq!(short.order_at(0x1001fe, 9), 0);
    }
}
