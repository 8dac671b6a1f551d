// SPDX-License-Identifier: GPL-2.0

//! Counters: `debugfs/memfile/counters` for all files since the module was loaded, and
//! `debugfs/memfile/files` for each file that exists.
//!
//! `counters` has one line per counter, `name value`; `files` has a line of names and one line of
//! values per file, oldest first, which begins with the inode number. The values are totals, never
//! reset. Each value is exact; together they are not a snapshot.
//!
//! An event costs an addition to a counter of its file. From the first page that a consumer asks
//! for, each CPU has counters of the file for itself, so that faults write no line that another CPU
//! writes; reading adds the counters up.

use crate::abi::debugfs::Show;
use crate::abi::folio::hidden_pages;
use crate::abi::lock::module_mutex;
use crate::abi::percpu::Counts;
use crate::abi::registry::{
    List,
    Listed, //
};
use kernel::prelude::*;
use kernel::seq_file::SeqFile;
use kernel::seq_print;
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};
use kernel::sync::GlobalLock;

macro_rules! events {
    ($($(#[$doc:meta])* $event:ident = $name:literal,)*) => {
        /// The events that are counted.
        #[derive(Clone, Copy)]
        pub(crate) enum Event {
            $($(#[$doc])* $event,)*
        }

        /// Their names, in the same order.
        const NAMES: &[&str] = &[$($name,)*];
    };
}

/// The sums of files that are gone.
static GONE: [Atomic<i64>; NAMES.len()] = [const { Atomic::new(0) }; NAMES.len()];

module_mutex! {
    /// The counters of the files that exist.
    static FILES: List<Counters> = List::new();
}

/// The counters of one file.
pub(crate) struct Counters {
    ino: u64,
    counts: Counts<{ NAMES.len() }>,
}

impl Counters {
    /// For the file with inode number `ino`.
    pub(crate) fn new(ino: u64) -> Self {
        Self {
            ino,
            counts: Counts::new(),
        }
    }

    /// Many CPUs may count from now on. Sleeps.
    #[inline(always)] // It runs at each fault.
    pub(crate) fn spread(&self) {
        self.counts.spread();
    }

    /// One more. Any context.
    pub(crate) fn count(&self, event: Event) {
        self.counts.add(event as usize, 1);
    }

    /// One less: the event was undone. Any context.
    pub(crate) fn uncount(&self, event: Event) {
        self.counts.add(event as usize, -1);
    }

    /// The value of each counter, in the order of [`NAMES`].
    fn values(&self) -> impl Iterator<Item = i64> + '_ {
        (0..NAMES.len()).map(|event| self.counts.sum(event))
    }
}

impl Listed for Counters {
    type Lock = FILES;

    fn list() -> &'static GlobalLock<FILES> {
        &FILES
    }

    fn leave(&self) {
        for (gone, value) in GONE.iter().zip(self.values()) {
            if value != 0 {
                gone.fetch_add(value, Relaxed);
            }
        }
    }
}

/// The file `counters`.
pub(crate) enum Totals {}

impl Show for Totals {
    const NAME: &'static CStr = c"counters";

    fn show(seq: &SeqFile) {
        let files = FILES.lock();
        let mut sums = [0i64; NAMES.len()];
        for (sum, gone) in sums.iter_mut().zip(&GONE) {
            *sum = gone.load(Relaxed);
        }
        for file in files.iter() {
            for (sum, value) in sums.iter_mut().zip(file.values()) {
                *sum = sum.wrapping_add(value);
            }
        }
        for (name, sum) in NAMES.iter().zip(sums) {
            seq_print!(seq, "{name} {sum}\n");
        }
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
        for name in NAMES {
            seq_print!(seq, " {name}");
        }
        seq_print!(seq, "\n");
        let files = FILES.lock();
        for file in files.iter() {
            seq_print!(seq, "{}", file.ino);
            for value in file.values() {
                seq_print!(seq, " {value}");
            }
            seq_print!(seq, "\n");
        }
    }
}

events! {
    /// Files made.
    Create = "create",
    /// Files gone.
    Destroy = "destroy",
    /// Notifiers registered, observers included.
    Bind = "bind",
    /// Notifiers unregistered.
    Unbind = "unbind",
    /// Pages returned to consumers.
    GetPfn = "get_pfn",
    /// Pages that were in swap, or on their way there: the consumer waits and asks again.
    GetPfnWait = "get_pfn_wait",
    /// Pages refused, for any reason.
    GetPfnError = "get_pfn_error",
    /// Page references released.
    PutPfn = "put_pfn",
    /// Invalidations, of any cause.
    Invalidate = "invalidate",
    /// Calls of fallocate() that asked for a hole.
    Punch = "punch",
    /// Among the invalidations: folios that migrated.
    Migrate = "migrate",
    /// Tries to migrate a folio that failed; refusals of files whose pages must not move are not
    /// counted.
    MigrateError = "migrate_error",
    /// Folios that went to swap, and that swap did not return.
    SwapOut = "swap_out",
    /// Folios that swap did not take: they came back at once.
    SwapOutUndone = "swap_out_undone",
    /// Folios that a consumer had used when reclaim, the idle bitmap or DAMON looked.
    Young = "young",
    /// Folios with a memory error.
    Poison = "poison",
}
