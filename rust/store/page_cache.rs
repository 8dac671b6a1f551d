// SPDX-License-Identifier: GPL-2.0

//! Folios of the page cache, of every file system.

use super::Page;
use crate::abi::folio::{
    Locked,
    Pfn, //
};

impl Page for Locked {
    fn order(&self) -> u32 {
        Locked::order(self)
    }

    fn poisoned(&self) -> bool {
        Locked::poisoned(self)
    }

    fn page_poisoned(&self, index: u64) -> bool {
        Locked::page_poisoned(self, index)
    }

    fn mark_dirty(&self) {
        Locked::mark_dirty(self);
    }

    fn into_pfn(self, index: u64, order: u32) -> Pfn {
        Locked::into_pfn(self, index, order)
    }
}
