// SPDX-License-Identifier: GPL-2.0
//! KVM's own accesses to private memory: to the memfile if the VM asks for it, else none (rule 27).

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::guest::{self, Command};
use crate::knobs::Setting;
use crate::ktap::{CaseResult, Suite};
use crate::pattern::Pattern;
use crate::pressure::{self, Cgroup, Counts, MovableZone, Swap};
use crate::support::setup::{
    BOTH, GUEST, LAYOUTS, MOVABLE, PINNED, PORT, SHARED, SLOT, Setup, check_view,
};
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{Exit, Private, Vcpu, Vm, VmType};
use crate::{GIB, MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "kvmaccess",
    [
        it_is_chosen_before_the_first_private_slot,
        string_output_sends_private_memory,
        string_input_lands_in_private_memory,
        copy_reaches_private_memory_and_mmio,
        code_in_private_memory_can_do_mmio,
        each_access_goes_where_the_attribute_says,
        access_allocates_what_it_needs,
        access_to_a_poisoned_page_ends_kvm_run_with_its_errno,
        locked_instruction_is_atomic: 120,
        locked_instruction_is_atomic_while_pages_move_and_are_swapped: 240,
        page_walk_sets_accessed_and_dirty_bits,
        clock_is_in_private_memory,
        clock_follows_its_page,
        clock_follows_a_conversion,
        steal_time_is_in_private_memory,
        hyperv_assist_page_is_in_private_memory,
        access_is_right_while_pages_move: 240,
        access_is_right_while_pages_are_swapped: 240,
        access_is_right_while_pages_are_punched: 240,
        nothing_is_sent_without_it,
        private_memory_is_no_mmio_without_it,
        private_code_is_not_decoded_without_it,
        page_tables_are_not_walked_without_it,
        clock_stays_away_without_it,
        hyperv_assist_page_is_refused_without_it,
    ]
);

const SIZE: u64 = MIB;
/// An amount for about a second: each half word that is sent is an exit.
const FEW: u64 = 8 * PAGE;
/// A guest physical address without memory.
const MMIO: u64 = 400 * GIB;
/// The most that KVM sends to a port at once: its page for that.
const MOST: u64 = PAGE;

const MSR_KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
const MSR_KVM_STEAL_TIME: u32 = 0x4b56_4d03;

/// Let KVM emulate the instructions that the guest program marks.
fn emulation() -> Result<Setting> {
    Setting::set("/sys/module/kvm/parameters/force_emulation_prefix", "1")
}

/// The bytes of a pattern.
fn bytes(pattern: Pattern, start: u64, len: u64) -> Vec<u8> {
    (start..start + len).step_by(8).flat_map(|at| pattern.word(at).to_le_bytes()).collect()
}

/// The string that the guest sends, until its command is done.
fn output(vcpu: &mut Vcpu, start: u64, len: u64) -> Result<Vec<u8>> {
    let mut sent = Vec::new();
    let mut exit = vcpu.start(Command::Output, &[start, len / 4, PORT])?;
    while exit != Exit::Done {
        ensure!(exit == Exit::Port { port: PORT as u16, write: true }, "{exit:x?}");
        sent.extend_from_slice(vcpu.port_data());
        exit = vcpu.run()?;
    }
    Ok(sent)
}

/// Let the guest receive a string.
fn input(vcpu: &mut Vcpu, start: u64, content: &[u8]) -> CaseResult {
    let mut left = content;
    let mut exit = vcpu.start(Command::Input, &[start, content.len() as u64 / 4, PORT])?;
    while exit != Exit::Done {
        ensure!(exit == Exit::Port { port: PORT as u16, write: false }, "{exit:x?}");
        let data = vcpu.port_data();
        ensure!(data.len() <= left.len(), "{} bytes wanted, {} left", data.len(), left.len());
        let (now, later) = left.split_at(data.len());
        data.copy_from_slice(now);
        left = later;
        exit = vcpu.run()?;
    }
    ensure!(left.is_empty(), "{} bytes were not wanted", left.len());
    Ok(())
}

