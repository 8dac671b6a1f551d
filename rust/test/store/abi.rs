// SPDX-License-Identifier: GPL-2.0

//! `rust/store.h` in Rust: files whose pages are in a [`Memory`], and their store.
//!
//! Each file has an inode of its own. It cannot be opened anew, so the inode ends with the file.
//!
//! The memory management does not know the pages. Userspace asks with an ioctl of the file for what
//! it would do with pages of a page cache: a page migrates, goes to swap, or gets a memory error.

use crate::base::eopnotsupp;
use crate::bindings;
use crate::memory::Memory;
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
use kernel::ioctl::_IO;
use kernel::page::{
    Page,
    PAGE_SIZE, //
};
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};
use kernel::types::ForeignOwnable;

/// The store's registration, from the module's load to its unload; [`register`] and [`unregister`]
/// change it meanwhile.
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

/// Tells the kernel that hardware has reported an error in a page frame, as opposed to one that is
/// injected: until the machine's end. Sleeps. The errors are those of `memory_failure()`.
pub(crate) fn hard_error(pfn: usize) -> Result {
    // SAFETY: Takes any number.
    to_result(unsafe { bindings::memfile_store_hard_error(pfn) })
}

/// Pins a page of the memfd with descriptor `fd` for a device, and lets go of it. Sleeps. The errors
/// are those of `memfd_pin_folios()`, and `EUCLEAN` for a page that nobody has cleared.
pub(crate) fn pin(fd: u32) -> Result {
    // SAFETY: Takes any number.
    to_result(unsafe { bindings::memfile_store_pin(fd) })
}

/// A new file with an inode of its own and the page cache of the file with descriptor `fd`, which it
/// holds. Sleeps.
pub(crate) fn alias(fd: u32) -> Result<ARef<File>> {
    // SAFETY: Takes any number.
    let file = from_err_ptr(unsafe { bindings::memfile_store_alias(fd) })?;
    // SAFETY: The reference is ours.
    Ok(unsafe { ARef::from_raw(NonNull::new(file).ok_or(ENOMEM)?.cast()) })
}

/// The content of a page frame, by its address in the direct map, which may have none: `EFAULT`.
/// Sleeps. `EINVAL` if there is no such frame.
pub(crate) fn read_frame(pfn: usize) -> Result<KVec<u8>> {
    let mut content = KVec::from_elem(0u8, PAGE_SIZE, GFP_KERNEL)?;
    let to = content.as_mut_ptr().cast();
    // SAFETY: Takes any number, and there is room for a page, which nobody else uses.
    to_result(unsafe { bindings::memfile_store_read_frame(pfn, to) })?;
    Ok(content)
}

/// Unregisters the store. Sleeps. `EINVAL` if it is not registered.
pub(crate) fn unregister() -> Result {
    // SAFETY: Takes any pointer.
    to_result(unsafe { bindings::memfile_unregister_store(&STORE) })
}

static STORE: bindings::memfile_store = bindings::memfile_store {
    lookup: Some(lookup),
    get_page: Some(get_page),
    fallocate: Some(punch),
    set_flags: Some(set_flags),
    allocate_movable: Some(allocate_movable),
    leave_movable_areas: Some(leave_movable_areas),
    migrate_folio: Some(migrate_folio),
};

#[repr(transparent)]
struct Operations(bindings::file_operations);

// SAFETY: Never written to.
unsafe impl Sync for Operations {}

/// A file with these is one of ours.
static OPERATIONS: Operations = Operations(bindings::file_operations {
    owner: bindings::THIS_MODULE,
    release: Some(release),
    fallocate: Some(fallocate),
    show_fdinfo: Some(show_fdinfo),
    unlocked_ioctl: Some(ioctl),
    ..pin_init::zeroed()
});

/// The content of a file.
#[pin_data]
struct Body {
    node: Node,
    /// The size of the file in pages.
    end: usize,
    /// The core's requests to the store: flags, whether new pages may come from areas for movable
    /// memory, and how often pages had to leave these.
    flags: Atomic<u64>,
    movable: Atomic<u64>,
    left: Atomic<u64>,
    /// The errno with which requests for pages fail; 0 if they do not.
    failure: Atomic<u64>,
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
    /// Does `work` while no consumer maps `pages`, which is not empty. Sleeps.
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

/// A page of ours as the core needs it: a folio that is locked and has its index in the file.
///
/// # Invariants
///
/// `self` owns the lock of the folio and a reference to it.
struct Locked(NonNull<bindings::folio>);

impl Locked {
    /// Waits for the lock.
    ///
    /// # Safety
    ///
    /// `page` must be valid, and the caller hands a reference to it over.
    unsafe fn new(page: *mut bindings::page, index: usize) -> Result<Self> {
        // SAFETY: By the safety requirements.
        let folio = unsafe { bindings::memfile_store_lock(page, index) };
        // INVARIANT: It was just locked, and the reference is ours.
        Ok(Self(NonNull::new(folio).ok_or(EINVAL)?))
    }

