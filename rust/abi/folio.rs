// SPDX-License-Identifier: GPL-2.0

//! Folios of the page cache, and pages from stores of other modules.
//!
//! C headers: [`include/linux/pagemap.h`](srctree/include/linux/pagemap.h),
//! [`include/linux/migrate.h`](srctree/include/linux/migrate.h)

use crate::bindings;
use crate::policy::flags::Flags;
use crate::policy::range::Range;
use core::mem::ManuallyDrop;
use core::ptr::NonNull;
use kernel::error::{
    to_result,
    Result, //
};

/// A page as a consumer gets it.
pub(crate) use crate::bindings::memfile_pfn as Pfn;

/// The result of a look-up of a page.
pub(crate) enum Found<T> {
    /// The page.
    There(T),
    /// A folio on its way from or to swap: no consumer may have it yet.
    Coming(Coming),
}

#[cfg(CONFIG_KUNIT = "y")]
impl<T> Found<T> {
    /// The page, if it is there.
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
    /// # Safety
    ///
    /// `folio` must be valid, and the caller hands a reference to it over.
    pub(super) unsafe fn from_raw(folio: NonNull<bindings::folio>) -> Self {
        // INVARIANT: By the safety requirements.
        Self(folio)
    }

    /// Hands the reference on to a consumer that may wait with `memfile_wait_pfn()`.
    pub(crate) fn into_pfn(self) -> Pfn {
        let folio = ManuallyDrop::new(self).0.as_ptr();
        Pfn {
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
    /// # Safety
    ///
    /// `folio` must be locked and in the page cache, and the caller hands the lock and a reference
    /// over.
    pub(super) unsafe fn from_raw(folio: NonNull<bindings::folio>) -> Self {
        // INVARIANT: By the safety requirements.
        Self(folio)
    }

    /// The folio that a callback got from C, which keeps the lock and the reference.
    ///
    /// # Safety
    ///
    /// `folio` must be valid, locked and in the page cache, as long as the returned value is used.
    pub(crate) unsafe fn borrow(folio: NonNull<bindings::folio>) -> ManuallyDrop<Self> {
        // INVARIANT: The caller owns both, and `ManuallyDrop` leaves them to it.
        ManuallyDrop::new(Self(folio))
    }

    fn as_ptr(&self) -> *mut bindings::folio {
        self.0.as_ptr()
    }

    /// The file pages of the folio.
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

    /// Does page `index` have a memory error? It must be a page of the folio.
    pub(crate) fn page_poisoned(&self, index: u64) -> bool {
        // SAFETY: The page is valid because the folio is.
        unsafe { bindings::memfile_page_poisoned(self.page(index)) }
    }

    /// Marks the folio as the only copy. Without this, reclaim drops it as if swap had a copy.
    pub(crate) fn mark_dirty(&self) {
        // SAFETY: The folio is valid by the type invariant.
        unsafe { bindings::folio_mark_dirty(self.as_ptr()) };
    }

    /// Takes the folio out of the kernel's direct map, until it leaves the file. It must be uptodate,
    /// and its file must neither let it migrate nor go to swap. Sleeps.
    ///
    /// Errors: `ENOMEM`.
    pub(crate) fn hide(&self) -> Result {
        // SAFETY: The folio is valid, locked and in the page cache by the type invariant.
        to_result(unsafe { bindings::memfile_hide_folio(self.as_ptr()) })
    }

    fn page(&self, index: u64) -> *mut bindings::page {
        // SAFETY: The folio is valid by the type invariant; the index is taken modulo its size.
        unsafe { bindings::memfile_folio_page(self.as_ptr(), index as usize) }
    }

    /// Unlocks the folio, and hands its reference on with page `index` to a consumer that may map
    /// it at `order`.
    pub(crate) fn into_pfn(self, index: u64, order: u32) -> Pfn {
        let page = self.page(index);
        let this = ManuallyDrop::new(self);
        // SAFETY: The page is valid because the folio is.
        let pfn = unsafe { bindings::memfile_page_pfn(page) };
        // SAFETY: By the type invariant the lock is ours; the reference goes with the page.
        unsafe { bindings::folio_unlock(this.as_ptr()) };
        Pfn { pfn, page, order }
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

/// Can the machine keep pages of the page cache out of the kernel's direct map?
pub(crate) fn can_hide() -> bool {
    // SAFETY: The function may be called at any time.
    let flags = unsafe { bindings::memfile_supported_flags() };
    flags & Flags::KERNEL_INACCESSIBLE != 0
}

/// How many pages of all files are out of the kernel's direct map.
pub(crate) fn hidden_pages() -> usize {
    // SAFETY: The function may be called at any time.
    unsafe { bindings::memfile_hidden_pages() }
}

/// A page that is not locked, from the store of another module.
///
/// Dropping it gives up the reference.
///
/// # Invariants
///
/// `self` owns a reference to the page.
pub(crate) struct Referenced(NonNull<bindings::page>);

impl Referenced {
    /// # Safety
    ///
    /// `page` must be valid, and the caller hands a reference to it over.
    pub(super) unsafe fn from_raw(page: NonNull<bindings::page>) -> Self {
        // INVARIANT: By the safety requirements.
        Self(page)
    }

    fn folio(&self) -> *mut bindings::folio {
        // SAFETY: The page is valid by the type invariant.
        unsafe { bindings::memfile_page_folio(self.0.as_ptr()) }
    }

    /// The order of its folio.
    pub(crate) fn order(&self) -> u32 {
        // SAFETY: The folio is valid because the page is.
        unsafe { bindings::memfile_folio_order(self.folio()) }
    }

    /// Does any page of its folio have a memory error?
    pub(crate) fn poisoned(&self) -> bool {
        // SAFETY: The folio is valid because the page is.
        unsafe { bindings::memfile_folio_poisoned(self.folio()) }
    }

    /// Does it have a memory error itself?
    pub(crate) fn page_poisoned(&self) -> bool {
        // SAFETY: The page is valid by the type invariant.
        unsafe { bindings::memfile_page_poisoned(self.0.as_ptr()) }
    }

    /// Hands the reference on to a consumer that may map the page at `order`.
    pub(crate) fn into_pfn(self, order: u32) -> Pfn {
        let page = ManuallyDrop::new(self).0.as_ptr();
        // SAFETY: The page is valid by the type invariant.
        let pfn = unsafe { bindings::memfile_page_pfn(page) };
        Pfn { pfn, page, order }
    }
}

impl Drop for Referenced {
    fn drop(&mut self) {
        // SAFETY: By the type invariant the reference is ours.
        unsafe { bindings::memfile_put_page(self.0.as_ptr()) };
    }
}

/// The migration of a folio, for the duration of a call.
///
/// # Invariants
///
/// `dst` and `src` are locked, and `src` is in the page cache of the file whose mapping is
/// `mapping`, or wherever else the file's store has its folios.
pub(crate) struct Migration {
    mapping: NonNull<bindings::address_space>,
    dst: NonNull<bindings::folio>,
    src: NonNull<bindings::folio>,
    mode: bindings::migrate_mode,
}

/// A function that moves a folio in C: `address_space_operations.migrate_folio`.
pub(super) type MigrateFolio = unsafe extern "C" fn(
    *mut bindings::address_space,
    *mut bindings::folio,
    *mut bindings::folio,
    bindings::migrate_mode,
) -> kernel::ffi::c_int;

impl Migration {
    /// # Safety
    ///
    /// As the type invariant says, as long as the returned value is used; or any may be null.
    ///
    /// Returns [`None`] if one is null.
    pub(crate) unsafe fn from_raw(
        mapping: *mut bindings::address_space,
        dst: *mut bindings::folio,
        src: *mut bindings::folio,
        mode: bindings::migrate_mode,
    ) -> Option<Self> {
        // INVARIANT: By the safety requirements.
        Some(Self {
            mapping: NonNull::new(mapping)?,
            dst: NonNull::new(dst)?,
            src: NonNull::new(src)?,
            mode,
        })
    }

    /// Moves the folio by the function that most file systems use. Sleeps.
    pub(crate) fn in_page_cache(&self) -> Result {
        // SAFETY: `migrate_folio()` wants what the type invariant says.
        unsafe { self.by(bindings::migrate_folio) }
    }

    /// Moves the folio with a function of its store. Sleeps.
    ///
    /// # Safety
    ///
    /// `migrate` must want no more than what the type invariant says.
    pub(super) unsafe fn by(&self, migrate: MigrateFolio) -> Result {
        let (mapping, dst, src) = (self.mapping.as_ptr(), self.dst.as_ptr(), self.src.as_ptr());
        // SAFETY: By the safety requirements of this function.
        to_result(unsafe { migrate(mapping, dst, src, self.mode) })
    }
}
