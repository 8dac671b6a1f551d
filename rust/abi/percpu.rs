// SPDX-License-Identifier: GPL-2.0

//! Counts that each CPU keeps for itself, once that pays.
//!
//! C header: [`include/linux/percpu.h`](srctree/include/linux/percpu.h)

use crate::bindings;
use core::mem::{
    offset_of,
    size_of, //
};
use kernel::sync::atomic::Atomic;
use kernel::types::Opaque;

/// `N` counts, which may grow and shrink. All CPUs count in the same place, until they are spread
/// ([`Self::spread`]): then each has its own, and CPUs that count at the same time do not write to one
/// cache line.
///
/// # Invariants
///
/// `raw` is a `struct memfile_counts` and `early` the `N` values behind it. Its `cpus` is null or
/// was made by `memfile_spread_counts()` for `N` counts, and does not change any more then.
#[repr(C)]
pub(crate) struct Counts<const N: usize> {
    raw: Opaque<bindings::memfile_counts>,
    early: [Atomic<i64>; N],
}

// SAFETY: Any task may free the counts.
unsafe impl<const N: usize> Send for Counts<N> {}
// SAFETY: Whoever counts changes a value in one instruction; C sets the pointer to those of the CPUs
// once, and reads it as one.
unsafe impl<const N: usize> Sync for Counts<N> {}

impl<const N: usize> Counts<N> {
    const ADJACENT: () = assert!(
        offset_of!(Self, early) == size_of::<bindings::memfile_counts>(),
        "C has the array elsewhere"
    );

    /// All of them 0.
    pub(crate) fn new() -> Self {
        let () = Self::ADJACENT;
        // INVARIANT: The array is there, as asserted above, and `cpus` is null.
        Self {
            raw: Opaque::new(bindings::memfile_counts::default()),
            early: [const { Atomic::new(0) }; N],
        }
    }

    /// Derived from all of `self`, because C also writes to the array.
    fn as_ptr(&self) -> *mut bindings::memfile_counts {
        core::ptr::from_ref(self).cast_mut().cast()
    }

    /// From now on each CPU has its own, unless there is no memory for that; only the first call
    /// tries. Charged to the memory cgroup of that task. Sleeps.
    #[inline(always)] // It runs at each fault, and has work at the first one.
    pub(crate) fn spread(&self) {
        // SAFETY: The field is valid; the volatile read is READ_ONCE() of C.
        let cpus = unsafe { (&raw const (*self.as_ptr()).cpus).read_volatile() };
        if cpus.is_null() {
            // SAFETY: Valid by the type invariant; the caller may sleep.
            unsafe { bindings::memfile_spread_counts(self.as_ptr(), N) };
        }
    }

    /// Adds `n` to the count `which`; nothing if there is none. Any context.
    pub(crate) fn add(&self, which: usize, n: i64) {
        if which < N {
            // SAFETY: By the type invariant there are `N` counts.
            unsafe { bindings::memfile_add_count(self.as_ptr(), which, n) };
        }
    }

    /// The count `which`, of all CPUs; 0 if there is none. It may include what other CPUs add
    /// meanwhile. Any context.
    pub(crate) fn sum(&self, which: usize) -> i64 {
        if which >= N {
            return 0;
        }
        // SAFETY: By the type invariant there are `N` counts.
        unsafe { bindings::memfile_sum_count(self.as_ptr(), which) }
    }
}

impl<const N: usize> Drop for Counts<N> {
    fn drop(&mut self) {
        // SAFETY: Valid by the type invariant, and nobody counts any more.
        unsafe { bindings::memfile_free_counts(self.as_ptr()) };
    }
}
