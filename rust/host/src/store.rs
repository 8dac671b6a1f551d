// SPDX-License-Identifier: GPL-2.0

//! The stand-in for `rust/store`: the store of a file, without pages.

use crate::abi::allocation::WAITS;
use crate::abi::file::File;
use crate::abi::inode::Inode;
use crate::kernel::prelude::*;
use crate::policy::flags::Flags;
use crate::policy::range::Range;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

thread_local! {
    /// The last call that reached the store.
    pub(crate) static FALLOCATED: Cell<Option<(i32, i64, i64)>> = const { Cell::new(None) };

    /// Runs while that call is in progress.
    pub(crate) static MEANWHILE: RefCell<Option<Rc<dyn Fn()>>> = const { RefCell::new(None) };
}

/// The store of a file.
#[derive(Clone)]
pub(crate) struct AnyStore(Inode);

impl AnyStore {
    pub(crate) fn with_pages(pages: u64) -> Self {
        Self(Inode::with_pages(pages))
    }

    /// One whose new pages may be in areas for movable memory before it is bound.
    pub(crate) fn with_pages_where_they_lie(pages: u64) -> Self {
        let store = Self::with_pages(pages);
        store.0.movable_first.set(true);
        store
    }

    pub(crate) fn inode(&self) -> Inode {
        self.0.clone()
    }

    pub(crate) fn inherent_flags(&self) -> Flags {
        Flags::CREATION
    }

    pub(crate) fn movable_before_binding(&self) -> bool {
        self.0.movable_first.get()
    }

    pub(crate) fn fallocate(&self, _file: File, mode: i32, offset: i64, len: i64) -> Result {
        FALLOCATED.set(Some((mode, offset, len)));
        if let Some(work) = MEANWHILE.with_borrow(Option::clone) {
            work();
        }
        Ok(())
    }

    pub(crate) fn can_hide(&self) -> bool {
        true
    }

    pub(crate) fn hide(&self, pages: Range) -> Result {
        let flags = self.0.flags.get();
        assert!(
            flags.is_some_and(Flags::kernel_inaccessible),
            "the flags come first"
        );
        self.0.hidden.set(Some(pages));
        self.0.hide_error.get().map_or(Ok(()), Err)
    }

    pub(crate) fn set_flags(&self, flags: Flags) {
        self.0.flags.set(Some(flags));
    }

    pub(crate) fn allocate_movable(&self, movable: bool) {
        self.0.movable.set(Some(movable));
    }

    pub(crate) fn leave_movable_areas(&self) -> Result {
        let movable = self.0.movable.get();
        assert_eq!(movable, Some(false), "new pages take the place of the old");
        assert!(WAITS.take() > 0, "nobody has waited for allocations");
        self.0.left.set(self.0.left.get() + 1);
        let meanwhile = self.0.leaving.borrow().clone();
        if let Some(work) = meanwhile {
            work();
        }
        self.0.stuck.get().map_or(Ok(()), Err)
    }
}
