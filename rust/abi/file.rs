// SPDX-License-Identifier: GPL-2.0

//! Open files, for the duration of a call.
//!
//! C header: [`include/linux/fs.h`](srctree/include/linux/fs.h)

use super::inode::Inode;
use super::notifier::Notifier;
use crate::bindings;
use core::ptr::NonNull;
use kernel::error::{
    code::*,
    Result, //
};

/// An open file, which may or may not be a memfile.
///
/// # Invariants
///
/// Points to a `struct file` to which the caller of the current operation holds a reference.
#[derive(Clone, Copy)]
pub(crate) struct AnyFile(NonNull<bindings::file>);

impl AnyFile {
    /// # Safety
    ///
    /// `file` must be null, or valid as long as the returned value is used.
    ///
    /// Returns [`None`] if it is null.
    pub(crate) unsafe fn from_raw(file: *mut bindings::file) -> Option<Self> {
        // INVARIANT: By the safety requirements of this function.
        NonNull::new(file).map(Self)
    }

    pub(super) fn as_ptr(self) -> *mut bindings::file {
        self.0.as_ptr()
    }

    /// As a memfile of a store in the kernel, if it is one.
    pub(crate) fn in_kernel_store(self) -> Option<File> {
        // SAFETY: The file is valid by the type invariant.
        let node = NonNull::new(unsafe { bindings::memfile_node(self.as_ptr()) })?;
        // SAFETY: The file keeps its inode, which keeps the node.
        Some(unsafe { File::new(self, node) })
    }
}

/// An open memfile.
///
/// # Invariants
///
/// `raw` is as [`AnyFile`] says. `node` is that of its inode, which the file keeps.
#[derive(Clone, Copy)]
pub(crate) struct File {
    raw: AnyFile,
    node: NonNull<bindings::memfile_node>,
}

impl File {
    /// # Safety
    ///
    /// `node` must be that of the inode of `file`, and `file` must keep it.
    pub(crate) unsafe fn new(file: AnyFile, node: NonNull<bindings::memfile_node>) -> Self {
        // INVARIANT: By the safety requirements of this function.
        Self { raw: file, node }
    }

    /// The file that `notifier` holds.
    ///
    /// # Safety
    ///
    /// `notifier` must be registered as long as the returned value is used.
    pub(crate) unsafe fn bound_by(notifier: Notifier) -> Option<Self> {
        // SAFETY: The notifier holds the file.
        let raw = unsafe { AnyFile::from_raw(notifier.file_ptr()) }?;
        let node = NonNull::new(notifier.node_ptr())?;
        // INVARIANT: Registration has set both, by the file.
        Some(Self { raw, node })
    }

    pub(super) fn as_ptr(self) -> *mut bindings::file {
        self.raw.as_ptr()
    }

    pub(crate) fn node_ptr(self) -> *mut bindings::memfile_node {
        self.node.as_ptr()
    }

    /// `EINVAL` if the file is not one of `inode`.
    pub(super) fn expect_inode(self, inode: Inode) -> Result {
        // SAFETY: The file is valid by the type invariant, and its inode does not change.
        let own = unsafe { (*self.as_ptr()).f_inode };
        if own == inode.as_ptr() {
            Ok(())
        } else {
            Err(EINVAL)
        }
    }

    /// Is it open for writing?
    pub(crate) fn writable(self) -> bool {
        // SAFETY: The file is valid by the type invariant.
        unsafe { bindings::memfile_writable(self.as_ptr()) }
    }

    /// Holds the file open for `notifier`, until [`Notifier::release_file`].
    pub(crate) fn hold_for(self, notifier: Notifier) {
        // SAFETY: The file is valid by the type invariant.
        unsafe { bindings::memfile_get_file(self.as_ptr()) };
        notifier.set_file(self.as_ptr());
    }
}
