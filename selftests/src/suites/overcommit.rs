// SPDX-License-Identifier: GPL-2.0
//! Guests that together are larger than the machine: they run if their memory may be reclaimed. If
//! not, they are refused or killed, and no other process is.

use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::guest::Command;
use crate::ktap::{CaseResult, Suite};
use crate::pattern::Pattern;
use crate::pressure::{
    Accounts, Cgroup, Counts, Failing, Setting, SmallMachine, Swap, base_pages, shmem_huge,
};
use crate::support::setup::{BOTH, GUEST, PINNED, Setup};
use crate::sys::*;
use crate::uapi::KVM_MEMORY_EXIT_FLAG_PRIVATE;
use crate::vm::{Exit, sequence};
use crate::{HUGE, MIB, PAGE, mem, suite};

pub static SUITE: Suite = suite!(
    "overcommit",
    [
        fault_without_memory_exits_and_can_be_repeated,
        fault_past_the_commit_limit_exits_and_can_be_repeated,
        two_guests_larger_than_the_machine_run_if_reclaimable: 240,
        pinned_guest_larger_than_its_limit_is_killed_alone: 120,
        pinned_guests_larger_than_the_machine_are_killed_alone: 240,
    ]
);

/// Size of the machine for these tests, in bytes, or as near as possible.
const MACHINE: u64 = 256 * MIB;

/// A bit more than half of the machine's memory.
fn more_than_half() -> Result<u64> {
    Ok((mem::meminfo("MemTotal")? / 2).next_multiple_of(HUGE) + 8 * MIB)
}

/// Let a guest write one word into each page, and read them back. The last ones are read first: they
/// are in memory still, so that a guest of which a part fits waits for the other part only.
fn sweep(s: &mut Setup, pattern: Pattern) -> CaseResult {
    let part = 8 * MIB;
    let parts: Vec<_> = (0..s.slot.size).step_by(part as usize).collect();
    let place = |s: &Setup, start| (s.slot.gpa + start, part.min(s.slot.size - start));
    for &start in &parts {
        let (gpa, len) = place(s, start);
        s.vcpu.fill_pages(gpa, len, pattern)?;
    }
    for &start in parts.iter().rev() {
        let (gpa, len) = place(s, start);
        s.vcpu.verify_pages(gpa, len, pattern)?;
    }
    Ok(())
}

/// The guest stores into a page that it cannot have now, and can have later.
fn expect_refused_once<T>(errno: Errno, prevent: impl FnOnce() -> Result<T>) -> CaseResult {
    let mut s = Setup::with_flags(PINNED, MIB)?;
    let gpa = s.slot.gpa + 5 * PAGE;
    // From here on KVM has the memory that it needs for itself.
    s.vcpu.store(s.slot.gpa, 1)?;
    let prevention = prevent()?;
    s.vcpu.post(Command::Store, &[gpa, 7])?;
    // Without an alarm: a timer needs memory as well.
    let (exit, again) = (s.vcpu.enter(), s.vcpu.enter());
    drop(prevention);
    let flags = KVM_MEMORY_EXIT_FLAG_PRIVATE;
    let wanted = Exit::MemoryFault { errno, gpa, size: PAGE, flags };
    ensure!(exit == Ok(wanted) && again == exit, "the exits are {exit:x?} and {again:x?}");
    expect_allocated(&s.fd, PAGE, "refused")?;
    ensure!(s.vcpu.run()? == Exit::Done, "the access does not happen");
    ensure!(s.vcpu.load(gpa)? == 7);
    expect_allocated(&s.fd, 2 * PAGE, "allowed")
}

fn fault_without_memory_exits_and_can_be_repeated() -> CaseResult {
    let _pages = base_pages()?;
    expect_refused_once(Errno::ENOMEM, || Failing::pages(100, 100_000))
}

fn fault_past_the_commit_limit_exits_and_can_be_repeated() -> CaseResult {
    let _pages = base_pages()?;
    expect_refused_once(Errno::ENOSPC, || {
        let ratio = Setting::set("/proc/sys/vm/overcommit_ratio", "0")?;
        Ok((Setting::set("/proc/sys/vm/overcommit_memory", "2")?, ratio))
    })
}

