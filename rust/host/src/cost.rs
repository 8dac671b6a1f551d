// SPDX-License-Identifier: GPL-2.0

//! How often an invalidation looks into trees and maps, by the bindings that it calls.

use crate::abi;
use crate::abi::file::File;
use crate::abi::invalidation::Invalidation;
use crate::abi::notifier::{Consumer, Notifier, Ranges, LOOKS};
use crate::engine::node::Node;
use crate::policy::range::Range;
use crate::store::AnyStore;
use std::cell::Cell;
use std::rc::Rc;

/// A consumer that counts its ranges.
struct Counter(Rc<Cell<usize>>);

impl Consumer for Counter {
    fn invalidate_start(&self, ranges: Ranges) {
        self.0.set(self.0.get() + ranges.count());
    }

    fn invalidate_end(&self, ranges: Ranges) {
        self.0.set(self.0.get() + ranges.count());
    }

    fn test_clear_young(&self, _: Range) -> bool {
        false
    }
}

/// The look-ups of a hole in a file of one binding for each page, whose contexts these are, and
/// which are made in this order of pages.
fn looks(contexts: &[u64], order: impl Iterator<Item = u64>) -> usize {
    abi::reset();
    let pages = contexts.len() as u64;
    let node = Node::new(AnyStore::with_pages(pages), false).expect("memory is there");
    let ranges = Rc::new(Cell::new(0));
    for page in order {
        let counter = Rc::new(Counter(ranges.clone()));
        let context = contexts[page as usize];
        let notifier = Notifier::new(page, 1, page, false, context, Some(counter));
        node.bind(File { writable: true }, 7, notifier)
            .expect("it may bind");
    }
    let next_range = node.clone();
    let next_range = move |inv, after| next_range.next_range(inv, after);
    let inv = Invalidation::new(Some(Rc::new(next_range)));
    LOOKS.set(0);
    node.invalidate_start(inv, Range::of(0, pages));
    node.invalidate_end(inv);
    assert_eq!(
        ranges.get(),
        2 * contexts.len(),
        "each is called at start and end"
    );
    LOOKS.get()
}

/// Each binding may be looked at this often.
const AT_MOST: usize = 12;

fn check(contexts: &[u64]) {
    let (n, pages) = (contexts.len(), contexts.len() as u64);
    for looks in [looks(contexts, 0..pages), looks(contexts, (0..pages).rev())] {
        assert!(looks <= AT_MOST * n, "{looks} look-ups for {n} bindings");
    }
}

#[test]
fn a_hole_looks_at_each_binding_a_few_times() {
    const N: u64 = 200;
    let of = |f: fn(u64) -> u64| (0..N).map(f).collect::<Vec<_>>();
    check(&of(|_| 1));
    // Without a context.
    check(&of(|_| 0));
    // Two VMs with a half each, and in turns.
    check(&of(|n| 1 + n / (N / 2)));
    check(&of(|n| 1 + n % 2));
    // A VM for each page.
    check(&of(|n| 1 + n));
    // One, then two others in turns.
    check(&of(|n| if n < N / 2 { 1 } else { 2 + n % 2 }));
    // Few that are spread among many.
    check(&of(|n| if n % 10 == 0 { 1 + n / 50 } else { 9 }));
}
