// SPDX-License-Identifier: GPL-2.0
//! A real Linux in a real QEMU on memory of every kind: what it costs the host, and that it never
//! reads anything but its own.
//!
//! Booting takes long, so the cases run in one child and share a guest per kind; each leaves it as
//! it found it. `scripts/check` boots a machine for this suite, with QEMU and the guests' kernels
//! in it.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::json;

use crate::demo::ragged_memory;
use crate::guest::Command as Order;
use crate::ktap::{CaseResult, Suite, skip};
use crate::module::Module;
use crate::pattern::Pattern;
use crate::pressure::{self, Accounts, Cgroup, Counts, Pool, Setting, Swap, Trace};
use crate::qemu::{Config, Hold, Kind, Lab, Layout, Machine, Memory, kvm_figure, memfds};
use crate::sys::{self, Errno, lock_own_memory};
use crate::uapi::{
    F_SEAL_AUTO_ALLOCATE, KVM_MAP_GPA_RANGE_ENCRYPTED, KVM_MEMORY_EXIT_FLAG_PRIVATE,
};
use crate::vm::{Exit, Private, Vm, region, small_pages};
use crate::{GIB, HUGE, MIB, PAGE, mem, suite};

pub static SUITE: Suite = suite!(
    "qemu",
    [
        guest_boots_and_keeps_its_data_on_anonymous_memory: 300,
        guest_boots_and_keeps_its_data_on_a_shared_memfd: 300,
        guest_boots_and_keeps_its_data_on_movable_memory: 300,
        guest_boots_and_keeps_its_data_on_reclaimable_memory: 300,
        guest_boots_and_keeps_its_data_on_guest_memfd: 300,
        guest_memfd_has_no_dirty_log_and_qemu_continues: 300,
        guest_boots_and_keeps_its_data_on_pinned_memory: 300,
        pinned_memory_stays_under_compaction_and_reclaim: 300,
        balloon_gives_back_what_the_guest_has_freed: 300,
        qemu_killed_while_its_balloon_grows_leaves_no_memory_behind: 300,
        guest_boots_and_keeps_its_data_on_movable_and_reclaimable_memory: 300,
        pages_exist_exactly_where_the_guest_has_been: 300,
        guest_converts_pages_by_hypercall: 300,
        guest_asks_for_no_conversion_by_an_access: 300,
        whole_guest_is_swapped_out_and_comes_back: 300,
        compaction_moves_pages_of_a_running_guest: 300,
        killed_qemu_leaves_no_memory_behind: 300,
        qemu_killed_while_the_host_compacts_leaves_no_memory_behind: 300,
        qemu_killed_while_the_host_reclaims_leaves_no_memory_behind: 300,
        qemu_killed_while_its_guest_converts_leaves_no_memory_behind: 300,
        free_pages_that_the_guest_reports_are_given_back: 300,
        qemu_killed_while_its_guest_reports_leaves_no_memory_behind: 300,
        private_memory_has_no_dirty_log_and_qemu_continues: 300,
        conversion_of_a_range_is_of_each_part_or_refused: 300,
        conversion_whose_discard_fails_is_none: 300,
        conversion_that_overtakes_a_fault_stays: 600,
        conversions_of_one_page_follow_each_other: 600,
        guest_of_two_cpus_converts_from_both_at_once: 600,
        dump_of_the_guest_is_refused: 300,
        dimm_that_is_plugged_again_has_nothing_shared: 300,
        shared_page_costs_one_page_where_huge_pages_are_on: 600,
        dimm_that_kvm_refuses_is_an_error_and_the_guest_continues: 300,
        seal_on_the_shared_side_finds_stray_accesses: 300,
        guest_that_does_not_come_up_says_why_and_ends_with_125: 120,
        command_in_a_guest_gives_its_exit_code: 300,
        migration_snapshots_and_smm_are_refused: 120,
        dimm_may_have_any_size: 120,
        settings_that_private_memory_cannot_follow_are_refused: 120,
        reset_is_a_shutdown_whatever_the_user_sets: 120,
        prealloc_is_complete_whatever_signals_come: 120,
        prealloc_goes_on_after_every_interrupted_call: 120,
        prealloc_of_a_guest_memfd_goes_on_after_signals: 120,
        prealloc_that_fails_ends_qemu_with_a_sentence: 120,
        prealloc_without_memory_refuses_to_start_and_leaves_nothing: 120,
        qemu_killed_while_it_starts_leaves_no_memory_behind: 120,
        guest_boots_on_huge_pages_and_the_pool_gets_them_back: 300,
        guest_without_a_huge_page_stops_until_there_is_one: 300,
        balloon_says_that_it_frees_no_huge_page: 300,
        guest_boots_with_all_its_memory_in_huge_pages: 600,
        prealloc_of_huge_pages_takes_exactly_those_of_the_guest: 300,
        poison_ends_one_process_of_the_guest_and_no_other: 300,
        guest_boots_and_keeps_its_data_on_memory_allocated_ahead: 300,
        every_page_of_the_file_was_asked_for: 300,
        guest_boots_with_all_its_memory_private: 600,
        guest_boots_with_a_private_node_below_4_gib: 300,
        firmware_that_the_user_names_gets_the_kernel_when_it_asks: 600,
        whole_guest_is_swapped_out_with_its_kernel_and_page_tables: 300,
        stock_kernel_boots_with_all_its_memory_private: 600,
        stock_kernel_boots_and_virtio_mem_gives_memory_back: 600,
        two_guests_larger_than_the_machine_run_if_reclaimable: 600,
    ],
    together = true
);

/// Longer cases: they run only by name.
pub static LONG: Suite = suite!(
    "qemu_long",
    [
        guest_of_32_gib_boots_in_a_machine_of_2: 1800,
        every_kind_boots_twenty_times_as_a_dimm: 14400,
        every_kind_boots_twenty_times_as_virtio_mem: 14400,
        every_kind_boots_twenty_times_as_all_memory: 14400,
        guest_boots_twenty_times_with_kvmclock: 3600,
    ],
    hidden = true
);

/// Bytes of the DIMM that most guests have, and the one whose balloon is to be filled.
const SIZE: u64 = 512 * MIB;
const SMALL: u64 = 256 * MIB;
/// Pages that a guest's own processes may use meanwhile.
const SLACK: u64 = 128;

/// A guest, and the state of the host before it.
struct Fixture {
    kind: Kind,
    reporting: bool,
    // In this order: a cgroup can be removed when it has no process.
    machine: Machine,
    cgroup: Cgroup,
    before: Accounts,
}

/// The guest of the last case.
static GUEST: Mutex<Option<Fixture>> = Mutex::new(None);

/// QEMU and a guest's kernel, on a kernel with memfiles. SKIP without.
fn lab() -> Result<Lab> {
    drop(sys::memfile(PAGE)?);
    Lab::find()
}

fn slot() -> Result<MutexGuard<'static, Option<Fixture>>> {
    GUEST.lock().map_err(|_| anyhow!("a case panicked with the guest"))
}

/// End the current guest, and check that its memory comes back.
fn give_up(slot: &mut Option<Fixture>) -> CaseResult {
    let Some(Fixture { machine, cgroup, before, .. }) = slot.take() else { return Ok(()) };
    machine.kill()?;
    drop(cgroup);
    before.expect_back(2 * MIB).context("after QEMU")
}

/// Do `work` with a guest on memory of this kind, the current one or a new one. Prints its cost
/// when it is up.
fn with_guest(kind: Kind, work: impl FnOnce(&mut Fixture) -> CaseResult) -> CaseResult {
    with_this_guest(kind, false, work)
}

/// The same. Only a guest that is `reporting` returns pages without a request.
fn with_this_guest(
    kind: Kind,
    reporting: bool,
    work: impl FnOnce(&mut Fixture) -> CaseResult,
) -> CaseResult {
    let mut slot = slot()?;
    if slot.as_ref().is_none_or(|fixture| (fixture.kind, fixture.reporting) != (kind, reporting)) {
        give_up(&mut slot)?;
        let lab = lab()?;
        lock_own_memory()?;
        let before = Accounts::now()?;
        let cgroup = Cgroup::new()?;
        // The balloon of pinned memory is to be filled.
        let size = if kind == Kind::PINNED { SMALL } else { SIZE };
        let config = Config::new(Memory::dimm(kind, size)).with_balloon(reporting);
        let config = config.within(&cgroup);
        let mut machine = Machine::start(&lab, &config)?;
        let took = machine.boot()?;
        println!("Linux {} after {:.1} s", machine.guest().release(), took.as_secs_f64());
        *slot = Some(Fixture { kind, reporting, machine, cgroup, before });
    }
    match slot.as_mut() {
        Some(fixture) => work(fixture),
        None => bail!("there is no guest"),
    }
}

