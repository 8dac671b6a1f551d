// SPDX-License-Identifier: GPL-2.0

//! The engine's own sources, and broken variants of them (see `build.rs`).

#![allow(unsafe_code, reason = "expanded from pin_init!")]

use crate::abi::inode::{File, Inode};
use crate::abi::notifier::Notifier;
use crate::abi::record::Record;
use crate::kernel::prelude::*;
use crate::kernel::sync::Arc;
use crate::policy::range::Range;

#[path = "../../engine/node.rs"]
pub(crate) mod node;

/// Counters that nobody reads.
pub(crate) mod stats {
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

    /// A file's own.
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
}

#[allow(warnings, reason = "they are wrong")]
pub(crate) mod mutants {
    use super::stats;
    include!(concat!(env!("OUT_DIR"), "/mutants.rs"));
}

/// What the checker needs of a node.
pub(crate) trait Protocol: Sized + 'static {
    fn new(inode: Inode) -> Arc<Self>;
    fn bind(&self, file: File, flags: u64, notifier: Notifier) -> Result;
    fn unbind(&self, notifier: Notifier);
    fn drain(&self);
    fn invalidate_start(&self, record: Record, pages: Range);
    fn invalidate_end(&self, record: Record);
    fn next_range(&self, record: Record, after: Notifier) -> Option<(Notifier, Range)>;
}

macro_rules! protocol {
    ($($path:path,)*) => {
        $(
            impl Protocol for $path {
                fn new(inode: Inode) -> Arc<Self> {
                    <$path>::new(inode, false).expect("memory is there")
                }

                fn bind(&self, file: File, flags: u64, notifier: Notifier) -> Result {
                    <$path>::bind(self, file, flags, notifier)
                }

                fn unbind(&self, notifier: Notifier) {
                    <$path>::unbind(self, notifier);
                }

                fn drain(&self) {
                    <$path>::drain(self);
                }

                fn invalidate_start(&self, record: Record, pages: Range) {
                    <$path>::invalidate_start(self, record, pages);
                }

                fn invalidate_end(&self, record: Record) {
                    <$path>::invalidate_end(self, record);
                }

                fn next_range(&self, record: Record, after: Notifier)
                    -> Option<(Notifier, Range)> {
                    <$path>::next_range(self, record, after)
                }
            }
        )*
    };
}

protocol! {
    node::Node,
    mutants::bind_does_not_wait::Node,
    mutants::unbind_does_not_wait::Node,
    mutants::the_newborn_hear_the_older::Node,
    mutants::the_dying_hear_the_younger::Node,
    mutants::nobody_is_woken::Node,
    mutants::woken_without_the_lock::Node,
    mutants::starts_are_not_called::Node,
    mutants::ends_are_not_called::Node,
    mutants::nothing_is_clipped::Node,
    mutants::exclusive_bindings_may_overlap::Node,
    mutants::each_binding_is_called_by_itself::Node,
    mutants::peers_are_left_out::Node,
}
