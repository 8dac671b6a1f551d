// SPDX-License-Identifier: GPL-2.0
//! A GiB of private memory, by the size of its pages, and one small page of a large one.

use std::os::fd::OwnedFd;

use anyhow::{Context, Result};

use super::machine::{Bench, GPA};
use super::measure::{Report, Subject, undisturbed};
use crate::pressure::{Pool, Setting, shmem_huge};
use crate::skip::{missing_memfile, skip};
use crate::sys::{self, Errno};
use crate::uapi::{MFD_CLOEXEC, MFD_HUGE_SHIFT, MFD_HUGETLB};
use crate::vm::{Private, Vm};
use crate::{GIB, HUGE, MIB, PAGE};

const POPULATE: &str = "populate 1 GiB";
const PUNCH: &str = "punch 1 GiB";
const TOUCH: &str = "first touch of all of 1 GiB";
const CONVERT: &str = "convert 1 GiB there and back, discarding";
const END: &str = "end a VM of 1 GiB";
const ONE: &str = "punch 4K of a page and touch it again";
/// All figures.
const NAMES: [&str; 6] = [POPULATE, PUNCH, TOUCH, CONVERT, END, ONE];

/// Those that ordinary memory has as well: all but the conversion.
const SHARED: [&str; 5] = [POPULATE, PUNCH, TOUCH, END, ONE];

/// Where the pages come from.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Store {
    GuestMemfd,
    Shmem,
    ShmemHuge,
    HugeTlb,
    /// Ordinary memory of an ordinary VM, in a file of the same store.
    Memfd,
    MemfdHuge,
    MemfdHugeTlb,
}

impl Store {
    fn is_private(self) -> bool {
        !matches!(self, Store::Memfd | Store::MemfdHuge | Store::MemfdHugeTlb)
    }
}

/// The subjects. scripts/memfile/bench/counts.py knows what is compared with what.
const STORES: [(Store, Subject); 9] = [
    (Store::GuestMemfd, Subject { name: "guest_memfd", page: PAGE }),
    (Store::Shmem, Subject { name: "memfile", page: PAGE }),
    (Store::ShmemHuge, Subject { name: "memfile, 2M (THP)", page: HUGE }),
    (Store::HugeTlb, Subject { name: "memfile on hugetlbfs, 2M", page: HUGE }),
    (Store::HugeTlb, Subject { name: "memfile on hugetlbfs, 1G", page: GIB }),
    (Store::Memfd, Subject { name: "memfd of a VM", page: PAGE }),
    (Store::MemfdHuge, Subject { name: "memfd of a VM, 2M (THP)", page: HUGE }),
    (Store::MemfdHugeTlb, Subject { name: "memfd of a VM, hugetlbfs, 2M", page: HUGE }),
    (Store::MemfdHugeTlb, Subject { name: "memfd of a VM, hugetlbfs, 1G", page: GIB }),
];

/// All operations on all of them.
pub fn stores(report: &mut Report) -> Result<()> {
    for (store, subject) in STORES {
        let result = measure(store, subject, report);
        let names: &[&str] = if store.is_private() { &NAMES } else { &SHARED };
        report.unless_missing(names, subject, result)?;
    }
    Ok(())
}

fn measure(store: Store, subject: Subject, report: &mut Report) -> Result<()> {
    let _huge = match store {
        Store::ShmemHuge | Store::MemfdHuge => Some(shmem_huge("always")?),
        _ => None,
    };
    let _pool = match store {
        Store::HugeTlb | Store::MemfdHugeTlb => pool(subject.page)?,
        _ => None,
    };
    one(store, subject, &mut report.scratch())?;
    one(store, subject, report)?;
    all(store, subject, report)
}

/// A GiB in pages of this size. The machine has only the gigantic pages that were reserved at boot.
fn pool(page: u64) -> Result<Option<Setting>> {
    // Whether the kernel has such files comes first: it is the shorter answer.
    drop(huge_file(page, page)?);
    let pool = Pool::of(page)?;
    if page < GIB {
        return pool.fill(GIB / page).map(Some);
    }
    match pool.usage()?.free {
        0 => skip("no page of 1 GiB was reserved at boot"),
        _ => Ok(None),
    }
}

