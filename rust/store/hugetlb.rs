// SPDX-License-Identifier: GPL-2.0

//! hugetlbfs: folios of one size from the pool of huge pages, in the page cache (rule 24).

use super::{
    page_cache,
    AnyStore,
    Store, //
};
use crate::abi::file::File;
use crate::abi::folio::{
    self,
    Found,
    Locked,
    Migration, //
};
use crate::abi::hugetlb::HugetlbInode;
use crate::abi::inode::Inode;
use crate::policy::flags::Flags;
use crate::policy::range::Range;
use kernel::prelude::*;

impl Store for HugetlbInode {
    type Page = Locked;

    fn of(any: &AnyStore) -> Option<Self> {
        match any {
            AnyStore::Hugetlb(store) => Some(*store),
            _ => None,
        }
    }

    fn inode(self) -> Inode {
        HugetlbInode::inode(self)
    }

    fn max_order(self) -> u32 {
        self.order()
    }

    /// The pages of the pool never go to swap.
    fn inherent_flags(self) -> Flags {
        Flags::CREATION.and_unreclaimable()
    }

    /// The pages of the pool lie where they lie: there may be no others.
    fn movable_before_binding(self) -> bool {
        true
    }

    /// There is no swap to wait for.
    fn find(self, file: File, index: u64) -> Result<Found<Locked>> {
        page_cache::hidden(self.inode(), Found::There(self.folio(file, index)?))
    }

    fn allocate(self, file: File, pages: Range) -> Result {
        page_cache::allocate(pages, |index| Ok(Found::There(self.folio(file, index)?)))
    }

    fn fallocate(self, file: File, mode: i32, offset: i64, len: i64) -> Result {
        HugetlbInode::fallocate(self, file, mode, offset, len)
    }

    fn migrate(self, migration: &Migration) -> Result {
        HugetlbInode::migrate(self, migration)
    }

    fn can_hide(self) -> bool {
        folio::can_hide()
    }

    fn hide(self, pages: Range) -> Result {
        self.inode().hide(pages)
    }
}