fn it_is_chosen_before_the_first_private_slot() -> CaseResult {
    let s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let choose = |arg| s.vm.raw_enable_cap(KVM_CAP_MEMFILE_ACCESS, arg);
    ensure!(s.vm.check_extension(KVM_CAP_MEMFILE_ACCESS) == 1);
    expect_errno("with a private slot", choose(0), &[Errno::EBUSY])?;
    expect_errno("an unknown choice", choose(2), &[Errno::EINVAL])?;
    s.vm.raw_delete(SLOT)?;
    choose(0).context("without one")?;
    let full = s.vm.raw_enable_cap_full(KVM_CAP_MEMFILE_ACCESS, 1, [1, 0, 0, 0]);
    expect_errno("flags", full, &[Errno::EINVAL])?;
    let full = s.vm.raw_enable_cap_full(KVM_CAP_MEMFILE_ACCESS, 0, [1, 0, 0, 1]);
    expect_errno("a fourth argument", full, &[Errno::EINVAL])?;
    let ordinary = Vm::new(VmType::Default)?;
    ensure!(ordinary.check_extension(KVM_CAP_MEMFILE_ACCESS) == 0);
    expect_errno(
        "a VM without private memory",
        ordinary.raw_enable_cap(KVM_CAP_MEMFILE_ACCESS, 1),
        &[Errno::EINVAL],
    )
}

/// Lengths and places at which a string begins, ends or crosses pages.
const STRINGS: [(u64, u64); 5] =
    [(0, 8), (PAGE - 16, 32), (3 * PAGE + 8, 2 * PAGE), (0x100, 0x80), (5 * PAGE, MOST)];

fn string_output_sends_private_memory() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    s.vcpu.fill(s.slot.gpa, SIZE, GUEST)?;
    for (offset, len) in STRINGS {
        let start = s.slot.gpa + offset;
        let sent = output(&mut s.vcpu, start, len)?;
        ensure!(sent == bytes(GUEST, start, len), "[+{offset:#x}, +{len:#x}): wrong bytes");
    }
    Ok(())
}

fn string_input_lands_in_private_memory() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    for (offset, len) in STRINGS {
        s.vcpu.fill(s.slot.gpa, SIZE, Pattern::ZERO)?;
        let start = s.slot.gpa + offset;
        input(&mut s.vcpu, start, &bytes(GUEST, start, len))?;
        s.vcpu.verify(start, len, GUEST)?;
        s.vcpu.verify(s.slot.gpa, offset, Pattern::ZERO)?;
        s.vcpu.verify(start + len, SIZE - offset - len, Pattern::ZERO)?;
    }
    check_view(&s.slot, 0, SIZE, SHARED)
}

fn copy_reaches_private_memory_and_mmio() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let gpa = s.slot.gpa;
    s.vcpu.fill(gpa, SIZE, GUEST)?;
    let mut exit = s.vcpu.start(Command::Copy, &[MMIO, gpa + PAGE - 8, 2])?;
    for n in 0..2 {
        let at = gpa + PAGE - 8 + n * 8;
        ensure!(exit == Exit::Mmio { gpa: MMIO + n * 8, write: true }, "{exit:x?}");
        ensure!(s.vcpu.mmio_data() == GUEST.word(at).to_le_bytes(), "{:x?}", s.vcpu.mmio_data());
        exit = s.vcpu.run()?;
    }
    ensure!(exit == Exit::Done, "{exit:x?}");

    let mut exit = s.vcpu.start(Command::Copy, &[gpa + 2 * PAGE - 8, MMIO, 2])?;
    for n in 0..2 {
        ensure!(exit == Exit::Mmio { gpa: MMIO + n * 8, write: false }, "{exit:x?}");
        s.vcpu.mmio_data().copy_from_slice(&(0x1234 + n).to_le_bytes());
        exit = s.vcpu.run()?;
    }
    ensure!(exit == Exit::Done, "{exit:x?}");
    for n in 0..2 {
        let word = s.vcpu.load(gpa + 2 * PAGE - 8 + n * 8)?;
        ensure!(word == 0x1234 + n, "the guest reads {word:#x}");
    }
    Ok(())
}

