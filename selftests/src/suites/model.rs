// SPDX-License-Identifier: GPL-2.0
//! Random operations on a file and on a model of it must agree, call by call.
//!
//! Ordinary files of shmem prove that the patches change nothing for them; with
//! F_SEAL_AUTO_ALLOCATE they test the promises of the seal, and a memfile tests rule 2. After each
//! operation size and st_blocks are compared, at times all content and every hole. A failure prints
//! the last operations, and the seed to repeat them.

mod file;

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

use self::file::File;
use crate::ktap::{CaseResult, Suite};
use crate::pattern::{Rng, mix, seed};
use crate::pressure::base_pages;
use crate::support::setup::{LAYOUTS, SLOT};
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{ConvertBy, Private, Slot, Vcpu, Vm};
use crate::{PAGE, mem, suite};

pub static SUITE: Suite = suite!(
    "model",
    [
        ordinary_memfd_is_as_ever,
        tmpfs_file_is_as_ever,
        sealed_memfd_gets_memory_by_fallocate_only,
        memfile_has_the_pages_it_was_told_to_have,
        memfile_of_a_guest_has_what_both_made_of_it,
    ]
);

/// Operations start below this.
const END: u64 = 48 * PAGE;
/// The longest copy: the size of a pipe.
const LONGEST: u64 = 14 * PAGE;
/// Operations on one file.
const OPERATIONS: u64 = 250;
const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | KEEP;

/// Requests that the VFS or shmem refuses in any state: mode, offset, length.
const REFUSED: [(i32, u64, u64, Errno); 10] = [
    (libc::FALLOC_FL_COLLAPSE_RANGE, 0, PAGE, Errno::EOPNOTSUPP),
    (libc::FALLOC_FL_INSERT_RANGE, 0, PAGE, Errno::EOPNOTSUPP),
    (libc::FALLOC_FL_ZERO_RANGE, 0, PAGE, Errno::EOPNOTSUPP),
    (libc::FALLOC_FL_ZERO_RANGE | KEEP, PAGE, PAGE, Errno::EOPNOTSUPP),
    (libc::FALLOC_FL_UNSHARE_RANGE, 0, PAGE, Errno::EOPNOTSUPP),
    (libc::FALLOC_FL_PUNCH_HOLE, 0, PAGE, Errno::EOPNOTSUPP),
    (0, 0, 0, Errno::EINVAL),
    (KEEP, 1 << 63, PAGE, Errno::EINVAL),
    (PUNCH, PAGE, 1 << 63, Errno::EINVAL),
    (KEEP, 1 << 62, 1 << 62, Errno::EFBIG),
];

/// Fail unless both have the same result.
fn same<T: PartialEq + Debug>(what: &str, file: T, model: T) -> Result<()> {
    ensure!(file == model, "{what}: the file says {file:?}, the model {model:?}");
    Ok(())
}

/// The same bytes.
fn same_bytes(what: &str, file: &[u8], model: &[u8]) -> Result<()> {
    same(&format!("{what}, length"), file.len(), model.len())?;
    let wrong = file.iter().zip(model).position(|(a, b)| a != b);
    wrong.map_or(Ok(()), |at| same(&format!("{what}, byte {at:#x}"), file[at], model[at]))
}

/// Bytes that depend on the operation that wrote them.
fn content(number: u64, len: u64) -> Vec<u8> {
    (0..len).map(|n| mix(number + n / 8).to_le_bytes()[(n % 8) as usize] | 1).collect()
}

/// The operations on a file.
#[derive(Clone, Copy, Debug)]
enum Operation {
    Read {
        at: u64,
        len: u64,
    },
    Write {
        at: u64,
        len: u64,
    },
    /// Through a mapping: shared or not, existing or new, by this program or by the kernel on its
    /// behalf.
    Touch {
        at: u64,
        write: bool,
        shared: bool,
        held: bool,
        by_kernel: bool,
    },
    Fallocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
    Refused(usize),
    Truncate(u64),
    Seal(u32),
    Seek {
        from: u64,
        data: bool,
    },
    /// To or from a pipe.
    Splice {
        at: u64,
        len: u64,
        write: bool,
    },
    /// To a pipe, or from another file.
    Send {
        at: u64,
        len: u64,
        write: bool,
    },
    Copy {
        from: u64,
        to: u64,
        len: u64,
    },
}

