// SPDX-License-Identifier: GPL-2.0

//! The protocol of bindings and invalidations under every interleaving.
//!
//! The tests run `engine/node.rs` itself, on loom's locks, against consumers that map pages as KVM
//! does. In every order in which the threads can take their steps:
//!
//! * a page leaves the file only when no consumer maps it, and no consumer maps one that has left;
//! * a consumer is called for exactly those of its frames that an invalidation covers, and between
//!   its birth and its death each start has its end;
//! * when unbinding returns, nothing calls the consumer (its memory is freed at once, and loom
//!   reports every use of it that is not ordered before that), and the same for the node;
//! * no thread waits for ever.
//!
//! Two threads are checked exhaustively. For three, the number of preemptions is bounded:
//! `MEMFILE_PREEMPTIONS=N` sets the bound, 0 lifts it.
//!
//! The second half of the file runs broken variants of the engine, and fails unless the checker
//! finds the fault.

use crate::abi;
use crate::abi::file::File;
use crate::abi::invalidation::Invalidation;
use crate::abi::notifier::{Consumer, Notifier, Ranges};
use crate::engine::node::Node;
use crate::engine::{mutants, Protocol};
use crate::kernel::prelude::*;
use crate::policy::range::Range;
use crate::stand_in::sync::{lie_in, Arc, Memory, SpinLock};
use crate::stand_in::together;
use crate::store::AnyStore;
use loom::thread::{spawn, JoinHandle};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Pages of the file.
const PAGES: u64 = 8;
/// KVM's default flags.
const FLAGS: u64 = 7;

/// The default number of preemptions in scenarios of three threads.
const PREEMPTIONS: usize = 3;

/// Runs a scenario in all its interleavings.
fn explore(threads: usize, scenario: impl Fn() + Send + Sync + 'static) {
    let mut explorer = loom::model::Builder::new();
    explorer.max_branches = 100_000;
    explorer.preemption_bound = match std::env::var("MEMFILE_PREEMPTIONS") {
        Ok(bound) => Some(bound.parse().expect("MEMFILE_PREEMPTIONS is a number")),
        Err(_) => Some(PREEMPTIONS),
    }
    .filter(|&bound| bound > 0 && threads > 2);
    let executions = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counter = executions.clone();
    together(&explorer, move || {
        counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        abi::reset();
        scenario();
    });
    println!(
        "{} interleavings",
        executions.load(std::sync::atomic::Ordering::Relaxed)
    );
}

/// A file and its users.
struct World<N> {
    node: Arc<N>,
    node_memory: Rc<Memory>,
    /// How often each page was taken away; its lock stands for the folio locks.
    generations: SpinLock<[u32; PAGES as usize]>,
    slots: RefCell<Vec<Rc<Slot>>>,
    holes: Rc<RefCell<Vec<Range>>>,
}

impl<N: Protocol> World<N> {
    fn new() -> Rc<Self> {
        let node_memory = Rc::new(Memory::new());
        lie_in(&node_memory);
        let node = N::new(AnyStore::with_pages(PAGES));
        lie_in(&Rc::new(Memory::new()));
        Rc::new(Self {
            node,
            node_memory,
            generations: SpinLock::new([0; PAGES as usize]),
            slots: RefCell::default(),
            holes: Rc::default(),
        })
    }

    /// A slot of `vm` for pages `[start, end)`, not yet bound.
    fn slot_of(&self, vm: &Rc<Vm>, start: u64, end: u64, observer: bool) -> Rc<Slot> {
        let frame = 1000 + 10 * start;
        let slot = Rc::new(Slot {
            start,
            end,
            frame,
            notifier: Cell::new(None),
            memory: Memory::new(),
            vm: vm.clone(),
            holes: self.holes.clone(),
        });
        let consumer = Some(slot.clone() as Rc<dyn Consumer>);
        let notifier = Notifier::new(start, end - start, frame, observer, vm.context, consumer);
        slot.notifier.set(Some(notifier));
        vm.slots.borrow_mut().push((notifier, slot.clone()));
        self.slots.borrow_mut().push(slot.clone());
        slot
    }

    /// The slot of a VM that has no other.
    fn slot(&self, start: u64, end: u64, observer: bool) -> Rc<Slot> {
        self.slot_of(&Vm::new(0, Flush::BeforeUnlock), start, end, observer)
    }

    fn bind(&self, slot: &Slot) -> Result {
        self.node
            .bind(File { writable: true }, FLAGS, slot.notifier())
    }

