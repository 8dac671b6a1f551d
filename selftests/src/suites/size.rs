// SPDX-License-Identifier: GPL-2.0
//! The size of an inaccessible memfd is set once; pages inside of it can be allocated and freed
//! (rule 2).

use std::os::fd::OwnedFd;

use anyhow::{Context, Result, ensure};

use crate::ktap::CaseResult;
use crate::pressure::base_pages;
use crate::support::backend::Backend;
use crate::sys::*;
use crate::{PAGE, conformance};

conformance!(
    "size",
    [
        is_set_once_from_zero,
        must_be_whole_pages,
        cannot_change_by_ftruncate,
        cannot_change_by_o_trunc,
        cannot_change_by_fallocate,
        cannot_change_while_allocated,
        allocation_past_the_end_is_refused,
        allocation_takes_unaligned_ranges_as_pages,
        hole_must_be_whole_pages,
        hole_must_keep_the_size,
        other_fallocate_modes_are_refused,
        read_only_descriptor_cannot_allocate_or_punch,
        huge_size_costs_nothing,
    ],
    memfile: [refused_size_leaves_the_choice_open, allocation_needs_a_size_first],
    huge: all,
);

/// Pages of most files.
const PAGES: u64 = 8;

fn expect_size(fd: &OwnedFd, wanted: u64) -> Result<()> {
    let got = file_size(fd)?;
    ensure!(got == wanted, "the file has {got} bytes, wanted {wanted}");
    Ok(())
}

fn is_set_once_from_zero(on: &'static Backend) -> CaseResult {
    for size in [on.page, PAGES * on.page, 1 << 30] {
        let fd = on.file(size)?;
        expect_size(&fd, size)?;
        on.errno("ftruncate", ftruncate(&fd, 2 * size), &[Errno::EPERM])?;
        expect_size(&fd, size)?;
    }
    Ok(())
}

fn must_be_whole_pages(on: &'static Backend) -> CaseResult {
    drop(on.file(on.page)?);
    let vm = on.vm()?;
    let p = on.page;
    for size in [1, 512, p - 1, p + 1, 2 * p - 1, (1 << 30) + 8] {
        on.errno("size of no whole pages", on.raw_create(&vm, size), &[Errno::EINVAL])
            .with_context(|| format!("{size} bytes"))?;
    }
    Ok(())
}

fn refused_size_leaves_the_choice_open(on: &'static Backend) -> CaseResult {
    let fd = on.new_file()?;
    on.errno("unaligned size", ftruncate(&fd, on.page + 1), &[Errno::EINVAL])?;
    expect_size(&fd, 0)?;
    ftruncate(&fd, PAGES * on.page).context("then an aligned one")?;
    expect_size(&fd, PAGES * on.page)
}

fn cannot_change_by_ftruncate(on: &'static Backend) -> CaseResult {
    let whole = PAGES * on.page;
    let fd = on.file(whole)?;
    for size in [0, 1, PAGE, whole - 1, whole, whole + 1, whole + PAGE, 1 << 40] {
        on.errno("ftruncate", ftruncate(&fd, size), &[Errno::EPERM])
            .with_context(|| format!("size {size}"))?;
    }
    expect_size(&fd, whole)
}

fn cannot_change_by_o_trunc(on: &'static Backend) -> CaseResult {
    let size = PAGES * on.page;
    let _pages = base_pages()?;
    let fd = on.file(size)?;
    allocate(&fd, 0, size)?;
    for mode in [libc::O_RDWR, libc::O_WRONLY] {
        on.errno("reopen with O_TRUNC", reopen(&fd, mode | libc::O_TRUNC), &[Errno::EPERM])?;
    }
    expect_size(&fd, size)?;
    on.expect_allocated(&fd, size, "after O_TRUNC")
}

fn cannot_change_by_fallocate(on: &'static Backend) -> CaseResult {
    let size = PAGES * on.page;
    let fd = on.file(size)?;
    for mode in [0, libc::FALLOC_FL_KEEP_SIZE] {
        for (offset, len) in [(0, size + PAGE), (size, PAGE), (size - PAGE, 2 * PAGE), (0, 1 << 40)]
        {
            let what = if mode == 0 { "fallocate past the end" } else { "the same with KEEP_SIZE" };
            on.errno(what, fallocate(&fd, mode, offset, len), &[Errno::EINVAL])
                .with_context(|| format!("[{offset:#x}, +{len:#x})"))?;
        }
    }
    expect_size(&fd, size)?;
    on.expect_allocated(&fd, 0, "after refused allocations")
}

fn cannot_change_while_allocated(on: &'static Backend) -> CaseResult {
    let whole = PAGES * on.page;
    let _pages = base_pages()?;
    let fd = on.file(whole)?;
    allocate(&fd, 0, whole)?;
    for size in [0, PAGE, whole + PAGE] {
        on.errno("ftruncate", ftruncate(&fd, size), &[Errno::EPERM])
            .with_context(|| format!("size {size}"))?;
    }
    on.expect_allocated(&fd, whole, "after refused truncation")
}

