// SPDX-License-Identifier: GPL-2.0

//! The inode of a node, of any store.
//!
//! C header: [`include/linux/fs.h`](srctree/include/linux/fs.h)

use crate::bindings;
use crate::policy::flags::Flags;
use crate::policy::range::{
    Range,
    PAGE_SHIFT, //
};
use core::ptr::NonNull;
use kernel::error::{
    to_result,
    Result, //
};

/// The inode that a node belongs to.
///
/// # Invariants
///
/// Points to an inode that outlives the value: only the inode's node has one, and the kernel
/// destroys the node before it frees the inode.
#[derive(Clone, Copy)]
pub(crate) struct Inode(NonNull<bindings::inode>);

// SAFETY: All methods may be called from any thread.
unsafe impl Send for Inode {}
// SAFETY: All methods may be called from several threads at once.
unsafe impl Sync for Inode {}

impl Inode {
    /// # Safety
    ///
    /// `inode` must be valid, and outlive the returned value and its copies.
    pub(super) unsafe fn new(inode: NonNull<bindings::inode>) -> Self {
        // INVARIANT: By the safety requirements of this function.
        Self(inode)
    }

    pub(super) fn as_ptr(self) -> *mut bindings::inode {
        self.0.as_ptr()
    }

    /// Is the flag of its mapping set? Others may change it meanwhile.
    fn mapping_flag(self, bit: bindings::mapping_flags) -> bool {
        // SAFETY: The inode is valid by the type invariant, and so is its mapping. Once an inode is set
        // up, only atomic operations write to the flags.
        //
        // This `read_volatile` is intended to correspond to a READ_ONCE call.
        //
        // FIXME(read_once): Replace with `read_once` when available on the Rust side.
        let flags = unsafe { (&raw const (*(*self.as_ptr()).i_mapping).flags).read_volatile() };
        flags & 1 << bit != 0
    }

    /// Its number, which users see.
    pub(crate) fn number(self) -> u64 {
        // SAFETY: The inode is valid by the type invariant; the number does not change.
        unsafe { (*self.as_ptr()).i_ino }
    }

    /// Size in bytes. Changes once at most, from 0.
    pub(crate) fn size(self) -> u64 {
        // SAFETY: The inode is valid by the type invariant.
        let size = unsafe { bindings::memfile_i_size(self.as_ptr()) };
        u64::try_from(size).unwrap_or(0)
    }

    /// Size in pages.
    pub(crate) fn pages(self) -> u64 {
        self.size() >> PAGE_SHIFT
    }

    /// How many pages are in memory.
    pub(crate) fn resident(self) -> usize {
        // SAFETY: The inode is valid by the type invariant.
        unsafe { bindings::memfile_nrpages(self.as_ptr()) }
    }

    /// Does it have pages, in memory or in swap?
    pub(crate) fn has_pages(self) -> bool {
        // SAFETY: The inode is valid by the type invariant.
        unsafe { bindings::memfile_has_pages(self.as_ptr()) }
    }

    /// Tells the memory management whether it may migrate and evict the pages of the page cache, and
    /// whether they are to leave the kernel's direct map. Does not sleep; the caller serialises.
    pub(crate) fn set_flags(self, flags: Flags) {
        // SAFETY: The inode is valid by the type invariant.
        unsafe { bindings::memfile_set_migratable(self.as_ptr(), !flags.unmovable()) };
        // SAFETY: As above.
        unsafe { bindings::memfile_set_evictable(self.as_ptr(), !flags.unreclaimable()) };
        // SAFETY: As above.
        unsafe { bindings::memfile_set_hiding(self.as_ptr(), flags.kernel_inaccessible()) };
    }

    /// Are pages of the page cache to leave the kernel's direct map? As [`Self::set_flags`] has it.
    /// It does not change as long as a consumer is bound that has asked for it.
    pub(crate) fn hiding(self) -> bool {
        self.mapping_flag(bindings::mapping_flags_AS_HIDE)
    }

    /// Takes those of `pages` that are in the page cache out of the kernel's direct map, as long as
    /// [`Self::hiding`] says so. Sleeps, takes folio locks.
    ///
    /// Errors: `ENOMEM`, `EINTR` if a fatal signal came; some are out then.
    pub(crate) fn hide(self, pages: Range) -> Result {
        // SAFETY: The inode is valid by the type invariant.
        to_result(unsafe {
            bindings::memfile_hide_range(
                self.as_ptr(),
                // CAST: `pgoff_t` is as wide on 64 bits.
                pages.start() as usize,
                // CAST: As above.
                pages.end() as usize,
            )
        })
    }

    /// May the pages of the page cache migrate? As [`Self::set_flags`] has it.
    pub(crate) fn migratable(self) -> bool {
        !self.mapping_flag(bindings::mapping_flags_AS_UNMOVABLE)
    }

    /// Sets whether new pages of the page cache come from areas for movable memory. Does not sleep;
    /// the caller serialises.
    pub(crate) fn allocate_movable(self, movable: bool) {
        // SAFETY: The inode is valid by the type invariant.
        unsafe { bindings::memfile_set_gfp_movable(self.as_ptr(), movable) };
    }

    /// Migrates the pages of the page cache out of areas for movable memory. Sleeps, allocates,
    /// takes folio locks.
    ///
    /// Errors: `ENOMEM`, `EBUSY` if a page has another user.
    pub(crate) fn leave_movable_areas(self) -> Result {
        // SAFETY: The inode is valid by the type invariant.
        to_result(unsafe { bindings::memfile_leave_movable_areas(self.as_ptr()) })
    }
}
