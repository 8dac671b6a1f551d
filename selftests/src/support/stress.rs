// SPDX-License-Identifier: GPL-2.0
//! Guest vCPUs access memory while the host converts, punches, allocates and pre-faults it.
//!
//! A table that host and guest share has the expected content of each page, with an epoch that is
//! odd while the page is being changed; see `program.s`. A vCPU checks a word only if the epoch did
//! not change around its load; then it must be the word of the table, so a stale mapping shows by
//! its content. Each vCPU also has a word of its own in each page, which must survive as long as
//! the epoch does.
//!
//! The file is longer than the slot: in its tail another consumer and another VM come and go.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::consumer::{Consumer, Mode, Span};
use crate::guest::{Command, SCRATCH, STRESS_ENTRY, STRESS_NOTE, STRESS_WORDS};
use crate::ktap::CaseResult;
use crate::module::Module;
use crate::pattern::{Pattern, Rng, mix, seed};
use crate::pressure::{self, Cgroup};
use crate::support::backend::Backend;
use crate::support::setup::{GUEST, Layout, SLOT, Setup, fill_view};
use crate::sys::*;
use crate::uapi::MEMFILE_F_ALL;
use crate::vm::{ConvertBy, Private, RunCounters};
use crate::{GIB, HUGE, PAGE};

/// Attempts at a `fallocate()` beside reclaim.
const ALLOCATIONS: u32 = 100;

/// Duration of a stress; shorter on guest_memfd, where it only tests the stress itself.
const DURATION: Duration = Duration::from_secs(3);
const DURATION_GMEM: Duration = Duration::from_millis(1500);
/// A huge page and one more.
pub const PAGES: u64 = HUGE / PAGE + 1;
/// The vCPU of [`Bench::discards`]; those that check have the numbers from 1 on.
const DISCARDING_VCPU: u64 = 7;
/// Room for the table, then for each vCPU's notes, all in the shared system slot.
pub const TABLE: u64 = SCRATCH;
const NOTES: u64 = SCRATCH + 0x8000;
const NOTES_SIZE: u64 = 0x4000;

const _: () = assert!(PAGES * STRESS_ENTRY <= NOTES - TABLE && PAGES * STRESS_NOTE <= NOTES_SIZE);

/// When a stress is over.
#[derive(Clone, Copy, Debug)]
pub enum Length {
    /// After that time, and when each action was done [`TWICE`].
    Time(Duration),
    /// After that time, and when each action and the work of others was done so many times.
    Rounds(Duration, u64),
    /// After so many actions, and when each vCPU has checked a word of each page, on average.
    Actions(u64),
}

/// Times that each action is done, and the work of others, even if one takes long.
const TWICE: u64 = 2;

impl Length {
    /// Times that each action is done at least, and the work of others.
    fn least(self) -> u64 {
        match self {
            Length::Time(_) | Length::Actions(_) => TWICE,
            Length::Rounds(_, times) => times,
        }
    }
}

/// Actions of the host on pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Share,
    Privatise,
    Punch,
    Refill,
    Allocate,
    PreFault,
    ReplaceSlot,
    /// Gives shared pages back to the host: they are zeros again.
    Discard,
    // These need a [`Host`].
    Compact,
    Reclaim,
    Take,
}

/// Actions that need only the guest and its file.
pub const EVERYTHING: [Action; 6] = [
    Action::Share,
    Action::Privatise,
    Action::Punch,
    Action::Refill,
    Action::Allocate,
    Action::PreFault,
];

/// One round of the work of other users of the file.
pub type Other = Box<dyn FnMut() -> Result<()> + Send>;

/// Takes away pages that are movable or reclaimable.
pub struct Host {
    pub cgroup: Cgroup,
    /// Takes away the memory blocks that the guest's pages lie in, and gives them back.
    pub take: Box<dyn Fn() -> Result<()>>,
}

/// One page, as the host knows it.
#[derive(Clone, Copy)]
struct Page {
    private: bool,
    private_content: Pattern,
    shared_content: Pattern,
}