/// Random offsets and lengths, mostly at the edges of pages and of the file.
struct Dice(Rng);

impl Dice {
    fn coin(&mut self) -> bool {
        self.0.below(2) == 0
    }

    fn offset(&mut self, size: u64) -> u64 {
        let near = if self.0.below(4) == 0 { size } else { self.0.below(END / PAGE) * PAGE };
        let at = match self.0.below(4) {
            0 => near + self.0.below(PAGE),
            1 => near.saturating_sub(self.0.below(PAGE)),
            _ => near,
        };
        at.min(END)
    }

    /// A range; it often ends at the end of the file.
    fn range(&mut self, size: u64) -> (u64, u64) {
        let at = self.offset(size);
        let len = match self.0.below(5) {
            0 if at < size => (size - at).min(LONGEST),
            _ => self.len(),
        };
        (at, len)
    }

    fn len(&mut self) -> u64 {
        match self.0.below(4) {
            0 => 1 + self.0.below(16),
            1 => 1 + self.0.below(PAGE),
            2 => 1 + self.0.below(LONGEST),
            _ => (1 + self.0.below(8)) * PAGE,
        }
    }

    fn operation(&mut self, size: u64) -> Operation {
        let (at, len) = self.range(size);
        match self.0.below(20) {
            0 | 1 => Operation::Read { at, len },
            2..5 => Operation::Write { at, len },
            5..9 => Operation::Touch {
                at: at & !7,
                write: self.coin(),
                shared: self.0.below(4) > 0,
                held: self.coin(),
                by_kernel: self.coin(),
            },
            9 | 10 => {
                Operation::Fallocate { mode: [0, KEEP][self.coin() as usize], offset: at, len }
            }
            11 | 12 => Operation::Fallocate { mode: PUNCH, offset: at, len },
            13 => match self.0.below(16) {
                0 => Operation::Fallocate { mode: PUNCH, offset: at, len: i64::MAX as u64 - at },
                1 | 2 => Operation::Refused(self.0.below(REFUSED.len() as u64) as usize),
                _ => Operation::Seek { from: at, data: self.coin() },
            },
            14 => Operation::Truncate(at),
            15 => Operation::Seek { from: at, data: self.coin() },
            16 => Operation::Splice { at, len, write: self.coin() },
            17 => Operation::Send { at, len, write: self.coin() },
            18 => Operation::Copy { from: at, to: self.offset(size), len },
            _ => match self.0.below(40) {
                0 => Operation::Seal(F_SEAL_SHRINK),
                1 => Operation::Seal(F_SEAL_GROW),
                2 => Operation::Seal(F_SEAL_FUTURE_WRITE),
                3 => Operation::Seal(F_SEAL_WRITE | F_SEAL_SHRINK),
                4 => Operation::Seal(F_SEAL_SEAL),
                _ => Operation::Write { at, len },
            },
        }
    }
}

/// Remembers the last operations.
#[derive(Default)]
struct Log(VecDeque<String>);

impl Log {
    fn add(&mut self, operation: &impl Debug) {
        self.0.push_back(format!("{operation:x?}"));
        if self.0.len() > 12 {
            self.0.pop_front();
        }
    }

    fn text(&self) -> String {
        self.0.iter().map(|line| format!("\n  {line}")).collect()
    }
}

/// The end to read from, and the one to write to.
type Pipe = (std::fs::File, std::fs::File);

/// A file of shmem and its model.
struct Shmem {
    fd: OwnedFd,
    model: File,
    /// A writable mapping that stays.
    held: Option<Mapping>,
    pipe: Pipe,
    /// Another file, and its content.
    other: (OwnedFd, Vec<u8>),
    /// Operations so far, on this file and on those before it.
    number: u64,
}

