// SPDX-License-Identifier: GPL-2.0

//! Folios of the page cache, and pages from stores of other modules.
//!
//! C headers: [`include/linux/pagemap.h`](srctree/include/linux/pagemap.h),
//! [`include/linux/migrate.h`](srctree/include/linux/migrate.h)

use crate::bindings;
use crate::policy::flags::Flags;
use crate::policy::range::Range;
use core::mem::{
    ManuallyDrop,
    MaybeUninit, //
};
use core::ptr::NonNull;
use kernel::error::{
    to_result,
    Result, //
};

/// A page as a consumer gets it.
pub(crate) use crate::bindings::memfile_pfn as Pfn;

/// Which page of a folio has a memory error.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Poison {
    /// Others than the page in question.
    Neighbour,
    /// The page, and perhaps others.
    Page,
}

/// A page that a store has found, with what is known of it.
///
/// # Invariants
///
/// `pfn` is about a page of `owner`, which has the reference that goes with it.
pub(crate) struct Looked<P> {
    owner: P,
    pfn: Pfn,
    poison: bindings::memfile_poison,
}

impl<P> Looked<P> {
    /// `owner`, with what `look` says of one of its pages, and writes to its last argument.
    ///
    /// # Safety
    ///
    /// `look` must write all of it, about a page of `owner`.
    unsafe fn at(owner: P, look: impl FnOnce(&P, *mut Pfn) -> bindings::memfile_poison) -> Self {
        let mut pfn = MaybeUninit::uninit();
        let poison = look(&owner, pfn.as_mut_ptr());
        // SAFETY: By the safety requirements of this function.
        let pfn = unsafe { pfn.assume_init() };
        // INVARIANT: As above.
        Self { owner, pfn, poison }
    }

    /// What it belongs to.
    #[cfg(CONFIG_KUNIT = "y")]
    pub(crate) fn owner(&self) -> &P {
        &self.owner
    }

    /// Does a page of the folio have a memory error?
    pub(crate) fn poison(&self) -> Option<Poison> {
        match self.poison {
            bindings::memfile_poison_MEMFILE_POISON_NONE => None,
            bindings::memfile_poison_MEMFILE_POISON_NEIGHBOUR => Some(Poison::Neighbour),
            _ => Some(Poison::Page),
        }
    }

    /// The order at which a consumer may map around the page: that of the folio, until
    /// [`Self::with_order`].
    pub(crate) fn order(&self) -> u32 {
        self.pfn.order
    }

    /// The same page for a consumer that may map it at `order`.
    pub(crate) fn with_order(mut self, order: u32) -> Self {
        self.pfn.order = order;
        self
    }
}

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

    /// Looks at page `index`, which must be a page of the folio.
    pub(crate) fn look(self, index: u64) -> Looked<Self> {
        // SAFETY: The folio is valid, locked and in the page cache by the type invariant; the index is
        // taken modulo its size. The function writes all of its last argument.
        unsafe {
            Looked::at(self, |this, pfn| {
                bindings::memfile_look_at_folio(this.as_ptr(), index as usize, pfn)
            })
        }
    }

    /// Takes the folio out of the kernel's direct map, until it leaves the file. It must be uptodate,
    /// and its file must neither let it migrate nor go to swap. Sleeps.
    ///
    /// Errors: `ENOMEM`.
    pub(crate) fn hide(&self) -> Result {
        // SAFETY: The folio is valid, locked and in the page cache by the type invariant.
        to_result(unsafe { bindings::memfile_hide_folio(self.as_ptr()) })
    }
}

impl Looked<Locked> {
    /// Unlocks the folio, and hands its reference on with the page, to a consumer. The folio is dirty
    /// then: it is the only copy.
    pub(crate) fn into_pfn(self) -> Pfn {
        let folio = ManuallyDrop::new(self.owner);
        // SAFETY: By its type invariant the lock is ours; the reference goes with the page.
        unsafe { bindings::memfile_hand_on(folio.as_ptr()) };
        self.pfn
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

    /// Looks at it.
    pub(crate) fn look(self) -> Looked<Self> {
        // SAFETY: The page is valid by the type invariant. The function writes all of its last
        // argument.
        unsafe {
            Looked::at(self, |this, pfn| {
                bindings::memfile_look_at_page(this.0.as_ptr(), pfn)
            })
        }
    }
}

impl Looked<Referenced> {
    /// Hands the reference on with the page, to a consumer.
    pub(crate) fn into_pfn(self) -> Pfn {
        let _ = ManuallyDrop::new(self.owner);
        self.pfn
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
