// SPDX-License-Identifier: GPL-2.0
//! A guest checks every word it reads while other programs of the machine press on its memory:
//! those of stress-ng, and trinity as an ordinary user on descriptors of memfiles. stress-ng has no
//! program for compaction, and its program for swap files wants a file system on a disk, which the
//! machine has not: the suite compacts memory itself, and puts swap on and off itself.
//!
//! [`crate::support::stress`] describes how a wrong word is found.

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use std::{env, fs, thread};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::ktap::{CaseResult, Suite, skip};
use crate::pressure::{self, Cgroup, Counts, Disk, MOVED, Pool, Setting, Swap};
use crate::support::backend::HUGE;
use crate::support::setup::{BOTH, GUEST, LAYOUTS, Setup};
use crate::support::stress::{Action, Bench, EVERYTHING, Host, Length, Other, PAGES};
use crate::sys::{self, lock_own_memory};
use crate::vm::Exit;
use crate::{MIB, PAGE, guest, mem, suite};

pub static SUITE: Suite = suite!(
    "pressure_host",
    [
        small_pages_beside_memory_that_grows_and_shrinks: 240,
        small_pages_beside_files_that_come_and_go: 240,
        small_pages_beside_faults_that_others_answer: 240,
        small_pages_beside_pages_that_are_merged: 240,
        small_pages_beside_swap_that_comes_and_goes: 240,
        small_pages_beside_memory_that_is_compacted: 240,
        huge_pages_of_shmem_beside_everything: 240,
        pages_of_hugetlbfs_beside_memory_that_grows_and_shrinks: 240,
        pages_of_hugetlbfs_beside_files_that_come_and_go: 240,
        calls_of_an_ordinary_user_on_memfiles: 240,
        calls_of_an_ordinary_user_on_memfiles_of_hugetlbfs: 240,
        calls_of_an_ordinary_user_on_memfiles_that_it_may_write: 240,
        calls_of_an_ordinary_user_on_memfiles_of_hugetlbfs_that_it_may_write: 240,
    ],
    hidden = true
);

/// How long each lasts: `MEMFILE_PRESSURE` seconds.
fn duration() -> Duration {
    let seconds = env::var("MEMFILE_PRESSURE").ok().and_then(|s| s.parse().ok());
    Duration::from_secs(seconds.unwrap_or(20))
}

/// Calls of trinity for each of these seconds.
const CALLS_PER_SECOND: u64 = 200;

/// A user without rights.
const NOBODY: u32 = 65534;

const MEMORY: &[&str] =
    &["--vm", "1", "--vm-bytes", "60%", "--bigheap", "1", "--madvise", "1", "--mremap", "1"];
const FILES: &[&str] =
    &["--memfd", "1", "--fallocate", "1", "--fallocate-bytes", "32m", "--shm", "1"];
const FAULTS: &[&str] = &["--userfaultfd", "1", "--fault", "1", "--mmap", "1"];
const MERGED: &[&str] =
    &["--vm", "2", "--vm-bytes", "25%", "--vm-method", "zero-one", "--vm-madvise", "mergeable"];
const SWAPPED: &[&str] = &["--pageswap", "2"];
const HUGE_MAPPINGS: &[&str] =
    &["--mmaphuge", "1", "--mmaphuge-mmaps", "256", "--vm", "1", "--vm-bytes", "50%"];

/// The path of a program; SKIP without it.
fn program(name: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    match env::split_paths(&path).map(|folder| folder.join(name)).find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => skip(format!("this machine has no {name}: `make pressure` boots one that has")),
    }
}

/// A running stress-ng, until it ends or this is dropped.
struct Pressure {
    child: Child,
    counts: Counts,
    /// Bytes of memory with errors.
    broken: u64,
}

/// What it says.
const SAID: &str = "/tmp/memfile-stress-ng";

