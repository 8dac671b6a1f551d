// SPDX-License-Identifier: GPL-2.0

//! `rust/store.h` in Rust: files whose pages are in a [`Memory`], and their store.
//!
//! Each file has an inode of its own. It cannot be opened anew, so the inode ends with the file.

use crate::bindings;
use crate::Memory;
use core::ops::Range;
use core::ptr::NonNull;
use kernel::error::{
    from_err_ptr,
    from_result,
    to_result, //
};
use kernel::ffi::{
    c_int,
    c_long, //
};
use kernel::fs::File;
use kernel::page::PAGE_SIZE;
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::types::ForeignOwnable;

/// The store's registration, from the module's load to its unload, save for what [`register`] and
/// [`unregister`] do meanwhile.
pub(crate) struct Registration(());

impl Registration {
    /// Registers. Sleeps.
    pub(crate) fn new() -> Result<Self> {
        register()?;
        Ok(Self(()))
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        // It may be unregistered already.
        let _ = unregister();
    }
}

/// Registers the store. Sleeps. `EBUSY` if it is registered.
pub(crate) fn register() -> Result {
    // SAFETY: The store is static, and this module stays as long as a file holds its operations.
    // `Registration` unregisters it in the end.
    to_result(unsafe { bindings::memfile_register_store(&STORE) })
}

/// Unregisters the store. Sleeps. `EINVAL` if it is not registered.
pub(crate) fn unregister() -> Result {
    // SAFETY: Takes any pointer.
    to_result(unsafe { bindings::memfile_unregister_store(&STORE) })
}

static STORE: bindings::memfile_store = bindings::memfile_store {
    lookup: Some(lookup),
    get_page: Some(get_page),
};

#[repr(transparent)]
struct Operations(bindings::file_operations);

// SAFETY: Never written to.
unsafe impl Sync for Operations {}

/// A file with these is one of ours.
static OPERATIONS: Operations = Operations(bindings::file_operations {
    owner: <crate::Module as kernel::ModuleMetadata>::THIS_MODULE.as_ptr(),
    release: Some(release),
    fallocate: Some(fallocate),
    ..pin_init::zeroed()
});

/// What is behind a file.
#[pin_data]
struct Body {
    node: Node,
    /// The size of the file in pages.
    end: usize,
    #[pin]
    memory: Memory,
}

/// memfile's side of a file.
///
/// # Invariants
///
/// `self` owns the node.
struct Node(NonNull<bindings::memfile_node>);

// SAFETY: Nodes are used from any thread.
unsafe impl Send for Node {}
// SAFETY: And by several at once.
unsafe impl Sync for Node {}

impl Node {
    /// Does `work` while nobody maps `pages`, of which there are some. Sleeps.
    fn invalidate(&self, pages: Range<usize>, work: impl FnOnce()) {
        let mut record = bindings::memfile_invalidation::default();
        let raw = &raw mut record;
        // SAFETY: The node is valid by the type invariant, and `record` stays where it is.
        unsafe {
            bindings::memfile_node_invalidate_start(self.0.as_ptr(), raw, pages.start, pages.end)
        };
        work();
        // SAFETY: It was started.
        unsafe { bindings::memfile_node_invalidate_end(raw) };
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // SAFETY: The node is ours by the type invariant.
        unsafe { bindings::memfile_node_destroy(self.0.as_ptr()) };
    }
}

/// A new file of `pages` pages, all of them holes. Sleeps.
pub(crate) fn create(pages: usize) -> Result<ARef<File>> {
    let size = pages.checked_mul(PAGE_SIZE).ok_or(EFBIG)?;
    let size = i64::try_from(size).map_err(|_| EFBIG)?;
    // SAFETY: The name is a C string, and the operations are static.
    let file = from_err_ptr(unsafe {
        bindings::anon_inode_create_getfile(
            c"[memfile-store]".as_char_ptr(),
            &OPERATIONS.0,
            core::ptr::null_mut(),
            bindings::O_RDWR as c_int,
            core::ptr::null(),
        )
    })?;
    // SAFETY: The reference is ours, and nobody else knows the file.
    let file: ARef<File> = unsafe { ARef::from_raw(NonNull::new(file).ok_or(ENOMEM)?.cast()) };
    // SAFETY: The file is valid, and has an inode.
    let inode = unsafe { (*file.as_ptr()).f_inode };
    // SAFETY: The inode is valid, and new.
    unsafe { bindings::memfile_store_set_size(inode, size) };
    // SAFETY: As above, and it outlives its body.
    let node = from_err_ptr(unsafe { bindings::memfile_node_create(inode, &STORE) })?;
    // INVARIANT: It was just made for us.
    let node = Node(NonNull::new(node).ok_or(ENOMEM)?);
    let body = KBox::pin_init(
        pin_init!(Body {
            node,
            end: pages,
            memory <- Memory::new(),
        }),
        GFP_KERNEL,
    )?;
    // SAFETY: The inode is valid, and nobody looks at this but us.
    unsafe { (*inode).i_private = body.into_foreign() };
    Ok(file)
}

