// SPDX-License-Identifier: GPL-2.0

//! Plain pages in a tree, and what happens to them.

use crate::base::ehwpoison;
use core::mem;
use core::ops::Range;
use kernel::new_mutex;
use kernel::page::Page;
use kernel::prelude::*;
use kernel::rbtree::RBTree;
use kernel::sync::Mutex;

/// The page at an index.
struct Slot {
    page: Page,
    /// The page has a memory error: no consumer gets it any more.
    broken: bool,
    /// The successor of the page when it migrates.
    successor: Option<Page>,
}

/// The pages of a file.
#[pin_data]
pub(crate) struct Memory {
    /// Not held while consumers are called: they may not wait for an allocation.
    #[pin]
    slots: Mutex<RBTree<usize, Slot>>,
}

impl Memory {
    /// A file without pages.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            slots <- new_mutex!(RBTree::new()),
        })
    }

    /// Calls `f` with the page at `index`, and for a new page calls `account`. Sleeps. `EHWPOISON`
    /// if the page has a memory error.
    pub(crate) fn with_page<R>(
        &self,
        index: usize,
        account: impl FnOnce(),
        f: impl FnOnce(&Page) -> R,
    ) -> Result<R> {
        let mut slots = self.slots.lock();
        if slots.get(&index).is_none() {
            let slot = Slot {
                page: Page::alloc_page(GFP_KERNEL | __GFP_ZERO)?,
                broken: false,
                successor: None,
            };
            slots.try_create_and_insert(index, slot, GFP_KERNEL)?;
            account();
        }
        match slots.get(&index).ok_or(ENOMEM)? {
            Slot { broken: true, .. } => Err(ehwpoison()),
            Slot { page, .. } => Ok(f(page)),
        }
    }

    /// Does `f` with the page at `index`. `ENOENT` if there is none. Sleeps.
    pub(crate) fn with_existing<R>(&self, index: usize, f: impl FnOnce(&Page) -> R) -> Result<R> {
        let slots = self.slots.lock();
        slots.get(&index).map(|slot| f(&slot.page)).ok_or(ENOENT)
    }

    /// The page at `index` has a memory error from now on. Sleeps.
    pub(crate) fn break_page(&self, index: usize) -> Result {
        let mut slots = self.slots.lock();
        slots.get_mut(&index).ok_or(ENOENT)?.broken = true;
        Ok(())
    }

    /// Allocates a successor for the page at `index`, and does `f` with both. `EBUSY` if it has one.
    /// Sleeps.
    pub(crate) fn prepare<R>(&self, index: usize, f: impl FnOnce(&Page, &Page) -> R) -> Result<R> {
        let successor = Page::alloc_page(GFP_KERNEL)?;
        let mut slots = self.slots.lock();
        let slot = slots.get_mut(&index).ok_or(ENOENT)?;
        if slot.successor.is_some() {
            return Err(EBUSY);
        }
        let result = f(&slot.page, &successor);
        slot.successor = Some(successor);
        Ok(result)
    }

    /// If `is_it` is true of the page at `index`, does `copy` and puts its successor in its place.
    /// `EAGAIN` otherwise. Sleeps.
    pub(crate) fn succeed(
        &self,
        index: usize,
        is_it: impl FnOnce(&Page, &Page) -> bool,
        copy: impl FnOnce(),
    ) -> Result {
        let mut slots = self.slots.lock();
        let slot = slots.get_mut(&index).ok_or(EAGAIN)?;
        match &slot.successor {
            Some(successor) if is_it(&slot.page, successor) => copy(),
            _ => return Err(EAGAIN),
        }
        if let Some(successor) = slot.successor.take() {
            drop(mem::replace(&mut slot.page, successor));
        }
        Ok(())
    }

    /// The page at `index` stays where it is: gives up its successor. Sleeps.
    pub(crate) fn stay(&self, index: usize) {
        let mut slots = self.slots.lock();
        if let Some(slot) = slots.get_mut(&index) {
            slot.successor = None;
        }
    }

    /// Gives up the pages in `hole`, and counts them. Sleeps.
    pub(crate) fn punch(&self, hole: Range<usize>) -> usize {
        let mut slots = self.slots.lock();
        hole.filter(|index| slots.remove(index).is_some()).count()
    }
}
