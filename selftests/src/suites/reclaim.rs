// SPDX-License-Identifier: GPL-2.0
//! Memory of a guest that may be reclaimed goes to swap and comes back as it was (rule 19).

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::guest::Command;
use crate::ktap::{CaseResult, Suite};
use crate::pattern::Pattern;
use crate::pressure::{self, Accounts, Cgroup, Counts, Disk, Failing, Setting, Swap, Trace};
use crate::support::setup::{BOTH, GUEST, RECLAIMABLE, SLOT, Setup};
use crate::sys::*;
use crate::uapi::KVM_MEMORY_EXIT_FLAG_PRIVATE;
use crate::vm::Exit;
use crate::{MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "reclaim",
    [
        swapped_pages_come_back_as_they_were,
        swapped_huge_pages_come_back_as_they_were,
        multi_generational_lru_reclaims_as_well,
        guest_larger_than_its_limit_runs,
        several_vcpus_share_what_comes_back,
        working_set_stays_while_cold_memory_goes,
        working_set_stays_with_the_multi_generational_lru,
        swapped_range_can_be_prefaulted,
        swapped_range_can_be_punched,
        swapped_range_can_be_converted,
        swapped_range_outlives_its_slot,
        swapped_range_is_torn_down,
        reserved_pages_go_and_come_back_as_zeros,
        swapoff_brings_everything_back,
        full_swap_keeps_the_rest_in_memory,
        failed_allocations_lose_nothing,
        clean_looking_pages_are_not_dropped,
        swap_out_is_traced,
        accounting_is_the_same_afterwards,
        pages_come_back_from_a_disk_with_readahead: 120,
        guest_larger_than_its_limit_runs_on_a_disk: 120,
        unreadable_page_is_eio_until_it_is_punched,
        unreadable_page_is_counted_once,
    ]
);

const SIZE: u64 = 8 * MIB;
const PAGES: u64 = SIZE / PAGE;
/// The counters that grow when a page of a memfile goes to swap.
const SWAPPED: [&str; 3] = ["memfile.swap_out", "memfile.invalidate", "pswpout"];

/// A cgroup and swap in which only the guest's memory can be swapped.
struct Host {
    cgroup: Cgroup,
    swap: Swap,
}

impl Host {
    fn new() -> Result<Host> {
        lock_own_memory()?;
        Ok(Host { cgroup: Cgroup::enter()?, swap: Swap::on(64 * MIB)? })
    }

    /// With swap on a disk before zram, so that reads and writes take time.
    fn with_disk() -> Result<(Host, [Setting; 1], Swap)> {
        lock_own_memory()?;
        let zram = Swap::on(64 * MIB)?;
        let swap = Swap::on_disk(Disk::new(64 * MIB, Duration::from_micros(50))?)?;
        let readahead = Setting::set("/proc/sys/vm/page-cluster", "3")?;
        Ok((Host { cgroup: Cgroup::enter()?, swap }, [readahead], zram))
    }

    /// Swap all of a guest out, which must not run.
    fn swap_out(&self, s: &Setup, bytes: u64) -> CaseResult {
        let counts = Counts::now()?;
        s.swap_out(&self.cgroup, bytes)?;
        counts.expect_grown(&SWAPPED[..2], 1)?;
        counts.expect_grown(&SWAPPED[2..], bytes / PAGE)?;
        self.swap.expect_used(bytes, "all swapped out")?;
        expect_allocated(&s.fd, bytes, "all swapped out")
    }
}

fn goes_and_comes_back() -> CaseResult {
    let host = Host::new()?;
    for flags in [RECLAIMABLE, BOTH] {
        let mut s = Setup::filled(flags, SIZE)?;
        for generation in 0..3 {
            let pattern = Pattern::Generation(generation);
            s.vcpu.fill(s.slot.gpa, s.slot.size, pattern)?;
            host.swap_out(&s, SIZE)?;
            let counts = Counts::now()?;
            s.vcpu.verify(s.slot.gpa, s.slot.size, pattern)?;
            counts.expect_grown(&["pswpin"], PAGES)?;
            host.swap.expect_used(0, "all read again")?;
        }
    }
    Ok(())
}

fn swapped_pages_come_back_as_they_were() -> CaseResult {
    goes_and_comes_back()
}

