// SPDX-License-Identifier: GPL-2.0

//! Inodes of hugetlbfs.
//!
//! C header: [`include/linux/hugetlb.h`](srctree/include/linux/hugetlb.h)

use super::file::File;
use super::folio::{
    Locked,
    Migration, //
};
use super::inode::Inode;
use crate::bindings;
use core::ptr::NonNull;
use kernel::error::{
    code::*,
    from_err_ptr,
    to_result,
    Result, //
};

/// An inode of hugetlbfs.
///
/// # Invariants
///
/// The inode is one of hugetlbfs.
#[derive(Clone, Copy)]
pub(crate) struct HugetlbInode(Inode);

impl HugetlbInode {
    /// # Safety
    ///
    /// `inode` must be an inode of hugetlbfs that outlives the returned value and its copies.
    pub(crate) unsafe fn new(inode: NonNull<bindings::inode>) -> Self {
        // INVARIANT: By the safety requirements of this function.
        // SAFETY: As above.
        Self(unsafe { Inode::new(inode) })
    }

    /// The inode as the inodes of all stores are.
    pub(crate) fn inode(self) -> Inode {
        self.0
    }

    /// The order of its huge pages.
    pub(crate) fn order(self) -> u32 {
        // SAFETY: The inode is valid and of hugetlbfs by the type invariant.
        unsafe { bindings::memfile_hugetlb_order(self.0.as_ptr()) }
    }

    /// The folio with page `index` of `file`, which is one of this inode; taken from the pool and
    /// zeroed if there is none. Sleeps.
    ///
    /// Errors: `EINVAL` past the end, `ENOSPC` if the pool is empty or the cgroup may have no more,
    /// `ENOMEM`.
    pub(crate) fn folio(self, file: File, index: u64) -> Result<Locked> {
        file.expect_inode(self.0)?;
        // The pool does not know the size of the file.
        if index >= self.0.pages() {
            return Err(EINVAL);
        }
        // SAFETY: The file is valid by its type invariant, and one of hugetlbfs.
        // CAST: `pgoff_t` is as wide on 64 bits.
        let folio = unsafe { bindings::memfile_hugetlb_folio(file.as_ptr(), index as usize) };
        let folio = NonNull::new(from_err_ptr(folio)?).ok_or(ENOMEM)?;
        // SAFETY: It is locked, in the page cache, and comes with a reference for us.
        Ok(unsafe { Locked::from_raw(folio) })
    }

    /// Calls hugetlbfs' fallocate() on `file`, which is one of this inode. `offset` and `len` are
    /// bytes. Sleeps, takes the inode lock.
    pub(crate) fn fallocate(self, file: File, mode: i32, offset: i64, len: i64) -> Result {
        file.expect_inode(self.0)?;
        // SAFETY: The file is valid by its type invariant, and one of hugetlbfs.
        let err = unsafe { bindings::memfile_hugetlb_fallocate(file.as_ptr(), mode, offset, len) };
        // CAST: An errno.
        to_result(err as i32)
    }

    /// Moves a folio by hugetlbfs' function. Sleeps.
    pub(crate) fn migrate(self, migration: &Migration) -> Result {
        // SAFETY: The function wants a folio of hugetlbfs; the store has no other.
        unsafe { migration.by(bindings::memfile_hugetlb_migrate_folio) }
    }
}
