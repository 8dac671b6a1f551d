// SPDX-License-Identifier: GPL-2.0

//! Stores of other modules, and their inodes.
//!
//! C header: `rust/store.h`, which documents the duties of a store and its guarantees.

use super::base::eopnotsupp;
use super::file::{
    AnyFile,
    File, //
};
use super::folio::{
    Migration, //
    Referenced,
};
use super::inode::Inode;
use super::lock::module_mutex;
use crate::bindings;
use crate::policy::flags::Flags;
use core::ptr::NonNull;
use kernel::error::{
    from_err_ptr,
    to_result, //
};
use kernel::prelude::*;
use kernel::rbtree::{
    RBTree,
    RBTreeNode, //
};

/// A store of another module.
///
/// # Invariants
///
/// Points to a `struct memfile_store` with all mandatory callbacks, which is not written to and
/// stays as long as it is registered and as long as it has files.
#[derive(Clone, Copy)]
pub(crate) struct ForeignStore(NonNull<bindings::memfile_store>);

// SAFETY: It is not written to, and its callbacks may be called from any thread.
unsafe impl Send for ForeignStore {}
// SAFETY: They may be called from several threads at once.
unsafe impl Sync for ForeignStore {}

impl ForeignStore {
    /// # Safety
    ///
    /// `store` must be null, or as the type invariant says but for missing callbacks.
    ///
    /// Returns [`None`] if it is null or mandatory callbacks are missing.
    pub(crate) unsafe fn from_raw(store: *const bindings::memfile_store) -> Option<Self> {
        let store = NonNull::new(store.cast_mut())?;
        // SAFETY: Valid by the safety requirements.
        let ops = unsafe { store.as_ref() };
        // INVARIANT: By the safety requirements, and the callbacks are there.
        (ops.lookup.is_some() && ops.get_page.is_some()).then_some(Self(store))
    }

    fn ops(&self) -> &bindings::memfile_store {
        // SAFETY: Valid and not written to by the type invariant.
        unsafe { self.0.as_ref() }
    }

    fn key(self) -> usize {
        self.0.as_ptr().addr()
    }

    /// Registers the store: its files may be bound from now on. Sleeps. `EBUSY` if it is registered
    /// already, `ENOMEM`.
    pub(crate) fn register(self) -> Result {
        let node = RBTreeNode::new(self.key(), self, GFP_KERNEL)?;
        let mut stores = STORES.lock();
        let stores = stores.0.get_or_insert_with(RBTree::new);
        if stores.get(&self.key()).is_some() {
            return Err(EBUSY);
        }
        stores.insert(node);
        Ok(())
    }

    /// Unregisters the store at `address`: it gets no new bindings. Sleeps. `EINVAL` if it is not
    /// registered.
    pub(crate) fn unregister(address: usize) -> Result {
        let mut stores = STORES.lock();
        let stores = stores.0.as_mut();
        let node = stores.and_then(|stores| stores.remove_node(&address));
        node.map(drop).ok_or(EINVAL)
    }

    /// `file` as a memfile of a registered store, if it is one. Sleeps.
    pub(crate) fn find(file: AnyFile) -> Option<File> {
        let stores = STORES.lock();
        let mut stores = stores.0.iter().flat_map(RBTree::values);
        stores.find_map(|store| {
            let lookup = store.ops().lookup?;
            // SAFETY: The file is valid by its type invariant, and the lock keeps the store
            // registered.
            let node = NonNull::new(unsafe { lookup(file.as_ptr()) })?;
            // SAFETY: The store says that it is the file's node, which the file keeps.
            Some(unsafe { File::new(file, node) })
        })
    }
}

/// Stores by their addresses.
///
/// # Invariants
///
/// The stores in it are registered.
pub(crate) struct Stores(Option<RBTree<usize, ForeignStore>>);

module_mutex! {
    /// The stores that are registered.
    static STORES: Stores = Stores(None);
}

/// An inode of a store of another module.
///
/// # Invariants
///
/// The inode is one of `store`.
#[derive(Clone, Copy)]
pub(crate) struct ForeignInode {
    inode: Inode,
    store: ForeignStore,
}

impl ForeignInode {
    /// # Safety
    ///
    /// `inode` must be one of `store` that outlives the returned value and its copies.
    pub(crate) unsafe fn new(inode: NonNull<bindings::inode>, store: ForeignStore) -> Self {
        // SAFETY: By the safety requirements of this function.
        let inode = unsafe { Inode::new(inode) };
        // INVARIANT: As above.
        Self { inode, store }
    }

    /// The inode as the inodes of all stores are.
    pub(crate) fn inode(self) -> Inode {
        self.inode
    }

    /// The page at `index`. Sleeps.
    pub(crate) fn page(self, index: u64) -> Result<Referenced> {
        let get_page = self.store.ops().get_page.ok_or(EINVAL)?;
        // SAFETY: The inode is valid and of the store by the type invariant.
        // CAST: Page offsets are as wide on 64 bits.
        let page = from_err_ptr(unsafe { get_page(self.inode.as_ptr(), index as usize) })?;
        // SAFETY: The store gives us a reference with it.
        Ok(unsafe { Referenced::from_raw(NonNull::new(page).ok_or(ENOMEM)?) })
    }

    /// Calls the store's fallocate() on `file`, which is one of this inode. `EOPNOTSUPP` if the
    /// store has none. Sleeps.
    pub(crate) fn fallocate(self, file: File, mode: i32, offset: i64, len: i64) -> Result {
        file.expect_inode(self.inode)?;
        let fallocate = self.store.ops().fallocate.ok_or_else(eopnotsupp)?;
        // SAFETY: The file is valid by its type invariant, and one of the store's.
        let err = unsafe { fallocate(file.as_ptr(), mode, offset, len) };
        // CAST: An errno.
        to_result(err as i32)
    }

    /// Moves a folio by the function of the store, or by that of the page cache if the store has
    /// none. Sleeps.
    pub(crate) fn migrate(self, migration: &Migration) -> Result {
        match self.store.ops().migrate_folio {
            // SAFETY: `store.h` says so.
            Some(migrate) => unsafe { migration.by(migrate) },
            None => migration.in_page_cache(),
        }
    }

    /// Passes the flags that consumers want to the store. Does not sleep; the caller serialises.
    pub(crate) fn tell_flags(self, flags: Flags) {
        if let Some(set_flags) = self.store.ops().set_flags {
            // SAFETY: The inode is valid and of the store by the type invariant.
            // CAST: Flags are as wide on 64 bits.
            unsafe { set_flags(self.inode.as_ptr(), flags.bits() as usize) };
        }
    }

    /// Tells the store whether new pages may come from areas for movable memory. Does not sleep; the
    /// caller serialises.
    pub(crate) fn tell_movable(self, movable: bool) {
        if let Some(allocate_movable) = self.store.ops().allocate_movable {
            // SAFETY: The inode is valid and of the store by the type invariant.
            unsafe { allocate_movable(self.inode.as_ptr(), movable) };
        }
    }

    /// Lets the store migrate its pages out of areas for movable memory, if it has a function for
    /// that. Sleeps.
    pub(crate) fn ask_to_leave_movable_areas(self) -> Option<Result> {
        let leave = self.store.ops().leave_movable_areas?;
        // SAFETY: The inode is valid and of the store by the type invariant.
        Some(to_result(unsafe { leave(self.inode.as_ptr()) }))
    }
}
