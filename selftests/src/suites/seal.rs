// SPDX-License-Identifier: GPL-2.0
//! F_SEAL_AUTO_ALLOCATE on ordinary memfds: only fallocate fills holes.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use libc::{c_int, iovec};

use crate::ktap::{CaseResult, Suite, skip};
use crate::pattern::{Rng, seed};
use crate::support::uffd::Userfault;
use crate::support::uring;
use crate::sys::*;
use crate::uapi::*;
use crate::{HUGE, PAGE, pressure, suite};

pub static SUITE: Suite = suite!(
    "seal",
    [
        reads_back_and_stays,
        hugetlb_is_refused,
        read_of_a_hole_is_zeros_and_leaves_the_hole,
        write_into_a_hole_is_eperm,
        write_stops_at_the_hole,
        allocated_pages_work_as_ever,
        write_into_space_preallocated_past_the_end,
        read_fault_on_a_hole_is_sigbus,
        write_fault_on_a_hole_is_sigbus,
        private_mapping_of_a_hole_is_sigbus,
        kernel_access_to_a_hole_is_efault,
        fallocate_allocates,
        fallocate_allocates_no_more_than_asked,
        punched_page_is_a_hole_again,
        userfaultfd_cannot_fill_a_hole,
        userfaultfd_says_eexist_where_there_is_a_page,
        userfaultfd_gets_no_missing_event,
        collapse_fills_no_hole,
        holds_for_mappings_that_exist,
        other_seals_are_independent,
        no_hole_is_filled_once_the_seal_is_added: 120,
    ]
);

const SIZE: u64 = 8 * PAGE;

/// A memfd that takes seals, not sealed yet.
fn sealable(size: u64) -> Result<OwnedFd> {
    let fd = memfd_create(MFD_CLOEXEC | MFD_ALLOW_SEALING).context("memfd_create")?;
    ftruncate(&fd, size).context("ftruncate")?;
    Ok(fd)
}

/// A sealed memfd whose pages 2 and 3 exist and hold [`BYTE`]; the rest is a hole.
fn sealed() -> Result<OwnedFd> {
    let fd = sealable(SIZE)?;
    ensure!(pwrite(&fd, &[BYTE; 2 * 4096], 2 * PAGE)? == 2 * PAGE as i64);
    seal(&fd)?;
    expect_allocated(&fd, 2 * PAGE, "two pages to begin with")?;
    Ok(fd)
}

const BYTE: u8 = 0x77;
const WORD: u64 = u64::from_ne_bytes([BYTE; 8]);

/// The signal that a child gets when it touches a word of a mapping; 0 for none.
fn signal_on_touch(view: &Mapping, offset: u64, write: bool) -> Result<c_int> {
    // SAFETY: The child touches one word and exits.
    let pid = check(unsafe { libc::fork() })? as libc::pid_t;
    if pid == 0 {
        if write {
            view.store(offset, 1);
        } else {
            std::hint::black_box(view.load(offset));
        }
        // SAFETY: Ends the child.
        unsafe { libc::_exit(0) };
    }
    let mut status = 0;
    // SAFETY: The status outlives the call.
    check(unsafe { libc::waitpid(pid, &mut status, 0) })?;
    Ok(if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) } else { 0 })
}

/// A touch of the hole raises SIGBUS, a touch of a page does not, and neither allocates.
fn expect_sigbus(fd: &OwnedFd, view: &Mapping, write: bool) -> CaseResult {
    for page in [0, 1, 4, 7] {
        let signal = signal_on_touch(view, page * PAGE, write)?;
        ensure!(signal == libc::SIGBUS, "page {page}, a hole: signal {signal}");
    }
    for page in [2, 3] {
        let signal = signal_on_touch(view, page * PAGE, write)?;
        ensure!(signal == 0, "page {page}, which exists: signal {signal}");
    }
    expect_allocated(fd, 2 * PAGE, "after the faults")
}

fn reads_back_and_stays() -> CaseResult {
    let fd = sealable(SIZE)?;
    seal(&fd)?;
    ensure!(get_seals(&fd)? == F_SEAL_AUTO_ALLOCATE);
    seal(&fd).context("again")?;
    add_seals(&fd, F_SEAL_GROW | F_SEAL_SEAL)?;
    ensure!(get_seals(&fd)? == F_SEAL_AUTO_ALLOCATE | F_SEAL_GROW | F_SEAL_SEAL);
    let other = sealable(SIZE)?;
    add_seals(&other, F_SEAL_SEAL)?;
    expect_errno("sealed against seals", add_seals(&other, F_SEAL_AUTO_ALLOCATE), &[Errno::EPERM])?;
    ensure!(get_seals(&reopen(&fd, libc::O_RDONLY)?)? & F_SEAL_AUTO_ALLOCATE != 0);
    Ok(())
}

