// SPDX-License-Identifier: GPL-2.0

//! KUnit's tests of the engine, and their helpers: a node on a shmem file that userspace cannot
//! see, and consumers that record their callbacks.
//!
//! They are the top layer because a consumer asks for further ranges as C does, through
//! [`crate::entry`]. The tests of the policy layer need no helpers and are in its own files.
//!
//! A test that fails ends its thread at once and frees nothing.

mod node;
mod pages;

use crate::abi::file::{
    AnyFile,
    File, //
};
use crate::abi::notifier::Notifier;
use crate::abi::shmem::ShmemInode;
use crate::bindings;
use crate::engine::node::Node;
use crate::entry::ops;
use crate::policy::range::PAGE_SHIFT;
use crate::store::AnyStore;
use core::cell::Cell;
use core::ptr::NonNull;
use kernel::container_of;
use kernel::error::from_err_ptr;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::types::Opaque;

/// A shmem file with a node.
///
/// # Invariants
///
/// `self` owns a reference to `file`, which `node` is for.
pub(crate) struct TestFile {
    /// Dropped first: the inode outlives it.
    node: Arc<Node>,
    file: Reference,
}

struct Reference(NonNull<bindings::file>);

impl Drop for Reference {
    fn drop(&mut self) {
        // SAFETY: `TestFile` owns the reference.
        unsafe { bindings::fput(self.0.as_ptr()) };
    }
}

impl TestFile {
    /// A file of `pages`, all of them holes. Sleeps.
    pub(crate) fn new(pages: u64) -> Result<Self> {
        // CAST: Small numbers.
        let size = (pages << PAGE_SHIFT) as i64;
        // SAFETY: The name is a C string.
        let file = from_err_ptr(unsafe {
            let name = c"memfile-kunit".as_char_ptr();
            bindings::shmem_file_setup(name, size, bindings::vma_flags_t::default())
        })?;
        let file = Reference(NonNull::new(file).ok_or(ENOMEM)?);
        // SAFETY: The file is valid, and has an inode.
        let inode = NonNull::new(unsafe { (*file.0.as_ptr()).f_inode }).ok_or(EINVAL)?;
        // SAFETY: It is one of shmem, and dropped after the node.
        let store = AnyStore::Shmem(unsafe { ShmemInode::new(inode) });
        let node = Node::new(store, false)?;
        // INVARIANT: The file was just made.
        Ok(Self { node, file })
    }

    /// Its node.
    pub(crate) fn node(&self) -> &Node {
        &self.node
    }

    /// The file.
    pub(crate) fn file(&self) -> Result<File> {
        // SAFETY: The file is valid by the type invariant.
        let file = unsafe { AnyFile::from_raw(self.file.0.as_ptr()) }.ok_or(EINVAL)?;
        // SAFETY: The node is for its inode, though shmem does not know that.
        Ok(unsafe { File::new(file, NonNull::from(self.node()).cast()) })
    }

    /// Binds `consumer`, which has no binding, to file pages from `pgoff` on.
    pub(crate) fn bind(
        &self,
        consumer: Pin<&TestConsumer<'_>>,
        flags: u64,
        pgoff: usize,
        nr_pages: usize,
    ) -> Result {
        let raw = consumer.notifier.get();
        // SAFETY: The notifier is valid, and nobody looks at it while it is not bound.
        unsafe {
            (*raw).pgoff = pgoff;
            (*raw).nr_pages = nr_pages;
        }
        // SAFETY: The consumer is pinned, and unbinds when it is dropped.
        let notifier = unsafe { Notifier::from_raw(raw) }.ok_or(EINVAL)?;
        let node = NonNull::from(self.node());
        self.node.bind(self.file()?, flags, notifier)?;
        consumer.bound.set(Some(node));
        Ok(())
    }
}

/// Kinds of callbacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Start,
    End,
    Young,
}

/// A callback: the consumer, the kind, the frames.
pub(crate) type Event = (char, Call, u64, u64);

/// The callbacks of consumers, in order.
pub(crate) struct Journal {
    events: [Cell<Option<Event>>; 32],
    len: Cell<usize>,
}

impl Journal {
    /// No callbacks.
    pub(crate) fn new() -> Self {
        Self {
            events: [const { Cell::new(None) }; 32],
            len: Cell::new(0),
        }
    }

    fn push(&self, event: Event) {
        if let Some(slot) = self.events.get(self.len.get()) {
            slot.set(Some(event));
        }
        self.len.set(self.len.get() + 1);
    }

    /// Are these all callbacks since the last time? Then forgets them.
    pub(crate) fn take(&self, wanted: &[Event]) -> bool {
        let callbacks = self.events.iter().map_while(Cell::take);
        let len = self.len.replace(0);
        let same = callbacks.eq(wanted.iter().copied());
        same && len == wanted.len()
    }
}

/// A consumer that writes into a journal. One thread only.
#[pin_data(PinnedDrop)]
pub(crate) struct TestConsumer<'a> {
    #[pin]
    notifier: Opaque<bindings::memfile_notifier>,
    journal: &'a Journal,
    name: char,
    /// Its answer when asked whether its pages are in use.
    pub(crate) young: Cell<bool>,
    /// The node that it is bound to; the test keeps it alive.
    bound: Cell<Option<NonNull<Node>>>,
}

