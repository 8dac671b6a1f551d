// SPDX-License-Identifier: GPL-2.0

//! The backing store: pages of shmem.

use super::node::Node;
use crate::abi::folio::{
    Found,
    Locked, //
};
use crate::abi::record::Record;
use crate::abi::trace;
use crate::policy::range::{
    Binding,
    Range, //
};
use kernel::prelude::*;

/// The page behind the consumer's `frame`, as a locked folio, with its index in the file and the
/// largest order at which the consumer may map around it (rules 10 to 12). Sleeps.
///
/// The folio is dirty: its only copy is this one, from now on. The caller unlocks it before the
/// consumer maps it; what protects the consumer then is the notifier, not the lock (rule 13).
///
/// A page that is in swap, or on its way there, is not waited for.
pub(crate) fn get_pfn(
    node: &Node,
    binding: Binding,
    frame: u64,
) -> Result<Found<(Locked, u64, u32)>> {
    let index = binding.page_of(frame).ok_or(EINVAL)?;
    let folio = match Locked::get(&node.inode, index)? {
        Found::There(folio) => folio,
        Found::Coming(folio) => return Ok(Found::Coming(folio)),
    };

    let order = if !folio.poisoned() {
        folio.order()
    } else if folio.page_poisoned(index) {
        return Err(EHWPOISON);
    } else {
        // A huge mapping would give access to the poisoned neighbour.
        0
    };

    folio.mark_dirty();
    let order = binding.order_at(frame, order);
    Ok(Found::There((folio, index, order)))
}

/// Has a consumer used `pages`, all of one folio, since the last look (rule 19)? Follows
/// `folio_referenced()`. Sleeps.
pub(crate) fn referenced(node: &Node, pages: Range) -> bool {
    let young = node.test_clear_young(pages);
    if young {
        node.counters.young.count();
    }
    young
}

/// `pages`, all of one folio, leave for swap (rule 19): the start of their invalidation. That they
/// may go was said before: files of flag `UNRECLAIMABLE` are unevictable. Sleeps.
pub(crate) fn writeout_start(node: &Node, record: Record, pages: Range) {
    node.counters.swap_out.count();
    trace::swap_out(&node.inode, pages);
    node.invalidate_start(record, pages);
}

/// `pages`, all of one folio, have left for swap, which did not want them after all: they are back.
pub(crate) fn writeout_undone(node: &Node, _pages: Range) {
    node.counters.swap_out.uncount();
    node.counters.swap_out_undone.count();
}

/// Moves `pages`, all of one folio, with `migrate` (rules 18 and 19). Sleeps.
pub(crate) fn migrate(node: &Node, pages: Range, migrate: impl FnOnce() -> Result) -> Result {
    if node.flags().unmovable() {
        return Err(EOPNOTSUPP);
    }
    node.invalidate(pages, migrate)
        .inspect(|()| {
            node.counters.migrate.count();
            trace::migrate(&node.inode, pages);
        })
        .inspect_err(|_| node.counters.migrate_error.count())
}

/// A memory error hit `pages`, all of one folio: consumers lose them. The folio stays in the file,
/// and [`get_pfn`] refuses it, until it is punched (rule 20). Sleeps.
pub(crate) fn poison(node: &Node, pages: Range) {
    node.counters.poison.count();
    trace::poison(&node.inode, pages);
    node.invalidate(pages, || ());
}

#[cfg(CONFIG_KUNIT = "y")]
#[kernel::macros::kunit_tests(memfile_shmem)]
mod tests {
    use super::*;
    use crate::abi::kunit::{
        Call::*,
        Journal,
        TestConsumer,
        TestFile, //
    };

    const PINNED: u64 = 0b111;
    const UNMOVABLE: u64 = 0b011;
    const UNRECLAIMABLE: u64 = 0b101;
    const FREE: u64 = 0b001;

    #[test]
    fn a_page_is_allocated_once_and_only_inside_of_the_binding() -> Result {
        let file = TestFile::new(16)?;
        let binding = Binding::new(4, 8, 100, 16)?;
        for frame in [0, 4, 99, 108, u64::MAX] {
            assert_eq!(get_pfn(file.node(), binding, frame).err(), Some(EINVAL));
        }
        assert_eq!(file.node().inode.resident(), 0);
        for _ in 0..2 {
            let found = get_pfn(file.node(), binding, 103)?;
            let (folio, index, order) = found.there().ok_or(EAGAIN)?;
            assert_eq!((index, order), (7, 0));
            assert_eq!(folio.pages(), Range::new(7, 8));
            drop(folio);
            assert_eq!(file.node().inode.resident(), 1);
        }
        // A binding that was made for another file: past the end of this one.
        let longer = Binding::new(4, 16, 0, 20)?;
        assert_eq!(get_pfn(file.node(), longer, 15).err(), Some(EINVAL));
        Ok(())
    }

    #[test]
    fn migration_is_refused_or_announced() -> Result {
        let journal = Journal::new();
        let file = TestFile::new(16)?;
        let a = TestConsumer::new(&journal, 'a', false, 0)?;
        let pages = Range::of(2, 3);
        for flags in [PINNED, UNMOVABLE] {
            file.bind(a.as_ref(), flags, 0, 16)?;
            let mut moved = false;
            let result = migrate(file.node(), pages, || {
                moved = true;
                Ok(())
            });
            assert_eq!(result, Err(EOPNOTSUPP));
            assert!(!moved);
            assert!(journal.take(&[]));
            a.unbind();
        }
        for flags in [FREE, UNRECLAIMABLE] {
            file.bind(a.as_ref(), flags, 0, 16)?;
            // The end comes even if it did not work.
            for wanted in [Ok(()), Err(EAGAIN)] {
                let result = migrate(file.node(), pages, || {
                    assert!(journal.take(&[('a', Start, 2, 3)]));
                    wanted
                });
                assert_eq!(result, wanted);
                assert!(journal.take(&[('a', End, 2, 3)]));
            }
            a.unbind();
        }
        Ok(())
    }

    #[test]
    fn swap_out_is_announced_and_the_accessed_bits_are_asked_for() -> Result {
        let journal = Journal::new();
        let file = TestFile::new(16)?;
        let a = TestConsumer::new(&journal, 'a', false, 0)?;
        let pages = Range::of(2, 3);
        file.bind(a.as_ref(), FREE, 0, 16)?;
        for young in [true, false] {
            a.young.set(young);
            assert_eq!(referenced(file.node(), pages), young);
            assert!(journal.take(&[('a', Young, 2, 3)]));
        }
        Record::with(file.node(), |record| {
            writeout_start(file.node(), record, pages);
            assert!(journal.take(&[('a', Start, 2, 3)]));
            file.node().invalidate_end(record);
        });
        assert!(journal.take(&[('a', End, 2, 3)]));
        Ok(())
    }

    #[test]
    fn a_memory_error_is_an_invalidation() -> Result {
        let journal = Journal::new();
        let file = TestFile::new(16)?;
        let a = TestConsumer::new(&journal, 'a', false, 50)?;
        file.bind(a.as_ref(), PINNED, 0, 16)?;
        poison(file.node(), Range::of(2, 3));
        assert!(journal.take(&[('a', Start, 52, 53), ('a', End, 52, 53)]));
        Ok(())
    }
}