/// Copy the guest program's own page to private memory, and let the vCPU run there.
fn run_from_private_memory(s: &mut Setup) -> CaseResult {
    s.vcpu.call(Command::Copy, &[s.slot.gpa, guest::CODE, PAGE / 8])?;
    s.vcpu.move_program(s.slot.gpa)
}

fn code_in_private_memory_can_do_mmio() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    run_from_private_memory(&mut s)?;
    let exit = s.vcpu.start(Command::Load, &[MMIO])?;
    ensure!(exit == Exit::Mmio { gpa: MMIO, write: false }, "{exit:x?}");
    s.vcpu.mmio_data().copy_from_slice(&0x5678u64.to_le_bytes());
    let exit = s.vcpu.run()?;
    ensure!(exit == Exit::Done && s.vcpu.result(0) == 0x5678, "{exit:x?}");
    let exit = s.vcpu.start(Command::Store, &[MMIO + 8, 0x9abc])?;
    ensure!(exit == Exit::Mmio { gpa: MMIO + 8, write: true }, "{exit:x?}");
    ensure!(s.vcpu.mmio_data() == 0x9abcu64.to_le_bytes());
    let exit = s.vcpu.run()?;
    ensure!(exit == Exit::Done, "{exit:x?}");
    Ok(())
}

fn each_access_goes_where_the_attribute_says() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let gpa = s.slot.gpa;
    s.vcpu.fill(gpa, SIZE, GUEST)?;
    for page in (0..8).step_by(2) {
        s.vm.set_shared(gpa + page * PAGE, PAGE)?;
    }
    let sent = output(&mut s.vcpu, gpa, 8 * PAGE)?;
    for (page, got) in (0..8).zip(sent.chunks(PAGE as usize)) {
        let pattern = if page % 2 == 0 { SHARED } else { GUEST };
        ensure!(got == bytes(pattern, gpa + page * PAGE, PAGE), "page {page}: wrong bytes");
    }
    s.vm.set_private(gpa, SIZE)?;
    let sent = output(&mut s.vcpu, gpa, 8 * PAGE)?;
    ensure!(sent == bytes(GUEST, gpa, 8 * PAGE), "all private again: wrong bytes");
    Ok(())
}

fn access_allocates_what_it_needs() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let sent = output(&mut s.vcpu, s.slot.gpa + 3 * PAGE, 8)?;
    ensure!(sent == [0; 8], "a new page reads {sent:x?}");
    expect_allocated(&s.fd, PAGE, "KVM has read a page")
}

fn access_to_a_poisoned_page_ends_kvm_run_with_its_errno() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let gpa = s.slot.gpa;
    s.vcpu.fill(gpa, SIZE, GUEST)?;
    let trace = pressure::frames(&s.vcpu, &s.slot, &s.fd)?;
    let frame = trace.get(&PAGE).context("the page is not traced")?.pfn;
    pressure::poison(frame)?;
    let mut work = || -> Result<[Exit; 3]> {
        let read = s.vcpu.start(Command::Output, &[gpa + PAGE, 2, PORT])?;
        let mut second = s.vm.vcpu(1)?;
        let mut write = second.start(Command::Input, &[gpa + PAGE, 2, PORT])?;
        if write == (Exit::Port { port: PORT as u16, write: false }) {
            write = second.run()?;
        }
        // Nothing is remembered: an error of another kind is reported as such.
        s.vm.set_shared(gpa + PAGE, PAGE)?;
        s.vm.raw_delete(SLOT)?;
        let gone = s.vm.vcpu(2)?.start(Command::Output, &[gpa + PAGE, 2, PORT])?;
        Ok([read, write, gone])
    };
    let exits = work();
    drop(s);
    pressure::unpoison(frame)?;
    let [read, write, gone] = exits?;
    let flags = u64::from(kvm_bindings::KVM_MEMORY_EXIT_FLAG_PRIVATE);
    let fault = Exit::MemoryFault { errno: Errno::EHWPOISON, gpa: gpa + PAGE, size: PAGE, flags };
    ensure!(read == fault, "KVM reads: {read:x?}");
    ensure!(write == fault, "KVM writes: {write:x?}");
    ensure!(!matches!(gone, Exit::MemoryFault { .. } | Exit::Error(_)), "no slot: {gone:x?}");
    Ok(())
}

