// SPDX-License-Identifier: GPL-2.0

//! Counts that each CPU keeps for itself.
//!
//! C header: [`include/linux/percpu.h`](srctree/include/linux/percpu.h)

use crate::bindings;
use core::ptr::NonNull;
use kernel::ffi::c_uint;
use kernel::prelude::*;

/// `N` counts. CPUs that count at the same time do not write to one cache line.
///
/// # Invariants
///
/// The pointer is from `memfile_alloc_counts(N)`.
pub(crate) struct Counts<const N: usize>(NonNull<i64>);

// SAFETY: Any task may free the counts.
unsafe impl<const N: usize> Send for Counts<N> {}
// SAFETY: A CPU adds to its own counts only, in one instruction.
unsafe impl<const N: usize> Sync for Counts<N> {}

impl<const N: usize> Counts<N> {
    /// All of them 0. Charged to the memory cgroup of the task. Sleeps.
    pub(crate) fn new() -> Result<Self> {
        let n = c_uint::try_from(N)?;
        // SAFETY: The caller may sleep.
        let counts = NonNull::new(unsafe { bindings::memfile_alloc_counts(n) }).ok_or(ENOMEM)?;
        // INVARIANT: They are from there.
        Ok(Self(counts))
    }

    /// Adds `n` to the count `which`; nothing if there is none. Any context.
    pub(crate) fn add(&self, which: usize, n: i64) {
        if which < N {
            // SAFETY: By the type invariant there are `N` counts.
            unsafe { bindings::memfile_add_count(self.0.as_ptr(), which, n) };
        }
    }

    /// The count `which`, of all CPUs; 0 if there is none. It may include what other CPUs add
    /// meanwhile. Any context.
    pub(crate) fn sum(&self, which: usize) -> i64 {
        if which >= N {
            return 0;
        }
        // SAFETY: By the type invariant there are `N` counts.
        unsafe { bindings::memfile_sum_count(self.0.as_ptr(), which) }
    }
}

impl<const N: usize> Drop for Counts<N> {
    fn drop(&mut self) {
        // SAFETY: They are from `memfile_alloc_counts()` by the type invariant, and nobody uses them
        // any more.
        unsafe { bindings::memfile_free_counts(self.0.as_ptr()) };
    }
}
