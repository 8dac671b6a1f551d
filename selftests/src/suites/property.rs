// SPDX-License-Identifier: GPL-2.0
//! Inaccessibility is a property of a file from its creation on; no user can give it to another's
//! file (rule 4).

use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result};

use crate::ktap::{CaseResult, skip};
use crate::support::backend::Backend;
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{Private, Vm, region, small_pages};
use crate::{GIB, HUGE, MIB, PAGE, conformance};

conformance!(
    "property",
    [
        ordinary_memfd_cannot_be_bound,
        tmpfs_file_cannot_be_bound,
        hugetlb_memfd_cannot_be_bound,
        other_files_cannot_be_bound,
        refused_memfd_stays_readable_and_mappable,
    ],
    memfile: [memfile_stays_inaccessible_after_unbinding, reopened_memfile_is_as_inaccessible],
    // The others are about files that are no memfile.
    huge: [memfile_stays_inaccessible_after_unbinding, reopened_memfile_is_as_inaccessible],
);

/// Fail unless binding `fd` is refused as no file of this kind.
fn expect_refused(on: &Backend, what: &str, fd: impl AsFd) -> Result<()> {
    let vm = on.vm()?;
    drop(on.create(&vm, PAGE)?);
    let view = small_pages(MIB)?;
    let request = region(1, GIB, &view, Some((on.kind, fd.as_fd(), 0)));
    on.errno(&format!("bind a {what}"), vm.raw_set_region(&request), &[Errno::EINVAL])
}

fn ordinary_memfd_cannot_be_bound(on: &'static Backend) -> CaseResult {
    let fd = memfd(MIB)?;
    expect_refused(on, "memfd", &fd)?;
    // Not even one that no user can use any more.
    let sealed = memfd_create(MFD_CLOEXEC | MFD_ALLOW_SEALING)?;
    ftruncate(&sealed, MIB)?;
    add_seals(&sealed, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)?;
    expect_refused(on, "sealed memfd", &sealed)
}

fn tmpfs_file_cannot_be_bound(on: &'static Backend) -> CaseResult {
    expect_refused(on, "tmpfs file", tmpfs_file(MIB)?)
}

fn hugetlb_memfd_cannot_be_bound(on: &'static Backend) -> CaseResult {
    let Ok(fd) = memfd_create(MFD_CLOEXEC | MFD_HUGETLB) else {
        return skip("the kernel has no hugetlb memfds");
    };
    ftruncate(&fd, HUGE)?;
    expect_refused(on, "hugetlb memfd", &fd)
}

fn other_files_cannot_be_bound(on: &'static Backend) -> CaseResult {
    for path in ["/dev/kvm", "/dev/zero", "/dev/null", "/proc/self/mem"] {
        let fd = open(path, libc::O_RDWR).with_context(|| format!("open {path}"))?;
        expect_refused(on, path, &fd)?;
    }
    let (_reader, writer) = pipe()?;
    expect_refused(on, "pipe", &writer)?;
    let vm = Vm::protected()?;
    expect_refused(on, "VM", vm.fd())?;
    if on.kind == Private::GuestMemfd {
        return expect_refused(on, "file of the other kind", memfile(MIB)?);
    }
    expect_refused(on, "file of the other kind", vm.guest_memfd(MIB)?)
}

fn refused_memfd_stays_readable_and_mappable(on: &'static Backend) -> CaseResult {
    let fd = memfd(MIB)?;
    let view = Mapping::shared(&fd, 0, MIB)?;
    view.store(PAGE, 5);
    expect_refused(on, "memfd", &fd)?;
    let again = Mapping::shared(&fd, 0, MIB)?;
    again.store(0, 6);
    anyhow::ensure!((again.load(PAGE), view.load(0)) == (5, 6));
    ftruncate(&fd, 2 * MIB).context("its size may still change")
}

fn try_map(on: &Backend, fd: BorrowedFd) -> SysResult<()> {
    Mapping::map(on.page, libc::PROT_READ, libc::MAP_SHARED, Some((fd, 0))).map(drop)
}

fn memfile_stays_inaccessible_after_unbinding(on: &'static Backend) -> CaseResult {
    let fd = on.file(MIB)?;
    for round in 0..2 {
        let vm = on.vm()?;
        let slot = on.add_slot(&vm, 1, (GIB, 0), MIB, &fd)?;
        vm.vcpu(0)?.store(GIB, 1)?;
        expect_errno("mmap while bound", try_map(on, fd.as_fd()), &[Errno::EPERM])?;
        if round == 0 {
            vm.delete(slot)?;
        }
        drop(vm);
        expect_errno("mmap once unbound", try_map(on, fd.as_fd()), &[Errno::EPERM])?;
        expect_errno("ftruncate", ftruncate(&fd, 2 * MIB), &[Errno::EPERM])?;
    }
    Ok(())
}

fn reopened_memfile_is_as_inaccessible(on: &'static Backend) -> CaseResult {
    let fd = on.file(MIB)?;
    allocate(&fd, 0, PAGE)?;
    for mode in [libc::O_RDONLY, libc::O_RDWR] {
        let again = reopen(&fd, mode).context("reopen")?;
        expect_errno("mmap", try_map(on, again.as_fd()), &[Errno::EPERM])?;
    }
    // Even after the first descriptor is gone.
    let again = reopen(&fd, libc::O_RDWR)?;
    drop(fd);
    expect_errno("mmap", try_map(on, again.as_fd()), &[Errno::EPERM])
}
