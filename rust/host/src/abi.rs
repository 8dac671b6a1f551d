// SPDX-License-Identifier: GPL-2.0

//! The border to C, as the engine sees it, without any C: what stands in for `rust/abi`.
//!
//! It is stricter than C: using what was freed, or looking for the next in a tree from one that is
//! not in it, panics.

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
    record::RECORDS.take();
}

pub(crate) mod inode {
    use super::notifier::Notifier;
    use crate::kernel::prelude::*;
    use crate::policy::flags::Flags;
    use crate::policy::range::PAGE_SHIFT;
    use std::cell::Cell;

    /// An inode of so many bytes.
    #[derive(Default)]
    pub(crate) struct Inode {
        pub(crate) bytes: Cell<u64>,
        /// What [`Self::apply`] was told last.
        pub(crate) applied: Cell<Option<(Flags, bool)>>,
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

        pub(crate) fn apply(&self, flags: Flags, bound: bool) {
            self.applied.set(Some((flags, bound)));
        }

        pub(crate) fn rescue(&self) {}
    }

    thread_local! {
        /// The last call that reached shmem.
        pub(crate) static FALLOCATED: Cell<Option<(i32, i64, i64)>> = const { Cell::new(None) };
    }

    /// An open file.
    #[derive(Clone, Copy)]
    pub(crate) struct File {
        pub(crate) writable: bool,
    }

    impl File {
        pub(crate) fn writable(self) -> bool {
            self.writable
        }

        pub(crate) fn fallocate(self, mode: i32, offset: i64, len: i64) -> Result {
            FALLOCATED.set(Some((mode, offset, len)));
            Ok(())
        }

        pub(crate) fn hold_for(self, notifier: Notifier) {
            assert!(!notifier.body().file_held.replace(true), "held twice");
        }
    }
}

pub(crate) mod notifier {
    use crate::policy::clock::Life;
    use crate::policy::range::{Binding, Range};
    use crate::policy::Refusal;
    use std::cell::{Cell, RefCell};
    use std::rc::Rc;

    /// What a consumer is called back for.
    pub(crate) trait Consumer {
        fn invalidate_start(&self, frames: Range);
        fn flush(&self);
        fn invalidate_end(&self, frames: Range);
        fn test_clear_young(&self, frames: Range) -> bool;
    }

    pub(crate) struct Body {
        pgoff: u64,
        nr_pages: u64,
        frame: u64,
        observer: bool,
        consumer: Option<Rc<dyn Consumer>>,
        life: Cell<Option<Life>>,
        pub(super) file_held: Cell<bool>,
    }

    thread_local! {
        pub(super) static BODIES: RefCell<Vec<Rc<Body>>> = const { RefCell::new(Vec::new()) };
    }

    /// A consumer's binding; the number says which.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Notifier(usize);

    impl Notifier {
        pub(crate) fn new(
            pgoff: u64,
            nr_pages: u64,
            frame: u64,
            observer: bool,
            consumer: Option<Rc<dyn Consumer>>,
        ) -> Self {
            let body = Body {
                pgoff,
                nr_pages,
                frame,
                observer,
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

        pub(crate) fn binding(self, file_pages: u64) -> Result<Binding, Refusal> {
            let body = self.body();
            Binding::new(body.pgoff, body.nr_pages, body.frame, file_pages)
        }

        pub(crate) fn has_ops(self) -> bool {
            self.body().consumer.is_some()
        }

        pub(crate) fn release_file(self) {
            assert!(self.body().file_held.replace(false), "released twice");
        }

        pub(crate) fn invalidate_start(self, frames: Range) {
            self.consumer().invalidate_start(frames);
        }

        pub(crate) fn flush(self) {
            self.consumer().flush();
        }

        pub(crate) fn invalidate_end(self, frames: Range) {
            self.consumer().invalidate_end(frames);
        }

        pub(crate) fn test_clear_young(self, frames: Range) -> bool {
            self.consumer().test_clear_young(frames)
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
            let from = after.map_or(0, |notifier| self.position(notifier) + 1);
            let mut rest = self.0[from..].iter();
            rest.find(|(bound, _)| bound.overlaps(pages))
                .map(|&(_, notifier)| notifier)
        }
    }
}

pub(crate) mod record {
    use crate::policy::clock::{Running, Tick};
    use crate::policy::range::Range;
    use std::cell::RefCell;

    thread_local! {
        pub(super) static RECORDS: RefCell<Vec<Option<Running>>> =
            const { RefCell::new(Vec::new()) };
    }

    /// One running invalidation; the number says which.
    #[derive(Clone, Copy, PartialEq, Eq)]
    pub(crate) struct Record(usize);

    impl Record {
        pub(crate) fn new() -> Self {
            RECORDS.with_borrow_mut(|records| {
                records.push(None);
                Self(records.len() - 1)
            })
        }

        fn set(self, running: Option<Running>) {
            RECORDS.with_borrow_mut(|records| records[self.0] = running);
        }

        pub(crate) fn with<R>(f: impl FnOnce(Record) -> R) -> R {
            let record = Self::new();
            let result = f(record);
            assert!(record.running().is_none(), "an invalidation did not end");
            result
        }

        pub(crate) fn running(self) -> Option<Running> {
            RECORDS.with_borrow(|records| records[self.0])
        }
    }

    pub(crate) struct RecordList(Vec<Record>);

    impl RecordList {
        pub(crate) const fn new() -> Self {
            Self(Vec::new())
        }

        pub(crate) fn is_empty(&self) -> bool {
            self.0.is_empty()
        }

        pub(crate) fn push(&mut self, record: Record, seq: Tick, pages: Range) {
            record.set(Some(Running { seq, pages }));
            self.0.push(record);
        }

        pub(crate) fn remove(&mut self, record: Record) {
            self.0.retain(|&other| other != record);
            record.set(None);
        }

        pub(crate) fn any(&self, hold: impl Fn(Running) -> bool) -> bool {
            self.0
                .iter()
                .any(|record| record.running().is_some_and(&hold))
        }
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