impl Pressure {
    fn of(stressors: &[&str], length: Duration) -> Result<Pressure> {
        let mut command = Command::new(program("stress-ng")?);
        command.args(stressors).args(["--oomable", "--no-rand-seed", "--temp-path", "/dev/shm"]);
        command.args(["--timeout", &length.as_secs().to_string()]);
        let said = fs::File::create(SAID).context(SAID)?;
        command.stdout(said.try_clone().context(SAID)?).stderr(said);
        let (counts, broken) = (Counts::now()?, mem::meminfo("HardwareCorrupted")?);
        Ok(Pressure { child: command.spawn().context("start stress-ng")?, counts, broken })
    }

    /// Fail unless it has found nothing wrong. It may have wanted more memory than there is, and a
    /// part of it may have been killed for that, or by a memory error that it has made itself: then it
    /// says that it has no success, but no failure.
    fn end(mut self) -> Result<()> {
        const NO_SUCCESS: i32 = 2;
        const NO_RESOURCE: i32 = 3;
        let code = self.child.wait().context("stress-ng")?.code();
        let said = fs::read_to_string(SAID).context(SAID)?;
        print!("{said}");
        ensure!(!said.contains("fail:"), "stress-ng has found something wrong");
        match code {
            Some(0 | NO_RESOURCE) => Ok(()),
            Some(NO_SUCCESS) if mem::meminfo("HardwareCorrupted")? > self.broken => Ok(()),
            Some(NO_SUCCESS) => self.counts.expect_grown(&["oom_kill"], 1),
            code => bail!("stress-ng ended with {code:?}"),
        }
    }
}

impl Drop for Pressure {
    fn drop(&mut self) {
        // SAFETY: A child of this process that is not waited for yet, or the call fails.
        unsafe { libc::kill(self.child.id() as libc::pid_t, libc::SIGINT) };
        let _ = self.child.wait();
    }
}

/// A guest on `s` while `stressors` run and the host compacts and reclaims.
fn beside(s: Setup, stressors: &[&str]) -> CaseResult {
    beside_others(s, stressors, Vec::new())
}

/// The same while each of `others` repeats its work.
fn beside_others(s: Setup, stressors: &[&str], others: Vec<Other>) -> CaseResult {
    let host = Host { cgroup: Cgroup::enter()?, take: Box::new(pressure::compact) };
    let mut bench = Bench::of(s, LAYOUTS[0], Some(host), Length::Time(duration()))?;
    let pressure = Pressure::of(stressors, duration())?;
    let actions = [&[Action::Compact, Action::Reclaim][..], &EVERYTHING].concat();
    bench.run_beside(2, &actions, others)?;
    pressure.end()
}

/// The settings and the swap that guests under pressure need.
fn machine(huge: &str) -> Result<(Setting, Swap)> {
    program("stress-ng")?;
    lock_own_memory()?;
    Ok((pressure::shmem_huge(huge)?, Swap::on(256 * MIB)?))
}

fn small_pages(stressors: &[&str]) -> CaseResult {
    let _machine = machine("never")?;
    beside(Setup::with_flags(BOTH, PAGES * PAGE)?, stressors)
}

fn pages_of_hugetlbfs(stressors: &[&str]) -> CaseResult {
    let _machine = machine("never")?;
    let _pool = Pool::of(crate::HUGE)?.fill(8)?;
    beside(Setup::new(&HUGE, PAGES * PAGE)?, stressors)
}

fn small_pages_beside_memory_that_grows_and_shrinks() -> CaseResult {
    small_pages(MEMORY)
}

fn small_pages_beside_files_that_come_and_go() -> CaseResult {
    small_pages(FILES)
}

fn small_pages_beside_faults_that_others_answer() -> CaseResult {
    small_pages(FAULTS)
}

fn small_pages_beside_pages_that_are_merged() -> CaseResult {
    const SCANS: &str = "/sys/kernel/mm/ksm/full_scans";
    let _run = Setting::set("/sys/kernel/mm/ksm/run", "1")?;
    let before = mem::number(SCANS)?;
    small_pages(MERGED)?;
    let scans = mem::number(SCANS)? - before;
    println!("{scans} scans");
    ensure!(scans > 0, "KSM has not looked at all pages once");
    Ok(())
}

