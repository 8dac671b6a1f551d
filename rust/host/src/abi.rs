// SPDX-License-Identifier: GPL-2.0

//! The stand-in for `rust/abi`: C's objects as the engine sees them, without C.
//!
//! It is stricter than C: a use after free, or a search in a tree from a notifier that is not in
//! it, panics.

use crate::kernel::prelude::*;
use crate::policy::Refusal;

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Invalid => EINVAL,
            Refusal::NotPermitted => EPERM,
            Refusal::Exists => EEXIST,
            Refusal::NotSupported => EOPNOTSUPP,
        }
    }
}

/// Forgets all notifiers and records of this thread.
pub(crate) fn reset() {
    notifier::BODIES.take();
    invalidation::RECORDS.take();
    task::KILLED.set(false);
}

pub(crate) mod allocation {
    use std::cell::Cell;

    thread_local! {
        /// The number of waits for the allocations under way.
        pub(crate) static WAITS: Cell<u32> = const { Cell::new(0) };
    }

    /// An allocation under way. There are no pages here.
    pub(crate) struct Allocation;

    impl Allocation {
        pub(crate) fn begin() -> Self {
            Self
        }

        pub(crate) fn wait_for_all() {
            WAITS.set(WAITS.get() + 1);
        }
    }

    impl Drop for Allocation {
        fn drop(&mut self) {}
    }
}

pub(crate) mod inode {
    use crate::kernel::prelude::*;
    use crate::policy::flags::Flags;
    use crate::policy::range::{Range, PAGE_SHIFT};
    use std::cell::{Cell, RefCell};
    use std::ops::Deref;
    use std::rc::Rc;

    /// State that the tests set and check.
    #[derive(Default)]
    pub(crate) struct Body {
        pub(crate) bytes: Cell<u64>,
        /// Pages of the store lie where they lie.
        pub(crate) movable_first: Cell<bool>,
        /// The inode has pages.
        pub(crate) has_pages: Cell<bool>,
        /// The last argument of the store's `set_flags()`.
        pub(crate) flags: Cell<Option<Flags>>,
        /// The last argument of the store's `allocate_movable()`.
        pub(crate) movable: Cell<Option<bool>>,
        /// The answer of the store's `leave_movable_areas()`.
        pub(crate) stuck: Cell<Option<Error>>,
        /// How often that was called.
        pub(crate) left: Cell<u32>,
        /// Runs while it is.
        pub(crate) leaving: RefCell<Option<Rc<dyn Fn()>>>,
        /// The last argument of the store's `hide()`, and its answer.
        pub(crate) hidden: Cell<Option<Range>>,
        pub(crate) hide_error: Cell<Option<Error>>,
    }

    /// An inode of so many bytes.
    #[derive(Clone, Default)]
    pub(crate) struct Inode(Rc<Body>);

    impl Deref for Inode {
        type Target = Body;

        fn deref(&self) -> &Body {
            &self.0
        }
    }

    impl Inode {
        pub(crate) fn with_pages(pages: u64) -> Self {
            let inode = Self::default();
            inode.bytes.set(pages << PAGE_SHIFT);
            inode
        }

        pub(crate) fn number(&self) -> u64 {
            1
        }

        pub(crate) fn size(&self) -> u64 {
            self.bytes.get()
        }

        pub(crate) fn pages(&self) -> u64 {
            self.size() >> PAGE_SHIFT
        }

        pub(crate) fn resident(&self) -> usize {
            0
        }

        pub(crate) fn has_pages(&self) -> bool {
            self.has_pages.get()
        }
    }
}

pub(crate) mod file {
    use super::notifier::Notifier;

    /// An open file.
    #[derive(Clone, Copy)]
    pub(crate) struct File {
        pub(crate) writable: bool,
    }

    impl File {
        pub(crate) fn writable(self) -> bool {
            self.writable
        }

        pub(crate) fn hold_for(self, notifier: Notifier) {
            assert!(!notifier.body().file_held.replace(true), "held twice");
        }
    }
}

pub(crate) mod notifier {
    use super::invalidation::Invalidation;
    use crate::kernel::prelude::Result;
    use crate::policy::clock::Life;
    use crate::policy::context::Position;
    use crate::policy::range::{Range, Span};
    use crate::policy::Refusal;
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeMap;
    use std::num::NonZeroU64;
    use std::rc::Rc;

    /// The ranges of a callback. The consumer asks for them one after the other, and may hold locks
    /// of its own meanwhile.
    pub(crate) trait Consumer {
        fn invalidate_start(&self, ranges: Ranges);
        fn invalidate_end(&self, ranges: Ranges);
        fn test_clear_young(&self, frames: Range) -> bool;
    }

    /// The bindings of one context that take part in an invalidation.
    pub(crate) struct Ranges {
        inv: Invalidation,
        next: Option<(Notifier, Range)>,
    }

    impl Iterator for Ranges {
        type Item = (Notifier, Range);

