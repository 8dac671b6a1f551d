// SPDX-License-Identifier: GPL-2.0

//! Running invalidations: a record on the stack of whoever invalidates, in a list of the node's.

use crate::bindings;
use crate::policy::clock::{
    Running,
    Tick, //
};
use crate::policy::range::Range;
use core::ptr::NonNull;

/// One running invalidation.
///
/// # Invariants
///
/// Points to a `struct memfile_invalidation` that stays where it is until it is off the list.
#[derive(Clone, Copy)]
pub(crate) struct Record(NonNull<bindings::memfile_invalidation>);

impl Record {
    /// # Safety
    ///
    /// `raw` must be as the type invariant says; its fields need not be initialised.
    pub(super) unsafe fn from_raw(raw: NonNull<bindings::memfile_invalidation>) -> Self {
        // SAFETY: Valid by the safety requirements.
        unsafe { raw.write(bindings::memfile_invalidation::default()) };
        // INVARIANT: By the safety requirements.
        Self(raw)
    }

    /// A record that is initialised, and perhaps listed.
    ///
    /// # Safety
    ///
    /// `raw` must be as the type invariant says.
    pub(super) unsafe fn listed(raw: NonNull<bindings::memfile_invalidation>) -> Self {
        // INVARIANT: By the safety requirements.
        Self(raw)
    }

    pub(super) fn as_ptr(self) -> *mut bindings::memfile_invalidation {
        self.0.as_ptr()
    }

    /// The node it is for, or null.
    pub(super) fn node_ptr(self) -> *mut bindings::memfile_node {
        // SAFETY: Valid by the type invariant; does not change while it is listed.
        unsafe { (*self.0.as_ptr()).node }
    }

    pub(super) fn set_node(self, node: *mut bindings::memfile_node) {
        // SAFETY: Valid by the type invariant; only its owner writes here, while it is not listed.
        unsafe { (*self.0.as_ptr()).node = node };
    }

    /// Does `f` with a record on the stack for `node`, which `f` must take off the list again.
    pub(crate) fn with<N, R>(node: &N, f: impl FnOnce(Record) -> R) -> R {
        let mut raw = bindings::memfile_invalidation {
            node: core::ptr::from_ref(node).cast_mut().cast(),
            ..Default::default()
        };
        // SAFETY: `raw` is not moved before this function returns, and it is off the list then.
        let result = f(unsafe { Record::listed(NonNull::from(&mut raw)) });
        if raw.seq != 0 {
            // A bug of ours: returning would leave a dangling pointer in the list. Better this
            // task hangs than that somebody follows it.
            kernel::pr_crit!("memfile: an invalidation did not end\n");
            loop {
                // SAFETY: May be called here, where the caller may sleep.
                unsafe { bindings::msleep(u32::MAX) };
            }
        }
        result
    }

    /// When it began and what it takes away, or [`None`] if it is not listed.
    pub(crate) fn running(self) -> Option<Running> {
        let raw = self.0.as_ptr();
        // SAFETY: Valid by the type invariant. Only who owns the record writes these three, while
        // it is on no list; `next` is the list's and not looked at.
        let (seq, start, end) = unsafe { ((*raw).seq, (*raw).start, (*raw).end) };
        let pages = Range::new(start as u64, end as u64)?;
        Some(Running { seq, pages })
    }
}

/// The records of a node, in no order.
///
/// # Invariants
///
/// Every element is as [`Record`] says, and linked by its `next`.
pub(crate) struct RecordList {
    head: *mut bindings::memfile_invalidation,
}

// SAFETY: The list is used under its owner's lock only, from any thread.
unsafe impl Send for RecordList {}

impl RecordList {
    /// An empty one.
    pub(crate) const fn new() -> Self {
        // INVARIANT: No element.
        Self {
            head: core::ptr::null_mut(),
        }
    }

    /// Is there none?
    pub(crate) fn is_empty(&self) -> bool {
        self.head.is_null()
    }

    /// Lists `record`, which is in no list: from `seq` on it takes `pages` away.
    pub(crate) fn push(&mut self, record: Record, seq: Tick, pages: Range) {
        // SAFETY: Valid by the type invariant of `Record`.
        let raw = unsafe { &mut *record.0.as_ptr() };
        raw.seq = seq;
        // CAST: Page offsets are as wide on 64 bits.
        raw.start = pages.start() as usize;
        raw.end = pages.end() as usize;
        raw.next = self.head;
        // INVARIANT: `record` stays in place until it is off the list.
        self.head = record.0.as_ptr();
    }

    /// Takes `record` off.
    pub(crate) fn remove(&mut self, record: Record) {
        let mut link = &raw mut self.head;
        // SAFETY: `link` points to our head or to the `next` of an element, which are valid by the
        // type invariant.
        unsafe {
            while !(*link).is_null() {
                if *link == record.0.as_ptr() {
                    *link = (**link).next;
                    (*record.0.as_ptr()).seq = 0;
                    return;
                }
                link = &raw mut (**link).next;
            }
        }
    }

    /// Does any of them `hold` something up?
    pub(crate) fn any(&self, hold: impl Fn(Running) -> bool) -> bool {
        let mut at = NonNull::new(self.head);
        while let Some(raw) = at {
            if Record(raw).running().is_some_and(&hold) {
                return true;
            }
            // SAFETY: The element is valid by the type invariant.
            at = NonNull::new(unsafe { (*raw.as_ptr()).next });
        }
        false
    }
}
