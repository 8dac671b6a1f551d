// SPDX-License-Identifier: GPL-2.0

//! Folios of the page cache, of every file system.

use super::Page;
use crate::abi::folio::{
    Found,
    Locked,
    Looked,
    Pfn, //
};
use crate::abi::inode::Inode;
use crate::policy::range::Range;
use kernel::prelude::*;

impl Page for Locked {
    fn look(self, index: u64) -> Looked<Self> {
        Locked::look(self, index)
    }

    fn into_pfn(looked: Looked<Self>) -> Pfn {
        looked.into_pfn()
    }
}

/// A folio that a store has found in the page cache of `inode`: out of the kernel's direct map, if
/// it is to be (rule 25). Sleeps.
///
/// Errors: `ENOMEM`.
#[inline(always)]
pub(super) fn hidden(inode: Inode, found: Found<Locked>) -> Result<Found<Locked>> {
    if let Found::There(folio) = &found {
        if inode.hiding() {
            folio.hide()?;
        }
    }
    Ok(found)
}

/// Calls `find` for the folios of `pages`, which allocates them, up to the first one that comes
/// from swap. Sleeps.
///
/// Errors: those of `find`.
pub(super) fn allocate(pages: Range, find: impl Fn(u64) -> Result<Found<Locked>>) -> Result {
    let mut index = pages.start();
    while index < pages.end() {
        let Found::There(folio) = find(index)? else {
            break;
        };
        index = folio.pages().map_or(pages.end(), Range::end);
    }
    Ok(())
}
