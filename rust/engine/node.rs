// SPDX-License-Identifier: GPL-2.0

//! A file's node: who has bound which pages, and how they learn that pages go away.
//!
//! # Lock order
//!
//! Outermost first; each may be taken by whoever holds those above it.
//!
//! 1. KVM's `slots_lock` (registration and unregistration run under it)
//! 2. the inode lock (set_size and shmem's fallocate run under it)
//! 3. a folio lock (migration, swap-out and memory failure run under it)
//! 4. what consumers take in their callbacks; KVM: `mmu_lock`
//! 5. [`Node::state`], a spinlock, held for one look or one change at a time
//!
//! The list of stores beside shmem (`abi::store`) has a mutex, which registration takes under 1 when
//! a file is not shmem's. Nothing is taken under it.
//!
//! Callbacks run without [`Node::state`]. They may sleep, but since swap-out calls them with a
//! folio lock held and inside of reclaim, they may neither allocate nor take a sleeping lock whose
//! holder does (rule 16). [`Node::state`] itself is never held across an allocation.
//!
//! # Waits
//!
//! [`Node::bind`], [`Node::unbind`] and [`Node::drain`] wait for running invalidations that are
//! older than themselves, and hold `slots_lock` at most. An invalidation ends without waiting for
//! any of them: what lies between its start and its end is truncation under the inode lock, the
//! copying of one folio, or its move to the swap cache; these wait for folio locks only, whose
//! holders do not wait for `slots_lock`. `store.h` asks the same of other stores.
//!
//! # Invariants
//!
//! * No two notifiers in `exclusive` overlap (rule 7).
//! * A notifier is in one tree from its birth until nothing calls it any more; who calls it is said
//!   by its [`Life`], see [`crate::policy::clock`].
//! * An invalidation is in `running` from before its first callback until after its last one.
//! * `flags` are those of the exclusive bindings, [`Flags::CREATION`] if there are none (rule 8),
//!   and what the inode's mapping was told last.
//!
//! # Memory ordering
//!
//! All of it is the spinlock's. An invalidation that begins after [`Node::bind`] has inserted the
//! notifier finds it; one that began before is found in `running` by [`Node::bind`], which waits,
//! so that pages taken away are gone before the consumer asks for them. The consumer's own
//! protocol (KVM: `mmu_invalidate_seq` under `mmu_lock`) orders callbacks against its faults.

use super::stats;
use crate::abi::inode::{
    File,
    Inode, //
};
use crate::abi::notifier::{
    Notifier,
    Tree, //
};
use crate::abi::record::{
    Record,
    RecordList, //
};
use crate::abi::trace;
use crate::policy::clock::{
    Clock,
    Life,
    Running, //
};
use crate::policy::file::{
    self,
    Space, //
};
use crate::policy::flags::Flags;
use crate::policy::range::Range;
use crate::policy::Refusal;
use kernel::prelude::*;
use kernel::seq_file::SeqFile;
use kernel::{
    new_condvar, new_spinlock, seq_print,
    sync::{
        CondVar,
        SpinLock, //
    },
};

/// What the core knows of a memfile. See the module's documentation for locking.
#[pin_data]
pub(crate) struct Node {
    /// The file.
    pub(crate) inode: Inode,
    /// What happened to it.
    pub(crate) counters: stats::Entry,
    #[pin]
    state: SpinLock<State>,
    /// Somebody may be waiting for an invalidation to end.
    #[pin]
    ended: CondVar,
}

struct State {
    /// Bindings that map pages.
    exclusive: Tree,
    /// How many there are.
    bound: usize,
    /// Bindings that only listen.
    observers: Tree,
    running: RecordList,
    clock: Clock,
    flags: Flags,
}

impl State {
    fn tree(&mut self, notifier: Notifier) -> &mut Tree {
        if notifier.observer() {
            &mut self.observers
        } else {
            &mut self.exclusive
        }
    }

    /// The first notifier that hears of `running`, or the next one `after` one that did: it is
    /// still in its tree, because its death waits for this invalidation.
    fn listener(&self, running: Running, after: Option<Notifier>) -> Option<Notifier> {
        let search = |tree: &Tree, mut at: Option<Notifier>| loop {
            let notifier = tree.next(running.pages, at)?;
            if tree.life(notifier).hears(running.seq) {
                return Some(notifier);
            }
            at = Some(notifier);
        };

        if let Some(observer) = after.filter(|notifier| notifier.observer()) {
            return search(&self.observers, Some(observer));
        }
        search(&self.exclusive, after).or_else(|| search(&self.observers, None))
    }
}