/// # Safety
///
/// `inode` must be that of a file that [`create`] has returned and that lives as long as the
/// returned value is used.
unsafe fn body<'a>(inode: *mut bindings::inode) -> Pin<&'a Body> {
    // SAFETY: By the safety requirements; `create()` put it there.
    unsafe { <Pin<KBox<Body>> as ForeignOwnable>::borrow((*inode).i_private) }
}

/// # Safety
///
/// For C: `file` must be valid.
unsafe extern "C" fn lookup(file: *mut bindings::file) -> *mut bindings::memfile_node {
    // SAFETY: By the safety requirements of this function.
    let (operations, inode) = unsafe { ((*file).f_op, (*file).f_inode) };
    if !core::ptr::eq(operations, &OPERATIONS.0) {
        return core::ptr::null_mut();
    }
    // SAFETY: The file is ours, and valid; nobody sees it before `create()` has returned it.
    unsafe { body(inode) }.node.0.as_ptr()
}

/// # Safety
///
/// For C: `inode` must be that of a file that is ours and stays for the duration of the call.
unsafe extern "C" fn get_page(inode: *mut bindings::inode, index: usize) -> *mut bindings::page {
    // SAFETY: By the safety requirements of this function.
    let memory = &unsafe { body(inode) }.memory;
    // SAFETY: The inode is valid by the safety requirements.
    let account = || unsafe { bindings::inode_add_bytes(inode, PAGE_SIZE as i64) };
    let page = memory.with_page(index, account, |page| {
        // SAFETY: The page is valid.
        unsafe { bindings::memfile_store_get_page(page.as_ptr()) };
        page.as_ptr()
    });
    page.unwrap_or_else(|err| err.to_ptr())
}

/// # Safety
///
/// For C: `file` must be ours and have been released.
unsafe extern "C" fn release(inode: *mut bindings::inode, _file: *mut bindings::file) -> c_int {
    // SAFETY: The inode is the file's, and nobody looks at this any more.
    let private = unsafe { (*inode).i_private };
    if !private.is_null() {
        // SAFETY: `create()` put it there, and this is its end.
        drop(unsafe { <Pin<KBox<Body>> as ForeignOwnable>::from_foreign(private) });
    }
    0
}

/// `FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE`
const PUNCH: c_int = 3;

/// # Safety
///
/// For C: `file` must be ours and stay for the duration of the call.
unsafe extern "C" fn fallocate(
    file: *mut bindings::file,
    mode: c_int,
    offset: i64,
    len: i64,
) -> c_long {
    from_result(|| {
        if mode != PUNCH {
            return Err(EOPNOTSUPP);
        }
        // SAFETY: By the safety requirements of this function.
        let body = unsafe { body((*file).f_inode) };
        let page = |offset: i64| match usize::try_from(offset) {
            Ok(offset) if offset % PAGE_SIZE == 0 => Ok(offset / PAGE_SIZE),
            _ => Err(EINVAL),
        };
        let end = page(offset.checked_add(len).ok_or(EINVAL)?)?;
        let hole = page(offset)?..end.min(body.end);
        if !hole.is_empty() {
            body.node.invalidate(hole.clone(), || {
                let pages = body.memory.punch(hole);
                // CAST: As many as there is memory for.
                let bytes = (pages * PAGE_SIZE) as i64;
                // SAFETY: The inode is the file's.
                unsafe { bindings::inode_sub_bytes((*file).f_inode, bytes) };
            });
        }
        Ok(0)
    })
}
