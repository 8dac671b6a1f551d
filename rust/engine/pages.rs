// SPDX-License-Identifier: GPL-2.0

//! The pages of a file: how a consumer gets one, and what the memory management does with them. All
//! of it is the same for all stores.

use super::node::Node;
use crate::abi::folio::{
    Found,
    Migration, //
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

/// The page behind the consumer's `frame`, with its index in the file and the largest order at which
/// the consumer may map around it (rules 10 to 12). `S` is the store of the node. Sleeps.
///
/// The page is dirty: its only copy is this one, from now on. The store keeps it in its place until
/// the caller hands it on; what protects the consumer then is the notifier, and no lock (rule 13).
///
/// A page that is in swap, or on its way there, is not waited for.
pub(crate) fn get_pfn<S: Store>(
    node: &Node,
    span: Span,
    frame: u64,
) -> Result<Found<(S::Page, u64, u32)>> {
    let index = span.page_of(frame).ok_or(EINVAL)?;
    let page = match S::of(&node.store).ok_or(EINVAL)?.find(index)? {
        Found::There(page) => page,
        Found::Coming(folio) => return Ok(Found::Coming(folio)),
    };

    let order = if !page.poisoned() {
        page.order()
    } else if page.page_poisoned(index) {
        return Err(EHWPOISON);
    } else {
        // A huge mapping would give access to the poisoned neighbour.
        0
    };

    page.mark_dirty();
    let order = span.order_at(frame, order);
    Ok(Found::There((page, index, order)))
}

/// Has a consumer used `pages`, all of one folio, since the last look (rule 19)? Follows
/// `folio_referenced()`. Sleeps.
pub(crate) fn referenced(node: &Node, pages: Range) -> bool {
    let young = node.test_clear_young(pages);
    if young {
        node.counters.young.count();
    }
    young
}

/// `pages`, all of one folio, leave for swap (rule 19): the start of their invalidation. That they
/// may go was said before: files of flag `UNRECLAIMABLE` are unevictable. Sleeps.
pub(crate) fn writeout_start(node: &Node, inv: Invalidation, pages: Range) {
    node.counters.swap_out.count();
    trace::swap_out(&node.inode, pages);
    node.invalidate_start(inv, pages);
}

/// `pages`, all of one folio, have left for swap, which did not want them after all: they are back.
pub(crate) fn writeout_undone(node: &Node, _pages: Range) {
    node.counters.swap_out.uncount();
    node.counters.swap_out_undone.count();
}

/// Migrates `pages`, all of one folio, as their store does it (rules 18 and 19). Sleeps.
pub(crate) fn migrate(node: &Node, pages: Range, migration: &Migration) -> Result {
    announce_migration(node, pages, || node.store.migrate(migration))
}

/// Does `migrate`, which moves `pages`, if these may move: consumers lose them meanwhile.
pub(crate) fn announce_migration(
    node: &Node,
    pages: Range,
    migrate: impl FnOnce() -> Result,
) -> Result {
    if node.flags().unmovable() {
        return Err(EOPNOTSUPP);
    }
    node.invalidate(pages, migrate)
        .inspect(|()| {
            node.counters.migrate.count();
            trace::migrate(&node.inode, pages);
        })
        .inspect_err(|_| node.counters.migrate_error.count())
}

/// A memory error hit `pages`, all of one folio: consumers lose them. The folio stays in the file,
/// and [`get_pfn`] refuses it, until it is punched (rule 20). Sleeps.
pub(crate) fn poison(node: &Node, pages: Range) {
    node.counters.poison.count();
    trace::poison(&node.inode, pages);
    node.invalidate(pages, || ());
}