    /// A slot that is bound.
    fn bound(&self, start: u64, end: u64, observer: bool) -> Rc<Slot> {
        let slot = self.slot(start, end, observer);
        self.bind(&slot).expect("nothing is in the way");
        slot
    }

    /// A slot of `vm` that is bound.
    fn bound_to(&self, vm: &Rc<Vm>, start: u64, end: u64) -> Rc<Slot> {
        let slot = self.slot_of(vm, start, end, false);
        self.bind(&slot).expect("nothing is in the way");
        slot
    }

    /// Unbinds and frees a slot once the guest cannot use it any more, as KVM does.
    fn unbind(&self, slot: &Slot) {
        let mut mmu = slot.vm.mmu.lock();
        mmu.mapped.retain(|&frame| !slot.has(frame));
        mmu.flush();
        drop(mmu);
        self.node.unbind(slot.notifier());
        slot.memory.free();
        // No other thread uses these any more: no lock.
        let open = |mmu: &Mmu| mmu.open.iter().any(|frames| slot.has(frames.start()));
        assert!(!slot.vm.mmu.peek(open), "a start without an end");
    }

    /// The guest touches a page, once.
    fn fault(&self, slot: &Slot, page: u64) {
        let seq = slot.vm.mmu.lock().seq;
        // get_pfn()
        let generation = self.generations.lock()[page as usize];
        let frame = slot.frame + (page - slot.start);
        let mut mmu = slot.vm.mmu.lock();
        if mmu.seq == seq && !mmu.open.iter().any(|open| covers(*open, frame)) {
            let now = self
                .generations
                .peek(|generations| generations[page as usize]);
            assert_eq!(generation, now, "a page is mapped that has left the file");
            mmu.touch(frame);
        }
    }

    /// Takes pages away.
    fn punch(&self, start: u64, end: u64) {
        let (pages, inv) = self.start_punch(start, end);
        self.end_punch(pages, inv);
    }

    fn start_punch(&self, start: u64, end: u64) -> (Range, Invalidation) {
        let pages = Range::of(start, end);
        let node = self.node.clone();
        let next_range = move |inv, after| node.next_range(inv, after);
        let inv = Invalidation::new(Some(Rc::new(next_range)));
        self.holes.borrow_mut().push(pages);
        self.node.invalidate_start(inv, pages);
        (pages, inv)
    }

    fn end_punch(&self, pages: Range, inv: Invalidation) {
        let mut generations = self.generations.lock();
        for page in pages.start()..pages.end() {
            generations[page as usize] += 1;
        }
        drop(generations);
        // A consumer that maps a page from now on finds another generation.
        let slots = self.slots.borrow().clone();
        for slot in slots {
            let mmu = slot.vm.mmu.lock();
            for frame in slot.clip(pages) {
                let gone = !mmu.mapped.contains(&frame) && !mmu.tlb.contains(&frame);
                assert!(gone, "a page that is mapped has left the file");
            }
        }
        self.node.invalidate_end(inv);
    }

    /// The host takes the shared page at `frame` of `vm` away, as an mmu_notifier does: it looks
    /// into the page table only, and flushes if it finds a page there.
    fn take_shared(&self, vm: &Vm, frame: u64) {
        let mut mmu = vm.mmu.lock();
        if let Some(at) = mmu.mapped.iter().position(|&other| other == frame) {
            mmu.mapped.swap_remove(at);
            mmu.flush();
        }
        assert!(
            !mmu.tlb.contains(&frame),
            "a TLB has a page that no page table has"
        );
    }

    /// The file's last user is gone.
    fn free(&self) {
        self.node.drain();
        self.node_memory.free();
    }
}

fn covers(frames: Range, frame: u64) -> bool {
    (frames.start()..frames.end()).contains(&frame)
}

/// When a consumer flushes its TLBs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flush {
    /// Under the lock under which it has unmapped.
    BeforeUnlock,
    /// After it: wrong.
    AfterUnlock,
}

/// A virtual machine. Its slots share a page table and TLBs, as private and shared memory do.
struct Vm {
    context: u64,
    flush: Flush,
    mmu: SpinLock<Mmu>,
    slots: RefCell<Vec<(Notifier, Rc<Slot>)>>,
}

impl Vm {
    fn new(context: u64, flush: Flush) -> Rc<Self> {
        Rc::new(Self {
            context,
            flush,
            mmu: SpinLock::new(Mmu::default()),
            slots: RefCell::default(),
        })
    }