/// The host's side of a stress.
pub struct Bench {
    pub s: Setup,
    layout: Layout,
    host: Option<Host>,
    length: Length,
    conversions: &'static [ConvertBy],
    /// Bytes right behind the slot, in the guest and in the file, that are another slot's and always
    /// shared: holes and conversions go on over them.
    beyond: u64,
    rng: Rng,
    pages: Vec<Page>,
    generation: u64,
}

impl Bench {
    /// All pages private, with known content on both sides.
    pub fn new(on: &'static Backend, layout: Layout) -> Result<Bench> {
        let duration = match on.kind {
            Private::Memfile => DURATION,
            Private::GuestMemfd => DURATION_GMEM,
        };
        Bench::of(Setup::at(on, PAGES * PAGE, layout)?, layout, None, Length::Time(duration))
    }

    /// The same with a given guest, which has a slot of [`PAGES`] pages at `layout`, and a host.
    pub fn of(mut s: Setup, layout: Layout, host: Option<Host>, length: Length) -> Result<Bench> {
        let rng = Rng::new(seed());
        let conversions = s.vm.conversions();
        let (private_content, shared_content) = (Pattern::Generation(1), Pattern::Generation(2));
        s.vcpu.fill(s.slot.gpa, s.slot.size, private_content)?;
        s.expect_whole()?;
        fill_view(&s.slot, shared_content);
        let page = Page { private: true, private_content, shared_content };
        let pages = vec![page; PAGES as usize];
        let (beyond, generation) = (0, 2);
        let mut bench =
            Bench { s, layout, host, length, conversions, beyond, rng, pages, generation };
        bench.begin(0, PAGES);
        bench.end(0, PAGES);
        Ok(bench)
    }

    fn epoch(&self, page: u64) -> &std::sync::atomic::AtomicU64 {
        self.s.vm.system().word(TABLE + page * STRESS_ENTRY)
    }

    /// From here on no vCPU checks these pages.
    fn begin(&mut self, first: u64, count: u64) {
        for page in first..first + count {
            self.epoch(page).fetch_add(1, Ordering::SeqCst);
        }
        fence(Ordering::SeqCst);
    }

    /// From here on they must hold what `self.pages` says.
    fn end(&mut self, first: u64, count: u64) {
        for page in first..first + count {
            let Page { private, private_content, shared_content } = self.pages[page as usize];
            let content = if private { private_content } else { shared_content };
            let entry = TABLE + page * STRESS_ENTRY;
            let system = self.s.vm.system();
            system.store(entry + 8, content.word(self.s.slot.gpa + page * PAGE));
            system.store(entry + 16, content.step(8));
        }
        fence(Ordering::SeqCst);
        for page in first..first + count {
            self.epoch(page).fetch_add(1, Ordering::SeqCst);
        }
    }

    fn next_generation(&mut self) -> Pattern {
        self.generation += 1;
        Pattern::Generation(self.generation)
    }

    /// Access only so many pages of the slot, from the first one on. The others keep the content that
    /// the guest wrote first.
    pub fn of_the_first(mut self, pages: u64) -> Bench {
        self.pages.truncate(pages as usize);
        self
    }

    /// How many pages are accessed.
    fn count(&self) -> u64 {
        self.pages.len() as u64
    }

    /// shmem gives up with ENOMEM if reclaim found more of the new pages, on which nobody has written
    /// yet, than the call had added: beside reclaim that is no want of memory.
    fn allocate(&self, offset: u64, len: u64) -> SysResult<()> {
        for _ in 0..ALLOCATIONS {
            match allocate(&self.s.fd, offset, len) {
                Err(Errno::ENOMEM) if self.beyond > 0 => {
                    println!("reclaim was faster than fallocate")
                }
                result => return result,
            }
        }
        Err(Errno::ENOMEM)
    }