fn hugetlb_is_refused() -> CaseResult {
    let _pages = pressure::base_pages()?;
    drop(sealed()?);
    for (flags, before) in [(MFD_ALLOW_SEALING, 0), (0, F_SEAL_SEAL)] {
        let Ok(fd) = memfd_create(MFD_CLOEXEC | MFD_HUGETLB | flags) else {
            return skip("the kernel has no hugetlb memfds");
        };
        for seals in [F_SEAL_AUTO_ALLOCATE, F_SEAL_AUTO_ALLOCATE | F_SEAL_GROW] {
            expect_errno("on hugetlbfs", add_seals(&fd, seals), &[Errno::EINVAL])?;
            ensure!(get_seals(&fd)? == before, "a refused call set seals");
        }
        if flags == MFD_ALLOW_SEALING {
            add_seals(&fd, F_SEAL_GROW).context("other seals")?;
        }
    }
    Ok(())
}

fn read_of_a_hole_is_zeros_and_leaves_the_hole() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let fd = sealed()?;
    let mut bytes = vec![0xff; SIZE as usize];
    ensure!(pread(&fd, &mut bytes, 0)? == SIZE as i64);
    for (page, content) in bytes.chunks(4096).enumerate() {
        let wanted = if [2, 3].contains(&page) { BYTE } else { 0 };
        ensure!(content.iter().all(|&b| b == wanted), "page {page} reads wrong");
    }
    expect_allocated(&fd, 2 * PAGE, "after reading")?;
    // Also through a pipe.
    let (_reader, writer) = pipe()?;
    let mut at = 0;
    // SAFETY: The offset outlives the call.
    let ret =
        unsafe { libc::splice(fd.as_raw_fd(), &mut at, writer.as_raw_fd(), null_mut(), 4096, 0) };
    ensure!(check(ret as i64)? == 4096);
    expect_allocated(&fd, 2 * PAGE, "after splicing out")
}

fn write_into_a_hole_is_eperm() -> CaseResult {
    let _pages = pressure::base_pages()?;
    const EPERM: &[Errno] = &[Errno::EPERM];
    let fd = sealed()?;
    for at in [0, 1, PAGE, 4 * PAGE + 5, SIZE - 1, SIZE, SIZE + PAGE] {
        expect_errno(&format!("pwrite at {at:#x}"), pwrite(&fd, &[1], at), EPERM)?;
    }
    let iov = iovec { iov_base: [1u8; 8].as_mut_ptr().cast(), iov_len: 8 };
    // SAFETY: The vector and its buffer outlive the call.
    let ret = unsafe { libc::pwritev(fd.as_raw_fd(), &iov, 1, 0) };
    expect_errno("pwritev", check(ret as i64), EPERM)?;

    let (reader, writer) = pipe()?;
    // SAFETY: The buffer has this length.
    check(unsafe { libc::write(writer.as_raw_fd(), [1u8; 4096].as_ptr().cast(), 4096) } as i64)?;
    let mut at = 0;
    // SAFETY: The offset outlives the call.
    let ret =
        unsafe { libc::splice(reader.as_raw_fd(), null_mut(), fd.as_raw_fd(), &mut at, 4096, 0) };
    expect_errno("splice", check(ret as i64), EPERM)?;

    let full = memfd(PAGE)?;
    allocate(&full, 0, PAGE)?;
    expect_errno("copy_file_range", copy_file_range(&full, 0, &fd, 0, 4096), EPERM)?;
    if let Ok(mut ring) = uring::Ring::new() {
        let result = ring.transfer(fd.as_raw_fd(), &mut [1; 100], true)?;
        expect_errno("io_uring", result, EPERM)?;
    }
    ensure!(file_size(&fd)? == SIZE, "the file grew");
    expect_allocated(&fd, 2 * PAGE, "after refused writes")
}

fn write_stops_at_the_hole() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let fd = sealed()?;
    for (at, len, wanted) in [(2 * PAGE, 4 * PAGE, 2 * PAGE), (4 * PAGE - 10, 100, 10)] {
        let got = pwrite(&fd, &vec![BYTE; len as usize], at)?;
        ensure!(got == wanted as i64, "{len} bytes at {at:#x}: {got} were written");
    }
    expect_allocated(&fd, 2 * PAGE, "after short writes")
}