impl Node {
    /// A node for a new, empty file.
    pub(crate) fn new(inode: Inode) -> Result<Pin<KBox<Self>>> {
        let counters = stats::Entry::new(inode.number())?;
        let node = KBox::pin_init(
            pin_init!(Self {
                inode,
                counters,
                state <- new_spinlock!(State {
                    exclusive: Tree::new(),
                    bound: 0,
                    observers: Tree::new(),
                    running: RecordList::new(),
                    clock: Clock::default(),
                    flags: Flags::CREATION,
                }, "memfile_node"),
                ended <- new_condvar!("memfile_ended"),
            }),
            GFP_KERNEL,
        )?;
        node.counters.create.count();
        node.inode.apply(Flags::CREATION, false);
        Ok(node)
    }

    /// `MEMFILE_F_*` of the moment.
    pub(crate) fn flags(&self) -> Flags {
        self.state.lock().flags
    }

    /// May the size change from `old` to `new` bytes? Under the inode lock.
    pub(crate) fn set_size(&self, old: u64, new: u64) -> Result {
        Ok(file::set_size(old, new)?)
    }

    /// fallocate(2), in bytes. Sleeps, takes the inode lock.
    ///
    /// shmem does the work. When it punches a hole it calls [`Self::invalidate_start`] and
    /// [`Self::invalidate_end`] around it, once for the whole hole (rule 14). Allocation takes
    /// nothing away; when it fails, shmem undoes what is not uptodate, and all that a consumer ever
    /// got is (rule 16, rule 22).
    pub(crate) fn fallocate(&self, file: File, mode: i32, offset: i64, len: i64) -> Result {
        let bytes = |value| u64::try_from(value).map_err(|_| EINVAL);
        let size = self.inode.size();
        // CAST: Bits.
        if let Space::Punch(_) = file::fallocate(mode as u32, bytes(offset)?, bytes(len)?, size)? {
            self.counters.punch.count();
        }
        file.fallocate(mode, offset, len)
    }

    /// Binds `notifier` to the pages of `file` it names (rules 6 to 8). Sleeps.
    pub(crate) fn bind(&self, file: File, flags: u64, notifier: Notifier) -> Result {
        if !notifier.has_ops() {
            return Err(EINVAL);
        }
        let exclusive = !notifier.observer();
        if exclusive && !file.writable() {
            return Err(EACCES);
        }
        let pages = notifier.binding(self.inode.pages())?.pages();

        let mut state = self.state.lock();
        if exclusive {
            let wish = Flags::from_consumer(flags)?;
            let flags = state.flags.joined(state.bound, wish)?;
            if state.exclusive.next(pages, None).is_some() {
                return Err(Refusal::Exists.into());
            }
            state.bound += 1;
            state.flags = flags;
            self.inode.apply(flags, true);
        }

        file.hold_for(notifier);
        let birth = state.clock.tick();
        let tree = state.tree(notifier);
        tree.set_life(
            notifier,
            Life {
                birth,
                death: Life::NEVER,
            },
        );
        tree.insert(notifier, pages);

        while state
            .running
            .any(|other| other.holds_up_birth(birth, pages))
        {
            self.ended.wait(&mut state);
        }
        self.counters.bind.count();
        trace::bind(&self.inode, pages);
        Ok(())
    }

    /// Unbinds `notifier`. No callback runs when this returns (rule 9), and no grace period is
    /// waited for, only what is running now and calls this very notifier. Sleeps.
    pub(crate) fn unbind(&self, notifier: Notifier) {
        let Ok(binding) = notifier.binding(self.inode.pages()) else {
            // Not reached: bind() accepted it, and a file that is bound keeps its size.
            return;
        };
        let pages = binding.pages();

        let mut state = self.state.lock();
        let death = state.clock.tick();
        let tree = state.tree(notifier);
        let life = Life {
            death,
            ..tree.life(notifier)
        };
        tree.set_life(notifier, life);

        while state.running.any(|other| other.holds_up_death(life, pages)) {
            self.ended.wait(&mut state);
        }

        state.tree(notifier).remove(notifier);
        let before = state.flags;
        if !notifier.observer() {
            state.bound -= 1;
            state.flags = before.left(state.bound);
            self.inode.apply(state.flags, state.bound != 0);
        }
        let rescue = before.unreclaimable() && !state.flags.unreclaimable();
        drop(state);

        self.counters.unbind.count();
        trace::unbind(&self.inode, pages);
        if rescue {
            self.inode.rescue();
        }
        notifier.release_file();
    }

    /// Waits until nothing invalidates any more. Before the node is freed: a swap-out may have
    /// taken the last page of the file and not have ended yet. Sleeps.
    pub(crate) fn drain(&self) {
        self.counters.destroy.count();
        let mut state = self.state.lock();
        while !state.running.is_empty() {
            self.ended.wait(&mut state);
        }
    }

