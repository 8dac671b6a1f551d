// SPDX-License-Identifier: GPL-2.0
//! Ways that do reach the content of a memfile: `Documentation/security.rst`, sentence by sentence.
//! The suites `access` and `property` test access through the file itself.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, anyhow, ensure};

use crate::consumer::{Consumer, MAPPER, Span};
use crate::ktap::{CaseResult, Suite, skip};
use crate::pressure::{self, Cgroup, Swap, frames};
use crate::support::setup::{BOTH, GUEST, LAYOUTS, PINNED, RECLAIMABLE, Setup};
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{Private, Vm, region, small_pages};
use crate::{HUGE, MIB, PAGE, mem, suite};

pub static SUITE: Suite = suite!(
    "security",
    [
        another_vm_gets_the_content_through_the_descriptor,
        file_for_one_vm_is_refused_to_all_others,
        file_for_one_vm_is_that_of_the_vm_that_bound_it,
        one_vm_without_inaccessible_is_refused,
        root_reads_the_content_in_dev_mem,
        root_reads_the_content_in_kcore,
        reclaimable_content_lies_in_swap_in_clear,
        pinned_content_never_lies_in_swap,
        pinned_memory_counts_neither_as_locked_nor_as_resident,
        memlock_limit_does_not_bind_private_memory,
        private_memory_does_not_raise_the_oom_score,
        oom_killer_spares_the_vmm_whose_guest_has_most,
    ]
);

const SIZE: u64 = MIB;

/// The guest's content at the beginning of a page of the slot.
fn head(s: &Setup, page: u64) -> [u8; 16] {
    let gpa = s.slot.gpa + page * PAGE;
    let words = [gpa, gpa + 8].map(|addr| GUEST.word(addr).to_ne_bytes());
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&words[0]);
    bytes[8..].copy_from_slice(&words[1]);
    bytes
}

fn guest(flags: u64) -> Result<Setup> {
    let mut s = Setup::with_flags(flags, SIZE)?;
    s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
    Ok(s)
}

fn another_vm_gets_the_content_through_the_descriptor() -> CaseResult {
    let mut s = guest(PINNED)?.pass_on(PINNED)?;
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)
}

fn file_for_one_vm_is_refused_to_all_others() -> CaseResult {
    let fd = memfile_for_one_vm(SIZE + HUGE)?;
    let first = Setup::on_file(Vm::protected()?, Private::Memfile, fd, SIZE, LAYOUTS[0])?;
    let fd = first.fd.try_clone()?;
    let other = Vm::protected()?;
    let refused = |when: &str| {
        let view = small_pages(PAGE)?;
        // A part without a binding.
        let private = Some((Private::Memfile, fd.as_fd(), SIZE));
        let request = region(1, LAYOUTS[0].gpa, &view, private);
        expect_errno(when, other.raw_set_region(&request), &[Errno::EPERM])
    };
    refused("another VM")?;
    let consumer = Consumer::new()?;
    let span = Span { pgoff: SIZE / PAGE, pages: 1, frame: 0 };
    expect_errno("another consumer", consumer.bind(&fd, MAPPER, span), &[Errno::EPERM])?;
    drop(first);
    refused("when the first one is gone")?;
    punch(&fd, 0, SIZE + HUGE)?;
    refused("when it is empty")
}

fn file_for_one_vm_is_that_of_the_vm_that_bound_it() -> CaseResult {
    let fd = memfile_for_one_vm(SIZE + HUGE)?;
    let mut s = Setup::on_file(Vm::protected()?, Private::Memfile, fd, SIZE, LAYOUTS[0])?;
    s.fill_both()?;
    for _ in 0..3 {
        s.vm.raw_delete(s.slot.id)?;
        s.bind_again()?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
    }
    Ok(())
}

fn one_vm_without_inaccessible_is_refused() -> CaseResult {
    drop(memfile_unsized()?);
    for others in [0, MFD_CLOEXEC, MFD_ALLOW_SEALING, MFD_HUGETLB] {
        let result = memfd_create(MFD_ONE_VM | others);
        expect_errno(&format!("flags {others:#x}"), result, &[Errno::EINVAL])?;
    }
    Ok(())
}

