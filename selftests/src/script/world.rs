// SPDX-License-Identifier: GPL-2.0
//! The objects that the threads of a script work on, and the execution of each operation.
//!
//! An operation that the kernel refuses is as good as one that it does: only the state of content
//! and of the kernel counts.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};

use super::marks::{Marks, place};
use super::op::*;
use super::steps::{Probe, Script};
use super::system::System;
use crate::consumer::{Consumer, Mode, Span};
use crate::guest::Command;
use crate::store::{self, Store};
use crate::sys::{self, Alarm, Errno, Mapping};
use crate::uapi::*;
use crate::vm::{ConvertBy, Exit, Private, Vcpu, Vm, VmType, region, sequence, small_pages};
use crate::{HUGE, PAGE};

/// How long one command of a guest may take.
const COMMAND: Duration = Duration::from_secs(10);
/// How many exits one command may cause, and how often the same one after itself: a slot may be
/// missing, or another thread convert all the time.
const EXITS: u32 = 256;
const REPEATED: u32 = 4;
/// How long a consumer holds a page that no operation removes.
const HOLD: Duration = Duration::from_millis(50);
/// How many pages a guest looks at in one operation.
const LOOKS: u64 = 12;
/// Where in a page a guest puts a function.
const FUNCTION: u64 = PAGE / 2;

/// Something that threads make, use and give up at the same time.
type Shared<T> = Mutex<Option<Arc<T>>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn get<T>(place: &Shared<T>) -> Option<Arc<T>> {
    lock(place).clone()
}

fn put<T>(place: &Shared<T>, value: Option<T>) {
    let old = std::mem::replace(&mut *lock(place), value.map(Arc::new));
    // Closed without the lock, if no thread uses it.
    drop(old);
}

/// A file.
struct File {
    fd: OwnedFd,
    /// No one can read, write or map it.
    inaccessible: bool,
}

/// A slot that KVM has taken.
struct Taken {
    view: Mapping,
}

/// A VM and what belongs to it.
struct Machine {
    vm: Vm,
    vcpus: [Mutex<Option<Vcpu>>; VCPUS],
    slots: [Shared<Taken>; SLOTS],
}

/// All of it.
pub struct World<'a> {
    system: &'a System,
    marks: Marks,
    files: [Shared<File>; FILES],
    vms: [Shared<Machine>; VMS],
    consumers: [Shared<Consumer>; CONSUMERS],
    store: Option<Store>,
}

impl Range {
    fn offset(self) -> u64 {
        u64::from(self.at) * PAGE
    }

    fn bytes(self) -> u64 {
        u64::from(self.pages.max(1)) * PAGE
    }

    /// Within what a file can have, for what takes time with each page.
    fn short(self) -> Range {
        let at = u64::from(self.at) % (2 * PAGES);
        let pages = u64::from(self.pages.max(1) - 1) % PAGES + 1;
        Range { at: at as u16, pages: pages as u16 }
    }
}