/// One vCPU counts by itself, the other through KVM. Returns how far they should have counted.
fn count_both_ways(s: &mut Setup, second: &mut Vcpu) -> Result<u64> {
    const ROUNDS: u64 = 3000;
    let gpa = s.slot.gpa;
    let beside = thread::scope(|scope| -> Result<u64> {
        let by_kvm = scope.spawn(|| second.call(Command::Count, &[gpa, ROUNDS, 1]));
        let mut total = 0;
        while !by_kvm.is_finished() {
            s.vcpu.call(Command::Count, &[gpa, 1000, 0])?;
            total += 1000;
        }
        by_kvm.join().map_err(|_| anyhow!("the vCPU thread panicked"))??;
        Ok(total)
    })?;
    println!("{beside} rounds beside, {} exchanges began again", second.result(0));
    Ok(ROUNDS + beside)
}

fn locked_instruction_is_atomic() -> CaseResult {
    let _emulation = emulation()?;
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let mut second = s.vm.vcpu(1)?;
    let wanted = count_both_ways(&mut s, &mut second)?;
    let word = s.vcpu.load(s.slot.gpa)?;
    ensure!(word == wanted, "counted to {word}, wanted {wanted}");
    Ok(())
}

/// The page of the word, and those of the page tables that KVM walks for it.
fn locked_instruction_is_atomic_while_pages_move_and_are_swapped() -> CaseResult {
    let _emulation = emulation()?;
    let _pages = pressure::base_pages()?;
    let zone = MovableZone::make(2)?;
    let _swap = Swap::on(64 * MIB)?;
    let cgroup = Cgroup::enter()?;
    let mut s = Setup::used_by_kvm(BOTH, true, SIZE)?;
    let mut second = s.vm.vcpu(1)?;
    private_page_tables(&mut s)?;
    second.set_page_tables(s.slot.gpa + PAGE)?;
    let counts = Counts::now()?;
    let stop = AtomicBool::new(false);
    let wanted = thread::scope(|scope| -> Result<u64> {
        let actor = scope.spawn(|| -> CaseResult {
            while !stop.load(Ordering::Relaxed) {
                zone.shuffle()?;
                cgroup.reclaim(SIZE)?;
            }
            Ok(())
        });
        let mut work = || -> Result<u64> {
            let mut wanted = 0;
            while counts.grown("memfile.migrate")? < 20 || counts.grown("memfile.swap_out")? < 20 {
                ensure!(!actor.is_finished(), "the actor has ended");
                wanted += count_both_ways(&mut s, &mut second)?;
            }
            Ok(wanted)
        };
        let result = work();
        stop.store(true, Ordering::Relaxed);
        actor.join().map_err(|_| anyhow!("the actor panicked"))??;
        result
    })?;
    let word = s.vcpu.load(s.slot.gpa)?;
    ensure!(word == wanted, "counted to {word}, wanted {wanted}");
    Ok(())
}

const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;

