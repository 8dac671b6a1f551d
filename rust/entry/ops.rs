// SPDX-License-Identifier: GPL-2.0

//! The core's callbacks.
//!
//! C header: [`include/linux/memfile.h`](srctree/include/linux/memfile.h), which documents each of
//! them and the locks of the caller.

use crate::abi::file::{
    AnyFile,
    File, //
};
use crate::abi::folio::{
    Found,
    Locked,
    Migration, //
};
use crate::abi::foreign::{
    self,
    ForeignStore, //
};
use crate::abi::hugetlb::HugetlbInode;
use crate::abi::invalidation::Invalidation;
use crate::abi::notifier::Notifier;
use crate::abi::shmem::ShmemInode;
use crate::abi::trace;
use crate::bindings;
use crate::engine::node::Node;
use crate::engine::{
    pages,
    stats::{
        self,
        Event, //
    }, //
};
use crate::policy::range::Range;
use crate::store::{
    each_store,
    AnyStore,
    Page,
    Store, //
};
use core::marker::PhantomData;
use core::ptr::NonNull;
use kernel::error::{
    code::*,
    from_result,
    to_result,
    Result, //
};
use kernel::ffi::{
    c_int,
    c_long,
    c_ulong, //
};
use kernel::seq_file::SeqFile;
use kernel::sync::{
    Arc,
    ArcBorrow, //
};

/// The core's registration with the kernel, for as long as it lives.
pub(crate) struct Registration(());

impl Registration {
    /// Registers, once in the module's life. Sleeps. `EBUSY` if another core is registered.
    pub(crate) fn new() -> Result<Self> {
        // Initialises every lock that belongs to the whole module (`module_mutex!`).
        // SAFETY: This is the only place, and nobody has used the lock before.
        unsafe { stats::FILES.init() };
        // SAFETY: As above.
        unsafe { foreign::STORES.init() };
        // SAFETY: The ops are static, and `drop()` unregisters them.
        to_result(unsafe { bindings::memfile_register_core(&OPS.0) })?;
        Ok(Self(()))
    }
}

impl Drop for Registration {
    /// Runs at module unload, which happens only when no inode and no binding holds the module.
    /// Sleeps.
    fn drop(&mut self) {
        // SAFETY: `new()` registered them.
        unsafe { bindings::memfile_unregister_core(&OPS.0) };
    }
}

#[repr(transparent)]
struct Ops(bindings::memfile_core_ops);

// SAFETY: Never written to.
unsafe impl Sync for Ops {}

static OPS: Ops = Ops(bindings::memfile_core_ops {
    owner: bindings::THIS_MODULE,
    create: Some(create),
    destroy: Some(destroy),
    set_size: Some(set_size),
    fallocate: Some(fallocate),
    show_fdinfo: Some(show_fdinfo),
    register_notifier: Some(register_notifier),
    unregister_notifier: Some(unregister_notifier),
    referenced: Some(referenced),
    writeout_start: Some(writeout_start),
    writeout_undone: Some(writeout_undone),
    invalidate_start: Some(punch_start),
    invalidate_end: Some(invalidate_end),
    next_range: Some(next_range),
    migrate_folio: Some(migrate_folio),
    error_folio: Some(error_folio),
});

/// A store as consumers see it.
struct BackingStore<S>(PhantomData<S>);

impl<S: Store> BackingStore<S> {
    const OPS: bindings::memfile_backing_store = bindings::memfile_backing_store {
        get_pfn: Some(get_pfn::<S>),
        put_pfn: Some(put_pfn),
        prefault: Some(prefault::<S>),
    };

    fn of(_store: S) -> &'static bindings::memfile_backing_store {
        &Self::OPS
    }
}

/// # Safety
///
/// `node` must come from [`give_node`] and not be destroyed as long as the returned value is used.
pub(super) unsafe fn borrow_node<'a>(node: *mut bindings::memfile_node) -> ArcBorrow<'a, Node> {
    // SAFETY: It was made by `into_raw()`; `destroy()` has not run.
    unsafe { ArcBorrow::from_raw(node.cast_const().cast()) }
}

/// What an observer gets pages from: none. It has no page to give back, and asks for none in advance.
static NO_PAGES: bindings::memfile_backing_store = bindings::memfile_backing_store {
    get_pfn: Some(get_no_pfn),
    put_pfn: Some(put_pfn),
    prefault: Some(prefault_nothing),
};

