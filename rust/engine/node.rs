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
//! The list of the stores of other modules (`abi::foreign`) has a mutex, which registration takes
//! under 1 when a file is of no store in the kernel. Nothing is taken under it.
//!
//! The list of files for debugfs ([`stats::Files`]) has one as well. Whoever drops the last reference
//! to a node takes it, under a folio lock if that is a swap-out. Its holders take nothing and
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
use crate::abi::file::File;
use crate::abi::inode::Inode;
use crate::abi::invalidation::{
    Invalidation,
    Invalidations, //
};
use crate::abi::notifier::{
    Hits,
    Notifier,
    Tree, //
};
use crate::abi::trace;
use crate::policy::claim::Claim;
use crate::policy::clock::{
    Clock,
    Life,
    Scope, //
};
use crate::policy::file::{
    self,
    Space, //
};
use crate::policy::flags::Flags;
use crate::policy::range::Range;
use crate::policy::Refusal;
use crate::store::AnyStore;
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
    /// Where it has its pages.
    pub(crate) store: AnyStore,
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
    running: Invalidations,
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

    /// The first notifier that hears of an invalidation of `scope`, or the next one `after` one that
    /// did: it is still in its tree, because its death waits for this invalidation.
    fn listener(&self, scope: Scope, after: Option<Notifier>) -> Option<Notifier> {
        let search = |tree: &Tree, mut at: Option<Notifier>| loop {
            let notifier = tree.next(scope.pages, at)?;
            if tree.life(notifier).hears(scope.seq) {
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
    fn leads(&self, scope: Scope, notifier: Notifier) -> bool {
        let mut at = None;
        while let Some(other) = self.listener(scope, at) {
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
    fn peer(&self, scope: Scope, after: Notifier) -> Option<Notifier> {
        after.context()?;
        let mut at = after;
        loop {
            at = self.listener(scope, Some(at))?;
            if at.context() == after.context() {
                return Some(at);
            }
        }
    }

    /// Where new pages come from, now that the flags or the bindings have changed.
    ///
    /// An unbound file takes them from unmovable blocks although they may move: the usual next thing
    /// is a binding that pins them, and a pinned page must not sit in a movable block.
    fn place(&mut self, store: &AnyStore) {
        let movable = self.bound != 0 && !self.flags.unmovable();
        store.allocate_movable(movable);
        if movable {
            self.in_movable_areas = true;
            self.allowances += 1;
        }
    }
}

impl Node {
    /// A node for a new, empty file, which one VM only may bind or all.
    pub(crate) fn new(store: AnyStore, one_vm: bool) -> Result<Arc<Self>> {
        let inode = store.inode();
        let counters = stats::Entry::new(inode.number())?;
        let node = Arc::pin_init(
            pin_init!(Self {
                inode,
                store,
                counters,
                state <- new_spinlock!(State {
                    exclusive: Tree::new(),
                    bound: 0,
                    observers: Tree::new(),
                    running: Invalidations::new(),
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
        node.store.set_flags(Flags::CREATION);
        node.store.allocate_movable(false);
        Ok(node)
    }

    /// `MEMFILE_F_*` that its pages are promised.
    pub(crate) fn flags(&self) -> Flags {
        self.state.lock().flags
    }

    /// May the size change from `old` to `new` bytes? Under the inode lock.
    pub(crate) fn set_size(&self, old: u64, new: u64) -> Result {
        Ok(file::set_size(old, new, self.store.unit())?)
    }

    /// fallocate(2), in bytes. Sleeps, takes the inode lock.
    ///
    /// The store does the work. When it punches a hole, it calls [`Self::invalidate_start`] and
    /// [`Self::invalidate_end`] around that, once for the whole hole (rule 14). Allocation takes
    /// nothing away; when it fails, shmem undoes what is not uptodate, and all that a consumer ever
    /// got is (rule 16, rule 22).
    pub(crate) fn fallocate(&self, file: File, mode: i32, offset: i64, len: i64) -> Result {
        let bytes = |value| u64::try_from(value).map_err(|_| EINVAL);
        let size = self.inode.size();
        // CAST: Bits.
        if let Space::Punch(_) = file::fallocate(mode as u32, bytes(offset)?, bytes(len)?, size)? {
            self.counters.punch.count();
        }
        self.store.fallocate(file, mode, offset, len)
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
        let pages = notifier.span(self.inode.pages())?.pages();

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
                self.store.allocate_movable(false);
                let allowances = state.allowances;
                drop(state);
                let left = self.store.leave_movable_areas();
                state = self.state.lock();
                if let Err(err) = left {
                    state.place(&self.store);
                    return Err(err);
                }
                if state.allowances == allowances {
                    state.in_movable_areas = false;
                }
            };
            state.bound += 1;
            state.claim = state.claim.taken(notifier.context());
            state.flags = flags;
            self.store.set_flags(flags);
            state.place(&self.store);
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
        let Ok(span) = notifier.span(self.inode.pages()) else {
            // Not reached: bind() accepted it, and a file that is bound keeps its size.
            return;
        };
        let pages = span.pages();

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
            state.place(&self.store);
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

    /// Lets consumers unmap `pages`, does `work`, and lets them map the pages again (rule 14). Sleeps.
    pub(crate) fn invalidate<R>(&self, pages: Range, work: impl FnOnce() -> R) -> R {
        Invalidation::with(self, |inv| {
            self.invalidate_start(inv, pages);
            let result = work();
            self.invalidate_end(inv);
            result
        })
    }

    /// The first half of [`Self::invalidate`], for a caller who keeps the record of `inv`.
    pub(crate) fn invalidate_start(&self, inv: Invalidation, pages: Range) {
        self.counters.invalidate.count();
        trace::invalidate_start(&self.inode, pages);
        self.begin(inv, pages);
        self.each_context(inv, |notifier, frames| {
            notifier.invalidate_start(inv, frames);
        });
    }

    /// The second half. When [`Self::end`] gives the lock up, the inode may go: nothing may touch it
    /// after that. (`self` stays, for the caller holds a reference to it.)
    pub(crate) fn invalidate_end(&self, inv: Invalidation) {
        self.each_context(inv, |notifier, frames| {
            notifier.invalidate_end(inv, frames);
        });
        if let Some(scope) = inv.scope() {
            trace::invalidate_end(&self.inode, scope.pages);
        }
        self.end(inv);
    }

    /// Has a consumer used any of `pages` since the last time? Sleeps.
    pub(crate) fn test_clear_young(&self, pages: Range) -> bool {
        Invalidation::with(self, |inv| {
            let mut young = false;
            self.begin(inv, pages);
            self.each(inv, |notifier, frames| {
                young |= notifier.test_clear_young(frames);
            });
            self.end(inv);
            young
        })
    }

    /// Begins `inv`. From here on, the bindings that overlap `pages` stay until [`Self::end`].
    fn begin(&self, inv: Invalidation, pages: Range) {
        let mut state = self.state.lock();
        let seq = state.clock.tick();
        state.running.push(inv, seq, pages);
        // From now on it is settled who takes part. Mostly that is one binding, and the tree need
        // not be searched again.
        let scope = Scope { seq, pages };
        let first = state.listener(scope, None);
        let more = first.is_some_and(|first| state.listener(scope, Some(first)).is_some());
        Hits { first, more }.note(inv);
    }

    fn end(&self, inv: Invalidation) {
        let mut state = self.state.lock();
        state.running.remove(inv);
        // This is done under the lock: whoever waits in order to free the inode cannot go on before
        // this function has finished.
        self.ended.notify_all();
    }

    /// Calls `call` for each notifier that takes part, with those of its frames that are in scope.
    fn each(&self, inv: Invalidation, mut call: impl FnMut(Notifier, Range)) {
        let (Some(scope), Hits { first, more }) = (inv.scope(), Hits::of(inv)) else {
            return;
        };
        let mut at = first;
        while let Some(notifier) = at {
            if let Some(frames) = self.frames(scope, notifier) {
                call(notifier, frames);
            }
            at = if more {
                self.state.lock().listener(scope, at)
            } else {
                None
            };
        }
    }

    /// Does the same once for each context. The consumer gets the other bindings of the context from
    /// [`Self::next_range`], so that it can do all of them under one lock.
    fn each_context(&self, inv: Invalidation, mut call: impl FnMut(Notifier, Range)) {
        let (Some(scope), Hits { first, .. }) = (inv.scope(), Hits::of(inv)) else {
            return;
        };
        self.each(inv, |notifier, frames| {
            if first == Some(notifier) || self.state.lock().leads(scope, notifier) {
                call(notifier, frames);
            }
        });
    }

    /// The next notifier of the context of `after` that takes part, and those of its frames that are
    /// in scope. Takes a spinlock, and may be called under others.
    pub(crate) fn next_range(
        &self,
        inv: Invalidation,
        after: Notifier,
    ) -> Option<(Notifier, Range)> {
        let scope = inv.scope()?;
        if !Hits::of(inv).more {
            return None;
        }
        let notifier = self.state.lock().peer(scope, after)?;
        Some((notifier, self.frames(scope, notifier)?))
    }

    /// The frames of `notifier` that are in scope.
    fn frames(&self, scope: Scope, notifier: Notifier) -> Option<Range> {
        let span = notifier.span(self.inode.pages()).ok()?;
        span.frames_of(scope.pages)
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
