// SPDX-License-Identifier: GPL-2.0

//! A file's node: it keeps the bindings and calls their consumers when pages leave the file.
//!
//! # Lock order
//!
//! Outermost first; a task that holds a lock may take those below it.
//!
//! 1. KVM's `slots_lock` (registration and unregistration run under it), then its
//!    `slots_arch_lock` (registration only)
//! 2. the inode lock (set_size and shmem's fallocate run under it)
//!    in hugetlbfs then the fault mutex of a page (allocation and holes)
//! 3. a folio lock (migration, swap-out and memory failure run under it)
//! 4. the locks that consumers take in their callbacks; KVM: `mmu_lock`
//! 5. [`Node::state`], a spinlock, held for one look-up or one change at a time
//!
//! The list of the stores of other modules (`abi::foreign`) has a mutex. Registration takes it
//! under 1 when a file is of no store in the kernel, and takes nothing under it.
//!
//! The list of files for debugfs ([`stats::FILES`]) has a mutex as well. The task that drops the
//! last reference to a node takes it, under a folio lock if that task swaps out. Its holder takes
//! no other lock and allocates nothing.
//!
//! The first page that a consumer asks for makes counters for each CPU ([`Counters::spread`]),
//! which takes percpu's `pcpu_alloc_mutex`, under none of the above.
//!
//! Registration allocates under 1, and migrates or hides pages there, which takes folio locks. So a
//! task that holds a folio lock, or is in reclaim, must not take `slots_lock` or `slots_arch_lock`.
//!
//! Callbacks run without [`Node::state`]. They may sleep, but swap-out calls them inside of reclaim
//! with a folio lock held, so they may neither allocate nor take a sleeping lock whose holder
//! allocates (rule 16). [`Node::state`] itself is never held across an allocation.
//!
//! # Waits
//!
//! [`Node::bind`], [`Node::unbind`] and [`Node::drain`] wait for running invalidations that are
//! older than themselves, and hold `slots_lock` at most, [`Node::bind`] `slots_arch_lock` as well. An
//! invalidation ends without waiting for any of them: between its start and its end lies truncation
//! under the inode lock, the copying of one folio, or its move to the swap cache. These wait for
//! folio locks only, and in hugetlbfs for fault mutexes, whose holders do not wait for `slots_lock`;
//! but the holder of a fault mutex may be in reclaim for a huge page, of another file even. `store.h`
//! requires the same of other stores.
//!
//! A binding that gives up `KERNEL_INACCESSIBLE` waits until no fallocate() of the file runs, the
//! younger included. These wait for no binding.
//!
//! Before pages have to leave areas for movable memory, [`Node::bind`] also waits for allocations
//! that began earlier: for each fallocate() of the file, and for the pages that consumers of any
//! file are getting one by one ([`Allocation`]). These take no lock above 2. A fallocate() of
//! another file, which may take minutes, is not waited for.
//!
//! # Invariants
//!
//! * No two notifiers in `exclusive` overlap (rule 7).
//! * A notifier is in one tree from its birth until no invalidation calls it any more; its [`Life`]
//!   decides which invalidations call it, see [`crate::policy::clock`].
//! * A notifier with a context that is not at home is in `others` as well, as long as it is in its
//!   tree. Which context is at home changes only while no notifier with a context is in a tree, and no
//!   [`Node::bind`] with one is running.
//! * An invalidation is in `running` from before its first callback until after its last one.
//! * `flags` are the union of what bindings have asked for since the file had neither a binding nor
//!   a page, and of what the store's pages always are (rule 8); the inode's mapping has the same
//!   flags.
//! * New pages come from areas for movable memory only while the file is bound (or its store takes
//!   what there is) and its pages may move; if a page may lie there, `in_movable_areas` is set. A
//!   page that migrates may come to lie there as well. As long as the file is `untouched`, no page
//!   has been allocated, and none is about to be.
//! * If the flags have `KERNEL_INACCESSIBLE`, no consumer gets a page before it has left the kernel's
//!   direct map, and after the first binding that asked for it no page with content is there. The
//!   flag comes only while nothing is bound, and goes only while there is neither a binding nor a
//!   page (rule 25).
//!
//! # Memory ordering
//!
//! The spinlock gives all ordering. An invalidation that begins after [`Node::bind`] has inserted
//! the notifier finds it; [`Node::bind`] finds one that began before in `running` and waits for it,
//! so that pages taken away are gone before the consumer asks for them. The consumer's own protocol
//! (KVM: `mmu_invalidate_seq` under `mmu_lock`) orders callbacks against its faults.

