// SPDX-License-Identifier: GPL-2.0
//! A task that waits for a page in swap delays no other task, and can be interrupted (rule 29).

use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::consumer::{Consumer, Mode, Span};
use crate::guest::Command;
use crate::ktap::{CaseResult, Suite};
use crate::pattern::Pattern;
use crate::pressure::{self, Cgroup, Counts, Disk, KPF_WRITEBACK, Setting, Swap, frames};
use crate::support::setup::{BOTH, GUEST, PORT, SLOT, Setup};
use crate::support::wait::wait_until;
use crate::sys::*;
use crate::uapi::KVM_MEMORY_EXIT_FLAG_PRIVATE;
use crate::vm::{Exit, Vm, small_pages};
use crate::{HUGE, MIB, PAGE, mem, suite};

pub static SUITE: Suite = suite!(
    "swapwait",
    [
        signal_ends_kvm_run_while_the_page_is_read: 120,
        signal_ends_kvm_run_while_the_page_is_written: 120,
        signal_ends_pre_fault_while_the_page_is_read: 120,
        pre_fault_ends_though_the_root_is_obsolete_by_then: 120,
        signal_ends_another_consumers_wait: 120,
        slot_is_deleted_while_a_vcpu_waits: 120,
        slot_is_made_while_a_vcpu_waits: 120,
        slot_is_made_while_kvm_waits: 120,
        slot_is_made_while_kvm_translates_an_address: 120,
        hole_is_punched_while_a_vcpu_waits: 120,
        slot_is_deleted_while_a_hole_cuts_a_swapped_huge_page: 120,
        several_vcpus_wait_for_one_page: 120,
        everything_comes_back_as_it_was: 120,
        swapoff_brings_everything_back_and_keeps_no_page: 120,
    ]
);

/// One window of readahead.
const SIZE: u64 = 8 * PAGE;
/// The delay of the disk: long enough for the test's steps meanwhile.
const SLOW: Duration = Duration::from_millis(500);
/// Number of attempts: the machine may be slower than the disk.
const TRIES: u32 = 5;

/// Swap on a slow disk.
struct Host {
    cgroup: Cgroup,
    swap: Swap,
    _readahead: Setting,
}

impl Host {
    fn new(delay: Duration) -> Result<Host> {
        lock_own_memory()?;
        let swap = Swap::on_disk(Disk::new(64 * MIB, delay)?)?;
        let _readahead = Setting::set("/proc/sys/vm/page-cluster", "3")?;
        Ok(Host { cgroup: Cgroup::enter()?, swap, _readahead })
    }

    fn reads(&self) -> Result<u64> {
        Ok(self.swap.disk().in_flight()?.0)
    }

    /// Writes, if nothing is being read.
    fn only_writes(&self) -> Result<u64> {
        let (reads, writes) = self.swap.disk().in_flight()?;
        Ok(if reads == 0 { writes } else { 0 })
    }

    /// Write all of a guest's memory to swap, and drop the copies in memory.
    fn swap_out(&self, s: &Setup) -> CaseResult {
        s.swap_out(&self.cgroup, s.slot.size)?;
        self.swap.disk().wait_for_writes()?;
        self.cgroup.forget(s.slot.size)
    }
}

/// A system call that waits in another thread.
struct Waiter<'a> {
    interrupter: Interrupter,
    ended: &'a dyn Fn() -> bool,
}

impl Waiter<'_> {
    /// Signals, until they have had an effect.
    fn interrupt(&self) -> CaseResult {
        while !(self.ended)() {
            self.interrupter.interrupt().context("tgkill")?;
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// Run `call` in a thread of its own, and `act` as soon as `waits` is true. Returns both results.
fn meanwhile<A, C: Send>(
    call: impl FnOnce() -> C + Send,
    mut waits: impl FnMut() -> Result<bool>,
    act: impl FnOnce(&Waiter) -> Result<A>,
) -> Result<(C, A)> {
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        let caller = scope.spawn(move || {
            // The receiver waits for this, so it cannot be gone.
            let _ = sender.send(Interrupter::of_this_thread());
            call()
        });
        let interrupter = receiver.recv().context("the caller is gone")?;
        while !caller.is_finished() && !waits()? {
            thread::yield_now();
        }
        let done = act(&Waiter { interrupter, ended: &|| caller.is_finished() })?;
        Ok((caller.join().map_err(|_| anyhow!("the caller panicked"))?, done))
    })
}