impl Shmem {
    fn new(fd: OwnedFd, model: File, hold: bool, number: u64) -> Result<Shmem> {
        let held = hold.then(|| Mapping::shared(&fd, 0, END + PAGE)).transpose()?;
        let (reader, writer) = pipe()?;
        let other = (memfd(0)?, content(!number, LONGEST));
        pwrite(&other.0, &other.1, 0)?;
        Ok(Shmem { fd, model, held, pipe: (reader.into(), writer.into()), other, number })
    }

    /// Do one operation on both.
    fn apply(&mut self, operation: Operation) -> Result<()> {
        self.number += 1;
        let mark = mix(self.number);
        let Shmem { fd, model, pipe: (reader, writer), .. } = self;
        match operation {
            Operation::Read { at, len } => {
                let mut bytes = vec![0xee; len as usize];
                let got = pread(&*fd, &mut bytes, at).context("pread")?;
                same_bytes("pread", &bytes[..got as usize], &model.read(at, len))?;
            }
            Operation::Write { at, len } => {
                let bytes = content(mark, len);
                same("pwrite", pwrite(&*fd, &bytes, at), model.write(at, &bytes))?;
            }
            Operation::Touch { at, write, shared, held, by_kernel } => {
                self.touch(at, write.then_some(mark), shared, held, by_kernel)?;
            }
            Operation::Fallocate { mode, offset, len } => {
                let result = fallocate(&*fd, mode, offset, len);
                same("fallocate", result, model.fallocate(mode, offset, len))?;
            }
            Operation::Refused(which) => {
                let (mode, offset, len, errno) = REFUSED[which];
                same("fallocate", fallocate(&*fd, mode, offset, len), Err(errno))?;
                same("ftruncate", ftruncate(&*fd, 1 << 63), Err(Errno::EINVAL))?;
            }
            Operation::Truncate(size) => {
                same("ftruncate", ftruncate(&*fd, size), model.truncate(size))?;
            }
            Operation::Seal(seals) => {
                let result = add_seals(&*fd, seals);
                same("F_ADD_SEALS", result, model.add_seals(seals, self.held.is_some()))?;
                same("F_GET_SEALS", get_seals(&*fd)?, model.seals())?;
            }
            Operation::Seek { from, data } => {
                let whence = if data { libc::SEEK_DATA } else { libc::SEEK_HOLE };
                same("lseek", lseek(&*fd, from, whence), model.seek(from, data))?;
            }
            Operation::Splice { at, len, write: true } => {
                let bytes = content(mark, len);
                writer.write_all(&bytes)?;
                let done = splice(&*reader, None, &*fd, Some(at), len);
                same("splice to the file", done, model.write(at, &bytes))?;
                let rest = bytes.len() - done.unwrap_or(0) as usize;
                reader.read_exact(&mut vec![0; rest])?;
            }
            Operation::Splice { at, len, write: false } => {
                let done = splice(&*fd, Some(at), &*writer, None, len);
                Self::expect_in_pipe(reader, done, &model.read(at, len))?;
            }
            Operation::Send { at, len, write: true } => {
                let (other, bytes) = &self.other;
                lseek(&*fd, at, libc::SEEK_SET)?;
                let done = sendfile(&*fd, other, 0, len);
                same("sendfile to the file", done, model.write(at, &bytes[..len as usize]))?;
            }
            Operation::Send { at, len, write: false } => {
                let done = sendfile(&*writer, &*fd, at, len);
                Self::expect_in_pipe(reader, done, &model.read(at, len))?;
            }
            Operation::Copy { from, to, len } => {
                let done = copy_file_range(&*fd, from, &*fd, to, len);
                same("copy_file_range", done, model.copy(from, to, len))?;
            }
        }
        same("size", file_size(&self.fd)?, self.model.size())?;
        same("memory", allocated(&self.fd)?, self.model.allocated())
    }

