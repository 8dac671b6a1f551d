// SPDX-License-Identifier: GPL-2.0

//! Allocations of a file whose pages may lie in areas for movable memory before it is bound, and
//! the binding that pins it: it moves pages, and waits for others, where there can be any.

use crate::abi::file::File;
use crate::abi::inode::Inode;
use crate::abi::notifier::{Consumer, Notifier, Ranges};
use crate::abi::task::KILLED;
use crate::engine::node::Node;
use crate::policy::flags::Flags;
use crate::policy::range::Range;
use crate::stand_in::sync::{while_waiting, Arc};
use crate::store::{AnyStore, MEANWHILE};
use crate::{abi, kernel::prelude::*};
use std::cell::Cell;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::rc::Rc;

const PAGES: u64 = 8;
const BYTES: i64 = 8 * 4096;
const FILE: File = File { writable: true };

struct Deaf;

impl Consumer for Deaf {
    fn invalidate_start(&self, _: Ranges) {}

    fn invalidate_end(&self, _: Ranges) {}

    fn test_clear_young(&self, _: Range) -> bool {
        false
    }
}

fn file() -> (Arc<Node>, Inode) {
    abi::reset();
    MEANWHILE.set(None);
    let store = AnyStore::with_pages_where_they_lie(PAGES);
    let inode = store.inode();
    (Node::new(store, false).expect("memory is there"), inode)
}

fn bind(node: &Node, observer: bool, flags: Flags) -> Result<Notifier> {
    let notifier = Notifier::new(0, PAGES, 0, observer, 0, Some(Rc::new(Deaf)));
    node.bind(FILE, u64::from(flags.bits()), notifier)?;
    Ok(notifier)
}

fn pinned() -> Flags {
    Flags::from_consumer(u64::from(Flags::PINNED)).expect("they are flags")
}

#[test]
fn untouched_file_is_pinned_at_once() {
    let (node, inode) = file();
    assert_eq!(inode.movable.get(), Some(true));
    bind(&node, false, pinned()).expect("bind");
    assert_eq!((inode.left.get(), inode.movable.get()), (0, Some(false)));
}

#[test]
fn file_that_was_allocated_leaves_areas_for_movable_memory() {
    let (node, inode) = file();
    node.fallocate(FILE, 0, 0, BYTES).expect("fallocate");
    bind(&node, false, pinned()).expect("bind");
    assert_eq!((inode.left.get(), inode.movable.get()), (1, Some(false)));
}

#[test]
fn file_with_an_observer_leaves_areas_for_movable_memory() {
    let (node, inode) = file();
    bind(&node, true, Flags::CREATION).expect("an observer");
    bind(&node, false, pinned()).expect("bind");
    assert_eq!(inode.left.get(), 1);
}

#[test]
fn hole_touches_nothing() {
    let (node, inode) = file();
    node.fallocate(FILE, 3, 0, BYTES).expect("punch");
    bind(&node, false, pinned()).expect("bind");
    assert_eq!(inode.left.get(), 0);
}

/// The binding comes while the pages are being allocated, and waits for the end of that.
#[test]
fn pinning_waits_for_an_allocation_under_way() {
    let (node, inode) = file();
    let waits = Rc::new(Cell::new(0));
    while_waiting(Some(Rc::new({
        let waits = waits.clone();
        move || {
            waits.set(waits.get() + 1);
            // Here the task would sleep; the allocation is on the same stack and cannot go on.
            panic!("it waits");
        }
    })));
    MEANWHILE.set(Some(Rc::new({
        let node = node.clone();
        move || {
            let early = catch_unwind(AssertUnwindSafe(|| bind(&node, false, pinned())));
            assert!(early.is_err(), "it did not wait");
        }
    })));
    node.fallocate(FILE, 0, 0, BYTES).expect("fallocate");
    MEANWHILE.set(None);
    while_waiting(None);
    assert_eq!((waits.get(), inode.left.get()), (1, 0));
    bind(&node, false, pinned()).expect("bind");
    assert_eq!(inode.left.get(), 1);
}

/// Others migrate a page each time that the binding has the file leave areas for movable memory,
/// `times` times; then comes the signal, if `kill` says so.
fn others_migrate(node: &Arc<Node>, inode: &Inode, times: u32, kill: bool) {
    let (node, left) = (node.clone(), inode.clone());
    inode.leaving.replace(Some(Rc::new(move || {
        if left.left.get() <= times {
            let page = Range::new(0, 1).expect("a page");
            node.migrate(page, || ()).expect("it may still move");
            KILLED.set(kill && left.left.get() == times);
        }
    })));
}

#[test]
fn pinning_looks_again_as_long_as_others_migrate() {
    let (node, inode) = file();
    node.fallocate(FILE, 0, 0, BYTES).expect("fallocate");
    others_migrate(&node, &inode, 3, false);
    bind(&node, false, pinned()).expect("bind");
    assert_eq!((inode.left.get(), inode.movable.get()), (4, Some(false)));
    inode.leaving.take();
}

#[test]
fn pinning_that_looks_again_ends_when_it_is_killed() {
    let (node, inode) = file();
    node.fallocate(FILE, 0, 0, BYTES).expect("fallocate");
    others_migrate(&node, &inode, 3, true);
    assert_eq!(bind(&node, false, pinned()).err(), Some(EINTR));
    assert_eq!((inode.left.get(), inode.movable.get()), (3, Some(true)));
    // Another task is as welcome as before.
    KILLED.set(false);
    inode.leaving.take();
    bind(&node, false, pinned()).expect("bind");
    assert_eq!((inode.left.get(), inode.movable.get()), (4, Some(false)));
}

/// The file has no page yet, and those that are on their way may be hidden: the binding that would
/// have them in the direct map waits, but not when it is killed.
#[test]
fn binding_that_waits_for_allocations_ends_when_it_is_killed() {
    let (node, inode) = file();
    let hidden = Flags::from_consumer(u64::from(Flags::PINNED | Flags::KERNEL_INACCESSIBLE));
    let first = bind(&node, false, hidden.expect("they are flags")).expect("bind");
    node.unbind(first);
    let waits = Rc::new(Cell::new(0));
    while_waiting(Some(Rc::new({
        let waits = waits.clone();
        move || {
            waits.set(waits.get() + 1);
            KILLED.set(waits.get() == 3);
        }
    })));
    MEANWHILE.set(Some(Rc::new({
        let node = node.clone();
        move || assert_eq!(bind(&node, false, pinned()).err(), Some(EINTR))
    })));
    node.fallocate(FILE, 0, 0, BYTES).expect("fallocate");
    MEANWHILE.set(None);
    while_waiting(None);
    assert_eq!(waits.get(), 3);
    assert!(inode.flags.get().is_some_and(Flags::kernel_inaccessible));
    KILLED.set(false);
    bind(&node, false, pinned()).expect("bind");
    assert!(!inode.flags.get().is_some_and(Flags::kernel_inaccessible));
}
