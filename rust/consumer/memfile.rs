// SPDX-License-Identifier: GPL-2.0

//! Memfiles for drivers: bind pages of one, get them, and unmap them when they go away.
//!
//! This is what `kernel::memfile` would be in the kernel's tree. It is no part of memfile.ko. It
//! uses the same interface as KVM, `include/linux/memfile.h`, and nothing of the module behind it.
//! A module takes it in with `#[path]`, beside `crate::bindings`, as `rust/test/memfile_test.rs`
//! does.
//!
//! A driver implements the callbacks in a [`Consumer`], and binds pages as
//!
//! * a [`Mapper`], which has pages to itself and may ask for them, or as
//! * an [`Observer`], which only gets the callbacks.
//!
//! Only this protocol protects a page that a driver has mapped (rule 13): a [`Page`] is a reference
//! for the moment of mapping, and does not keep a page in its file.
//!
//! C header: [`include/linux/memfile.h`](srctree/include/linux/memfile.h)
//!
//! # Example
//!
//! A device whose table is filled on demand. (The file is a part of the test module: it is
//! compiled, and the suite `consumer` tests its promises.)
//!
#![doc = concat!("```ignore\n", include_str!("../test/example.rs"), "```")]

use crate::bindings;
use core::marker::PhantomData;
use core::ops::Range;
use kernel::container_of;
use kernel::error::to_result;
use kernel::fs::LocalFile;
use kernel::prelude::*;
use kernel::types::Opaque;

/// The callbacks of a driver for pages of its binding.
///
/// Frames are the driver's own numbers for the pages, see [`Span`], already clipped to the binding.
/// Each [`Self::invalidate_start`] is followed by one [`Self::invalidate_end`] with the same
/// frames; several invalidations may be running at once, on several CPUs.
///
/// A memory error is an invalidation like any other; the next request for the page fails with
/// `EHWPOISON`.
///
/// # Context
///
/// The callbacks may sleep, but they can run inside of reclaim and with a folio lock held: they
/// must not allocate, and must not take a sleeping lock whose holder may allocate or wait for a
/// folio. They must not register or unregister anything for the same file, which would wait for
/// themselves.
pub(crate) trait Consumer: Send + Sync + 'static {
    /// Unmap `frames`, flush the TLBs before giving up the lock under which they were unmapped, and
    /// map none of them again before the matching [`Self::invalidate_end`].
    fn invalidate_start(&self, frames: Range<u64>);

    /// The pages are gone or replaced; `frames` may be mapped again.
    fn invalidate_end(&self, frames: Range<u64>);

    /// Have any of `frames` been used since the last call? Pages in use are not swapped out.
    fn test_clear_young(&self, _frames: Range<u64>) -> bool {
        false
    }
}

/// The span of a binding: file pages `[pgoff, pgoff + nr_pages)` are the driver's frames from
/// `frame` on.
#[derive(Clone, Copy)]
pub(crate) struct Span {
    /// First page of the file.
    pub(crate) pgoff: u64,
    /// Number of pages.
    pub(crate) nr_pages: u64,
    /// The driver's frame for the first one.
    pub(crate) frame: u64,
}

/// `MEMFILE_F_*`: the promises that the driver wants for the pages.
///
/// A later mapper may ask for more, and for less only while the file has no page and no binding.
#[derive(Clone, Copy)]
pub(crate) struct Flags(u64);