    fn as_ptr(&self) -> *mut bindings::folio {
        self.0.as_ptr()
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // SAFETY: By the type invariant both are ours.
        unsafe { bindings::memfile_store_unlock(self.as_ptr()) };
    }
}

/// A new reference to a page.
fn get(page: &Page) -> *mut bindings::page {
    // SAFETY: The page is valid.
    unsafe { bindings::memfile_store_get_page(page.as_ptr()) };
    page.as_ptr()
}

impl Body {
    /// The page at `index`, locked. Sleeps.
    fn lock(&self, index: usize) -> Result<Locked> {
        let page = self.memory.with_existing(index, get)?;
        // SAFETY: `get()` has made the reference.
        unsafe { Locked::new(page, index) }
    }

    /// The page at `index` is to migrate. Sleeps.
    fn migrate(&self, mapping: *mut bindings::address_space, index: usize) -> Result {
        let (src, dst) = self
            .memory
            .prepare(index, |src, dst| (get(src), get(dst)))?;
        // SAFETY: `get()` has made the references.
        let (src, dst) = unsafe { (Locked::new(src, index), Locked::new(dst, index)) };
        let (src, dst) = (src?, dst?);
        // SAFETY: Both are locked; the mapping is that of the inode, by which `migrate_folio()` finds
        // us.
        let result = to_result(unsafe {
            bindings::memfile_node_migrate_folio(
                self.node.0.as_ptr(),
                mapping,
                dst.as_ptr(),
                src.as_ptr(),
                bindings::migrate_mode::SYNC,
            )
        });
        self.memory.stay(index);
        result
    }

    /// Have consumers used the page at `index` since the last call? Sleeps.
    fn referenced(&self, index: usize) -> Result<bool> {
        let folio = self.lock(index)?;
        // SAFETY: The node is valid, and the folio locked.
        Ok(unsafe { bindings::memfile_node_referenced(self.node.0.as_ptr(), folio.as_ptr()) })
    }

    /// The page at `index` goes to swap, or is `refused` there; the next request brings it back.
    /// Sleeps.
    fn write_out(&self, index: usize, refused: bool) -> Result {
        let folio = self.lock(index)?;
        let mut inv = bindings::memfile_invalidation::default();
        let (node, raw) = (self.node.0.as_ptr(), &raw mut inv);
        // SAFETY: The node is valid, the folio locked, and `inv` stays where it is.
        unsafe { bindings::memfile_node_writeout_start(node, raw, folio.as_ptr()) };
        // SAFETY: It was started.
        unsafe { bindings::memfile_node_invalidate_end(raw) };
        if refused {
            // SAFETY: As above.
            unsafe { bindings::memfile_node_writeout_undone(node, folio.as_ptr()) };
        }
        Ok(())
    }

