// SPDX-License-Identifier: GPL-2.0

//! The stand-in for `rust/engine/stats.rs`: counters without readers.

use crate::kernel::prelude::*;

pub(crate) struct Counter;

impl Counter {
    pub(crate) fn count(&self) {}
}

macro_rules! counters {
    ($($name:ident)*) => {
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)*
        }

        pub(crate) static COUNTERS: Counters = Counters { $($name: Counter,)* };
    };
}
counters! { create destroy bind unbind invalidate punch }

/// The counters of one file.
pub(crate) struct Entry;

impl Entry {
    pub(crate) fn new(_ino: u64) -> Result<Self> {
        Ok(Self)
    }
}

impl std::ops::Deref for Entry {
    type Target = Counters;

    fn deref(&self) -> &Counters {
        &COUNTERS
    }
}
