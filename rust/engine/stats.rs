// SPDX-License-Identifier: GPL-2.0

//! What has happened: `debugfs/memfile/counters` since the module was loaded, to all files, and
//! `debugfs/memfile/files` to each file that there is.
//!
//! `counters` has one line per counter, `name value`; `files` has a line of names and one line of
//! values per file, oldest first, which begins with the inode number. The values are totals, never
//! reset. Each is exact by itself; together they are not a snapshot.
//!
//! An event costs one atomic addition to a counter of its file, whoever looks or not; reading adds
//! up.

use crate::abi::debugfs::Show;
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

    /// One less: what was counted did not last.
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

/// What happened to files that are gone.
static GONE: Counters = Counters::new();

/// Numbers the files.
static SERIAL: Atomic<i64> = Atomic::new(0);

/// The counters of one file, and what it is known by.
pub(crate) struct File {
    serial: i64,
    ino: u64,
    counters: Counters,
}

/// The files that there are, by age.
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
    /// The files that there are.
    static FILES: Files = Files::new();
}

/// A file's place among [`Files`], until it is dropped. Sleeps then.
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
        // Under the lock, so that a reader finds them in one of the two places.
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
    /// Pages that were in swap, or on their way there: the consumer waited and asked again.
    get_pfn_wait,
    /// Pages refused, for whatever reason.
    get_pfn_error,
    /// References to pages given back.
    put_pfn,
    /// Invalidations, of whatever cause.
    invalidate,
    /// Among them: holes punched.
    punch,
    /// Among them: folios that migrated.
    migrate,
    /// Folios that were asked to migrate and did not.
    migrate_error,
    /// Folios that left for swap, and did not come back as they were.
    swap_out,
    /// Folios that left for swap, which did not take them: they came back at once.
    swap_out_undone,
    /// Swap-outs refused because a consumer had used the folio.
    young,
    /// Folios with a memory error.
    poison,
}