fn allocated_pages_work_as_ever() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let fd = sealed()?;
    ensure!(pwrite(&fd, &[5; 4096], 3 * PAGE)? == 4096);
    let view = Mapping::shared(&fd, 0, SIZE)?;
    ensure!((view.load(2 * PAGE), view.load(3 * PAGE)) == (WORD, 0x0505_0505_0505_0505));
    view.store(2 * PAGE, 9);
    let mut word = [0; 8];
    pread(&fd, &mut word, 2 * PAGE)?;
    ensure!(u64::from_ne_bytes(word) == 9);
    expect_allocated(&fd, 2 * PAGE, "in the end")
}

/// v7 gave EINVAL here.
fn write_into_space_preallocated_past_the_end() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let fd = sealable(SIZE)?;
    allocate(&fd, SIZE, 2 * PAGE)?;
    seal(&fd)?;
    ensure!(pwrite(&fd, &[1; 4096], SIZE)? == 4096, "a page that exists past the end");
    ensure!(file_size(&fd)? == SIZE + PAGE);
    ensure!(pwrite(&fd, &[1; 2 * 4096], SIZE + PAGE)? == 4096, "and one that is followed by none");
    ensure!(file_size(&fd)? == SIZE + 2 * PAGE);
    expect_allocated(&fd, 2 * PAGE, "in the end")
}

fn read_fault_on_a_hole_is_sigbus() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let fd = sealed()?;
    let view = Mapping::shared(&fd, 0, SIZE)?;
    expect_sigbus(&fd, &view, false)
}

fn write_fault_on_a_hole_is_sigbus() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let fd = sealed()?;
    let view = Mapping::shared(&fd, 0, SIZE)?;
    expect_sigbus(&fd, &view, true)
}

fn private_mapping_of_a_hole_is_sigbus() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let fd = sealed()?;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let view = Mapping::map(SIZE, prot, libc::MAP_PRIVATE, Some((fd.as_fd(), 0)))?;
    expect_sigbus(&fd, &view, false)?;
    expect_sigbus(&fd, &view, true)
}

fn kernel_access_to_a_hole_is_efault() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let fd = sealed()?;
    let view = Mapping::shared(&fd, 0, SIZE)?;
    let zero = open("/dev/zero", libc::O_RDWR)?;
    // SAFETY: The address is in a mapping of ours that nothing else uses.
    let ret = unsafe { libc::read(zero.as_raw_fd(), view.addr() as *mut libc::c_void, 8) };
    expect_errno("read() into a hole", check(ret as i64), &[Errno::EFAULT])?;
    for advice in [libc::MADV_POPULATE_READ, libc::MADV_POPULATE_WRITE] {
        let result = view.madvise(0, PAGE, advice);
        expect_errno(&format!("madvise({advice})"), result, &[Errno::EFAULT])?;
    }
    expect_allocated(&fd, 2 * PAGE, "after the kernel's accesses")
}

fn fallocate_allocates() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let fd = sealed()?;
    let view = Mapping::shared(&fd, 0, SIZE)?;
    allocate(&fd, 0, PAGE)?;
    expect_allocated(&fd, 3 * PAGE, "one page more")?;
    ensure!(view.load(0) == 0, "it is not zero");
    view.store(0, 3);
    ensure!(view.load(2 * PAGE) == WORD, "another page lost its content");
    fallocate(&fd, 0, 0, SIZE)?;
    expect_allocated(&fd, SIZE, "all pages")?;
    ensure!((view.load(0), view.load(2 * PAGE)) == (3, WORD), "fallocate changed content");
    for page in 0..8 {
        ensure!(signal_on_touch(&view, page * PAGE, true)? == 0, "page {page}");
    }
    Ok(())
}

fn fallocate_allocates_no_more_than_asked() -> CaseResult {
    let _pages = pressure::base_pages()?;
    drop(sealed()?);
    let _policy = pressure::shmem_huge("always")?;
    // The control: without the seal there is a huge page.
    let plain = sealable(2 * HUGE)?;
    allocate(&plain, 0, PAGE)?;
    if allocated(&plain)? != HUGE {
        return skip("no huge page without the seal either");
    }
    let fd = sealable(2 * HUGE)?;
    seal(&fd)?;
    let mut held = 0;
    for (offset, len) in [(0, PAGE), (HUGE - PAGE, 2 * PAGE), (5 * PAGE, 7 * PAGE)] {
        allocate(&fd, offset, len)?;
        held += len;
        expect_allocated(&fd, held, &format!("after [{offset:#x}, +{len:#x})"))?;
    }
    let other = sealable(2 * HUGE)?;
    seal(&other)?;
    allocate(&other, 0, HUGE + PAGE)?;
    expect_allocated(&other, HUGE + PAGE, "a huge page and a page")
}