impl<'a> World<'a> {
    pub fn new(system: &'a System) -> Result<World<'a>> {
        Ok(World {
            system,
            // Another one in each process.
            marks: Marks::new(std::process::id().into()),
            files: Default::default(),
            vms: Default::default(),
            consumers: Default::default(),
            store: if system.has_store() { Store::open().ok() } else { None },
        })
    }

    /// Run all threads to their ends, then judge what is left.
    pub fn play(&self, script: &Script, probe: &dyn Probe) -> Result<()> {
        let barrier = Barrier::new(THREADS);
        let play = |number: usize| {
            probe.enter(number);
            // The others wait for this one even if it has failed.
            let mut result = Ok(());
            for op in script.of(number) {
                if *op == Op::Meet {
                    barrier.wait();
                } else if result.is_ok() {
                    Errno::clear();
                    result = self.step(op).with_context(|| format!("thread {number}: {op:?}"));
                    probe.ended(number, op, Errno::last());
                }
            }
            probe.leave(number);
            result
        };
        thread::scope(|scope| {
            let threads: Vec<_> =
                (0..THREADS).map(|number| scope.spawn(move || play(number))).collect();
            let results: Vec<_> = threads.into_iter().map(thread::ScopedJoinHandle::join).collect();
            results.into_iter().try_for_each(|r| r.map_err(|_| anyhow!("a thread panicked"))?)
        })?;
        for consumer in self.consumers.iter().filter_map(get) {
            let _ = consumer.unbind();
            consumer.expect_balanced()?;
        }
        Ok(())
    }

    fn file(&self, file: u8) -> Option<Arc<File>> {
        get(&self.files[usize::from(file) % FILES])
    }

    fn machine(&self, vm: u8) -> Option<Arc<Machine>> {
        get(&self.vms[usize::from(vm) % VMS])
    }

    /// Do one operation. An error is a failure of the kernel's.
    fn step(&self, op: &Op) -> Result<()> {
        match *op {
            Op::File { file, flags, pages } => {
                self.make(file, flags & !MFD_HUGETLB, u64::from(pages) % (PAGES + 1) * PAGE);
            }
            Op::HugeFile { file, flags, pages } => {
                let flags = flags | MFD_HUGETLB | HUGE.ilog2() << MFD_HUGE_SHIFT;
                self.make(file, flags, u64::from(pages) % 5 * HUGE);
            }
            Op::StoreFile { file, pages } => {
                let size = (u64::from(pages) % PAGES + 1) * PAGE;
                let fd = self.store.as_ref().and_then(|store| store.create(size).ok());
                self.replace(file, fd.map(|fd| File { fd, inaccessible: true }));
            }
            Op::GuestMemfd { file, vm, pages, flags } => {
                let size = (u64::from(pages) % PAGES + 1) * PAGE;
                let fd = self.machine(vm);
                let fd = fd.and_then(|m| m.vm.raw_guest_memfd(size, u64::from(flags) & 7).ok());
                self.replace(file, fd.map(|fd| File { fd, inaccessible: false }));
            }
            Op::Close { file } => self.replace(file, None),
            Op::Truncate { file, pages, bytes } => {
                if let Some(f) = self.file(file) {
                    let size = u64::from(pages) * PAGE + u64::from(bytes);
                    let _ = self.taking(file, || sys::ftruncate(&f.fd, size));
                }
            }
            Op::Fallocate { file, mode, range, bytes } => {
                if let Some(f) = self.file(file) {
                    let at = range.offset() + u64::from(bytes);
                    let work = || sys::fallocate(&f.fd, mode.into(), at, range.bytes());
                    // To allocate takes nothing away.
                    let takes = i32::from(mode) & !libc::FALLOC_FL_KEEP_SIZE != 0;
                    let _ = if takes { self.taking(file, work) } else { work() };
                }
            }
            Op::Seal { file, seals } => {
                if let Some(f) = self.file(file) {
                    let _ = sys::add_seals(&f.fd, seals.into());
                }
            }
            Op::Reach { file, way, range } => self.reach(file, way, range)?,
            Op::Vm { vm, protected } => {
                let kind = if protected { VmType::Protected } else { VmType::Default };
                let made = Vm::new(kind).ok().map(|vm| {
                    let _ = vm.exit_on_map_gpa();
                    Machine { vm, vcpus: Default::default(), slots: Default::default() }
                });
                self.marks.taking_any(|| put(&self.vms[usize::from(vm) % VMS], made));
            }
            Op::CloseVm { vm } => {
                self.marks.taking_any(|| put(&self.vms[usize::from(vm) % VMS], None));
            }
            Op::Cap { vm, cap, argument } => {
                let caps = [KVM_CAP_MEMFILE, KVM_CAP_MEMFILE_ACCESS, KVM_CAP_MEMFILE_POPULATE];
                if let Some(m) = self.machine(vm) {
                    let cap = caps[usize::from(cap) % caps.len()];
                    let _ = m.vm.check_extension(cap);
                    let _ = m.vm.raw_enable_cap(cap, argument.into());
                }
            }
            Op::Slot { vm, slot, file, range, shift, flags } => {
                self.slot(vm, slot, file, range, shift, flags);
            }
            Op::Delete { vm, slot } => {
                if let Some(m) = self.machine(vm) {
                    let slot = usize::from(slot) % SLOTS;
                    let gone = self.marks.taking_any(|| m.vm.raw_delete(1 + slot as u32));
                    if gone.is_ok() {
                        put(&m.slots[slot], None);
                    }
                }
            }
            Op::Convert { vm, file, range, private, region } => {
                if let Some(m) = self.machine(vm) {
                    let by = if region { ConvertBy::Region } else { ConvertBy::Attributes };
                    self.convert(&m, file, by, gpa(file, range), range.bytes(), private);
                }
            }
            Op::Populate { vm, file, range } => self.populate(vm, file, range.short())?,
            Op::PreFault { vm, vcpu, file, range } => {
                let range = range.short();
                self.with_vcpu(vm, vcpu, |_, vcpu| {
                    let _ = vcpu.raw_pre_fault(gpa(file, range), range.bytes());
                    Ok(())
                })?;
            }
            Op::Guest { vm, vcpu, file, act, range, answer } => {
                let range = range.short();
                let of = usize::from(vm) % VMS;
                self.with_vcpu(vm, vcpu, |m, vcpu| {
                    self.guest(m, of, vcpu, file, act, range, answer)
                })?;
            }
            Op::Advise { vm, slot, range, advice } => self.advise(vm, slot, range, advice),
            Op::Bind { consumer, file, range, mode, flags } => {
                let span = Span::same(range.at.into(), range.pages.max(1).into());
                let mode = match mode % 3 {
                    0 => Mode::Observer,
                    1 => Mode::Mapper(u64::from(flags) & 0x1f),
                    _ => Mode::Device,
                };
                let made = Consumer::new().ok();
                if let (Some(f), Some(made)) = (self.file(file), made) {
                    let _ = made.bind(&f.fd, mode, span);
                    let place = &self.consumers[usize::from(consumer) % CONSUMERS];
                    let old = get(place);
                    put(place, Some(made));
                    if let Some(old) = old {
                        let _ = old.unbind();
                        old.expect_balanced()?;
                    }
                }
            }
            Op::Unbind { consumer } => {
                if let Some(c) = get(&self.consumers[usize::from(consumer) % CONSUMERS]) {
                    let _ = c.unbind();
                }
            }
            Op::Get { consumer, at, how } => {
                if let Some(c) = get(&self.consumers[usize::from(consumer) % CONSUMERS]) {
                    let _ = match how {
                        How::Get => c.get(at.into()).map(|_| ()),
                        // Until an invalidation ends; there may be none.
                        How::Hold => match Alarm::set(HOLD) {
                            Ok(_alarm) => c.hold(at.into()).map(|_| ()),
                            Err(_) => Ok(()),
                        },
                        How::Fault => c.fault(at.into()).map(|_| ()),
                    };
                }
            }
            Op::Store { file, at, what } => {
                if let Some(f) = self.file(file) {
                    let at = at.into();
                    let _ = match what {
                        StoreWhat::Migrate => store::migrate(&f.fd, at),
                        StoreWhat::Referenced => store::referenced(&f.fd, at).map(|_| ()),
                        StoreWhat::WriteOut { refused } => store::write_out(&f.fd, at, refused),
                        StoreWhat::Break => self.taking(file, || store::break_page(&f.fd, at)),
                        StoreWhat::Fail { errno } => store::fail(&f.fd, errno.into()),
                    };
                    let _ = store::wanted(&f.fd);
                }
            }
            Op::Machine(machine) => self.system.tell(machine),
            Op::Lose { consumer, at, soft } => {
                let consumer = get(&self.consumers[usize::from(consumer) % CONSUMERS]);
                if let Some(page) = consumer.and_then(|c| c.get(at.into()).ok()) {
                    if soft {
                        self.system.lose(page.pfn, true);
                    } else {
                        self.marks.taking_any(|| self.system.lose(page.pfn, false));
                    }
                }
            }
            Op::Meet => {}
        }
        Ok(())
    }

    /// A new file with a number.
    fn make(&self, file: u8, flags: u32, size: u64) {
        let made = sys::memfd_create(flags | MFD_CLOEXEC).ok().map(|fd| {
            if size != 0 {
                let _ = sys::ftruncate(&fd, size);
            }
            File { fd, inaccessible: flags & MFD_INACCESSIBLE != 0 }
        });
        self.replace(file, made);
    }

    fn replace(&self, file: u8, made: Option<File>) {
        let number = usize::from(file) % FILES;
        self.marks.taking(number, || put(&self.files[number], made));
    }

    /// Do what may take content of a file away.
    fn taking<R>(&self, file: u8, work: impl FnOnce() -> R) -> R {
        self.marks.taking(usize::from(file) % FILES, work)
    }

    /// Try to get at the content.
    fn reach(&self, file: u8, way: Way, range: Range) -> Result<()> {
        let Some(f) = self.file(file) else { return Ok(()) };
        let (at, len) = (range.offset(), range.bytes().min(16 * PAGE));
        let mut bytes = vec![0x5a; len as usize];
        let got = match way {
            Way::Read => sys::pread(&f.fd, &mut bytes, at).unwrap_or(0),
            Way::Write => self.taking(file, || sys::pwrite(&f.fd, &bytes, at)).unwrap_or(0),
            Way::Map => Mapping::anywhere(&f.fd, at, len).map_or(0, |_| 1),
            Way::Send => sys::open("/dev/null", libc::O_WRONLY)
                .and_then(|to| sys::sendfile(&to, &f.fd, at, len))
                .unwrap_or(0),
            Way::Copy => match sys::memfd(len) {
                Ok(to) => sys::copy_file_range(&f.fd, at, &to, 0, len).unwrap_or(0),
                Err(_) => 0,
            },
            Way::Seek => {
                let _ = sys::lseek(&f.fd, at, libc::SEEK_DATA);
                let _ = sys::lseek(&f.fd, at, libc::SEEK_HOLE);
                0
            }
            Way::Reopen => match sys::reopen(&f.fd, libc::O_RDWR) {
                Ok(again) => sys::pread(&again, &mut bytes, at).unwrap_or(0),
                Err(_) => 0,
            },
            Way::Forget => {
                let _ = sys::fadvise(&f.fd, at, range.bytes(), libc::POSIX_FADV_DONTNEED);
                0
            }
            Way::CacheStat => {
                let _ = sys::cachestat(&f.fd, at, range.bytes());
                0
            }
            Way::FdInfo => {
                let _ = std::fs::read(format!("/proc/self/fdinfo/{}", f.fd.as_raw_fd()));
                0
            }
        };
        ensure!(got <= 0 || !f.inaccessible, "{way:?} of an inaccessible file succeeded: {got}");
        Ok(())
    }

    /// Convert.
    fn convert(&self, m: &Machine, file: u8, by: ConvertBy, gpa: u64, size: u64, private: bool) {
        let file = usize::from(file) % FILES;
        let _ = self.marks.taking(file, || m.vm.raw_convert(by, gpa, size, private));
    }

    /// Add, change or move a slot.
    fn slot(&self, vm: u8, slot: u8, file: u8, range: Range, shift: i16, flags: u8) {
        let Some(m) = self.machine(vm) else { return };
        let number = usize::from(file) % FILES;
        let slot = usize::from(slot) % SLOTS;
        let pages = u64::from(range.pages.max(1) - 1) % PAGES + 1;
        let size = pages * PAGE;
        // A slot that is changed or moved keeps its shared side.
        let old = get(&m.slots[slot]).filter(|old| old.view.len() == size);
        let new = match &old {
            Some(_) => None,
            None => match small_pages(size) {
                Ok(view) => Some(Taken { view }),
                Err(_) => return,
            },
        };
        let Some(view) = old.as_ref().map(|o| &o.view).or(new.as_ref().map(|n| &n.view)) else {
            return;
        };
        if shift != 0 {
            self.marks.moved(number);
        }
        let at = place(number) + u64::from(range.at) * PAGE;
        let at = at.wrapping_add_signed(i64::from(shift) * PAGE as i64);
        let f = self.file(file);
        let kind = if flags & 2 == 0 { Private::Memfile } else { Private::GuestMemfd };
        let private = f.as_ref().filter(|_| flags & 1 == 0);
        let private = private.map(|f| (kind, f.fd.as_fd(), range.offset()));
        let mut region = region(1 + slot as u32, at, view, private);
        for (bit, flag) in [
            (4, KVM_MEM_LOG_DIRTY_PAGES),
            (8, KVM_MEM_READONLY),
            (16, KVM_MEM_GUEST_MEMFD),
            (32, KVM_MEM_PRIVATE),
        ] {
            region.flags |= if flags & bit != 0 { flag } else { 0 };
        }
        if flags & 64 != 0 {
            region.guest_memfd_offset += 1;
        }
        let taken = self.marks.taking_any(|| m.vm.raw_set_region(&region));
        if taken.is_ok() && new.is_some() {
            put(&m.slots[slot], new);
        }
    }

    /// Initial content: what guests would write.
    fn populate(&self, vm: u8, file: u8, range: Range) -> Result<()> {
        let Some(m) = self.machine(vm) else { return Ok(()) };
        let (gpa, size) = (gpa(file, range), range.bytes().min(32 * PAGE));
        let Ok(source) = Mapping::anonymous(size) else { return Ok(()) };
        for at in (0..size).step_by(8) {
            source.store(at, self.marks.pattern().word(gpa + at));
        }
        let number = usize::from(file) % FILES;
        let _ = self.marks.taking(number, || m.vm.raw_populate(gpa, size, source.addr()));
        Ok(())
    }

    fn advise(&self, vm: u8, slot: u8, range: Range, advice: Advice) {
        let Some(m) = self.machine(vm) else { return };
        let Some(taken) = get(&m.slots[usize::from(slot) % SLOTS]) else { return };
        let view = &taken.view;
        let at = range.offset() % view.len();
        let len = range.bytes().min(view.len() - at);
        let advise = |advice| view.madvise(at, len, advice);
        let _ = match advice {
            Advice::Discard => self.marks.taking_any(|| advise(libc::MADV_DONTNEED)),
            Advice::Huge => advise(libc::MADV_HUGEPAGE),
            Advice::Small => advise(libc::MADV_NOHUGEPAGE),
            Advice::Mergeable => advise(libc::MADV_MERGEABLE),
            Advice::PageOut => advise(libc::MADV_PAGEOUT),
            Advice::Collapse => advise(libc::MADV_COLLAPSE),
        };
    }

    /// Use a vCPU, which is made at its first use.
    fn with_vcpu(
        &self,
        vm: u8,
        vcpu: u8,
        work: impl FnOnce(&Machine, &mut Vcpu) -> Result<()>,
    ) -> Result<()> {
        let Some(m) = self.machine(vm) else { return Ok(()) };
        let number = usize::from(vcpu) % VCPUS;
        let mut place = lock(&m.vcpus[number]);
        if place.is_none() {
            *place = m.vm.vcpu(number as u64).ok();
        }
        let Some(vcpu) = &mut *place else { return Ok(()) };
        let result = work(&m, vcpu);
        // One that cannot even begin anew is of no use.
        if vcpu.is_busy() && vcpu.abandon().is_err() {
            *place = None;
        }
        result
    }

    /// Let a vCPU do something.
    #[allow(clippy::too_many_arguments)]
    fn guest(
        &self,
        m: &Machine,
        vm: usize,
        vcpu: &mut Vcpu,
        file: u8,
        act: Act,
        range: Range,
        answer: bool,
    ) -> Result<()> {
        let number = usize::from(file) % FILES;
        let (start, len) = (gpa(file, range), range.bytes());
        let mut run = Run { world: self, m, vcpu, file, answer };
        match act {
            Act::Fill => {
                let before = self.marks.before(number);
                let pattern = self.marks.pattern();
                if run.command(Command::Fill, &sequence(start, len, PAGE, pattern))? {
                    let gpas = (start..start + len).step_by(PAGE as usize);
                    self.marks.wrote(vm, number, gpas, before);
                }
            }
            Act::Check => {
                let pages = len / PAGE;
                for page in (0..pages).step_by(pages.div_ceil(LOOKS) as usize) {
                    for word in [0, PAGE - 8] {
                        let addr = start + page * PAGE + word;
                        let since = self.marks.since(vm, number, addr);
                        if !run.command(Command::Load, &[addr])? {
                            return Ok(());
                        }
                        self.marks.judge(number, addr, run.vcpu.result(0), since)?;
                    }
                }
            }
            Act::Execute => {
                let payload = crate::guest::payload().len() as u64;
                let args = [start + FUNCTION, crate::guest::PAYLOAD, payload, len];
                run.command(Command::Execute, &args)?;
            }
            Act::Privatise | Act::Share => {
                let attributes =
                    if act == Act::Privatise { KVM_MAP_GPA_RANGE_ENCRYPTED } else { 0 };
                let amd = run.vcpu.is_amd().into();
                let args = [KVM_HC_MAP_GPA_RANGE, start, len / PAGE, attributes, amd];
                run.command(Command::Hypercall, &args)?;
            }
        }
        Ok(())
    }
}

/// The address of the beginning of a range at the place of a file.
fn gpa(file: u8, range: Range) -> u64 {
    place(usize::from(file) % FILES) + range.offset()
}

/// A running vCPU.
struct Run<'a> {
    world: &'a World<'a>,
    m: &'a Machine,
    vcpu: &'a mut Vcpu,
    file: u8,
    answer: bool,
}

