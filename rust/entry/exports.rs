// SPDX-License-Identifier: GPL-2.0

//! The exports for stores of other modules.
//!
//! C header: `rust/store.h`. The exports that are missing here are in [`super::ops`]: those
//! functions are also the core's callbacks for the kernel's own stores.

use super::ops::{
    self,
    borrow_node,
    give_node, //
};
use crate::abi::file::{
    AnyFile,
    File, //
};
use crate::abi::foreign::{
    ForeignInode,
    ForeignStore, //
};
use crate::bindings;
use crate::engine::node::Node;
use crate::store::AnyStore;
use core::ptr::NonNull;
use kernel::error::{
    code::*,
    from_result, //
};
use kernel::ffi::{
    c_int,
    c_long, //
};
use kernel::seq_file::SeqFile;

/// # Safety
///
/// `store` must be null or stay valid and unchanged as long as it is registered or has files.
#[no_mangle]
unsafe extern "C" fn memfile_register_store(store: *const bindings::memfile_store) -> c_int {
    from_result(|| {
        // SAFETY: By the safety requirements of this function.
        let store = unsafe { ForeignStore::from_raw(store) }.ok_or(EINVAL)?;
        store.register()?;
        Ok(0)
    })
}

/// # Safety
///
/// None: for C, takes any pointer.
#[no_mangle]
unsafe extern "C" fn memfile_unregister_store(store: *const bindings::memfile_store) -> c_int {
    from_result(|| {
        ForeignStore::unregister(store.addr())?;
        Ok(0)
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
    let (inode, store) = (NonNull::new(inode), unsafe {
        ForeignStore::from_raw(store)
    });
    let node = inode.zip(store).ok_or(EINVAL).and_then(|(inode, store)| {
        // SAFETY: As above.
        let store = AnyStore::Foreign(unsafe { ForeignInode::new(inode, store) });
        Node::new(store, false)
    });
    give_node(node)
}

/// # Safety
///
/// `node` must be that of the inode of `file`, to which the caller holds a reference.
#[no_mangle]
unsafe extern "C" fn memfile_node_fallocate(
    node: *mut bindings::memfile_node,
    file: *mut bindings::file,
    mode: c_int,
    offset: i64,
    len: i64,
) -> c_long {
    from_result(|| {
        // SAFETY: By the safety requirements of this function.
        let raw = unsafe { AnyFile::from_raw(file) };
        let (raw, raw_node) = raw.zip(NonNull::new(node)).ok_or(EINVAL)?;
        // SAFETY: As above.
        let (file, node) = unsafe { (File::new(raw, raw_node), borrow_node(node)) };
        node.fallocate(file, mode, offset, len)?;
        Ok(0)
    })
}

/// # Safety
///
/// `m` must be valid and used by nobody else, and `node` valid.
#[no_mangle]
unsafe extern "C" fn memfile_node_show_fdinfo(
    node: *mut bindings::memfile_node,
    m: *mut bindings::seq_file,
) {
    // SAFETY: By the safety requirements of this function.
    let (node, seq) = unsafe { (borrow_node(node), SeqFile::from_raw(m)) };
    node.show(seq);
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
    memfile_node_fallocate = memfile_node_fallocate,
    memfile_node_show_fdinfo = memfile_node_show_fdinfo,
    memfile_node_referenced = ops::referenced,
    memfile_node_writeout_start = ops::writeout_start,
    memfile_node_writeout_undone = ops::writeout_undone,
    memfile_node_invalidate_start = ops::invalidate_start,
    memfile_node_invalidate_end = ops::invalidate_end,
    memfile_node_migrate_folio = ops::migrate_folio,
    memfile_node_error_folio = ops::error_folio,
}
