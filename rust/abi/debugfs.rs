// SPDX-License-Identifier: GPL-2.0

//! Files in debugfs that keep the module while they are open.
//!
//! Those of `kernel::debugfs` (7.3) do not: their operations have no owner, so the module can be
//! unloaded while a file is open, and closing the file then reads operations that are freed.

use crate::bindings;
use kernel::ffi::{
    c_int,
    c_void, //
};
use kernel::prelude::*;
use kernel::seq_file::SeqFile;

/// The content of a file.
pub(crate) trait Show: 'static {
    /// Its name.
    const NAME: &'static CStr;

    /// Writes the whole content. May sleep, and may run in several threads at once.
    fn show(seq: &SeqFile);
}

/// A folder in debugfs with its files, removed when it is dropped.
///
/// # Invariants
///
/// It is a folder that is ours, or an error pointer, with which debugfs does nothing.
pub(crate) struct Dir(*mut bindings::dentry);

// SAFETY: debugfs can be used from any thread.
unsafe impl Send for Dir {}
// SAFETY: And by several at once.
unsafe impl Sync for Dir {}

impl Dir {
    /// An empty folder at the top of debugfs. Sleeps. Without debugfs, this and [`Self::add`] do
    /// nothing.
    pub(crate) fn new(name: &CStr) -> Self {
        // INVARIANT: It was just made.
        // SAFETY: The name is a C string, of which debugfs makes a copy.
        Self(unsafe { bindings::memfile_debugfs_dir(name.as_char_ptr()) })
    }

    /// Adds the file of `T`. Sleeps. From here on it may be open, and then it keeps the module:
    /// later steps of the module's initialisation must not fail.
    pub(crate) fn add<T: Show>(&self) {
        // SAFETY: The folder is ours by the type invariant, and the name is a C string, of which
        // debugfs makes a copy. `show` stays as long as the module, which open files hold; `drop()`
        // leaves none that could be opened.
        unsafe { bindings::memfile_debugfs_file(self.0, T::NAME.as_char_ptr(), Some(show::<T>)) };
    }
}

impl Drop for Dir {
    /// Sleeps.
    fn drop(&mut self) {
        // SAFETY: By the type invariant, and this is the only time.
        unsafe { bindings::memfile_debugfs_remove(self.0) };
    }
}

/// # Safety
///
/// For C: `m` must be valid, and used by nobody else for the duration of the call.
unsafe extern "C" fn show<T: Show>(m: *mut bindings::seq_file, _unused: *mut c_void) -> c_int {
    // SAFETY: By the safety requirements of this function.
    T::show(unsafe { SeqFile::from_raw(m) });
    0
}