use super::stats::{
    Counters,
    Event, //
};
use crate::abi::allocation::Allocation;
use crate::abi::file::File;
use crate::abi::inode::Inode;
use crate::abi::invalidation::{
    Invalidation,
    Invalidations, //
};
use crate::abi::notifier::{
    Hits,
    Notifier,
    Others,
    Seat,
    Tree, //
};
use crate::abi::registry::Entry;
use crate::abi::{
    task,
    trace, //
};
use crate::policy::claim::Claim;
use crate::policy::clock::{
    Clock,
    Life,
    Scope,
    Tick, //
};
use crate::policy::context::{
    Home,
    Position, //
};
use crate::policy::file::{
    self,
    Space, //
};
use crate::policy::flags::Flags;
use crate::policy::range::Range;
use crate::policy::Refusal;
use crate::store::AnyStore;
use core::num::NonZeroU64;
use kernel::prelude::*;
use kernel::seq_file::SeqFile;
use kernel::{
    new_condvar, new_spinlock, seq_print,
    sync::{
        Arc,
        CondVar,
        SpinLock,
        SpinLockGuard, //
    },
};

/// The core's state of a memfile. See the module's documentation for locking.
#[pin_data]
pub(crate) struct Node {
    /// The file.
    pub(crate) inode: Inode,
    /// The store that owns its pages.
    pub(crate) store: AnyStore,
    /// Its counters.
    #[pin]
    pub(crate) counters: Entry<Counters>,
    #[pin]
    state: SpinLock<State>,
    /// Registration, unregistration and [`Node::drain`] wait here for the end of an invalidation.
    #[pin]
    ended: CondVar,
}

struct State {
    /// Bindings of mappers.
    exclusive: Tree,
    /// The number of bindings in `exclusive`.
    bound: usize,
    /// Bindings of observers.
    observers: Tree,
    /// The context whose bindings are not in `others`.
    home: Home,
    /// The bindings of other contexts, which are in their trees as well.
    others: Others,
    running: Invalidations,
    /// Calls of fallocate() that allocate.
    allocating: Invalidations,
    /// How many tasks wait until a record is off one of these lists.
    waiting: u32,
    clock: Clock,
    flags: Flags,
    /// No page that a consumer could get is in the kernel's direct map.
    hidden: bool,
    claim: Claim,
    /// There was neither a binding nor an fallocate() that allocates.
    untouched: bool,
    /// Pages may lie in areas for movable memory.
    in_movable_areas: bool,
    /// How often new pages were allowed to lie there.
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

    /// The first notifier that an invalidation of `scope` calls, or the next one `after` a notifier
    /// that it calls: that one is still in its tree, because its death waits for this invalidation.
    fn listener(&self, scope: Scope, after: Option<Notifier>) -> Option<Notifier> {
        let search = |tree: &Tree, mut at: Option<Notifier>| loop {
            let notifier = tree.next(scope.pages, at)?;
            if tree.life(notifier).called_at(scope.seq) {
                return Some(notifier);
            }
            at = Some(notifier);
        };

        if let Some(observer) = after.filter(|notifier| notifier.observer()) {
            return search(&self.observers, Some(observer));
        }
        // No other mapper has pages of this one (rule 7).
        let last = after.is_some_and(|mapper| mapper.span().pages().covers(scope.pages));
        let mapper = if last {
            None
        } else {
            search(&self.exclusive, after)
        };
        mapper.or_else(|| search(&self.observers, None))
    }