    /// Takes consumers off `pages`, does `work`, and lets them come back (rule 14). Sleeps.
    pub(crate) fn invalidate<R>(&self, pages: Range, work: impl FnOnce() -> R) -> R {
        Record::with(|record| {
            self.invalidate_start(record, pages);
            let result = work();
            self.invalidate_end(record);
            result
        })
    }

    /// The first half of [`Self::invalidate`], for a caller who keeps `record`.
    pub(crate) fn invalidate_start(&self, record: Record, pages: Range) {
        self.counters.invalidate.count();
        trace::invalidate_start(&self.inode, pages);
        self.begin(record, pages);
        self.each(record, |notifier, frames| notifier.invalidate_start(frames));
        self.each(record, |notifier, _| notifier.flush());
    }

    /// The second half. For swap-out, what keeps `self` is `record`, and only until [`Self::end`]
    /// gives the lock up: nothing may touch `self` after that.
    pub(crate) fn invalidate_end(&self, record: Record) {
        self.each(record, |notifier, frames| notifier.invalidate_end(frames));
        if let Some(running) = record.running() {
            trace::invalidate_end(&self.inode, running.pages);
        }
        self.end(record);
    }

    /// Has a consumer used any of `pages` since the last time? Sleeps.
    pub(crate) fn test_clear_young(&self, pages: Range) -> bool {
        Record::with(|record| {
            let mut young = false;
            self.begin(record, pages);
            self.each(record, |notifier, frames| {
                young |= notifier.test_clear_young(frames);
            });
            self.end(record);
            young
        })
    }

    /// From here on those who now have any of `pages` bound are there until [`Self::end`].
    fn begin(&self, record: Record, pages: Range) {
        let mut state = self.state.lock();
        let seq = state.clock.tick();
        state.running.push(record, seq, pages);
    }

    fn end(&self, record: Record) {
        let mut state = self.state.lock();
        state.running.remove(record);
        // Under the lock, so that who waits to free the node cannot do so before we are done.
        self.ended.notify_all();
    }

    /// Calls `call` for all that take part, each with those of its frames that are meant.
    fn each(&self, record: Record, mut call: impl FnMut(Notifier, Range)) {
        let Some(running) = record.running() else {
            return;
        };
        let mut at = None;
        loop {
            let next = self.state.lock().listener(running, at);
            let Some(notifier) = next else { break };
            let binding = notifier.binding(self.inode.pages());
            if let Some(frames) = binding
                .ok()
                .and_then(|bound| bound.frames_of(running.pages))
            {
                call(notifier, frames);
            }
            at = next;
        }
    }

    /// Lines for `/proc/PID/fdinfo/FD`.
    pub(crate) fn show(&self, seq: &SeqFile) {
        let (flags, bound) = {
            let state = self.state.lock();
            (state.flags, state.bound)
        };
        seq_print!(seq, "memfile-flags:\t{:#x}\n", flags.bits());
        seq_print!(seq, "memfile-bindings:\t{}\n", bound);
        seq_print!(seq, "memfile-pages:\t{}\n", self.inode.resident());
    }
}

#[cfg(CONFIG_KUNIT = "y")]
#[kernel::macros::kunit_tests(memfile_node)]
mod tests {
    use crate::abi::kunit::{
        Call::*,
        Journal,
        TestConsumer,
        TestFile, //
    };
    use crate::policy::flags::Flags;
    use crate::policy::range::Range;
    use kernel::prelude::*;

    const ALL: u64 = Flags::ALL as u64;

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
        assert_eq!(file.node().flags(), Flags::CREATION);
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
            // All starts, then all flushes, before any page goes.
            assert!(journal.take(&[
                ('a', Start, 102, 104),
                ('b', Start, 200, 203),
                ('c', Start, 0, 1),
                ('a', Flush, 0, 0),
                ('b', Flush, 0, 0),
                ('c', Flush, 0, 0),
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
    fn who_comes_meanwhile_hears_no_end_without_a_start() -> Result {
        let journal = Journal::new();
        let file = TestFile::new(16)?;
        let a = TestConsumer::new(&journal, 'a', true, 0)?;
        let b = TestConsumer::new(&journal, 'b', true, 0)?;
        file.bind(a.as_ref(), 0, 0, 16)?;
        // It waits for invalidations of its own pages only: this one it does not overlap.
        file.node().invalidate(Range::of(0, 8), || {
            assert_eq!(file.bind(b.as_ref(), 0, 8, 8), Ok(()));
            b.unbind();
            assert_eq!(file.bind(b.as_ref(), 0, 8, 8), Ok(()));
        });
        assert!(journal.take(&[('a', Start, 0, 8), ('a', Flush, 0, 0), ('a', End, 0, 8)]));
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
            ('a', Flush, 0, 0),
            ('a', Start, 4, 12),
            ('a', Flush, 0, 0),
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