    /// Do one action to some pages.
    fn act(&mut self, action: Action) -> Result<()> {
        let pages = self.count();
        let longest = if self.rng.below(4) == 0 { pages } else { 16 };
        let first = self.rng.below(pages);
        let (count, beyond) = match self.beyond {
            0 => (1 + self.rng.below(longest.min(pages - first)), 0),
            // Often up to the end, and further.
            beyond if self.rng.below(2) == 0 => (pages - first, beyond),
            _ => (1 + self.rng.below(longest.min(pages - first)), 0),
        };
        let (gpa, len) = (self.s.slot.gpa + first * PAGE, count * PAGE);
        let offset = self.layout.offset + first * PAGE;
        let by = self.conversions[self.rng.below(self.conversions.len() as u64) as usize];
        match action {
            // These change nothing that a guest can see.
            Action::Compact => pressure::compact()?,
            Action::Reclaim => {
                self.host()?.cgroup.reclaim(len)?;
            }
            Action::Take => (self.host()?.take)()?,
            Action::Allocate => {
                self.allocate(offset, len + beyond).context("fallocate")?;
            }
            Action::PreFault => match self.s.vcpu.raw_pre_fault(gpa, len).0 {
                Ok(()) | Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(errno).context("pre-fault"),
            },
            Action::Share => {
                let content = self.next_generation();
                let punched = self.rng.below(2) == 0;
                self.begin(first, count);
                self.write_view(first, count, content);
                self.s.vm.convert(by, gpa, len + beyond, false)?;
                if punched {
                    punch(&self.s.fd, offset, len + beyond).context("punch")?;
                }
                for page in &mut self.pages[first as usize..(first + count) as usize] {
                    page.private = false;
                    page.shared_content = content;
                    if punched {
                        page.private_content = Pattern::ZERO;
                    }
                }
                // Again: a vCPU may have written its own word late, but nothing else.
                self.write_view(first, count, content);
                self.end(first, count);
            }
            Action::Privatise => {
                self.begin(first, count);
                self.s.vm.convert(by, gpa, len, true)?;
                for page in &mut self.pages[first as usize..(first + count) as usize] {
                    page.private = true;
                }
                self.end(first, count);
            }
            Action::Discard => {
                self.begin(first, count);
                let view = &self.s.slot.view;
                view.madvise(first * PAGE, len, libc::MADV_DONTNEED).context("MADV_DONTNEED")?;
                for page in &mut self.pages[first as usize..(first + count) as usize] {
                    page.shared_content = Pattern::ZERO;
                }
                self.end(first, count);
            }
            Action::Punch => {
                self.begin(first, count);
                punch(&self.s.fd, offset, len + beyond).context("punch")?;
                for page in &mut self.pages[first as usize..(first + count) as usize] {
                    page.private_content = Pattern::ZERO;
                }
                self.end(first, count);
            }
            Action::Refill => {
                let content = self.next_generation();
                self.begin(first, count);
                for page in first..first + count {
                    let gpa = self.s.slot.gpa + page * PAGE;
                    self.s.vcpu.fill(gpa, STRESS_WORDS * 8, content)?;
                    let page = &mut self.pages[page as usize];
                    if page.private {
                        page.private_content = content;
                    } else {
                        page.shared_content = content;
                    }
                }
                self.end(first, count);
            }
            Action::ReplaceSlot => {
                self.begin(0, pages);
                self.s.vm.raw_delete(SLOT).context("delete the slot")?;
                self.s.bind_again()?;
                self.end(0, pages);
            }
        }
        Ok(())
    }

    /// The host of this stress, which takes pages away.
    pub fn host(&self) -> Result<&Host> {
        self.host.as_ref().context("this stress has no host")
    }

    fn write_view(&self, first: u64, count: u64, content: Pattern) {
        for page in first..first + count {
            for word in 0..STRESS_WORDS {
                let offset = page * PAGE + word * 8;
                self.s.slot.view.store(offset, content.word(self.s.slot.gpa + offset));
            }
        }
    }