fn allocation_past_the_end_is_refused(on: &'static Backend) -> CaseResult {
    let size = PAGES * on.page;
    let _pages = base_pages()?;
    let fd = on.file(size)?;
    for (offset, len) in [(size, 1), (size - 1, 2), (1 << 62, PAGE), (size + PAGE, PAGE)] {
        on.errno("fallocate past the end", allocate(&fd, offset, len), &[Errno::EINVAL])
            .with_context(|| format!("[{offset:#x}, +{len:#x})"))?;
    }
    allocate(&fd, size - on.page, on.page).context("up to the end")?;
    on.expect_allocated(&fd, on.page, "one page at the end")
}

fn allocation_needs_a_size_first(on: &'static Backend) -> CaseResult {
    let fd = on.new_file()?;
    for mode in [0, libc::FALLOC_FL_KEEP_SIZE] {
        on.errno("fallocate without a size", fallocate(&fd, mode, 0, PAGE), &[Errno::EINVAL])?;
    }
    expect_size(&fd, 0)?;
    on.expect_allocated(&fd, 0, "without a size")
}

fn allocation_takes_unaligned_ranges_as_pages(on: &'static Backend) -> CaseResult {
    let size = PAGES * on.page;
    let _pages = base_pages()?;
    let fd = on.file(size)?;
    let unaligned = |offset, len| {
        on.works("fallocate of no whole pages", allocate(&fd, offset, len))
            .map(|done| done.is_some())
    };
    if !unaligned(on.page + 1, 1)? {
        return Ok(());
    }
    on.expect_allocated(&fd, on.page, "one byte of page 1")?;
    unaligned(2 * on.page - 1, 2)?;
    on.expect_allocated(&fd, 2 * on.page, "and one of page 2")?;
    allocate(&fd, 0, size)?;
    on.expect_allocated(&fd, size, "everything")
}

fn hole_must_be_whole_pages(on: &'static Backend) -> CaseResult {
    let size = PAGES * on.page;
    let _pages = base_pages()?;
    let fd = on.file(size)?;
    allocate(&fd, 0, size)?;
    let p = PAGE;
    let bad = [(0, 1), (0, p - 1), (0, p + 1), (1, 1), (1, p - 1), (1, p), (1, p + 1), (p, 1)];
    for (offset, len) in bad.into_iter().chain([(p, p - 1), (p, p + 1), (size - 1, 1)]) {
        on.errno("hole of no whole pages", punch(&fd, offset, len), &[Errno::EINVAL])
            .with_context(|| format!("[{offset:#x}, +{len:#x})"))?;
    }
    on.expect_allocated(&fd, size, "after refused holes")?;
    punch(&fd, on.page, on.page)?;
    on.expect_allocated(&fd, size - on.page, "one page less")
}

fn hole_must_keep_the_size(on: &'static Backend) -> CaseResult {
    let fd = on.file(PAGES * on.page)?;
    let result = fallocate(&fd, libc::FALLOC_FL_PUNCH_HOLE, 0, PAGE);
    // The VFS returns this for every file system.
    on.errno("hole without KEEP_SIZE", result, &[Errno::EOPNOTSUPP])
}

fn other_fallocate_modes_are_refused(on: &'static Backend) -> CaseResult {
    let size = PAGES * on.page;
    let _pages = base_pages()?;
    let fd = on.file(size)?;
    allocate(&fd, 0, size)?;
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
        on.errno("fallocate, other modes", result, &[Errno::EOPNOTSUPP])
            .with_context(|| format!("mode {mode:#x}"))?;
    }
    expect_size(&fd, size)?;
    on.expect_allocated(&fd, size, "after refused modes")
}

fn read_only_descriptor_cannot_allocate_or_punch(on: &'static Backend) -> CaseResult {
    let size = PAGES * on.page;
    let _pages = base_pages()?;
    let fd = on.file(size)?;
    allocate(&fd, 0, on.page)?;
    let Some(reader) = on.works("reopen", reopen(&fd, libc::O_RDONLY))? else {
        return Ok(());
    };
    on.errno("allocate", allocate(&reader, 0, size), &[Errno::EBADF])?;
    on.errno("punch", punch(&reader, 0, size), &[Errno::EBADF])?;
    on.errno("ftruncate", ftruncate(&reader, size), &[Errno::EINVAL])?;
    on.expect_allocated(&fd, on.page, "after a reader tried")
}

fn huge_size_costs_nothing(on: &'static Backend) -> CaseResult {
    let _pages = base_pages()?;
    let fd = on.file(1 << 40)?;
    on.expect_allocated(&fd, 0, "a TiB of nothing")?;
    let end = 8 * on.page;
    allocate(&fd, (1 << 40) - end, end)?;
    on.expect_allocated(&fd, end, "its last pages")?;
    punch(&fd, 0, 1 << 40)?;
    on.expect_allocated(&fd, 0, "all punched")
}
