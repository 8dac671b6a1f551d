// SPDX-License-Identifier: GPL-2.0

//! Backing stores beside shmem: other modules that give consumers pages of their own files.
//!
//! C header: `rust/store.h`, which says what a store does and what it may expect. What is there but
//! not here is in [`super::ops`], for shmem's files use it as well.

use super::folio::Given;
use super::inode::{
    File,
    Inode, //
};
use super::ops;
use crate::bindings;
use crate::engine::node::Node;
use core::ptr::NonNull;
use kernel::error::{
    code::*,
    from_err_ptr,
    from_result,
    Result, //
};
use kernel::ffi::c_int;
use kernel::prelude::*;
use kernel::rbtree::{
    RBTree,
    RBTreeNode, //
};
use kernel::sync::global_lock;

/// A store.
///
/// # Invariants
///
/// Points to a `struct memfile_store` with all callbacks, which is not written to and stays as long
/// as it is registered and as long as it has files.
#[derive(Clone, Copy)]
pub(super) struct Store(NonNull<bindings::memfile_store>);

// SAFETY: It is not written to, and its callbacks may be called from any thread.
unsafe impl Send for Store {}

impl Store {
    /// # Safety
    ///
    /// `store` must be null, or as the type invariant says but for missing callbacks.
    ///
    /// Returns [`None`] if it is null or callbacks are missing.
    unsafe fn from_raw(store: *const bindings::memfile_store) -> Option<Self> {
        let store = NonNull::new(store.cast_mut())?;
        // SAFETY: Valid by the safety requirements.
        let ops = unsafe { store.as_ref() };
        // INVARIANT: By the safety requirements, and the callbacks are there.
        (ops.lookup.is_some() && ops.get_page.is_some()).then_some(Self(store))
    }

    fn key(self) -> usize {
        self.0.as_ptr().addr()
    }

    /// The node of `file`, null if it is not of this store.
    ///
    /// # Safety
    ///
    /// `file` must be valid, and `self` registered.
    unsafe fn lookup(self, file: NonNull<bindings::file>) -> *mut bindings::memfile_node {
        // SAFETY: Valid by the type invariant.
        let lookup = unsafe { self.0.as_ref() }.lookup;
        lookup.map_or(core::ptr::null_mut(), |lookup| {
            // SAFETY: By the safety requirements of this function.
            unsafe { lookup(file.as_ptr()) }
        })
    }

    /// The page at `index` of `inode`. Sleeps.
    ///
    /// # Safety
    ///
    /// `inode` must be valid, and of this store.
    pub(super) unsafe fn get_page(self, inode: *mut bindings::inode, index: u64) -> Result<Given> {
        // SAFETY: Valid by the type invariant.
        let get_page = unsafe { self.0.as_ref() }.get_page.ok_or(EINVAL)?;
        // SAFETY: By the safety requirements of this function.
        // CAST: Page offsets are as wide on 64 bits.
        let page = from_err_ptr(unsafe { get_page(inode, index as usize) })?;
        // SAFETY: The store gives us a reference with it.
        Ok(unsafe { Given::from_raw(NonNull::new(page).ok_or(ENOMEM)?) })
    }
}

/// Stores, by their addresses.
struct Stores(Option<RBTree<usize, Store>>);

global_lock! {
    /// Those that are registered.
    // SAFETY: `ops::Registration::new()` initialises it; nobody gets at what this module exports
    // before that, nor at the core.
    unsafe(uninit) static STORES: Mutex<Stores> = Stores(None);
}

/// To be called once, before anything else here.
///
/// # Safety
///
/// Nobody has used the list of stores before.
pub(super) unsafe fn init() {
    // SAFETY: By the safety requirements of this function.
    unsafe { STORES.init() };
}

/// `file`, if it is one of a registered store. Sleeps.
///
/// # Safety
///
/// `file` must be valid, and stay so as long as the returned value is used.
pub(super) unsafe fn find(file: NonNull<bindings::file>) -> Option<File> {
    let stores = STORES.lock();
    let mut stores = stores.0.iter().flat_map(RBTree::values);
    // SAFETY: The file is valid by the safety requirements, and the lock keeps stores registered.
    let node = stores.find_map(|store| NonNull::new(unsafe { store.lookup(file) }))?;
    // SAFETY: The file is valid by the safety requirements, and keeps its node.
    Some(unsafe { File::of_store(file, node) })
}

/// # Safety
///
/// `store` must be null or stay valid and unchanged as long as it is registered or has files.
#[no_mangle]
unsafe extern "C" fn memfile_register_store(store: *const bindings::memfile_store) -> c_int {
    from_result(|| {
        // SAFETY: By the safety requirements of this function.
        let store = unsafe { Store::from_raw(store) }.ok_or(EINVAL)?;
        let node = RBTreeNode::new(store.key(), store, GFP_KERNEL)?;
        let mut stores = STORES.lock();
        let stores = stores.0.get_or_insert_with(RBTree::new);
        if stores.get(&store.key()).is_some() {
            return Err(EBUSY);
        }
        stores.insert(node);
        Ok(0)
    })
}

/// # Safety
///
/// For C; takes any pointer.
#[no_mangle]
unsafe extern "C" fn memfile_unregister_store(store: *const bindings::memfile_store) -> c_int {
    from_result(|| {
        let mut stores = STORES.lock();
        let node = stores
            .0
            .as_mut()
            .and_then(|stores| stores.remove_node(&store.addr()));
        node.map(|_| 0).ok_or(EINVAL)
    })
}

/// # Safety
///
/// `inode` must be a new inode of `store` that outlives the node, and `store` as for
/// [`memfile_register_store`].
#[no_mangle]
unsafe extern "C" fn memfile_node_create(
    inode: *mut bindings::inode,
    store: *const bindings::memfile_store,
) -> *mut bindings::memfile_node {
    // SAFETY: By the safety requirements of this function.
    let (inode, store) = (NonNull::new(inode), unsafe { Store::from_raw(store) });
    let node = inode.zip(store).ok_or(EINVAL).and_then(|(inode, store)| {
        // SAFETY: As above.
        Node::new(unsafe { Inode::of_store(inode, store) }, false)
    });
    ops::give_node(node)
}

macro_rules! exported {
    ($($name:ident = $function:path,)*) => {
        $(const _: () = {
            // Not compiled unless both have the same signature.
            if true { bindings::$name } else { $function };
        };)*
    };
}

exported! {
    memfile_register_store = memfile_register_store,
    memfile_unregister_store = memfile_unregister_store,
    memfile_node_create = memfile_node_create,
    memfile_node_destroy = ops::destroy,
    memfile_node_invalidate_start = ops::invalidate_start,
    memfile_node_invalidate_end = ops::invalidate_end,
}
