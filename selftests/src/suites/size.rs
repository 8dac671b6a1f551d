// SPDX-License-Identifier: GPL-2.0
//! The size of an inaccessible memfd is set once; pages inside of it can be allocated and freed
//! (rule 2).

use std::os::fd::OwnedFd;

use anyhow::{Context, Result, ensure};

use crate::ktap::{CaseResult, Suite};
use crate::pressure::base_pages;
use crate::sys::*;
use crate::{MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "size",
    [
        is_set_once_from_zero,
        must_be_whole_pages,
        refused_size_leaves_the_choice_open,
        cannot_change_by_ftruncate,
        cannot_change_by_o_trunc,
        cannot_change_by_fallocate,
        cannot_change_while_allocated,
        allocation_past_the_end_is_refused,
        allocation_needs_a_size_first,
        allocation_takes_unaligned_ranges_as_pages,
        hole_must_be_whole_pages,
        hole_must_keep_the_size,
        other_fallocate_modes_are_refused,
        read_only_descriptor_cannot_allocate_or_punch,
        huge_size_costs_nothing,
    ]
);

const SIZE: u64 = 8 * PAGE;

fn expect_size(fd: &OwnedFd, wanted: u64) -> Result<()> {
    let got = file_size(fd)?;
    ensure!(got == wanted, "the file has {got} bytes, wanted {wanted}");
    Ok(())
}

fn is_set_once_from_zero() -> CaseResult {
    for size in [PAGE, SIZE, 1 << 30] {
        let fd = memfile(size)?;
        expect_size(&fd, size)?;
        expect_errno("set it again", ftruncate(&fd, 2 * size), &[Errno::EPERM])?;
        expect_size(&fd, size)?;
    }
    Ok(())
}

const UNALIGNED: [u64; 6] = [1, 512, PAGE - 1, PAGE + 1, 2 * PAGE - 1, (1 << 30) + 8];

fn must_be_whole_pages() -> CaseResult {
    for size in UNALIGNED {
        let fd = memfile_unsized()?;
        expect_errno(&format!("size {size}"), ftruncate(&fd, size), &[Errno::EINVAL])?;
        expect_size(&fd, 0)?;
    }
    Ok(())
}

fn refused_size_leaves_the_choice_open() -> CaseResult {
    let fd = memfile_unsized()?;
    expect_errno("unaligned size", ftruncate(&fd, PAGE + 1), &[Errno::EINVAL])?;
    ftruncate(&fd, SIZE).context("then an aligned one")?;
    expect_size(&fd, SIZE)
}

fn cannot_change_by_ftruncate() -> CaseResult {
    let fd = memfile(SIZE)?;
    for size in [0, 1, PAGE, SIZE - 1, SIZE, SIZE + 1, SIZE + PAGE, 1 << 40] {
        expect_errno(&format!("size {size}"), ftruncate(&fd, size), &[Errno::EPERM])?;
    }
    expect_size(&fd, SIZE)
}

fn cannot_change_by_o_trunc() -> CaseResult {
    let _pages = base_pages()?;
    let fd = memfile(SIZE)?;
    allocate(&fd, 0, SIZE)?;
    for mode in [libc::O_RDWR, libc::O_WRONLY] {
        expect_errno("O_TRUNC", reopen(&fd, mode | libc::O_TRUNC), &[Errno::EPERM])?;
    }
    expect_size(&fd, SIZE)?;
    expect_allocated(&fd, SIZE, "after O_TRUNC")
}

fn cannot_change_by_fallocate() -> CaseResult {
    let fd = memfile(SIZE)?;
    for mode in [0, libc::FALLOC_FL_KEEP_SIZE] {
        for (offset, len) in [(0, SIZE + PAGE), (SIZE, PAGE), (SIZE - PAGE, 2 * PAGE), (0, 1 << 40)]
        {
            let what = format!("mode {mode} [{offset:#x}, +{len:#x})");
            expect_errno(&what, fallocate(&fd, mode, offset, len), &[Errno::EINVAL])?;
        }
    }
    expect_size(&fd, SIZE)?;
    expect_allocated(&fd, 0, "after refused allocations")
}

fn cannot_change_while_allocated() -> CaseResult {
    let _pages = base_pages()?;
    let fd = memfile(SIZE)?;
    allocate(&fd, 0, SIZE)?;
    for size in [0, PAGE, SIZE + PAGE] {
        expect_errno(&format!("size {size}"), ftruncate(&fd, size), &[Errno::EPERM])?;
    }
    expect_allocated(&fd, SIZE, "after refused truncation")
}

