// SPDX-License-Identifier: GPL-2.0

//! Notifiers, which stand for bindings, and the interval tree that finds them.
//!
//! C headers: [`include/linux/memfile.h`](srctree/include/linux/memfile.h),
//! [`include/linux/interval_tree.h`](srctree/include/linux/interval_tree.h)

use super::invalidation::Invalidation;
use crate::bindings;
use crate::policy::clock::Life;
use crate::policy::context::Position;
use crate::policy::range::{
    Range,
    Span, //
};
use crate::policy::Refusal;
use core::cell::UnsafeCell;
use core::num::NonZeroU64;
use core::ptr::NonNull;
use kernel::container_of;
use kernel::prelude::*;
use kernel::rbtree::{
    RBTree,
    RBTreeNodeReservation, //
};

/// The notifier of a binding, which the consumer owns.
///
/// # Invariants
///
/// Points to a `struct memfile_notifier` that its owner keeps valid from the call of
/// `memfile_register_notifier()` to the return of `memfile_unregister_notifier()`, and whose
/// geometry and ops do not change in between. The core uses a value only in that time: while one
/// of these two runs, while the notifier is in a [`Tree`] and the tree's lock is held, or during an
/// invalidation that the notifier takes part in, which unregistration waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Notifier(NonNull<bindings::memfile_notifier>);

impl Notifier {
    /// # Safety
    ///
    /// `notifier` must be as the type invariant says.
    pub(crate) unsafe fn from_raw(notifier: *mut bindings::memfile_notifier) -> Option<Self> {
        // INVARIANT: By the safety requirements of this function.
        NonNull::new(notifier).map(Self)
    }

    fn as_ptr(self) -> *mut bindings::memfile_notifier {
        self.0.as_ptr()
    }

    /// Is the binding an observer's?
    pub(crate) fn observer(self) -> bool {
        // SAFETY: Valid by the type invariant.
        unsafe { (*self.as_ptr()).observer }
    }

    /// The context. The consumer is called once for all bindings of a context.
    pub(crate) fn context(self) -> Option<NonZeroU64> {
        // SAFETY: Valid by the type invariant, and does not change.
        NonZeroU64::new(unsafe { (*self.as_ptr()).context })
    }

    /// The first page, the number of pages and the first frame that the binding names.
    fn geometry(self) -> (u64, u64, u64) {
        let raw = self.as_ptr();
        // SAFETY: Valid by the type invariant, and these fields do not change. (No reference to the
        // whole: the tree's links and the life beside them do, under a lock that we do not hold.)
        let (pgoff, nr_pages, frame) = unsafe { ((*raw).pgoff, (*raw).nr_pages, (*raw).frame) };
        (pgoff as u64, nr_pages as u64, frame)
    }

    /// The span of the binding, if that lies in a file of `file_pages` pages.
    pub(crate) fn checked_span(self, file_pages: u64) -> Result<Span, Refusal> {
        let (pgoff, nr_pages, frame) = self.geometry();
        Span::new(pgoff, nr_pages, frame, file_pages)
    }

    /// The span of the binding once more, after registration has accepted it: a file that is bound
    /// keeps its size.
    pub(crate) fn span(self) -> Span {
        let (pgoff, nr_pages, frame) = self.geometry();
        Span::accepted(pgoff, nr_pages, frame)
    }

    /// Does the notifier have all callbacks?
    pub(crate) fn has_ops(self) -> bool {
        // SAFETY: Valid by the type invariant; ops outlive the notifier.
        unsafe {
            (*self.as_ptr()).ops.as_ref().is_some_and(|ops| {
                ops.invalidate_start.is_some()
                    && ops.invalidate_end.is_some()
                    && ops.test_clear_young.is_some()
            })
        }
    }

    pub(crate) fn node_ptr(self) -> *mut bindings::memfile_node {
        // SAFETY: Valid by the type invariant; written before registration returns only.
        unsafe { (*self.as_ptr()).node }
    }

    /// The file that the binding holds; null if the notifier is not registered.
    pub(crate) fn file_ptr(self) -> *mut bindings::file {
        // SAFETY: Valid by the type invariant; written by registration and its end only.
        unsafe { (*self.as_ptr()).file }
    }

