// SPDX-License-Identifier: GPL-2.0

//! Allocations that are under way: a page on its way to the page cache of its file, where no
//! look-up finds it yet.
//!
//! C header: [`include/linux/srcu.h`](srctree/include/linux/srcu.h)

use crate::bindings;
use kernel::ffi::c_int;
use kernel::types::NotThreadSafe;

/// An allocation under way, for any file. The page is in the page cache when this is dropped.
///
/// # Invariants
///
/// The index is from `memfile_begin_allocation()`.
pub(crate) struct Allocation(c_int, NotThreadSafe);

impl Allocation {
    /// Begins one. Only after that does the caller look where pages may come from.
    pub(crate) fn begin() -> Self {
        // SAFETY: May be called anywhere.
        let index = unsafe { bindings::memfile_begin_allocation() };
        // INVARIANT: It is.
        Self(index, NotThreadSafe)
    }

    /// Waits until all that have begun are at their end. Sleeps; not from within one.
    pub(crate) fn wait_for_all() {
        // SAFETY: The caller may sleep.
        unsafe { bindings::memfile_wait_for_allocations() };
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        // SAFETY: The index is valid by the type invariant, and this is the same task.
        unsafe { bindings::memfile_end_allocation(self.0) };
    }
}