fn node_into_raw(node: Arc<Node>) -> *mut bindings::memfile_node {
    Arc::into_raw(node).cast_mut().cast()
}

/// Gives a new node to C, which keeps it until [`destroy`].
pub(super) fn give_node(node: Result<Arc<Node>>) -> *mut bindings::memfile_node {
    match node {
        Ok(node) => node_into_raw(node),
        Err(err) => err.to_ptr(),
    }
}

/// The record of an invalidation that C starts and ends by two calls. If `holds`, it owns a
/// reference to the node until [`invalidate_end`], where it may be the last one. Otherwise the caller
/// keeps the node until then.
///
/// # Safety
///
/// `raw` must be null, or as [`Invalidation::from_raw`] says. `node` must be valid.
unsafe fn new_invalidation(
    raw: *mut bindings::memfile_invalidation,
    node: *mut bindings::memfile_node,
    holds: bool,
) -> Option<Invalidation> {
    // SAFETY: By the safety requirements of this function.
    let inv = unsafe { Invalidation::from_raw(NonNull::new(raw)?) };
    if holds {
        // SAFETY: As above.
        inv.hold_node(node_into_raw(unsafe { borrow_node(node) }.into()));
    } else {
        inv.set_node(node);
    }
    Some(inv)
}

/// Begins an invalidation of the pages `[first, end)`.
///
/// # Safety
///
/// As for [`new_invalidation`].
#[inline(always)]
unsafe fn start(
    node: *mut bindings::memfile_node,
    raw: *mut bindings::memfile_invalidation,
    (first, end): (c_ulong, c_ulong),
    holds: bool,
) {
    // SAFETY: By the safety requirements of this function.
    let (inv, node) = unsafe { (new_invalidation(raw, node, holds), borrow_node(node)) };
    if let Some((inv, pages)) = inv.zip(Range::new(first as u64, end as u64)) {
        node.invalidate_start(inv, pages);
    }
}

/// `file` as a memfile of a store in the kernel.
///
/// # Safety
///
/// `file` must be null, or valid as long as the returned value is used.
unsafe fn memfile(file: *mut bindings::file) -> Option<File> {
    // SAFETY: By the safety requirements of this function.
    unsafe { AnyFile::from_raw(file) }?.in_kernel_store()
}

/// # Safety
///
/// `folio` must be locked and in the page cache for the duration of the call.
unsafe fn pages_of(folio: *mut bindings::folio) -> Option<Range> {
    // SAFETY: By the safety requirements of this function.
    let folio = unsafe { Locked::borrow(NonNull::new(folio)?) };
    folio.pages()
}

/// # Safety
///
/// `inode` must be a new inode of shmem, or of hugetlbfs if `flags` has `MFD_HUGETLB`. It outlives the
/// node.
unsafe extern "C" fn create(
    inode: *mut bindings::inode,
    flags: c_ulong,
) -> *mut bindings::memfile_node {
    let Some(inode) = NonNull::new(inode) else {
        return EINVAL.to_ptr();
    };
    // CAST: Flags are as wide on 64 bits.
    let has = |flag: u32| flags & flag as usize != 0;
    let store = if has(bindings::MFD_HUGETLB) {
        // SAFETY: By the safety requirements of this function.
        AnyStore::Hugetlb(unsafe { HugetlbInode::new(inode) })
    } else {
        // SAFETY: As above.
        AnyStore::Shmem(unsafe { ShmemInode::new(inode) })
    };
    give_node(Node::new(store, has(bindings::MFD_ONE_VM)))
}

/// # Safety
///
/// `node` must come from [`give_node`]; it is not used any more.
#[export_name = "memfile_node_destroy"]
pub(super) unsafe extern "C" fn destroy(node: *mut bindings::memfile_node) {
    // SAFETY: It was made by `into_raw()`, and this is its end for C.
    let node = unsafe { Arc::<Node>::from_raw(node.cast_const().cast()) };
    // A task in the last step of an invalidation has a reference, but does not use the inode.
    node.drain();
}