    /// Names the node, and the store with the largest order of its pages.
    pub(crate) fn attach(
        self,
        node: *mut bindings::memfile_node,
        store: &'static bindings::memfile_backing_store,
        max_order: u32,
    ) {
        let raw = self.as_ptr();
        // SAFETY: Valid by the type invariant; nobody else looks at it before it is registered.
        unsafe {
            (*raw).node = node;
            (*raw).bs = store;
            (*raw).max_order = max_order;
        }
    }

    pub(super) fn set_file(self, file: *mut bindings::file) {
        // SAFETY: Valid by the type invariant; only registration and its end write here.
        unsafe { (*self.as_ptr()).file = file };
    }

    /// Undoes [`super::file::File::hold_for`]. Does not sleep.
    pub(crate) fn release_file(self) {
        // SAFETY: Valid by the type invariant; the reference was taken by `hold_for()`.
        unsafe { bindings::fput((*self.as_ptr()).file) };
        self.set_file(core::ptr::null_mut());
    }

    /// Tells the consumer to unmap `frames` and the frames of the context's other bindings, and to
    /// keep them unmapped.
    pub(crate) fn invalidate_start(self, inv: Invalidation, frames: Range) {
        let mut range = self.range(frames);
        // SAFETY: Valid by the type invariant; `has_ops()` was true at registration. The record is
        // listed, and `range` stays for the call.
        unsafe {
            if let Some(call) = (*(*self.as_ptr()).ops).invalidate_start {
                call(inv.as_ptr(), &mut range);
            }
        }
    }

    /// Tells the consumer that it may map these frames again.
    pub(crate) fn invalidate_end(self, inv: Invalidation, frames: Range) {
        let mut range = self.range(frames);
        // SAFETY: As in `invalidate_start()`.
        unsafe {
            if let Some(call) = (*(*self.as_ptr()).ops).invalidate_end {
                call(inv.as_ptr(), &mut range);
            }
        }
    }

    /// `frames` in the form in which the consumer gets them.
    pub(crate) fn range(self, frames: Range) -> bindings::memfile_range {
        bindings::memfile_range {
            notifier: self.as_ptr(),
            start: frames.start(),
            end: frames.end(),
        }
    }

    /// Asks the consumer whether it has used `frames` since the last call.
    pub(crate) fn test_clear_young(self, frames: Range) -> bool {
        // SAFETY: As in `invalidate_start()`.
        unsafe {
            (*(*self.as_ptr()).ops)
                .test_clear_young
                .is_some_and(|call| call(self.as_ptr(), frames.start(), frames.end()))
        }
    }
}

/// The part of an invalidation's record that says which notifiers take part.
#[derive(Clone, Copy)]
pub(crate) struct Hits {
    /// The first notifier in the file.
    pub(crate) first: Option<Notifier>,
    /// There are others.
    pub(crate) more: bool,
}

impl Hits {
    /// Writes this to the record of `inv`.
    pub(crate) fn note(self, inv: Invalidation) {
        let raw = inv.as_ptr();
        let first = self.first.map_or(core::ptr::null_mut(), Notifier::as_ptr);
        // SAFETY: Valid by the type invariant of `Invalidation`; only its owner writes here, before
        // it calls a consumer.
        unsafe {
            (*raw).first = first;
            (*raw).more = self.more;
        }
    }

    /// Reads it from the record of `inv`, which is running.
    pub(crate) fn of(inv: Invalidation) -> Self {
        let raw = inv.as_ptr();
        // SAFETY: Valid by the type invariant of `Invalidation`; does not change while listed.
        let (first, more) = unsafe { ((*raw).first, (*raw).more) };
        // INVARIANT: Its unregistration waits for this invalidation.
        let first = NonNull::new(first).map(Notifier);
        Self { first, more }
    }
}

/// Notifiers by the file pages they bind; they may overlap. Nothing is allocated: the nodes are in
/// the notifiers. Lookups cost O(log n).
///
/// # Invariants
///
/// Every node in the tree is the `range` of a notifier that fulfils the invariant of [`Notifier`].
pub(crate) struct Tree {
    root: UnsafeCell<bindings::rb_root_cached>,
}

// SAFETY: The tree is used under its owner's lock only, from any thread.
unsafe impl Send for Tree {}

impl Tree {
    /// An empty one.
    pub(crate) fn new() -> Self {
        // INVARIANT: No node.
        Self {
            root: UnsafeCell::new(bindings::rb_root_cached::default()),
        }
    }

