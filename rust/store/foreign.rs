// SPDX-License-Identifier: GPL-2.0

//! Stores of other modules: `rust/store.h` is this trait in C.

use super::{
    AnyStore,
    Page,
    Store,
    ORDER_2M, //
};
use crate::abi::base::ehwpoison;
use crate::abi::file::File;
use crate::abi::folio::{
    Found,
    Looked,
    Migration,
    Pfn, //
    Referenced,
};
use crate::abi::foreign::ForeignInode;
use crate::abi::inode::Inode;
use crate::policy::flags::Flags;
use kernel::prelude::*;

impl Page for Referenced {
    fn look(self, _index: u64) -> Looked<Self> {
        Referenced::look(self)
    }

    /// The store keeps track of other copies of the page.
    fn into_pfn(looked: Looked<Self>) -> Pfn {
        looked.into_pfn()
    }
}

impl Store for ForeignInode {
    type Page = Referenced;

    fn of(any: &AnyStore) -> Option<Self> {
        match any {
            AnyStore::Foreign(store) => Some(*store),
            _ => None,
        }
    }

    fn inode(self) -> Inode {
        ForeignInode::inode(self)
    }

    fn max_order(self) -> u32 {
        ORDER_2M
    }

    /// Consumers wait at `EAGAIN`, and take other errors for a signal or for missing memory: they
    /// get only those that `store.h` names.
    fn find(self, _file: File, index: u64) -> Result<Found<Referenced>> {
        match self.page(index) {
            Ok(page) => Ok(Found::There(page)),
            Err(err) if [ENOMEM, ENOSPC, ehwpoison()].contains(&err) => Err(err),
            Err(_) => Err(EIO),
        }
    }

    fn fallocate(self, file: File, mode: i32, offset: i64, len: i64) -> Result {
        ForeignInode::fallocate(self, file, mode, offset, len)
    }

    fn migrate(self, migration: &Migration) -> Result {
        ForeignInode::migrate(self, migration)
    }

    /// The mapping's flags hold for pages in its page cache, as in other stores.
    fn set_flags(self, flags: Flags) {
        self.inode().set_flags(flags);
        self.tell_flags(flags);
    }

    fn allocate_movable(self, movable: bool) {
        self.inode().allocate_movable(movable);
        self.tell_movable(movable);
    }

    fn leave_movable_areas(self) -> Result {
        self.ask_to_leave_movable_areas()
            .unwrap_or_else(|| self.inode().leave_movable_areas())
    }
}
