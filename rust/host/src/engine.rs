// SPDX-License-Identifier: GPL-2.0

//! The engine's own sources, and broken variants of them (see `build.rs`).

#![allow(unsafe_code, reason = "expanded from pin_init!")]

use crate::abi::file::File;
use crate::abi::invalidation::Invalidation;
use crate::abi::notifier::Notifier;
use crate::kernel::prelude::*;
use crate::kernel::sync::Arc;
use crate::policy::range::Range;
use crate::store::AnyStore;

#[path = "../../engine/node.rs"]
pub(crate) mod node;

pub(crate) mod stats;

#[allow(warnings, reason = "they are wrong")]
pub(crate) mod mutants {
    use super::stats;
    include!(concat!(env!("OUT_DIR"), "/mutants.rs"));
}

/// The functions of a node that the checker uses.
pub(crate) trait Protocol: Sized + 'static {
    fn new(store: AnyStore) -> Arc<Self>;
    fn bind(&self, file: File, flags: u64, notifier: Notifier) -> Result;
    fn unbind(&self, notifier: Notifier);
    fn drain(&self);
    fn invalidate_start(&self, inv: Invalidation, pages: Range);
    fn invalidate_end(&self, inv: Invalidation);
    fn next_range(&self, inv: Invalidation, after: Notifier) -> Option<(Notifier, Range)>;
}

macro_rules! protocol {
    ($($path:path,)*) => {
        $(
            impl Protocol for $path {
                fn new(store: AnyStore) -> Arc<Self> {
                    <$path>::new(store, false).expect("memory is there")
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

                fn invalidate_start(&self, inv: Invalidation, pages: Range) {
                    <$path>::invalidate_start(self, inv, pages);
                }

                fn invalidate_end(&self, inv: Invalidation) {
                    <$path>::invalidate_end(self, inv);
                }

                fn next_range(&self, inv: Invalidation, after: Notifier)
                    -> Option<(Notifier, Range)> {
                    <$path>::next_range(self, inv, after)
                }
            }
        )*
    };
}

protocol! {
    node::Node,
    mutants::bind_does_not_wait::Node,
    mutants::unbind_does_not_wait::Node,
    mutants::new_bindings_are_called_by_the_older::Node,
    mutants::dead_bindings_are_called_by_the_younger::Node,
    mutants::nobody_is_woken::Node,
    mutants::woken_without_the_lock::Node,
    mutants::starts_are_not_called::Node,
    mutants::ends_are_not_called::Node,
    mutants::nothing_is_clipped::Node,
    mutants::exclusive_bindings_may_overlap::Node,
    mutants::each_binding_is_called_by_itself::Node,
    mutants::peers_are_left_out::Node,
}
