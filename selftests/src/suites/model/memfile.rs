// SPDX-License-Identifier: GPL-2.0
//! Memfiles, with a guest and without.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};

use super::dice::{Dice, END, KEEP, LONGEST, Log, OPERATIONS, PUNCH, REFUSED, same};
use super::file::File;
use crate::ktap::CaseResult;
use crate::pattern::mix;
use crate::pressure::base_pages;
use crate::support::backend::{Backend, MEMFILE};
use crate::support::setup::{LAYOUTS, SLOT};
use crate::sys::*;
use crate::vm::{ConvertBy, Slot, Vcpu, Vm};
use crate::{GIB, PAGE, mem};

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

/// The pages of memfiles, and the part of them that a guest has.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub on: &'static Backend,
    /// Bytes of a file.
    pub end: u64,
    /// Bytes of the slot, and where it lies in the file and in guest memory.
    pub size: u64,
    pub offset: u64,
    pub gpa: u64,
}

const SMALL: Shape = Shape {
    on: &MEMFILE,
    end: END,
    size: 40 * PAGE,
    offset: 4 * PAGE,
    gpa: LAYOUTS[0].gpa + 3 * PAGE,
};

impl Shape {
    /// Small pages in a page of the file.
    fn unit(&self) -> u64 {
        self.on.page / PAGE
    }

    fn dice(&self) -> Dice {
        Dice::for_pages(self.end, self.unit())
    }
}

/// A memfile, its model, and perhaps a guest.
struct Memfile {
    shape: Shape,
    fd: OwnedFd,
    model: File,
    guest: Option<(Vm, Vcpu, Slot)>,
    number: u64,
}

impl Memfile {
    fn new(shape: Shape) -> Result<Memfile> {
        let (fd, model) = (shape.on.new_file()?, File::of_pages(shape.unit(), 0));
        Ok(Memfile { shape, fd, model, guest: None, number: 0 })
    }

    /// With a guest that uses a part of it.
    fn with_guest(shape: Shape) -> Result<Memfile> {
        let mut memfile = Memfile::new(shape)?;
        ftruncate(&memfile.fd, shape.end)?;
        memfile.model = File::of_pages(shape.unit(), shape.end);
        let vm = shape.on.vm()?;
        let slot = Self::bind(&vm, &shape, &memfile.fd)?;
        let vcpu = vm.vcpu(0)?;
        memfile.guest = Some((vm, vcpu, slot));
        Ok(memfile)
    }

    fn bind(vm: &Vm, shape: &Shape, fd: &OwnedFd) -> Result<Slot> {
        shape.on.add_slot(vm, SLOT, (shape.gpa, shape.offset), shape.size, fd)
    }

    /// A random operation.
    fn step(&self, dice: &mut Dice) -> Step {
        let size = self.model.size();
        let (offset, len) = dice.range(size);
        let aligned = (offset & !(PAGE - 1), len.next_multiple_of(PAGE));
        let pages = self.shape.size / PAGE;
        let page = dice.page(pages);
        let count = 1 + dice.below(pages - page);
        match dice.below(if self.guest.is_some() { 30 } else { 12 }) {
            0 => Step::Truncate(offset),
            1 if dice.coin() => Step::Truncate(offset - offset % self.shape.on.page),
            1 => Step::Truncate(offset.next_multiple_of(self.shape.on.page)),
            2 => Step::Fallocate { mode: PUNCH, offset, len },
            3..6 => Step::Fallocate { mode: PUNCH, offset: aligned.0, len: aligned.1 },
            6..9 => Step::Fallocate { mode: [0, KEEP][dice.coin() as usize], offset, len },
            9 => Step::Refused(dice.below(REFUSED.len() as u64) as usize),
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
            0 if size % self.shape.on.page == 0 => self.model.truncate(size),
            0 => Err(Errno::EINVAL),
            _ => Err(Errno::EPERM),
        }
    }

    /// The page of the file that is the guest's page, which it has touched.
    fn guest_page(&mut self, page: u64) -> Result<&mut [u8; PAGE as usize]> {
        self.model.fault(self.shape.offset / PAGE + page).context("the model has no such page")
    }

    /// The pages of the guest: of so many as are in a page of 1 GiB those that have been used, and
    /// the next one of each.
    fn guest_pages(&self) -> BTreeSet<u64> {
        let pages = self.shape.size / PAGE;
        if self.shape.on.page < GIB {
            return (0..pages).collect();
        }
        let first = self.shape.offset / PAGE;
        let used = self.model.used_pages().filter_map(|index| index.checked_sub(first));
        used.flat_map(|page| [page, page + 1]).filter(|page| *page < pages).collect()
    }

    /// Do one operation on both.
    fn apply(&mut self, step: Step) -> Result<()> {
        self.number += 1;
        let mark = mix(self.number);
        let base = self.shape.gpa;
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
                let mut bytes = vec![0; len.min(LONGEST) as usize];
                same("pread", pread(&self.fd, &mut bytes, at), Err(Errno::EPERM))?;
                same("pwrite", pwrite(&self.fd, &bytes, at), Err(Errno::EPERM))?;
                let part = Some((self.fd.as_fd(), 0));
                let mapped =
                    Mapping::map(self.shape.on.page, libc::PROT_READ, libc::MAP_SHARED, part);
                same("mmap", mapped.err(), Some(Errno::EPERM))?;
            }
            (Step::Load(page), Some((_, vcpu, _))) => {
                let got = vcpu.load(base + page * PAGE)?;
                same("load", got, word(self.guest_page(page)?))?;
            }
            (Step::Store(page), Some((_, vcpu, _))) => {
                vcpu.store(base + page * PAGE, mark)?;
                self.guest_page(page)?[..8].copy_from_slice(&mark.to_ne_bytes());
            }
            (Step::PreFault { page, count }, Some((_, vcpu, _))) => {
                vcpu.raw_pre_fault(base + page * PAGE, count * PAGE).0.context("pre-fault")?;
                self.model.populate(self.shape.offset / PAGE + page, count);
            }
            (Step::Convert { page, count, by }, Some((vm, vcpu, slot))) => {
                let (gpa, len) = (base + page * PAGE, count * PAGE);
                vm.convert(by, gpa, len, false)?;
                same("shared load", vcpu.load(gpa)?, slot.view.load(page * PAGE))?;
                vm.convert(by, gpa, len, true)?;
            }
            (Step::Rebind, Some((vm, _, slot))) => {
                vm.raw_delete(SLOT)?;
                *slot = Self::bind(vm, &self.shape, &self.fd)?;
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

/// Operations on files without a guest.
pub fn run(shape: Shape, files: u64) -> CaseResult {
    let mut dice = shape.dice();
    for _ in 0..files {
        Memfile::new(shape)?.run(&mut dice, OPERATIONS)?;
    }
    Ok(())
}

/// The same, and those of a guest.
pub fn run_with_guest(shape: Shape, files: u64) -> CaseResult {
    let mut dice = shape.dice();
    for _ in 0..files {
        let mut memfile = Memfile::with_guest(shape)?;
        memfile.run(&mut dice, 2 * OPERATIONS)?;
        for page in memfile.guest_pages() {
            memfile.apply(Step::Load(page)).with_context(|| format!("page {page} in the end"))?;
        }
    }
    Ok(())
}

pub fn memfile_has_the_pages_it_was_told_to_have() -> CaseResult {
    let _pages = base_pages()?;
    run(SMALL, 8)
}

pub fn memfile_of_a_guest_has_what_both_made_of_it() -> CaseResult {
    let _pages = base_pages()?;
    run_with_guest(SMALL, 4)
}
