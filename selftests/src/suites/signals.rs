// SPDX-License-Identifier: GPL-2.0
//! fallocate under signals: gives up only on a fatal one (rule 22).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::ktap::CaseResult;
use crate::pattern::Pattern;
use crate::support::backend::Backend;
use crate::support::setup::{GUEST, Setup};
use crate::support::storm::{ARRIVED, in_a_storm};
use crate::sys::*;
use crate::{MIB, conformance, mem};

conformance!(
    "signals",
    [
        fallocate_survives_a_storm: 120,
        fallocate_in_a_storm_changes_no_live_byte: 120,
    ],
    memfile: [fatal_signal_ends_fallocate],
    // For a GiB the machine has no huge pages, and what was allocated before the signal stays: the
    // fatal one has a case of its own.
    huge: [
        fallocate_survives_a_storm: 120,
        fallocate_in_a_storm_changes_no_live_byte: 120,
        fatal_signal_ends_fallocate_between_two_pages,
    ],
);

/// The results of the rounds in a storm.
struct Weathered {
    completed: u32,
    /// How often fallocate returned EINTR and was called again.
    interrupted: u32,
    signals: u64,
}

/// Signals that make a storm.
const STORM: u64 = 10;

/// That many rounds of fallocate, retried until it succeeds, and a hole; more rounds until there
/// was a storm.
fn allocate_in_storm(fd: &OwnedFd, len: u64, rounds: u32) -> Result<Weathered> {
    ARRIVED.store(0, Ordering::Relaxed);
    let (completed, interrupted) = in_a_storm(|| -> Result<(u32, u32)> {
        let (mut completed, mut interrupted) = (0, 0);
        while completed < rounds || ARRIVED.load(Ordering::Relaxed) <= STORM {
            while let Err(errno) = allocate(fd.as_fd(), 0, len) {
                ensure!(errno == Errno::EINTR, "fallocate: {errno}");
                interrupted += 1;
                // A file that frees its pages at each signal may never make progress.
                if interrupted == PATIENCE {
                    return Ok((completed, interrupted));
                }
            }
            punch(fd.as_fd(), 0, len).context("punch")?;
            completed += 1;
        }
        Ok((completed, interrupted))
    })??;
    Ok(Weathered { completed, interrupted, signals: ARRIVED.load(Ordering::Relaxed) })
}

/// Interruptions after which a file counts as stuck.
const PATIENCE: u32 = 1000;

/// The file is complete after the first call, however many signals arrive.
fn fallocate_survives_a_storm(on: &'static Backend) -> CaseResult {
    let (len, rounds) = (64 * MIB, 8);
    let fd = on.file(len)?;
    let Weathered { completed, interrupted, signals } = allocate_in_storm(&fd, len, rounds)?;
    println!(
        "{completed} rounds of {} MiB and a hole, {interrupted} times EINTR, {signals} signals",
        len / MIB
    );
    ensure!(signals > STORM || interrupted == PATIENCE, "there was no storm");
    on.expect("fallocate", told(interrupted), told(0))?;
    ensure!(completed >= rounds || interrupted > 0, "it gave up");
    on.expect_allocated(&fd, 0, "in the end")
}

/// How calls ended of which so many were interrupted.
fn told(interrupted: u32) -> &'static str {
    if interrupted == 0 { "works" } else { "EINTR" }
}

fn fallocate_in_a_storm_changes_no_live_byte(on: &'static Backend) -> CaseResult {
    let size = 16 * MIB;
    let mut s = Setup::new(on, size)?;
    s.vcpu.fill(s.slot.gpa, size / 2, GUEST)?;
    ARRIVED.store(0, Ordering::Relaxed);
    let interrupted = in_a_storm(|| -> Result<u32> {
        let mut interrupted = 0;
        for _ in 0..50 {
            match allocate(&s.fd, 0, size) {
                Ok(()) => {}
                Err(Errno::EINTR) => interrupted += 1,
                Err(errno) => return Err(errno).context("fallocate"),
            }
            punch(&s.fd, size / 2, size / 2)?;
        }
        Ok(interrupted)
    })??;
    println!("{} signals, {interrupted} interruptions", ARRIVED.load(Ordering::Relaxed));
    on.expect("fallocate", told(interrupted), told(0))?;
    on.expect_allocated(&s.fd, size / 2, "after the storm")?;
    s.vcpu.verify(s.slot.gpa, size / 2, GUEST)?;
    s.vcpu.verify(s.slot.gpa + size / 2, size / 2, Pattern::ZERO)
}

