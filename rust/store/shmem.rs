// SPDX-License-Identifier: GPL-2.0

//! shmem: folios in the page cache and in swap.

use super::{
    AnyStore,
    Page,
    Store, //
};
use crate::abi::file::File;
use crate::abi::folio::{
    Found,
    Locked,
    Migration,
    Pfn, //
};
use crate::abi::inode::Inode;
use crate::abi::shmem::ShmemInode;
use kernel::prelude::*;

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

    fn find(self, index: u64) -> Result<Found<Locked>> {
        self.folio(index)
    }

    fn fallocate(self, file: File, mode: i32, offset: i64, len: i64) -> Result {
        ShmemInode::fallocate(self, file, mode, offset, len)
    }

    fn migrate(self, migration: &Migration) -> Result {
        migration.in_page_cache()
    }
}
