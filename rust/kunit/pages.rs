// SPDX-License-Identifier: GPL-2.0

//! Tests of [`crate::engine::pages`].

#[kernel::macros::kunit_tests(memfile_shmem)]
mod tests {
    use crate::abi::base::eopnotsupp;
    use crate::abi::invalidation::Invalidation;
    use crate::abi::shmem::ShmemInode;
    use crate::engine::pages::{
        announce_migration,
        get_pfn,
        poison,
        referenced,
        writeout_start, //
    };
    use crate::kunit::{
        Call::*,
        Journal,
        TestConsumer,
        TestFile, //
    };
    use crate::policy::range::{
        Range,
        Span, //
    };
    use kernel::prelude::*;

    const PINNED: u64 = 0b111;
    const UNMOVABLE: u64 = 0b011;
    const UNRECLAIMABLE: u64 = 0b101;
    const FREE: u64 = 0b001;

    #[test]
    fn a_page_is_allocated_once_and_only_inside_of_the_binding() -> Result {
        let file = TestFile::new(16)?;
        let span = Span::new(4, 8, 100, 16)?;
        for frame in [0, 4, 99, 108, u64::MAX] {
            assert_eq!(
                get_pfn::<ShmemInode>(file.node(), file.file()?, span, frame).err(),
                Some(EINVAL)
            );
        }
        assert_eq!(file.node().inode.resident(), 0);
        for _ in 0..2 {
            let found = get_pfn::<ShmemInode>(file.node(), file.file()?, span, 103)?;
            let (index, page) = found.there().ok_or(EAGAIN)?;
            assert_eq!((index, page.order()), (7, 0));
            assert_eq!(page.owner().pages(), Range::new(7, 8));
            drop(page);
            assert_eq!(file.node().inode.resident(), 1);
        }
        // A binding that was made for another file: past the end of this one.
        let longer = Span::new(4, 16, 0, 20)?;
        assert_eq!(
            get_pfn::<ShmemInode>(file.node(), file.file()?, longer, 15).err(),
            Some(EINVAL)
        );
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
            let result = announce_migration(file.node(), pages, || {
                moved = true;
                Ok(())
            });
            assert_eq!(result, Err(eopnotsupp()));
            assert!(!moved);
            assert!(journal.take(&[]));
            a.unbind();
        }
        for flags in [FREE, UNRECLAIMABLE] {
            file.bind(a.as_ref(), flags, 0, 16)?;
            // The end comes even if the migration failed.
            for wanted in [Ok(()), Err(EAGAIN)] {
                let result = announce_migration(file.node(), pages, || {
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
        Invalidation::with(file.node(), |inv| {
            writeout_start(file.node(), inv, pages);
            assert!(journal.take(&[('a', Start, 2, 3)]));
            file.node().invalidate_end(inv);
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
