// SPDX-License-Identifier: GPL-2.0

//! Invalidations: each has a record on the stack of its caller, and a node lists those that are
//! running.

use crate::bindings;
use crate::policy::clock::{
    Scope,
    Tick, //
};
use crate::policy::range::Range;
use core::ptr::NonNull;

/// One invalidation: a handle to its record.
///
/// # Invariants
///
/// Points to a `struct memfile_invalidation` that stays where it is until it is off the list.
#[derive(Clone, Copy)]
pub(crate) struct Invalidation(NonNull<bindings::memfile_invalidation>);

impl Invalidation {
    /// # Safety
    ///
    /// `raw` must be as the type invariant says; its fields need not be initialised.
    pub(crate) unsafe fn from_raw(raw: NonNull<bindings::memfile_invalidation>) -> Self {
        // SAFETY: Valid by the safety requirements.
        unsafe { raw.write(bindings::memfile_invalidation::default()) };
        // INVARIANT: By the safety requirements.
        Self(raw)
    }

    /// The invalidation of a record that is initialised. It may be running.
    ///
    /// # Safety
    ///
    /// `raw` must be as the type invariant says.
    pub(crate) unsafe fn listed(raw: NonNull<bindings::memfile_invalidation>) -> Self {
        // INVARIANT: By the safety requirements.
        Self(raw)
    }

    pub(super) fn as_ptr(self) -> *mut bindings::memfile_invalidation {
        self.0.as_ptr()
    }

    /// The node that the invalidation belongs to, or null.
    pub(crate) fn node_ptr(self) -> *mut bindings::memfile_node {
        // SAFETY: Valid by the type invariant; does not change while it is listed.
        unsafe { (*self.0.as_ptr()).node }
    }

    pub(crate) fn set_node(self, node: *mut bindings::memfile_node) {
        // SAFETY: Valid by the type invariant; only its owner writes here, while it is not listed.
        unsafe { (*self.0.as_ptr()).node = node };
    }

    /// Does the record have a reference to the node?
    pub(crate) fn holds_node(self) -> bool {
        // SAFETY: As in `node_ptr()`.
        unsafe { (*self.0.as_ptr()).holds_node }
    }

    /// As [`Self::set_node`], with a reference that the record has from now on.
    pub(crate) fn hold_node(self, node: *mut bindings::memfile_node) {
        self.set_node(node);
        // SAFETY: As in `set_node()`.
        unsafe { (*self.0.as_ptr()).holds_node = true };
    }

    /// Calls `f` with an invalidation of `node` whose record is on the stack. `f` must end it if it
    /// begins it.
    pub(crate) fn with<N, R>(node: &N, f: impl FnOnce(Invalidation) -> R) -> R {
        let mut raw = bindings::memfile_invalidation {
            node: core::ptr::from_ref(node).cast_mut().cast(),
            ..Default::default()
        };
        // SAFETY: `raw` is not moved before this function returns, and it is off the list then.
        let result = f(unsafe { Invalidation::listed(NonNull::from(&mut raw)) });
        if raw.seq != 0 {
            // This is a bug of this module. If the function returned, it would leave a dangling
            // pointer in the list, so it is better that this task hangs.
            kernel::pr_crit!("memfile: an invalidation did not end\n");
            loop {
                // SAFETY: May be called here, where the caller may sleep.
                unsafe { bindings::msleep(u32::MAX) };
            }
        }
        result
    }

    /// The tick at which it began and its pages, or [`None`] if it is not running.
    pub(crate) fn scope(self) -> Option<Scope> {
        let raw = self.0.as_ptr();
        // SAFETY: Valid by the type invariant. Only the record's owner writes these three, while it
        // is on no list; `next` and `prev` are the list's and not looked at.
        let (seq, start, end) = unsafe { ((*raw).seq, (*raw).start, (*raw).end) };
        let pages = Range::new(start as u64, end as u64)?;
        Some(Scope { seq, pages })
    }
}

/// The running invalidations of a node, in no order.
///
/// # Invariants
///
/// Every element is as [`Invalidation`] says, has a `seq`, and is linked by its `next` and its `prev`,
/// which are null at the ends. A record without a `seq` is in no list.
pub(crate) struct Invalidations {
    head: *mut bindings::memfile_invalidation,
}

// SAFETY: The list is used under its owner's lock only, from any thread.
unsafe impl Send for Invalidations {}

impl Invalidations {
    /// An empty one.
    pub(crate) const fn new() -> Self {
        // INVARIANT: No element.
        Self {
            head: core::ptr::null_mut(),
        }
    }

    /// Is the list empty?
    pub(crate) fn is_empty(&self) -> bool {
        self.head.is_null()
    }

    /// Adds `inv`, which is in no list: an invalidation of `pages` that began at `seq`.
    pub(crate) fn push(&mut self, inv: Invalidation, seq: Tick, pages: Range) {
        // SAFETY: Valid by the type invariant of `Invalidation`.
        let raw = unsafe { &mut *inv.0.as_ptr() };
        raw.seq = seq;
        // CAST: Page offsets are as wide on 64 bits.
        raw.start = pages.start() as usize;
        raw.end = pages.end() as usize;
        raw.next = self.head;
        raw.prev = core::ptr::null_mut();
        if let Some(next) = NonNull::new(self.head) {
            // SAFETY: The element is valid by the type invariant.
            unsafe { (*next.as_ptr()).prev = inv.0.as_ptr() };
        }
        // INVARIANT: `inv` stays in place until it is off the list.
        self.head = inv.0.as_ptr();
    }

    /// Removes `inv`, if it is in this list.
    pub(crate) fn remove(&mut self, inv: Invalidation) {
        let raw = inv.0.as_ptr();
        // SAFETY: Valid by the type invariant of `Invalidation`.
        let (seq, next, prev) = unsafe { ((*raw).seq, (*raw).next, (*raw).prev) };
        if seq == 0 {
            return;
        }
        match NonNull::new(prev) {
            // SAFETY: A record with a `seq` is in a list, and so its neighbours are valid by the type
            // invariant. If that is another list, it stays whole.
            Some(prev) => unsafe { (*prev.as_ptr()).next = next },
            None if self.head == raw => self.head = next,
            // The first one of another list.
            None => return,
        }
        if let Some(next) = NonNull::new(next) {
            // SAFETY: As above.
            unsafe { (*next.as_ptr()).prev = prev };
        }
        // SAFETY: Valid by the type invariant of `Invalidation`.
        unsafe { (*raw).seq = 0 };
    }

    /// Is `hold` true of the scope of any of them?
    pub(crate) fn any(&self, hold: impl Fn(Scope) -> bool) -> bool {
        let mut at = NonNull::new(self.head);
        while let Some(raw) = at {
            if Invalidation(raw).scope().is_some_and(&hold) {
                return true;
            }
            // SAFETY: The element is valid by the type invariant.
            at = NonNull::new(unsafe { (*raw.as_ptr()).next });
        }
        false
    }
}
