// SPDX-License-Identifier: GPL-2.0

//! Folios of a memfile, and pages of other stores.
//!
//! C header: [`include/linux/pagemap.h`](srctree/include/linux/pagemap.h)

use super::inode::Inode;
use crate::bindings;
use crate::policy::range::Range;
use core::mem::ManuallyDrop;
use core::ptr::NonNull;
use kernel::error::{
    code::*,
    to_result,
    Result, //
};

/// What there is behind an index.
pub(crate) enum Found<T> {
    /// This.
    There(T),
    /// A folio on its way from or to swap: nobody may have it yet.
    Coming(Coming),
}

impl<T> Found<T> {
    /// Does `f` to what is there.
    pub(crate) fn map<R>(self, f: impl FnOnce(T) -> R) -> Found<R> {
        match self {
            Self::There(this) => Found::There(f(this)),
            Self::Coming(folio) => Found::Coming(folio),
        }
    }

    /// What is there, if it is.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn there(self) -> Option<T> {
        match self {
            Self::There(this) => Some(this),
            Self::Coming(_) => None,
        }
    }
}

/// A folio on its way from or to swap.
///
/// Dropping it gives up the reference.
///
/// # Invariants
///
/// `self` owns a reference to the folio.
pub(crate) struct Coming(NonNull<bindings::folio>);

impl Coming {
    /// Hands the reference on to a consumer that may wait with `memfile_wait_pfn()`.
    pub(super) fn into_pfn(self) -> bindings::memfile_pfn {
        let folio = ManuallyDrop::new(self).0.as_ptr();
        bindings::memfile_pfn {
            // SAFETY: The folio is valid by the type invariant.
            page: unsafe { bindings::memfile_folio_page(folio, 0) },
            ..Default::default()
        }
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the reference is ours.
        unsafe { bindings::memfile_put_folio(self.0.as_ptr()) };
    }
}

/// A folio that is locked and in the page cache of its file.
///
/// Dropping it unlocks the folio and gives up the reference.
///
/// # Invariants
///
/// `self` owns the folio's lock and a reference to it.
pub(crate) struct Locked(NonNull<bindings::folio>);

impl Locked {
    /// The folio with page `index`, allocated if there is none, or read back from swap. Zeroed and
    /// uptodate: `SGP_CACHE` clears what is new, and what was only reserved by fallocate(), but no
    /// page that is poisoned, and refuses what is past the end. Sleeps, but not until swap is read.
    ///
    /// Errors: `EINVAL` past the end, `ENOMEM`, `EIO` if swap lost it, `EHWPOISON` if a memory error
    /// hit it in the swap cache.
    pub(crate) fn get(inode: &Inode, index: u64) -> Result<Found<Self>> {
        let mut folio: *mut bindings::folio = core::ptr::null_mut();
        // SAFETY: The inode is valid by its type invariant, and `folio` may be written to.
        let result = to_result(unsafe {
            bindings::shmem_get_folio(
                inode.as_ptr(),
                // CAST: `pgoff_t` is as wide on 64 bits.
                index as usize,
                0,
                &mut folio,
                bindings::sgp_type_SGP_CACHE,
            )
        });
        match (result, NonNull::new(folio)) {
            // INVARIANT: `shmem_get_folio()` returns a locked folio with a reference for the caller.
            (Ok(()), Some(folio)) => Ok(Found::There(Self(folio))),
            (Ok(()), None) => Err(ENOMEM),
            // INVARIANT: Here it returns a folio that is not locked, with a reference.
            (Err(EAGAIN), Some(folio)) => Ok(Found::Coming(Coming(folio))),
            (Err(err), _) => Err(err),
        }
    }

    /// The folio that a callback got from C, which keeps the lock and the reference.
    ///
    /// # Safety
    ///
    /// `folio` must be valid, locked and in the page cache, as long as the returned value is used.
    pub(super) unsafe fn borrow(folio: NonNull<bindings::folio>) -> ManuallyDrop<Self> {
        // INVARIANT: The caller owns both, and `ManuallyDrop` leaves them to it.
        ManuallyDrop::new(Self(folio))
    }

    fn as_ptr(&self) -> *mut bindings::folio {
        self.0.as_ptr()
    }