fn two_guests_larger_than_the_machine_run_if_reclaimable() -> CaseResult {
    let _pages = base_pages()?;
    let _machine = SmallMachine::shrink_to(MACHINE)?;
    let size = more_than_half()?;
    let swap = Swap::on((2 * size).next_multiple_of(MIB))?;
    let before = Accounts::now()?;
    let counts = Counts::now()?;
    let mut guests = [Setup::with_flags(BOTH, size)?, Setup::with_flags(BOTH, size)?];
    println!("two guests of {} MiB, {} MiB free", size >> 20, mem::meminfo("MemFree")? >> 20);
    thread::scope(|scope| -> CaseResult {
        let guests = (1..).map(Pattern::Generation).zip(&mut guests);
        let running: Vec<_> =
            guests.map(|(pattern, s)| scope.spawn(move || sweep(s, pattern))).collect();
        for guest in running {
            guest.join().map_err(|_| anyhow!("a vCPU thread panicked"))??;
        }
        Ok(())
    })?;
    counts.expect_grown(&["memfile.swap_out", "pswpout", "pswpin"], 1000)?;
    println!("{} MiB of swap in use", swap.used()? >> 20);
    drop(guests);
    // Other pages that went to swap, files of the root among them, come back.
    drop(swap);
    before.expect_back(4 * MIB).context("after the guests")
}

/// Let the guest write one word into each page, if it gets the memory.
fn fills(s: &mut Setup) -> Result<bool> {
    let (gpa, size) = (s.slot.gpa, s.slot.size);
    match s.vcpu.start(Command::Fill, &sequence(gpa, size, PAGE, GUEST))? {
        Exit::Done => Ok(true),
        Exit::MemoryFault { errno: Errno::ENOMEM, .. } | Exit::Error(Errno::ENOMEM) => Ok(false),
        exit => bail!("the guest exits with {exit:x?}"),
    }
}

/// How a process ended that ran guests of its own: with 0 if they got their memory, with 1 if not.
fn run_in_child(body: impl FnOnce() -> Result<bool>) -> Result<i32> {
    // SAFETY: The child has one thread, and leaves by _exit().
    let pid = check(unsafe { libc::fork() }).context("fork")? as libc::pid_t;
    if pid == 0 {
        // The OOM killer must kill this process, and no other.
        let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
        // Its program must not be what is reclaimed instead, again and again.
        let result = lock_own_memory().and_then(|()| body());
        let code = match result {
            Ok(fits) => i32::from(!fits),
            Err(e) => {
                println!("the guest: {e:#}");
                2
            }
        };
        // SAFETY: Ends the child at once.
        unsafe { libc::_exit(code) }
    }
    let mut status = 0;
    // SAFETY: The status outlives the call.
    check(unsafe { libc::waitpid(pid, &mut status, 0) }).context("waitpid")?;
    Ok(status)
}

/// Killed, or refused for lack of memory.
fn expect_refused(status: i32) -> Result<()> {
    let killed = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL;
    let told = libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 1;
    println!("{}", if killed { "killed" } else { "not killed" });
    ensure!(killed || told, "the process ended with status {status:#x}");
    Ok(())
}

fn pinned_guest_larger_than_its_limit_is_killed_alone() -> CaseResult {
    let _swap = Swap::on(64 * MIB)?;
    let before = Accounts::now()?;
    let mut bystander = Setup::with_flags(BOTH, MIB)?;
    sweep(&mut bystander, GUEST)?;
    let (size, cgroup) = (32 * MIB, Cgroup::new()?);
    cgroup.set("memory.max", size / 2)?;
    let status = run_in_child(|| {
        cgroup.join()?;
        fills(&mut Setup::with_flags(PINNED, size)?)
    })?;
    expect_refused(status)?;
    let seen = bystander.vcpu.verify_pages(bystander.slot.gpa, MIB, GUEST);
    seen.context("another guest")?;
    drop(bystander);
    before.expect_back(2 * MIB).context("after the guests")
}

fn pinned_guests_larger_than_the_machine_are_killed_alone() -> CaseResult {
    let _machine = SmallMachine::shrink_to(MACHINE)?;
    // Huge pages as long as there are any: that is faster.
    let _huge = shmem_huge("always")?;
    let size = more_than_half()?;
    let swap = Swap::on(2 * size)?;
    let before = Accounts::now()?;
    let mut bystander = Setup::with_flags(BOTH, MIB)?;
    sweep(&mut bystander, GUEST)?;
    let status = run_in_child(|| {
        let mut guests = Vec::new();
        for _ in 0..2 {
            let mut s = Setup::with_flags(PINNED, size)?;
            if !fills(&mut s)? {
                return Ok(false);
            }
            println!("a guest of {} MiB has all its memory", size >> 20);
            guests.push(s);
        }
        Ok(true)
    })?;
    expect_refused(status)?;
    let seen = bystander.vcpu.verify_pages(bystander.slot.gpa, MIB, GUEST);
    seen.context("another guest")?;
    drop(bystander);
    ensure!(mem::meminfo("MemFree")? > 64 * PAGE);
    drop(swap);
    before.expect_back(16 * MIB).context("after the guests")
}
