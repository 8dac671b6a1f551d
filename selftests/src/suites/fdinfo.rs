// SPDX-License-Identifier: GPL-2.0
//! The lines in `/proc/PID/fdinfo/FD`.

use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};

use crate::ktap::{CaseResult, Suite};
use crate::pressure::base_pages;
use crate::support::setup::{GUEST, Setup};
use crate::sys::*;
use crate::uapi::*;
use crate::vm::Private;
use crate::{MIB, PAGE, mem, suite};

pub static SUITE: Suite = suite!(
    "fdinfo",
    [
        new_file_has_creation_flags_and_nothing_else,
        bindings_are_counted,
        flags_are_those_of_the_binding,
        flags_stay_when_the_last_binding_goes,
        pages_follow_allocation_and_punch,
        ordinary_memfd_has_no_such_lines,
    ]
);

/// Flags, bindings, pages.
fn read(fd: impl AsFd) -> Result<(u64, u64, u64)> {
    let line = |key: &str| -> Result<String> {
        mem::fdinfo(fd.as_fd(), key)?.with_context(|| format!("fdinfo has no {key}"))
    };
    let flags = line("memfile-flags")?;
    let flags = flags.strip_prefix("0x").with_context(|| format!("flags read {flags}"))?;
    let flags = u64::from_str_radix(flags, 16).context("memfile-flags")?;
    let bindings = line("memfile-bindings")?.parse().context("memfile-bindings")?;
    let pages = line("memfile-pages")?.parse().context("memfile-pages")?;
    Ok((flags, bindings, pages))
}

/// Fail unless the lines have these values.
fn expect(fd: impl AsFd, wanted: (u64, u64, u64), when: &str) -> Result<()> {
    let got = read(fd)?;
    ensure!(got == wanted, "{when}: flags, bindings, pages are {got:x?}, wanted {wanted:x?}");
    Ok(())
}

const CREATION: u64 = MEMFILE_F_USER_INACCESSIBLE;

fn new_file_has_creation_flags_and_nothing_else() -> CaseResult {
    expect(memfile_unsized()?, (CREATION, 0, 0), "without a size")?;
    expect(memfile(MIB)?, (CREATION, 0, 0), "with a size")
}

fn bindings_are_counted() -> CaseResult {
    let s = Setup::new(Private::Memfile, MIB)?;
    ensure!(read(&s.fd)?.1 == 1, "one slot");
    let gpa = s.slot.gpa + 2 * MIB;
    let second = s.vm.add_private(2, gpa, MIB, Private::Memfile, &s.fd, MIB)?;
    ensure!(read(&s.fd)?.1 == 2, "two slots");
    s.vm.delete(s.slot)?;
    ensure!(read(&s.fd)?.1 == 1, "one deleted");
    s.vm.delete(second)?;
    ensure!(read(&s.fd)?.1 == 0, "both deleted");
    Ok(())
}

fn flags_are_those_of_the_binding() -> CaseResult {
    let s = Setup::new(Private::Memfile, MIB)?;
    expect(&s.fd, (MEMFILE_F_ALL, 1, 0), "bound with the default")
}

/// The flags belong to the pages, not to the binding; a file without pages shows those that a new
/// page gets.
fn flags_stay_when_the_last_binding_goes() -> CaseResult {
    let _pages = base_pages()?;
    for pages in [0, 3] {
        let mut s = Setup::new(Private::Memfile, MIB)?;
        s.vcpu.fill_pages(s.slot.gpa, pages * PAGE, GUEST)?;
        s.vm.delete(s.slot)?;
        expect(&s.fd, (MEMFILE_F_ALL, 0, pages), "after the slot")?;
        let mut s = Setup::new(Private::Memfile, MIB)?;
        s.vcpu.fill_pages(s.slot.gpa, pages * PAGE, GUEST)?;
        drop((s.vm, s.vcpu));
        expect(&s.fd, (MEMFILE_F_ALL, 0, pages), "after the VM")?;
        punch(&s.fd, 0, MIB)?;
        expect(&s.fd, (MEMFILE_F_ALL, 0, 0), "after everything was punched")?;
    }
    Ok(())
}

fn pages_follow_allocation_and_punch() -> CaseResult {
    let _pages = base_pages()?;
    let mut s = Setup::new(Private::Memfile, MIB)?;
    s.vcpu.fill_pages(s.slot.gpa, 10 * PAGE, GUEST)?;
    ensure!(read(&s.fd)?.2 == 10);
    punch(&s.fd, 0, 4 * PAGE)?;
    ensure!(read(&s.fd)?.2 == 6);
    allocate(&s.fd, 0, MIB)?;
    ensure!(read(&s.fd)?.2 == MIB / PAGE);
    punch(&s.fd, 0, 2 * MIB)?;
    ensure!(read(&s.fd)?.2 == 0);
    Ok(())
}

fn ordinary_memfd_has_no_such_lines() -> CaseResult {
    drop(memfile_unsized()?);
    let fd = memfd(MIB)?;
    for key in ["memfile-flags", "memfile-bindings", "memfile-pages"] {
        ensure!(mem::fdinfo(&fd, key)?.is_none(), "an ordinary memfd has {key}");
    }
    Ok(())
}