    /// That many bytes went into the pipe; check their content.
    fn expect_in_pipe(reader: &mut std::fs::File, done: SysResult, wanted: &[u8]) -> Result<()> {
        same("bytes that went into the pipe", done, Ok(wanted.len() as i64))?;
        let mut bytes = vec![0; wanted.len()];
        reader.read_exact(&mut bytes)?;
        same_bytes("what went through the pipe", &bytes, wanted)
    }

    /// Load a word, or store one, through a mapping.
    fn touch(
        &mut self,
        at: u64,
        store: Option<u64>,
        shared: bool,
        held: bool,
        by_kernel: bool,
    ) -> Result<()> {
        let Shmem { fd, model, pipe, .. } = self;
        let (index, offset) = (at / PAGE, (at % PAGE) as usize);
        let fresh;
        let (view, at) = match &self.held {
            Some(view) if held && shared => (view, at),
            _ => {
                let write = if store.is_some() { libc::PROT_WRITE } else { 0 };
                let flags = if shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
                let part = Some((fd.as_fd(), index * PAGE));
                let mapped = Mapping::map(PAGE, libc::PROT_READ | write, flags, part);
                let refused = mapped.as_ref().err().copied();
                same("mmap", refused, model.map(shared, store.is_some()).err())?;
                let Ok(view) = mapped else {
                    return Ok(());
                };
                fresh = view;
                (&fresh, offset as u64)
            }
        };
        let bytes = offset..offset + 8;
        let wanted = model.fault(index).map(|page| page[bytes.clone()].to_vec());
        // A SIGBUS would end the program; the kernel gets EFAULT instead.
        let by_kernel = by_kernel || wanted.is_err();
        match store {
            None if by_kernel => same("load", load_by_kernel(view, at, pipe)?, wanted),
            None => same("load", Ok(view.load(at).to_ne_bytes().to_vec()), wanted),
            Some(value) => {
                if by_kernel {
                    let done = store_by_kernel(view, at, value, pipe)?;
                    same("store", done, wanted.map(drop))?;
                } else {
                    view.store(at, value);
                }
                if let (true, Ok(page)) = (shared, model.fault(index)) {
                    page[bytes].copy_from_slice(&value.to_ne_bytes());
                }
                Ok(())
            }
        }
    }

    /// All content, and every hole.
    fn compare(&self) -> Result<()> {
        let size = self.model.size();
        let mut bytes = vec![0; size as usize + 1];
        let got = pread(&self.fd, &mut bytes, 0).context("pread")?;
        same_bytes("all content", &bytes[..got as usize], &self.model.read(0, size))?;
        let mut at = 0;
        for data in [true, false].into_iter().cycle() {
            let whence = if data { libc::SEEK_DATA } else { libc::SEEK_HOLE };
            let next = lseek(&self.fd, at, whence);
            same(&format!("seek from {at:#x}"), next, self.model.seek(at, data))?;
            match next {
                Ok(next) => at = next,
                Err(_) => break,
            }
        }
        Ok(())
    }
}

/// The kernel loads a word of a mapping, on its way into a pipe.
fn load_by_kernel(view: &Mapping, at: u64, pipe: &mut Pipe) -> Result<SysResult<Vec<u8>>> {
    let addr = (view.addr() + at) as *const libc::c_void;
    // SAFETY: The kernel reads our mapping, or fails.
    let done = check(unsafe { libc::write(pipe.1.as_raw_fd(), addr, 8) } as i64);
    let mut word = vec![0; 8];
    if done.is_ok() {
        pipe.0.read_exact(&mut word)?;
    }
    Ok(done.map(|_| word))
}

/// The kernel stores a word from a pipe to a mapping.
fn store_by_kernel(view: &Mapping, at: u64, value: u64, pipe: &mut Pipe) -> Result<SysResult<()>> {
    pipe.1.write_all(&value.to_ne_bytes())?;
    let addr = (view.addr() + at) as *mut libc::c_void;
    // SAFETY: The kernel writes to our mapping, or fails.
    let done = check(unsafe { libc::read(pipe.0.as_raw_fd(), addr, 8) } as i64);
    if done.is_err() {
        pipe.0.read_exact(&mut [0; 8])?;
    }
    Ok(done.map(drop))
}

