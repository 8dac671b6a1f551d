// SPDX-License-Identifier: GPL-2.0

//! Inodes of shmem.
//!
//! C header: [`include/linux/shmem_fs.h`](srctree/include/linux/shmem_fs.h)

use super::file::File;
use super::folio::{
    Coming,
    Found,
    Locked, //
};
use super::inode::Inode;
use crate::bindings;
use core::ptr::NonNull;
use kernel::error::{
    code::*,
    to_result,
    Result, //
};

/// An inode of shmem.
///
/// # Invariants
///
/// The inode is one of shmem.
#[derive(Clone, Copy)]
pub(crate) struct ShmemInode(Inode);

impl ShmemInode {
    /// # Safety
    ///
    /// `inode` must be an inode of shmem that outlives the returned value and its copies.
    pub(crate) unsafe fn new(inode: NonNull<bindings::inode>) -> Self {
        // INVARIANT: By the safety requirements of this function.
        // SAFETY: As above.
        Self(unsafe { Inode::new(inode) })
    }

    /// The inode as the inodes of all stores are.
    pub(crate) fn inode(self) -> Inode {
        self.0
    }

    /// The folio with page `index`, allocated if there is none, or read back from swap. Zeroed and
    /// uptodate: `SGP_CACHE` clears new folios, and folios that fallocate() only reserved, but no
    /// page that is poisoned, and refuses an index past the end. Sleeps, but does not wait for a
    /// read from swap.
    ///
    /// Errors: `EINVAL` past the end, `ENOMEM`, `ENOSPC` at the commit limit, `EIO` if swap lost it,
    /// `EHWPOISON` if a memory error hit it in the swap cache.
    #[inline(always)]
    pub(crate) fn folio(self, index: u64) -> Result<Found<Locked>> {
        let mut folio: *mut bindings::folio = core::ptr::null_mut();
        // SAFETY: The inode is valid and of shmem by the type invariant, and `folio` may be written
        // to.
        let err = unsafe {
            bindings::shmem_get_folio(
                self.0.as_ptr(),
                // CAST: `pgoff_t` is as wide on 64 bits.
                index as usize,
                0,
                &mut folio,
                bindings::sgp_type_SGP_CACHE,
            )
        };
        let folio = NonNull::new(folio);
        if let (0, Some(folio)) = (err, folio) {
            // SAFETY: `shmem_get_folio()` returns a locked folio with a reference for us.
            return Ok(Found::There(unsafe { Locked::from_raw(folio) }));
        }
        match (to_result(err), folio) {
            (Ok(()), _) => Err(ENOMEM),
            (Err(EAGAIN), Some(folio)) => {
                // SAFETY: Here it returns a folio that is not locked, with a reference for us.
                Ok(Found::Coming(unsafe { Coming::from_raw(folio) }))
            }
            (Err(err), _) => Err(err),
        }
    }

    /// Calls shmem's fallocate() on `file`, which is one of this inode. `offset` and `len` are
    /// bytes. Sleeps, takes the inode lock.
    pub(crate) fn fallocate(self, file: File, mode: i32, offset: i64, len: i64) -> Result {
        file.expect_inode(self.0)?;
        // SAFETY: The file is valid by its type invariant, and one of shmem.
        let err = unsafe { bindings::shmem_fallocate(file.as_ptr(), mode, offset, len) };
        // CAST: An errno.
        to_result(err as i32)
    }
}
