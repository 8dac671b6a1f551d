// SPDX-License-Identifier: GPL-2.0

//! A file's node: who has bound which pages, and how they learn that pages go away.
//!
//! # Lock order
//!
//! Outermost first; each may be taken by whoever holds those above it.
//!
//! 1. KVM's `slots_lock` (registration and unregistration run under it), then its
//!    `slots_arch_lock` (registration only)
//! 2. the inode lock (set_size and shmem's fallocate run under it)
//! 3. a folio lock (migration, swap-out and memory failure run under it)
//! 4. what consumers take in their callbacks; KVM: `mmu_lock`
//! 5. [`Node::state`], a spinlock, held for one look or one change at a time
//!
//! The list of stores beside shmem (`abi::store`) has a mutex, which registration takes under 1 when
//! a file is not shmem's. Nothing is taken under it.
//!
//! The list of files for debugfs (`abi::FILES`) has one as well, which whoever drops the last
//! reference to a node takes, under a folio lock if that is a swap-out. Its holders take nothing and
//! allocate nothing.
//!
//! Registration allocates and migrates under 1, where pages have to leave areas for movable memory.
//! So nobody may want `slots_lock` or `slots_arch_lock` who holds a folio lock, or is in reclaim.
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
//! * `flags` are the union of what bindings have asked for since the file had neither a binding nor
//!   a page, [`Flags::CREATION`] before the first one (rule 8), and what the inode's mapping was
//!   told last.
//! * New pages come from areas for movable memory only while the file is bound and may move; if any
//!   may lie there, `in_movable_areas` is set.
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
use crate::policy::claim::Claim;
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
        Arc,
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
    claim: Claim,
    /// Pages may lie in areas for movable memory.
    in_movable_areas: bool,
    /// How often new pages were allowed to.
    allowances: u64,
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

    /// Is `notifier` the first listener of its context, the one that is called for all of them? The
    /// first listener of all is; so the search is short unless many contexts share a range.
    fn leads(&self, running: Running, notifier: Notifier) -> bool {
        let mut at = None;
        while let Some(other) = self.listener(running, at) {
            if other == notifier {
                return true;
            }
            if other.context().is_some() && other.context() == notifier.context() {
                return false;
            }
            at = Some(other);
        }
        true
    }

    /// The next listener of the same context.
    fn peer(&self, running: Running, after: Notifier) -> Option<Notifier> {
        after.context()?;
        let mut at = after;
        loop {
            at = self.listener(running, Some(at))?;
            if at.context() == after.context() {
                return Some(at);
            }
        }
    }

    /// Where new pages come from, now that the flags or the bindings have changed.
    ///
    /// An unbound file takes them from unmovable blocks although they may move: the usual next thing
    /// is a binding that pins them, and a pinned page must not sit in a movable block.
    fn place(&mut self, inode: &Inode) {
        let movable = self.bound != 0 && !self.flags.unmovable();
        inode.allocate_movable(movable);
        if movable {
            self.in_movable_areas = true;
            self.allowances += 1;
        }
    }
}

impl Node {
    /// A node for a new, empty file, which one VM only may bind or all.
    pub(crate) fn new(inode: Inode, one_vm: bool) -> Result<Arc<Self>> {
        let counters = stats::Entry::new(inode.number())?;
        let node = Arc::pin_init(
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
                    claim: Claim::new(one_vm),
                    in_movable_areas: false,
                    allowances: 0,
                }, "memfile_node"),
                ended <- new_condvar!("memfile_ended"),
            }),
            GFP_KERNEL,
        )?;
        node.counters.create.count();
        node.inode.apply(Flags::CREATION);
        node.inode.allocate_movable(false);
        Ok(node)
    }

    /// `MEMFILE_F_*` that its pages are promised.
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

    /// Binds `notifier` to the pages of `file` it names (rules 6 to 8). Sleeps, and may allocate and
    /// take folio locks.
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
            let flags = loop {
                if !state.claim.admits(notifier.context()) {
                    return Err(Refusal::NotPermitted.into());
                }
                let has_pages = self.inode.has_pages();
                let flags = state.flags.joined(state.bound, has_pages, wish)?;
                if state.exclusive.next(pages, None).is_some() {
                    return Err(Refusal::Exists.into());
                }
                if !flags.unmovable() || !state.in_movable_areas {
                    break flags;
                }

                // What will not move any more must not stay where others need room. Meanwhile all
                // may change, so look again.
                self.inode.allocate_movable(false);
                let allowances = state.allowances;
                drop(state);
                let left = self.inode.leave_movable_areas();
                state = self.state.lock();
                if let Err(err) = left {
                    state.place(&self.inode);
                    return Err(err);
                }
                if state.allowances == allowances {
                    state.in_movable_areas = false;
                }
            };
            state.bound += 1;
            state.claim = state.claim.taken(notifier.context());
            state.flags = flags;
            self.inode.apply(flags);
            state.place(&self.inode);
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
    /// waited for, only what is running now and calls this very notifier. What the pages were
    /// promised holds on (rule 8), so there is nothing to do for each of them. Sleeps.
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
        if !notifier.observer() {
            state.bound -= 1;
            state.place(&self.inode);
        }
        drop(state);

        self.counters.unbind.count();
        trace::unbind(&self.inode, pages);
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
        Record::with(self, |record| {
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
        self.each_context(record, |notifier, frames| {
            notifier.invalidate_start(record, frames);
        });
    }

    /// The second half. When [`Self::end`] gives the lock up, the inode may go: nothing may touch it
    /// after that. (`self` stays, for the caller holds a reference to it.)
    pub(crate) fn invalidate_end(&self, record: Record) {
        self.each_context(record, |notifier, frames| {
            notifier.invalidate_end(record, frames);
        });
        if let Some(running) = record.running() {
            trace::invalidate_end(&self.inode, running.pages);
        }
        self.end(record);
    }

    /// Has a consumer used any of `pages` since the last time? Sleeps.
    pub(crate) fn test_clear_young(&self, pages: Range) -> bool {
        Record::with(self, |record| {
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
        // Under the lock, so that who waits for the inode cannot go on before we are done.
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
            if let Some(frames) = self.frames(running, notifier) {
                call(notifier, frames);
            }
            at = next;
        }
    }

    /// Likewise, but once for each context. The consumer gets the other bindings of the context from
    /// [`Self::next_range`], so that it can do all of them under one lock.
    fn each_context(&self, record: Record, mut call: impl FnMut(Notifier, Range)) {
        let Some(running) = record.running() else {
            return;
        };
        self.each(record, |notifier, frames| {
            if self.state.lock().leads(running, notifier) {
                call(notifier, frames);
            }
        });
    }

    /// The next binding of the context of `after` that takes part, and those of its frames that are
    /// meant. Takes a spinlock, and may be called under others.
    pub(crate) fn next_range(&self, record: Record, after: Notifier) -> Option<(Notifier, Range)> {
        let running = record.running()?;
        let notifier = self.state.lock().peer(running, after)?;
        Some((notifier, self.frames(running, notifier)?))
    }

    /// Those frames of `notifier` that are meant.
    fn frames(&self, running: Running, notifier: Notifier) -> Option<Range> {
        let binding = notifier.binding(self.inode.pages()).ok()?;
        binding.frames_of(running.pages)
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

        // The first of a context need not be the first of all.
        file.node().invalidate(Range::of(6, 9), || {
            assert!(journal.take(&[('b', Start, 2, 4), ('c', Start, 100, 101)]));
        });
        assert!(journal.take(&[('b', End, 2, 4), ('c', End, 100, 101)]));
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
