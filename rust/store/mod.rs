// SPDX-License-Identifier: GPL-2.0

//! Stores: they own the pages of files. [`Store`] is all that the engine knows of them.
//!
//! A store in the kernel is one type that implements [`Store`], in a file of its own, and one line
//! in [`AnyStore`] and [`each_store`]; stores of other modules share a type.
//!
//! # Calls
//!
//! The engine calls a store through the trait. In the other direction a store notifies the core of
//! the events of its pages: shmem and hugetlbfs by the callbacks of `struct memfile_core_ops`, the
//! store of another module by the exports of `store.h`. These are the same functions
//! ([`crate::entry`]).

mod foreign;
mod hugetlb;
mod page_cache;
mod shmem;

use crate::abi::file::File;
use crate::abi::folio::{
    Found,
    Looked,
    Migration,
    Pfn, //
};
use crate::abi::foreign::ForeignInode;
use crate::abi::hugetlb::HugetlbInode;
use crate::abi::inode::Inode;
use crate::abi::shmem::ShmemInode;
use crate::policy::flags::Flags;
use crate::policy::range::Range;
use kernel::prelude::*;

/// The order of a page of 2 MiB.
const ORDER_2M: u32 = 9;

/// A page that a store has found for a consumer. It stays in its place until it is handed on.
///
/// Dropping it gives it back.
pub(crate) trait Page: Sized {
    /// Looks at page `index` of the file, which must be a page of its folio.
    fn look(self, index: u64) -> Looked<Self>;

    /// Hands the page on to a consumer, as the only copy of its content.
    fn into_pfn(looked: Looked<Self>) -> Pfn;
}

/// The store of one file.
pub(crate) trait Store: Copy + Send + Sync {
    /// The result of [`Self::find`].
    type Page: Page;

    /// This store, if `any` is one.
    fn of(any: &AnyStore) -> Option<Self>;

    /// The file's inode.
    fn inode(self) -> Inode;

    /// The largest order at which consumers map its pages.
    fn max_order(self) -> u32;

    /// The flags that its pages always have, independently of the flags that consumers request.
    fn inherent_flags(self) -> Flags {
        Flags::CREATION
    }

    /// May new pages of a file that is not bound lie in areas for movable memory? If so they are
    /// migrated when a consumer pins the file.
    fn movable_before_binding(self) -> bool {
        false
    }

    /// The page at `index` of `file`, which is one of this inode; zeroed and uptodate, and out of
    /// the kernel's direct map if the flags say so. The store allocates it if there is none, and
    /// knows which of its pages have a memory error. Sleeps.
    fn find(self, file: File, index: u64) -> Result<Found<Self::Page>>;

    /// Allocates those of `pages` of `file`, as in [`Self::find`], that are missing, up to the first
    /// one that is in swap. It leaves them in the kernel's direct map: call [`Self::hide`]. Sleeps.
    ///
    /// Errors: those of [`Self::find`]; some are allocated then.
    fn allocate(self, _file: File, _pages: Range) -> Result {
        Ok(())
    }

    /// fallocate(2) on `file`, which is one of this inode, after the engine has checked the
    /// arguments. `offset` and `len` are bytes. The store invalidates what it takes away (rule 14).
    /// Sleeps.
    fn fallocate(self, file: File, mode: i32, offset: i64, len: i64) -> Result;

    /// Moves a folio of the file. Its invalidation is running. Sleeps.
    fn migrate(self, migration: &Migration) -> Result;

    /// Can it keep its pages out of the kernel's direct map?
    fn can_hide(self) -> bool {
        false
    }

    /// Takes those of `pages` that are in memory out of the kernel's direct map, if the flags say so.
    /// Where [`Self::find`] does so for one, this pays once for many. Sleeps, takes folio locks.
    ///
    /// Errors: `ENOMEM`, `EINTR` if a fatal signal came.
    fn hide(self, _pages: Range) -> Result {
        Ok(())
    }

    /// Sets the flags that consumers want from now on. Does not sleep; the caller serialises.
    fn set_flags(self, flags: Flags) {
        self.inode().set_flags(flags);
    }

    /// Sets whether new pages come from areas for movable memory. Does not sleep; the caller
    /// serialises.
    fn allocate_movable(self, movable: bool) {
        self.inode().allocate_movable(movable);
    }

    /// Migrates the pages out of areas for movable memory. Sleeps, allocates, takes folio locks.
    ///
    /// Errors: `ENOMEM`, `EBUSY` if a page has another user.
    fn leave_movable_areas(self) -> Result {
        self.inode().leave_movable_areas()
    }
}

/// The store of one file, of any type.
///
/// Functions that are called for each page do not go through this: see [`Store::of`].
#[derive(Clone, Copy)]
pub(crate) enum AnyStore {
    /// shmem.
    Shmem(ShmemInode),
    /// hugetlbfs.
    Hugetlb(HugetlbInode),
    /// The store of another module.
    Foreign(ForeignInode),
}

/// `each_store!(any, store => expression)`: the expression for the [`Store`] that `any` is.
macro_rules! each_store {
    ($any:expr, $store:ident => $do:expr) => {
        match $any {
            $crate::store::AnyStore::Shmem($store) => $do,
            $crate::store::AnyStore::Hugetlb($store) => $do,
            $crate::store::AnyStore::Foreign($store) => $do,
        }
    };
}

pub(crate) use each_store;

impl AnyStore {
    /// As [`Store::inode`].
    pub(crate) fn inode(self) -> Inode {
        each_store!(self, store => Store::inode(store))
    }

    /// As [`Store::max_order`].
    pub(crate) fn max_order(self) -> u32 {
        each_store!(self, store => Store::max_order(store))
    }

    /// As [`Store::inherent_flags`].
    pub(crate) fn inherent_flags(self) -> Flags {
        each_store!(self, store => Store::inherent_flags(store))
    }

    /// As [`Store::movable_before_binding`].
    pub(crate) fn movable_before_binding(self) -> bool {
        each_store!(self, store => Store::movable_before_binding(store))
    }

    /// As [`Store::fallocate`].
    pub(crate) fn fallocate(self, file: File, mode: i32, offset: i64, len: i64) -> Result {
        each_store!(self, store => Store::fallocate(store, file, mode, offset, len))
    }

    /// As [`Store::migrate`].
    pub(crate) fn migrate(self, migration: &Migration) -> Result {
        each_store!(self, store => Store::migrate(store, migration))
    }

    /// As [`Store::can_hide`].
    pub(crate) fn can_hide(self) -> bool {
        each_store!(self, store => Store::can_hide(store))
    }

    /// As [`Store::hide`].
    pub(crate) fn hide(self, pages: Range) -> Result {
        each_store!(self, store => Store::hide(store, pages))
    }

    /// As [`Store::set_flags`].
    pub(crate) fn set_flags(self, flags: Flags) {
        each_store!(self, store => Store::set_flags(store, flags));
    }

    /// As [`Store::allocate_movable`].
    pub(crate) fn allocate_movable(self, movable: bool) {
        each_store!(self, store => Store::allocate_movable(store, movable));
    }

    /// As [`Store::leave_movable_areas`].
    pub(crate) fn leave_movable_areas(self) -> Result {
        each_store!(self, store => Store::leave_movable_areas(store))
    }
}