/// Page tables in private memory, at the slot's second and third page.
fn private_page_tables(s: &mut Setup) -> Result<u64> {
    let (pml4, pdpt) = (s.slot.gpa + PAGE, s.slot.gpa + 2 * PAGE);
    s.vcpu.call(Command::Copy, &[pdpt, guest::PML4 + PAGE, PAGE / 8])?;
    s.vcpu.store(pml4, pdpt | 3)?;
    s.vcpu.set_page_tables(pml4)?;
    Ok(pdpt)
}

fn page_walk_sets_accessed_and_dirty_bits() -> CaseResult {
    let _emulation = emulation()?;
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    // Memory that only KVM touches, each in a GiB of its own.
    let (read, written) = (40 * GIB, 41 * GIB);
    let other = memfile(PAGE)?;
    s.vm.add_private(SLOT + 1, read, PAGE, Private::Memfile, other.as_fd(), 0)?;
    let another = memfile(PAGE)?;
    s.vm.add_private(SLOT + 2, written, PAGE, Private::Memfile, another.as_fd(), 0)?;
    for gpa in [read, written] {
        s.vm.set_private(gpa, PAGE)?;
    }
    let pdpt = private_page_tables(&mut s)?;
    let entry = |gpa| pdpt + gpa / GIB * 8;
    let before = (s.vcpu.load(entry(read))?, s.vcpu.load(entry(written))?);
    ensure!((before.0 | before.1) & (ACCESSED | DIRTY) == 0, "{before:x?}");
    s.vcpu.call(Command::Touch, &[read, 0])?;
    s.vcpu.call(Command::Touch, &[written, 1, 0x77])?;
    let after = (s.vcpu.load(entry(read))?, s.vcpu.load(entry(written))?);
    ensure!(after.0 == before.0 | ACCESSED, "after a load: {:#x}", after.0);
    ensure!(after.1 == before.1 | ACCESSED | DIRTY, "after a store: {:#x}", after.1);
    let word = s.vcpu.load(written)?;
    ensure!(word == 0x77, "the guest reads {word:#x}");
    Ok(())
}

/// The clock at `gpa` as the guest reads it: version, and conversion factor.
fn clock(vcpu: &mut Vcpu, gpa: u64) -> Result<(u32, u64)> {
    Ok((vcpu.load(gpa)? as u32, vcpu.load(gpa + 24)?))
}

fn expect_clock(vcpu: &mut Vcpu, gpa: u64, when: &str) -> CaseResult {
    let (version, factor) = clock(vcpu, gpa)?;
    ensure!(version != 0 && version % 2 == 0 && factor != 0, "{when}: {version}, {factor:#x}");
    Ok(())
}

/// Have KVM write the clock; each time anew.
fn set_clock(vcpu: &mut Vcpu, gpa: u64) -> CaseResult {
    vcpu.set_msr(MSR_KVM_SYSTEM_TIME_NEW, gpa | 1)
}

fn clock_is_in_private_memory() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let gpa = s.slot.gpa + 0x40;
    set_clock(&mut s.vcpu, gpa)?;
    expect_clock(&mut s.vcpu, gpa, "first")?;
    check_view(&s.slot, 0, SIZE, SHARED)
}

