// SPDX-License-Identifier: GPL-2.0

//! The tracepoints of `trace.h`. A disabled one costs a call and a jump.

use super::inode::Inode;
use crate::bindings;
use crate::policy::range::Range;

macro_rules! range_events {
    ($($(#[$doc:meta])* $name:ident = $call:ident,)*) => {
        $(
            $(#[$doc])*
            pub(crate) fn $name(inode: &Inode, pages: Range) {
                // SAFETY: The inode is valid by its type invariant.
                // CAST: Page offsets are as wide on 64 bits.
                unsafe {
                    bindings::$call(inode.as_ptr(), pages.start() as usize, pages.end() as usize)
                };
            }
        )*
    };
}

range_events! {
    /// A notifier was registered for these pages.
    bind = memfile_trace_bind,
    /// It was unregistered from these pages.
    unbind = memfile_trace_unbind,
    /// Consumers are about to lose these pages.
    invalidate_start = memfile_trace_invalidate_start,
    /// Consumers may map these pages again.
    invalidate_end = memfile_trace_invalidate_end,
    /// A folio with these pages has moved.
    migrate = memfile_trace_migrate,
    /// A folio with these pages goes to swap.
    swap_out = memfile_trace_swap_out,
    /// A folio with these pages has a memory error.
    poison = memfile_trace_poison,
}

/// A consumer gets file page `index`.
pub(crate) fn get_pfn(inode: &Inode, index: u64, pfn: &bindings::memfile_pfn) {
    // SAFETY: The inode is valid by its type invariant.
    // CAST: Page offsets are as wide on 64 bits.
    unsafe { bindings::memfile_trace_get_pfn(inode.as_ptr(), index as usize, pfn) };
}

/// A consumer gives its reference back.
pub(crate) fn put_pfn(pfn: &bindings::memfile_pfn) {
    // SAFETY: Reads its argument only.
    unsafe { bindings::memfile_trace_put_pfn(pfn) };
}
