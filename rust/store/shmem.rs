// SPDX-License-Identifier: GPL-2.0

//! shmem: folios in the page cache and in swap.

use super::{
    page_cache,
    AnyStore,
    Store,
    ORDER_2M, //
};
use crate::abi::file::File;
use crate::abi::folio::{
    self,
    Found,
    Locked,
    Migration, //
};
use crate::abi::inode::Inode;
use crate::abi::shmem::ShmemInode;
use crate::policy::range::Range;
use kernel::prelude::*;

impl Store for ShmemInode {
    type Page = Locked;

    fn of(any: &AnyStore) -> Option<Self> {
        match any {
            AnyStore::Shmem(store) => Some(*store),
            _ => None,
        }
    }

    fn inode(self) -> Inode {
        ShmemInode::inode(self)
    }

    fn max_order(self) -> u32 {
        ORDER_2M
    }

    #[inline(always)]
    fn find(self, _file: File, index: u64) -> Result<Found<Locked>> {
        page_cache::hidden(self.inode(), self.folio(index)?)
    }

    fn allocate(self, _file: File, pages: Range) -> Result {
        page_cache::allocate(pages, |index| self.folio(index))
    }

    fn fallocate(self, file: File, mode: i32, offset: i64, len: i64) -> Result {
        ShmemInode::fallocate(self, file, mode, offset, len)
    }

    fn migrate(self, migration: &Migration) -> Result {
        migration.in_page_cache()
    }

    fn can_hide(self) -> bool {
        folio::can_hide()
    }

    fn hide(self, pages: Range) -> Result {
        self.inode().hide(pages)
    }
}