/// A small device with swap is put in front of the other one, and taken away again with what is on it
/// by then, over and over.
fn small_pages_beside_swap_that_comes_and_goes() -> CaseResult {
    let _machine = machine("never")?;
    let used = Arc::new(AtomicU64::new(0));
    let count = used.clone();
    let comes_and_goes = move || {
        let mut swap = Swap::on_disk(Disk::new(16 * MIB, Duration::from_micros(50))?)?;
        for _ in 0..100 {
            if swap.used()? > 0 {
                count.fetch_add(1, Ordering::Relaxed);
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        swap.off()
    };
    let s = Setup::with_flags(BOTH, PAGES * PAGE)?;
    beside_others(s, SWAPPED, vec![Box::new(comes_and_goes)])?;
    let used = used.load(Ordering::Relaxed);
    println!("{used} times pages were on the device when it went");
    ensure!(used > 0, "no page went to the device");
    Ok(())
}

/// Memory in large pages, for which the kernel compacts, and all of memory is compacted all the time.
fn small_pages_beside_memory_that_is_compacted() -> CaseResult {
    let _machine = machine("never")?;
    let _huge = pressure::anonymous_huge("always")?;
    let s = Setup::with_flags(BOTH, PAGES * PAGE)?;
    let counts = Counts::now()?;
    beside_others(s, HUGE_MAPPINGS, vec![Box::new(pressure::compact)])?;
    counts.expect_grown(&MOVED, 1)
}

fn huge_pages_of_shmem_beside_everything() -> CaseResult {
    let _machine = machine("always")?;
    let _huge = pressure::anonymous_huge("always")?;
    let s = Setup::with_flags(BOTH, PAGES * PAGE)?;
    beside(s, &[MEMORY, FILES, FAULTS].concat())
}

fn pages_of_hugetlbfs_beside_memory_that_grows_and_shrinks() -> CaseResult {
    pages_of_hugetlbfs(MEMORY)
}

fn pages_of_hugetlbfs_beside_files_that_come_and_go() -> CaseResult {
    pages_of_hugetlbfs(FILES)
}

/// How many calls trinity has made, and how many of them succeeded, by its last line. Fail if it did
/// not end because it had made as many as it was asked for: it also ends, with a line that says so,
/// when the kernel has become tainted, and without one when it fails itself.
fn calls_made(said: &str) -> Result<(u64, u64)> {
    let reason = said.lines().find_map(|line| line.split_once("Bailing main loop because "));
    let reason = reason.map(|(_, reason)| reason).context("trinity does not say why it ended")?;
    ensure!(reason.starts_with("Completed maximum number"), "trinity ended because {reason}");
    let ran = said.lines().find_map(|line| line.split_once("Ran ")).context("how many calls")?.1;
    let mut numbers = ran.split_whitespace().filter_map(|word| word.parse().ok());
    numbers.next().zip(numbers.next()).with_context(|| format!("trinity: {ran}"))
}

/// What a call of another user may do to the file.
#[derive(Clone, Copy, PartialEq)]
enum May {
    /// Nothing to its content: no call of another process may change that but one that punches.
    Read,
    /// All that its descriptor is for: allocate, punch, resize, seal.
    Write,
}

/// Every system call with arguments by chance, on descriptors of a memfile that a guest uses meanwhile:
/// its content stays.
fn calls_of_an_ordinary_user_on_memfiles() -> CaseResult {
    calls_on(Setup::with_flags(BOTH, PAGES * PAGE)?, May::Read)
}

fn calls_of_an_ordinary_user_on_memfiles_of_hugetlbfs() -> CaseResult {
    let _pool = Pool::of(crate::HUGE)?.fill(4)?;
    calls_on(Setup::with_flags_on(&HUGE, BOTH, 4 * crate::HUGE)?, May::Read)
}

/// The guest goes on, with what the calls have left of its memory.
fn calls_of_an_ordinary_user_on_memfiles_that_it_may_write() -> CaseResult {
    calls_on(Setup::with_flags(BOTH, PAGES * PAGE)?, May::Write)
}

fn calls_of_an_ordinary_user_on_memfiles_of_hugetlbfs_that_it_may_write() -> CaseResult {
    let _pool = Pool::of(crate::HUGE)?.fill(8)?;
    calls_on(Setup::with_flags_on(&HUGE, BOTH, 4 * crate::HUGE)?, May::Write)
}

/// The guest reads all of its memory again and again until `ended`. Returns how often it did.
fn guest_reads(s: &mut Setup, ended: &AtomicBool) -> Result<u64> {
    let mut rounds = 0;
    while !ended.load(Ordering::Relaxed) {
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
        rounds += 1;
    }
    Ok(rounds)
}

/// The guest writes all of its memory until `ended`. Where the file gives it no page now, it begins
/// again. Returns how many pages it has written.
fn guest_writes(s: &mut Setup, ended: &AtomicBool) -> Result<u64> {
    let (pages, mut written, mut refused) = (s.slot.size / PAGE, 0, 0_u64);
    'all: for page in (0..pages).cycle() {
        let mut exit = s.vcpu.start(guest::Command::Store, &[s.slot.gpa + page * PAGE, page])?;
        while exit != Exit::Done {
            ensure!(matches!(exit, Exit::MemoryFault { .. }), "page {page}: {exit:x?}");
            refused += 1;
            if ended.load(Ordering::Relaxed) {
                break 'all;
            }
            exit = s.vcpu.run()?;
        }
        written += 1;
        if ended.load(Ordering::Relaxed) {
            break;
        }
    }
    println!("the guest has been refused a page {refused} times");
    Ok(written)
}

fn calls_on(mut s: Setup, may: May) -> CaseResult {
    let program = program("trinity")?;
    let folder = Path::new("/tmp/memfile-trinity");
    let _ = fs::remove_dir_all(folder);
    fs::create_dir(folder).context("a folder")?;
    // Also if it is opened by its path.
    let (flags, mode) = match may {
        May::Read => (libc::O_RDONLY, 0o444),
        May::Write => (libc::O_RDWR, 0o666),
    };
    let file = sys::reopen(&s.fd, flags).context("open the file")?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    fs::set_permissions(path, PermissionsExt::from_mode(mode)).context("the file's mode")?;
    s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
    // Files that trinity makes for its calls: it may not remove these, and so opens the memfile.
    for number in 1..=4 {
        let file = folder.join(format!("trinity-testfile{number}"));
        std::os::unix::fs::symlink("/proc/self/fd/0", file).context("a link to the memfile")?;
    }
    let calls = CALLS_PER_SECOND * duration().as_secs();
    // No call has another descriptor. The kernel has no 32-bit programs.
    let mut trinity = Command::new(program);
    trinity
        .args(["-q", "-l", "off", "-a", "64", "--enable-fds=testfile", "-C", "2", "-N"])
        .arg(calls.to_string())
        .stdin(Stdio::from(file))
        .stderr(Stdio::inherit())
        .current_dir(folder)
        .env("HOME", folder)
        .uid(NOBODY)
        .gid(NOBODY);
    let ended = AtomicBool::new(false);
    let (output, guest) = thread::scope(|scope| {
        let guest = scope.spawn(|| match may {
            May::Read => guest_reads(&mut s, &ended),
            May::Write => guest_writes(&mut s, &ended),
        });
        let output = trinity.output().context("start trinity");
        ended.store(true, Ordering::Relaxed);
        (output, guest.join())
    });
    let (output, guest) = (output?, guest.map_err(|_| anyhow!("the guest's thread panicked"))?);
    let said = String::from_utf8_lossy(&output.stdout);
    let last: Vec<_> = said.lines().rev().take(10).collect();
    for line in said.lines().filter(|line| line.contains("seed")).chain(last.into_iter().rev()) {
        println!("{line}");
    }
    let progress = guest.context("the guest beside trinity")?;
    println!("beside it the guest has done {progress} rounds or pages");
    ensure!(output.status.success(), "trinity: {}", output.status);
    ensure!(said.contains("fd providers. initialized:1."), "trinity has not opened the memfile");
    let (made, succeeded) = calls_made(&said)?;
    ensure!(made >= calls && succeeded > 0, "{made} calls, {succeeded} of them succeeded");
    ensure!(progress > 0, "the guest has done nothing beside trinity");
    if may == May::Read {
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
    }
    Ok(())
}
