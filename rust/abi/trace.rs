// SPDX-License-Identifier: GPL-2.0

//! The tracepoints of `trace.h`. A disabled one costs an instruction that does nothing, as in C; on
//! a kernel without `CONFIG_JUMP_LABEL` a call.

use super::inode::Inode;
use crate::bindings;
use crate::policy::range::Range;

/// Is this tracepoint enabled? Follows `kernel::tracepoint::declare_trace`, which knows only
/// tracepoints of the kernel itself.
macro_rules! enabled {
    ($point:ident) => {{
        #[cfg(CONFIG_TRACEPOINTS)]
        {
            #[allow(improper_ctypes)] // The kernel crate says the same of its own.
            unsafe extern "C" {
                static mut $point: kernel::bindings::tracepoint;
            }
            // SAFETY: `shim.c` defines it. The static key of a tracepoint may always be asked; only its
            // address is taken here.
            unsafe {
                kernel::jump_label::static_branch_unlikely!(
                    $point,
                    kernel::bindings::tracepoint,
                    key
                )
            }
        }
        #[cfg(not(CONFIG_TRACEPOINTS))]
        false
    }};
}

macro_rules! range_events {
    ($($(#[$doc:meta])* $name:ident = $point:ident, $call:ident;)*) => {
        $(
            $(#[$doc])*
            #[inline(always)]
            pub(crate) fn $name(inode: &Inode, pages: Range) {
                if enabled!($point) {
                    // SAFETY: The inode is valid by its type invariant.
                    // CAST: Page offsets are as wide on 64 bits.
                    unsafe {
                        bindings::$call(
                            inode.as_ptr(),
                            pages.start() as usize,
                            pages.end() as usize,
                        )
                    };
                }
            }
        )*
    };
}

range_events! {
    /// A notifier was registered for these pages.
    bind = __tracepoint_memfile_bind, memfile_trace_bind;
    /// It was unregistered from these pages.
    unbind = __tracepoint_memfile_unbind, memfile_trace_unbind;
    /// Consumers are about to lose these pages.
    invalidate_start = __tracepoint_memfile_invalidate_start, memfile_trace_invalidate_start;
    /// Consumers may map these pages again.
    invalidate_end = __tracepoint_memfile_invalidate_end, memfile_trace_invalidate_end;
    /// A folio with these pages has moved.
    migrate = __tracepoint_memfile_migrate, memfile_trace_migrate;
    /// A folio with these pages goes to swap.
    swap_out = __tracepoint_memfile_swap_out, memfile_trace_swap_out;
    /// A folio with these pages has a memory error.
    poison = __tracepoint_memfile_poison, memfile_trace_poison;
}

/// A consumer gets file page `index`.
#[inline(always)]
pub(crate) fn get_pfn(inode: &Inode, index: u64, pfn: &bindings::memfile_pfn) {
    if enabled!(__tracepoint_memfile_get_pfn) {
        // SAFETY: The inode is valid by its type invariant.
        // CAST: Page offsets are as wide on 64 bits.
        unsafe { bindings::memfile_trace_get_pfn(inode.as_ptr(), index as usize, pfn) };
    }
}

/// A consumer gives its reference back.
#[inline(always)]
pub(crate) fn put_pfn(pfn: &bindings::memfile_pfn) {
    if enabled!(__tracepoint_memfile_put_pfn) {
        // SAFETY: Reads its argument only.
        unsafe { bindings::memfile_trace_put_pfn(pfn) };
    }
}