/// When the page is punched, and when it has moved.
fn clock_follows_its_page() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let zone = MovableZone::make(2)?;
    let _swap = Swap::on(64 * MIB)?;
    let cgroup = Cgroup::enter()?;
    let mut s = Setup::used_by_kvm(BOTH, true, SIZE)?;
    let gpa = s.slot.gpa;
    // KVM may write it at other times, too. It counts from what is in the page.
    while clock(&mut s.vcpu, gpa)?.0 < 100 {
        set_clock(&mut s.vcpu, gpa)?;
    }
    expect_clock(&mut s.vcpu, gpa, "first")?;

    punch(&s.fd, 0, PAGE)?;
    set_clock(&mut s.vcpu, gpa)?;
    expect_clock(&mut s.vcpu, gpa, "in a new page")?;

    let (mut version, _) = clock(&mut s.vcpu, gpa)?;
    ensure!(version < 100, "version {version} in a new page");
    for block in &zone.blocks {
        block.offline()?;
        set_clock(&mut s.vcpu, gpa)?;
        expect_clock(&mut s.vcpu, gpa, "in a page that has moved")?;
        let (now, _) = clock(&mut s.vcpu, gpa)?;
        ensure!(now > version, "version {version}, then {now}");
        version = now;
        block.give_back("online_movable")?;
    }

    while s.resident()? > 0 {
        cgroup.reclaim_unused(SIZE)?;
    }
    set_clock(&mut s.vcpu, gpa)?;
    expect_clock(&mut s.vcpu, gpa, "in a page that was in swap")?;
    let (now, _) = clock(&mut s.vcpu, gpa)?;
    ensure!(now > version, "version {version}, then {now}");
    Ok(())
}

fn clock_follows_a_conversion() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let gpa = s.slot.gpa;
    set_clock(&mut s.vcpu, gpa)?;
    expect_clock(&mut s.vcpu, gpa, "private")?;
    let private = clock(&mut s.vcpu, gpa)?;

    s.vm.set_shared(gpa, PAGE)?;
    s.slot.view.store(0, 0);
    set_clock(&mut s.vcpu, gpa)?;
    expect_clock(&mut s.vcpu, gpa, "shared")?;
    ensure!(s.slot.view.load(0) as u32 != 0, "the shared side has no clock");

    s.vm.set_private(gpa, PAGE)?;
    let now = clock(&mut s.vcpu, gpa)?;
    ensure!(now.0 >= private.0, "the private side was {private:x?}, is {now:x?}");
    let before = s.slot.view.load(0);
    set_clock(&mut s.vcpu, gpa)?;
    expect_clock(&mut s.vcpu, gpa, "private again")?;
    ensure!(clock(&mut s.vcpu, gpa)?.0 > private.0, "KVM does not write it");
    ensure!(s.slot.view.load(0) == before, "KVM writes the shared side");
    Ok(())
}

/// Version is in the second word's lower half, after the time itself.
fn steal_time_is_in_private_memory() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let gpa = s.slot.gpa + 0x80;
    s.vcpu.set_msr(MSR_KVM_STEAL_TIME, gpa | 1)?;
    let version = s.vcpu.load(gpa + 8)? as u32;
    ensure!(version != 0 && version % 2 == 0, "version {version}");
    punch(&s.fd, 0, PAGE)?;
    s.vcpu.set_msr(MSR_KVM_STEAL_TIME, gpa | 1)?;
    let version = s.vcpu.load(gpa + 8)? as u32;
    ensure!(version != 0 && version % 2 == 0, "version {version} in a new page");
    check_view(&s.slot, 0, SIZE, SHARED)
}

const MSR_HV_VP_ASSIST_PAGE: u32 = 0x4000_0073;

/// KVM clears the first half of the first word, and nothing else.
fn hyperv_assist_page_is_in_private_memory() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let gpa = s.slot.gpa;
    s.vcpu.fill(gpa, SIZE, GUEST)?;
    let before = s.vcpu.load(gpa)?;
    ensure!(before as u32 != 0, "the pattern is no good here");
    s.vcpu.set_msr(MSR_HV_VP_ASSIST_PAGE, gpa | 1)?;
    let word = s.vcpu.load(gpa)?;
    ensure!(word == before >> 32 << 32, "{before:#x} has become {word:#x}");
    s.vcpu.verify(gpa + 8, SIZE - 8, GUEST)?;
    check_view(&s.slot, 0, SIZE, SHARED)
}