    fn slot(&self, notifier: Notifier) -> Rc<Slot> {
        let slots = self.slots.borrow();
        let found = slots.iter().find(|(other, _)| *other == notifier);
        found.expect("a range of another VM").1.clone()
    }
}

#[derive(Default)]
struct Mmu {
    /// Starts without their end.
    open: Vec<Range>,
    /// Counts the ends.
    seq: u64,
    /// Frames in the page table.
    mapped: Vec<u64>,
    /// Frames that a vCPU can use without a look at the page table.
    tlb: Vec<u64>,
    flushes: u64,
}

impl Mmu {
    fn touch(&mut self, frame: u64) {
        self.mapped.push(frame);
        self.tlb.push(frame);
    }

    fn flush(&mut self) {
        self.tlb.clear();
        self.flushes += 1;
    }
}

/// A consumer like KVM: a fault maps its page only if no invalidation has run meanwhile.
struct Slot {
    start: u64,
    end: u64,
    frame: u64,
    notifier: Cell<Option<Notifier>>,
    /// The part that callbacks use; the checker reads the rest for longer than a consumer could.
    memory: Memory,
    vm: Rc<Vm>,
    holes: Rc<RefCell<Vec<Range>>>,
}

impl Slot {
    fn notifier(&self) -> Notifier {
        self.notifier.get().expect("made by World::slot()")
    }

    fn has(&self, frame: u64) -> bool {
        (self.frame..self.frame + (self.end - self.start)).contains(&frame)
    }

    /// The frames of a hole, page by page.
    fn clip(&self, hole: Range) -> Vec<u64> {
        let pages = (self.start..self.end).filter(|&page| covers(hole, page));
        pages.map(|page| self.frame + (page - self.start)).collect()
    }

    fn check(&self, frames: Range) {
        self.memory.touch();
        let all: Vec<u64> = (frames.start()..frames.end()).collect();
        let holes = self.holes.borrow();
        let meant = holes.iter().any(|&hole| self.clip(hole) == all);
        assert!(meant, "called for {frames:?}, which no hole covers");
    }
}

impl Consumer for Slot {
    fn invalidate_start(&self, ranges: Ranges) {
        let mut mmu = self.vm.mmu.lock();
        for (notifier, frames) in ranges {
            self.vm.slot(notifier).check(frames);
            mmu.open.push(frames);
            mmu.mapped.retain(|&frame| !covers(frames, frame));
        }
        if self.vm.flush == Flush::AfterUnlock {
            drop(mmu);
            mmu = self.vm.mmu.lock();
        }
        mmu.flush();
    }

    fn invalidate_end(&self, ranges: Ranges) {
        let mut mmu = self.vm.mmu.lock();
        for (notifier, frames) in ranges {
            self.vm.slot(notifier).memory.touch();
            let at = mmu.open.iter().position(|&open| open == frames);
            mmu.open.swap_remove(at.expect("an end without a start"));
        }
        mmu.seq += 1;
    }

    fn test_clear_young(&self, _: Range) -> bool {
        false
    }
}

/// Another thread that does something in this world.
fn go<N: Protocol>(world: &Rc<World<N>>, f: impl FnOnce(&World<N>) + 'static) -> JoinHandle<()> {
    let world = world.clone();
    spawn(move || f(&world))
}

fn join<const N: usize>(threads: [JoinHandle<()>; N]) {
    for thread in threads {
        thread.join().expect("a panic ends the model before");
    }
}

/// A binding is born, used, and dies while a hole is punched.
fn life_meets_punch<N: Protocol>() {
    let world = World::<N>::new();
    let punch = go(&world, |world| world.punch(1, 3));
    let slot = world.bound(0, 4, false);
    world.fault(&slot, 1);
    world.unbind(&slot);
    join([punch]);
    world.free();
}

/// A guest faults, in and beside a hole that is being punched.
fn faults_meet_punch<N: Protocol>() {
    let world = World::<N>::new();
    let slot = world.bound(0, 4, false);
    let punch = go(&world, |world| world.punch(2, 8));
    world.fault(&slot, 1);
    world.fault(&slot, 3);
    join([punch]);
    world.unbind(&slot);
    world.free();
}