    /// The position of `notifier` in `others`, if it has one there. It is in its tree.
    fn position(&self, notifier: Notifier) -> Option<Position> {
        let context = notifier
            .context()
            .filter(|&context| !self.home.is(context))?;
        let (observer, pages) = (notifier.observer(), notifier.span().pages());
        let birth = self.life(notifier).birth;
        Some(Position::new(context, observer, pages, birth))
    }

    fn life(&self, notifier: Notifier) -> Life {
        if notifier.observer() {
            self.observers.life(notifier)
        } else {
            self.exclusive.life(notifier)
        }
    }

    /// The first notifier of a context in `others` that an invalidation of `scope` calls, or the next
    /// one `after` such a notifier.
    fn other(
        &self,
        scope: Scope,
        context: NonZeroU64,
        after: Option<Position>,
    ) -> Option<Notifier> {
        let next = |from| self.others.next(from);
        Position::find(context, scope.pages, after, next, |&notifier| {
            self.life(notifier).called_at(scope.seq)
        })
    }

    /// Is `notifier` the first of its context, the one that is called for all of them? The caller
    /// asks for all that take part, in their order, and keeps in `home_was_called` whether it called
    /// the first one of the context that is at home.
    fn leads(&self, scope: Scope, notifier: Notifier, home_was_called: &mut bool) -> bool {
        match notifier.context() {
            None => true,
            Some(context) if self.home.is(context) => {
                let leads = !*home_was_called;
                *home_was_called = true;
                leads
            }
            Some(context) => self.other(scope, context, None) == Some(notifier),
        }
    }

    /// The next notifier of the same context that the invalidation calls.
    fn peer(&self, scope: Scope, after: Notifier) -> Option<Notifier> {
        let context = after.context()?;
        if let Some(position) = self.position(after) {
            return self.other(scope, context, Some(position));
        }
        let mut at = after;
        loop {
            at = self.listener(scope, Some(at))?;
            if at.context() == after.context() {
                return Some(at);
            }
        }
    }

    /// The flags of the file once a mapper with these wishes binds `pages`, if it may.
    fn admit(
        &self,
        notifier: Notifier,
        pages: Range,
        has_pages: bool,
        wish: Flags,
    ) -> Result<Flags, Refusal> {
        if !self.claim.admits(notifier.context()) {
            return Err(Refusal::NotPermitted);
        }
        let flags = self.flags.joined(self.bound, has_pages, wish)?;
        if self.exclusive.next(pages, None).is_some() {
            return Err(Refusal::Exists);
        }
        Ok(flags)
    }

    /// Where new pages come from, now that the flags or the bindings have changed.
    ///
    /// An unbound file takes them from unmovable blocks although they may move: usually a binding
    /// that pins them follows, and a pinned page must not lie in a movable block. Only a store
    /// whose pages may lie anywhere takes the pages that there are.
    fn place(&mut self, store: &AnyStore) {
        let wanted = self.bound != 0 || store.movable_before_binding();
        let movable = wanted && !self.flags.unmovable();
        store.allocate_movable(movable);
        if movable && !self.untouched {
            self.allow_movable_areas();
        }
    }

    /// Every caller that may allocate a page calls this first, before the store decides where the
    /// page may lie.
    fn touch(&mut self, store: &AnyStore) {
        if self.untouched {
            self.untouched = false;
            self.place(store);
        }
    }

    /// Is anything under way that began before `now` and may leave a page in areas for movable
    /// memory, as far as the node knows of it?
    fn busy_before(&self, now: Tick) -> bool {
        let earlier = |other: Scope| other.seq < now;
        self.running.any(earlier) || self.allocating.any(earlier)
    }