    /// The file pages it holds.
    pub(crate) fn pages(&self) -> Option<Range> {
        // SAFETY: The folio is valid by the type invariant, and does not move while it is locked.
        let start = unsafe { bindings::memfile_folio_index(self.as_ptr()) } as u64;
        Range::new(start, start.checked_add(1 << self.order())?)
    }

    /// Its order.
    pub(crate) fn order(&self) -> u32 {
        // SAFETY: The folio is valid by the type invariant.
        unsafe { bindings::memfile_folio_order(self.as_ptr()) }
    }

    /// Does any of its pages have a memory error?
    pub(crate) fn poisoned(&self) -> bool {
        // SAFETY: The folio is valid by the type invariant.
        unsafe { bindings::memfile_folio_poisoned(self.as_ptr()) }
    }

    /// Has page `index` a memory error? It must be one of the folio's.
    pub(crate) fn page_poisoned(&self, index: u64) -> bool {
        // SAFETY: The page is valid because the folio is.
        unsafe { bindings::memfile_page_poisoned(self.page(index)) }
    }

    /// There is no clean copy of it anywhere. Without this, reclaim drops it as if there were.
    pub(crate) fn mark_dirty(&self) {
        // SAFETY: The folio is valid by the type invariant.
        unsafe { bindings::folio_mark_dirty(self.as_ptr()) };
    }

    fn page(&self, index: u64) -> *mut bindings::page {
        // SAFETY: The folio is valid by the type invariant; the index is taken modulo its size.
        unsafe { bindings::memfile_folio_page(self.as_ptr(), index as usize) }
    }

    /// Unlocks it, and hands its reference on with page `index` to a consumer that may map it at
    /// `order`.
    pub(crate) fn into_pfn(self, index: u64, order: u32) -> bindings::memfile_pfn {
        let page = self.page(index);
        let this = ManuallyDrop::new(self);
        // SAFETY: The page is valid because the folio is.
        let pfn = unsafe { bindings::memfile_page_pfn(page) };
        // SAFETY: By the type invariant the lock is ours; the reference goes with the page.
        unsafe { bindings::folio_unlock(this.as_ptr()) };
        bindings::memfile_pfn { pfn, page, order }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the lock is ours.
        unsafe { bindings::folio_unlock(self.as_ptr()) };
        // SAFETY: By the type invariant the reference is ours.
        unsafe { bindings::memfile_put_folio(self.as_ptr()) };
    }
}

/// A page that another store gave.
///
/// Dropping it gives up the reference.
///
/// # Invariants
///
/// `self` owns a reference to the page.
pub(crate) struct Given(NonNull<bindings::page>);

impl Given {
    /// # Safety
    ///
    /// `page` must be valid, and the caller hands a reference to it over.
    pub(super) unsafe fn from_raw(page: NonNull<bindings::page>) -> Self {
        // INVARIANT: By the safety requirements.
        Self(page)
    }

    /// Does it have a memory error?
    pub(crate) fn poisoned(&self) -> bool {
        // SAFETY: The page is valid by the type invariant.
        unsafe { bindings::memfile_page_poisoned(self.0.as_ptr()) }
    }

    /// The order of its folio; 0 if another page there has a memory error, which a huge mapping
    /// would give access to.
    pub(crate) fn order(&self) -> u32 {
        // SAFETY: The page is valid by the type invariant.
        let folio = unsafe { bindings::memfile_page_folio(self.0.as_ptr()) };
        // SAFETY: The folio is valid because the page is.
        match unsafe { bindings::memfile_folio_poisoned(folio) } {
            true => 0,
            // SAFETY: As above.
            false => unsafe { bindings::memfile_folio_order(folio) },
        }
    }

    /// Hands the reference on to a consumer that may map the page at `order`.
    pub(crate) fn into_pfn(self, order: u32) -> bindings::memfile_pfn {
        let page = ManuallyDrop::new(self).0.as_ptr();
        // SAFETY: The page is valid by the type invariant.
        let pfn = unsafe { bindings::memfile_page_pfn(page) };
        bindings::memfile_pfn { pfn, page, order }
    }
}

impl Drop for Given {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the reference is ours.
        unsafe { bindings::memfile_put_page(self.0.as_ptr()) };
    }
}
