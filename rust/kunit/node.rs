// SPDX-License-Identifier: GPL-2.0

//! Tests of [`crate::engine::node`].

#[kernel::macros::kunit_tests(memfile_node)]
mod tests {
    use crate::kunit::{
        Call::*,
        Journal,
        TestConsumer,
        TestFile, //
    };
    use crate::policy::flags::Flags;
    use crate::policy::range::Range;
    use kernel::prelude::*;

    const ALL: u64 = Flags::PINNED as u64;

    #[test]
    fn exclusive_bindings_never_overlap() -> Result {
        let journal = Journal::new();
        let file = TestFile::new(16)?;
        let a = TestConsumer::new(&journal, 'a', false, 0)?;
        let b = TestConsumer::new(&journal, 'b', false, 0)?;
        file.bind(a.as_ref(), ALL, 4, 4)?;
        for (pgoff, pages) in [(4, 4), (0, 16), (0, 5), (7, 1), (7, 9), (5, 2)] {
            assert_eq!(file.bind(b.as_ref(), ALL, pgoff, pages), Err(EEXIST));
        }
        for (pgoff, pages) in [(0, 4), (8, 8)] {
            assert_eq!(file.bind(b.as_ref(), ALL, pgoff, pages), Ok(()));
            b.unbind();
        }
        a.unbind();
        assert_eq!(file.bind(b.as_ref(), ALL, 0, 16), Ok(()));
        Ok(())
    }

    #[test]
    fn observers_overlap_anything_and_do_not_decide() -> Result {
        let journal = Journal::new();
        let file = TestFile::new(16)?;
        let a = TestConsumer::new(&journal, 'a', true, 0)?;
        let b = TestConsumer::new(&journal, 'b', true, 0)?;
        let c = TestConsumer::new(&journal, 'c', false, 0)?;
        file.bind(a.as_ref(), 0, 0, 16)?;
        file.bind(b.as_ref(), 0, 0, 16)?;
        assert_eq!(file.node().flags(), Flags::CREATION);
        assert_eq!(file.bind(c.as_ref(), ALL, 0, 16), Ok(()));
        assert_eq!(u64::from(file.node().flags().bits()), ALL);
        c.unbind();
        assert_eq!(u64::from(file.node().flags().bits()), ALL);
        Ok(())
    }

    #[test]
    fn refused_bindings_leave_nothing_behind() -> Result {
        let journal = Journal::new();
        let file = TestFile::new(16)?;
        let a = TestConsumer::new(&journal, 'a', false, 0)?;
        let wraps = TestConsumer::new(&journal, 'w', false, u64::MAX)?;
        for (pgoff, pages) in [(0, 0), (0, 17), (16, 1), (usize::MAX, 2)] {
            assert_eq!(file.bind(a.as_ref(), ALL, pgoff, pages), Err(EINVAL));
        }
        assert_eq!(file.bind(wraps.as_ref(), ALL, 0, 2), Err(EINVAL));
        assert_eq!(file.bind(a.as_ref(), ALL + 1, 0, 16), Err(EINVAL));
        assert_eq!(file.node().flags(), Flags::CREATION);
        assert_eq!(file.bind(a.as_ref(), ALL, 0, 16), Ok(()));
        Ok(())
    }

    #[test]
    fn a_consumer_without_all_callbacks_is_refused() -> Result {
        let journal = Journal::new();
        let file = TestFile::new(16)?;
        let a = TestConsumer::incomplete(&journal)?;
        assert_eq!(file.bind(a.as_ref(), ALL, 0, 16), Err(EINVAL));
        Ok(())
    }

    #[test]
    fn an_invalidation_calls_who_overlaps_with_what_is_theirs() -> Result {
        let journal = Journal::new();
        let file = TestFile::new(16)?;
        let a = TestConsumer::new(&journal, 'a', false, 100)?;
        let b = TestConsumer::new(&journal, 'b', false, 200)?;
        let c = TestConsumer::new(&journal, 'c', true, 0)?;
        file.bind(a.as_ref(), ALL, 0, 4)?;
        file.bind(b.as_ref(), ALL, 4, 4)?;
        file.bind(c.as_ref(), 0, 6, 10)?;

        file.node().invalidate(Range::of(2, 7), || {
            // All starts, before any page goes.
            assert!(journal.take(&[
                ('a', Start, 102, 104),
                ('b', Start, 200, 203),
                ('c', Start, 0, 1),
            ]));
        });
        assert!(journal.take(&[('a', End, 102, 104), ('b', End, 200, 203), ('c', End, 0, 1),]));

        file.node().invalidate(Range::of(16, 20), || ());
        assert!(journal.take(&[]));
        a.unbind();
        b.unbind();
        c.unbind();
        file.node().invalidate(Range::of(0, 16), || ());
        assert!(journal.take(&[]));
        Ok(())
    }