/// Where page 3 of a guest's slot is, in bytes of physical memory.
fn physical(s: &Setup) -> Result<u64> {
    let frames = frames(&s.vcpu, &s.slot, &s.fd)?;
    let frame = frames.get(&(3 * PAGE)).context("page 3 has no frame")?;
    Ok(frame.pfn * PAGE)
}

fn root_reads_the_content_in_dev_mem() -> CaseResult {
    require_root()?;
    let Ok(memory) = File::open("/dev/mem") else {
        return skip("the kernel has no /dev/mem");
    };
    let s = guest(PINNED)?;
    let mut bytes = [0; 16];
    memory.read_exact_at(&mut bytes, physical(&s)?).context("read /dev/mem")?;
    ensure!(bytes == head(&s, 3), "/dev/mem has {bytes:x?}");
    Ok(())
}

fn root_reads_the_content_in_kcore() -> CaseResult {
    require_root()?;
    let Ok(core) = File::open("/proc/kcore") else {
        return skip("the kernel has no /proc/kcore");
    };
    let s = guest(PINNED)?;
    let mut bytes = [0; 16];
    let offset = pressure::kcore_offset(&core, physical(&s)?)?;
    core.read_exact_at(&mut bytes, offset).context("read /proc/kcore")?;
    ensure!(bytes == head(&s, 3), "/proc/kcore has {bytes:x?}");
    Ok(())
}

/// How many pages of the guest's content a swap device has.
fn in_swap(s: &Setup, swap: &Swap) -> Result<u64> {
    pressure::drop_caches()?;
    let content = fs::read(swap.device()).context("read the swap device")?;
    let heads: Vec<[u8; 16]> = (0..SIZE / PAGE).map(|page| head(s, page)).collect();
    let pages = content.chunks_exact(PAGE as usize);
    Ok(pages.filter(|page| heads.iter().any(|head| page.starts_with(head))).count() as u64)
}

fn reclaim_all(cgroup: &Cgroup) -> Result<()> {
    for _ in 0..4 {
        pressure::drop_caches()?;
        cgroup.reclaim(2 * SIZE)?;
    }
    Ok(())
}

fn reclaimable_content_lies_in_swap_in_clear() -> CaseResult {
    lock_own_memory()?;
    let (cgroup, swap) = (Cgroup::enter()?, Swap::on(16 * MIB)?);
    for flags in [RECLAIMABLE, BOTH] {
        let s = guest(flags)?;
        ensure!(in_swap(&s, &swap)? == 0, "content in swap before reclaim");
        reclaim_all(&cgroup)?;
        let pages = in_swap(&s, &swap)?;
        ensure!(pages > SIZE / PAGE / 2, "only {pages} pages are in swap");
    }
    Ok(())
}

fn pinned_content_never_lies_in_swap() -> CaseResult {
    lock_own_memory()?;
    let (cgroup, swap) = (Cgroup::enter()?, Swap::on(16 * MIB)?);
    let s = guest(PINNED)?;
    reclaim_all(&cgroup)?;
    ensure!(in_swap(&s, &swap)? == 0, "while the VM lives");
    // Neither when no VM has it bound any more.
    s.vm.raw_delete(s.slot.id)?;
    reclaim_all(&cgroup)?;
    ensure!(in_swap(&s, &swap)? == 0, "when its slot is gone");
    Ok(())
}

/// A line of `/proc/self/status`, in bytes.
fn status(key: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(number.with_context(|| format!("/proc/self/status has no {key}"))? << 10)
}

fn pinned_memory_counts_neither_as_locked_nor_as_resident() -> CaseResult {
    const LARGE: u64 = 32 * MIB;
    let mut s = Setup::with_flags(PINNED, LARGE)?;
    let before = (status("VmLck")?, status("VmPin")?, status("VmRSS")?);
    let content = mem::content()?;
    s.vcpu.fill_pages(s.slot.gpa, s.slot.size, GUEST)?;
    let after = (status("VmLck")?, status("VmPin")?, status("VmRSS")?);
    ensure!(after.0 == before.0 && after.1 == before.1, "locked: {before:?}, {after:?}");
    ensure!(after.2 < before.2 + LARGE / 4, "resident: {before:?}, {after:?}");
    // It is allocated nevertheless.
    expect_allocated(&s.fd, LARGE, "all written")?;
    let grown = mem::content()?.saturating_sub(content);
    ensure!(grown > LARGE / 2, "the machine has {} KiB more in use", grown >> 10);
    Ok(())
}