/// `splice(2)`; an offset where it is no pipe.
fn splice(
    from: impl AsFd,
    at: Option<u64>,
    to: impl AsFd,
    to_at: Option<u64>,
    len: u64,
) -> SysResult {
    let (mut at, mut to_at) = (at.map(|at| at as i64), to_at.map(|at| at as i64));
    let pointer =
        |at: &mut Option<i64>| at.as_mut().map_or(std::ptr::null_mut(), |at| at as *mut _);
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    // SAFETY: Both offsets outlive the call.
    let ret =
        unsafe { libc::splice(from, pointer(&mut at), to, pointer(&mut to_at), len as usize, 0) };
    check(ret as i64)
}

/// Random operations on `files` files that `make` makes, sized 0.
fn run(files: u64, make: impl Fn() -> Result<(OwnedFd, u32)>, seal: u32) -> CaseResult {
    let mut dice = Dice(Rng::new(seed()));
    let mut number = 0;
    for _ in 0..files {
        let (fd, seals) = make()?;
        let size = dice.offset(0);
        ftruncate(&fd, size)?;
        let mut shmem = Shmem::new(fd, File::new(size, seals), dice.coin(), number)?;
        let sealed_at = dice.0.below(OPERATIONS / 4);
        let mut log = Log::default();
        for n in 0..OPERATIONS {
            let operation = match n {
                _ if n == sealed_at && seal != 0 => Operation::Seal(seal),
                _ => dice.operation(shmem.model.size()),
            };
            log.add(&operation);
            let result = shmem.apply(operation).and_then(|()| match n % 32 {
                31 => shmem.compare(),
                _ => Ok(()),
            });
            let told = || format!("operation {}, the last were:{}", shmem.number, log.text());
            result.with_context(told)?;
        }
        shmem.compare()?;
        number = shmem.number;
    }
    println!("{number} operations on {files} files");
    Ok(())
}

fn sealable_memfd() -> Result<(OwnedFd, u32)> {
    Ok((memfd_create(MFD_CLOEXEC | MFD_ALLOW_SEALING).context("memfd_create")?, 0))
}

fn ordinary_memfd_is_as_ever() -> CaseResult {
    let _pages = base_pages()?;
    run(16, sealable_memfd, 0)
}

fn tmpfs_file_is_as_ever() -> CaseResult {
    run(8, || Ok((tmpfs_file(0)?, F_SEAL_SEAL)), 0)
}

/// The seal comes at a random time in the life of a file, with any mappings and allocated pages.
fn sealed_memfd_gets_memory_by_fallocate_only() -> CaseResult {
    let _pages = base_pages()?;
    seal(&sealable_memfd()?.0)?;
    run(16, sealable_memfd, F_SEAL_AUTO_ALLOCATE)
}

/// The operations on a memfile, and of its guest.
#[derive(Clone, Copy, Debug)]
enum Step {
    Truncate(u64),
    Fallocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
    Refused(usize),
    Seek {
        from: u64,
        data: bool,
    },
    Read {
        at: u64,
        len: u64,
    },
    /// The rest needs a guest. It touches the first word of these pages of the slot.
    Load(u64),
    Store(u64),
    PreFault {
        page: u64,
        count: u64,
    },
    Convert {
        page: u64,
        count: u64,
        by: ConvertBy,
    },
    Rebind,
}

/// Bytes of a guest's slot, and where it lies in the file and in guest memory.
const SLOT_SIZE: u64 = 40 * PAGE;
const SLOT_OFFSET: u64 = 4 * PAGE;
const SLOT_GPA: u64 = LAYOUTS[0].gpa + 3 * PAGE;

/// A memfile, its model, and perhaps a guest.
struct Memfile {
    fd: OwnedFd,
    model: File,
    guest: Option<(Vm, Vcpu, Slot)>,
    number: u64,
}