fn swapped_huge_pages_come_back_as_they_were() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    let counts = Counts::now()?;
    goes_and_comes_back()?;
    counts.expect_grown(&["thp_file_alloc"], SIZE / crate::HUGE)?;
    println!("thp_swpout +{}", counts.grown("thp_swpout")?);
    println!("thp_swpout_fallback +{}", counts.grown("thp_swpout_fallback")?);
    Ok(())
}

fn multi_generational_lru_reclaims_as_well() -> CaseResult {
    let _generations = pressure::generations()?;
    goes_and_comes_back()
}

fn guest_larger_than_its_limit_runs() -> CaseResult {
    runs_under_a_limit(&Host::new()?, &[RECLAIMABLE, BOTH])
}

fn guest_larger_than_its_limit_runs_on_a_disk() -> CaseResult {
    let (host, _readahead, _zram) = Host::with_disk()?;
    runs_under_a_limit(&host, &[BOTH])
}

fn runs_under_a_limit(host: &Host, choices: &[u64]) -> CaseResult {
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        for &flags in choices {
            let counts = Counts::now()?;
            let limit = host.cgroup.current()? + SIZE / 2;
            host.cgroup.set("memory.max", limit)?;
            let mut s = Setup::filled(flags, SIZE)?;
            let next = Pattern::Generation(1);
            s.vcpu.fill(s.slot.gpa, s.slot.size, next)?;
            s.vcpu.verify(s.slot.gpa, s.slot.size, next)?;
            // Three sweeps in all: each page went once at least, and came back.
            counts.expect_grown(&["pswpout", "pswpin"], PAGES)?;
            ensure!(host.cgroup.line("memory.events", "oom_kill")? == 0);
            drop(s);
            host.swap.expect_used(0, "the guest is gone")?;
            host.cgroup.unlimit("memory.max")?;
        }
    }
    Ok(())
}

fn pages_come_back_from_a_disk_with_readahead() -> CaseResult {
    let (host, _readahead, _zram) = Host::with_disk()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let mut s = Setup::filled(BOTH, SIZE)?;
        for generation in 0..2 {
            let pattern = Pattern::Generation(generation);
            s.vcpu.fill(s.slot.gpa, s.slot.size, pattern)?;
            host.swap_out(&s, SIZE)?;
            host.cgroup.forget(SIZE)?;
            let counts = Counts::now()?;
            s.vcpu.verify(s.slot.gpa, s.slot.size, pattern)?;
            counts.expect_grown(&["pswpin"], PAGES)?;
            counts.expect_grown(&["swap_ra", "memfile.get_pfn_wait"], 1)?;
            host.swap.expect_used(0, "all read again")?;
        }
    }
    Ok(())
}

/// The disk has lost swapped pages.
fn unreadable_page_is_eio_until_it_is_punched() -> CaseResult {
    let (host, _readahead, _zram) = Host::with_disk()?;
    let mut s = Setup::filled(BOTH, SIZE)?;
    let gpa = s.slot.gpa;
    host.swap_out(&s, SIZE)?;
    host.cgroup.forget(SIZE)?;
    host.swap.disk().fail(PAGE, true)?;
    let exit = s.vcpu.start(Command::Load, &[gpa + 8])?;
    let wanted = Exit::MemoryFault {
        errno: Errno::EIO,
        gpa,
        size: PAGE,
        flags: KVM_MEMORY_EXIT_FLAG_PRIVATE,
    };
    ensure!(exit == wanted, "{exit:x?}");
    // A lost page stays lost, even if the disk works again.
    host.swap.disk().fail(PAGE, false)?;
    for _ in 0..2 {
        let exit = s.vcpu.run()?;
        ensure!(exit == wanted, "{exit:x?}");
    }
    expect_errno("a pre-fault", s.vcpu.raw_pre_fault(gpa, PAGE).0, &[Errno::EIO])?;
    expect_errno("fallocate", allocate(&s.fd, 0, SIZE), &[Errno::EIO])?;
    punch(&s.fd, 0, PAGE).context("punch")?;
    allocate(&s.fd, 0, PAGE).context("fallocate of a page in its place")?;
    let exit = s.vcpu.run()?;
    ensure!(exit == Exit::Done && s.vcpu.result(0) == 0, "{exit:x?}");
    s.vcpu.verify(gpa, PAGE, Pattern::ZERO)
}