/// One hole covers parts of two slots, one of which is replaced meanwhile.
fn slot_is_replaced_in_a_hole<N: Protocol>() {
    let world = World::<N>::new();
    let left = world.bound(0, 4, false);
    let right = world.bound(4, 8, false);
    let punch = go(&world, |world| world.punch(3, 6));
    world.unbind(&left);
    let left = world.bound(2, 4, false);
    world.fault(&left, 3);
    join([punch]);
    world.unbind(&left);
    world.unbind(&right);
    world.free();
}

/// An observer goes away while a hole is punched.
fn observer_leaves_in_a_hole<N: Protocol>() {
    let world = World::<N>::new();
    let slot = world.bound(0, 4, false);
    let observer = world.bound(2, 6, true);
    let punch = go(&world, |world| world.punch(1, 5));
    world.unbind(&observer);
    world.fault(&slot, 2);
    join([punch]);
    world.unbind(&slot);
    world.free();
}

/// Reclaim has taken the last page and is not done when the inode goes.
fn swap_out_ends_while_the_file_goes<N: Protocol>() {
    let world = World::<N>::new();
    let (pages, inv) = world.start_punch(0, 1);
    let swap = go(&world, move |world| world.end_punch(pages, inv));
    world.free();
    join([swap]);
}

/// Two are not done: the end of either may wake the task that frees the inode.
fn two_swap_outs_end_while_the_file_goes<N: Protocol>() {
    let world = World::<N>::new();
    let swaps = [0, 2].map(|start| {
        let (pages, inv) = world.start_punch(start, start + 1);
        go(&world, move |world| world.end_punch(pages, inv))
    });
    world.free();
    join(swaps);
}

/// Of two overlapping exclusive bindings at most one succeeds, of two others both succeed.
fn two_bind_at_once<N: Protocol>() {
    for (start, both) in [(3, false), (4, true)] {
        let world = World::<N>::new();
        let (one, other) = (world.slot(0, 4, false), world.slot(start, 8, false));
        let answer = Rc::new(Cell::new(false));
        let thread = go(&world, {
            let (answer, other) = (answer.clone(), other.clone());
            move |world| answer.set(world.bind(&other).is_ok())
        });
        let mine = world.bind(&one).is_ok();
        join([thread]);
        assert!(mine || answer.get(), "both were refused");
        assert_eq!(mine && answer.get(), both, "exclusive bindings overlap");
        for (slot, bound) in [(one, mine), (other, answer.get())] {
            if bound {
                world.unbind(&slot);
            }
        }
        world.free();
    }
}

/// Two holes that overlap, and a slot that goes away in the middle.
fn teardown_meets_two_punches<N: Protocol>() {
    let world = World::<N>::new();
    let slot = world.bound(0, 4, false);
    let one = go(&world, |world| world.punch(0, 3));
    let other = go(&world, |world| world.punch(2, 8));
    world.fault(&slot, 2);
    world.unbind(&slot);
    join([one, other]);
    world.free();
}

/// Two VMs with a part of the file each end while one hole covers both.
fn two_teardowns_meet_a_punch<N: Protocol>() {
    let world = World::<N>::new();
    let left = world.bound(0, 4, false);
    let right = world.bound(4, 8, false);
    let end = go(&world, move |world| world.unbind(&left));
    let punch = go(&world, |world| world.punch(3, 5));
    world.unbind(&right);
    join([end, punch]);
    world.free();
}

/// Two slots appear while one hole covers both.
fn two_births_meet_a_punch<N: Protocol>() {
    let world = World::<N>::new();
    let punch = go(&world, |world| world.punch(3, 5));
    let birth = go(&world, |world| {
        let left = world.bound(0, 4, false);
        world.fault(&left, 3);
        world.unbind(&left);
    });
    let right = world.bound(4, 8, false);
    world.fault(&right, 4);
    world.unbind(&right);
    join([punch, birth]);
    world.free();
}

/// One hole in two slots of a VM: they are unmapped under one lock, with one flush. Meanwhile the host
/// takes away a shared page that the VM maps at a frame of the hole.
fn shared_pages_go_during_a_punch<N: Protocol>(flush: Flush) {
    let world = World::<N>::new();
    let vm = Vm::new(1, flush);
    let (left, right) = (world.bound_to(&vm, 0, 4), world.bound_to(&vm, 4, 8));
    let frame = right.frame + 1;
    let mut mmu = vm.mmu.lock();
    mmu.touch(left.frame + 3);
    mmu.touch(frame);
    drop(mmu);
    let host = go(&world, {
        let vm = vm.clone();
        move |world| world.take_shared(&vm, frame)
    });
    let before = vm.mmu.lock().flushes;
    let (pages, inv) = world.start_punch(3, 6);
    let flushes = vm.mmu.lock().flushes - before;
    // One of them may be the host's.
    assert!((1..=2).contains(&flushes), "{flushes} flushes for a hole");
    world.end_punch(pages, inv);
    join([host]);
    world.unbind(&left);
    world.unbind(&right);
    world.free();
}