impl Memfile {
    fn new() -> Result<Memfile> {
        Ok(Memfile { fd: memfile_unsized()?, model: File::default(), guest: None, number: 0 })
    }

    /// With a guest that uses a part of it.
    fn with_guest() -> Result<Memfile> {
        let mut memfile = Memfile::new()?;
        ftruncate(&memfile.fd, END)?;
        memfile.model = File::new(END, 0);
        let vm = Vm::protected()?;
        vm.set_private(SLOT_GPA, SLOT_SIZE)?;
        let slot = Self::bind(&vm, &memfile.fd)?;
        let vcpu = vm.vcpu(0)?;
        memfile.guest = Some((vm, vcpu, slot));
        Ok(memfile)
    }

    fn bind(vm: &Vm, fd: &OwnedFd) -> Result<Slot> {
        vm.add_private(SLOT, SLOT_GPA, SLOT_SIZE, Private::Memfile, fd, SLOT_OFFSET)
    }

    /// A random operation.
    fn step(&self, dice: &mut Dice) -> Step {
        let size = self.model.size();
        let (offset, len) = dice.range(size);
        let aligned = (offset & !(PAGE - 1), len.next_multiple_of(PAGE));
        let page = dice.0.below(SLOT_SIZE / PAGE);
        let count = 1 + dice.0.below(SLOT_SIZE / PAGE - page);
        match dice.0.below(if self.guest.is_some() { 30 } else { 12 }) {
            0 => Step::Truncate(offset),
            1 => Step::Truncate(aligned.0),
            2 => Step::Fallocate { mode: PUNCH, offset, len },
            3..6 => Step::Fallocate { mode: PUNCH, offset: aligned.0, len: aligned.1 },
            6..9 => Step::Fallocate { mode: [0, KEEP][dice.coin() as usize], offset, len },
            9 => Step::Refused(dice.0.below(REFUSED.len() as u64) as usize),
            10 => Step::Seek { from: offset, data: dice.coin() },
            11 => Step::Read { at: offset, len },
            12..18 => Step::Load(page),
            18..25 => Step::Store(page),
            25 | 26 => Step::PreFault { page, count },
            27 | 28 => Step::Convert {
                page,
                count,
                by: [ConvertBy::Attributes, ConvertBy::Region][dice.coin() as usize],
            },
            _ => Step::Rebind,
        }
    }

    /// The result of a fallocate by rule 2.
    fn model_fallocate(&mut self, mode: i32, offset: u64, len: u64) -> SysResult<()> {
        let bad = match mode {
            PUNCH => offset % PAGE != 0 || len % PAGE != 0,
            _ => offset + len > self.model.size(),
        };
        if bad { Err(Errno::EINVAL) } else { self.model.fallocate(mode, offset, len) }
    }

    /// The result of a change of size by rule 2.
    fn model_truncate(&mut self, size: u64) -> SysResult<()> {
        match self.model.size() {
            0 if size % PAGE == 0 => self.model.truncate(size),
            0 => Err(Errno::EINVAL),
            _ => Err(Errno::EPERM),
        }
    }

    /// The page of the file that is the guest's page, which it has touched.
    fn guest_page(&mut self, page: u64) -> Result<&mut [u8; PAGE as usize]> {
        self.model.fault(SLOT_OFFSET / PAGE + page).context("the model has no such page")
    }