fn huge_file(page: u64, size: u64) -> Result<OwnedFd> {
    drop(sys::memfile_unsized()?);
    match sys::memfd_create(sys::memfile_huge_flags(page)) {
        Ok(fd) => {
            sys::ftruncate(&fd, size).context("set the size of a memfile")?;
            Ok(fd)
        }
        Err(Errno::EOPNOTSUPP) => missing_memfile("the kernel has no memfiles on hugetlbfs"),
        Err(errno) => skip(format!("no memfile on hugetlbfs of {} KiB: {errno}", page >> 10)),
    }
}

fn bench(store: Store, page: u64, size: u64) -> Result<Bench> {
    let vm = Vm::protected()?;
    let (kind, fd) = match store {
        Store::GuestMemfd => (Private::GuestMemfd, vm.guest_memfd(size)?),
        Store::Shmem | Store::ShmemHuge => (Private::Memfile, sys::memfile(size)?),
        Store::HugeTlb => (Private::Memfile, huge_file(page, size)?),
        Store::Memfd | Store::MemfdHuge => {
            return Bench::ordinary(sys::memfd(size)?, page, size);
        }
        Store::MemfdHugeTlb => {
            let flags = MFD_CLOEXEC | MFD_HUGETLB | page.ilog2() << MFD_HUGE_SHIFT;
            let fd = sys::memfd_create(flags).context("a memfd on hugetlbfs")?;
            sys::ftruncate(&fd, size).context("ftruncate")?;
            return Bench::ordinary(fd, page, size);
        }
    };
    Bench::on(vm, kind, fd, page, size, 1)
}

/// Operations on a GiB. Each begins with memory that the guest can reach, or with none.
fn all(store: Store, subject: Subject, report: &mut Report) -> Result<()> {
    if !report.wants(&NAMES[..5]) {
        return Ok(());
    }
    let mut b = bench(store, subject.page, GIB)?;
    report.add(POPULATE, subject, b.count(|b| b.populate())?, 1);
    report.add(PUNCH, subject, b.count(|b| b.punch(0, GIB))?, 1);

    let first = b.count(|b| b.touch(0, GIB, subject.page))?;
    let again = b.count(|b| b.touch(0, GIB, subject.page))?;
    report.add(TOUCH, subject, first - &again, 1);

    if !store.is_private() {
        b.prepare(|b| b.populate())?;
        report.add(END, subject, b.count_end()?, 1);
        return Ok(());
    }
    // As a VMM does it: it frees the pages that a conversion made useless. The other side is empty.
    let mut convert = b.count(|b| {
        b.vm.set_shared(GPA, GIB)?;
        b.punch(0, GIB)
    })?;
    convert += b.count(|b| {
        b.vm.set_private(GPA, GIB)?;
        b.discard_shared(0, GIB)
    })?;
    report.add(CONVERT, subject, convert, 1);

    b.prepare(|b| b.populate())?;
    report.add(END, subject, b.count_end()?, 1);
    Ok(())
}

/// A hole of one small page, and the guest's next access to it.
fn one(store: Store, subject: Subject, report: &mut Report) -> Result<()> {
    if !report.wants(&[ONE]) {
        return Ok(());
    }
    let size = subject.page.max(64 * MIB);
    let mut b = bench(store, subject.page, size)?;
    b.prepare(|b| b.populate())?;
    let (total, times) = undisturbed(32, |n| {
        // In another huge page each time.
        let offset = n * HUGE + 7 * PAGE;
        let mut cost = b.count(|b| b.punch(offset, PAGE))?;
        cost += b.count(|b| b.touch(offset, PAGE, PAGE))?;
        Ok(cost)
    })?;
    report.add(ONE, subject, total, times);
    Ok(())
}