    #[test]
    fn bindings_of_one_context_are_called_together() -> Result {
        let journal = Journal::new();
        let file = TestFile::new(16)?;
        let a = TestConsumer::of_context(&journal, 'a', 1, 0)?;
        let b = TestConsumer::of_context(&journal, 'b', 2, 0)?;
        let c = TestConsumer::of_context(&journal, 'c', 1, 100)?;
        let d = TestConsumer::of_context(&journal, 'd', 2, 100)?;
        for (pgoff, consumer) in [(0, &a), (4, &b), (8, &c), (12, &d)] {
            file.bind(consumer.as_ref(), ALL, pgoff, 4)?;
        }
        let all = |call| {
            [
                ('a', call, 2, 4),
                ('c', call, 100, 104),
                ('b', call, 0, 4),
                ('d', call, 100, 102),
            ]
        };
        file.node().invalidate(Range::of(2, 14), || {
            assert!(journal.take(&all(Start)));
        });
        assert!(journal.take(&all(End)));

        // The first binding of a context need not be the first of all.
        file.node().invalidate(Range::of(6, 9), || {
            assert!(journal.take(&[('b', Start, 2, 4), ('c', Start, 100, 101)]));
        });
        assert!(journal.take(&[('b', End, 2, 4), ('c', End, 100, 101)]));
        Ok(())
    }

    #[test]
    fn a_binding_made_meanwhile_gets_no_end_without_a_start() -> Result {
        let journal = Journal::new();
        let file = TestFile::new(16)?;
        let a = TestConsumer::new(&journal, 'a', true, 0)?;
        let b = TestConsumer::new(&journal, 'b', true, 0)?;
        file.bind(a.as_ref(), 0, 0, 16)?;
        // A binding waits for invalidations of its own pages only: it does not overlap this one.
        file.node().invalidate(Range::of(0, 8), || {
            assert_eq!(file.bind(b.as_ref(), 0, 8, 8), Ok(()));
            b.unbind();
            assert_eq!(file.bind(b.as_ref(), 0, 8, 8), Ok(()));
        });
        assert!(journal.take(&[('a', Start, 0, 8), ('a', End, 0, 8)]));
        Ok(())
    }

    #[test]
    fn invalidations_inside_of_each_other_balance() -> Result {
        let journal = Journal::new();
        let file = TestFile::new(16)?;
        let a = TestConsumer::new(&journal, 'a', false, 0)?;
        let node = file.node();
        file.bind(a.as_ref(), ALL, 0, 16)?;
        node.invalidate(Range::of(0, 8), || node.invalidate(Range::of(4, 12), || ()));
        assert!(journal.take(&[
            ('a', Start, 0, 8),
            ('a', Start, 4, 12),
            ('a', End, 4, 12),
            ('a', End, 0, 8),
        ]));
        Ok(())
    }

    #[test]
    fn everybody_is_asked_whether_the_pages_are_in_use() -> Result {
        let journal = Journal::new();
        let file = TestFile::new(16)?;
        let a = TestConsumer::new(&journal, 'a', false, 0)?;
        let b = TestConsumer::new(&journal, 'b', true, 0)?;
        file.bind(a.as_ref(), ALL, 0, 8)?;
        file.bind(b.as_ref(), 0, 4, 8)?;
        assert!(!file.node().test_clear_young(Range::of(2, 6)));
        a.young.set(true);
        assert!(file.node().test_clear_young(Range::of(2, 6)));
        assert!(!file.node().test_clear_young(Range::of(8, 9)));
        let both = [('a', Young, 2, 6), ('b', Young, 0, 2)];
        assert!(journal.take(&[both[0], both[1], both[0], both[1], ('b', Young, 4, 5)]));
        Ok(())
    }
}
