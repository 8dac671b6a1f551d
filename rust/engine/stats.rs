// SPDX-License-Identifier: GPL-2.0

//! Counters: `debugfs/memfile/counters` for all files since the module was loaded, and
//! `debugfs/memfile/files` for each file that exists.
//!
//! `counters` has one line per counter, `name value`; `files` has a line of names and one line of
//! values per file, oldest first, which begins with the inode number. The values are totals, never
//! reset. Each value is exact; together they are not a snapshot.
//!
//! An event costs one atomic addition to a counter of its file; reading adds the counters up.

use crate::abi::debugfs::Show;
use crate::abi::folio::hidden_pages;
use crate::abi::lock::module_mutex;
use core::ops::Deref;
use kernel::prelude::*;
use kernel::rbtree::{
    RBTree,
    RBTreeNode, //
};
use kernel::seq_file::SeqFile;
use kernel::seq_print;
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};
use kernel::sync::Arc;

/// Counts one kind of event. Any context.
pub(crate) struct Counter(Atomic<i64>);

impl Counter {
    const fn new() -> Self {
        Self(Atomic::new(0))
    }

    /// One more.
    pub(crate) fn count(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    /// One less: the event was undone.
    pub(crate) fn uncount(&self) {
        self.0.fetch_add(-1, Relaxed);
    }

    fn add(&self, other: &Self) {
        self.0.fetch_add(other.0.load(Relaxed), Relaxed);
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// All counters of a file.
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: Counter,)*
        }

        impl Counters {
            const fn new() -> Self {
                Self { $($name: Counter::new(),)* }
            }

            fn add(&self, other: &Self) {
                $(self.$name.add(&other.$name);)*
            }

            /// Each name and its value.
            fn each(&self, mut f: impl FnMut(&str, i64)) {
                $(f(stringify!($name), self.$name.0.load(Relaxed));)*
            }
        }
    };
}

/// The sums of files that are gone.
static GONE: Counters = Counters::new();

/// Numbers the files.
static SERIAL: Atomic<i64> = Atomic::new(0);

/// The counters of one file, and its numbers.
pub(crate) struct File {
    serial: i64,
    ino: u64,
    counters: Counters,
}

/// The files that exist, by age.
pub(crate) struct Files(Option<RBTree<i64, Arc<File>>>);

impl Files {
    /// None.
    const fn new() -> Self {
        Self(None)
    }

    fn iter(&self) -> impl Iterator<Item = &File> {
        self.0.iter().flat_map(RBTree::values).map(Deref::deref)
    }
}

module_mutex! {
    /// The files that exist.
    static FILES: Files = Files::new();
}

/// A file's entry in [`Files`], removed when it is dropped. Dropping sleeps.
pub(crate) struct Entry(Arc<File>);

impl Entry {
    /// For the file with inode number `ino`. Sleeps.
    pub(crate) fn new(ino: u64) -> Result<Self> {
        let file = File {
            serial: SERIAL.fetch_add(1, Relaxed),
            ino,
            counters: Counters::new(),
        };
        let file = Arc::new(file, GFP_KERNEL)?;
        // Not under the lock: allocation may reclaim, and eviction takes the lock.
        let node = RBTreeNode::new(file.serial, file.clone(), GFP_KERNEL)?;
        let mut files = FILES.lock();
        files.0.get_or_insert_with(RBTree::new).insert(node);
        Ok(Self(file))
    }
}

impl Deref for Entry {
    type Target = Counters;

    fn deref(&self) -> &Counters {
        &self.0.counters
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut files = FILES.lock();
        let node = files
            .0
            .as_mut()
            .and_then(|files| files.remove_node(&self.0.serial));
        // Under the lock, so that a reader finds the counts in exactly one of the two places.
        GONE.add(&self.0.counters);
        drop(files);
        drop(node);
    }
}

/// The file `counters`.
pub(crate) enum Totals {}

impl Show for Totals {
    const NAME: &'static CStr = c"counters";

    fn show(seq: &SeqFile) {
        let total = Counters::new();
        let files = FILES.lock();
        total.add(&GONE);
        for file in files.iter() {
            total.add(&file.counters);
        }
        drop(files);
        total.each(|name, value| seq_print!(seq, "{name} {value}\n"));
    }
}

/// The file `hidden`: how many pages of all files are out of the kernel's direct map.
pub(crate) enum Hidden {}

impl Show for Hidden {
    const NAME: &'static CStr = c"hidden";

    fn show(seq: &SeqFile) {
        seq_print!(seq, "{}\n", hidden_pages());
    }
}

/// The file `files`.
pub(crate) enum Each {}

impl Show for Each {
    const NAME: &'static CStr = c"files";

    fn show(seq: &SeqFile) {
        seq_print!(seq, "ino");
        GONE.each(|name, _| seq_print!(seq, " {name}"));
        seq_print!(seq, "\n");
        let files = FILES.lock();
        for file in files.iter() {
            seq_print!(seq, "{}", file.ino);
            file.counters.each(|_, value| seq_print!(seq, " {value}"));
            seq_print!(seq, "\n");
        }
    }
}

counters! {
    /// Files made.
    create,
    /// Files gone.
    destroy,
    /// Notifiers registered, observers included.
    bind,
    /// Notifiers unregistered.
    unbind,
    /// Pages given to consumers.
    get_pfn,
    /// Pages that were in swap, or on their way there: the consumer waits and asks again.
    get_pfn_wait,
    /// Pages refused, for any reason.
    get_pfn_error,
    /// References to pages given back.
    put_pfn,
    /// Invalidations, of any cause.
    invalidate,
    /// Among them: holes punched.
    punch,
    /// Among them: folios that migrated.
    migrate,
    /// Folios whose migration was refused or failed.
    migrate_error,
    /// Folios that went to swap, and were not given back by it.
    swap_out,
    /// Folios that swap did not take: they came back at once.
    swap_out_undone,
    /// Swap-outs refused because a consumer had used the folio.
    young,
    /// Folios with a memory error.
    poison,
}