    /// From here on a page may lie there.
    fn allow_movable_areas(&mut self) {
        self.in_movable_areas = true;
        self.allowances += 1;
    }

    /// Adds `inv`, an invalidation of `pages`, to the running ones. From here on, the bindings that
    /// overlap `pages` stay until it ends.
    fn begin(&mut self, inv: Invalidation, pages: Range) {
        let seq = self.clock.tick();
        self.running.push(inv, seq, pages);
        // The set of bindings that take part is fixed from now on. Mostly it is one binding, and
        // the tree need not be searched again.
        let scope = Scope { seq, pages };
        let first = self.listener(scope, None);
        let more = first.is_some_and(|first| self.listener(scope, Some(first)).is_some());
        Hits { first, more }.note(inv);
    }
}

impl Node {
    /// A node for a new, empty file. If `one_vm` is set, only one VM may bind it.
    pub(crate) fn new(store: AnyStore, one_vm: bool) -> Result<Arc<Self>> {
        let inode = store.inode();
        let counters = Counters::new(inode.number());
        let flags = store.inherent_flags();
        let node = Arc::pin_init(
            pin_init!(Self {
                inode,
                store,
                counters <- Entry::new(counters),
                state <- new_spinlock!(State {
                    exclusive: Tree::new(),
                    bound: 0,
                    observers: Tree::new(),
                    home: Home::default(),
                    others: Others::new(),
                    running: Invalidations::new(),
                    allocating: Invalidations::new(),
                    waiting: 0,
                    clock: Clock::default(),
                    flags,
                    hidden: false,
                    claim: Claim::new(one_vm),
                    untouched: true,
                    in_movable_areas: false,
                    allowances: 0,
                }, "memfile_node"),
                ended <- new_condvar!("memfile_ended"),
            }),
            GFP_KERNEL_ACCOUNT,
        )?;
        node.counters.count(Event::Create);
        node.store.set_flags(flags);
        node.state.lock().place(&node.store);
        Ok(node)
    }

    /// `MEMFILE_F_*` that hold for its pages.
    pub(crate) fn flags(&self) -> Flags {
        self.state.lock().flags
    }

    /// May the size change from `old` to `new` bytes? Under the inode lock.
    pub(crate) fn set_size(&self, old: u64, new: u64) -> Result {
        Ok(file::set_size(old, new)?)
    }

    /// fallocate(2), in bytes. Sleeps, takes the inode lock.
    ///
    /// The store does the work. When it punches a hole, it calls [`Self::invalidate_start`] and
    /// [`Self::invalidate_end`] around that, once for the whole hole (rule 14), unless reclaim takes a
    /// folio that the hole cuts before it is cut. Allocation takes no
    /// page away; when it fails, shmem removes only pages that are not uptodate, and each page that
    /// a consumer got is uptodate (rule 16, rule 22).
    #[inline(always)]
    pub(crate) fn fallocate(&self, file: File, mode: i32, offset: i64, len: i64) -> Result {
        let bytes = |value| u64::try_from(value).map_err(|_| EINVAL);
        let size = self.inode.size();
        // CAST: Bits.
        let space = file::fallocate(mode as u32, bytes(offset)?, bytes(len)?, size)?;
        if let Space::Punch(_) = space {
            self.counters.count(Event::Punch);
            return self.store.fallocate(file, mode, offset, len);
        }
        let Space::Allocate(Some(pages)) = space else {
            return self.store.fallocate(file, mode, offset, len);
        };
        self.allocate(pages, || {
            self.store.fallocate(file, mode, offset, len)?;
            if self.flags().kernel_inaccessible() {
                // The new pages are there, and are zero. Those that stay in the direct map now leave
                // it one by one when a consumer gets them; the consumer gets the errors.
                let _ = self.store.hide(pages);
            }
            Ok(())
        })
    }