fn punched_page_is_a_hole_again() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let fd = sealed()?;
    let view = Mapping::shared(&fd, 0, SIZE)?;
    ensure!(view.load(2 * PAGE) == WORD);
    punch(&fd, 2 * PAGE, PAGE)?;
    expect_allocated(&fd, PAGE, "one page left")?;
    for write in [false, true] {
        let signal = signal_on_touch(&view, 2 * PAGE, write)?;
        ensure!(signal == libc::SIGBUS, "signal {signal} on the punched page");
    }
    expect_errno("pwrite", pwrite(&fd, &[1], 2 * PAGE), &[Errno::EPERM])?;
    let mut byte = [9];
    ensure!(pread(&fd, &mut byte, 2 * PAGE)? == 1 && byte == [0]);
    allocate(&fd, 2 * PAGE, PAGE)?;
    ensure!(view.load(2 * PAGE) == 0, "the page that came back is not zero");
    Ok(())
}

fn userfaultfd_cannot_fill_a_hole() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let fd = sealed()?;
    let view = Mapping::shared(&fd, 0, SIZE)?;
    let uffd = Userfault::on(&view)?;
    let source = Mapping::anonymous(PAGE)?;
    source.store(0, 1);
    expect_errno("UFFDIO_COPY", uffd.copy(&view, 0, &source), &[Errno::EPERM])?;
    expect_errno("UFFDIO_ZEROPAGE", uffd.zero(&view, 0), &[Errno::EPERM])?;
    expect_allocated(&fd, 2 * PAGE, "after userfaultfd")?;
    // The control: without the seal both work.
    let plain = sealable(SIZE)?;
    let view = Mapping::shared(&plain, 0, SIZE)?;
    let uffd = Userfault::on(&view)?;
    uffd.copy(&view, 0, &source).context("UFFDIO_COPY without the seal")?;
    uffd.zero(&view, PAGE).context("UFFDIO_ZEROPAGE without the seal")?;
    expect_allocated(&plain, 2 * PAGE, "without the seal")
}

fn userfaultfd_says_eexist_where_there_is_a_page() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let fd = sealed()?;
    let plain = sealable(SIZE)?;
    ensure!(pwrite(&plain, &[BYTE; 2 * 4096], 2 * PAGE)? == 2 * PAGE as i64);
    for (what, fd) in [("sealed", &fd), ("not sealed", &plain)] {
        let view = Mapping::shared(fd, 0, SIZE)?;
        let uffd = Userfault::on(&view)?;
        let source = Mapping::anonymous(PAGE)?;
        source.store(0, 1);
        expect_errno(what, uffd.copy(&view, 2 * PAGE, &source), &[Errno::EEXIST])?;
        ensure!(view.load(2 * PAGE) == WORD, "{what}: the page lost its content");
        expect_allocated(fd, 2 * PAGE, what)?;
    }
    Ok(())
}

fn userfaultfd_gets_no_missing_event() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let fd = sealed()?;
    let view = Mapping::shared(&fd, 0, SIZE)?;
    let uffd = Userfault::on(&view)?;
    for write in [false, true] {
        // A child does not inherit the registration, so only the seal decides.
        let signal = signal_on_touch(&view, 0, write)?;
        ensure!(signal == libc::SIGBUS, "signal {signal}");
    }
    // In this very process the kernel reports the same as EFAULT instead of waiting.
    let zero = open("/dev/zero", libc::O_RDWR)?;
    // SAFETY: The address is in a mapping of ours that nothing else uses.
    let ret = unsafe { libc::read(zero.as_raw_fd(), view.addr() as *mut libc::c_void, 8) };
    expect_errno("read() into a hole", check(ret as i64), &[Errno::EFAULT])?;
    ensure!(!uffd.has_event()?, "there is an event");
    expect_allocated(&fd, 2 * PAGE, "after the faults")
}