    /// The arguments of the stress command for vCPU `id`.
    pub fn arguments(&self, id: u64) -> [u64; 6] {
        let own = STRESS_WORDS * 8 + id * 8;
        let random = mix(id ^ self.generation) | 1;
        [self.s.slot.gpa, self.count(), TABLE, random, own, NOTES + id * NOTES_SIZE]
    }

    /// Let `vcpus` access the pages while the host picks from `actions`.
    pub fn run(&mut self, vcpus: u64, actions: &[Action]) -> CaseResult {
        self.run_beside(vcpus, actions, Vec::new())
    }

    /// The same while each of `others` repeats its work in a thread of its own.
    pub fn run_beside(&mut self, vcpus: u64, actions: &[Action], others: Vec<Other>) -> CaseResult {
        let mut workers = Vec::new();
        for id in 1..=vcpus {
            let mut vcpu = self.s.vm.vcpu(id)?;
            vcpu.post(Command::Stress, &self.arguments(id))?;
            workers.push(vcpu);
        }
        let stoppers: Vec<_> = workers.iter().map(|vcpu| vcpu.stopper()).collect();
        let mut done = vec![0u64; actions.len()];
        let over = AtomicBool::new(false);
        let least = self.length.least();
        let (result, counters, rounds) = thread::scope(|scope| {
            let running: Vec<_> =
                workers.iter_mut().map(|vcpu| scope.spawn(|| vcpu.finish_stress())).collect();
            let others: Vec<_> = others
                .into_iter()
                .map(|other| scope.spawn(|| repeat(other, least, &over)))
                .collect();
            let ended = || {
                running.iter().any(|r| r.is_finished()) || others.iter().any(|o| o.is_finished())
            };
            let checked = || stoppers.iter().all(|vcpu| vcpu.rounds() >= PAGES);
            let result = self.act_for_a_while(actions, &mut done, ended, checked);
            over.store(true, Ordering::Relaxed);
            let rounds: Vec<Result<u64>> = others
                .into_iter()
                .map(|o| o.join().unwrap_or_else(|_| bail!("a thread panicked")))
                .collect();
            for stopper in &stoppers {
                stopper.stop();
            }
            let counters: Vec<Result<RunCounters>> = running
                .into_iter()
                .map(|r| r.join().unwrap_or_else(|_| bail!("the vCPU thread panicked")))
                .collect();
            (result, counters, rounds)
        });
        for (action, times) in actions.iter().zip(&done) {
            println!("{action:?}: {times} times");
        }
        for rounds in rounds {
            println!("others: {} rounds", rounds?);
        }
        for counters in counters {
            let counters = counters?;
            println!("{counters:?}");
            // On average each page was.
            ensure!(counters.rounds >= PAGES, "hardly anything was checked");
        }
        result
    }

    /// Pick from `actions` until it is time to end, or a thread has `ended` before.
    fn act_for_a_while(
        &mut self,
        actions: &[Action],
        done: &mut [u64],
        ended: impl Fn() -> bool,
        checked: impl Fn() -> bool,
    ) -> Result<()> {
        let start = Instant::now();
        while !ended() {
            let missing = done.iter().position(|&times| times < self.length.least());
            let over = match self.length {
                Length::Time(duration) | Length::Rounds(duration, _) => start.elapsed() >= duration,
                Length::Actions(count) => done.iter().sum::<u64>() >= count,
            };
            let over = over && checked();
            if over && missing.is_none() {
                break;
            }
            let random = self.rng.below(actions.len() as u64) as usize;
            let choice = missing.filter(|_| over).unwrap_or(random);
            self.act(actions[choice])?;
            done[choice] += 1;
        }
        Ok(())
    }

