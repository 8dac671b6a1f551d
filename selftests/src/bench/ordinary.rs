// SPDX-License-Identifier: GPL-2.0
//! Ordinary memfds, on shmem and on hugetlbfs: their cost must not depend on memfile.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

use super::measure::{Report, Subject, count};
use crate::pressure::Pool;
use crate::sys::{self, Mapping};
use crate::uapi::{MFD_CLOEXEC, MFD_HUGE_SHIFT, MFD_HUGETLB};
use crate::{HUGE, PAGE};

const SHMEM: [&str; 5] = [
    "shmem: fault a page",
    "shmem: punch, per page",
    "shmem: write a page",
    "shmem: fallocate, per page",
    "shmem: punch a page",
];
const HUGETLB: [&str; 5] = [
    "hugetlbfs: fault a page",
    "hugetlbfs: fallocate of what is there, per page",
    "hugetlbfs: punch, per page",
    "hugetlbfs: fallocate, per page",
    "hugetlbfs: punch a page",
];

/// All operations.
pub fn ordinary(report: &mut Report) -> Result<()> {
    if report.wants(&SHMEM) {
        shmem(&mut report.scratch())?;
        shmem(report)?;
    }
    if report.wants(&HUGETLB) {
        let subject = Subject { name: "hugetlbfs", page: HUGE };
        let result =
            hugetlb(subject, &mut report.scratch()).and_then(|()| hugetlb(subject, report));
        report.unless_missing(&HUGETLB, subject, result)?;
    }
    Ok(())
}

fn shmem(report: &mut Report) -> Result<()> {
    let subject = Subject { name: "shmem", page: PAGE };
    let pages = 8192;
    let size = pages * PAGE;
    let fd = File::from(sys::memfd(size)?);
    let punch = || sys::punch(&fd, 0, size).context("punch");

    let view = Mapping::shared(&fd, 0, size)?;
    let fault = count(|| {
        (0..pages).for_each(|page| view.store(page * PAGE, 1));
        Ok(())
    })?;
    report.add(SHMEM[0], subject, fault, pages);
    drop(view);
    report.add(SHMEM[1], subject, count(punch)?, pages);

    let buffer = [1; PAGE as usize];
    let write = count(|| {
        (0..pages).try_for_each(|page| fd.write_all_at(&buffer, page * PAGE).context("write"))
    })?;
    report.add(SHMEM[2], subject, write, pages);
    punch()?;
    let allocate = count(|| sys::allocate(&fd, 0, size).context("allocate"))?;
    report.add(SHMEM[3], subject, allocate, pages);
    punch()?;
    sys::allocate(&fd, 0, size)?;
    let punches = count(|| {
        (0..pages).try_for_each(|page| sys::punch(&fd, page * PAGE, PAGE).context("punch"))
    })?;
    report.add(SHMEM[4], subject, punches, pages);
    Ok(())
}

fn hugetlb(subject: Subject, report: &mut Report) -> Result<()> {
    let page = subject.page;
    // So many that an interrupt of the timer is a small part of each.
    let (pages, rounds) = (128, 16);
    let size = pages * page;
    let _pool = Pool::of(page)?.fill(pages)?;
    let fd = sys::memfd_create(MFD_CLOEXEC | MFD_HUGETLB | page.ilog2() << MFD_HUGE_SHIFT)
        .context("a memfd on hugetlbfs")?;
    sys::ftruncate(&fd, size).context("ftruncate")?;

    let view = Mapping::shared(&fd, 0, size)?;
    let fault = count(|| {
        (0..pages).for_each(|n| view.store(n * page, 1));
        Ok(())
    })?;
    report.add(HUGETLB[0], subject, fault, pages);
    let there =
        count(|| (0..rounds).try_for_each(|_| sys::allocate(&fd, 0, size).context("allocate")))?;
    report.add(HUGETLB[1], subject, there, rounds * pages);
    drop(view);
    let punch = count(|| sys::punch(&fd, 0, size).context("punch"))?;
    report.add(HUGETLB[2], subject, punch, pages);
    let allocate = count(|| sys::allocate(&fd, 0, size).context("allocate"))?;
    report.add(HUGETLB[3], subject, allocate, pages);
    let punches =
        count(|| (0..pages).try_for_each(|n| sys::punch(&fd, n * page, page).context("punch")))?;
    report.add(HUGETLB[4], subject, punches, pages);
    Ok(())
}