/// What has been lost is not in swap: so swapoff finds the pages that are.
fn unreadable_page_is_counted_once() -> CaseResult {
    let (mut host, _readahead, _zram) = Host::with_disk()?;
    // Or all that is read with it is lost as well.
    let _alone = Setting::set("/proc/sys/vm/page-cluster", "0")?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let mut s = Setup::filled(BOTH, SIZE)?;
        let (gpa, last) = (s.slot.gpa, s.slot.gpa + SIZE - PAGE);
        host.swap_out(&s, SIZE)?;
        host.cgroup.forget(SIZE)?;
        host.swap.disk().fail(PAGE, true)?;
        s.vcpu.expect_no_page(gpa, Errno::EIO)?;
        host.swap.disk().fail(PAGE, false)?;
        // A large folio is lost as a whole.
        let left = allocated(&s.fd)?;
        ensure!(left < SIZE, "a lost page is still counted");
        let lost = SIZE - left;
        punch(&s.fd, 0, lost).context("punch")?;
        expect_allocated(&s.fd, left, "what was lost is punched")?;
        s.vcpu.verify(gpa + lost, left - PAGE, GUEST)?;
        host.swap.off().context("swapoff while the last page is in swap")?;
        s.vcpu.verify(last, PAGE, GUEST)?;
        s.vcpu.verify(gpa, lost, Pattern::ZERO)?;
        expect_allocated(&s.fd, SIZE, "all is back")?;
        drop(s);
        host.swap = Swap::on_disk(Disk::new(64 * MIB, Duration::from_micros(50))?)?;
    }
    Ok(())
}

fn several_vcpus_share_what_comes_back() -> CaseResult {
    let host = Host::new()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let mut s = Setup::filled(BOTH, SIZE)?;
        let mut others = (1..4).map(|id| s.vm.vcpu(id)).collect::<Result<Vec<_>>>()?;
        host.swap_out(&s, SIZE)?;
        let (gpa, size) = (s.slot.gpa, s.slot.size);
        thread::scope(|scope| -> CaseResult {
            let check = |vcpu: &mut crate::vm::Vcpu| vcpu.verify(gpa, size, GUEST);
            let running: Vec<_> =
                others.iter_mut().map(|vcpu| scope.spawn(move || check(vcpu))).collect();
            for vcpu in running {
                vcpu.join().map_err(|_| anyhow!("a vCPU thread panicked"))??;
            }
            Ok(())
        })?;
        s.vcpu.verify(gpa, size, GUEST)?;
        host.swap.expect_used(0, "all read again")?;
    }
    Ok(())
}

/// Refaults of the working set while the rest goes: with the guest's access bits, and, for
/// comparison, with a guest that stands still meanwhile, so that it leaves none.
/// What left while the guest used the first `hot` bytes of its memory, or did not run.
struct Left {
    hot: usize,
    /// Reclaims during which the guest did not go through its working set once.
    idle: usize,
}

fn reclaim_beside_a_working_set(host: &Host, hot: u64, running: bool) -> Result<Left> {
    let mut s = Setup::filled(BOTH, SIZE)?;
    let (gpa, ino) = (s.slot.gpa, fstat(&s.fd)?.st_ino);
    let mut worker = s.vm.vcpu(1)?;
    let trace = Trace::start(&["memfile:memfile_swap_out"])?;
    let counts = Counts::now()?;
    let mut idle = 0;
    for _ in 0..6 {
        // Touch the working set, take an eighth of the memory, count the pages that had to come
        // back.
        worker.post(Command::Watch, &[gpa, gpa + hot, PAGE, 0])?;
        let stopper = worker.stopper();
        thread::scope(|scope| -> CaseResult {
            let watching = scope.spawn(|| worker.run_endless(Command::Watch));
            while stopper.rounds() < 2 && !watching.is_finished() {
                thread::yield_now();
            }
            if running {
                let before = stopper.rounds();
                host.cgroup.reclaim(SIZE / 8)?;
                idle += usize::from(stopper.rounds() == before);
            }
            stopper.stop();
            watching.join().map_err(|_| anyhow!("the vCPU thread panicked"))??;
            Ok(())
        })?;
        if !running {
            // The guest does not run now: the second look finds no page used.
            host.cgroup.reclaim(SIZE / 8)?;
        }
    }
    let gone = trace.events()?;
    let mine = gone.iter().filter(|e| e.number("ino") == Some(ino));
    let hot_gone = mine.clone().filter(|e| e.number("start") < Some(hot / PAGE)).count();
    let all_gone = mine.count();
    println!(
        "guest {}: {hot_gone} of {all_gone} swapped out were in the working set of {} pages, \
         young +{}, {idle} reclaims without the guest",
        if running { "running" } else { "stopped" },
        hot / PAGE,
        counts.grown("memfile.young")?,
    );
    ensure!(all_gone > 0, "nothing was swapped out");
    if running {
        counts.expect_grown(&["memfile.young"], 1)?;
    }
    s.vcpu.verify(gpa, SIZE, GUEST)?;
    Ok(Left { hot: hot_gone, idle })
}

