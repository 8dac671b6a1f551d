// SPDX-License-Identifier: GPL-2.0

//! A store of pages that is not shmem, for tests: plain pages in a tree.
//!
//! The registration point (`include/linux/memfile.h`) has room for one core, and a store comes with
//! it. This module registers in place of memfile.ko, as a core that knows one binding per file and
//! no flags: just what guests need to run. It proves that the point itself, its users and the life
//! of modules around it do not depend on shmem, nor on memfile.ko.

#[path = "store/abi.rs"]
mod abi;
#[path = "../bindings.rs"]
mod bindings;

use abi::{
    Consumer,
    Store, //
};
use kernel::new_mutex;
use kernel::page::{
    Page,
    PAGE_SHIFT, //
};
use kernel::prelude::*;
use kernel::rbtree::RBTree;
use kernel::sync::Mutex;

module! {
    type: Module,
    name: "memfile_store",
    authors: ["The memfile authors"],
    description: "Memfiles that are not of shmem, for tests",
    license: "GPL",
}

struct Module {
    _registration: abi::Registration<Memory>,
}

impl kernel::Module for Module {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        Ok(Self {
            _registration: abi::Registration::new()?,
        })
    }
}

/// `FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE`
const PUNCH: i32 = 3;

/// A file.
#[pin_data]
struct Memory {
    /// Callbacks run under it: they take no lock under which a consumer calls us.
    #[pin]
    state: Mutex<State>,
}

struct State {
    pages: RBTree<u64, Page>,
    /// The size of the file.
    end: u64,
    bound: Option<Consumer>,
}

impl Store for Memory {
    fn create() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            state <- new_mutex!(State {
                pages: RBTree::new(),
                end: 0,
                bound: None,
            }),
        }? Error)
    }

    fn set_size(&self, old: u64, new: u64) -> Result {
        if old != 0 {
            return Err(EPERM);
        }
        self.state.lock().end = new >> PAGE_SHIFT;
        Ok(())
    }

    fn fallocate(&self, mode: i32, offset: i64, len: i64) -> Result {
        if mode != PUNCH {
            return Err(EOPNOTSUPP);
        }
        let page = |bytes: i64| u64::try_from(bytes).map(|bytes| bytes >> PAGE_SHIFT);
        let mut state = self.state.lock();
        let end = page(offset.saturating_add(len))?.min(state.end);
        let hole = page(offset)?..end;
        let bound = state.bound;
        let mut remove = || {
            for index in hole.clone() {
                state.pages.remove(&index);
            }
        };
        match bound {
            Some(consumer) => consumer.invalidate(hole.clone(), remove),
            None => remove(),
        }
        Ok(())
    }

    fn bind(&self, consumer: Consumer) -> Result {
        let mut state = self.state.lock();
        if state.bound.is_some() {
            return Err(EEXIST);
        }
        if consumer.pages().is_empty() || consumer.pages().end > state.end {
            return Err(EINVAL);
        }
        state.bound = Some(consumer);
        Ok(())
    }

    fn unbind(&self, consumer: Consumer) {
        let mut state = self.state.lock();
        if state.bound == Some(consumer) {
            state.bound = None;
        }
    }

    fn get(&self, index: u64) -> Result<usize> {
        let mut state = self.state.lock();
        if let Some(page) = state.pages.get(&index) {
            return Ok(abi::pfn(page));
        }
        let page = Page::alloc_page(GFP_KERNEL | __GFP_ZERO)?;
        let pfn = abi::pfn(&page);
        state.pages.try_create_and_insert(index, page, GFP_KERNEL)?;
        Ok(pfn)
    }
}