/// # Safety
///
/// `node` must be the node of the inode whose lock the caller holds.
unsafe extern "C" fn set_size(node: *mut bindings::memfile_node, old: i64, new: i64) -> c_int {
    from_result(|| {
        let bytes = |size| u64::try_from(size).map_err(|_| EINVAL);
        // SAFETY: By the safety requirements of this function.
        unsafe { borrow_node(node) }.set_size(bytes(old)?, bytes(new)?)?;
        Ok(0)
    })
}

/// # Safety
///
/// `file` must be a memfile to which the caller holds a reference.
unsafe extern "C" fn fallocate(
    file: *mut bindings::file,
    mode: c_int,
    offset: i64,
    len: i64,
) -> c_long {
    from_result(|| {
        // SAFETY: By the safety requirements of this function.
        let file = unsafe { memfile(file) }.ok_or(EINVAL)?;
        // SAFETY: The node lives as long as its inode.
        unsafe { borrow_node(file.node_ptr()) }.fallocate(file, mode, offset, len)?;
        Ok(0)
    })
}

/// # Safety
///
/// `m` must be valid and used by nobody else, `file` as in [`fallocate`].
unsafe extern "C" fn show_fdinfo(m: *mut bindings::seq_file, file: *mut bindings::file) {
    // SAFETY: By the safety requirements of this function.
    let seq = unsafe { SeqFile::from_raw(m) };
    // SAFETY: As above.
    if let Some(file) = unsafe { memfile(file) } {
        // SAFETY: The node lives as long as its inode.
        unsafe { borrow_node(file.node_ptr()) }.show(seq);
    }
}

/// # Safety
///
/// `file` must be valid, `notifier` as [`Notifier`] says.
unsafe extern "C" fn register_notifier(
    file: *mut bindings::file,
    flags: c_ulong,
    notifier: *mut bindings::memfile_notifier,
) -> c_int {
    from_result(|| {
        // SAFETY: By the safety requirements of this function.
        let file = unsafe { AnyFile::from_raw(file) }.ok_or(EINVAL)?;
        let file = file.in_kernel_store().or_else(|| ForeignStore::find(file));
        let file = file.ok_or(EINVAL)?;
        // SAFETY: As above.
        let notifier = unsafe { Notifier::from_raw(notifier) }.ok_or(EINVAL)?;
        // SAFETY: The node lives as long as its inode.
        let node = unsafe { borrow_node(file.node_ptr()) };
        let store = if notifier.observer() {
            &NO_PAGES
        } else {
            each_store!(node.store, store => BackingStore::of(store))
        };
        notifier.attach(file.node_ptr(), store, node.store.max_order());
        node.bind(file, flags as u64, notifier)?;
        Ok(0)
    })
}

/// # Safety
///
/// `notifier` must be registered.
unsafe extern "C" fn unregister_notifier(notifier: *mut bindings::memfile_notifier) {
    // SAFETY: By the safety requirements of this function.
    if let Some(notifier) = unsafe { Notifier::from_raw(notifier) } {
        // SAFETY: The notifier holds the file, which holds the node.
        unsafe { borrow_node(notifier.node_ptr()) }.unbind(notifier);
    }
}

/// # Safety
///
/// `folio` must be locked and in the page cache of the file of `node`, or wherever else its store
/// has its folios, with the index that it has in the file.
#[export_name = "memfile_node_referenced"]
pub(super) unsafe extern "C" fn referenced(
    node: *mut bindings::memfile_node,
    folio: *mut bindings::folio,
) -> bool {
    // SAFETY: The locked folio pins the inode, and so the node.
    let (node, pages) = unsafe { (borrow_node(node), pages_of(folio)) };
    pages.is_some_and(|pages| pages::referenced(&node, pages))
}

/// # Safety
///
/// As for [`referenced`] and for [`invalidate_start`]: `folio` is what is invalidated.
#[export_name = "memfile_node_writeout_start"]
pub(super) unsafe extern "C" fn writeout_start(
    node: *mut bindings::memfile_node,
    inv: *mut bindings::memfile_invalidation,
    folio: *mut bindings::folio,
) {
    // SAFETY: By the safety requirements of this function.
    let inv = unsafe { new_invalidation(inv, node, true) };
    // SAFETY: The locked folio pins the inode, and so the node.
    let (node, pages) = unsafe { (borrow_node(node), pages_of(folio)) };
    if let Some((inv, pages)) = inv.zip(pages) {
        pages::writeout_start(&node, inv, pages);
    }
}