impl Flags {
    /// Flags from any bits. Registration refuses those that do not exist.
    pub(crate) fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

/// Marks a binding that has its pages to itself.
pub(crate) enum Maps {}

/// Marks a binding of an observer.
pub(crate) enum Listens {}

/// A binding whose pages no other mapper may bind, and which may ask for them.
pub(crate) type Mapper<T> = Binding<T, Maps>;

/// A binding that only gets the callbacks, and may overlap any other.
pub(crate) type Observer<T> = Binding<T, Listens>;

/// The binding of a consumer: the notifier is registered from its creation to its end.
///
/// It holds the file open. Dropping it waits for running callbacks, and none starts after that; it
/// sleeps, and must not happen in a callback.
///
/// Its owner must drop it before the module is unloaded. That holds for all that is in the module's
/// own structure or behind its open files.
///
/// # Invariants
///
/// `notifier` is registered, and its ops are [`Binding::OPS`].
#[pin_data(PinnedDrop)]
pub(crate) struct Binding<T: Consumer, M> {
    #[pin]
    consumer: T,
    #[pin]
    notifier: Opaque<bindings::memfile_notifier>,
    _mode: PhantomData<M>,
}

// SAFETY: Neither the notifier nor a `Consumer` depends on the thread.
unsafe impl<T: Consumer, M> Send for Binding<T, M> {}
// SAFETY: Only the core changes the notifier, under its lock; a `Consumer` is `Sync`.
unsafe impl<T: Consumer, M> Sync for Binding<T, M> {}

impl<T: Consumer> Mapper<T> {
    /// Registers. Sleeps; waits for invalidations of the same pages that began earlier.
    ///
    /// Errors: `EINVAL` if `file` is no memfile, `span` is empty or reaches past its end, or
    /// `flags` are weaker than those of the file; `EACCES` if it is not open for writing; `EEXIST`
    /// if another mapper has any of the pages; `EPERM` if the file is for one VM; `ENOMEM`; `EBUSY` if
    /// somebody else holds a page that has to move; `EINTR` if a fatal signal has come.
    pub(crate) fn new<'a>(
        file: &'a LocalFile,
        span: Span,
        flags: Flags,
        consumer: impl PinInit<T, Error> + 'a,
    ) -> impl PinInit<Self, Error> + 'a {
        Self::register(file, span, false, flags, consumer)
    }

    /// The page behind `frame`, allocated and zeroed if there is none. Sleeps, waits for a page that
    /// is in swap, and may take folio locks: not in a callback.
    ///
    /// Before it is mapped, the driver must find that no invalidation of `frame` has begun since
    /// before this call; see the example of this module.
    ///
    /// Errors: `EINVAL` outside of the binding, `ENOMEM`, `ENOSPC`, `EHWPOISON`, `EIO`; `EINTR` if a
    /// signal came while it waited.
    pub(crate) fn get_pfn(&self, frame: u64) -> Result<Page<'_>> {
        let notifier = self.notifier.get();
        let mut raw = bindings::memfile_pfn::default();
        // SAFETY: By the type invariant the notifier is registered, so its store is set, and stays.
        let get_pfn = unsafe { (*(*notifier).bs).get_pfn }.ok_or(EINVAL)?;
        loop {
            // SAFETY: The notifier is registered, and `raw` may be written to.
            match to_result(unsafe { get_pfn(notifier, frame, &mut raw) }) {
                Ok(()) => break,
                // SAFETY: `raw` names the page that is not there yet.
                Err(EAGAIN) => to_result(unsafe {
                    bindings::memfile_wait_pfn(&mut raw, kernel::bindings::TASK_INTERRUPTIBLE)
                })?,
                Err(err) => return Err(err),
            }
        }
        // INVARIANT: The call above has returned it.
        Ok(Page {
            notifier: &self.notifier,
            raw,
        })
    }
}

impl<T: Consumer> Observer<T> {
    /// Registers. Sleeps; waits for invalidations of the same pages that began earlier.
    ///
    /// Errors: `EINVAL` if `file` is no memfile, or `span` is empty or reaches past its end.
    pub(crate) fn new<'a>(
        file: &'a LocalFile,
        span: Span,
        consumer: impl PinInit<T, Error> + 'a,
    ) -> impl PinInit<Self, Error> + 'a {
        Self::register(file, span, true, Flags(0), consumer)
    }
}