/// Repeat `attempt` until one was in time: the call returned before the disk was ready. If it had
/// to wait for the disk, none ever is.
fn in_time(mut attempt: impl FnMut() -> Result<bool>) -> CaseResult {
    for n in 1..=TRIES {
        if attempt()? {
            return Ok(());
        }
        println!("try {n}: the disk was ready first");
    }
    bail!("the disk was always ready first")
}

/// How often a consumer has waited so far.
fn waited() -> Result<u64> {
    mem::counter("get_pfn_wait")
}

/// A vCPU that touches a page and gets a signal returns before the disk is ready, and its next
/// touch finds the content unchanged.
fn kvm_run_is_interrupted(
    s: &mut Setup,
    offset: u64,
    busy: impl Fn() -> Result<u64> + Sync,
) -> Result<bool> {
    let gpa = s.slot.gpa + offset;
    s.vcpu.post(Command::Load, &[gpa])?;
    let before = waited()?;
    let ((result, left), ()) =
        meanwhile(|| (s.vcpu.enter(), busy()), || Ok(waited()? > before), |vcpu| vcpu.interrupt())?;
    let in_time = result == Err(Errno::EINTR) && left? > 0;
    // Another KVM_RUN waits until the page is there.
    let exit = if result == Ok(Exit::Done) { Exit::Done } else { s.vcpu.run()? };
    ensure!(exit == Exit::Done, "{exit:x?}");
    ensure!(s.vcpu.result(0) == GUEST.word(gpa), "the guest read {:#x}", s.vcpu.result(0));
    s.vcpu.verify(s.slot.gpa, SIZE, GUEST)?;
    Ok(in_time)
}

fn signal_ends_kvm_run_while_the_page_is_read() -> CaseResult {
    let (host, mut s) = (Host::new(SLOW)?, Setup::filled(BOTH, SIZE)?);
    in_time(|| {
        host.swap_out(&s)?;
        kvm_run_is_interrupted(&mut s, 0, || host.reads())
    })
}

fn signal_ends_kvm_run_while_the_page_is_written() -> CaseResult {
    let _lists = pressure::no_generations()?;
    let (host, mut s) = (Host::new(SLOW)?, Setup::filled(BOTH, SIZE)?);
    in_time(|| {
        let frames = frames(&s.vcpu, &s.slot, &s.fd)?;
        thread::scope(|scope| {
            // It may wait for the disk itself, without a lock on the page, so nobody waits for it.
            let reclaim = scope.spawn(|| host.cgroup.raw_reclaim(SIZE));
            let mut offset = None;
            while !reclaim.is_finished() && (offset.is_none() || s.resident()? > 0) {
                // The page whose turn it is: another one may be written by now, and read again.
                for (at, frame) in &frames {
                    if pressure::page_flags(frame.pfn)? & KPF_WRITEBACK != 0 {
                        offset = Some(*at);
                    }
                }
                thread::yield_now();
            }
            let Some(offset) = offset else { return Ok(false) };
            kvm_run_is_interrupted(&mut s, offset, || host.only_writes())
        })
    })
}

fn signal_ends_pre_fault_while_the_page_is_read() -> CaseResult {
    let (host, mut s) = (Host::new(SLOW)?, Setup::filled(BOTH, SIZE)?);
    let gpa = s.slot.gpa;
    in_time(|| {
        host.swap_out(&s)?;
        let vcpu = &s.vcpu;
        let (((result, left), busy), ()) = meanwhile(
            || (vcpu.raw_pre_fault_once(gpa, SIZE), host.reads()),
            || Ok(host.reads()? > 0),
            |vcpu| vcpu.interrupt(),
        )?;
        let in_time = busy? > 0 && left == SIZE;
        if in_time {
            expect_errno("pre-fault", result, &[Errno::EINTR])?;
        }
        let (result, left) = s.vcpu.raw_pre_fault(gpa, SIZE);
        ensure!(result == Ok(()) && left == 0, "{result:?}, {left:#x} bytes are left");
        ensure!(s.resident()? == SIZE / PAGE, "{} pages are in memory", s.resident()?);
        s.vcpu.verify(gpa, SIZE, GUEST)?;
        Ok(in_time)
    })
}

