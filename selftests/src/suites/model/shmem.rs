// SPDX-License-Identifier: GPL-2.0
//! Files of shmem: the calls of programs on them, one by one.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result};

use super::dice::{Dice, END, LONGEST, Log, OPERATIONS, REFUSED, same, same_bytes};
use super::file::File;
use super::operation::Operation;
use crate::PAGE;
use crate::ktap::CaseResult;
use crate::pattern::mix;
use crate::pressure::base_pages;
use crate::sys::*;
use crate::uapi::*;

/// Bytes that depend on the operation that wrote them.
fn content(number: u64, len: u64) -> Vec<u8> {
    (0..len).map(|n| mix(number + n / 8).to_le_bytes()[(n % 8) as usize] | 1).collect()
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
    let mut dice = Dice::new(END);
    let mut number = 0;
    for _ in 0..files {
        let (fd, seals) = make()?;
        let size = dice.offset(0);
        ftruncate(&fd, size)?;
        let mut shmem = Shmem::new(fd, File::new(size, seals), dice.coin(), number)?;
        let sealed_at = dice.below(OPERATIONS / 4);
        let mut log = Log::default();
        for n in 0..OPERATIONS {
            let operation = match n {
                _ if n == sealed_at && seal != 0 => Operation::Seal(seal),
                _ => Operation::random(&mut dice, shmem.model.size()),
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

pub fn ordinary_memfd_is_as_ever() -> CaseResult {
    let _pages = base_pages()?;
    run(16, sealable_memfd, 0)
}

pub fn tmpfs_file_is_as_ever() -> CaseResult {
    run(8, || Ok((tmpfs_file(0)?, F_SEAL_SEAL)), 0)
}

/// The seal comes at a random time in the life of a file, with any mappings and allocated pages.
pub fn sealed_memfd_gets_memory_by_fallocate_only() -> CaseResult {
    let _pages = base_pages()?;
    seal(&sealable_memfd()?.0)?;
    run(16, sealable_memfd, F_SEAL_AUTO_ALLOCATE)
}
