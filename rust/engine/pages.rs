// SPDX-License-Identifier: GPL-2.0

//! The pages of a file: how a consumer gets one, and how the memory management moves, reclaims and
//! removes them. The same for all stores.

use super::node::Node;
use super::stats::Event;
use crate::abi::allocation::Allocation;
use crate::abi::base::{
    ehwpoison,
    eopnotsupp, //
};
use crate::abi::file::File;
use crate::abi::folio::{
    Found,
    Looked,
    Migration,
    Poison, //
};
use crate::abi::invalidation::Invalidation;
use crate::abi::trace;
use crate::policy::range::{
    Range,
    Span, //
};
use crate::store::{
    Page,
    Store, //
};
use kernel::prelude::*;

/// The page behind the consumer's `frame`, with its index in the file and what the consumer may know
/// of it: the order is the largest at which it may map around the page (rules 10 to 12). `S` is the
/// store of the node, `file` one of its inode. Sleeps.
///
/// The store keeps the page in its place until the caller hands it on; after that the notifier
/// protocol protects the consumer, and no lock does (rule 13).
///
/// Does not wait for a page that is in swap, or on its way there.
#[inline(always)] // One function for each store, with no copies between: it runs at each fault.
pub(crate) fn get_pfn<S: Store>(
    node: &Node,
    file: File,
    span: Span,
    frame: u64,
) -> Result<Found<(u64, Looked<S::Page>)>> {
    node.counters.spread();
    let index = span.page_of(frame).ok_or(EINVAL)?;
    let store = S::of(&node.store).ok_or(EINVAL)?;
    // A file that is bound as pinned stays so: none of its pages come from areas for movable memory.
    let allocation = node.inode.migratable().then(Allocation::begin);
    let found = store.find(file, index)?;
    drop(allocation);
    let page = match found {
        Found::There(page) => page,
        Found::Coming(folio) => return Ok(Found::Coming(folio)),
    };

    let page = page.look(index);
    let order = match page.poison() {
        None => page.order().min(store.max_order()),
        // A huge mapping would give access to the poisoned neighbour.
        Some(Poison::Neighbour) => 0,
        Some(Poison::Page) => return Err(ehwpoison()),
    };
    let order = span.order_at(frame, order);
    Ok(Found::There((index, page.with_order(order))))
}

/// A consumer is going to ask for `frames`, one after the other. Pages that leave the kernel's direct
/// map do so together, because the TLBs are then flushed once for many (rule 25). Sleeps.
///
/// Leaves errors to [`get_pfn`], and pages that are in swap. The flags cannot change meanwhile: the
/// consumer is bound.
pub(crate) fn prefault<S: Store>(node: &Node, file: File, span: Span, frames: Range) {
    if !node.flags().kernel_inaccessible() {
        return;
    }
    if let (Some(store), Some(pages)) = (S::of(&node.store), span.pages_of(frames)) {
        let _ = store.allocate(file, pages);
        let _ = store.hide(pages);
    }
}

/// Has a consumer used `pages`, all of one folio, since the last call (rule 19)? Follows
/// `folio_referenced()`. Sleeps.
pub(crate) fn referenced(node: &Node, pages: Range) -> bool {
    let young = node.test_clear_young(pages);
    if young {
        node.counters.count(Event::Young);
    }
    young
}

/// Starts the invalidation of `pages`, all of one folio, which go to swap (rule 19). Files with
/// `UNRECLAIMABLE` are unevictable and do not come here. Sleeps.
pub(crate) fn writeout_start(node: &Node, inv: Invalidation, pages: Range) {
    node.counters.count(Event::SwapOut);
    trace::swap_out(&node.inode, pages);
    node.invalidate_start(inv, pages);
}

/// Swap did not take `pages`, all of one folio: they are back in the file.
pub(crate) fn writeout_undone(node: &Node, _pages: Range) {
    node.counters.uncount(Event::SwapOut);
    node.counters.count(Event::SwapOutUndone);
}

/// Migrates `pages`, all of one folio, by the function of their store (rules 18 and 19). Sleeps.
pub(crate) fn migrate(node: &Node, pages: Range, migration: &Migration) -> Result {
    announce_migration(node, pages, || node.store.migrate(migration))
}

/// Calls `migrate`, which moves `pages`, if they may move. No consumer has them mapped meanwhile.
pub(crate) fn announce_migration(
    node: &Node,
    pages: Range,
    migrate: impl FnOnce() -> Result,
) -> Result {
    let result = node.migrate(pages, migrate).ok_or_else(eopnotsupp)?;
    result
        .inspect(|()| {
            node.counters.count(Event::Migrate);
            trace::migrate(&node.inode, pages);
        })
        .inspect_err(|_| node.counters.count(Event::MigrateError))
}

/// Unmaps `pages`, all of one folio that has a memory error, from consumers. The folio stays in the
/// file, and [`get_pfn`] refuses it, until it is punched (rule 20). Sleeps.
pub(crate) fn poison(node: &Node, pages: Range) {
    node.counters.count(Event::Poison);
    trace::poison(&node.inode, pages);
    node.invalidate(pages, || ());
}
