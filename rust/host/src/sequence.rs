// SPDX-License-Identifier: GPL-2.0

//! Random sequences of all operations on a file, against a model that keeps lists and looks at
//! every page.
//!
//! There is one thread. Where a call has to wait, [`Driver::meanwhile`] runs other operations until
//! the wait is over, and checks that the wait was needed.
//!
//! `MEMFILE_OPS=N` makes it at least N operations, `MEMFILE_SEED=N` repeats a run.

use crate::abi;
use crate::abi::file::File;
use crate::abi::invalidation::Invalidation;
use crate::abi::notifier::{Consumer, Notifier, Ranges};
use crate::engine::node::Node;
use crate::kernel::prelude::*;
use crate::kernel::seq_file::SeqFile;
use crate::policy::range::Range;
use crate::stand_in::sync::{while_waiting, Arc};
use crate::store::{AnyStore, FALLOCATED};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// Pages of the file.
const PAGES: u64 = 24;
const PAGE: u64 = 4096;
/// Invalidations that run at a time, at most.
const RUNNING: usize = 4;
/// Operations of a case: from, to.
const LENGTH: (usize, usize) = (20, 60);

#[derive(Clone, Debug)]
enum Op {
    Bind {
        pgoff: u64,
        nr_pages: u64,
        frame: u64,
        flags: u64,
        kind: Kind,
        /// 0: none.
        context: u64,
    },
    /// Pages come into the file, or go.
    Pages(bool),
    Unbind(usize),
    Start {
        start: u64,
        len: u64,
    },
    End(usize),
    Young {
        start: u64,
        len: u64,
    },
    Fallocate {
        mode: i32,
        offset: i64,
        len: i64,
    },
    SetSize {
        old: u64,
        new: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Exclusive,
    Observer,
    /// The file is open for reading only.
    ReadOnly,
    /// A consumer without callbacks.
    Deaf,
}

fn op() -> impl Strategy<Value = Op> {
    let kind = prop_oneof![
        8 => Just(Kind::Exclusive),
        4 => Just(Kind::Observer),
        1 => Just(Kind::ReadOnly),
        1 => Just(Kind::Deaf),
    ];
    let frame = prop_oneof![8 => 0..3 * PAGES, 1 => u64::MAX - 8..=u64::MAX];
    let flags = prop_oneof![6 => Just(7u64), 3 => Just(15u64), 2 => Just(1u64), 1 => 0..18u64, 1 => any::<u64>()];
    let bytes = || {
        prop_oneof![6 => (0..=PAGES as i64 + 2).prop_map(|n| n * PAGE as i64),
                               1 => -1..2 * PAGE as i64, 1 => any::<i64>()]
    };
    let size = || prop_oneof![Just(0), 1..2 * PAGE, (0..4u64).prop_map(|n| n * PAGE)];
    prop_oneof![
        6 => (0..PAGES + 2, 0..8u64, frame, flags, kind, 0..4u64).prop_map(
            |(pgoff, nr_pages, frame, flags, kind, context)|
                Op::Bind { pgoff, nr_pages, frame, flags, kind, context }),
        1 => any::<bool>().prop_map(Op::Pages),
        4 => any::<usize>().prop_map(Op::Unbind),
        6 => (0..PAGES, 1..PAGES).prop_map(|(start, len)| Op::Start { start, len }),
        6 => any::<usize>().prop_map(Op::End),
        1 => (0..PAGES, 1..PAGES).prop_map(|(start, len)| Op::Young { start, len }),
        1 => (0..9i32, bytes(), bytes())
            .prop_map(|(mode, offset, len)| Op::Fallocate { mode, offset, len }),
        1 => (size(), size()).prop_map(|(old, new)| Op::SetSize { old, new }),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Call {
    Start,
    End,
    Young,
}

/// The calls: the binding, the callback, the frames.
type Callbacks = (Call, usize, Vec<u64>);

/// A consumer that only records.
struct Ear {
    id: usize,
    callbacks: Rc<RefCell<Vec<Callbacks>>>,
    /// The bindings by their numbers.
    ids: Rc<RefCell<Vec<(Notifier, usize)>>>,
    /// How often contexts were called.
    calls: Rc<Cell<usize>>,
}

impl Ear {
    fn note(&self, call: Call, id: usize, frames: Range) {
        let frames = (frames.start()..frames.end()).collect();
        self.callbacks.borrow_mut().push((call, id, frames));
    }

    fn note_all(&self, call: Call, ranges: Ranges) {
        self.calls.set(self.calls.get() + 1);
        for (notifier, frames) in ranges {
            let ids = self.ids.borrow();
            let found = ids.iter().find(|(other, _)| *other == notifier);
            self.note(call, found.expect("a span of no binding").1, frames);
        }
    }
}

impl Consumer for Ear {
    fn invalidate_start(&self, ranges: Ranges) {
        self.note_all(Call::Start, ranges);
    }

    fn invalidate_end(&self, ranges: Ranges) {
        self.note_all(Call::End, ranges);
    }

    fn test_clear_young(&self, frames: Range) -> bool {
        self.note(Call::Young, self.id, frames);
        self.id % 2 == 1
    }
}

/// A binding in the model.
#[derive(Clone)]
struct Bound {
    id: usize,
    notifier: Notifier,
    pages: std::ops::Range<u64>,
    frame: u64,
    observer: bool,
    context: u64,
    dying: bool,
}

/// An invalidation in the model.
struct Running {
    id: usize,
    inv: Invalidation,
    pages: std::ops::Range<u64>,
    called: Vec<(usize, Vec<u64>)>,
    /// The number of their contexts.
    contexts: usize,
}

#[derive(Default)]
struct Model {
    /// The flags that bindings have asked for, as far as they hold.
    promised: Option<u64>,
    /// The only context that may bind.
    one_vm: bool,
    owner: Option<u64>,
    has_pages: bool,
    /// Pages may lie in areas for movable memory.
    movable: bool,
    bound: Vec<Bound>,
    running: Vec<Running>,
    /// The invalidations that the current call has to wait for.
    awaited: Vec<usize>,
    /// A binding that does not take part yet.
    newborn: Option<Bound>,
    ids: usize,
}

fn share(a: &std::ops::Range<u64>, b: &std::ops::Range<u64>) -> bool {
    a.clone().any(|page| b.contains(&page))
}

impl Model {
    fn id(&mut self) -> usize {
        self.ids += 1;
        self.ids
    }

    /// The new binding takes part from now on, and waits for what is older.
    fn give_birth(&mut self) {
        if let Some(bound) = self.newborn.take() {
            let older = self.running.iter();
            let older = older.filter(|other| share(&other.pages, &bound.pages));
            self.awaited = older.map(|other| other.id).collect();
            self.bound.push(bound);
        }
    }

    /// The bindings that an invalidation calls if it begins now, and the frames.
    fn hearers(&self, pages: &std::ops::Range<u64>) -> Vec<(usize, Vec<u64>)> {
        let alive = self.bound.iter().filter(|bound| !bound.dying);
        let hits = alive.map(|bound| {
            let hit = bound.pages.clone().filter(|page| pages.contains(page));
            (
                bound.id,
                hit.map(|page| page - bound.pages.start + bound.frame)
                    .collect(),
            )
        });
        hits.filter(|(_, frames): &(_, Vec<u64>)| !frames.is_empty())
            .collect()
    }

    fn exclusive(&self) -> impl Iterator<Item = &Bound> {
        self.bound.iter().filter(|bound| !bound.observer)
    }

    fn flags(&self) -> u64 {
        self.promised.unwrap_or(1)
    }

    /// Do pages leave the direct map if a binding asks for these flags?
    fn hides(&self, flags: u64) -> bool {
        flags & 8 > self.flags() & 8
    }

    /// Is the file bound, and may its pages move?
    fn allows_movable(&self) -> bool {
        self.exclusive().next().is_some() && self.flags() & 2 == 0
    }

    /// How many contexts these bindings have; 0 is one for each.
    fn contexts(&self, called: &[(usize, Vec<u64>)]) -> usize {
        let of = |id| {
            self.bound
                .iter()
                .find(|bound| bound.id == id)
                .map(|bound| bound.context)
        };
        let mut contexts: Vec<u64> = called.iter().filter_map(|&(id, _)| of(id)).collect();
        let alone = contexts.iter().filter(|&&context| context == 0).count();
        contexts.retain(|&context| context != 0);
        contexts.sort();
        contexts.dedup();
        alone + contexts.len()
    }

    /// The expected result of binding.
    fn judge(&self, [pgoff, nr_pages, frame, flags, context]: [u64; 5], kind: Kind) -> Result {
        let end = u128::from(pgoff) + u128::from(nr_pages);
        let last = u128::from(frame) + u128::from(nr_pages);
        if kind == Kind::Deaf {
            return Err(EINVAL);
        }
        if kind == Kind::ReadOnly {
            return Err(EACCES);
        }
        if nr_pages == 0 || end > u128::from(PAGES) || last > u128::from(u64::MAX) {
            return Err(EINVAL);
        }
        if kind == Kind::Observer {
            return Ok(());
        }
        if !(flags < 8 && flags % 2 == 1 || flags == 15) {
            return Err(EINVAL);
        }
        if self.one_vm
            && !self
                .owner
                .is_none_or(|owner| owner != 0 && owner == context)
        {
            return Err(EPERM);
        }
        let bound = self.exclusive().next().is_some();
        let less = (0..4).any(|bit| self.flags() >> bit & 1 > flags >> bit & 1);
        if less && (self.has_pages || bound) || self.hides(flags) && bound {
            return Err(EINVAL);
        }
        let pages = pgoff..pgoff + nr_pages;
        if self.exclusive().any(|bound| share(&bound.pages, &pages)) {
            return Err(EEXIST);
        }
        Ok(())
    }
}

struct Driver {
    node: Arc<Node>,
    model: RefCell<Model>,
    callbacks: Rc<RefCell<Vec<Callbacks>>>,
    ids: Rc<RefCell<Vec<(Notifier, usize)>>>,
    calls: Rc<Cell<usize>>,
    /// Decides what happens during waits.
    chance: Cell<usize>,
    /// How often pages had left areas for movable memory before the last binding.
    left_before: Cell<u32>,
    waits: Cell<u64>,
}

impl Driver {
    fn new(one_vm: bool) -> Rc<Self> {
        abi::reset();
        let driver = Rc::new(Self {
            node: Node::new(AnyStore::with_pages(PAGES), one_vm).expect("memory is there"),
            model: RefCell::new(Model {
                one_vm,
                ..Model::default()
            }),
            callbacks: Rc::default(),
            ids: Rc::default(),
            calls: Rc::default(),
            chance: Cell::new(1),
            left_before: Cell::new(0),
            waits: Cell::new(0),
        });
        let weak = Rc::downgrade(&driver);
        while_waiting(Some(Rc::new(move || {
            weak.upgrade().expect("it is waiting").meanwhile();
        })));
        driver
    }

    /// A call waits. It must have an event to wait for, and this brings it nearer.
    fn meanwhile(&self) {
        self.waits.set(self.waits.get() + 1);
        self.birth_after_leaving();
        let awaited = !self.model.borrow().awaited.is_empty();
        assert!(awaited, "a wait for nobody");
        let chance = self.chance.get();
        self.chance.set(chance.rotate_left(7).wrapping_add(11));
        if chance % 3 == 0 {
            self.start(chance as u64 / 3 % PAGES, 1 + chance as u64 / 100 % PAGES);
        }
        self.end(chance / 7);
    }

    /// If pages have left areas for movable memory for a new binding, that takes part from now on.
    fn birth_after_leaving(&self) {
        let mut model = self.model.borrow_mut();
        if model.newborn.is_some() && self.node.inode.left.get() > self.left_before.get() {
            assert_eq!(model.awaited, [], "pages left while these ran");
            model.give_birth();
        }
    }

    fn take_callbacks(&self) -> Vec<Callbacks> {
        self.callbacks.take()
    }

    fn start(&self, start: u64, len: u64) {
        if self.model.borrow().running.len() >= RUNNING {
            return;
        }
        let pages = start..start + len;
        let node = self.node.clone();
        let next_range = move |inv, after| node.next_range(inv, after);
        let inv = Invalidation::new(Some(Rc::new(next_range)));
        let mut called = self.model.borrow().hearers(&pages);
        called.sort();
        let contexts = self.model.borrow().contexts(&called);
        self.node
            .invalidate_start(inv, Range::of(pages.start, pages.end));

        let callbacks = self.take_callbacks();
        let starts: Vec<_> = callbacks
            .iter()
            .map(|(_, id, frames)| (*id, frames.clone()))
            .collect();
        assert!(
            callbacks.iter().all(|(call, ..)| *call == Call::Start),
            "{callbacks:?}"
        );
        assert_eq!(sorted(starts), called, "bindings called at the start");
        assert_eq!(self.calls.take(), contexts, "contexts are called once");

        let mut model = self.model.borrow_mut();
        let id = model.id();
        model.running.push(Running {
            id,
            inv,
            pages,
            called,
            contexts,
        });
    }

    fn end(&self, which: usize) {
        let mut model = self.model.borrow_mut();
        if model.running.is_empty() {
            return;
        }
        let which = which % model.running.len();
        let Running {
            id,
            inv,
            called,
            contexts,
            ..
        } = model.running.remove(which);
        model.awaited.retain(|&other| other != id);
        drop(model);
        self.node.invalidate_end(inv);
        let callbacks = self.take_callbacks();
        assert!(
            callbacks.iter().all(|(call, ..)| *call == Call::End),
            "{callbacks:?}"
        );
        let ends = callbacks
            .into_iter()
            .map(|(_, id, frames)| (id, frames))
            .collect();
        assert_eq!(sorted(ends), called, "bindings called at the end");
        assert_eq!(self.calls.take(), contexts, "contexts are called once");
    }

    fn young(&self, start: u64, len: u64) {
        let mut called = self.model.borrow().hearers(&(start..start + len));
        called.sort();
        let young = self.node.test_clear_young(Range::of(start, start + len));
        assert_eq!(young, called.iter().any(|(id, _)| id % 2 == 1));
        let callbacks = self.take_callbacks();
        assert!(
            callbacks.iter().all(|(call, ..)| *call == Call::Young),
            "{callbacks:?}"
        );
        let asked = callbacks
            .into_iter()
            .map(|(_, id, frames)| (id, frames))
            .collect();
        assert_eq!(sorted(asked), called, "bindings that are asked");
    }

    fn bind(&self, [pgoff, nr_pages, frame, flags, context]: [u64; 5], kind: Kind) {
        let mut model = self.model.borrow_mut();
        let id = model.id();
        let ear = || -> Rc<dyn Consumer> {
            Rc::new(Ear {
                id,
                callbacks: self.callbacks.clone(),
                ids: self.ids.clone(),
                calls: self.calls.clone(),
            })
        };
        let ear = (kind != Kind::Deaf).then(ear);
        let observer = kind == Kind::Observer;
        let notifier = Notifier::new(pgoff, nr_pages, frame, observer, context, ear);
        self.ids.borrow_mut().push((notifier, id));
        let want = model.judge([pgoff, nr_pages, frame, flags, context], kind);
        let leaves = want.is_ok() && !observer && flags & 2 != 0 && model.movable;
        if want.is_ok() {
            model.newborn = Some(Bound {
                id,
                notifier,
                pages: pgoff..pgoff + nr_pages,
                frame,
                observer,
                context,
                dying: false,
            });
            if leaves {
                // Any of these may be a page on its way there.
                model.awaited = model.running.iter().map(|other| other.id).collect();
            } else {
                model.give_birth();
            }
        }
        let hides = want.is_ok() && !observer && model.hides(flags);
        if want.is_ok() && !observer {
            model.promised = Some(flags);
            model.owner.get_or_insert(context);
            model.movable &= !leaves;
            model.movable |= flags & 2 == 0;
        }
        drop(model);
        let left = self.node.inode.left.get();
        self.left_before.set(left);
        let file = File {
            writable: kind != Kind::ReadOnly,
        };
        assert_eq!(self.node.bind(file, flags, notifier), want);
        assert_eq!(notifier.file_held(), want.is_ok());
        self.birth_after_leaving();
        let left = self.node.inode.left.get() - left;
        assert_eq!(left > 0, leaves, "pages leave areas for movable memory");
        let hidden = self.node.inode.hidden.take();
        let all = hides.then(|| (0, self.node.inode.pages()));
        assert_eq!(
            hidden.map(|pages| (pages.start(), pages.end())),
            all,
            "pages leave the direct map"
        );
        assert_eq!(self.model.borrow().awaited, [], "did not wait for these");
    }

    fn unbind(&self, which: usize) {
        let mut model = self.model.borrow_mut();
        if model.bound.is_empty() {
            return;
        }
        let which = which % model.bound.len();
        let Bound { id, notifier, .. } = model.bound[which];
        model.bound[which].dying = true;
        let callers = model
            .running
            .iter()
            .filter(|other| other.called.iter().any(|c| c.0 == id));
        model.awaited = callers.map(|other| other.id).collect();
        drop(model);
        self.node.unbind(notifier);
        assert!(!notifier.file_held());
        let mut model = self.model.borrow_mut();
        assert_eq!(model.awaited, [], "did not wait for these");
        model.bound.remove(which);
    }

    fn fallocate(&self, mode: i32, offset: i64, len: i64) {
        FALLOCATED.set(None);
        let aligned = |bytes: i64| bytes >= 0 && bytes % PAGE as i64 == 0;
        let end = i128::from(offset) + i128::from(len);
        let want = if offset < 0 || len < 0 {
            Err(EINVAL)
        } else if !(0..4).contains(&mode) {
            Err(EOPNOTSUPP)
        } else if mode & 2 != 0 {
            let whole = aligned(offset) && aligned(len) && len > 0;
            if whole {
                Ok(())
            } else {
                Err(EINVAL)
            }
        } else if end <= i128::from(PAGES * PAGE) {
            Ok(())
        } else {
            Err(EINVAL)
        };
        let file = File { writable: true };
        assert_eq!(self.node.fallocate(file, mode, offset, len), want);
        assert_eq!(
            FALLOCATED.get(),
            want.is_ok().then_some((mode, offset, len))
        );
        let hides = want.is_ok() && mode & 2 == 0 && len > 0;
        let hides = hides && self.model.borrow().flags() & 8 != 0;
        let hidden = self.node.inode.hidden.take();
        assert_eq!(hidden.is_some(), hides, "new pages leave the direct map");
    }

    fn set_size(&self, old: u64, new: u64) {
        let want = match (old, new % PAGE) {
            (0, 0) => Ok(()),
            (0, _) => Err(EINVAL),
            _ => Err(EPERM),
        };
        assert_eq!(self.node.set_size(old, new), want);
    }

    fn apply(&self, op: Op) {
        match op {
            Op::Bind {
                pgoff,
                nr_pages,
                frame,
                flags,
                kind,
                context,
            } => self.bind([pgoff, nr_pages, frame, flags, context], kind),
            Op::Pages(there) => {
                self.model.borrow_mut().has_pages = there;
                self.node.inode.has_pages.set(there);
            }
            Op::Unbind(which) => self.unbind(which),
            Op::Start { start, len } => self.start(start, len),
            Op::End(which) => self.end(which),
            Op::Young { start, len } => self.young(start, len),
            Op::Fallocate { mode, offset, len } => self.fallocate(mode, offset, len),
            Op::SetSize { old, new } => self.set_size(old, new),
        }
        self.check();
    }

    /// The lines of fdinfo.
    fn check(&self) {
        let model = self.model.borrow();
        let (flags, count) = (model.flags(), model.exclusive().count());
        let seq = SeqFile::default();
        self.node.show(&seq);
        let want = format!("memfile-flags:\t{flags:#x}\nmemfile-bindings:\t{count}\n");
        let shown = seq.0.take();
        assert!(shown.starts_with(&want), "{shown} instead of {want}");
        let applied = self.node.inode.flags.get().expect("told at creation");
        assert_eq!(u64::from(applied.bits()), flags, "what mm was told");
        let movable = self.node.inode.movable.get();
        assert_eq!(
            movable,
            Some(model.allows_movable()),
            "the area that new pages come from"
        );
        assert!(
            self.callbacks.borrow().is_empty(),
            "an unexpected call to the store"
        );
    }

    /// Ends all invalidations and bindings.
    fn finish(&self) {
        while !self.model.borrow().bound.is_empty() {
            self.unbind(self.chance.get());
        }
        self.check();
        while !self.model.borrow().running.is_empty() {
            self.end(0);
        }
        self.node.drain();
    }
}

fn sorted<T: Ord>(mut list: Vec<T>) -> Vec<T> {
    list.sort();
    list
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{variable} is not a number")),
    )
}

#[test]
fn every_call_does_what_the_model_says() {
    let seed = number("MEMFILE_SEED").unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.expect("the clock is set").as_nanos() as u64
    });
    let ops = number("MEMFILE_OPS").unwrap_or(50_000);
    println!("MEMFILE_SEED={seed} MEMFILE_OPS={ops}");