fn fatal_signal_ends_fallocate(on: &'static Backend) -> CaseResult {
    let len = 1024 * MIB;
    let fd = on.file(len)?;
    let mut whole = 0;
    for delay in [1, 5, 20, 50] {
        // SAFETY: The child only makes system calls, and never returns from here.
        let pid = check(unsafe { libc::fork() })? as libc::pid_t;
        if pid == 0 {
            loop {
                let _ = allocate(&fd, 0, len);
                let _ = punch(&fd, 0, len);
            }
        }
        thread::sleep(Duration::from_millis(delay));
        let start = Instant::now();
        // SAFETY: Takes no pointer.
        check(unsafe { libc::kill(pid, libc::SIGKILL) })?;
        let mut status = 0;
        // SAFETY: The status outlives the call.
        check(unsafe { libc::waitpid(pid, &mut status, 0) })?;
        let took = start.elapsed();
        let held = allocated(&fd)?;
        println!("killed after {delay} ms: gone within {took:?}, {} MiB held", held / MIB);
        ensure!(took < Duration::from_secs(5), "it took {took:?} to die");
        let pages = mem::fdinfo(&fd, "memfile-pages")?.context("fdinfo has no memfile-pages")?;
        ensure!(pages.parse() == Ok(held / crate::PAGE), "{pages} pages, {held} bytes");
        // An interrupted call is undone; all pages are there only if it finished.
        whole += u32::from(held == len);
        punch(&fd, 0, len)?;
        on.expect_allocated(&fd, 0, "after a punch")?;
    }
    ensure!(whole < 2, "{whole} times fallocate() came to its own end");
    allocate(&fd, 0, 64 * MIB).context("the file still works")?;
    on.expect_allocated(&fd, 64 * MIB, "in the end")
}

/// hugetlbfs does not undo what an interrupted fallocate() has done: a file that holds some of its
/// pages when the process is gone tells that the call ended early. (Nothing ends a hole early.) If a
/// signal came too late for that, the next process gets one, until the case has had its time.
fn fatal_signal_ends_fallocate_between_two_pages(on: &'static Backend) -> CaseResult {
    let len = 64 * MIB;
    let fd = on.file(len)?;
    allocate(&fd, 0, len).context("without a signal")?;
    punch(&fd, 0, len)?;
    let some = || -> Result<bool> { Ok((1..len).contains(&allocated(&fd)?)) };
    for round in 1.. {
        // SAFETY: The child only makes system calls, and never returns from here.
        let pid = check(unsafe { libc::fork() })? as libc::pid_t;
        if pid == 0 {
            while allocate(&fd, 0, len).is_ok() && punch(&fd, 0, len).is_ok() {}
            // SAFETY: Nothing of the parent's is to be dropped here.
            unsafe { libc::_exit(1) };
        }
        let mut seen = some();
        while matches!(seen, Ok(false)) {
            thread::yield_now();
            seen = some();
        }
        // SAFETY: Takes no pointer.
        check(unsafe { libc::kill(pid, libc::SIGKILL) })?;
        let mut status = 0;
        // SAFETY: The status outlives the call.
        check(unsafe { libc::waitpid(pid, &mut status, 0) })?;
        seen?;
        ensure!(libc::WIFSIGNALED(status), "a call failed before the signal: {status:#x}");
        let held = allocated(&fd)?;
        println!("round {round}: {} of {} MiB are held", held / MIB, len / MIB);
        let (got, wanted) = (mem::resident_pages(&fd)?, held / crate::PAGE);
        ensure!(got == wanted, "memfile-pages reads {got}, wanted {wanted}");
        ensure!(held % on.page == 0, "{held} bytes are no whole huge pages");
        let ended = some()?;
        punch(&fd, 0, len)?;
        on.expect_allocated(&fd, 0, "after a punch")?;
        if ended {
            break;
        }
    }
    allocate(&fd, 0, len).context("the file still works")?;
    on.expect_allocated(&fd, len, "in the end")
}
