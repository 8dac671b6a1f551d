// SPDX-License-Identifier: GPL-2.0

//! Which bindings are called together: those of one context, that is, of one VM (rule 14).
//!
//! The context that binds a file first is at home there, until none of its kind is bound. Nearly all
//! files have no other, so its bindings are in the tree of all bindings only, and an invalidation
//! finds them by one walk through that. Bindings of other contexts also have a [`Position`] in a
//! map, by which one finds the next of the same context without a look at the rest: otherwise each
//! binding of one VM would look at all bindings of another.

use super::clock::Tick;
use super::range::Range;
use core::num::NonZeroU64;

/// The context that is at home in a file.
#[derive(Debug, Default)]
pub(crate) struct Home {
    context: Option<NonZeroU64>,
    /// Bindings that have a context, of any.
    bindings: usize,
}

impl Home {
    /// A binding of `context` comes, and stays until [`Self::leave`]. Needs it no position?
    pub(crate) fn enter(&mut self, context: Option<NonZeroU64>) -> bool {
        if context.is_none() {
            return true;
        }
        if self.bindings == 0 {
            self.context = context;
        }
        self.bindings = self.bindings.saturating_add(1);
        self.context == context
    }

    /// A binding of `context` has gone.
    pub(crate) fn leave(&mut self, context: Option<NonZeroU64>) {
        if context.is_some() {
            self.bindings = self.bindings.saturating_sub(1);
        }
    }

    /// Is a context of which something is bound at home?
    pub(crate) fn is(&self, context: NonZeroU64) -> bool {
        self.context == Some(context)
    }
}

/// The position of a binding among those of its context: mappers first, which do not overlap, and
/// each in the order of their last pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Position {
    context: NonZeroU64,
    observer: bool,
    last: u64,
    /// No two bindings of a file have the same.
    birth: Tick,
    start: u64,
}

impl Position {
    /// That of a binding of `pages`.
    pub(crate) fn new(context: NonZeroU64, observer: bool, pages: Range, birth: Tick) -> Self {
        Self {
            context,
            observer,
            last: pages.end().saturating_sub(1),
            birth,
            start: pages.start(),
        }
    }

    /// From here on are those of `context` that end in `pages` or behind.
    fn not_before(context: NonZeroU64, observer: bool, pages: Range) -> Self {
        Self {
            context,
            observer,
            last: pages.start(),
            birth: 0,
            start: 0,
        }
    }

    /// From here on are those behind this one.
    fn behind(self) -> Self {
        Self {
            birth: self.birth.saturating_add(1),
            start: 0,
            ..self
        }
    }

    fn overlaps(self, pages: Range) -> bool {
        self.start < pages.end() && pages.start() <= self.last
    }

    /// The first binding of `context` that overlaps `pages` and `takes_part`, or the next one `after`
    /// such a binding. `next` gives the binding at a position, or at the next one that is taken.
    pub(crate) fn find<T>(
        context: NonZeroU64,
        pages: Range,
        after: Option<Self>,
        next: impl Fn(Self) -> Option<(Self, T)>,
        takes_part: impl Fn(&T) -> bool,
    ) -> Option<T> {
        let mut from = match after {
            Some(position) => position.behind(),
            None => Self::not_before(context, false, pages),
        };
        loop {
            let (at, binding) = next(from)?;
            if at.context != context {
                return None;
            }
            from = if at.overlaps(pages) {
                if takes_part(&binding) {
                    return Some(binding);
                }
                at.behind()
            } else if at.observer && at.last >= pages.start() {
                at.behind()
            } else {
                // The other mappers lie further behind; or it is an observer that ends too early.
                Self::not_before(context, true, pages)
            };
        }
    }
}

#[cfg_attr(CONFIG_KUNIT = "y", kernel::macros::kunit_tests(memfile_context))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    const A: NonZeroU64 = NonZeroU64::MIN;
    const B: NonZeroU64 = NonZeroU64::MIN.saturating_add(1);

    #[test]
    fn the_first_context_is_at_home_until_nothing_is_bound() {
        let mut home = Home::default();
        assert!(home.enter(None) && home.enter(Some(A)));
        assert!(!home.enter(Some(B)) && home.enter(Some(A)));
        home.leave(Some(A));
        home.leave(Some(A));
        home.leave(None);
        // It stays, because the position of the other is in the map.
        assert!(!home.enter(Some(B)) && home.is(A) && !home.is(B));
        home.leave(Some(B));
        home.leave(Some(B));
        assert!(home.enter(Some(B)) && home.is(B) && !home.is(A));
    }

    /// Looks through a few bindings: context, observer, first page, page behind the last.
    fn all(bindings: &[(NonZeroU64, bool, u64, u64)], pages: Range) -> [Option<usize>; 4] {
        let position = |n: usize| {
            let &(context, observer, start, end) = bindings.get(n)?;
            let pages = Range::new(start, end)?;
            Some(Position::new(context, observer, pages, 1 + n as u64))
        };
        let next = |from: Position| {
            let all = (0..bindings.len()).filter_map(|n| Some((position(n)?, n)));
            all.filter(|(at, _)| *at >= from).min()
        };
        let mut found = [None; 4];
        let mut after = None;
        for entry in &mut found {
            *entry = Position::find(A, pages, after, next, |_| true);
            let Some(n) = *entry else {
                break;
            };
            after = position(n);
        }
        found
    }

    #[test]
    fn bindings_of_a_context_are_found_one_after_the_other() {
        let bindings = [
            (B, false, 0, 2),
            (A, false, 2, 4),
            (B, false, 4, 6),
            (A, false, 8, 10),
            (A, false, 6, 8),
        ];
        assert_eq!(
            all(&bindings, Range::of(0, 10)),
            [Some(1), Some(4), Some(3), None]
        );
        assert_eq!(
            all(&bindings, Range::of(3, 7)),
            [Some(1), Some(4), None, None]
        );
        assert_eq!(all(&bindings, Range::of(4, 6)), [None; 4]);
        assert_eq!(
            all(&bindings, Range::of(9, 10)),
            [Some(3), None, None, None]
        );
    }

    #[test]
    fn observers_come_after_mappers_and_may_overlap() {
        let bindings = [
            (A, true, 0, 9),
            (A, true, 6, 7),
            (A, false, 0, 4),
            (A, true, 0, 2),
            (A, false, 9, 10),
        ];
        assert_eq!(
            all(&bindings, Range::of(2, 5)),
            [Some(2), Some(0), None, None]
        );
        assert_eq!(all(&bindings, Range::of(4, 5)), [Some(0), None, None, None]);
        assert_eq!(
            all(&bindings, Range::of(1, 7)),
            [Some(2), Some(3), Some(1), Some(0)]
        );
    }

    #[test]
    fn who_does_not_take_part_is_passed_over() {
        let next = |from: Position| {
            (0..4u64)
                .map(|n| (Position::new(A, false, Range::of(0, 8), 1 + n), n))
                .find(|(at, _)| *at >= from)
        };
        let found = Position::find(A, Range::of(0, 1), None, next, |&n| n >= 2);
        assert_eq!(found, Some(2));
    }
}