    /// Does `work`, which allocates `pages` and may hide them; [`Self::bind`] waits for that if the
    /// pages must not lie in areas for movable memory, or must not be hidden any more. Sleeps.
    fn allocate<R>(&self, pages: Range, work: impl FnOnce() -> R) -> R {
        Invalidation::with(self, |record| {
            let mut state = self.state.lock();
            state.touch(&self.store);
            let seq = state.clock.tick();
            state.allocating.push(record, seq, pages);
            drop(state);
            let result = work();
            self.finish(|state| state.allocating.remove(record));
            result
        })
    }

    /// Binds `notifier` to the pages of `file` that it names (rules 6 to 8). Sleeps, and may
    /// allocate and take folio locks. `EINTR` if a fatal signal comes while it waits for what others
    /// do to the file, which has no end of its own.
    pub(crate) fn bind(&self, file: File, flags: u64, notifier: Notifier) -> Result {
        if !notifier.has_ops() {
            return Err(EINVAL);
        }
        let context = notifier.context();
        let mut state = self.state.lock();
        let mut seat = None;
        if !state.home.enter(context) {
            drop(state);
            let allocated = Seat::new();
            state = self.state.lock();
            match allocated {
                Ok(allocated) => seat = Some(allocated),
                Err(err) => {
                    state.home.leave(context);
                    return Err(err);
                }
            }
        }
        let hide = self
            .join(state, file, flags, notifier, seat)
            .inspect_err(|_| self.state.lock().home.leave(context))?;
        self.counters.count(Event::Bind);
        trace::bind(&self.inode, notifier.span().pages());

        if hide {
            self.hide_all().inspect_err(|_| {
                self.unbind(notifier);
                let mut state = self.state.lock();
                state.claim = state.claim.given_back();
            })?;
        }
        Ok(())
    }