/// One hole in slots of two VMs that take turns in the file: each VM is called once.
fn vms_take_turns_in_a_file<N: Protocol>() {
    let world = World::<N>::new();
    let vms = [1, 2].map(|context| Vm::new(context, Flush::BeforeUnlock));
    let slots = [0, 2, 4, 6].map(|start| {
        let vm = &vms[start as usize / 2 % 2];
        world.bound_to(vm, start, start + 2)
    });
    world.fault(&slots[1], 3);
    let birth = go(&world, |world| {
        let late = world.bound(0, 8, true);
        world.unbind(&late);
    });
    let (pages, inv) = world.start_punch(1, 8);
    for vm in &vms {
        let (flushes, open) = vm.mmu.peek(|mmu| (mmu.flushes, mmu.open.len()));
        assert_eq!((flushes, open), (1, 2), "flushes, slots");
    }
    world.end_punch(pages, inv);
    join([birth]);
    for slot in slots {
        world.unbind(&slot);
    }
    world.free();
}

/// The consumer is correct.
fn flush_comes_before_the_lock_is_given_up<N: Protocol>() {
    shared_pages_go_during_a_punch::<N>(Flush::BeforeUnlock);
}

macro_rules! hold {
    ($($scenario:ident: $threads:literal threads,)*) => {
        $(
            #[test]
            fn $scenario() {
                explore($threads, super::$scenario::<Node>);
            }
        )*
    };
}

mod every_interleaving_of {
    use super::*;

    hold! {
        life_meets_punch: 2 threads,
        faults_meet_punch: 2 threads,
        slot_is_replaced_in_a_hole: 2 threads,
        observer_leaves_in_a_hole: 2 threads,
        swap_out_ends_while_the_file_goes: 2 threads,
        two_swap_outs_end_while_the_file_goes: 3 threads,
        two_bind_at_once: 2 threads,
        flush_comes_before_the_lock_is_given_up: 2 threads,
        vms_take_turns_in_a_file: 2 threads,
        teardown_meets_two_punches: 3 threads,
        two_teardowns_meet_a_punch: 3 threads,
        two_births_meet_a_punch: 3 threads,
    }
}

macro_rules! found {
    ($($mutant:ident in $scenario:ident of $threads:literal: $what:literal,)*) => {
        $(
            #[test]
            #[should_panic(expected = $what)]
            fn $mutant() {
                explore($threads, super::$scenario::<mutants::$mutant::Node>);
            }
        )*
    };
}

mod the_checker_finds_that {
    use super::*;

    found! {
        bind_does_not_wait in life_meets_punch of 2: "a page that is mapped has left the file",
        unbind_does_not_wait in life_meets_punch of 2: "Causality violation",
        new_bindings_are_called_by_the_older in vms_take_turns_in_a_file of 2: "an end without a start",
        dead_bindings_are_called_by_the_younger in teardown_meets_two_punches of 3: "Causality violation",
        nobody_is_woken in life_meets_punch of 2: "deadlock",
        woken_without_the_lock in two_swap_outs_end_while_the_file_goes of 3: "Causality violation",
        starts_are_not_called in faults_meet_punch of 2:
            "a page that is mapped has left the file",
        ends_are_not_called in faults_meet_punch of 2: "a start without an end",
        nothing_is_clipped in faults_meet_punch of 2: "which no hole covers",
        exclusive_bindings_may_overlap in two_bind_at_once of 2: "exclusive bindings overlap",
        each_binding_is_called_by_itself in vms_take_turns_in_a_file of 2: "flushes, slots",
        peers_are_left_out in flush_comes_before_the_lock_is_given_up of 2:
            "a page that is mapped has left the file",
    }

    #[test]
    #[should_panic(expected = "a TLB has a page that no page table has")]
    fn the_flush_comes_after_the_lock() {
        explore(2, || {
            shared_pages_go_during_a_punch::<Node>(Flush::AfterUnlock)
        });
    }
}