/// # Safety
///
/// As for [`referenced`].
#[export_name = "memfile_node_writeout_undone"]
pub(super) unsafe extern "C" fn writeout_undone(
    node: *mut bindings::memfile_node,
    folio: *mut bindings::folio,
) {
    // SAFETY: The locked folio pins the inode, and so the node.
    let (node, pages) = unsafe { (borrow_node(node), pages_of(folio)) };
    if let Some(pages) = pages {
        pages::writeout_undone(&node, pages);
    }
}

/// # Safety
///
/// `node` must be valid, `inv` as [`Invalidation`] says; [`invalidate_end`] follows.
#[export_name = "memfile_node_invalidate_start"]
pub(super) unsafe extern "C" fn invalidate_start(
    node: *mut bindings::memfile_node,
    inv: *mut bindings::memfile_invalidation,
    first: c_ulong,
    end: c_ulong,
) {
    // SAFETY: By the safety requirements of this function.
    unsafe { start(node, inv, (first, end), true) };
}

/// [`invalidate_start`] for who has the inode until [`invalidate_end`] returns, and so the node.
///
/// # Safety
///
/// As for [`invalidate_start`], and `node` must stay valid until then.
unsafe extern "C" fn punch_start(
    node: *mut bindings::memfile_node,
    inv: *mut bindings::memfile_invalidation,
    first: c_ulong,
    end: c_ulong,
) {
    // SAFETY: By the safety requirements of this function.
    unsafe { start(node, inv, (first, end), false) };
}

/// # Safety
///
/// `inv` must have been started by [`invalidate_start`], [`writeout_start`] or [`punch_start`].
#[export_name = "memfile_node_invalidate_end"]
pub(super) unsafe extern "C" fn invalidate_end(inv: *mut bindings::memfile_invalidation) {
    let Some(raw) = NonNull::new(inv) else {
        return;
    };
    // SAFETY: By the safety requirements of this function.
    let inv = unsafe { Invalidation::listed(raw) };
    // SAFETY: The record holds the node, or who called `punch_start()` does.
    let node = unsafe { borrow_node(inv.node_ptr()) };
    // SAFETY: The reference that `new_invalidation()` took.
    let held = inv
        .holds_node()
        .then(|| unsafe { Arc::<Node>::from_raw(inv.node_ptr().cast_const().cast()) });
    if inv.scope().is_some() {
        node.invalidate_end(inv);
    }
    drop(held);
}

/// # Safety
///
/// For a consumer, while it is called back for `inv`; `range` is what it got from there or here.
pub(crate) unsafe extern "C" fn next_range(
    inv: *mut bindings::memfile_invalidation,
    range: *mut bindings::memfile_range,
) -> bool {
    let Some(raw) = NonNull::new(inv) else {
        return false;
    };
    // SAFETY: By the safety requirements of this function.
    let inv = unsafe { Invalidation::listed(raw) };
    // SAFETY: As above.
    let Some(after) = (unsafe { Notifier::from_raw((*range).notifier) }) else {
        return false;
    };
    // SAFETY: The caller, which invalidates, keeps the node. It need not be in an `Arc` of ours.
    let node = unsafe { &*inv.node_ptr().cast_const().cast::<Node>() };
    let Some((notifier, frames)) = node.next_range(inv, after) else {
        return false;
    };
    // SAFETY: As above.
    unsafe { range.write(notifier.range(frames)) };
    true
}

/// # Safety
///
/// `dst` and `src` must be locked, and `src` be as for [`referenced`]; `mapping` is that of the file
/// of `node`.
#[export_name = "memfile_node_migrate_folio"]
pub(super) unsafe extern "C" fn migrate_folio(
    node: *mut bindings::memfile_node,
    mapping: *mut bindings::address_space,
    dst: *mut bindings::folio,
    src: *mut bindings::folio,
    mode: bindings::migrate_mode,
) -> c_int {
    from_result(|| {
        // SAFETY: The locked folio pins the inode, and so the node.
        let (node, pages) = unsafe { (borrow_node(node), pages_of(src)) };
        // SAFETY: By the safety requirements of this function.
        let migration = unsafe { Migration::from_raw(mapping, dst, src, mode) };
        pages::migrate(&node, pages.ok_or(EINVAL)?, &migration.ok_or(EINVAL)?)?;
        Ok(0)
    })
}

