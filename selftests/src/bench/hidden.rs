// SPDX-License-Identifier: GPL-2.0
//! Memory that is out of the kernel's direct map, against the same memory that is there, and against
//! memfd_secret, as far as that does the same.

use anyhow::{Context, Result};

use super::machine::Bench;
use super::measure::{Report, Subject, count};
use crate::pressure::Pool;
use crate::skip::missing_memfile;
use crate::sys::{self, Mapping};
use crate::uapi::{KVM_CAP_MEMFILE, MEMFILE_F_ALL, MEMFILE_F_KERNEL_INACCESSIBLE};
use crate::vm::{Private, Vm};
use crate::{HUGE, MIB, PAGE};

const TOUCH: &str = "first touch of 64 MiB, per 4K";
const POPULATE: &str = "pre-fault of 64 MiB, per 4K";
const ALLOCATE: &str = "fallocate of 64 MiB, per 4K";
const PUNCH: &str = "punch 64 MiB, per 4K";
const END: &str = "end of 64 MiB, per 4K";
const NAMES: [&str; 5] = [TOUCH, POPULATE, ALLOCATE, PUNCH, END];

const SIZE: u64 = 64 * MIB;
const PAGES: u64 = SIZE / PAGE;

/// The subjects, and whether they are out of the direct map. scripts/memfile/bench/counts.py knows the names.
const MEMFILES: [(Subject, bool); 4] = [
    (Subject { name: "memfile", page: PAGE }, false),
    (Subject { name: "memfile, hidden", page: PAGE }, true),
    (Subject { name: "memfile on hugetlbfs, 2M", page: HUGE }, false),
    (Subject { name: "memfile on hugetlbfs, 2M, hidden", page: HUGE }, true),
];
const SECRET: Subject = Subject { name: "memfd_secret", page: PAGE };

/// All operations on all of them.
pub fn hidden(report: &mut Report) -> Result<()> {
    for (subject, hide) in MEMFILES {
        // The first life splits the direct map.
        let result = memfile(subject, hide, &mut report.scratch())
            .and_then(|()| memfile(subject, hide, report));
        report.unless_missing(&NAMES, subject, result)?;
    }
    let result = secret(&mut report.scratch()).and_then(|()| secret(report));
    report.unless_missing(&[TOUCH, END], SECRET, result)
}

fn memfile(subject: Subject, hide: bool, report: &mut Report) -> Result<()> {
    if !report.wants(&NAMES) {
        return Ok(());
    }
    drop(sys::memfile_unsized()?);
    let _pool = (subject.page == HUGE).then(|| Pool::of(HUGE)?.fill(SIZE / HUGE)).transpose()?;
    let vm = Vm::protected()?;
    if hide {
        let flags = MEMFILE_F_ALL | MEMFILE_F_KERNEL_INACCESSIBLE;
        if vm.raw_enable_cap(KVM_CAP_MEMFILE, flags).is_err() {
            return missing_memfile("KVM cannot keep memory out of the direct map");
        }
    }
    let fd =
        if subject.page == HUGE { sys::memfile_huge(HUGE, SIZE)? } else { sys::memfile(SIZE)? };
    let mut b = Bench::on(vm, Private::Memfile, fd, subject.page, SIZE, 1)?;
    let first = b.count(|b| b.touch(0, SIZE, PAGE))?;
    let again = b.count(|b| b.touch(0, SIZE, PAGE))?;
    report.add(TOUCH, subject, first - &again, PAGES);
    report.add(PUNCH, subject, b.count(|b| b.punch(0, SIZE))?, PAGES);
    report.add(POPULATE, subject, b.count(|b| b.populate())?, PAGES);
    b.prepare(|b| b.punch(0, SIZE))?;
    report.add(ALLOCATE, subject, b.count(|b| b.allocate(0, SIZE))?, PAGES);
    b.prepare(|b| b.populate())?;
    report.add(END, subject, b.count_end()?, PAGES);
    Ok(())
}

/// A process uses it: KVM gives it to no guest. It can neither be faulted in ahead nor have a hole.
fn secret(report: &mut Report) -> Result<()> {
    if !report.wants(&[TOUCH, END]) {
        return Ok(());
    }
    let fd = sys::memfd_secret(SIZE)?;
    let memory = Mapping::shared(&fd, 0, SIZE).context("map memfd_secret")?;
    let touch = || {
        count(|| {
            (0..SIZE).step_by(PAGE as usize).for_each(|offset| memory.store(offset, 1));
            Ok(())
        })
    };
    let first = touch()?;
    let again = touch()?;
    report.add(TOUCH, SECRET, first - &again, PAGES);
    let end = count(|| {
        drop((memory, fd));
        Ok(())
    })?;
    report.add(END, SECRET, end, PAGES);
    Ok(())
}