/// KVM builds its page tables anew while the vCPU waits.
fn pre_fault_ends_though_the_root_is_obsolete_by_then() -> CaseResult {
    let (host, mut s) = (Host::new(SLOW)?, Setup::filled(BOTH, SIZE)?);
    let gpa = s.slot.gpa;
    in_time(|| {
        host.swap_out(&s)?;
        let vcpu = &s.vcpu;
        let ((result, left), in_time) = meanwhile(
            || vcpu.raw_pre_fault_once(gpa, SIZE),
            || Ok(host.reads()? > 0),
            |vcpu| {
                drop(Setting::set("/sys/module/kvm/parameters/nx_huge_pages", "Y")?);
                let in_time = host.reads()? > 0;
                let ended = wait_until("the pre-fault ends", || Ok((vcpu.ended)()));
                // Or it never does.
                vcpu.interrupt()?;
                ended.map(|()| in_time)
            },
        )?;
        ensure!(result == Ok(()) && left < SIZE, "{result:?}, {left:#x} bytes are left");
        s.vcpu.verify(gpa, SIZE, GUEST)?;
        Ok(in_time)
    })
}

fn signal_ends_another_consumers_wait() -> CaseResult {
    let (host, mut s) = (Host::new(SLOW)?, Setup::filled(BOTH, SIZE)?);
    s.vm.raw_delete(SLOT)?;
    let pages = SIZE / PAGE;
    let consumer = Consumer::bound(&s.fd, Mode::Mapper(BOTH), Span::same(0, pages))?;
    in_time(|| {
        host.swap_out(&s)?;
        let ((result, busy), ()) = meanwhile(
            || (consumer.get(3), host.reads()),
            || Ok(host.reads()? > 0),
            |caller| caller.interrupt(),
        )?;
        let in_time = busy? > 0;
        if in_time {
            expect_errno("get_pfn", result, &[Errno::EINTR])?;
        }
        for frame in 0..pages {
            consumer.get(frame).with_context(|| format!("frame {frame}"))?;
        }
        Ok(in_time)
    })?;
    drop(consumer);
    s.bind_again()?;
    s.vcpu.verify(s.slot.gpa, SIZE, GUEST)
}

/// `call` waits for a page that is read; `act` is done before the page is there. Returns what the call
/// gives, and whether `act` was in time.
fn while_it_waits<C: Send>(
    host: &Host,
    call: impl FnOnce() -> C + Send,
    act: impl FnOnce() -> CaseResult,
) -> Result<(C, bool)> {
    meanwhile(
        call,
        || Ok(host.reads()? > 0),
        |_| {
            act()?;
            Ok(host.reads()? > 0)
        },
    )
}

/// Make a slot behind the guest's, and delete it.
fn make_a_slot(vm: &Vm, gpa: u64) -> CaseResult {
    let slot = vm.add_shared(SLOT + 1, gpa + SIZE, small_pages(PAGE)?)?;
    vm.delete(slot).map(drop)
}

/// [`while_it_waits`] for a vCPU that loads from the guest's first page: its exit.
fn while_a_vcpu_waits(
    host: &Host,
    s: &mut Setup,
    act: impl Fn(&Vm, &OwnedFd) -> CaseResult,
) -> Result<(Exit, bool)> {
    host.swap_out(s)?;
    let Setup { vm, vcpu, fd, slot, .. } = s;
    vcpu.post(Command::Load, &[slot.gpa])?;
    let (exit, in_time) = while_it_waits(host, || vcpu.run(), || act(vm, fd))?;
    Ok((exit?, in_time))
}

fn slot_is_deleted_while_a_vcpu_waits() -> CaseResult {
    let (host, mut s) = (Host::new(SLOW)?, Setup::filled(BOTH, SIZE)?);
    let gpa = s.slot.gpa;
    in_time(|| {
        let (exit, in_time) =
            while_a_vcpu_waits(&host, &mut s, |vm, _| vm.raw_delete(SLOT).context("delete"))?;
        s.bind_again()?;
        if in_time {
            // When the vCPU checked again, there was none.
            let wanted = Exit::MemoryFault {
                errno: Errno::EFAULT,
                gpa,
                size: PAGE,
                flags: KVM_MEMORY_EXIT_FLAG_PRIVATE,
            };
            ensure!(exit == wanted, "{exit:x?}");
        }
        if exit != Exit::Done {
            let exit = s.vcpu.run()?;
            ensure!(exit == Exit::Done, "{exit:x?}");
        }
        ensure!(s.vcpu.result(0) == GUEST.word(gpa), "the guest read {:#x}", s.vcpu.result(0));
        s.vcpu.verify(gpa, SIZE, GUEST)?;
        Ok(in_time)
    })
}

