// SPDX-License-Identifier: GPL-2.0
//! memfd_create(MFD_INACCESSIBLE): its results and its refusals (rule 1).

use std::os::fd::AsRawFd;

use anyhow::{Context, ensure};

use crate::ktap::{CaseResult, Suite};
use crate::pressure::base_pages;
use crate::sys::*;
use crate::uapi::*;
use crate::{MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "creation",
    [
        makes_an_empty_file,
        allow_sealing_is_refused,
        unknown_flags_are_refused,
        exec_flags_exclude_each_other_as_ever,
        seals_read_f_seal_seal,
        no_seal_can_be_added,
        noexec_seal_keeps_the_file_sealed,
        cloexec_is_honoured,
        many_files_are_independent,
        ordinary_memfd_is_as_before,
    ]
);

const NEW: u32 = MFD_CLOEXEC | MFD_INACCESSIBLE;

fn makes_an_empty_file() -> CaseResult {
    let fd = memfile_unsized()?;
    let st = fstat(&fd)?;
    ensure!((st.st_size, st.st_blocks) == (0, 0), "{} bytes, {} blocks", st.st_size, st.st_blocks);
    ensure!(st.st_mode & libc::S_IFMT == libc::S_IFREG, "mode {:o}", st.st_mode);
    Ok(())
}

fn allow_sealing_is_refused() -> CaseResult {
    drop(memfile_unsized()?);
    let refused = |flags| expect_errno("with sealing", memfd_create(flags), &[Errno::EINVAL]);
    refused(NEW | MFD_ALLOW_SEALING)?;
    refused(NEW | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL)
}

fn unknown_flags_are_refused() -> CaseResult {
    drop(memfile_unsized()?);
    // Bit 6 is MFD_ONE_VM.
    for bit in 7..32 {
        let what = format!("flag bit {bit}");
        expect_errno(&what, memfd_create(NEW | 1 << bit), &[Errno::EINVAL])?;
    }
    Ok(())
}

fn exec_flags_exclude_each_other_as_ever() -> CaseResult {
    drop(memfile_unsized()?);
    let flags = NEW | MFD_EXEC | MFD_NOEXEC_SEAL;
    expect_errno("both exec flags", memfd_create(flags), &[Errno::EINVAL])?;
    memfd_create(NEW | MFD_EXEC).context("MFD_EXEC").map(drop)
}

fn seals_read_f_seal_seal() -> CaseResult {
    let fd = memfile(MIB)?;
    let seals = get_seals(&fd)?;
    ensure!(seals == F_SEAL_SEAL, "seals read {seals:#x}");
    Ok(())
}

fn no_seal_can_be_added() -> CaseResult {
    let fd = memfile(MIB)?;
    let mut all = vec![F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE];
    all.push(F_SEAL_EXEC);
    let sealable = memfd_create(MFD_CLOEXEC | MFD_ALLOW_SEALING)?;
    if add_seals(&sealable, F_SEAL_AUTO_ALLOCATE).is_ok() {
        all.push(F_SEAL_AUTO_ALLOCATE);
    }
    for seal in all {
        expect_errno(&format!("seal {seal:#x}"), add_seals(&fd, seal), &[Errno::EPERM])?;
    }
    let seals = get_seals(&fd)?;
    ensure!(seals == F_SEAL_SEAL, "seals read {seals:#x}");
    Ok(())
}

/// MFD_NOEXEC_SEAL makes an ordinary memfd sealable; an inaccessible one stays sealed.
fn noexec_seal_keeps_the_file_sealed() -> CaseResult {
    drop(memfile_unsized()?);
    let fd = memfd_create(NEW | MFD_NOEXEC_SEAL).context("MFD_NOEXEC_SEAL")?;
    let seals = get_seals(&fd)?;
    ensure!(seals & F_SEAL_SEAL != 0, "seals read {seals:#x}");
    expect_errno("add a seal", add_seals(&fd, F_SEAL_WRITE), &[Errno::EPERM])
}

fn cloexec_is_honoured() -> CaseResult {
    for (flags, wanted) in [(NEW, libc::FD_CLOEXEC), (MFD_INACCESSIBLE, 0)] {
        drop(memfile_unsized()?);
        let fd = memfd_create(flags)?;
        // SAFETY: Takes no pointer.
        let got = check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) })?;
        ensure!(got == i64::from(wanted), "flags {flags:#x}: FD_CLOEXEC is {got}");
    }
    Ok(())
}

fn many_files_are_independent() -> CaseResult {
    let _pages = base_pages()?;
    let files = (1..=64).map(|n| memfile(n * PAGE)).collect::<Result<Vec<_>, _>>()?;
    allocate(&files[10], 0, 11 * PAGE)?;
    for (n, fd) in (1..).zip(&files) {
        let (size, held) = (file_size(fd)?, allocated(fd)?);
        ensure!(size == n * PAGE, "file {n}: {size} bytes");
        ensure!(held == if n == 11 { 11 * PAGE } else { 0 }, "file {n} holds {held} bytes");
    }
    Ok(())
}

fn ordinary_memfd_is_as_before() -> CaseResult {
    // The loaded module changes nothing for other memfds.
    let fd = memfd_create(MFD_CLOEXEC | MFD_ALLOW_SEALING)?;
    ensure!(get_seals(&fd)? == 0);
    ftruncate(&fd, 4 * PAGE)?;
    ftruncate(&fd, 5)?;
    ftruncate(&fd, 4 * PAGE)?;
    let view = Mapping::shared(&fd, 0, 4 * PAGE)?;
    view.store(PAGE, 9);
    expect_allocated(&fd, PAGE, "one page touched")?;
    drop(view);
    add_seals(&fd, F_SEAL_SHRINK | F_SEAL_WRITE)?;
    expect_errno("shrink", ftruncate(&fd, PAGE), &[Errno::EPERM])?;
    expect_errno("punch", punch(&fd, 0, PAGE), &[Errno::EPERM])
}
