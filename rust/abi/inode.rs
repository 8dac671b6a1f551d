// SPDX-License-Identifier: GPL-2.0

//! The inode under a node, and open files of it.
//!
//! C header: [`include/linux/fs.h`](srctree/include/linux/fs.h)

use super::folio::Given;
use super::notifier::Notifier;
use super::store::Store;
use crate::bindings;
use crate::policy::flags::Flags;
use crate::policy::range::PAGE_SHIFT;
use core::ptr::NonNull;
use kernel::error::{
    code::*,
    to_result,
    Result, //
};

/// The inode that a node belongs to.
///
/// # Invariants
///
/// `raw` points to an inode of `store`, or of shmem if there is none, that outlives `self`: the
/// node owns the value, and the kernel destroys the node before it frees the inode.
pub(crate) struct Inode {
    raw: NonNull<bindings::inode>,
    store: Option<Store>,
}

// SAFETY: All methods may be called from any thread.
unsafe impl Send for Inode {}
// SAFETY: All methods may be called from several threads at once.
unsafe impl Sync for Inode {}

impl Inode {
    /// # Safety
    ///
    /// `inode` must be a shmem inode that outlives the returned value.
    pub(crate) unsafe fn new(inode: NonNull<bindings::inode>) -> Self {
        // INVARIANT: By the safety requirements of this function.
        Self {
            raw: inode,
            store: None,
        }
    }

    /// # Safety
    ///
    /// `inode` must be one of `store` that outlives the returned value.
    pub(super) unsafe fn of_store(inode: NonNull<bindings::inode>, store: Store) -> Self {
        // INVARIANT: By the safety requirements of this function.
        Self {
            raw: inode,
            store: Some(store),
        }
    }

    pub(super) fn as_ptr(&self) -> *mut bindings::inode {
        self.raw.as_ptr()
    }

    /// The page at `index` of a file that is not shmem's. Sleeps.
    pub(crate) fn page_of_store(&self, index: u64) -> Result<Given> {
        // SAFETY: The inode is valid and of the store by the type invariant.
        unsafe { self.store.ok_or(EINVAL)?.get_page(self.as_ptr(), index) }
    }

    /// Its number, by which users know it.
    pub(crate) fn number(&self) -> u64 {
        // SAFETY: The inode is valid by the type invariant; the number does not change.
        unsafe { (*self.as_ptr()).i_ino }
    }

    /// Size in bytes. Changes once at most, from 0.
    pub(crate) fn size(&self) -> u64 {
        // SAFETY: The inode is valid by the type invariant.
        let size = unsafe { bindings::memfile_i_size(self.as_ptr()) };
        u64::try_from(size).unwrap_or(0)
    }

    /// Size in pages.
    pub(crate) fn pages(&self) -> u64 {
        self.size() >> PAGE_SHIFT
    }

    /// How many pages are in memory.
    pub(crate) fn resident(&self) -> usize {
        // SAFETY: The inode is valid by the type invariant.
        unsafe { bindings::memfile_nrpages(self.as_ptr()) }
    }

    /// Does it have pages, in memory or in swap?
    pub(crate) fn has_pages(&self) -> bool {
        // SAFETY: The inode is valid by the type invariant.
        unsafe { bindings::memfile_has_pages(self.as_ptr()) }
    }

    /// Tells the memory management what it may do with the pages. Does not sleep; the caller
    /// serialises.
    pub(crate) fn apply(&self, flags: Flags) {
        // SAFETY: The inode is valid by the type invariant.
        unsafe { bindings::memfile_set_migratable(self.as_ptr(), !flags.unmovable()) };
        // SAFETY: As above.
        unsafe { bindings::memfile_set_evictable(self.as_ptr(), !flags.unreclaimable()) };
    }

    /// Do new pages come from areas for movable memory? Does not sleep; the caller serialises.
    pub(crate) fn allocate_movable(&self, movable: bool) {
        // SAFETY: The inode is valid by the type invariant.
        unsafe { bindings::memfile_set_gfp_movable(self.as_ptr(), movable) };
    }

    /// Migrates the pages out of areas for movable memory. Sleeps, allocates, takes folio locks.
    ///
    /// Errors: `ENOMEM`, `EBUSY` if somebody else holds a page.
    pub(crate) fn leave_movable_areas(&self) -> Result {
        // SAFETY: The inode is valid by the type invariant.
        to_result(unsafe { bindings::memfile_leave_movable_areas(self.as_ptr()) })
    }
}

/// An open memfile, for the duration of a call.
///
/// # Invariants
///
/// `raw` points to a `struct file` to which the caller of the current operation holds a reference.
/// `node` is what it keeps. If `shmem`, it was made with `MFD_INACCESSIBLE`, else by another store.
#[derive(Clone, Copy)]
pub(crate) struct File {
    raw: NonNull<bindings::file>,
    node: NonNull<bindings::memfile_node>,
    shmem: bool,
}

impl File {
    /// # Safety
    ///
    /// `file` must be valid, and stay so as long as the returned value is used.
    ///
    /// Returns [`None`] if it is not a memfile of shmem.
    pub(super) unsafe fn from_raw(file: NonNull<bindings::file>) -> Option<Self> {
        // SAFETY: The caller says that `file` is valid.
        let node = unsafe { bindings::memfile_node(file.as_ptr()) };
        // INVARIANT: It has a node, and is valid by the safety requirements.
        NonNull::new(node).map(|node| Self {
            raw: file,
            node,
            shmem: true,
        })
    }

    /// # Safety
    ///
    /// `file` must be valid and keep `node`, and stay so as long as the returned value is used.
    pub(super) unsafe fn of_store(
        file: NonNull<bindings::file>,
        node: NonNull<bindings::memfile_node>,
    ) -> Self {
        // INVARIANT: By the safety requirements of this function.
        Self {
            raw: file,
            node,
            shmem: false,
        }
    }

    fn as_ptr(self) -> *mut bindings::file {
        self.raw.as_ptr()
    }

    pub(super) fn node_ptr(self) -> *mut bindings::memfile_node {
        self.node.as_ptr()
    }

    /// Is it shmem's?
    pub(super) fn shmem(self) -> bool {
        self.shmem
    }

    /// Is it open for writing?
    pub(crate) fn writable(self) -> bool {
        // SAFETY: The file is valid by the type invariant.
        unsafe { bindings::memfile_writable(self.as_ptr()) }
    }

    /// What shmem does for fallocate(). `offset` and `len` are bytes. Sleeps, takes the inode lock.
    pub(crate) fn fallocate(self, mode: i32, offset: i64, len: i64) -> Result {
        if !self.shmem {
            return Err(EOPNOTSUPP);
        }
        // SAFETY: The file is valid by the type invariant, and a shmem file.
        let err = unsafe { bindings::shmem_fallocate(self.as_ptr(), mode, offset, len) };
        // CAST: An errno.
        to_result(err as i32)
    }

    /// Holds the file open for `notifier`, until [`Notifier::release_file`].
    pub(crate) fn hold_for(self, notifier: Notifier) {
        // SAFETY: The file is valid by the type invariant.
        unsafe { bindings::memfile_get_file(self.as_ptr()) };
        notifier.set_file(self.as_ptr());
    }
}