fn slot_is_made_while_a_vcpu_waits() -> CaseResult {
    let (host, mut s) = (Host::new(SLOW)?, Setup::filled(BOTH, SIZE)?);
    let gpa = s.slot.gpa;
    in_time(|| {
        let (exit, in_time) = while_a_vcpu_waits(&host, &mut s, |vm, _| make_a_slot(vm, gpa))?;
        ensure!(exit == Exit::Done, "{exit:x?}");
        ensure!(s.vcpu.result(0) == GUEST.word(gpa), "the guest read {:#x}", s.vcpu.result(0));
        s.vcpu.verify(gpa, SIZE, GUEST)?;
        Ok(in_time)
    })
}

/// KVM itself reads the page, to send its content.
fn slot_is_made_while_kvm_waits() -> CaseResult {
    let (host, mut s) = (Host::new(SLOW)?, Setup::used_by_kvm(BOTH, true, SIZE)?);
    let gpa = s.slot.gpa;
    s.vcpu.fill(gpa, SIZE, GUEST)?;
    in_time(|| {
        host.swap_out(&s)?;
        let Setup { vm, vcpu, .. } = &mut s;
        vcpu.post(Command::Output, &[gpa, 1, PORT])?;
        let (exit, in_time) = while_it_waits(&host, || vcpu.run(), || make_a_slot(vm, gpa))?;
        let exit = exit?;
        ensure!(exit == Exit::Port { port: PORT as u16, write: true }, "{exit:x?}");
        ensure!(vcpu.port_data() == &GUEST.word(gpa).to_le_bytes()[..4], "wrong bytes are sent");
        let exit = vcpu.run()?;
        ensure!(exit == Exit::Done, "{exit:x?}");
        vcpu.verify(gpa, SIZE, GUEST)?;
        Ok(in_time)
    })
}

/// Outside of KVM_RUN, KVM walks page tables that are in swap.
fn slot_is_made_while_kvm_translates_an_address() -> CaseResult {
    let (host, mut s) = (Host::new(SLOW)?, Setup::used_by_kvm(BOTH, true, SIZE)?);
    let gpa = s.slot.gpa;
    s.private_page_tables()?;
    in_time(|| {
        host.swap_out(&s)?;
        let Setup { vm, vcpu, .. } = &mut s;
        let (found, in_time) =
            while_it_waits(&host, || vcpu.translate(gpa + 1), || make_a_slot(vm, gpa))?;
        let found = found?;
        ensure!(found == Some(gpa + 1), "{found:x?}, wanted {:#x}", gpa + 1);
        Ok(in_time)
    })
}

/// The vCPU waits for a page that is punched, and gets a new one.
fn hole_is_punched_while_a_vcpu_waits() -> CaseResult {
    let (host, mut s) = (Host::new(SLOW)?, Setup::filled(BOTH, SIZE)?);
    let gpa = s.slot.gpa;
    in_time(|| {
        let (exit, in_time) =
            while_a_vcpu_waits(&host, &mut s, |_, fd| punch(fd, 0, PAGE).context("punch"))?;
        ensure!(exit == Exit::Done, "{exit:x?}");
        if in_time {
            ensure!(s.vcpu.result(0) == 0, "the guest read {:#x}", s.vcpu.result(0));
        }
        s.vcpu.verify(gpa, PAGE, Pattern::ZERO)?;
        s.vcpu.verify(gpa + PAGE, SIZE - PAGE, GUEST)?;
        s.vcpu.fill(gpa, SIZE, GUEST)?;
        Ok(in_time)
    })
}

/// The hole has to read what its begin cuts, or its end.
fn slot_is_deleted_while_a_hole_cuts_a_swapped_huge_page() -> CaseResult {
    const CUT: u64 = 105 * PAGE;
    slot_is_deleted_while_a_hole_is_made(CUT, HUGE - CUT)?;
    slot_is_deleted_while_a_hole_is_made(0, CUT)
}

