// SPDX-License-Identifier: GPL-2.0

//! A file is freed as early as possible: the task that waits in `drain()` for the last invalidation
//! goes on as soon as that releases the lock, and frees C's objects while the call has not returned
//! yet.
//!
//! This proves little without Miri, which knows how long each reference must be valid:
//! `SANITIZER=miri make proof`.

#![allow(unsafe_code, reason = "the node is held as C holds it")]

use crate::abi;
use crate::abi::invalidation::Invalidation;
use crate::engine::node::Node;
use crate::policy::range::Range;
use crate::stand_in::sync::{after_unlock, Arc};
use crate::store::AnyStore;
use std::cell::Cell;
use std::rc::Rc;

/// A file with a running invalidation, whose end lets C destroy the node.
fn last_invalidation() -> (*const Node, Invalidation, Rc<Cell<bool>>) {
    abi::reset();
    let node = Node::new(AnyStore::with_pages(8), false).expect("memory is there");
    let inv = Invalidation::new(None);
    node.invalidate_start(inv, Range::of(0, 8));
    let node = Arc::into_raw(node);
    let destroyed = Rc::new(Cell::new(false));
    after_unlock(Some(Rc::new({
        let destroyed = destroyed.clone();
        move || {
            if inv.scope().is_none() && !destroyed.replace(true) {
                // SAFETY: It came from `into_raw()`, and this is its end for C.
                unsafe { Arc::from_raw(node) }.drain();
            }
        }
    })));
    (node, inv, destroyed)
}

#[test]
fn node_stays_for_who_ends_the_last_invalidation() {
    let (node, inv, destroyed) = last_invalidation();
    // SAFETY: C still holds it, so it is valid.
    unsafe { Arc::increment_strong_count(node) };
    // SAFETY: The reference that the record has taken.
    let node = unsafe { Arc::from_raw(node) };
    node.invalidate_end(inv);
    after_unlock(None);
    assert!(destroyed.get());
}

/// An old bug: Miri must find it.
#[cfg(miri)]
#[test]
#[ignore = "undefined behaviour, for Miri"]
fn node_goes_while_it_is_borrowed() {
    let (node, inv, destroyed) = last_invalidation();
    // SAFETY: No: it is valid when this begins, and gone before it returns.
    unsafe { &*node }.invalidate_end(inv);
    after_unlock(None);
    assert!(destroyed.get());
}
