// SPDX-License-Identifier: GPL-2.0

//! A core of memfiles, as a trait: the callbacks of `rust/abi/ops.rs` for one that is not ours.
//!
//! C header: [`include/linux/memfile.h`](srctree/include/linux/memfile.h)

use crate::bindings;
use core::marker::PhantomData;
use core::ops::Range;
use core::ptr::NonNull;
use kernel::error::{
    from_result,
    to_result, //
};
use kernel::ffi::{
    c_int,
    c_long,
    c_ulong, //
};
use kernel::page::Page;
use kernel::prelude::*;
use kernel::types::ForeignOwnable;

/// One memfile, from its creation to its end.
///
/// The pages are the file's own: shmem has none of them, so nobody migrates or swaps them.
pub(crate) trait Store: Send + Sync + 'static {
    /// A new, empty file.
    fn create() -> impl PinInit<Self, Error>
    where
        Self: Sized;

    /// The size is to change, in bytes. Under the inode lock.
    fn set_size(&self, old: u64, new: u64) -> Result;

    /// fallocate(2), in bytes.
    fn fallocate(&self, mode: i32, offset: i64, len: i64) -> Result;

    /// A consumer wants to be bound.
    fn bind(&self, consumer: Consumer) -> Result;

    /// It does not any more, and is not called after this.
    fn unbind(&self, consumer: Consumer);

    /// The frame number of the page at `index`.
    fn get(&self, index: u64) -> Result<usize>;
}

/// The frame number of a page.
pub(crate) fn pfn(page: &Page) -> usize {
    // SAFETY: The page is valid.
    unsafe { bindings::memfile_page_pfn(page.as_ptr()) }
}

/// A consumer's binding.
///
/// # Invariants
///
/// Points to a notifier with all callbacks, which its owner keeps from [`Store::bind`] until
/// [`Store::unbind`] returns; a store uses it at no other time.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Consumer(NonNull<bindings::memfile_notifier>);

// SAFETY: Notifiers are called from any thread.
unsafe impl Send for Consumer {}

impl Consumer {
    /// The file's pages that it binds.
    pub(crate) fn pages(self) -> Range<u64> {
        // SAFETY: Valid by the type invariant, and these do not change.
        let (pgoff, nr_pages) = unsafe { ((*self.0.as_ptr()).pgoff, (*self.0.as_ptr()).nr_pages) };
        pgoff as u64..(pgoff as u64).saturating_add(nr_pages as u64)
    }

    /// The page behind `frame`.
    fn index(self, frame: u64) -> Result<u64> {
        // SAFETY: Valid by the type invariant, and it does not change.
        let first = unsafe { (*self.0.as_ptr()).frame };
        let index = frame
            .checked_sub(first)
            .and_then(|i| i.checked_add(self.pages().start));
        index
            .filter(|index| self.pages().contains(index))
            .ok_or(EINVAL)
    }

    /// Takes those of `pages` that it binds away while `work` is done.
    pub(crate) fn invalidate(self, pages: Range<u64>, work: impl FnOnce()) {
        let bound = self.pages();
        let (start, end) = (pages.start.max(bound.start), pages.end.min(bound.end));
        if start >= end {
            return work();
        }
        let raw = self.0.as_ptr();
        // SAFETY: Valid by the type invariant.
        let (ops, frame) = unsafe { (&*(*raw).ops, (*raw).frame) };
        let (start, end) = (start - bound.start + frame, end - bound.start + frame);
        // SAFETY: Valid by the type invariant, likewise the two below.
        ops.invalidate_start
            .inspect(|call| unsafe { call(raw, start, end) });
        // SAFETY: See above.
        ops.flush.inspect(|call| unsafe { call(raw) });
        work();
        // SAFETY: See above.
        ops.invalidate_end
            .inspect(|call| unsafe { call(raw, start, end) });
    }
}

/// The store's registration as the core, for as long as it lives.
pub(crate) struct Registration<T: Store>(PhantomData<T>);

impl<T: Store> Registration<T> {
    const OPS: bindings::memfile_core_ops = bindings::memfile_core_ops {
        owner: <crate::Module as kernel::ModuleMetadata>::THIS_MODULE.as_ptr(),
        create: Some(Self::create),
        destroy: Some(Self::destroy),
        set_size: Some(Self::set_size),
        fallocate: Some(Self::fallocate),
        show_fdinfo: Some(Self::show_fdinfo),
        register_notifier: Some(Self::register_notifier),
        unregister_notifier: Some(Self::unregister_notifier),
        // For folios of shmem, of which there are none.
        referenced: None,
        writeout_start: None,
        invalidate_start: None,
        invalidate_end: None,
        migrate_folio: None,
        error_folio: None,
    };

    const STORE: bindings::memfile_backing_store = bindings::memfile_backing_store {
        get_pfn: Some(Self::get_pfn),
        put_pfn: Some(Self::put_pfn),
    };

    /// Registers. Sleeps. `EBUSY` if there is a core.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: The ops are static, and `drop()` unregisters them.
        to_result(unsafe { bindings::memfile_register_core(&Self::OPS) })?;
        Ok(Self(PhantomData))
    }
}