impl<'a> TestConsumer<'a> {
    const OPS: bindings::memfile_notifier_ops = bindings::memfile_notifier_ops {
        invalidate_start: Some(Self::invalidate_start),
        invalidate_end: Some(Self::invalidate_end),
        test_clear_young: Some(Self::test_clear_young),
    };

    const NO_END: bindings::memfile_notifier_ops = bindings::memfile_notifier_ops {
        invalidate_end: None,
        ..Self::OPS
    };

    /// A mapper, or an observer, whose frames begin at `frame`.
    pub(crate) fn new(
        journal: &'a Journal,
        name: char,
        observer: bool,
        frame: u64,
    ) -> Result<Pin<KBox<Self>>> {
        let notifier = bindings::memfile_notifier {
            ops: &TestConsumer::<'static>::OPS,
            frame,
            observer,
            ..Default::default()
        };
        Self::with(journal, name, notifier)
    }

    /// A mapper whose bindings are called together with those of the same `context`.
    pub(crate) fn of_context(
        journal: &'a Journal,
        name: char,
        context: u64,
        frame: u64,
    ) -> Result<Pin<KBox<Self>>> {
        let notifier = bindings::memfile_notifier {
            ops: &TestConsumer::<'static>::OPS,
            frame,
            context,
            ..Default::default()
        };
        Self::with(journal, name, notifier)
    }

    /// A consumer that lacks a callback.
    pub(crate) fn incomplete(journal: &'a Journal) -> Result<Pin<KBox<Self>>> {
        let notifier = bindings::memfile_notifier {
            ops: &TestConsumer::<'static>::NO_END,
            ..Default::default()
        };
        Self::with(journal, '?', notifier)
    }

    fn with(
        journal: &'a Journal,
        name: char,
        notifier: bindings::memfile_notifier,
    ) -> Result<Pin<KBox<Self>>> {
        KBox::pin_init(
            pin_init!(Self {
                notifier: Opaque::new(notifier),
                journal,
                name,
                young: Cell::new(false),
                bound: Cell::new(None),
            }),
            GFP_KERNEL,
        )
    }

    /// Unbinds it, if it is bound.
    pub(crate) fn unbind(&self) {
        if let Some(node) = self.bound.take() {
            // SAFETY: The test keeps the node alive.
            let node = unsafe { node.as_ref() };
            // SAFETY: It is bound, hence pinned and valid.
            if let Some(notifier) = unsafe { Notifier::from_raw(self.notifier.get()) } {
                node.unbind(notifier);
            }
        }
    }

    /// # Safety
    ///
    /// `notifier` must be that of a `Self`.
    unsafe fn note(
        notifier: *mut bindings::memfile_notifier,
        call: Call,
        start: u64,
        end: u64,
    ) -> bool {
        let notifier = Opaque::cast_from(notifier).cast_mut();
        // SAFETY: By the safety requirements.
        let this = unsafe { &*container_of!(notifier, Self, notifier) };
        this.journal.push((this.name, call, start, end));
        this.young.get()
    }

    /// Notes `range` and those that follow it.
    ///
    /// # Safety
    ///
    /// As for a callback of `struct memfile_notifier_ops`, of notifiers that are those of a `Self`.
    unsafe fn note_all(
        inv: *mut bindings::memfile_invalidation,
        range: *mut bindings::memfile_range,
        call: Call,
    ) {
        loop {
            // SAFETY: By the safety requirements.
            let bindings::memfile_range {
                notifier,
                start,
                end,
            } = unsafe { range.read() };
            // SAFETY: As above.
            unsafe { Self::note(notifier, call, start, end) };
            // The core may not be registered, or be another one: ask the node.
            // SAFETY: As above.
            if !unsafe { ops::next_range(inv, range) } {
                return;
            }
        }
    }

    /// # Safety
    ///
    /// As for [`Self::note_all`].
    unsafe extern "C" fn invalidate_start(
        inv: *mut bindings::memfile_invalidation,
        range: *mut bindings::memfile_range,
    ) {
        // SAFETY: By the safety requirements.
        unsafe { Self::note_all(inv, range, Call::Start) };
    }

    /// # Safety
    ///
    /// As for [`Self::note_all`].
    unsafe extern "C" fn invalidate_end(
        inv: *mut bindings::memfile_invalidation,
        range: *mut bindings::memfile_range,
    ) {
        // SAFETY: By the safety requirements.
        unsafe { Self::note_all(inv, range, Call::End) };
    }

    /// # Safety
    ///
    /// As for [`Self::note`].
    unsafe extern "C" fn test_clear_young(
        notifier: *mut bindings::memfile_notifier,
        start: u64,
        end: u64,
    ) -> bool {
        // SAFETY: By the safety requirements.
        unsafe { Self::note(notifier, Call::Young, start, end) }
    }
}

#[pinned_drop]
impl PinnedDrop for TestConsumer<'_> {
    fn drop(self: Pin<&mut Self>) {
        self.unbind();
    }
}