fn slot_is_deleted_while_a_hole_is_made(at: u64, len: u64) -> CaseResult {
    let host = Host::new(SLOW)?;
    let _huge = pressure::shmem_huge("always")?;
    in_time(|| {
        let mut s = Setup::filled(BOTH, HUGE)?;
        let counts = Counts::now()?;
        host.swap_out(&s)?;
        if let Err(e) = counts.expect_grown(&["thp_swpout"], 1) {
            println!("it is not in swap as a whole: {e:#}");
            return Ok(false);
        }
        let (vm, fd, gpa) = (&s.vm, &s.fd, s.slot.gpa);
        let delete = || vm.raw_delete(SLOT).context("delete");
        let (hole, in_time) = while_it_waits(&host, || punch(fd, at, len), delete)?;
        hole.context("punch")?;
        s.bind_again()?;
        s.vcpu.verify(gpa + at, len, Pattern::ZERO)?;
        // Not all of the rest: the disk is slow.
        for page in [0, at.saturating_sub(PAGE), at + len, HUGE - PAGE] {
            if page < HUGE && !(at..at + len).contains(&page) {
                s.vcpu.verify(gpa + page, PAGE, GUEST)?;
            }
        }
        Ok(in_time)
    })
}

fn several_vcpus_wait_for_one_page() -> CaseResult {
    let (host, mut s) = (Host::new(SLOW)?, Setup::filled(BOTH, SIZE)?);
    let gpa = s.slot.gpa;
    let mut others = (1..4).map(|id| s.vm.vcpu(id)).collect::<Result<Vec<_>>>()?;
    in_time(|| {
        host.swap_out(&s)?;
        let before = waited()?;
        thread::scope(|scope| -> CaseResult {
            let loads: Vec<_> = others
                .iter_mut()
                .map(|vcpu| scope.spawn(move || vcpu.load(gpa + 5 * PAGE + 8)))
                .collect();
            for load in loads {
                let word = load.join().map_err(|_| anyhow!("a vCPU thread panicked"))??;
                ensure!(word == GUEST.word(gpa + 5 * PAGE + 8), "a guest read {word:#x}");
            }
            Ok(())
        })?;
        let all = waited()? - before;
        println!("get_pfn_wait +{all}");
        s.vcpu.verify(gpa, SIZE, GUEST)?;
        Ok(all >= others.len() as u64)
    })
}

/// More than one window of readahead, and requests for pages that are being read ahead.
fn everything_comes_back_as_it_was() -> CaseResult {
    let host = Host::new(Duration::from_millis(5))?;
    let size = HUGE;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let mut s = Setup::with_flags(BOTH, size)?;
        let mut other = s.vm.vcpu(1)?;
        let gpa = s.slot.gpa;
        for generation in 0..2 {
            let pattern = Pattern::Generation(generation);
            s.vcpu.fill(gpa, size, pattern)?;
            host.swap_out(&s)?;
            host.swap.expect_used(size, "all swapped out")?;
            let counts = Counts::now()?;
            thread::scope(|scope| -> CaseResult {
                let beside = scope.spawn(|| other.verify(gpa, size, pattern));
                s.vcpu.verify(gpa, size, pattern)?;
                beside.join().map_err(|_| anyhow!("the vCPU thread panicked"))?
            })?;
            counts.expect_grown(&["pswpin"], size / PAGE)?;
            counts.expect_grown(&["memfile.get_pfn_wait", "swap_ra", "swap_ra_hit"], 1)?;
            host.swap.expect_used(0, "all read again")?;
        }
    }
    Ok(())
}

/// Nearly every page is still being read when swapoff looks at it.
fn swapoff_brings_everything_back_and_keeps_no_page() -> CaseResult {
    const LARGE: u64 = 16 * MIB;
    let mut host = Host::new(Duration::from_millis(1))?;
    let before = host.cgroup.current()?;
    let mut s = Setup::filled(BOTH, LARGE)?;
    host.swap_out(&s)?;
    host.swap.off()?;
    ensure!(s.resident()? == LARGE / PAGE, "{} pages are back", s.resident()?);
    s.vcpu.verify(s.slot.gpa, LARGE, GUEST)?;
    drop(s);
    // A page is charged as long as anybody has a reference to it; CPUs keep some for a moment.
    let deadline = Instant::now() + Duration::from_secs(20);
    while host.cgroup.current()? > before + LARGE / 4 {
        let charged = host.cgroup.current()? - before;
        ensure!(Instant::now() < deadline, "{charged} bytes are still charged after the guest");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