    /// Discards shared pages while holes and conversions unmap them: a slot of `pages` behind that of
    /// the stress, on the file's next pages. Its own vCPU writes to all of them, and finds zeros in
    /// those that were discarded and its content in the others.
    pub fn discards(&mut self, pages: u64) -> Result<Other> {
        let (gpa, size) = (self.s.slot.gpa + self.s.slot.size, pages * PAGE);
        let at = self.layout.offset + PAGES * PAGE;
        let slot = self.s.vm.add_private(SLOT + 1, gpa, size, Private::Memfile, &self.s.fd, at)?;
        let mut vcpu = self.s.vm.vcpu(DISCARDING_VCPU)?;
        self.beyond = size;
        let (mut rng, mut round) = (Rng::new(seed()), 0);
        Ok(Box::new(move || {
            round += 1;
            let pattern = Pattern::Generation(round);
            vcpu.fill(gpa, size, pattern)?;
            let first = rng.below(pages);
            let (start, len) = (first * PAGE, (1 + rng.below(pages - first)) * PAGE);
            slot.view.madvise(start, len, libc::MADV_DONTNEED).context("MADV_DONTNEED")?;
            let round = format!("round {round}, discarded [{start:#x}, +{len:#x})");
            vcpu.verify(gpa, start, pattern).context(round.clone())?;
            vcpu.verify(gpa + start, len, Pattern::ZERO).context(round.clone())?;
            vcpu.verify(gpa + start + len, size - start - len, pattern).context(round)
        }))
    }

    /// Repeats the life of a module: consumers bind, get callbacks for holes, unbind, and it is
    /// unloaded.
    pub fn consumers(&self) -> Result<Other> {
        let (fd, module) = (self.s.fd.try_clone()?, Module::test()?);
        let all = (self.layout.offset + PAGES * PAGE + HUGE) / PAGE;
        let own = all - HUGE / PAGE;
        let mode = Mode::Mapper(self.s.on.choice.unwrap_or(MEMFILE_F_ALL));
        let mut rng = Rng::new(seed());
        Ok(Box::new(move || {
            if !module.loaded() {
                module.load().context("load memfile_test.ko")?;
            }
            let mut consumers = Vec::new();
            for _ in 0..4 {
                let pgoff = rng.below(all);
                let span = Span::same(pgoff, 1 + rng.below(all - pgoff));
                consumers.push(Consumer::bound(&fd, Mode::Observer, span)?);
            }
            let mapper = Consumer::bound(&fd, mode, Span::same(own, 64))?;
            for _ in 0..8 {
                mapper.get(own + rng.below(64)).context("get_pfn")?;
                punch(&fd, (own + rng.below(64)) * PAGE, PAGE).context("punch")?;
            }
            consumers.push(mapper);
            for consumer in consumers.drain(..) {
                consumer.unbind().context("unbind")?;
                consumer.expect_balanced()?;
            }
            module.unload()
        }))
    }

    /// Repeats the life of a VM: it binds a part of the file, runs, punches, and is destroyed, with
    /// its slot or after it.
    pub fn another_vm(&self) -> Result<Other> {
        let fd: OwnedFd = self.s.fd.try_clone()?;
        let (len, offset) = (16 * PAGE, self.layout.offset + PAGES * PAGE + HUGE / 2);
        let on = self.s.on;
        let mut delete = false;
        Ok(Box::new(move || {
            let vm = on.vm()?;
            let slot = vm.add_private(SLOT, 4 * GIB, len, Private::Memfile, &fd, offset)?;
            vm.set_private(slot.gpa, len)?;
            let mut vcpu = vm.vcpu(0)?;
            vcpu.fill(slot.gpa, len, GUEST)?;
            vcpu.verify(slot.gpa, len, GUEST)?;
            punch(&fd, offset, len).context("punch")?;
            vcpu.verify(slot.gpa, len, Pattern::ZERO)?;
            delete = !delete;
            if delete {
                vm.delete(slot)?;
            }
            Ok(())
        }))
    }
}

/// Repeats `other` until it is `over`, but at least so many times. Returns how often.
fn repeat(mut other: Other, least: u64, over: &AtomicBool) -> Result<u64> {
    let mut rounds = 0;
    while rounds < least || !over.load(Ordering::Relaxed) {
        other()?;
        rounds += 1;
    }
    Ok(rounds)
}