        fn next(&mut self) -> Option<Self::Item> {
            let (notifier, frames) = self.next.take()?;
            if notifier.context().is_some() {
                self.next = self.inv.next_range(notifier);
            }
            Some((notifier, frames))
        }
    }

    pub(crate) struct Body {
        pgoff: u64,
        nr_pages: u64,
        frame: u64,
        observer: bool,
        context: u64,
        consumer: Option<Rc<dyn Consumer>>,
        life: Cell<Option<Life>>,
        pub(super) file_held: Cell<bool>,
    }

    thread_local! {
        pub(super) static BODIES: RefCell<Vec<Rc<Body>>> = const { RefCell::new(Vec::new()) };

        /// Look-ups in trees and maps.
        pub(crate) static LOOKS: Cell<usize> = const { Cell::new(0) };
    }

    /// A consumer's binding, by its number.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Notifier(usize);

    impl Notifier {
        pub(crate) fn new(
            pgoff: u64,
            nr_pages: u64,
            frame: u64,
            observer: bool,
            context: u64,
            consumer: Option<Rc<dyn Consumer>>,
        ) -> Self {
            let body = Body {
                pgoff,
                nr_pages,
                frame,
                observer,
                context,
                consumer,
                life: Cell::new(None),
                file_held: Cell::new(false),
            };
            BODIES.with_borrow_mut(|bodies| {
                bodies.push(Rc::new(body));
                Self(bodies.len() - 1)
            })
        }

        pub(super) fn body(self) -> Rc<Body> {
            BODIES.with_borrow(|bodies| bodies[self.0].clone())
        }

        fn consumer(self) -> Rc<dyn Consumer> {
            self.body().consumer.clone().expect("has_ops() said so")
        }

        pub(crate) fn file_held(self) -> bool {
            self.body().file_held.get()
        }

        pub(crate) fn observer(self) -> bool {
            self.body().observer
        }

        pub(crate) fn context(self) -> Option<NonZeroU64> {
            NonZeroU64::new(self.body().context)
        }

        pub(crate) fn checked_span(self, file_pages: u64) -> Result<Span, Refusal> {
            let body = self.body();
            Span::new(body.pgoff, body.nr_pages, body.frame, file_pages)
        }

        pub(crate) fn span(self) -> Span {
            let body = self.body();
            Span::accepted(body.pgoff, body.nr_pages, body.frame)
        }

        pub(crate) fn has_ops(self) -> bool {
            self.body().consumer.is_some()
        }

        pub(crate) fn release_file(self) {
            assert!(self.body().file_held.replace(false), "released twice");
        }

        pub(crate) fn invalidate_start(self, inv: Invalidation, frames: Range) {
            let next = Some((self, frames));
            self.consumer().invalidate_start(Ranges { inv, next });
        }

        pub(crate) fn invalidate_end(self, inv: Invalidation, frames: Range) {
            let next = Some((self, frames));
            self.consumer().invalidate_end(Ranges { inv, next });
        }

        pub(crate) fn test_clear_young(self, frames: Range) -> bool {
            self.consumer().test_clear_young(frames)
        }
    }

    /// The notifiers that take part in an invalidation.
    #[derive(Clone, Copy)]
    pub(crate) struct Hits {
        pub(crate) first: Option<Notifier>,
        pub(crate) more: bool,
    }

    impl Hits {
        pub(crate) fn note(self, inv: Invalidation) {
            inv.set_hits((self.first, self.more));
        }

        pub(crate) fn of(inv: Invalidation) -> Self {
            let (first, more) = inv.hits();
            Self { first, more }
        }
    }

    /// Notifiers in the order of their first page.
    pub(crate) struct Tree(Vec<(Range, Notifier)>);

    impl Tree {
        pub(crate) fn new() -> Self {
            Self(Vec::new())
        }

        pub(crate) fn life(&self, notifier: Notifier) -> Life {
            notifier.body().life.get().expect("set_life() comes first")
        }

        pub(crate) fn set_life(&mut self, notifier: Notifier, life: Life) {
            notifier.body().life.set(Some(life));
        }

        fn position(&self, notifier: Notifier) -> usize {
            let found = self.0.iter().position(|&(_, other)| other == notifier);
            found.expect("the notifier is not in the tree")
        }

        pub(crate) fn insert(&mut self, notifier: Notifier, pages: Range) {
            let at = self
                .0
                .partition_point(|(other, _)| other.start() <= pages.start());
            self.0.insert(at, (pages, notifier));
        }

        pub(crate) fn remove(&mut self, notifier: Notifier) {
            self.0.remove(self.position(notifier));
        }

        pub(crate) fn next(&self, pages: Range, after: Option<Notifier>) -> Option<Notifier> {
            LOOKS.set(LOOKS.get() + 1);
            let from = after.map_or(0, |notifier| self.position(notifier) + 1);
            let mut rest = self.0[from..].iter();
            rest.find(|(bound, _)| bound.overlaps(pages))
                .map(|&(_, notifier)| notifier)
        }
    }

    /// A place in [`Others`].
    pub(crate) struct Seat;