    /// The life of `notifier`, which is in this tree. `self` proves that the lock is held.
    pub(crate) fn life(&self, notifier: Notifier) -> Life {
        let raw = notifier.as_ptr();
        // SAFETY: Valid by the type invariant of `Notifier`; written under the lock only.
        let (birth, death) = unsafe { ((*raw).birth, (*raw).death) };
        Life { birth, death }
    }

    /// Sets the life of `notifier`.
    pub(crate) fn set_life(&mut self, notifier: Notifier, life: Life) {
        // SAFETY: Valid by the type invariant of `Notifier`; written under the lock only.
        unsafe {
            (*notifier.as_ptr()).birth = life.birth;
            (*notifier.as_ptr()).death = life.death;
        }
    }

    /// Adds `notifier`, which is in no tree, at `pages`.
    pub(crate) fn insert(&mut self, notifier: Notifier, pages: Range) {
        // SAFETY: Valid by the type invariant of `Notifier`, and not in a tree.
        unsafe {
            let node = &raw mut (*notifier.as_ptr()).range;
            // CAST: Page offsets are as wide on 64 bits.
            (*node).start = pages.start() as usize;
            (*node).last = (pages.end() - 1) as usize;
            // INVARIANT: `notifier` fulfils the invariant.
            bindings::interval_tree_insert(node, self.root.get());
        }
    }

    /// Removes `notifier`, which is in this tree.
    pub(crate) fn remove(&mut self, notifier: Notifier) {
        // SAFETY: Valid by the type invariant of `Notifier`, and in this tree.
        unsafe {
            bindings::interval_tree_remove(&raw mut (*notifier.as_ptr()).range, self.root.get())
        };
    }

    /// The first notifier that overlaps `pages`, or the next one `after` one that did and is still
    /// in the tree.
    pub(crate) fn next(&self, pages: Range, after: Option<Notifier>) -> Option<Notifier> {
        // CAST: Page offsets are as wide on 64 bits.
        let (start, last) = (pages.start() as usize, (pages.end() - 1) as usize);
        let node = match after {
            // SAFETY: The tree's nodes are valid by the type invariant; the lock is held.
            None => unsafe { bindings::interval_tree_iter_first(self.root.get(), start, last) },
            // SAFETY: As above, and the caller says that this one is in the tree.
            Some(notifier) => unsafe {
                bindings::interval_tree_iter_next(&raw mut (*notifier.as_ptr()).range, start, last)
            },
        };
        if node.is_null() {
            return None;
        }
        // SAFETY: By the type invariant the node is the `range` of a notifier.
        let notifier = unsafe { container_of!(node, bindings::memfile_notifier, range) };
        // INVARIANT: By the type invariant of `Tree`.
        NonNull::new(notifier).map(Notifier)
    }
}

/// A notifier in [`Others`].
struct Other(Notifier);

// SAFETY: The map is used under its owner's lock only, from any thread.
unsafe impl Send for Other {}

/// A place in [`Others`] that is allocated.
pub(crate) struct Seat(RBTreeNodeReservation<Position, Other>);

impl Seat {
    /// Allocates one. Sleeps.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(RBTreeNodeReservation::new(GFP_KERNEL_ACCOUNT)?))
    }
}

/// Notifiers by their position among those of their context. Lookups cost O(log n).
///
/// # Invariants
///
/// Every element fulfils the invariant of [`Notifier`].
pub(crate) struct Others(RBTree<Position, Other>);

impl Others {
    /// An empty map.
    pub(crate) fn new() -> Self {
        // INVARIANT: No element.
        Self(RBTree::new())
    }

    /// Adds `notifier`, which is not in the map. Allocates nothing.
    pub(crate) fn insert(&mut self, seat: Seat, at: Position, notifier: Notifier) {
        // INVARIANT: `notifier` fulfils the invariant until it is removed.
        self.0.insert(seat.0.into_node(at, Other(notifier)));
    }

    /// Removes the notifier at a position and frees its seat. Does not sleep.
    pub(crate) fn remove(&mut self, at: Position) {
        self.0.remove(&at);
    }

    /// The notifier at a position, or at the next one that is taken.
    pub(crate) fn next(&self, from: Position) -> Option<(Position, Notifier)> {
        let cursor = self.0.cursor_lower_bound(&from)?;
        let (at, other) = cursor.current();
        Some((*at, other.0))
    }
}