impl<T: Consumer, M: 'static> Binding<T, M> {
    const OPS: bindings::memfile_notifier_ops = bindings::memfile_notifier_ops {
        invalidate_start: Some(Self::invalidate_start),
        invalidate_end: Some(Self::invalidate_end),
        test_clear_young: Some(Self::test_clear_young),
    };

    fn register<'a>(
        file: &'a LocalFile,
        span: Span,
        observer: bool,
        flags: Flags,
        consumer: impl PinInit<T, Error> + 'a,
    ) -> impl PinInit<Self, Error> + 'a {
        let notifier = bindings::memfile_notifier {
            ops: &Self::OPS,
            // CAST: Page offsets and flags are as wide on 64 bits.
            pgoff: span.pgoff as usize,
            nr_pages: span.nr_pages as usize,
            frame: span.frame,
            observer,
            ..Default::default()
        };
        // INVARIANT: The last step registers.
        try_pin_init!(&this in Self {
            consumer <- consumer,
            notifier: Opaque::new(notifier),
            _mode: PhantomData,
            _: {
                // SAFETY: `this` is being initialised, so the field may be projected to.
                let notifier = Opaque::cast_into(unsafe { &raw const (*this.as_ptr()).notifier });
                // SAFETY: The file is valid as long as its reference. All fields are initialised,
                // so callbacks may run from here on; they end in `drop()`, and `this` is pinned.
                to_result(unsafe {
                    bindings::memfile_register_notifier(file.as_ptr(), flags.0 as usize, notifier)
                })?;
            },
        }? Error)
    }

    /// The driver's part.
    pub(crate) fn consumer(&self) -> &T {
        &self.consumer
    }

    /// # Safety
    ///
    /// `notifier` must be that of a `Self` which lives as long as `'a`.
    unsafe fn from_notifier<'a>(notifier: *mut bindings::memfile_notifier) -> &'a T {
        let notifier = Opaque::cast_from(notifier).cast_mut();
        // SAFETY: By the safety requirements. Only the consumer is looked at: the binding
        // around it may not be complete yet.
        unsafe { &(*container_of!(notifier, Self, notifier)).consumer }
    }

    /// # Safety
    ///
    /// For C, on a range of a notifier with [`Self::OPS`], between its registration and the end of
    /// its unregistration. The notifier has a context of its own, so there are no other ranges.
    unsafe extern "C" fn invalidate_start(
        _inv: *mut bindings::memfile_invalidation,
        range: *mut bindings::memfile_range,
    ) {
        // SAFETY: By the safety requirements.
        let range = unsafe { &*range };
        // SAFETY: As above; `drop()` waits for the end of this call.
        unsafe { Self::from_notifier(range.notifier) }.invalidate_start(range.start..range.end);
    }

    /// # Safety
    ///
    /// As for [`Self::invalidate_start`].
    unsafe extern "C" fn invalidate_end(
        _inv: *mut bindings::memfile_invalidation,
        range: *mut bindings::memfile_range,
    ) {
        // SAFETY: By the safety requirements.
        let range = unsafe { &*range };
        // SAFETY: As in `invalidate_start()`.
        unsafe { Self::from_notifier(range.notifier) }.invalidate_end(range.start..range.end);
    }

    /// # Safety
    ///
    /// For C, as for [`Self::invalidate_start`].
    unsafe extern "C" fn test_clear_young(
        notifier: *mut bindings::memfile_notifier,
        start: u64,
        end: u64,
    ) -> bool {
        // SAFETY: As in `invalidate_start()`.
        unsafe { Self::from_notifier(notifier) }.test_clear_young(start..end)
    }
}

#[pinned_drop]
impl<T: Consumer, M> PinnedDrop for Binding<T, M> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant it is registered. No callback runs after this.
        unsafe { bindings::memfile_unregister_notifier(self.notifier.get()) };
    }
}

/// A page that a mapper got, with a reference that dropping it releases.
///
/// To be dropped once the page is mapped, or will not be mapped.
///
/// # Invariants
///
/// `raw` comes from the store of `notifier`, which is registered, and was not released.
pub(crate) struct Page<'a> {
    notifier: &'a Opaque<bindings::memfile_notifier>,
    raw: bindings::memfile_pfn,
}

impl Page<'_> {
    /// Its frame number in memory.
    pub(crate) fn pfn(&self) -> u64 {
        // CAST: As wide on 64 bits.
        self.raw.pfn as u64
    }

    /// The largest order at which it may be mapped: that many frames around the requested one, in
    /// their natural alignment, are contiguous in memory and are bound.
    pub(crate) fn order(&self) -> u32 {
        self.raw.order
    }
}

impl Drop for Page<'_> {
    /// Does not sleep.
    fn drop(&mut self) {
        let notifier = self.notifier.get();
        // SAFETY: By the type invariant the notifier is registered, so its store is set.
        if let Some(put_pfn) = unsafe { (*(*notifier).bs).put_pfn } {
            // SAFETY: By the type invariant, and this is the only time.
            unsafe { put_pfn(notifier, &self.raw) };
        }
    }
}