    impl Seat {
        pub(crate) fn new() -> Result<Self> {
            Ok(Self)
        }
    }

    /// Notifiers by their position among those of their context.
    pub(crate) struct Others(BTreeMap<Position, Notifier>);

    impl Others {
        pub(crate) fn new() -> Self {
            Self(BTreeMap::new())
        }

        pub(crate) fn insert(&mut self, _: Seat, at: Position, notifier: Notifier) {
            assert!(self.0.insert(at, notifier).is_none(), "is in the map");
        }

        pub(crate) fn remove(&mut self, at: Position) {
            self.0.remove(&at).expect("the notifier is not in the map");
        }

        pub(crate) fn next(&self, from: Position) -> Option<(Position, Notifier)> {
            LOOKS.set(LOOKS.get() + 1);
            let (&at, &notifier) = self.0.range(from..).next()?;
            Some((at, notifier))
        }
    }
}

pub(crate) mod invalidation {
    use super::notifier::Notifier;
    use crate::policy::clock::{Scope, Tick};
    use crate::policy::range::Range;
    use std::cell::RefCell;
    use std::rc::Rc;

    /// The node's `next_range()`, which C finds by the record's pointer to it.
    pub(crate) type NextRange = Rc<dyn Fn(Invalidation, Notifier) -> Option<(Notifier, Range)>>;

    thread_local! {
        pub(super) static RECORDS: RefCell<Vec<Body>> = const { RefCell::new(Vec::new()) };
    }

    pub(super) struct Body {
        scope: Option<Scope>,
        next_range: Option<NextRange>,
        hits: (Option<Notifier>, bool),
    }

    /// One running invalidation, by its number.
    #[derive(Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Invalidation(usize);

    impl Invalidation {
        pub(crate) fn new(next_range: Option<NextRange>) -> Self {
            RECORDS.with_borrow_mut(|records| {
                records.push(Body {
                    scope: None,
                    next_range,
                    hits: (None, false),
                });
                Self(records.len() - 1)
            })
        }

        fn set(self, scope: Option<Scope>) {
            RECORDS.with_borrow_mut(|records| records[self.0].scope = scope);
        }

        pub(super) fn set_hits(self, hits: (Option<Notifier>, bool)) {
            RECORDS.with_borrow_mut(|records| records[self.0].hits = hits);
        }

        pub(super) fn hits(self) -> (Option<Notifier>, bool) {
            RECORDS.with_borrow(|records| records[self.0].hits)
        }

        pub(super) fn next_range(self, after: Notifier) -> Option<(Notifier, Range)> {
            // As memfile_next_range().
            if !self.hits().1 {
                return None;
            }
            let next_range = RECORDS.with_borrow(|records| records[self.0].next_range.clone());
            next_range.expect("the test uses contexts")(self, after)
        }

        pub(crate) fn with<N, R>(_: &N, f: impl FnOnce(Invalidation) -> R) -> R {
            let inv = Self::new(None);
            let result = f(inv);
            assert!(inv.scope().is_none(), "an invalidation did not end");
            result
        }

        pub(crate) fn scope(self) -> Option<Scope> {
            RECORDS.with_borrow(|records| records[self.0].scope)
        }
    }

    pub(crate) struct Invalidations(Vec<Invalidation>);

    impl Invalidations {
        pub(crate) const fn new() -> Self {
            Self(Vec::new())
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.0.is_empty()
        }

        pub(crate) fn push(&mut self, inv: Invalidation, seq: Tick, pages: Range) {
            inv.set(Some(Scope { seq, pages }));
            self.0.push(inv);
        }

        pub(crate) fn remove(&mut self, inv: Invalidation) {
            self.0.retain(|&other| other != inv);
            inv.set(None);
        }

        pub(crate) fn any(&self, hold: impl Fn(Scope) -> bool) -> bool {
            self.0.iter().any(|inv| inv.scope().is_some_and(&hold))
        }
    }
}

pub(crate) mod registry {
    use pinned_init::PinInit;
    use std::ops::Deref;

    /// An entry of no list.
    pub(crate) struct Entry<T>(T);

    impl<T> Entry<T> {
        pub(crate) fn new(value: T) -> impl PinInit<Self> {
            Self(value)
        }
    }

    impl<T> Deref for Entry<T> {
        type Target = T;

        fn deref(&self) -> &T {
            &self.0
        }
    }
}

pub(crate) mod task {
    use std::cell::Cell;

    thread_local! {
        /// Somebody has killed the task.
        pub(crate) static KILLED: Cell<bool> = const { Cell::new(false) };
    }

    pub(crate) fn killed() -> bool {
        KILLED.get()
    }
}

pub(crate) mod trace {
    use super::inode::Inode;
    use crate::policy::range::Range;

    pub(crate) fn bind(_: &Inode, _: Range) {}
    pub(crate) fn unbind(_: &Inode, _: Range) {}
    pub(crate) fn invalidate_start(_: &Inode, _: Range) {}
    pub(crate) fn invalidate_end(_: &Inode, _: Range) {}
}