fn working_set_stays() -> CaseResult {
    let host = Host::new()?;
    let hot = SIZE / 8;
    let stopped = reclaim_beside_a_working_set(&host, hot, false)?.hot;
    // A guest that gets no processor between two looks of reclaim uses nothing: such a run says
    // nothing about access bits. Without them none is better than the one before.
    let (mut runs, mut least) = (0, usize::MAX);
    while least >= stopped / 2 && runs < 8 {
        let left = reclaim_beside_a_working_set(&host, hot, true)?;
        if left.idle == 0 {
            least = least.min(left.hot);
            runs += 1;
        }
    }
    ensure!(least < stopped / 2, "the access bits did not help: {least}, {stopped}");
    Ok(())
}

fn working_set_stays_while_cold_memory_goes() -> CaseResult {
    let _pages = pressure::base_pages()?;
    working_set_stays()
}

fn working_set_stays_with_the_multi_generational_lru() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let _generations = pressure::generations()?;
    working_set_stays()
}

fn swapped_range_can_be_prefaulted() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let host = Host::new()?;
    let mut s = Setup::filled(BOTH, SIZE)?;
    host.swap_out(&s, SIZE)?;
    let counts = Counts::now()?;
    s.vcpu.raw_pre_fault(s.slot.gpa, s.slot.size).0.context("pre-fault")?;
    counts.expect_grown(&["pswpin", "memfile.get_pfn"], PAGES)?;
    ensure!(s.resident()? == PAGES);
    host.swap.expect_used(0, "pre-faulted")?;
    let stats = s.vm.stats()?;
    ensure!(stats.get("pages_4k")? >= PAGES, "{} pages are mapped", stats.get("pages_4k")?);
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)
}

fn swapped_range_can_be_punched() -> CaseResult {
    let host = Host::new()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let mut s = Setup::filled(BOTH, SIZE)?;
        let gpa = s.slot.gpa;
        host.swap_out(&s, SIZE)?;
        // In the middle of what may be huge swap entries.
        let (start, len) = (MIB + 3 * PAGE, 3 * MIB + 5 * PAGE);
        punch(&s.fd, start, len)?;
        expect_allocated(&s.fd, SIZE - len, "after the hole")?;
        // At its ends huge pages had to come back to be cut.
        let used = host.swap.used()?;
        ensure!(used <= SIZE - len, "{} KiB are still in swap", used >> 10);
        s.vcpu.verify(gpa, start, GUEST)?;
        s.vcpu.verify(gpa + start, len, Pattern::ZERO)?;
        s.vcpu.verify(gpa + start + len, SIZE - start - len, GUEST)?;
        // Zeros take no swap, so other content.
        s.vcpu.fill(gpa + start, len, GUEST)?;
        host.swap_out(&s, SIZE)?;
        punch(&s.fd, 0, SIZE)?;
        host.swap.expect_used(0, "all punched")?;
        expect_allocated(&s.fd, 0, "all punched")?;
        s.vcpu.verify(gpa, SIZE, Pattern::ZERO)?;
    }
    Ok(())
}