impl Run<'_> {
    /// Run a command: whether all of it happened in memory.
    fn command(&mut self, command: Command, args: &[u64]) -> Result<bool> {
        let mut in_memory = true;
        let (mut exits, mut last, mut repeated) = (0, Exit::Done, 0);
        if self.vcpu.is_busy() && self.vcpu.abandon().is_err() {
            return Ok(false);
        }
        self.vcpu.post(command, args)?;
        loop {
            exits += 1;
            let exit = match self.vcpu.run_for(COMMAND) {
                Ok(exit) => exit,
                // There was no timer to be had.
                Err(error) if error.is::<Errno>() => return Ok(false),
                Err(error) => return Err(error),
            };
            repeated = if exit == last { repeated + 1 } else { 0 };
            last = exit;
            match exit {
                Exit::Done => return Ok(in_memory),
                _ if exits > EXITS || repeated > REPEATED => return Ok(false),
                Exit::Mmio { write, .. } => {
                    in_memory = false;
                    if !write {
                        self.vcpu.mmio_data().fill(0);
                    }
                }
                Exit::MemoryFault { errno: Errno::EFAULT, gpa, flags, .. } if self.answer => {
                    let private = flags & KVM_MEMORY_EXIT_FLAG_PRIVATE != 0;
                    let (world, by) = (self.world, ConvertBy::Attributes);
                    world.convert(self.m, self.file, by, gpa & !(PAGE - 1), PAGE, private);
                }
                Exit::Hypercall { args: [gpa, pages, attributes], .. } => {
                    let private = attributes & KVM_MAP_GPA_RANGE_ENCRYPTED != 0;
                    let size = pages.wrapping_mul(PAGE);
                    self.world.convert(self.m, self.file, ConvertBy::Region, gpa, size, private);
                }
                _ => return Ok(false),
            }
        }
    }
}