fn allocation_past_the_end_is_refused() -> CaseResult {
    let _pages = base_pages()?;
    let fd = memfile(SIZE)?;
    for (offset, len) in [(SIZE, 1), (SIZE - 1, 2), (1 << 62, PAGE), (SIZE + PAGE, PAGE)] {
        let what = format!("[{offset:#x}, +{len:#x})");
        expect_errno(&what, allocate(&fd, offset, len), &[Errno::EINVAL])?;
    }
    allocate(&fd, SIZE - PAGE, PAGE).context("up to the end")?;
    expect_allocated(&fd, PAGE, "one page at the end")
}

fn allocation_needs_a_size_first() -> CaseResult {
    let fd = memfile_unsized()?;
    for mode in [0, libc::FALLOC_FL_KEEP_SIZE] {
        expect_errno("no size yet", fallocate(&fd, mode, 0, PAGE), &[Errno::EINVAL])?;
    }
    expect_size(&fd, 0)?;
    expect_allocated(&fd, 0, "without a size")
}

fn allocation_takes_unaligned_ranges_as_pages() -> CaseResult {
    let _pages = base_pages()?;
    let fd = memfile(SIZE)?;
    allocate(&fd, PAGE + 1, 1)?;
    expect_allocated(&fd, PAGE, "one byte of page 1")?;
    allocate(&fd, 2 * PAGE - 1, 2)?;
    expect_allocated(&fd, 2 * PAGE, "and one of page 2")?;
    allocate(&fd, 0, SIZE)?;
    expect_allocated(&fd, SIZE, "everything")
}

fn hole_must_be_whole_pages() -> CaseResult {
    let _pages = base_pages()?;
    let fd = memfile(SIZE)?;
    allocate(&fd, 0, SIZE)?;
    let p = PAGE;
    let bad = [(0, 1), (0, p - 1), (0, p + 1), (1, 1), (1, p - 1), (1, p), (1, p + 1), (p, 1)];
    for (offset, len) in bad.into_iter().chain([(p, p - 1), (p, p + 1), (SIZE - 1, 1)]) {
        let what = format!("hole [{offset:#x}, +{len:#x})");
        expect_errno(&what, punch(&fd, offset, len), &[Errno::EINVAL])?;
    }
    expect_allocated(&fd, SIZE, "after refused holes")?;
    punch(&fd, p, p)?;
    expect_allocated(&fd, SIZE - p, "one page less")
}

fn hole_must_keep_the_size() -> CaseResult {
    let fd = memfile(SIZE)?;
    let result = fallocate(&fd, libc::FALLOC_FL_PUNCH_HOLE, 0, PAGE);
    // The VFS returns this for every file system.
    expect_errno("hole without KEEP_SIZE", result, &[Errno::EOPNOTSUPP])
}

fn other_fallocate_modes_are_refused() -> CaseResult {
    let _pages = base_pages()?;
    let fd = memfile(SIZE)?;
    allocate(&fd, 0, SIZE)?;
    let keep = libc::FALLOC_FL_KEEP_SIZE;
    let modes = [
        libc::FALLOC_FL_ZERO_RANGE,
        libc::FALLOC_FL_ZERO_RANGE | keep,
        libc::FALLOC_FL_COLLAPSE_RANGE,
        libc::FALLOC_FL_INSERT_RANGE,
        libc::FALLOC_FL_UNSHARE_RANGE,
    ];
    for mode in modes {
        let result = fallocate(&fd, mode, 0, PAGE);
        expect_errno(&format!("mode {mode:#x}"), result, &[Errno::EOPNOTSUPP])?;
    }
    expect_size(&fd, SIZE)?;
    expect_allocated(&fd, SIZE, "after refused modes")
}

fn read_only_descriptor_cannot_allocate_or_punch() -> CaseResult {
    let _pages = base_pages()?;
    let fd = memfile(SIZE)?;
    allocate(&fd, 0, PAGE)?;
    let reader = reopen(&fd, libc::O_RDONLY).context("reopen read-only")?;
    expect_errno("allocate", allocate(&reader, 0, SIZE), &[Errno::EBADF])?;
    expect_errno("punch", punch(&reader, 0, SIZE), &[Errno::EBADF])?;
    expect_errno("ftruncate", ftruncate(&reader, SIZE), &[Errno::EINVAL])?;
    expect_allocated(&fd, PAGE, "after a reader tried")
}

fn huge_size_costs_nothing() -> CaseResult {
    let _pages = base_pages()?;
    let fd = memfile(1 << 40)?;
    expect_allocated(&fd, 0, "a TiB of nothing")?;
    allocate(&fd, (1 << 40) - MIB, MIB)?;
    expect_allocated(&fd, MIB, "its last MiB")?;
    punch(&fd, 0, 1 << 40)?;
    expect_allocated(&fd, 0, "all punched")
}
