// SPDX-License-Identifier: GPL-2.0

//! Lists of what exists. An entry is in its list from its making until it is dropped, and has its
//! links in itself, so that neither allocates.

use core::cell::Cell;
use core::convert::Infallible;
use core::iter;
use core::marker::PhantomPinned;
use core::ops::Deref;
use core::pin::Pin;
use core::ptr;
use kernel::prelude::*;
use kernel::sync::{
    GlobalLock,
    GlobalLockBackend, //
};

/// What has a list of all that exist.
pub(crate) trait Listed: Send + Sync + Sized + 'static {
    /// The lock with the list in it, of which there is one.
    type Lock: GlobalLockBackend<Item = List<Self>>;

    /// The list. The lock is a mutex.
    fn list() -> &'static GlobalLock<Self::Lock>;

    /// Called when it is about to leave the list, under the list's lock: others find the entry or
    /// see what this has done.
    fn leave(&self);
}

/// Neighbours, or the ends of a list; null where there is none.
struct Links<T: Listed> {
    prev: Cell<*const Entry<T>>,
    next: Cell<*const Entry<T>>,
}

impl<T: Listed> Links<T> {
    const fn new() -> Self {
        Self {
            prev: Cell::new(ptr::null()),
            next: Cell::new(ptr::null()),
        }
    }
}

/// All entries that exist, oldest first.
///
/// # Invariants
///
/// The entries in it are valid and stay as long as the list is locked. Their links change under the
/// lock only.
pub(crate) struct List<T: Listed> {
    /// `next` is the first entry, and `prev` the last one.
    ends: Links<T>,
    /// Whoever holds the lock cannot put another list in its place.
    _pin: PhantomPinned,
}

// SAFETY: A list is used under its lock only, and the entries may be shared.
unsafe impl<T: Listed> Send for List<T> {}

impl<T: Listed> List<T> {
    /// Without entries.
    pub(crate) const fn new() -> Self {
        // INVARIANT: There are no entries.
        Self {
            ends: Links::new(),
            _pin: PhantomPinned,
        }
    }

    /// The entries.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        let first = self.entry(self.ends.next.get());
        iter::successors(first, |at| self.entry(at.links.next.get())).map(Deref::deref)
    }

    /// The entry that a link of the list names.
    fn entry(&self, link: *const Entry<T>) -> Option<&Entry<T>> {
        // SAFETY: Null, or valid by the type invariant as long as the caller has the list, which
        // only the lock gives.
        unsafe { link.as_ref() }
    }

    /// The links that name what follows `link`, or what precedes it.
    fn links(&self, link: *const Entry<T>) -> &Links<T> {
        self.entry(link).map_or(&self.ends, |entry| &entry.links)
    }

    fn push(&self, entry: &Entry<T>) {
        let last = self.ends.prev.get();
        entry.links.prev.set(last);
        self.links(last).next.set(entry);
        self.ends.prev.set(entry);
    }

    fn remove(&self, entry: &Entry<T>) {
        let (prev, next) = (entry.links.prev.get(), entry.links.next.get());
        self.links(prev).next.set(next);
        self.links(next).prev.set(prev);
    }
}

/// An entry, with its value. Dropping it sleeps: it takes the list's lock.
///
/// # Invariants
///
/// From its initialisation until it is dropped it is in the list of its type.
#[pin_data(PinnedDrop)]
pub(crate) struct Entry<T: Listed> {
    value: T,
    links: Links<T>,
    #[pin]
    _pin: PhantomPinned,
}

// SAFETY: The value may be sent, and the links are used under the list's lock only.
unsafe impl<T: Listed> Send for Entry<T> {}
// SAFETY: The value may be shared, and the links are used under the list's lock only.
unsafe impl<T: Listed> Sync for Entry<T> {}

impl<T: Listed> Entry<T> {
    /// Makes an entry, the youngest of its list. Sleeps.
    pub(crate) fn new(value: T) -> impl PinInit<Self> {
        pin_init!(Self {
            value,
            links: Links::new(),
            _pin: PhantomPinned,
        })
        .pin_chain(|entry: Pin<&mut Self>| {
            // INVARIANT: It is in the list from here on; it is pinned, and `drop()` removes it.
            T::list().lock().push(&entry);
            Ok::<(), Infallible>(())
        })
    }
}

impl<T: Listed> Deref for Entry<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

#[pinned_drop]
impl<T: Listed> PinnedDrop for Entry<T> {
    fn drop(self: Pin<&mut Self>) {
        let list = T::list().lock();
        self.leave();
        list.remove(&self);
    }
}