    /// The page at `index` gets a memory error. Sleeps.
    fn break_page(&self, index: usize) -> Result {
        let folio = self.lock(index)?;
        self.memory.break_page(index)?;
        // SAFETY: The node is valid, and the folio locked.
        unsafe { bindings::memfile_node_error_folio(self.node.0.as_ptr(), folio.as_ptr()) };
        Ok(())
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
            flags: Atomic::new(0),
            movable: Atomic::new(0),
            failure: Atomic::new(0),
            left: Atomic::new(0),
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
    let body = unsafe { body(inode) };
    // SAFETY: The inode is valid by the safety requirements.
    let account = || unsafe { bindings::inode_add_bytes(inode, PAGE_SIZE as i64) };
    let page = match body.failure.load(Relaxed) {
        0 => body.memory.with_page(index, account, get),
        // CAST: FAIL takes an errno only.
        errno => Err(Error::from_errno(-(errno as c_int))),
    };
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

/// The other ioctls of this number are those of the device.
const MAGIC: u32 = b'M' as u32;

/// The largest errno that fits into a pointer.
const MAX_ERRNO: usize = 4095;

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
    // SAFETY: By the safety requirements of this function.
    let node = unsafe { body((*file).f_inode) }.node.0.as_ptr();
    // SAFETY: The node is that of the file's inode.
    unsafe { bindings::memfile_node_fallocate(node, file, mode, offset, len) }
}

/// # Safety
///
/// For C: `m` must be valid and used by nobody else, `file` as for [`fallocate`].
unsafe extern "C" fn show_fdinfo(m: *mut bindings::seq_file, file: *mut bindings::file) {
    // SAFETY: By the safety requirements of this function.
    let node = unsafe { body((*file).f_inode) }.node.0.as_ptr();
    // SAFETY: As above; the file keeps the node.
    unsafe { bindings::memfile_node_show_fdinfo(node, m) };
}

/// The page at this index migrates.
const MIGRATE: u32 = _IO(MAGIC, 4);
/// Has a consumer used the page at this index since the last call? 0 or 1.
const REFERENCED: u32 = _IO(MAGIC, 5);
/// The page at this index goes to swap.
const WRITE_OUT: u32 = _IO(MAGIC, 6);
/// Likewise, but swap refuses it.
const WRITE_OUT_REFUSED: u32 = _IO(MAGIC, 7);
/// The page at this index gets a memory error.
const BREAK: u32 = _IO(MAGIC, 8);
/// The core's requests: flags, 256 if new pages may come from areas for movable memory, and 512 for
/// each time that pages had to leave these.
const WANTED: u32 = _IO(MAGIC, 9);
/// Requests for pages of the file fail with this errno from now on, or do not if it is 0.
const FAIL: u32 = _IO(MAGIC, 10);

/// # Safety
///
/// For C: `file` must be ours and stay for the duration of the call.
unsafe extern "C" fn ioctl(file: *mut bindings::file, cmd: u32, arg: usize) -> c_long {
    from_result(|| {
        // SAFETY: By the safety requirements of this function.
        let (body, mapping) = unsafe { (body((*file).f_inode), (*file).f_mapping) };
        match cmd {
            MIGRATE => body.migrate(mapping, arg)?,
            REFERENCED => return Ok(c_long::from(body.referenced(arg)?)),
            WRITE_OUT | WRITE_OUT_REFUSED => body.write_out(arg, cmd == WRITE_OUT_REFUSED)?,
            BREAK => body.break_page(arg)?,
            FAIL if arg <= MAX_ERRNO => body.failure.store(arg as u64, Relaxed),
            WANTED => {
                let flags = body.flags.load(Relaxed);
                let rest = (body.movable.load(Relaxed) << 8) + (body.left.load(Relaxed) << 9);
                // CAST: Small numbers.
                return Ok((flags + rest) as c_long);
            }
            _ => return Err(ENOTTY),
        }
        Ok(0)
    })
}

/// Does `note` with the body of `inode`, if it has one yet.
///
/// # Safety
///
/// `inode` must be one of ours.
unsafe fn note(inode: *mut bindings::inode, note: impl FnOnce(&Body)) {
    // SAFETY: By the safety requirements. The core speaks to us before `create()` is done, too.
    if unsafe { !(*inode).i_private.is_null() } {
        // SAFETY: It has one.
        note(unsafe { body(inode) }.get_ref());
    }
}

/// # Safety
///
/// For C, as for [`note`].
unsafe extern "C" fn set_flags(inode: *mut bindings::inode, flags: usize) {
    // SAFETY: By the safety requirements of this function.
    unsafe { note(inode, |body| body.flags.store(flags as u64, Relaxed)) };
}

/// # Safety
///
/// For C, as for [`note`].
unsafe extern "C" fn allocate_movable(inode: *mut bindings::inode, movable: bool) {
    // SAFETY: By the safety requirements of this function.
    unsafe { note(inode, |body| body.movable.store(movable.into(), Relaxed)) };
}

/// None of our pages lies there, so this only counts.
///
/// # Safety
///
/// For C, as for [`note`].
unsafe extern "C" fn leave_movable_areas(inode: *mut bindings::inode) -> c_int {
    let count = |body: &Body| {
        body.left.fetch_add(1, Relaxed);
    };
    // SAFETY: By the safety requirements of this function.
    unsafe { note(inode, count) };
    0
}

/// # Safety
///
/// For C: `mapping` must be that of one of our files, `dst` and `src` be from [`Body::migrate`].
unsafe extern "C" fn migrate_folio(
    mapping: *mut bindings::address_space,
    dst: *mut bindings::folio,
    src: *mut bindings::folio,
    _mode: bindings::migrate_mode,
) -> c_int {
    from_result(|| {
        // SAFETY: By the safety requirements of this function.
        let (body, index) = unsafe { (body((*mapping).host), bindings::memfile_store_index(src)) };
        // A folio of one page is where its page is.
        let is_it = |from: &Page, to: &Page| {
            // SAFETY: By the safety requirements of this function.
            let references = unsafe { bindings::memfile_store_references(src) };
            // Ours and that of `Body::migrate()`: a consumer that has one may write to the page. It
            // gets none now.
            core::ptr::addr_eq(from.as_ptr(), src)
                && core::ptr::addr_eq(to.as_ptr(), dst)
                && references == 2
        };
        // SAFETY: By the safety requirements of this function.
        let copy = || unsafe { bindings::memfile_store_copy(dst, src) };
        body.memory.succeed(index, is_it, copy)?;
        Ok(0)
    })
}

/// # Safety
///
/// For C: `file` must be ours and stay for the duration of the call.
unsafe extern "C" fn punch(
    file: *mut bindings::file,
    mode: c_int,
    offset: i64,
    len: i64,
) -> c_long {
    from_result(|| {
        if mode != PUNCH {
            return Err(eopnotsupp());
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