fn swapped_range_can_be_converted() -> CaseResult {
    let host = Host::new()?;
    let mut s = Setup::filled(BOTH, SIZE)?;
    let (gpa, half) = (s.slot.gpa, SIZE / 2);
    host.swap_out(&s, SIZE)?;
    s.vm.set_shared(gpa, half)?;
    host.swap.expect_used(SIZE, "conversion leaves the private side where it is")?;
    s.vcpu.verify(gpa, half, Pattern::ZERO)?;
    s.vcpu.fill(gpa, half, Pattern::Generation(5))?;
    s.vm.set_private(gpa, half)?;
    s.vcpu.verify(gpa, SIZE, GUEST)?;
    host.swap.expect_used(0, "all read again")
}

fn swapped_range_outlives_its_slot() -> CaseResult {
    let host = Host::new()?;
    let mut s = Setup::filled(BOTH, SIZE)?;
    host.swap_out(&s, SIZE)?;
    s.vm.raw_delete(SLOT)?;
    host.swap.expect_used(SIZE, "without a slot")?;
    s.bind_again()?;
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
    host.swap.expect_used(0, "all read again")
}

fn swapped_range_is_torn_down() -> CaseResult {
    let host = Host::new()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let s = Setup::filled(BOTH, SIZE)?;
        host.swap_out(&s, SIZE)?;
        drop(s);
        host.swap.expect_used(0, "the guest is gone")?;
    }
    Ok(())
}

fn reserved_pages_go_and_come_back_as_zeros() -> CaseResult {
    let host = Host::new()?;
    let mut s = Setup::with_flags(BOTH, SIZE)?;
    allocate(&s.fd, 0, SIZE)?;
    for _ in 0..8 {
        host.cgroup.reclaim(SIZE)?;
    }
    println!("{} of {PAGES} pages in memory", s.resident()?);
    ensure!(s.resident()? < PAGES, "nothing was reclaimed");
    expect_allocated(&s.fd, SIZE, "still reserved")?;
    s.vcpu.verify(s.slot.gpa, s.slot.size, Pattern::ZERO)?;
    s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
    host.swap_out(&s, SIZE)?;
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)
}

fn swapoff_brings_everything_back() -> CaseResult {
    let mut host = Host::new()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let mut s = Setup::filled(BOTH, SIZE)?;
        host.swap_out(&s, SIZE)?;
        // Half of it by the guest, at the same time.
        let (gpa, half) = (s.slot.gpa, SIZE / 2);
        thread::scope(|scope| -> CaseResult {
            let reader = scope.spawn(|| s.vcpu.verify(gpa, half, GUEST));
            host.swap.off()?;
            reader.join().map_err(|_| anyhow!("the vCPU thread panicked"))?
        })?;
        ensure!(s.resident()? == PAGES, "{} of {PAGES} pages are back", s.resident()?);
        s.vcpu.verify(gpa, SIZE, GUEST)?;
        host.swap = Swap::on(64 * MIB)?;
    }
    Ok(())
}

fn full_swap_keeps_the_rest_in_memory() -> CaseResult {
    lock_own_memory()?;
    let cgroup = Cgroup::enter()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        // An odd size, so that huge pages end up in pieces.
        let swap = Swap::on(3 * MIB + 7 * PAGE)?;
        let counts = Counts::now()?;
        let mut s = Setup::filled(BOTH, SIZE)?;
        for _ in 0..4 {
            ensure!(!cgroup.reclaim(SIZE)?, "more was reclaimed than swap holds");
        }
        let (used, resident) = (swap.used()? / PAGE, s.resident()?);
        println!("huge pages {huge}: {used} pages in swap, {resident} in memory");
        counts.expect_grown(&["pswpout"], 1)?;
        ensure!(used + resident == PAGES, "pages are nowhere, or in two places");
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
        s.vcpu.fill(s.slot.gpa, s.slot.size, Pattern::Generation(3))?;
        cgroup.reclaim(SIZE)?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, Pattern::Generation(3))?;
        drop(s);
        swap.expect_used(0, "the guest is gone")?;
    }
    Ok(())
}