/// Strings go both ways, and are right, while another thread works on the guest's pages.
fn access_is_right_while(s: &mut Setup, act: impl Fn(u64) -> CaseResult + Sync) -> CaseResult {
    let gpa = s.slot.gpa;
    let (stop, rounds) = (AtomicBool::new(false), 3);
    thread::scope(|scope| -> CaseResult {
        let actor = scope.spawn(|| -> Result<u64> {
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                act(n)?;
                n += 1;
            }
            Ok(n)
        });
        let mut work = || -> CaseResult {
            for round in 0..rounds {
                let pattern = Pattern::Generation(round);
                for page in 0..s.slot.size / PAGE {
                    let at = gpa + page * PAGE;
                    input(&mut s.vcpu, at, &bytes(pattern, at, PAGE))?;
                }
                s.vcpu.verify(gpa, s.slot.size, pattern)?;
                let next = Pattern::Generation(round + 1000);
                s.vcpu.fill(gpa, s.slot.size, next)?;
                let sent = output(&mut s.vcpu, gpa, s.slot.size)?;
                ensure!(sent == bytes(next, gpa, s.slot.size), "round {round}: wrong bytes");
            }
            Ok(())
        };
        let result = work();
        stop.store(true, Ordering::Relaxed);
        let acted = actor.join().map_err(|_| anyhow!("the actor panicked"))??;
        println!("{acted} times");
        result
    })
}

fn access_is_right_while_pages_move() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let zone = MovableZone::make(2)?;
    let mut s = Setup::used_by_kvm(MOVABLE, true, FEW)?;
    let counts = Counts::now()?;
    access_is_right_while(&mut s, |_| zone.shuffle())?;
    counts.expect_grown(&["memfile.migrate"], FEW / PAGE)
}

fn access_is_right_while_pages_are_swapped() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let _swap = Swap::on(64 * MIB)?;
    let cgroup = Cgroup::enter()?;
    let mut s = Setup::used_by_kvm(BOTH, true, FEW)?;
    let counts = Counts::now()?;
    access_is_right_while(&mut s, |_| cgroup.reclaim(FEW).map(drop))?;
    counts.expect_grown(&["memfile.swap_out"], FEW / PAGE)
}

/// Pages of the neighbours: the content must neither get into them, nor be lost with them.
fn access_is_right_while_pages_are_punched() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let mut s = Setup::used_by_kvm(PINNED, true, 2 * FEW)?;
    let fd = s.fd.try_clone()?;
    s.slot.size = FEW;
    access_is_right_while(&mut s, |n| Ok(punch(&fd, FEW + n % (FEW / PAGE) * PAGE, PAGE)?))?;
    // And the pages themselves: a string that meets a hole has only zeros from there on.
    let gpa = s.slot.gpa;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| -> CaseResult {
        let puncher = scope.spawn(|| -> CaseResult {
            while !stop.load(Ordering::Relaxed) {
                punch(&fd, 0, PAGE)?;
            }
            Ok(())
        });
        let mut work = || -> CaseResult {
            for _ in 0..20 {
                s.vcpu.fill(gpa, PAGE, GUEST)?;
                let sent = output(&mut s.vcpu, gpa, PAGE)?;
                for (got, wanted) in sent.chunks(4).zip(bytes(GUEST, gpa, PAGE).chunks(4)) {
                    let zero = got == [0; 4];
                    ensure!(zero || got == wanted, "got {got:x?}, wanted {wanted:x?} or zeros");
                }
            }
            Ok(())
        };
        let result = work();
        stop.store(true, Ordering::Relaxed);
        puncher.join().map_err(|_| anyhow!("the puncher panicked"))??;
        result
    })
}

const INTERNAL_ERROR: Exit = Exit::Other(kvm_bindings::KVM_EXIT_INTERNAL_ERROR);