/// As an ordinary user, because root may lock any amount.
fn memlock_limit_does_not_bind_private_memory() -> CaseResult {
    require_root()?;
    const USER: u32 = 65534;
    let mut guests = [PINNED, BOTH].map(|flags| Setup::with_flags(flags, SIZE));
    let limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: The limit outlives the call. Only this case's process changes its user.
    unsafe {
        check(libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit)).context("RLIMIT_MEMLOCK")?;
        check(libc::setresuid(USER, USER, USER)).context("setresuid")?;
    }
    let own = Mapping::anonymous(PAGE)?;
    // SAFETY: The mapping is that long.
    let locked = check(unsafe { libc::mlock(own.addr() as *const _, PAGE as usize) });
    expect_errno("mlock", locked, &[Errno::EPERM, Errno::ENOMEM])?;
    for s in &mut guests {
        let s = s.as_mut().map_err(|e| anyhow!("{e:#}"))?;
        s.vcpu.fill_pages(s.slot.gpa, SIZE / 2, GUEST)?;
        allocate(&s.fd, 0, SIZE).context("fallocate")?;
        let got = allocated(&s.fd)?;
        ensure!(got >= SIZE, "{} KiB are allocated", got >> 10);
    }
    Ok(())
}

/// What the OOM killer compares, for this process.
fn oom_score() -> Result<u64> {
    pressure::read_number("/proc/self/oom_score")
}

fn private_memory_does_not_raise_the_oom_score() -> CaseResult {
    const LARGE: u64 = 128 * MIB;
    let mut guests = [PINNED, BOTH]
        .map(|flags| Setup::with_flags(flags, LARGE / 2))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let before = (oom_score()?, status("RssShmem")?);
    for s in &mut guests {
        s.vcpu.fill_pages(s.slot.gpa, s.slot.size, GUEST)?;
        expect_allocated(&s.fd, s.slot.size, "all written")?;
    }
    let with_private = (oom_score()?, status("RssShmem")?);
    drop(guests);
    let own = Mapping::anonymous(LARGE)?;
    for offset in (0..LARGE).step_by(PAGE as usize) {
        own.store(offset, 1);
    }
    let with_own = oom_score()?;
    println!(
        "{before:?}, with private memory {with_private:?}, with as much of its own {with_own}"
    );
    let grown = with_own.saturating_sub(before.0);
    ensure!(grown >= 8, "memory of its own raises the score by {grown} only");
    ensure!(with_private.0 < before.0 + grown / 4, "private memory raises the score");
    ensure!(with_private.1 < before.1 + MIB, "private memory is resident");
    Ok(())
}

/// The limit of a cgroup is reached by a process with less memory than this one's guest: it is
/// killed, and the guest's memory stays.
fn oom_killer_spares_the_vmm_whose_guest_has_most() -> CaseResult {
    const PRIVATE: u64 = 64 * MIB;
    const OTHER: u64 = 24 * MIB;
    let cgroup = Cgroup::enter()?;
    cgroup.set("memory.swap.max", 0)?;
    let mut s = Setup::with_flags(PINNED, PRIVATE)?;
    s.vcpu.fill_pages(s.slot.gpa, PRIVATE, GUEST)?;
    cgroup.set("memory.max", cgroup.current()? + OTHER / 2)?;
    // SAFETY: The child uses memory and exits.
    let pid = check(unsafe { libc::fork() }).context("fork")? as libc::pid_t;
    if pid == 0 {
        let done = Mapping::anonymous(OTHER).map(|own| {
            for offset in (0..OTHER).step_by(PAGE as usize) {
                own.store(offset, 1);
            }
        });
        // SAFETY: Ends the child.
        unsafe { libc::_exit(i32::from(done.is_err())) };
    }
    let mut status = 0;
    // SAFETY: The status outlives the call.
    check(unsafe { libc::waitpid(pid, &mut status, 0) }).context("waitpid")?;
    let killed = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL;
    ensure!(killed, "the other process ended with status {status:#x}");
    let kills = cgroup.line("memory.events", "oom_kill")?;
    ensure!(kills == 1, "{kills} processes were killed");
    expect_allocated(&s.fd, PRIVATE, "the other one was killed")?;
    s.vcpu.verify_pages(s.slot.gpa, PRIVATE, GUEST)
}
