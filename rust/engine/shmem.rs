// SPDX-License-Identifier: GPL-2.0

//! The backing store: pages of shmem.

use super::node::Node;
use crate::abi::folio::Locked;
use crate::abi::record::Record;
use crate::abi::trace;
use crate::policy::range::{
    Binding,
    Range, //
};
use kernel::prelude::*;

/// The page behind the consumer's `frame`, as a locked folio, with its index in the file and the
/// largest order at which the consumer may map around it (rules 10 to 12). Sleeps.
///
/// The folio is dirty: its only copy is this one, from now on. The caller unlocks it before the
/// consumer maps it; what protects the consumer then is the notifier, not the lock (rule 13).
pub(crate) fn get_pfn(node: &Node, binding: Binding, frame: u64) -> Result<(Locked, u64, u32)> {
    find_pfn(node, binding, frame)
        .inspect(|_| node.counters.get_pfn.count())
        .inspect_err(|_| node.counters.get_pfn_error.count())
}

fn find_pfn(node: &Node, binding: Binding, frame: u64) -> Result<(Locked, u64, u32)> {
    let index = binding.page_of(frame).ok_or(EINVAL)?;
    let folio = Locked::get(&node.inode, index)?;

    if folio.page_poisoned(index) {
        return Err(EHWPOISON);
    }
    // A huge mapping would give access to the poisoned neighbour.
    let order = if folio.poisoned() { 0 } else { folio.order() };

    folio.mark_dirty();
    Ok((folio, index, binding.order_at(frame, order)))
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
pub(crate) fn writeout_start(node: &Node, record: Record, pages: Range) {
    node.counters.swap_out.count();
    trace::swap_out(&node.inode, pages);
    node.invalidate_start(record, pages);
}

/// Moves `pages`, all of one folio, with `migrate` (rules 18 and 19). Sleeps.
pub(crate) fn migrate(node: &Node, pages: Range, migrate: impl FnOnce() -> Result) -> Result {
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