fn nothing_is_sent_without_it() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, false, SIZE)?;
    let gpa = s.slot.gpa;
    s.vcpu.fill(gpa, SIZE, GUEST)?;
    let exit = s.vcpu.start(Command::Output, &[gpa, 2, PORT])?;
    ensure!(exit == INTERNAL_ERROR, "{exit:x?}");

    // By then it is too late to refuse the input; it must not reach the other side.
    let mut s = Setup::used_by_kvm(PINNED, false, SIZE)?;
    let exit = s.vcpu.start(Command::Input, &[gpa, 2, PORT])?;
    if exit == (Exit::Port { port: PORT as u16, write: false }) {
        s.vcpu.port_data().fill(0xff);
        let exit = s.vcpu.run()?;
        ensure!(exit == INTERNAL_ERROR, "{exit:x?}");
    } else {
        ensure!(exit == INTERNAL_ERROR, "{exit:x?}");
    }
    check_view(&s.slot, 0, SIZE, SHARED)
}

fn private_memory_is_no_mmio_without_it() -> CaseResult {
    for (to, from) in [(MMIO, LAYOUTS[0].gpa), (LAYOUTS[0].gpa, MMIO)] {
        let mut s = Setup::used_by_kvm(PINNED, false, SIZE)?;
        s.vcpu.fill(s.slot.gpa, SIZE, GUEST)?;
        let mut exit = s.vcpu.start(Command::Copy, &[to, from, 1])?;
        if exit == (Exit::Mmio { gpa: MMIO, write: false }) {
            exit = s.vcpu.run()?;
        }
        ensure!(exit == INTERNAL_ERROR, "from {from:#x} to {to:#x}: {exit:x?}");
        check_view(&s.slot, 0, SIZE, SHARED)?;
    }
    Ok(())
}

fn private_code_is_not_decoded_without_it() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, false, SIZE)?;
    run_from_private_memory(&mut s)?;
    let exit = s.vcpu.start(Command::Load, &[MMIO])?;
    ensure!(exit == INTERNAL_ERROR, "{exit:x?}");
    Ok(())
}

fn page_tables_are_not_walked_without_it() -> CaseResult {
    let _emulation = emulation()?;
    let mut s = Setup::used_by_kvm(PINNED, false, SIZE)?;
    private_page_tables(&mut s)?;
    // The CPU walks them, but KVM does not: for KVM no address is mapped.
    s.vcpu.fill(s.slot.gpa + 4 * PAGE, PAGE, GUEST)?;
    match s.vcpu.start(Command::Touch, &[s.slot.gpa, 0])? {
        Exit::Shutdown | INTERNAL_ERROR => Ok(()),
        exit => bail!("{exit:x?}"),
    }
}

fn clock_stays_away_without_it() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, false, SIZE)?;
    let gpa = s.slot.gpa;
    // Either the register is refused, or the clock does not advance.
    let _ = set_clock(&mut s.vcpu, gpa);
    s.vcpu.verify(gpa, PAGE, Pattern::ZERO)?;
    check_view(&s.slot, 0, SIZE, SHARED)?;
    s.vm.set_shared(gpa, PAGE)?;
    set_clock(&mut s.vcpu, gpa)?;
    expect_clock(&mut s.vcpu, gpa, "shared")?;

    // And when that page is not shared any more.
    s.vm.set_private(gpa, PAGE)?;
    let before = s.slot.view.load(0);
    let _ = set_clock(&mut s.vcpu, gpa);
    s.vcpu.verify(gpa, PAGE, Pattern::ZERO)?;
    ensure!(s.slot.view.load(0) == before, "KVM writes the shared side");
    Ok(())
}

fn hyperv_assist_page_is_refused_without_it() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, false, SIZE)?;
    s.vcpu.fill(s.slot.gpa, SIZE, GUEST)?;
    let result = s.vcpu.set_msr(MSR_HV_VP_ASSIST_PAGE, s.slot.gpa | 1);
    ensure!(result.is_err(), "KVM takes it");
    s.vcpu.verify(s.slot.gpa, SIZE, GUEST)?;
    check_view(&s.slot, 0, SIZE, SHARED)
}