    /// The part of [`Self::bind`] that makes `notifier` take part from now on, if it may; a seat in
    /// `others` is for one that is not at home. Must the pages that are there be hidden? Sleeps.
    fn join<'a>(
        &'a self,
        mut state: SpinLockGuard<'a, State>,
        file: File,
        flags: u64,
        notifier: Notifier,
        seat: Option<Seat>,
    ) -> Result<bool> {
        let exclusive = !notifier.observer();
        if exclusive && !file.writable() {
            return Err(EACCES);
        }
        let pages = notifier.checked_span(self.inode.pages())?.pages();

        if exclusive {
            let wish = Flags::from_consumer(flags)?.and(self.store.inherent_flags());
            if wish.kernel_inaccessible() && !self.store.can_hide() {
                return Err(EINVAL);
            }
            let (mut again, mut cleared) = (false, false);
            let flags = loop {
                let has_pages = self.inode.has_pages();
                // What others do to the file can draw this out.
                let admitted = if again && task::killed() {
                    Err(EINTR)
                } else {
                    let admitted = state.admit(notifier, pages, has_pages, wish);
                    admitted.map_err(Error::from)
                };
                let flags = match admitted {
                    Ok(flags) => flags,
                    Err(err) => {
                        if cleared {
                            // It is not to be: pages come from where they came from before.
                            state.place(&self.store);
                        }
                        return Err(err);
                    }
                };
                again = true;
                if state.flags.kernel_inaccessible()
                    && !flags.kernel_inaccessible()
                    && !state.allocating.is_empty()
                {
                    // The file has no pages yet. Those that are on their way may be hidden, so check
                    // again when they are there. No allocation begins while the lock is held.
                    self.wait(&mut state);
                    continue;
                }
                if !flags.unmovable() || !state.in_movable_areas {
                    break flags;
                }

                // Pages that will not move any more must leave areas for movable memory, also
                // those that no look-up finds yet: they were allocated there, or are on their way
                // there. The lock is released for that and the state may change, so check again.
                self.store.allocate_movable(false);
                cleared = true;
                let allowances = state.allowances;
                let now = state.clock.tick();
                while state.busy_before(now) {
                    self.wait(&mut state);
                }
                drop(state);
                Allocation::wait_for_all();
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
            let changed = cleared || state.bound == 0 || state.flags != flags;
            state.bound += 1;
            state.untouched = false;
            state.claim = state.claim.taken(notifier.context());
            if changed {
                state.flags = flags;
                state.hidden &= flags.kernel_inaccessible();
                self.store.set_flags(flags);
                state.place(&self.store);
            }
        } else {
            state.touch(&self.store);
        }
        let hide = exclusive && state.flags.kernel_inaccessible() && !state.hidden;
        if exclusive && !hide {
            state.claim = state.claim.confirmed();
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
        if let (Some(seat), Some(position)) = (seat, state.position(notifier)) {
            state.others.insert(seat, position, notifier);
        }

        while state
            .running
            .any(|other| other.holds_up_birth(birth, pages))
        {
            self.wait(&mut state);
        }
        Ok(hide)
    }

    /// Takes all pages that the file has out of the kernel's direct map (rule 25), for a binding that
    /// has asked for that and has no page yet. If this fails, the flags stay: some pages may be out.
    /// Sleeps.
    fn hide_all(&self) -> Result {
        if let Some(pages) = Range::new(0, self.inode.pages()) {
            self.store.hide(pages)?;
        }
        // Pages that come later are hidden before a consumer gets them, and content that comes back
        // from swap at once.
        let mut state = self.state.lock();
        state.hidden = true;
        state.claim = state.claim.confirmed();
        Ok(())
    }

    /// Unbinds `notifier`. No callback runs when this returns (rule 9). It waits for no grace
    /// period, only for running invalidations that call this notifier. The promises for the pages
    /// hold on (rule 8), so no work is done page by page. Sleeps.
    pub(crate) fn unbind(&self, notifier: Notifier) {
        let pages = notifier.span().pages();

        let mut state = self.state.lock();
        let death = state.clock.tick();
        let tree = state.tree(notifier);
        let life = Life {
            death,
            ..tree.life(notifier)
        };
        tree.set_life(notifier, life);

        while state.running.any(|other| other.holds_up_death(life, pages)) {
            self.wait(&mut state);
        }

        if let Some(position) = state.position(notifier) {
            state.others.remove(position);
        }
        state.home.leave(notifier.context());
        state.tree(notifier).remove(notifier);
        if !notifier.observer() {
            state.bound -= 1;
            if state.bound == 0 {
                state.place(&self.store);
            }
        }
        drop(state);

        self.counters.count(Event::Unbind);
        trace::unbind(&self.inode, pages);
        notifier.release_file();
    }

    /// Waits until no invalidation is running, before the node is freed: a swap-out may have taken
    /// the last page of the file and not have ended yet. Sleeps.
    pub(crate) fn drain(&self) {
        self.counters.count(Event::Destroy);
        let mut state = self.state.lock();
        while !state.running.is_empty() {
            self.wait(&mut state);
        }
    }

    /// Does `work`, which migrates `pages`, as [`Self::invalidate`] does; [`None`] if the pages must
    /// not move. Where they move to may be an area for movable memory. Sleeps.
    pub(crate) fn migrate<R>(&self, pages: Range, work: impl FnOnce() -> R) -> Option<R> {
        Invalidation::with(self, |inv| {
            let mut state = self.state.lock();
            if state.flags.unmovable() {
                return None;
            }
            state.allow_movable_areas();
            state.begin(inv, pages);
            drop(state);
            self.tell_start(inv, pages);
            let result = work();
            self.invalidate_end(inv);
            Some(result)
        })
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

    /// The first half of [`Self::invalidate`], for a caller that keeps the record of `inv`.
    #[inline(always)]
    pub(crate) fn invalidate_start(&self, inv: Invalidation, pages: Range) {
        self.state.lock().begin(inv, pages);
        self.tell_start(inv, pages);
    }

    /// Lets consumers unmap the pages of `inv`, which has begun.
    #[inline(always)]
    fn tell_start(&self, inv: Invalidation, pages: Range) {
        self.counters.count(Event::Invalidate);
        trace::invalidate_start(&self.inode, pages);
        self.each_context(inv, |notifier, frames| {
            notifier.invalidate_start(inv, frames);
        });
    }

    /// The second half. When [`Self::end`] releases the lock, the inode may be freed: nothing may
    /// use it after that. (`self` stays, because the caller holds a reference to it.)
    #[inline(always)]
    pub(crate) fn invalidate_end(&self, inv: Invalidation) {
        self.each_context(inv, |notifier, frames| {
            notifier.invalidate_end(inv, frames);
        });
        if let Some(scope) = inv.scope() {
            trace::invalidate_end(&self.inode, scope.pages);
        }
        self.end(inv);
    }

    /// Has a consumer used any of `pages` since the last call? Sleeps.
    pub(crate) fn test_clear_young(&self, pages: Range) -> bool {
        Invalidation::with(self, |inv| {
            let mut young = false;
            self.state.lock().begin(inv, pages);
            self.each(inv, |notifier, frames| {
                young |= notifier.test_clear_young(frames);
            });
            self.end(inv);
            young
        })
    }

    fn end(&self, inv: Invalidation) {
        self.finish(|state| state.running.remove(inv));
    }

    /// Lets `remove` take a record off its list, and wakes the tasks that wait for that.
    fn finish(&self, remove: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        remove(&mut state);
        if state.waiting > 0 {
            // Under the lock: a task that waits in order to free the inode cannot go on before this
            // function has finished.
            self.ended.notify_all();
        }
    }

    /// Waits until a record is off its list. Sleeps, without the lock.
    fn wait(&self, state: &mut SpinLockGuard<'_, State>) {
        state.waiting += 1;
        self.ended.wait(state);
        state.waiting -= 1;
    }

    /// Calls `call` for each notifier that takes part, with those of its frames that are in scope.
    fn each(&self, inv: Invalidation, mut call: impl FnMut(Notifier, Range)) {
        let (Some(scope), Hits { first, more }) = (inv.scope(), Hits::of(inv)) else {
            return;
        };
        let mut at = first;
        while let Some(notifier) = at {
            if let Some(frames) = frames(scope, notifier) {
                call(notifier, frames);
            }
            at = if more {
                self.state.lock().listener(scope, at)
            } else {
                None
            };
        }
    }

    /// Does the same once for each context. The consumer gets the other bindings of the context
    /// from [`Self::next_range`], so that it can handle all of them under one lock.
    fn each_context(&self, inv: Invalidation, mut call: impl FnMut(Notifier, Range)) {
        let (Some(scope), Hits { more, .. }) = (inv.scope(), Hits::of(inv)) else {
            return;
        };
        let mut home = false;
        self.each(inv, |notifier, frames| {
            if !more || self.state.lock().leads(scope, notifier, &mut home) {
                call(notifier, frames);
            }
        });
    }

    /// The next notifier of the context of `after` that takes part, and those of its frames that are
    /// in scope. C asks only if the record of `inv` says that there are more. Takes a spinlock, and may
    /// be called under others.
    pub(crate) fn next_range(
        &self,
        inv: Invalidation,
        after: Notifier,
    ) -> Option<(Notifier, Range)> {
        let scope = inv.scope()?;
        let notifier = self.state.lock().peer(scope, after)?;
        Some((notifier, frames(scope, notifier)?))
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

/// The frames of `notifier` that are in scope.
fn frames(scope: Scope, notifier: Notifier) -> Option<Range> {
    let span = notifier.span();
    span.frames_of(scope.pages)
}
