// SPDX-License-Identifier: GPL-2.0

//! Backing stores beside shmem: they own their pages, and say when these go away.

use super::node::Node;
use crate::abi::folio::Given;
use crate::policy::range::Binding;
use kernel::prelude::*;

/// The page behind the consumer's `frame`, with its index in the file and the largest order at
/// which the consumer may map around it, as for files of shmem (rules 10 to 12). Sleeps.
pub(crate) fn get_pfn(node: &Node, binding: Binding, frame: u64) -> Result<(Given, u64, u32)> {
    let index = binding.page_of(frame).ok_or(EINVAL)?;
    let page = node.inode.page_of_store(index)?;

    if page.poisoned() {
        return Err(EHWPOISON);
    }
    let order = binding.order_at(frame, page.order());
    Ok((page, index, order))
}