    /// Do one operation on both.
    fn apply(&mut self, step: Step) -> Result<()> {
        self.number += 1;
        let mark = mix(self.number);
        let word = |bytes: &[u8; PAGE as usize]| u64::from_ne_bytes(bytes[..8].try_into().unwrap());
        match (step, self.guest.as_mut()) {
            (Step::Truncate(size), _) => {
                same("ftruncate", ftruncate(&self.fd, size), self.model_truncate(size))?;
            }
            (Step::Fallocate { mode, offset, len }, _) => {
                let result = fallocate(&self.fd, mode, offset, len);
                same("fallocate", result, self.model_fallocate(mode, offset, len))?;
            }
            (Step::Refused(which), _) => {
                let (mode, offset, len, errno) = REFUSED[which];
                same("fallocate", fallocate(&self.fd, mode, offset, len), Err(errno))?;
            }
            (Step::Seek { from, data }, _) => {
                let whence = if data { libc::SEEK_DATA } else { libc::SEEK_HOLE };
                same("lseek", lseek(&self.fd, from, whence), self.model.seek(from, data))?;
            }
            (Step::Read { at, len }, _) => {
                let mut bytes = vec![0; len as usize];
                same("pread", pread(&self.fd, &mut bytes, at), Err(Errno::EPERM))?;
                same("pwrite", pwrite(&self.fd, &bytes, at), Err(Errno::EPERM))?;
                let part = Some((self.fd.as_fd(), 0));
                let mapped = Mapping::map(PAGE, libc::PROT_READ, libc::MAP_SHARED, part);
                same("mmap", mapped.err(), Some(Errno::EPERM))?;
            }
            (Step::Load(page), Some((_, vcpu, _))) => {
                let got = vcpu.load(SLOT_GPA + page * PAGE)?;
                same("load", got, word(self.guest_page(page)?))?;
            }
            (Step::Store(page), Some((_, vcpu, _))) => {
                vcpu.store(SLOT_GPA + page * PAGE, mark)?;
                self.guest_page(page)?[..8].copy_from_slice(&mark.to_ne_bytes());
            }
            (Step::PreFault { page, count }, Some((_, vcpu, _))) => {
                vcpu.raw_pre_fault(SLOT_GPA + page * PAGE, count * PAGE).0.context("pre-fault")?;
                for page in page..page + count {
                    self.guest_page(page)?;
                }
            }
            (Step::Convert { page, count, by }, Some((vm, vcpu, slot))) => {
                let (gpa, len) = (SLOT_GPA + page * PAGE, count * PAGE);
                vm.convert(by, gpa, len, false)?;
                same("shared load", vcpu.load(gpa)?, slot.view.load(page * PAGE))?;
                vm.convert(by, gpa, len, true)?;
            }
            (Step::Rebind, Some((vm, _, slot))) => {
                vm.raw_delete(SLOT)?;
                *slot = Self::bind(vm, &self.fd)?;
            }
            (_, None) => unreachable!("there is no guest"),
        }
        same("size", file_size(&self.fd)?, self.model.size())?;
        same("memory", allocated(&self.fd)?, self.model.allocated())?;
        let pages = mem::fdinfo(&self.fd, "memfile-pages")?.context("no memfile-pages")?;
        same("memfile-pages", pages, (self.model.allocated() / PAGE).to_string())
    }

    /// Do `count` operations.
    fn run(&mut self, dice: &mut Dice, count: u64) -> CaseResult {
        let mut log = Log::default();
        for _ in 0..count {
            let step = self.step(dice);
            log.add(&step);
            let result = self.apply(step);
            let told = || format!("step {}, the last were:{}", self.number, log.text());
            result.with_context(told)?;
        }
        Ok(())
    }
}

fn memfile_has_the_pages_it_was_told_to_have() -> CaseResult {
    let _pages = base_pages()?;
    let mut dice = Dice(Rng::new(seed()));
    for _ in 0..8 {
        Memfile::new()?.run(&mut dice, OPERATIONS)?;
    }
    Ok(())
}

fn memfile_of_a_guest_has_what_both_made_of_it() -> CaseResult {
    let _pages = base_pages()?;
    let mut dice = Dice(Rng::new(seed()));
    for _ in 0..4 {
        let mut memfile = Memfile::with_guest()?;
        memfile.run(&mut dice, 2 * OPERATIONS)?;
        // All pages of the guest, once more.
        for page in 0..SLOT_SIZE / PAGE {
            memfile.apply(Step::Load(page)).with_context(|| format!("page {page} in the end"))?;
        }
    }
    Ok(())
}