    let config = Config {
        cases: (ops as usize).div_ceil(LENGTH.0) as u32,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..Config::default()
    };
    let (done, waits) = (Cell::new(0), Cell::new(0));
    let sequences = (
        prop::collection::vec(op(), LENGTH.0..LENGTH.1),
        any::<usize>(),
        prop::bool::weighted(0.2),
    );
    let result = TestRunner::new(config).run(&sequences, |(sequence, chance, one_vm)| {
        let driver = Driver::new(one_vm);
        driver.chance.set(chance);
        done.set(done.get() + sequence.len() as u64);
        for op in sequence {
            driver.apply(op);
        }
        driver.finish();
        waits.set(waits.get() + driver.waits.get());
        Ok(())
    });
    while_waiting(None);
    println!("{} operations, {} of them waits", done.get(), waits.get());
    if let Err(failure) = result {
        panic!("{failure}\nrepeat with MEMFILE_SEED={seed} MEMFILE_OPS={ops}");
    }
    assert!(done.get() >= ops);
    assert!(waits.get() > ops / 100, "too few calls waited");
}

#[test]
fn pages_that_cannot_leave_movable_memory_refuse_the_binding() {
    const MOVABLE: u64 = 5;
    let driver = Driver::new(false);
    driver.bind([0, 4, 0, MOVABLE, 1], Kind::Exclusive);
    let node = &driver.node;
    for stuck in [EBUSY, ENOMEM] {
        node.inode.stuck.set(Some(stuck));
        let notifier = Notifier::new(8, 4, 0, false, 2, None);
        assert_eq!(node.bind(File { writable: true }, 7, notifier), Err(EINVAL));
        let ear: Rc<dyn Consumer> = Rc::new(Ear {
            id: 2,
            callbacks: driver.callbacks.clone(),
            ids: driver.ids.clone(),
            calls: driver.calls.clone(),
        });
        let notifier = Notifier::new(8, 4, 0, false, 2, Some(ear));
        assert_eq!(node.bind(File { writable: true }, 7, notifier), Err(stuck));
        assert!(!notifier.file_held());
        // Flags, bindings, and where new pages come from.
        driver.check();
    }
    node.inode.stuck.set(None);
    driver.bind([8, 4, 0, 7, 2], Kind::Exclusive);
    driver.finish();
}