impl<T: Store> Drop for Registration<T> {
    /// Runs at module unload, which happens only when no inode and no binding holds the module.
    fn drop(&mut self) {
        // SAFETY: `new()` registered them.
        unsafe { bindings::memfile_unregister_core(&Self::OPS) };
    }
}

/// The callbacks. C calls them as `include/linux/memfile.h` says: a node comes from
/// [`Registration::create`] and lives until [`Registration::destroy`], a file is a memfile to which
/// the caller holds a reference, and a notifier stays from its registration to its end.
impl<T: Store> Registration<T> {
    /// # Safety
    ///
    /// `node` must come from [`Self::create`], and not be destroyed while the result is used.
    unsafe fn store<'a>(node: *mut bindings::memfile_node) -> Pin<&'a T> {
        // SAFETY: By the safety requirements of this function.
        unsafe { <Pin<KBox<T>> as ForeignOwnable>::borrow(node.cast()) }
    }

    /// # Safety
    ///
    /// As the comment of this block says.
    unsafe extern "C" fn create(_inode: *mut bindings::inode) -> *mut bindings::memfile_node {
        match KBox::try_pin_init(T::create(), GFP_KERNEL) {
            Ok(store) => store.into_foreign().cast(),
            Err(err) => err.to_ptr(),
        }
    }

    /// # Safety
    ///
    /// As the comment of this block says.
    unsafe extern "C" fn destroy(node: *mut bindings::memfile_node) {
        // SAFETY: It comes from `create()`, and this is its end.
        drop(unsafe { <Pin<KBox<T>> as ForeignOwnable>::from_foreign(node.cast()) });
    }

    /// # Safety
    ///
    /// As the comment of this block says.
    unsafe extern "C" fn set_size(node: *mut bindings::memfile_node, old: i64, new: i64) -> c_int {
        from_result(|| {
            let bytes = |size| u64::try_from(size).map_err(|_| EINVAL);
            // SAFETY: The node lives as long as its inode.
            unsafe { Self::store(node) }.set_size(bytes(old)?, bytes(new)?)?;
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// As the comment of this block says.
    unsafe extern "C" fn fallocate(
        file: *mut bindings::file,
        mode: c_int,
        offset: i64,
        len: i64,
    ) -> c_long {
        from_result(|| {
            // SAFETY: The file is a memfile, and the node lives as long as its inode.
            unsafe { Self::store(bindings::memfile_node(file)) }.fallocate(mode, offset, len)?;
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// As the comment of this block says.
    unsafe extern "C" fn show_fdinfo(_m: *mut bindings::seq_file, _file: *mut bindings::file) {}

    /// # Safety
    ///
    /// As the comment of this block says.
    unsafe extern "C" fn register_notifier(
        file: *mut bindings::file,
        _flags: c_ulong,
        notifier: *mut bindings::memfile_notifier,
    ) -> c_int {
        from_result(|| {
            // SAFETY: The file is valid; this looks whether it is a memfile.
            let node = unsafe { bindings::memfile_node(file) };
            let consumer = Consumer(NonNull::new(notifier).ok_or(EINVAL)?);
            if node.is_null() {
                return Err(EINVAL);
            }
            // SAFETY: The notifier is the caller's, who does not use it before we return.
            unsafe {
                (*notifier).node = node;
                (*notifier).bs = &Self::STORE;
                (*notifier).file = file;
            }
            // SAFETY: The node lives as long as its inode.
            unsafe { Self::store(node) }.bind(consumer)?;
            // SAFETY: The file is valid.
            unsafe { bindings::get_file(file) };
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// As the comment of this block says.
    unsafe extern "C" fn unregister_notifier(notifier: *mut bindings::memfile_notifier) {
        let Some(raw) = NonNull::new(notifier) else {
            return;
        };
        // SAFETY: The notifier was registered, so its node and file are set.
        let (node, file) = unsafe { ((*notifier).node, (*notifier).file) };
        // SAFETY: The notifier holds the file, which holds the node.
        unsafe { Self::store(node) }.unbind(Consumer(raw));
        // SAFETY: The reference that registration took.
        unsafe { bindings::fput(file) };
    }

    /// # Safety
    ///
    /// As the comment of this block says.
    unsafe extern "C" fn get_pfn(
        notifier: *mut bindings::memfile_notifier,
        frame: u64,
        pfn: *mut bindings::memfile_pfn,
    ) -> c_int {
        from_result(|| {
            let consumer = Consumer(NonNull::new(notifier).ok_or(EINVAL)?);
            // SAFETY: The notifier is registered; it holds the file, which holds the node.
            let store = unsafe { Self::store((*notifier).node) };
            let found = bindings::memfile_pfn {
                pfn: store.get(consumer.index(frame)?)?,
                ..Default::default()
            };
            // SAFETY: The caller may be written to.
            unsafe { pfn.write(found) };
            Ok(0)
        })
    }

    /// There is no reference: a page stays until it is punched, which is announced.
    ///
    /// # Safety
    ///
    /// As the comment of this block says.
    unsafe extern "C" fn put_pfn(
        _notifier: *mut bindings::memfile_notifier,
        _pfn: *const bindings::memfile_pfn,
    ) {
    }
}