impl Fixture {
    /// Wait until fewer than that many pages of private memory are allocated.
    fn expect_fewer_pages(&self, wanted: u64, why: &str) -> CaseResult {
        let end = Instant::now() + Duration::from_secs(60) * sys::time_factor();
        loop {
            let pages = self.machine.private_pages()?;
            if pages < wanted {
                println!("{why}: {pages} pages");
                return Ok(());
            }
            ensure!(Instant::now() < end, "{why}: {pages} pages, not fewer than {wanted}");
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// Memory, files in the page cache and processes of a guest, all with content.
const PARTS: [(&str, &str, u64); 2] = [("memory", "m", 24 * MIB), ("file", "f", 12 * MIB)];
const PROCESSES: u64 = 4;
const PROCESS: u64 = 2 * MIB;

fn fill(machine: &mut Machine, seed: u64) -> CaseResult {
    let guest = machine.guest();
    for (kind, name, size) in PARTS {
        guest.hold(kind, name, size, seed)?;
    }
    guest.fork("memory", PROCESSES, PROCESS, seed + 1)
}

fn verify(machine: &mut Machine, seed: u64) -> CaseResult {
    let guest = machine.guest();
    for (_, name, _) in PARTS {
        guest.verify(name, seed)?;
    }
    guest.check_processes()
}

fn release(machine: &mut Machine) -> CaseResult {
    let guest = machine.guest();
    for (_, name, _) in PARTS {
        guest.release_area(name)?;
    }
    guest.join()
}

/// Bytes that [`fill`] writes.
fn filled() -> u64 {
    PARTS.iter().map(|(_, _, size)| size).sum::<u64>() + PROCESSES * PROCESS
}

fn boots_and_keeps_its_data(kind: Kind) -> CaseResult {
    with_guest(kind, |fixture| {
        let machine = &mut fixture.machine;
        let before = mem::content()?;
        fill(machine, 1)?;
        verify(machine, 1)?;
        let grown = mem::content()?.saturating_sub(before);
        println!("{} KiB written, {} KiB more", filled() >> 10, grown >> 10);
        // Some of it lies in pages that the guest has used before.
        ensure!(grown > filled() / 4 && grown < filled() + 16 * MIB, "grown by {grown}");
        if let Kind::Private { .. } = kind {
            let (allocated, resident) = machine.private()?;
            ensure!(allocated == resident * PAGE, "{allocated} bytes, {resident} pages");
            let shared = machine.shared()?;
            ensure!(shared < 4 * MIB, "{} KiB beside the private memory", shared >> 10);
        }
        release(machine)
    })
}

fn guest_boots_and_keeps_its_data_on_anonymous_memory() -> CaseResult {
    boots_and_keeps_its_data(Kind::Anonymous)
}

fn guest_boots_and_keeps_its_data_on_a_shared_memfd() -> CaseResult {
    boots_and_keeps_its_data(Kind::SharedMemfd)
}

fn guest_boots_and_keeps_its_data_on_movable_memory() -> CaseResult {
    boots_and_keeps_its_data(Kind::MOVABLE)
}

fn guest_boots_and_keeps_its_data_on_reclaimable_memory() -> CaseResult {
    boots_and_keeps_its_data(Kind::RECLAIMABLE)
}

fn guest_boots_and_keeps_its_data_on_guest_memfd() -> CaseResult {
    boots_and_keeps_its_data(Kind::GuestMemfd)
}

fn guest_boots_and_keeps_its_data_on_pinned_memory() -> CaseResult {
    boots_and_keeps_its_data(Kind::PINNED)
}

fn guest_boots_and_keeps_its_data_on_movable_and_reclaimable_memory() -> CaseResult {
    boots_and_keeps_its_data(Kind::BOTH)
}

/// The counters that grow when pages move or go to swap.
const MOVED: [&str; 2] = ["memfile.migrate", "memfile.swap_out"];

fn pinned_memory_stays_under_compaction_and_reclaim() -> CaseResult {
    with_guest(Kind::PINNED, |fixture| {
        let _swap = Swap::on(SIZE)?;
        fill(&mut fixture.machine, 2)?;
        let (before, counts) = (fixture.machine.private()?, Counts::now()?);
        let ragged = ragged_memory(64 * MIB)?;
        for _ in 0..3 {
            pressure::compact()?;
            fixture.cgroup.reclaim(64 * MIB)?;
            verify(&mut fixture.machine, 2)?;
        }
        drop(ragged);
        let after = fixture.machine.private()?;
        println!("{} pages before, {} after", before.1, after.1);
        ensure!(after.1 >= before.1 && after.0 == after.1 * PAGE, "some are gone");
        counts.expect_same(&MOVED)?;
        release(&mut fixture.machine)
    })
}

fn balloon_gives_back_what_the_guest_has_freed() -> CaseResult {
    // Nearly all of the DIMM that is free, so that most of what was freed is in the balloon.
    const FREED: u64 = 96 * MIB;
    const BALLOON: u64 = 176 * MIB;
    with_guest(Kind::PINNED, |fixture| {
        let all = fixture.machine.actual_memory()?;
        fixture.machine.guest().hold("memory", "keep", 8 * MIB, 5)?;
        fixture.machine.guest().hold("memory", "freed", FREED, 4)?;
        fixture.machine.guest().release_area("freed")?;
        let full = fixture.machine.private_pages()?;
        // The host does not know it yet.
        ensure!(full >= FREED / PAGE, "{full} pages");
        let counts = Counts::now()?;
        fixture.machine.balloon(all - BALLOON)?;
        let holes = counts.grown("memfile.invalidate")?;
        println!("{full} pages before, {} MiB in the balloon, {holes} holes", BALLOON / MIB);
        // QEMU makes one of adjacent pages, of which a request has up to 256.
        ensure!(holes < BALLOON / PAGE / 32, "{holes} holes for {} pages", BALLOON / PAGE);
        fixture.expect_fewer_pages(full - FREED / PAGE / 2, "with the balloon")?;
        fixture.machine.guest().verify("keep", 5)?;
        // Pages that it gets back are zeroed.
        fixture.machine.balloon(all)?;
        fixture.machine.guest().hold("memory", "again", FREED / 2, 6)?;
        for (name, seed) in [("again", 6), ("keep", 5)] {
            fixture.machine.guest().verify(name, seed)?;
            fixture.machine.guest().release_area(name)?;
        }
        Ok(())
    })
}

fn pages_exist_exactly_where_the_guest_has_been() -> CaseResult {
    const MORE: u64 = 64 * MIB;
    with_guest(Kind::BOTH, |fixture| {
        let machine = &mut fixture.machine;
        let (before, shmem) = (machine.private_pages()?, mem::meminfo("Shmem")?);
        let counts = Counts::now()?;
        machine.guest().hold("locked", "exact", MORE, 7)?;
        machine.guest().verify("exact", 7)?;
        let (allocated, resident) = machine.private()?;
        let grown = resident - before;
        println!("{before} pages before, {grown} more for {}", MORE / PAGE);
        ensure!(allocated == resident * PAGE, "{allocated} bytes, {resident} pages");
        ensure!(grown <= MORE / PAGE + SLACK, "the guest has not touched that many");
        ensure!(grown + before >= MORE / PAGE, "the guest has touched more");
        // Each page was requested once, and is a page of the host.
        let asked = counts.grown("memfile.get_pfn")?;
        ensure!(asked == grown, "{asked} pages were asked for");
        mem::refresh_counters();
        let shmem = (mem::meminfo("Shmem")? - shmem) / PAGE;
        ensure!(shmem.abs_diff(grown) <= SLACK, "{shmem} pages of Shmem more");
        machine.guest().release_area("exact")
    })
}

fn guest_converts_pages_by_hypercall() -> CaseResult {
    const PAGES: u64 = 16;
    /// A page frame below the DIMM.
    const ORDINARY: u64 = 0x4000;
    with_guest(Kind::BOTH, |fixture| {
        let machine = &mut fixture.machine;
        machine.guest().hold("locked", "convert", 2 * PAGES * PAGE, 8)?;
        let frames = machine.guest().frames("convert")?;
        ensure!(frames.len() as u64 == 2 * PAGES, "{} frames", frames.len());
        let shared = machine.shared()?;
        let converted = &frames[..PAGES as usize];
        for &frame in converted {
            machine.guest().convert(frame, 1, 0)?;
        }
        // The other side is allocated once it is touched. That the unused one is freed shows when
        // it is used again: it has lost its content.
        machine.guest().verify_zeros("convert", 0, PAGES)?;
        machine.guest().verify_pages("convert", 8, PAGES, PAGES)?;
        machine.guest().fill("convert", 9)?;
        machine.guest().verify("convert", 9)?;
        let grown = machine.shared()? - shared;
        ensure!(grown == PAGES * PAGE, "{} KiB of shared memory more", grown >> 10);
        for &frame in converted {
            machine.guest().convert(frame, 1, KVM_MAP_GPA_RANGE_ENCRYPTED)?;
        }
        ensure!(machine.shared()? == shared, "the shared side is still there");
        machine.guest().verify_zeros("convert", 0, PAGES)?;
        machine.guest().verify_pages("convert", 9, PAGES, PAGES)?;
        // Memory without a private side is refused, and the guest continues.
        let refused = machine.guest().convert(ORDINARY, 1, KVM_MAP_GPA_RANGE_ENCRYPTED);
        ensure!(refused.is_err(), "ordinary memory became private");
        machine.guest().verify_pages("convert", 9, PAGES, PAGES)?;
        machine.guest().release_area("convert")
    })
}

/// The guest may name any range: of two memory regions, of one and of nothing, and of more than there
/// is. What it gets is all of it, or an error and no change.
fn conversion_of_a_range_is_of_each_part_or_refused() -> CaseResult {
    /// Bytes of a second DIMM: less than a block, so that the guest's kernel leaves it alone.
    const MORE: u64 = 64 * MIB;
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let mut machine = Machine::start(&lab, &Config::new(Memory::dimm(Kind::BOTH, SMALL)))?;
    machine.boot()?;
    let end = (dimm(&mut machine)? + SMALL) / PAGE;
    machine.guest().hold("locked", "range", PAGE, 83)?;
    let frame = *machine.guest().frames("range")?.first().context("the area has no page")?;
    machine.guest().convert(frame, 1, 0)?;
    machine.guest().fill("range", 84)?;
    // The first part could be converted, and nothing lies behind the DIMM.
    for (first, pages, attributes) in [
        (frame, end - frame + 1, KVM_MAP_GPA_RANGE_ENCRYPTED),
        (end, 1 << 40, KVM_MAP_GPA_RANGE_ENCRYPTED),
        // So many bytes are none in 64 bits.
        (0, 1 << 52, 0),
        (0, 1 << 52, KVM_MAP_GPA_RANGE_ENCRYPTED),
    ] {
        let refused = machine.guest().convert(first, pages, attributes);
        ensure!(refused.is_err(), "{pages} pages from {first:#x} on were converted");
        machine.guest().verify("range", 84)?;
    }
    machine.guest().convert(frame, 1, KVM_MAP_GPA_RANGE_ENCRYPTED)?;

    // A page of nothing, and the first of a DIMM: only that loses its private side.
    let address = end * PAGE + SMALL;
    let backend = json!({ "qom-type": "memory-backend-memfd-private", "id": "more", "size": MORE,
        "prealloc": true });
    machine.execute("object-add", backend)?;
    let device = json!({ "driver": "pc-dimm", "id": "second", "memdev": "more", "addr": address });
    machine.execute("device_add", device)?;
    ensure!(memfiles_of(&machine, MORE)? == 1, "the DIMM is not allocated");
    machine.guest().convert(address / PAGE - 1, 2, 0)?;
    ensure!(memfiles_of(&machine, MORE - PAGE)? == 1, "not exactly one page was given back");
    ensure!(machine.said().is_empty(), "the guest fills QEMU's log: {}", machine.said());
    machine.guest().release_area("range")?;
    machine.shut_down()?;
    Module::memfile()?.expect_unused()
}

/// What would be left of the old side comes back with a later conversion, where zeros are promised: so
/// the page stays what it was.
fn conversion_whose_discard_fails_is_none() -> CaseResult {
    with_guest(Kind::BOTH, |fixture| {
        let machine = &mut fixture.machine;
        machine.guest().hold("locked", "stays", PAGE, 86)?;
        let frame = *machine.guest().frames("stays")?.first().context("the area has no page")?;
        let vcpu = *machine.vcpu_threads()?.first().context("no vCPU")?;
        let stopped =
            machine.stop_at_fallocate(vcpu, |m| m.guest().begin_to_convert(frame, 1, 0))?;
        stopped.fail(Errno::ENOMEM)?;
        ensure!(!machine.guest().end_to_convert()?, "the guest was told of a conversion");
        machine.guest().verify("stays", 86)?;
        // Now it works.
        machine.guest().convert(frame, 1, 0)?;
        machine.guest().verify_zeros("stays", 0, 1)?;
        machine.guest().convert(frame, 1, KVM_MAP_GPA_RANGE_ENCRYPTED)?;
        machine.guest().verify_zeros("stays", 0, 1)?;
        machine.guest().release_area("stays")
    })
}

/// How many memfiles of QEMU's have so many bytes allocated.
fn memfiles_of(machine: &Machine, bytes: u64) -> Result<usize> {
    let memfds = memfds(machine.pid())?;
    Ok(memfds.iter().filter(|m| m.memfile.is_some() && m.allocated == bytes).count())
}

/// KVM keeps no log of what is written to private memory. QEMU, told to read one, had none to read.
/// Nor can QEMU sample it: it would allocate the shared side.
fn has_no_dirty_log_and_qemu_continues(kind: Kind) -> CaseResult {
    with_guest(kind, |fixture| {
        let machine = &mut fixture.machine;
        let shared = machine.shared()?;
        for mode in ["dirty-bitmap", "page-sampling"] {
            machine.execute("calc-dirty-rate", json!({ "calc-time": 1, "mode": mode }))?;
            while machine.execute("query-dirty-rate", json!({}))?["status"] != "measured" {
                thread::yield_now();
            }
        }
        let now = machine.shared()?;
        ensure!(now == shared, "{now} bytes are shared, not {shared}");
        machine.guest().hold("memory", "log", MIB, 85)?;
        machine.guest().verify("log", 85)?;
        machine.guest().release_area("log")
    })
}

fn guest_memfd_has_no_dirty_log_and_qemu_continues() -> CaseResult {
    has_no_dirty_log_and_qemu_continues(Kind::GuestMemfd)
}

fn private_memory_has_no_dirty_log_and_qemu_continues() -> CaseResult {
    has_no_dirty_log_and_qemu_continues(Kind::BOTH)
}

/// A command that QEMU refuses, for this reason.
fn expect_refusal(
    machine: &mut Machine,
    name: &str,
    arguments: serde_json::Value,
    why: &str,
) -> CaseResult {
    let Err(error) = machine.execute(name, arguments) else { bail!("QEMU does {name}") };
    let error = format!("{error:#}");
    println!("{error}");
    ensure!(error.contains(why), "{error}");
    Ok(())
}

/// It would have the shared side, zeros that are allocated in order to be read.
fn dump_of_the_guest_is_refused() -> CaseResult {
    with_guest(Kind::BOTH, |fixture| {
        let machine = &mut fixture.machine;
        let shared = machine.shared()?;
        let dump = json!({ "paging": false, "protocol": "file:/dev/null" });
        expect_refusal(machine, "dump-guest-memory", dump, "private memory cannot be read")?;
        ensure!(machine.shared()? == shared, "{} bytes are shared", machine.shared()?);
        machine.guest().read("/proc/uptime").map(drop)
    })
}

/// The file of the DIMM belongs to another VM when QEMU plugs it.
fn dimm_that_kvm_refuses_is_an_error_and_the_guest_continues() -> CaseResult {
    const MORE: u64 = 64 * MIB;
    with_guest(Kind::BOTH, |fixture| {
        let machine = &mut fixture.machine;
        machine.guest().hold("memory", "keep", 8 * MIB, 87)?;
        let backend =
            json!({ "qom-type": "memory-backend-memfd-private", "id": "more", "size": MORE });
        let device = json!({ "driver": "pc-dimm", "id": "second", "memdev": "more" });
        machine.execute("object-add", backend.clone())?;
        let memfds = memfds(machine.pid())?;
        let more = memfds.iter().find(|m| m.memfile.is_some() && m.size == MORE);
        let fd = more.context("QEMU has no such memfile")?.fd;
        let file = sys::pidfd_getfd(machine.pid() as i32, fd).context("pidfd_getfd")?;
        let vm = Vm::protected()?;
        let slot = vm.add_private(1, GIB, MORE, Private::Memfile, &file, 0)?;
        expect_refusal(machine, "device_add", device.clone(), "KVM does not bind")?;
        machine.guest().verify("keep", 87)?;
        machine.execute("object-del", json!({ "id": "more" }))?;
        drop((vm.delete(slot)?, vm, file));
        // It gets one of its own.
        machine.execute("object-add", backend)?;
        machine.execute("device_add", device)?;
        machine.guest().verify("keep", 87)?;
        machine.guest().release_area("keep")
    })?;
    // Other cases have one DIMM.
    give_up(&mut *slot()?)
}

/// All of a DIMM is private when it is plugged. What the guest shared in its first life must not be
/// found in the second, nor stay allocated.
fn dimm_that_is_plugged_again_has_nothing_shared() -> CaseResult {
    const MORE: u64 = 128 * MIB;
    with_guest(Kind::BOTH, |fixture| {
        let machine = &mut fixture.machine;
        let backend =
            json!({ "qom-type": "memory-backend-memfd-private", "id": "more", "size": MORE });
        let device = json!({ "driver": "pc-dimm", "id": "second", "memdev": "more" });
        machine.execute("object-add", backend)?;
        machine.execute("device_add", device.clone())?;
        let devices = machine.execute("query-memory-devices", json!({}))?;
        let all = devices.as_array().context("no memory devices")?;
        let second = all.iter().find(|device| device["data"]["id"] == "second");
        let gpa = second.and_then(|device| device["data"]["addr"].as_u64()).context("no DIMM")?;
        let shared = machine.shared()?;
        machine.guest().convert(gpa / PAGE, 1, 0)?;
        machine.shared_words(gpa, PAGE)?;
        let now = machine.shared()?;
        ensure!(now == shared + PAGE, "{now} bytes are shared, {shared} before");

        machine.execute("device_del", json!({ "id": "second" }))?;
        while machine.event("DEVICE_DELETED")?["device"] != "second" {}
        let now = machine.shared()?;
        ensure!(now == shared, "without the DIMM {now} bytes are shared, {shared} before it");
        machine.execute("device_add", device)?;
        machine.guest().hold("memory", "after", MIB, 88)?;
        machine.guest().verify("after", 88)?;
        machine.guest().release_area("after")
    })?;
    // Other cases have one DIMM.
    give_up(&mut *slot()?)
}

/// A guest shares a page here and there, so a huge page would be memory for nothing.
fn shared_page_costs_one_page_where_huge_pages_are_on() -> CaseResult {
    give_up(&mut *slot()?)?;
    for policy in ["always", "advise"] {
        let _huge = pressure::shmem_huge(policy)?;
        let config = Config::new(Memory::dimm(Kind::BOTH, SMALL));
        let mut machine = Machine::start(&lab()?, &config)?;
        machine.boot()?;
        machine.guest().hold("locked", "one", PAGE, 9)?;
        let frames = machine.guest().frames("one")?;
        let frame = *frames.first().context("no frame")?;
        let shared = machine.shared()?;
        machine.guest().convert(frame, 1, 0)?;
        machine.guest().fill("one", 10)?;
        let grown = machine.shared()? - shared;
        ensure!(grown == PAGE, "{policy}: {} KiB of shared memory more", grown >> 10);
        machine.kill()?;
    }
    Module::memfile()?.expect_unused()
}

/// An access goes where the attribute says, so KVM tells QEMU of none. It would if the side that the
/// attribute names were missing, which never happens to a guest of QEMU's.
fn guest_asks_for_no_conversion_by_an_access() -> CaseResult {
    const PAGES: u64 = 16;
    with_guest(Kind::BOTH, |fixture| {
        let machine = &mut fixture.machine;
        let trace = Trace::start(&["kvm:kvm_userspace_exit"])?;
        // New pages of the private side, the same on the shared side, and again.
        machine.guest().hold("locked", "access", PAGES * PAGE, 80)?;
        let frames = machine.guest().frames("access")?;
        for (attributes, seed) in [(0, 81), (KVM_MAP_GPA_RANGE_ENCRYPTED, 82)] {
            for &frame in &frames {
                machine.guest().convert(frame, 1, attributes)?;
            }
            machine.guest().verify_zeros("access", 0, PAGES)?;
            machine.guest().fill("access", seed)?;
            machine.guest().verify("access", seed)?;
        }
        machine.guest().release_area("access")?;
        let count = |what: &str| -> Result<u64> {
            Ok(trace.events()?.iter().filter(|event| event.says(what)).count() as u64)
        };
        let (calls, errors) = (count("reason KVM_EXIT_HYPERCALL")?, count("reason error")?);
        ensure!(calls == 2 * PAGES, "{calls} hypercalls");
        ensure!(errors == 0, "KVM_RUN has failed {errors} times");

        let vm = Vm::protected()?;
        let view = small_pages(PAGE)?;
        vm.raw_set_region(&region(0x10, GIB, &view, None))?;
        vm.set_private(GIB, PAGE)?;
        let exit = vm.vcpu(0)?.start(Order::Load, &[GIB])?;
        let flags = KVM_MEMORY_EXIT_FLAG_PRIVATE;
        let wanted = Exit::MemoryFault { errno: Errno::EFAULT, gpa: GIB, size: PAGE, flags };
        ensure!(exit == wanted, "without a private side: {exit:x?}");
        let errors = count(&format!("reason error ({})", libc::EFAULT))?;
        ensure!(errors == 1, "{errors} such exits are traced");
        Ok(())
    })
}

/// A guest with a second CPU, on memory of pages of 4 KiB, and QEMU's threads for the two.
fn with_two_cpus(
    memory: Memory,
    work: impl FnOnce(&mut Machine, [i32; 2]) -> CaseResult,
) -> CaseResult {
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let _pages = pressure::base_pages()?;
    let mut machine = Machine::start(&lab, &Config::new(memory).with_a_second_cpu())?;
    let took = machine.boot()?;
    println!("Linux {} with two CPUs after {:.1} s", machine.guest().release(), took.as_secs_f64());
    let threads = machine.vcpu_threads()?;
    let threads = threads.try_into().map_err(|threads| anyhow!("{threads:?}"))?;
    work(&mut machine, threads)?;
    machine.shut_down()
}

/// How often KVM_RUN has failed in this thread because of an access.
fn refused(trace: &Trace, thread: i32) -> Result<u64> {
    let error = format!("reason error ({})", libc::EFAULT);
    let events = trace.events()?;
    let ours = events.iter().filter(|event| event.thread == thread && event.says(&error));
    Ok(ours.count() as u64)
}

/// A fault takes the kind of an access from the attribute, then memory for page tables, then looks
/// at the attribute again. It is held where it takes that memory, until another CPU has converted
/// the page. QEMU must not take what KVM then says for a wish of the guest's.
fn conversion_that_overtakes_a_fault_stays() -> CaseResult {
    /// KVM takes memory for 40 page tables at once, of 2 MiB each.
    const WRITTEN: u64 = 96 * MIB;
    const SEED: u64 = 95;
    with_two_cpus(Memory::dimm(Kind::BOTH, SIZE), |machine, [_, second]| {
        let base = dimm(machine)?;
        // What the guest needs for a conversion is there: later its second CPU does not answer.
        machine.guest().convert(base / PAGE, 1, KVM_MAP_GPA_RANGE_ENCRYPTED)?;
        let others = machine.run_on_cpu(0)?.into_iter().filter(|&thread| thread != second);
        let others: Vec<_> = others.chain([sys::thread_id()]).collect();
        let faults = Trace::of_thread("kvm:kvm_page_fault", second)?;
        let mut pipe = faults.pipe()?;
        let exits = Trace::start(&["kvm:kvm_userspace_exit"])?;
        let taker = "__kvm_mmu_topup_memory_cache";
        let filter = format!("common_pid == {second} && call_site.function == {taker}");
        let hold = Hold::at("kmem:kmem_cache_alloc", &filter, 0, others)?;
        machine.guest().begin_to_fork("memory", WRITTEN, SEED, 1)?;
        let limit = Duration::from_secs(60) * sys::time_factor();
        let address = loop {
            hold.wait(limit).context("no fault in the DIMM has needed a page table")?;
            let fault = pipe.last()?.context("the CPU has no fault")?;
            let address = fault.hex_after("address").context("a fault without an address")?;
            if (base..base + SIZE).contains(&address) {
                break address & !(PAGE - 1);
            }
            hold.let_go();
        };
        machine.guest().convert(address / PAGE, 1, 0)?;
        hold.end()?;
        machine.guest().end_to_fork()?;
        let refused = refused(&exits, second)?;
        ensure!(refused == 1, "KVM_RUN has failed {refused} times");
        // The guest has written the page, and QEMU sees it.
        let page = machine.guest().place_in_last_process(address / PAGE)?;
        println!("page {page} of the process, at {address:#x}, was converted during its fault");
        expect_shared(machine, address, page, Pattern::Generation(SEED))?;
        machine.guest().check_processes()?;
        machine.guest().join()
    })
}

/// What the guest has at this address is shared, and page number `page` of this pattern.
fn expect_shared(machine: &mut Machine, address: u64, page: u64, pattern: Pattern) -> CaseResult {
    for (n, word) in machine.shared_words(address, PAGE)?.into_iter().enumerate() {
        let at = page * PAGE + n as u64 * 8;
        let wanted = pattern.word(at);
        ensure!(word == wanted, "byte {at:#x} is {word:#x} on the shared side, not {wanted:#x}");
    }
    Ok(())
}

/// A conversion sets the attribute, and then discards the side that is not used any more. Between
/// the two no other conversion may make that side the one that is used.
fn conversions_of_one_page_follow_each_other() -> CaseResult {
    const SEED: u64 = 96;
    with_two_cpus(Memory::dimm(Kind::BOTH, SMALL), |machine, [first, second]| {
        machine.guest().area("locked", "against", PAGE)?;
        let frame = machine.guest().frames("against")?;
        let frame = *frame.first().context("the area has no page")?;
        let exits = Trace::of_thread("kvm:kvm_userspace_exit", first)?;
        let stopped = machine.stop_at_fallocate(second, |machine| {
            machine.guest().begin_to_convert_against("against", SEED)
        })?;
        println!("the conversion to private is about to discard");
        let end = Instant::now() + Duration::from_secs(60) * sys::time_factor();
        let asks = |trace: &Trace| -> Result<bool> {
            Ok(trace.events()?.pop().is_some_and(|event| event.says("reason KVM_EXIT_HYPERCALL")))
        };
        loop {
            if machine.guest().has_answered(Duration::from_millis(10))? {
                println!("the conversion to shared did not wait");
                stopped.let_go();
                break;
            }
            if machine.waits(first)? && asks(&exits)? {
                println!("the conversion to shared waits");
                stopped.let_go();
                ensure!(machine.guest().has_answered(end - Instant::now())?, "it still waits");
                break;
            }
            ensure!(Instant::now() < end, "no conversion to shared");
        }
        machine.guest().end_to_convert_against()?;
        machine.guest().verify("against", SEED)?;
        expect_shared(machine, frame * PAGE, 0, Pattern::Generation(SEED))?;
        machine.guest().release_area("against")
    })
}

fn guest_of_two_cpus_converts_from_both_at_once() -> CaseResult {
    const PAGES: u64 = 32;
    const ROUNDS: u64 = 25;
    with_two_cpus(all(Kind::BOTH, SIZE), |machine, threads| {
        machine.guest().area("locked", "two", PAGES * PAGE)?;
        let frames = machine.guest().frames("two")?;
        let exits = Trace::start(&["kvm:kvm_userspace_exit"])?;
        machine.guest().convert_from_two_cpus("two", ROUNDS)?;
        let events = exits.events()?;
        for thread in threads {
            let asks = "reason KVM_EXIT_HYPERCALL";
            let calls = events.iter().filter(|event| event.thread == thread && event.says(asks));
            let calls = calls.count() as u64;
            println!("{calls} conversions, {} faults overtaken", refused(&exits, thread)?);
            ensure!(calls == PAGES / 2 * ROUNDS, "{calls} conversions by one CPU");
        }
        for (page, frame) in frames.iter().enumerate() {
            expect_shared(machine, frame * PAGE, page as u64, Pattern::Generation(ROUNDS - 1))?;
        }
        machine.guest().release_area("two")
    })
}

fn free_pages_that_the_guest_reports_are_given_back() -> CaseResult {
    const FREED: u64 = 128 * MIB;
    with_this_guest(Kind::BOTH, true, |fixture| {
        fixture.machine.guest().hold("memory", "keep", 8 * MIB, 11)?;
        fixture.machine.guest().hold("memory", "report", FREED, 10)?;
        let full = fixture.machine.private_pages()?;
        ensure!(full >= FREED / PAGE, "{full} pages");
        fixture.machine.guest().release_area("report")?;
        fixture.machine.guest().tidy()?;
        fixture.expect_fewer_pages(full - FREED / PAGE * 3 / 4, "after reporting")?;
        fixture.machine.guest().verify("keep", 11)?;
        fixture.machine.guest().release_area("keep")
    })
}

fn whole_guest_is_swapped_out_and_comes_back() -> CaseResult {
    with_guest(Kind::BOTH, |fixture| {
        is_swapped_out_and_comes_back(&mut fixture.machine, &fixture.cgroup)
    })
}

fn is_swapped_out_and_comes_back(machine: &mut Machine, cgroup: &Cgroup) -> CaseResult {
    let swap = Swap::on(2 * SIZE)?;
    fill(machine, 12)?;
    machine.execute("stop", json!({}))?;
    let (allocated, before) = machine.private()?;
    let counts = Counts::now()?;
    let mut left = before;
    // The first look at a page may find it used; see the suite `reclaim`.
    for _ in 0..16 {
        cgroup.reclaim_unused(SIZE)?;
        left = machine.private()?.1;
        if left <= before / 50 {
            break;
        }
    }
    println!("{before} pages before, {left} left, {} KiB of swap", swap.used()? >> 10);
    ensure!(left <= before / 50, "{left} of {before} pages stay");
    ensure!(machine.private()?.0 == allocated, "some are lost");
    counts.expect_grown(&["memfile.swap_out"], (before - left) / 2)?;
    machine.execute("cont", json!({}))?;
    verify(machine, 12)?;
    let back = machine.private()?.1;
    println!("{back} pages are back");
    ensure!((back - left) * PAGE >= filled() / 2, "{back} pages");
    release(machine)
}

fn compaction_moves_pages_of_a_running_guest() -> CaseResult {
    with_guest(Kind::BOTH, |fixture| {
        fill(&mut fixture.machine, 13)?;
        let counts = Counts::now()?;
        let mut rounds = 0;
        while counts.grown("memfile.migrate")? < 100 {
            // A compaction comes by in one round of four; a round takes less than a second.
            ensure!(rounds < 100, "{} pages moved", counts.grown("memfile.migrate")?);
            rounds += 1;
            let ragged = ragged_memory(32 * MIB * rounds.min(8))?;
            pressure::compact()?;
            drop(ragged);
            pressure::compact()?;
            verify(&mut fixture.machine, 13)?;
        }
        println!("{} pages moved in {rounds} rounds", counts.grown("memfile.migrate")?);
        verify(&mut fixture.machine, 13)?;
        release(&mut fixture.machine)
    })
}

fn killed_qemu_leaves_no_memory_behind() -> CaseResult {
    with_guest(Kind::BOTH, |fixture| fill(&mut fixture.machine, 14))?;
    give_up(&mut *slot()?)?;
    Module::memfile()?.expect_unused()
}

/// Kill QEMU, whose guest has content, when `until` has seen what is asked for: at each of these
/// moments, each time with another guest, and with one more if `until` was too late.
fn killed_while(
    kind: Kind,
    reporting: bool,
    moments: &[u64],
    until: impl Fn(&mut Fixture, u64) -> Result<bool>,
) -> CaseResult {
    for &moment in moments {
        let mut in_time = false;
        while !in_time {
            with_this_guest(kind, reporting, |fixture| {
                fill(&mut fixture.machine, 70)?;
                in_time = until(fixture, moment)?;
                fixture.machine.signal(libc::SIGKILL)
            })?;
            give_up(&mut *slot()?)?;
            Module::memfile()?.expect_unused()?;
        }
    }
    Ok(())
}

/// Another thread acts again and again, each time on what it has prepared. Returns, and lets it
/// finish, when `kill` has been called within an act, and after `begun`.
fn kill_within<T>(
    mut prepare: impl FnMut(u64) -> Result<T> + Send,
    mut act: impl FnMut(&T) -> CaseResult + Send,
    begun: impl Fn() -> Result<bool>,
    kill: impl FnOnce() -> CaseResult,
) -> CaseResult {
    const ACTS: u64 = 40;
    // How many acts have begun or ended: within an act this is odd.
    let (steps, stop) = (&AtomicU64::new(0), &AtomicBool::new(false));
    thread::scope(|scope| {
        let actor = scope.spawn(move || -> CaseResult {
            for n in 0..ACTS {
                let prepared = prepare(n)?;
                steps.fetch_add(1, Ordering::SeqCst);
                act(&prepared)?;
                steps.fetch_add(1, Ordering::SeqCst);
                if stop.load(Ordering::SeqCst) {
                    return Ok(());
                }
            }
            bail!("in {ACTS} acts of the host's it has not begun")
        });
        let watch = || -> CaseResult {
            loop {
                if actor.is_finished() {
                    return Ok(());
                }
                let step = steps.load(Ordering::SeqCst);
                // It may end as soon as QEMU dies, before we know.
                if step % 2 == 1 && begun()? && steps.load(Ordering::SeqCst) == step {
                    println!("killed within act {} of the host's", step / 2 + 1);
                    return kill();
                }
                thread::yield_now();
            }
        };
        let watched = watch();
        stop.store(true, Ordering::SeqCst);
        actor.join().map_err(|_| anyhow!("the other thread panicked"))??;
        watched
    })
}

fn qemu_killed_while_the_host_reclaims_leaves_no_memory_behind() -> CaseResult {
    let _swap = Swap::on(2 * SIZE)?;
    killed_while(Kind::BOTH, false, &[1, 2000], |fixture, pages| {
        let (counts, cgroup) = (Counts::now()?, &fixture.cgroup);
        let machine = &fixture.machine;
        kill_within(
            |_| Ok(()),
            |()| cgroup.reclaim(SIZE).map(drop),
            || Ok(counts.grown("memfile.swap_out")? >= pages),
            || machine.signal(libc::SIGKILL),
        )?;
        Ok(true)
    })
}

fn qemu_killed_while_the_host_compacts_leaves_no_memory_behind() -> CaseResult {
    killed_while(Kind::BOTH, false, &[1, 32], |fixture, pages| {
        let (counts, machine) = (Counts::now()?, &fixture.machine);
        kill_within(
            // Now with holes to fill, now without.
            |n| (n % 2 == 0).then(|| ragged_memory(32 * MIB * (n / 2 % 8 + 1))).transpose(),
            |_| pressure::compact(),
            || Ok(counts.grown("memfile.migrate")? >= pages),
            || machine.signal(libc::SIGKILL),
        )?;
        Ok(true)
    })
}

fn qemu_killed_while_its_balloon_grows_leaves_no_memory_behind() -> CaseResult {
    const BALLOON: u64 = 128 * MIB;
    killed_while(Kind::PINNED, false, &[1, BALLOON / MIB / 2], |fixture, holes| {
        let machine = &mut fixture.machine;
        machine.guest().hold("memory", "freed", BALLOON / 2, 71)?;
        machine.guest().release_area("freed")?;
        let all = machine.actual_memory()?;
        let counts = Counts::now()?;
        machine.execute("balloon", json!({ "value": all - BALLOON }))?;
        let made = || counts.grown("memfile.invalidate");
        while made()? < holes {
            thread::yield_now();
        }
        let made = made()?;
        println!("killed after {made} holes");
        // A request is a MiB, and makes a hole or more: with as many the balloon may have its size.
        Ok(made < BALLOON / MIB)
    })
}

fn qemu_killed_while_its_guest_reports_leaves_no_memory_behind() -> CaseResult {
    const FREED: u64 = 192 * MIB;
    killed_while(Kind::BOTH, true, &[1], |fixture, holes| {
        let machine = &mut fixture.machine;
        machine.guest().hold("memory", "report", FREED, 72)?;
        let (counts, full) = (Counts::now()?, machine.private_pages()?);
        machine.guest().release_area("report")?;
        while counts.grown("memfile.invalidate")? < holes {
            thread::yield_now();
        }
        let left = machine.private_pages()?;
        println!("killed with {left} of {full} pages");
        Ok(left < full && left > full - FREED / PAGE / 2)
    })
}

/// Pages of one side come, and those of the other go.
fn qemu_killed_while_its_guest_converts_leaves_no_memory_behind() -> CaseResult {
    const PAGES: u64 = 32;
    killed_while(Kind::BOTH, false, &[1, PAGES / 2, 2 * PAGES + 1], |fixture, holes| {
        let machine = &mut fixture.machine;
        machine.guest().hold("locked", "storm", PAGES * PAGE, 73)?;
        let (counts, shared) = (Counts::now()?, machine.shared()?);
        machine.guest().convert_for_ever("storm")?;
        // Each conversion to shared makes one.
        while counts.grown("memfile.invalidate")? < holes {
            thread::yield_now();
        }
        let shared = machine.shared()? - shared;
        println!("killed after {holes} holes or more, {} KiB of shared memory more", shared >> 10);
        Ok(true)
    })
}

/// Bytes of a DIMM that QEMU itself reads: its shared side, whatever the guest has there.
const STRAY: u64 = MIB;

fn stray_access(machine: &mut Machine) -> Result<serde_json::Value> {
    let arguments = json!({ "val": dimm(machine)?, "size": STRAY, "filename": "/dev/null" });
    machine.execute("pmemsave", arguments)
}

/// Double allocation is not seen until somebody counts; with F_SEAL_AUTO_ALLOCATE on QEMU's own
/// memfd there is none, and who would make it is told at once.
fn seal_on_the_shared_side_finds_stray_accesses() -> CaseResult {
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let config = Config::new(Memory::dimm(Kind::BOTH, SMALL));
    let mut machine = Machine::start(&lab, &config)?;
    stray_access(&mut machine)?;
    let (shared, private) = (machine.shared()?, machine.private()?.0);
    println!("without the seal: {} KiB shared, {} KiB private", shared >> 10, private >> 10);
    ensure!(shared == STRAY && private == 0, "{shared} bytes shared, {private} private");
    machine.kill()?;

    let mut machine = Machine::launch(&lab, &Config { traced: true, ..config })?;
    machine.add_to_seals(F_SEAL_AUTO_ALLOCATE)?;
    machine.connect()?;
    machine.boot()?;
    fill(&mut machine, 60)?;
    verify(&mut machine, 60)?;
    let (shared, private) = (machine.shared()?, machine.private()?.0);
    println!("with it, at work: {} KiB shared, {} KiB private", shared >> 10, private >> 10);
    ensure!(shared == 0 && private > filled() / 4, "{shared} bytes shared, {private} private");
    let answer = stray_access(&mut machine);
    let status = machine.wait()?;
    ensure!(status.signal() == Some(libc::SIGBUS), "{status}, answer {answer:?}");
    Ok(())
}

/// Run a guest as `make guest` does. Returns its exit code, and what it says.
fn memfile_vm(arguments: &[&str]) -> Result<(Option<i32>, String)> {
    let mut command = Command::new("/bin/memfile-vm");
    command.args(["--size", "512M", "--time-factor", &sys::time_factor().to_string()]);
    let output = command.args(arguments).output().context("memfile-vm")?;
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into());
    let said: [String; 2] = said;
    println!("{}{}", said[0], said[1]);
    Ok((output.status.code(), said.concat()))
}

fn guest_that_does_not_come_up_says_why_and_ends_with_125() -> CaseResult {
    give_up(&mut *slot()?)?;
    lab()?;
    for (arguments, why) in [
        // Its kernel ends it.
        (["--append", "rdinit=/none"].as_slice(), "Kernel panic"),
        // QEMU does not start.
        (["--", "-device", "nonsense"].as_slice(), "nonsense"),
        // QEMU starts, and finds that this guest cannot run.
        (["--memory", "guest_memfd"].as_slice(), "a guest cannot start in private memory"),
    ] {
        let (code, said) = memfile_vm(arguments)?;
        ensure!(code == Some(125), "{arguments:?}: exit code {code:?}");
        let last = said.split("the guest did not come up").nth(1);
        ensure!(last.is_some_and(|last| last.contains(why)), "{arguments:?}: no {why:?}");
    }
    Module::memfile()?.expect_unused()
}

fn command_in_a_guest_gives_its_exit_code() -> CaseResult {
    give_up(&mut *slot()?)?;
    lab()?;
    let (code, said) = memfile_vm(&["--cmd", "echo from the guest; exit 7"])?;
    ensure!(code == Some(7) && said.contains("from the guest\n"), "exit code {code:?}");
    Module::memfile()?.expect_unused()
}

fn migration_snapshots_and_smm_are_refused() -> CaseResult {
    const UNREADABLE: &str = "private memory cannot be read";
    const NOT_LOADED: &str = "private memory cannot be loaded";
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let config = Config::new(Memory::dimm(Kind::BOTH, SMALL));
    let mut machine = Machine::start(&lab, &config)?;
    let migrate = json!({ "uri": "exec:cat >/dev/null" });
    expect_refusal(&mut machine, "migrate", migrate, UNREADABLE)?;
    for (command, why) in [("savevm x", UNREADABLE), ("loadvm x", NOT_LOADED)] {
        let monitor = json!({ "command-line": command });
        let said = machine.execute("human-monitor-command", monitor)?;
        ensure!(said.as_str().is_some_and(|said| said.contains(why)), "{command}: {said}");
    }
    machine.kill()?;

    let cases = [
        (["-loadvm", "x"], NOT_LOADED),
        (["-machine", "smm=on"], "no SMM"),
        (["-incoming", "defer"], "private memory cannot be migrated to this VM"),
    ];
    for (arguments, why) in cases {
        does_not_start(&lab, &config.clone().with(arguments), why)?;
    }
    Module::memfile()?.expect_unused()
}

/// The size of a memory device is a multiple of its alignment: no larger one is asked for.
fn dimm_may_have_any_size() -> CaseResult {
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    for size in [384 * MIB, 640 * MIB] {
        let mut machine = Machine::start(&lab, &Config::new(Memory::dimm(Kind::BOTH, size)))?;
        dimm(&mut machine)?;
        machine.kill()?;
    }
    Module::memfile()?.expect_unused()
}

/// QEMU ends before it runs a guest, and its first line says why. Then it says which of its parts that
/// was.
fn does_not_start(lab: &Lab, config: &Config, why: &str) -> CaseResult {
    let mut machine = Machine::launch(lab, config)?;
    let status = machine.wait()?;
    let said = machine.said();
    println!("{said}");
    ensure!(!status.success(), "QEMU ends with {status}");
    ensure!(said.lines().next().is_some_and(|line| line.contains(why)), "QEMU says: {said}");
    Ok(())
}

fn settings_that_private_memory_cannot_follow_are_refused() -> CaseResult {
    const OBJECT: &str = "memory-backend-memfd-private,id=x,size=6M";
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let config = Config::new(Memory::dimm(Kind::BOTH, SMALL));
    for (option, value, why) in [
        ("-overcommit", "mem-lock=on".to_owned(), "mem-lock"),
        ("-object", format!("{OBJECT},prealloc-context=tc"), "prealloc-context"),
        ("-object", format!("{OBJECT},hugetlb=on,hugetlbsize=6M"), "power of 2"),
    ] {
        let arguments = ["-object", "thread-context,id=tc", option, &value];
        does_not_start(&lab, &config.clone().with(arguments), why).context(value)?;
    }
    let vm = ["-object", "sw-protected-vm,id=other,guest-memfd=on,movable=on"];
    let other = config.clone().with(vm).with(["-machine", "confidential-guest-support=other"]);
    does_not_start(&lab, &other, "neither movable nor reclaimable")?;
    // Nor does a VM that exists.
    let mut machine = Machine::start(&lab, &config)?;
    let change = json!({ "path": "/objects/vm", "property": "movable", "value": false });
    ensure!(machine.execute("qom-set", change).is_err(), "the VM's memory was movable");
    let change = json!({ "path": "/objects/ram", "property": "prealloc", "value": true });
    expect_refusal(&mut machine, "qom-set", change, "may be shared")?;
    let allocated = machine.private_pages()?;
    ensure!(allocated == 0, "{allocated} pages were allocated");
    machine.kill()?;
    Module::memfile()?.expect_unused()
}

/// Private memory cannot be made again what it was at the start: firmware and kernel would meet what
/// the guest has left.
fn reset_is_a_shutdown_whatever_the_user_sets() -> CaseResult {
    give_up(&mut *slot()?)?;
    let config = Config::new(Memory::dimm(Kind::BOTH, SMALL));
    let mut machine = Machine::start(&lab()?, &config)?;
    machine.execute("set-action", json!({ "reboot": "reset" }))?;
    machine.execute("system_reset", json!({}))?;
    let status = machine.wait()?;
    ensure!(status.success(), "QEMU ends with {status}: {}", machine.said());
    Module::memfile()?.expect_unused()
}

/// Memory that is allocated before the guest runs.
fn preallocated(size: u64) -> Memory {
    Memory { prealloc: true, ..Memory::dimm(Kind::PINNED, size) }
}

fn guest_boots_and_keeps_its_data_on_memory_allocated_ahead() -> CaseResult {
    give_up(&mut *slot()?)?;
    let (lab, before) = (lab()?, Accounts::now()?);
    let mut machine = Machine::start(&lab, &Config::new(preallocated(SIZE)))?;
    expect_whole(&machine)?;
    machine.boot()?;
    fill(&mut machine, 18)?;
    verify(&mut machine, 18)?;
    expect_whole(&machine).context("with content")?;
    let shared = machine.shared()?;
    ensure!(shared < 4 * MIB, "{} KiB beside the private memory", shared >> 10);
    release(&mut machine)?;
    machine.shut_down()?;
    before.expect_back(2 * MIB).context("after QEMU")
}

/// All [`SIZE`] bytes of private memory are allocated, and no more.
fn expect_whole(machine: &Machine) -> CaseResult {
    let (allocated, resident) = machine.private()?;
    ensure!(allocated == SIZE && resident == SIZE / PAGE, "{allocated} bytes, {resident} pages");
    Ok(())
}

/// Pages of the memfiles that a process has, none as long as it has no memfile.
fn pages_of(machine: &Machine) -> Result<u64> {
    let memfds = memfds(machine.pid())?;
    Ok(memfds.iter().filter_map(|memfd| memfd.memfile).map(|(pages, _)| pages).sum())
}

/// Stop QEMU and let it go on again and again until so many `pages` are allocated. Returns how often
/// some were and others not.
fn stop_and_go(
    machine: &mut Machine,
    enough: u64,
    pages: impl Fn(&Machine) -> Result<u64>,
) -> Result<u32> {
    let mut halfway = 0;
    while pages(machine)? < enough {
        machine.signal(libc::SIGSTOP)?;
        machine.wait_stopped()?;
        let now = pages(machine)?;
        halfway += u32::from(now > 0 && now < enough);
        machine.signal(libc::SIGCONT)?;
    }
    Ok(halfway)
}

fn prealloc_is_complete_whatever_signals_come() -> CaseResult {
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let mut halfway = 0;
    // A fast QEMU is stopped a few times only: as often as it takes.
    while halfway <= 10 {
        let mut machine = Machine::launch(&lab, &Config::new(preallocated(SIZE)))?;
        halfway += stop_and_go(&mut machine, SIZE / PAGE, pages_of)?;
        machine.connect()?;
        expect_whole(&machine)?;
        machine.kill()?;
    }
    println!("{halfway} stops while memory was allocated");
    Ok(())
}

/// A memfile lets no signal end fallocate(), so a tracer does it: QEMU's own repetition.
fn prealloc_goes_on_after_every_interrupted_call() -> CaseResult {
    const TIMES: u32 = 5;
    give_up(&mut *slot()?)?;
    let config = Config { traced: true, ..Config::new(preallocated(SIZE)) };
    let mut machine = Machine::launch(&lab()?, &config)?;
    let whole = |machine: &Machine| Ok(pages_of(machine)? == SIZE / PAGE);
    let failed = machine.fail_fallocate(Errno::EINTR, TIMES, whole)?;
    println!("{failed} calls were interrupted");
    ensure!(failed >= TIMES && failed % TIMES == 0, "{failed} calls: {}", machine.said());
    machine.connect()?;
    expect_whole(&machine)?;
    machine.kill()
}

/// A guest_memfd gives fallocate() up at any signal: there the storm is real.
fn prealloc_of_a_guest_memfd_goes_on_after_signals() -> CaseResult {
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let mut halfway = 0;
    while halfway <= 10 {
        let cgroup = Cgroup::new()?;
        let memory = Memory { prealloc: true, ..Memory::dimm(Kind::GuestMemfd, SMALL) };
        let config = Config::new(memory).within(&cgroup);
        let mut machine = Machine::launch(&lab, &config)?;
        let pages = |_: &Machine| Ok(cgroup.line("memory.stat", "file")? / PAGE);
        // The kernel's figure may lag behind by the amount that a CPU has not added yet.
        halfway += stop_and_go(&mut machine, (SMALL - 4 * MIB) / PAGE, pages)?;
        machine.connect()?;
        let file = cgroup.line("memory.stat", "file")?;
        ensure!(file + 4 * MIB > SMALL, "{} MiB are allocated", file / MIB);
        machine.kill()?;
    }
    println!("{halfway} stops while memory was allocated");
    Ok(())
}

fn prealloc_that_fails_ends_qemu_with_a_sentence() -> CaseResult {
    give_up(&mut *slot()?)?;
    let (lab, before) = (lab()?, Accounts::now()?);
    for (errno, words) in
        [(Errno::ENOMEM, "Cannot allocate memory"), (Errno::EIO, "Input/output error")]
    {
        let config = Config { traced: true, ..Config::new(preallocated(SIZE)) };
        let mut machine = Machine::launch(&lab, &config)?;
        let failed = machine.fail_fallocate(errno, 1, |_| Ok(false))?;
        expect_refused(&mut machine, words)?;
        ensure!(failed == 1, "{failed} calls failed with {errno}, and QEMU went on");
    }
    Module::memfile()?.expect_unused()?;
    before.expect_back(2 * MIB).context("after QEMU")
}

/// QEMU has ended, or does, and says in one sentence that it cannot preallocate and why.
fn expect_refused(machine: &mut Machine, why: &str) -> CaseResult {
    let status = machine.wait()?;
    let said = machine.said();
    println!("{said}");
    ensure!(!status.success(), "QEMU ends with {status}");
    ensure!(said.lines().count() == 1, "QEMU says more than a sentence: {said}");
    ensure!(said.contains("cannot preallocate") && said.contains(why), "QEMU says: {said}");
    Ok(())
}

/// The pool of huge pages, and that many in it. SKIP if there is no room for them.
fn pool_of(pages: u64) -> Result<(Pool, Setting)> {
    let pool = Pool::of(HUGE)?;
    pressure::drop_caches()?;
    pressure::compact()?;
    let filled = pool.fill(pages)?;
    Ok((pool, filled))
}

fn guest_boots_on_huge_pages_and_the_pool_gets_them_back() -> CaseResult {
    const MORE: u64 = 64 * MIB;
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let (pool, _filled) = pool_of(SMALL / HUGE)?;
    // KVM maps as huge pages what the host has as such: private memory only, not the guest's low
    // memory and not its shared side.
    let _small = [pressure::anonymous_huge("never")?, pressure::shmem_huge("never")?];
    let before = Accounts::now()?;
    let mut machine = Machine::start(&lab, &Config::new(Memory::dimm(Kind::Huge, SMALL)))?;
    pool.expect_used(0, "before the guest runs")?;
    machine.boot()?;
    let booted = expect_of_the_pool(&machine, &pool)?;
    machine.guest().hold("locked", "more", MORE, 30)?;
    let more = expect_of_the_pool(&machine, &pool)?;
    println!("{booted} huge pages when it is up, {more} with {} MiB", MORE / MIB);
    ensure!(more >= MORE / HUGE, "{more} huge pages");
    // Each is mapped as a huge page, unless it has been converted or split.
    let (mapped, wanted) = (kvm_figure(machine.pid(), "pages_2m")?, MORE / HUGE / 2);
    println!("KVM maps {mapped} huge pages");
    ensure!(mapped >= wanted, "KVM maps {mapped} huge pages of private memory, wanted {wanted}");
    machine.guest().verify("more", 30)?;
    fill(&mut machine, 31)?;
    verify(&mut machine, 31)?;
    release(&mut machine)?;
    machine.shut_down()?;
    pool.expect_used(0, "after the guest")?;
    before.expect_back(2 * MIB).context("after QEMU")
}

/// The guest's memory takes exactly the pages in use of the pool. Returns the number of huge pages.
fn expect_of_the_pool(machine: &Machine, pool: &Pool) -> Result<u64> {
    let (allocated, resident) = machine.private()?;
    ensure!(allocated == resident * PAGE, "{allocated} bytes, {resident} pages");
    pool.expect_used(allocated / pool.page, "in the guest")?;
    Ok(allocated / pool.page)
}

/// As for a disk that is full: the user makes room, and continues the guest.
fn guest_without_a_huge_page_stops_until_there_is_one() -> CaseResult {
    const WRITTEN: u64 = 96 * MIB;
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let (pool, _few) = pool_of(WRITTEN / HUGE / 2)?;
    let mut machine = Machine::start(&lab, &Config::new(Memory::dimm(Kind::Huge, SMALL)))?;
    machine.boot()?;
    machine.guest().begin_to_fork("memory", WRITTEN, 33, 0)?;
    machine.event("STOP")?;
    let status = machine.execute("query-status", json!({}))?;
    ensure!(status["status"] == "io-error", "{status}");
    ensure!(machine.said().contains("no private memory"), "QEMU says: {}", machine.said());
    let _enough = pool.fill(SMALL / HUGE)?;
    machine.execute("cont", json!({}))?;
    machine.guest().end_to_fork()?;
    machine.guest().check_processes()?;
    machine.guest().join()?;
    machine.shut_down()?;
    pool.expect_used(0, "after the guest")
}

/// A request of the balloon's is smaller than a huge page. Reports of free pages are not.
fn balloon_says_that_it_frees_no_huge_page() -> CaseResult {
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let (pool, _filled) = pool_of(SMALL / HUGE)?;
    let config = Config::new(Memory::dimm(Kind::Huge, SMALL)).with_balloon(false);
    let mut machine = Machine::start(&lab, &config)?;
    machine.boot()?;
    let all = machine.actual_memory()?;
    let before = expect_of_the_pool(&machine, &pool)?;
    machine.balloon(all - 64 * MIB)?;
    let after = expect_of_the_pool(&machine, &pool)?;
    ensure!(after >= before, "{before} huge pages before, {after} after: it frees some");
    let said = machine.said();
    ensure!(said.contains("consider free-page-reporting=on"), "QEMU says: {said}");
    machine.balloon(all)?;
    machine.shut_down()
}

fn guest_boots_with_all_its_memory_in_huge_pages() -> CaseResult {
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let (pool, _filled) = pool_of(SMALL / HUGE)?;
    let before = Accounts::now()?;
    let mut machine = Machine::start(&lab, &Config::new(all(Kind::Huge, SMALL)))?;
    let took = machine.boot()?;
    let pages = expect_of_the_pool(&machine, &pool)?;
    println!("{pages} huge pages when it was up after {:.1} s", took.as_secs_f64());
    fill(&mut machine, 32)?;
    verify(&mut machine, 32)?;
    release(&mut machine)?;
    machine.shut_down()?;
    pool.expect_used(0, "after the guest")?;
    before.expect_back(2 * MIB).context("after QEMU")
}

fn prealloc_of_huge_pages_takes_exactly_those_of_the_guest() -> CaseResult {
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let (pool, _filled) = pool_of(SMALL / HUGE + 4)?;
    let memory = Memory { prealloc: true, ..Memory::dimm(Kind::Huge, SMALL) };
    let machine = Machine::start(&lab, &Config::new(memory))?;
    pool.expect_used(SMALL / HUGE, "before the guest runs")?;
    machine.kill()?;
    pool.expect_used(0, "after the guest")
}

fn poison_ends_one_process_of_the_guest_and_no_other() -> CaseResult {
    /// The page of the process that gets the error.
    const BROKEN: usize = 77;
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let mut machine = Machine::start(&lab, &Config::new(Memory::dimm(Kind::BOTH, SIZE)))?;
    machine.boot()?;
    let base = dimm(&mut machine)? / PAGE;
    fill(&mut machine, 40)?;
    // The last process: its pages are new to the host, which shows where they are.
    let trace = Trace::start(&["memfile:memfile_get_pfn"])?;
    machine.guest().fork("locked", 1, PROCESS, 50)?;
    let events = trace.events()?;
    drop(trace);
    let frames = machine.guest().last_process_frames()?;
    // As good as any, if it was not there before.
    let mut places = frames.iter().skip(BROKEN).filter_map(|frame| {
        let index = frame.checked_sub(base)?;
        let event = events.iter().rfind(|event| event.number("index") == Some(index))?;
        event.hex("pfn").map(|pfn| (*frame, pfn))
    });
    let (frame, pfn) = places.next().context("none of its pages is new to the host")?;
    let counts = Counts::now()?;
    pressure::poison(pfn)?;
    counts.expect_grown(&["memfile.poison"], 1)?;
    println!("frame {frame:#x} of the guest is frame {pfn:#x} of the host");
    let signal = machine.guest().last_process_dies()?;
    ensure!(signal == libc::SIGBUS, "the process ended with signal {signal}");
    println!("{}", machine.said());
    // The guest knows which page it was, and all else is as it was.
    let lost = machine.guest().meminfo("HardwareCorrupted")?;
    ensure!(lost == PAGE, "the guest has lost {lost} bytes");
    verify(&mut machine, 40)?;
    release(&mut machine)?;
    machine.guest().hold("memory", "again", 32 * MIB, 41)?;
    machine.guest().verify("again", 41)?;
    machine.shut_down()?;
    pressure::unpoison(pfn)
}

/// The guest's address of its DIMM.
fn dimm(machine: &mut Machine) -> Result<u64> {
    let devices = machine.execute("query-memory-devices", json!({}))?;
    let base = devices.pointer("/0/data/addr").and_then(serde_json::Value::as_u64);
    base.context("the guest has no DIMM")
}

fn prealloc_without_memory_refuses_to_start_and_leaves_nothing() -> CaseResult {
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let before = Accounts::now()?;
    // Room for QEMU and its low memory, and for some of the rest.
    let allowed = (mem::meminfo("Committed_AS")? + 512 * MIB) >> 10;
    // Each of the two settings zeroes the other: this one is restored last.
    let ratio = "/proc/sys/vm/overcommit_ratio";
    let _ratio = Setting::set(ratio, &pressure::read(ratio)?)?;
    let _kbytes = Setting::set("/proc/sys/vm/overcommit_kbytes", &allowed.to_string())?;
    let _mode = Setting::set("/proc/sys/vm/overcommit_memory", "2")?;
    let Err(error) = Machine::start(&lab, &Config::new(preallocated(1024 * MIB))) else {
        bail!("QEMU has 1 GiB where there is room for half of that");
    };
    let text = format!("{error:#}");
    println!("{text}");
    ensure!(text.contains("prealloc") && text.contains("space"), "QEMU says: {text}");
    Module::memfile()?.expect_unused()?;
    before.expect_back(2 * MIB).context("after QEMU")
}

fn qemu_killed_while_it_starts_leaves_no_memory_behind() -> CaseResult {
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let before = Accounts::now()?;
    let ahead = [preallocated(SIZE), Memory { prealloc: true, ..all(Kind::PINNED, SIZE) }];
    let parts = [0, 1, 4, 16, 64];
    for (memory, part) in ahead.into_iter().flat_map(|memory| parts.map(|part| (memory, part))) {
        let machine = Machine::launch(&lab, &Config::new(memory))?;
        while pages_of(&machine)? * part < SIZE / PAGE && part > 0 {
            thread::yield_now();
        }
        println!("killed with {} pages", pages_of(&machine)?);
        machine.kill()?;
        before.expect_back(2 * MIB).context("after QEMU")?;
    }
    // While the firmware runs, and the guest's kernel after it.
    let demand = [Memory::dimm(Kind::BOTH, SIZE), all(Kind::BOTH, SIZE)];
    for (memory, wanted) in demand.into_iter().flat_map(|m| [(m, 1000), (m, 4000)]) {
        let mut machine = Machine::start(&lab, &Config::new(memory))?;
        machine.execute("cont", json!({}))?;
        let grown = || Ok::<_, anyhow::Error>(mem::content()? / PAGE);
        let start = grown()?;
        while grown()? < start + wanted {
            thread::yield_now();
        }
        machine.kill()?;
        before.expect_back(2 * MIB).context("after QEMU")?;
    }
    Module::memfile()?.expect_unused()
}

/// All memory is of this kind, firmware and page tables included.
fn all(kind: Kind, size: u64) -> Memory {
    Memory { kind, layout: Layout::All, size, prealloc: false }
}

/// From QEMU's start on, by an access of the guest's: none is allocated in advance.
fn every_page_of_the_file_was_asked_for() -> CaseResult {
    const MORE: u64 = 16 * MIB;
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    // A page that is asked for is a page of the file.
    let _pages = pressure::base_pages()?;
    let trace = Trace::start(&["memfile:memfile_get_pfn"])?;
    let mut machine = Machine::start(&lab, &Config::new(Memory::dimm(Kind::BOTH, SMALL)))?;
    machine.boot()?;
    let base = dimm(&mut machine)? / PAGE;
    machine.guest().hold("locked", "more", MORE, 90)?;
    let frames = machine.guest().frames("more")?;
    let (allocated, resident) = machine.private()?;
    let events = trace.events()?;
    let asked: BTreeSet<_> = events.iter().filter_map(|event| event.number("index")).collect();
    println!("{resident} pages, {} asked for", asked.len());
    ensure!(allocated == resident * PAGE, "{allocated} bytes, {resident} pages");
    ensure!(asked.len() as u64 == resident, "{} pages were asked for", asked.len());
    // Those that the guest says it has are among them, unless they are not of this memory.
    let ours = frames.iter().filter_map(|frame| frame.checked_sub(base));
    let missing = ours.clone().filter(|index| !asked.contains(index)).count();
    ensure!(missing == 0, "{missing} pages have not been asked for");
    ensure!(ours.count() as u64 > MORE / PAGE / 2, "the guest has hardly any here");
    machine.shut_down()
}

fn guest_boots_with_all_its_memory_private() -> CaseResult {
    give_up(&mut *slot()?)?;
    let (exits, loaded) = boots_with_all_private(&lab()?, SIZE)?;
    // Kernel and initramfs did not come by port, a KiB or less at a time.
    ensure!(exits < loaded / 1024, "{exits} accesses to ports for {loaded} bytes");
    Ok(())
}

/// The end of low memory, where firmware puts its tables and a boot loader the initramfs, is private.
fn guest_boots_with_a_private_node_below_4_gib() -> CaseResult {
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let layout = Layout::Node { low: 128 * MIB };
    let memory = |kind| Memory { kind, layout, size: SMALL, prealloc: false };
    let mut machine = Machine::start(&lab, &Config::new(memory(Kind::BOTH)))?;
    machine.boot()?;
    fill(&mut machine, 88)?;
    verify(&mut machine, 88)?;
    release(&mut machine)?;
    machine.shut_down()?;
    // KVM does not reach a guest_memfd.
    let mut machine = Machine::start(&lab, &Config::new(memory(Kind::GuestMemfd)))?;
    let Err(error) = machine.boot() else { bail!("a guest starts that KVM cannot read") };
    let error = format!("{error:#}");
    ensure!(error.contains("a guest cannot start in private memory"), "{error}");
    Module::memfile()?.expect_unused()
}

/// Only our own knows that a kernel is there already.
fn firmware_that_the_user_names_gets_the_kernel_when_it_asks() -> CaseResult {
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    let config = Config { append: "quiet".into(), ..Config::new(all(Kind::BOTH, SMALL)) };
    // The same, under a name that QEMU does not know.
    let named =
        lab.qemu.with_file_name("qemu-bundle/usr/share/qemu/bios-256k.bin").display().to_string();
    for (arguments, ahead) in [(vec![], true), (vec!["-bios".to_owned(), named], false)] {
        let mut machine = Machine::start(&lab, &config.clone().with(arguments))?;
        let (shared, loaded) = (machine.shared()?, machine.loaded()?);
        println!("{} of {} KiB are loaded ahead", shared >> 10, loaded >> 10);
        ensure!((shared > loaded / 2) == ahead, "{shared} of {loaded} bytes are loaded ahead");
        if !ahead {
            machine.boot()?;
            let exits = kvm_figure(machine.pid(), "io_exits")?;
            ensure!(exits > loaded / PAGE, "{exits} accesses to ports for {loaded} bytes");
        }
        machine.kill()?;
    }
    Module::memfile()?.expect_unused()
}

/// The same lab whose guests may read KVM's clock. See [`crate::qemu::CPU`].
fn with_kvmclock(lab: Lab) -> Lab {
    Lab { cpu: lab.cpu.replace(",-kvmclock", ""), ..lab }
}

fn expect_kvmclock(machine: &mut Machine) -> CaseResult {
    let source = "/sys/devices/system/clocksource/clocksource0/current_clocksource";
    let source = machine.guest().read(source)?;
    ensure!(source.trim() == "kvm-clock", "the guest's clock is {source}");
    Ok(())
}

/// And with the clock that KVM writes there.
fn whole_guest_is_swapped_out_with_its_kernel_and_page_tables() -> CaseResult {
    give_up(&mut *slot()?)?;
    let (lab, before) = (with_kvmclock(lab()?), Accounts::now()?);
    let cgroup = Cgroup::new()?;
    let config = Config::new(all(Kind::BOTH, SIZE)).within(&cgroup);
    let mut machine = Machine::start(&lab, &config)?;
    machine.boot()?;
    expect_kvmclock(&mut machine)?;
    is_swapped_out_and_comes_back(&mut machine, &cgroup)?;
    expect_kvmclock(&mut machine)?;
    machine.shut_down()?;
    drop(cgroup);
    before.expect_back(2 * MIB).context("after QEMU")
}

/// Returns how often the guest accessed ports until it was up, and how large what it booted is.
fn boots_with_all_private(lab: &Lab, size: u64) -> Result<(u64, u64)> {
    let before = Accounts::now()?;
    // Each character of its console is an access to a port.
    let config = Config { append: "quiet".into(), ..Config::new(all(Kind::BOTH, size)) };
    let mut machine = Machine::start(lab, &config)?;
    let started = machine.private_pages()?;
    let took = machine.boot()?;
    let (allocated, resident) = machine.private()?;
    println!(
        "{} MiB: {} KiB before it ran, {} KiB when it was up after {:.1} s",
        size / MIB,
        (started * PAGE) >> 10,
        allocated >> 10,
        took.as_secs_f64()
    );
    ensure!(allocated == resident * PAGE, "{allocated} bytes, {resident} pages");
    // The guest's kernel writes 1/64 of its memory to describe it.
    ensure!(allocated < 128 * MIB + size / 32, "{} MiB", allocated / MIB);
    let shared = machine.shared()?;
    ensure!(shared < 4 * MIB, "{} KiB beside the private memory", shared >> 10);
    let (exits, loaded) = (kvm_figure(machine.pid(), "io_exits")?, machine.loaded()?);
    println!("{exits} accesses to ports, {} KiB loaded", loaded >> 10);
    fill(&mut machine, 15)?;
    verify(&mut machine, 15)?;
    release(&mut machine)?;
    machine.shut_down()?;
    before.expect_back(2 * MIB).context("after QEMU")?;
    Ok((exits, loaded))
}

fn stock_kernel_boots_and_virtio_mem_gives_memory_back() -> CaseResult {
    give_up(&mut *slot()?)?;
    let lab = lab()?.with_stock_kernel()?;
    let layout = Layout::Device { low: 512 * MIB, requested: 256 * MIB };
    let memory = Memory { kind: Kind::BOTH, layout, size: SIZE, prealloc: false };
    let before = Accounts::now()?;
    let mut machine = Machine::start(&lab, &Config::new(memory))?;
    let took = machine.boot()?;
    println!("Linux {} after {:.1} s", machine.guest().release(), took.as_secs_f64());
    await_plugged(&mut machine, 256 * MIB)?;
    machine.guest().hold("memory", "plugged", 160 * MIB, 16)?;
    let full = machine.private_pages()?;
    ensure!(full >= 64 * MIB / PAGE, "{full} pages");
    machine.guest().verify("plugged", 16)?;
    machine.guest().release_area("plugged")?;
    machine.guest().hold("memory", "keep", 8 * MIB, 17)?;
    let resize = json!({ "path": "/machine/peripheral/memory", "property": "requested-size",
                         "value": 64 * MIB });
    machine.execute("qom-set", resize)?;
    await_plugged(&mut machine, 64 * MIB)?;
    let now = machine.private_pages()?;
    println!("{full} pages with 256 MiB plugged, {now} with 64");
    ensure!(now <= 64 * MIB / PAGE && now < full, "{now} pages");
    machine.guest().verify("keep", 17)?;
    machine.shut_down()?;
    before.expect_back(2 * MIB).context("after QEMU")
}

/// Wait until the guest has the requested size of a virtio-mem device.
fn await_plugged(machine: &mut Machine, bytes: u64) -> CaseResult {
    loop {
        let devices = machine.execute("query-memory-devices", json!({}))?;
        let size = devices.pointer("/0/data/size").and_then(serde_json::Value::as_u64);
        if size == Some(bytes) {
            return Ok(());
        }
        machine.event("MEMORY_DEVICE_SIZE_CHANGE").context("virtio-mem")?;
    }
}

fn guest_of_32_gib_boots_in_a_machine_of_2() -> CaseResult {
    boots_with_all_private(&lab()?, 32 << 30).map(drop)
}

fn stock_kernel_boots_with_all_its_memory_private() -> CaseResult {
    give_up(&mut *slot()?)?;
    boots_with_all_private(&lab()?.with_stock_kernel()?, 1024 * MIB).map(drop)
}

fn two_guests_larger_than_the_machine_run_if_reclaimable() -> CaseResult {
    /// What the machine has left, and what each guest's process writes.
    const LEFT: u64 = 224 * MIB;
    const EACH: u64 = 144 * MIB;
    give_up(&mut *slot()?)?;
    let lab = lab()?;
    lock_own_memory()?;
    pressure::drop_caches()?;
    let mut count = mem::meminfo("MemAvailable")?.saturating_sub(LEFT) / HUGE;
    let knob = "/proc/sys/vm/nr_hugepages";
    let ballast = Setting::set(knob, &count.to_string())?;
    let left = mem::meminfo("MemAvailable")?;
    if left > 2 * SMALL {
        return skip(format!("a machine of {} MiB does not get smaller", left / MIB));
    }
    let swap = Swap::on(4 * SMALL)?;
    let before = Accounts::now()?;
    let counts = Counts::now()?;
    let mut guests = Vec::new();
    for seed in [20, 21] {
        let mut machine = Machine::start(&lab, &Config::new(all(Kind::BOTH, SMALL)))?;
        machine.boot()?;
        machine.guest().hold("sparse", "large", EACH, seed)?;
        guests.push((seed, machine));
    }
    let pages = guests.iter().map(|(_, machine)| machine.private_pages()).sum::<Result<u64>>()?;
    println!("two guests have {} MiB where {} are left", pages * PAGE / MIB, left / MIB);
    ensure!(pages * PAGE > left, "they fit");
    // What else there was to reclaim differs: until enough of the guests is out.
    let most = count + SMALL / HUGE;
    let mut out = 8000;
    loop {
        while counts.grown("memfile.swap_out")? < out {
            ensure!(count < most, "the guests stay, and others go");
            count += 8;
            pressure::write(knob, &count.to_string())?;
        }
        for (seed, machine) in &mut guests {
            machine.guest().verify("large", *seed)?;
        }
        // Some of it nobody reads again.
        if counts.grown("pswpin")? >= 1000 {
            break;
        }
        out += 2000;
    }
    println!("{} MiB of swap in use", swap.used()? / MIB);
    for (_, machine) in guests {
        machine.shut_down()?;
    }
    drop(swap);
    before.expect_back(8 * MIB).context("after the guests")?;
    drop(ballast);
    Ok(())
}

/// How often a guest is booted: `MEMFILE_BOOTS` times.
fn boots() -> u32 {
    std::env::var("MEMFILE_BOOTS").ok().and_then(|s| s.parse().ok()).unwrap_or(20)
}

/// Boot such a guest again and again, and `look` at it: how often that failed.
fn failed_boots(lab: &Lab, memory: Memory, look: impl Fn(&mut Machine) -> CaseResult) -> u32 {
    let name = format!("{}, as {}", memory.kind.what(), memory.layout.what());
    let (boots, mut failed) = (boots(), 0);
    for n in 1..=boots {
        let boot = || {
            let mut machine = Machine::start(lab, &Config::new(memory))?;
            let took = machine.boot()?;
            look(&mut machine)?;
            machine.kill()?;
            Ok::<_, anyhow::Error>(took)
        };
        match boot() {
            Ok(took) => println!("{name}: {n}: {:.1} s", took.as_secs_f64()),
            Err(e) => {
                failed += 1;
                println!("{name}: {n}: {e:#}");
            }
        }
    }
    println!("{name}: {} of {boots} boots came up", boots - failed);
    failed
}

fn every_kind_boots(lab: &Lab, layout: Layout) -> CaseResult {
    let mut failed = 0;
    for (_, kind) in Kind::NAMES {
        // KVM itself cannot use a guest_memfd, as it has to when all memory is private.
        if kind == Kind::GuestMemfd && layout == Layout::All {
            continue;
        }
        let _pool = if kind == Kind::Huge { Some(pool_of(SMALL / HUGE)?) } else { None };
        let memory = Memory { kind, layout, size: SMALL, prealloc: false };
        failed += failed_boots(lab, memory, |_| Ok(()));
    }
    ensure!(failed == 0, "{failed} boots did not come up");
    Ok(())
}

fn every_kind_boots_twenty_times_as_a_dimm() -> CaseResult {
    every_kind_boots(&lab()?, Layout::Dimm { low: 256 * MIB })
}

fn every_kind_boots_twenty_times_as_virtio_mem() -> CaseResult {
    let layout = Layout::Device { low: 512 * MIB, requested: SMALL };
    every_kind_boots(&lab()?.with_stock_kernel()?, layout)
}

fn every_kind_boots_twenty_times_as_all_memory() -> CaseResult {
    every_kind_boots(&lab()?, Layout::All)
}

fn guest_boots_twenty_times_with_kvmclock() -> CaseResult {
    let lab = with_kvmclock(lab()?);
    let failed = failed_boots(&lab, all(Kind::BOTH, SMALL), expect_kvmclock);
    ensure!(failed == 0, "{failed} boots did not come up");
    Ok(())
}