/// Whichever allocation fails on the way to or from swap, the guest continues with its content.
fn failed_allocations_lose_nothing() -> CaseResult {
    let host = Host::new()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let mut s = Setup::filled(BOTH, SIZE)?;
        let counts = Counts::now()?;
        for generation in 0..2 {
            let pattern = Pattern::Generation(generation);
            s.vcpu.fill(s.slot.gpa, s.slot.size, pattern)?;
            let failing = match generation {
                0 => Failing::pages(30, 100_000)?,
                _ => Failing::objects(None, 30, 100_000)?,
            };
            let result = host.cgroup.raw_reclaim(SIZE);
            drop(failing);
            println!("huge pages {huge}: reclaim ended with {result:?}");
            s.vcpu.verify(s.slot.gpa, s.slot.size, pattern)?;
            host.swap_out(&s, SIZE)?;
            // A failure to read from swap is an exit, and the next try finds all content.
            let failing = Failing::pages(30, 500)?;
            let refused = come_back(&mut s);
            drop(failing);
            println!("huge pages {huge}: {} times no memory on the way in", refused?);
            s.vcpu.verify(s.slot.gpa, s.slot.size, pattern)?;
        }
        counts.expect_grown(&["pswpout", "pswpin"], PAGES)?;
    }
    Ok(())
}

/// Let the guest touch each page, with retries: how often it was refused.
fn come_back(s: &mut Setup) -> Result<u64> {
    let (gpa, mut refused) = (s.slot.gpa, 0);
    let mut exit = s.vcpu.start(Command::Verify, &[gpa, gpa + SIZE, PAGE, 0, 0])?;
    loop {
        match exit {
            Exit::Done => return Ok(refused),
            Exit::MemoryFault { errno: Errno::ENOMEM, gpa: at, .. } => {
                ensure!((gpa..gpa + SIZE).contains(&at), "a fault at {at:#x}");
            }
            // KVM's own memory.
            Exit::Error(Errno::ENOMEM) => {}
            other => bail!("the guest left with {other:x?}"),
        }
        refused += 1;
        exit = s.vcpu.run()?;
    }
}

/// A page that nothing marks dirty would be dropped as if there were a copy.
fn clean_looking_pages_are_not_dropped() -> CaseResult {
    let host = Host::new()?;
    let mut s = Setup::filled(BOTH, SIZE)?;
    for generation in 0..3 {
        host.swap_out(&s, SIZE)?;
        // Read only: pages that come back have not been written since.
        let pattern = if generation == 0 { GUEST } else { Pattern::Generation(generation) };
        s.vcpu.verify(s.slot.gpa, s.slot.size, pattern)?;
        pressure::drop_caches()?;
        host.cgroup.reclaim(SIZE)?;
        pressure::drop_caches()?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, pattern)?;
        s.vcpu.fill(s.slot.gpa, s.slot.size, Pattern::Generation(generation + 1))?;
    }
    Ok(())
}

fn swap_out_is_traced() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let host = Host::new()?;
    let s = Setup::filled(BOTH, SIZE)?;
    let ino = fstat(&s.fd)?.st_ino;
    let trace = Trace::start(&[
        "memfile:memfile_swap_out",
        "memfile:memfile_invalidate_start",
        "memfile:memfile_invalidate_end",
    ])?;
    host.swap_out(&s, SIZE)?;
    let events = trace.events()?;
    let of = |name: &str| -> Vec<(u64, u64)> {
        let mine = events.iter().filter(|e| e.name == name && e.number("ino") == Some(ino));
        mine.filter_map(|e| Some((e.number("start")?, e.number("end")?))).collect()
    };
    let (mut started, mut ended) = (of("memfile_invalidate_start"), of("memfile_invalidate_end"));
    started.sort();
    ended.sort();
    ensure!(started == ended, "the invalidations do not pair up");
    ensure!(of("memfile_swap_out").len() as u64 >= PAGES && started.len() as u64 == PAGES);
    Ok(())
}

fn accounting_is_the_same_afterwards() -> CaseResult {
    let host = Host::new()?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        // Once for the memory that the first VM leaves allocated.
        drop(Setup::filled(BOTH, SIZE)?);
        let (before, charged) = (Accounts::now()?, host.cgroup.current()?);
        let mut s = Setup::filled(BOTH, SIZE)?;
        let held = Accounts::now()?;
        host.swap_out(&s, SIZE)?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
        held.expect_back(MIB).context("all swapped in again")?;
        host.swap_out(&s, SIZE)?;
        drop(s);
        before.expect_back(MIB).context("after the guest")?;
        host.swap.expect_used(0, "after the guest")?;
        let now = host.cgroup.current()?;
        ensure!(now.abs_diff(charged) < 2 * MIB, "{charged} bytes were charged, {now} are");
    }
    Ok(())
}