/// # Safety
///
/// As for [`referenced`].
#[export_name = "memfile_node_error_folio"]
pub(super) unsafe extern "C" fn error_folio(
    node: *mut bindings::memfile_node,
    folio: *mut bindings::folio,
) {
    // SAFETY: The locked folio pins the inode, and so the node.
    let (node, pages) = unsafe { (borrow_node(node), pages_of(folio)) };
    if let Some(pages) = pages {
        pages::poison(&node, pages);
    }
}

/// # Safety
///
/// `notifier` must be registered for a file of store `S`, `pfn` writable.
unsafe extern "C" fn get_pfn<S: Store>(
    notifier: *mut bindings::memfile_notifier,
    frame: u64,
    pfn: *mut bindings::memfile_pfn,
) -> c_int {
    from_result(|| {
        // SAFETY: By the safety requirements of this function.
        let notifier = unsafe { Notifier::from_raw(notifier) }.ok_or(EINVAL)?;
        // SAFETY: The notifier holds the file, which holds the node.
        let node = unsafe { borrow_node(notifier.node_ptr()) };
        // SAFETY: The notifier holds the file, whose node it is.
        let file = unsafe { File::bound_by(notifier) }.ok_or(EINVAL)?;
        let found = pages::get_pfn::<S>(&node, file, notifier.span(), frame)
            .inspect_err(|_| node.counters.count(Event::GetPfnError))?;
        let (index, page) = match found {
            Found::There(found) => found,
            Found::Coming(folio) => {
                node.counters.count(Event::GetPfnWait);
                // SAFETY: By the safety requirements of this function.
                unsafe { pfn.write(folio.into_pfn()) };
                return Err(EAGAIN);
            }
        };
        let found = Page::into_pfn(page);
        node.counters.count(Event::GetPfn);
        // SAFETY: By the safety requirements of this function.
        let pfn = unsafe {
            pfn.write(found);
            &*pfn
        };
        trace::get_pfn(&node.inode, index, pfn);
        Ok(0)
    })
}

extern "C" fn get_no_pfn(
    _notifier: *mut bindings::memfile_notifier,
    _frame: u64,
    _pfn: *mut bindings::memfile_pfn,
) -> c_int {
    EINVAL.to_errno()
}

extern "C" fn prefault_nothing(_notifier: *mut bindings::memfile_notifier, _start: u64, _end: u64) {
}

/// # Safety
///
/// `notifier` must be registered, `pfn` come from its [`get_pfn`] and not have been put.
unsafe extern "C" fn put_pfn(
    notifier: *mut bindings::memfile_notifier,
    pfn: *const bindings::memfile_pfn,
) {
    // SAFETY: By the safety requirements of this function.
    let pfn = unsafe { &*pfn };
    trace::put_pfn(pfn);
    // SAFETY: As above.
    if let Some(notifier) = unsafe { Notifier::from_raw(notifier) } {
        // SAFETY: The notifier holds the file, which holds the node.
        unsafe { borrow_node(notifier.node_ptr()) }
            .counters
            .count(Event::PutPfn);
    }
    // SAFETY: `get_pfn()` left the reference to the consumer, which releases it here.
    unsafe { bindings::memfile_put_page(pfn.page) };
}

/// # Safety
///
/// `notifier` must be registered for a file of store `S`.
unsafe extern "C" fn prefault<S: Store>(
    notifier: *mut bindings::memfile_notifier,
    start: u64,
    end: u64,
) {
    // SAFETY: By the safety requirements of this function.
    let Some(notifier) = (unsafe { Notifier::from_raw(notifier) }) else {
        return;
    };
    // SAFETY: The notifier holds the file, which holds the node.
    let node = unsafe { borrow_node(notifier.node_ptr()) };
    // SAFETY: The notifier holds the file, whose node it is.
    let file = unsafe { File::bound_by(notifier) };
    if let (Some(file), Some(frames)) = (file, Range::new(start, end)) {
        pages::prefault::<S>(&node, file, notifier.span(), frames);
    }
}

#[cfg(CONFIG_KUNIT = "y")]
#[kernel::macros::kunit_tests(memfile_ops)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_one_core() {
        // SAFETY: The ops are static. They are not registered a second time.
        let result = to_result(unsafe { bindings::memfile_register_core(&OPS.0) });
        assert_eq!(result, Err(EBUSY));
    }
}