fn collapse_fills_no_hole() -> CaseResult {
    let _pages = pressure::base_pages()?;
    const MADV_COLLAPSE: c_int = 25;
    drop(sealed()?);
    let with_holes = || -> Result<(OwnedFd, Mapping)> {
        let fd = sealable(HUGE)?;
        let view = Mapping::shared(&fd, 0, HUGE)?;
        for page in (0..HUGE / PAGE).step_by(2) {
            view.store(page * PAGE, page);
        }
        Ok((fd, view))
    };
    let (plain, view) = with_holes()?;
    let result = view.madvise(0, HUGE, MADV_COLLAPSE);
    if result.is_err() || allocated(&plain)? != HUGE {
        return skip(format!("MADV_COLLAPSE does nothing without the seal either: {result:?}"));
    }
    let (fd, view) = with_holes()?;
    let held = allocated(&fd)?;
    seal(&fd)?;
    let result = view.madvise(0, HUGE, MADV_COLLAPSE);
    ensure!(result.is_err(), "MADV_COLLAPSE succeeded");
    expect_allocated(&fd, held, "after MADV_COLLAPSE")?;
    // Without holes it is allowed.
    allocate(&fd, 0, HUGE)?;
    view.madvise(0, HUGE, MADV_COLLAPSE).context("without holes")?;
    for page in 0..HUGE / PAGE {
        let wanted = if page % 2 == 0 { page } else { 0 };
        ensure!(view.load(page * PAGE) == wanted, "page {page} changed");
    }
    Ok(())
}

fn holds_for_mappings_that_exist() -> CaseResult {
    let fd = sealable(SIZE)?;
    let view = Mapping::shared(&fd, 0, SIZE)?;
    view.store(0, 1);
    seal(&fd)?;
    ensure!(signal_on_touch(&view, PAGE, true)? == libc::SIGBUS, "a hole");
    ensure!(signal_on_touch(&view, 0, true)? == 0, "a page that exists");
    expect_allocated(&fd, PAGE, "after sealing a mapped file")
}

fn other_seals_are_independent() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let fd = sealed()?;
    add_seals(&fd, F_SEAL_WRITE).context("F_SEAL_WRITE")?;
    expect_errno("pwrite", pwrite(&fd, &[1], 2 * PAGE), &[Errno::EPERM])?;
    expect_errno("punch", punch(&fd, 0, PAGE), &[Errno::EPERM])?;
    allocate(&fd, 0, PAGE).context("fallocate is no write")?;
    let fd = sealed()?;
    add_seals(&fd, F_SEAL_GROW | F_SEAL_SHRINK)?;
    expect_errno("grow", fallocate(&fd, 0, SIZE, PAGE), &[Errno::EPERM])?;
    fallocate(&fd, 0, 0, SIZE).context("fallocate inside")
}

/// A fault that began before the seal has filled its hole when F_ADD_SEALS returns, and the punch
/// frees it; later faults fill none.
fn no_hole_is_filled_once_the_seal_is_added() -> CaseResult {
    let _pages = pressure::base_pages()?;
    drop(sealed()?);
    let pages = 256;
    let mut rng = Rng::new(seed());
    let (mut filled, mut refused, mut round) = (0, 0, 0);
    // How often the two meet depends on the machine.
    while round < 40 || filled == 0 || refused == 0 {
        let fd = sealable(pages * PAGE)?;
        let view = Mapping::shared(&fd, 0, pages * PAGE)?;
        let (reached, seal_at) = (AtomicU64::new(0), rng.below(pages));
        thread::scope(|scope| -> Result<()> {
            let filler = scope.spawn(|| {
                for page in 0..pages {
                    // Each way in turn.
                    let result = match page % 3 {
                        0 => view.madvise(page * PAGE, PAGE, libc::MADV_POPULATE_READ),
                        1 => view.madvise(page * PAGE, PAGE, libc::MADV_POPULATE_WRITE),
                        _ => pwrite(&fd, &[BYTE], page * PAGE).map(drop),
                    };
                    if result.is_err() {
                        return page;
                    }
                    reached.store(page + 1, Ordering::Relaxed);
                }
                pages
            });
            while reached.load(Ordering::Relaxed) < seal_at && !filler.is_finished() {
                std::hint::spin_loop();
            }
            seal(&fd)?;
            punch(&fd, 0, pages * PAGE)?;
            let got = filler.join().map_err(|_| anyhow!("the filler panicked"))?;
            filled += got;
            refused += u32::from(got < pages);
            Ok(())
        })?;
        expect_allocated(&fd, 0, &format!("round {round}, sealed and punched"))?;
        round += 1;
    }
    println!("{filled} holes were filled, in {refused} of {round} rounds the seal stopped it");
    Ok(())
}
