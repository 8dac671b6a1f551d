// SPDX-License-Identifier: GPL-2.0

//! What has happened since the module was loaded: `debugfs/memfile/counters`.
//!
//! One line per counter, `name value`. The values are totals, never reset. Each is exact by itself;
//! together they are not a snapshot.

use kernel::fmt;
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

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
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// All counters.
        pub(crate) struct Counters {
            $($(#[$doc])* pub(crate) $name: Counter,)*
        }

        /// The module's counters.
        pub(crate) static COUNTERS: Counters = Counters {
            $($name: Counter::new(),)*
        };

        /// Writes the lines of `counters`.
        pub(crate) fn show(_: &(), f: &mut fmt::Formatter<'_>) -> fmt::Result {
            $(writeln!(f, "{} {}", stringify!($name), COUNTERS.$name.0.load(Relaxed))?;)*
            Ok(())
        }
    };
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
    /// Folios that reclaim was allowed to swap out.
    swap_out,
    /// Swap-outs refused because a consumer had used the folio.
    young,
    /// Folios with a memory error.
    poison,
}
