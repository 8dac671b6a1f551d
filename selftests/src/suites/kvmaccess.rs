// SPDX-License-Identifier: GPL-2.0
//! KVM's own accesses to private memory: to the memfile if the VM asks for it, else none (rule 27).

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::consumer::{Consumer, Mode, Span};
use crate::guest::{self, Command};
use crate::knobs::Setting;
use crate::ktap::{CaseResult, Suite};
use crate::pattern::{Pattern, Rng, seed};
use crate::pressure::{self, Cgroup, Counts, Failing, MovableZone, Swap};
use crate::support::setup::{
    BOTH, GUEST, LAYOUTS, MOVABLE, PINNED, PORT, SHARED, SLOT, Setup, check_view, fill_view_part,
};
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{ConvertBy, Exit, Private, Vcpu, Vm, VmType};
use crate::{GIB, HUGE, MIB, PAGE, suite};

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
        descriptor_that_kvm_cannot_read_ends_kvm_run,
        locked_instruction_is_atomic: 120,
        locked_instruction_is_atomic_while_pages_move_and_are_swapped: 240,
        locked_instruction_is_atomic_while_its_page_is_punched: 120,
        page_walk_sets_accessed_and_dirty_bits,
        page_walk_sets_exact_bits_while_page_tables_move_and_are_swapped: 240,
        page_walk_finds_punched_page_tables_empty: 120,
        page_walk_and_guest_change_one_entry_at_once: 120,
        data_of_a_device_waits_for_memory,
        clock_is_in_private_memory,
        clock_follows_its_page,
        clock_follows_a_conversion,
        clock_is_read_whole_while_kvm_writes_it: 120,
        steal_time_is_in_private_memory,
        steal_time_follows_a_conversion,
        clock_and_steal_time_stay_while_pages_move_and_are_swapped: 240,
        clock_and_steal_time_are_right_while_their_pages_are_punched: 120,
        clock_and_steal_time_leave_alone_what_the_guest_writes_beside_them: 120,
        clock_and_steal_time_go_where_a_conversion_beside_says: 120,
        clock_and_steal_time_wait_for_no_hole_elsewhere,
        hyperv_assist_page_is_in_private_memory,
        access_is_right_while_pages_move: 240,
        access_is_right_while_pages_are_swapped: 240,
        access_is_right_while_pages_are_punched: 240,
        access_is_right_while_the_guest_writes: 240,
        private_code_does_mmio_while_pages_move_and_are_swapped: 240,
        private_code_that_does_mmio_ends_at_the_hole_and_begins_anew: 240,
        nothing_is_sent_without_it,
        private_memory_is_no_mmio_without_it,
        private_code_is_not_decoded_without_it,
        page_tables_are_not_walked_without_it,
        locked_instruction_is_refused_without_it,
        instruction_that_is_given_up_leaves_no_mmio_behind,
        clock_stays_away_without_it,
        steal_time_stays_away_without_it,
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

/// Descriptors of all memory.
const CODE_SEGMENT: u64 = 0x00af_9b00_0000_ffff;
const DATA_SEGMENT: u64 = 0x00cf_9300_0000_ffff;

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

/// The half words of a string from private memory are each that of a pattern: how many of which.
fn judge<const N: usize>(sent: &[u8], start: u64, allowed: [Pattern; N]) -> Result<[u64; N]> {
    let wanted = allowed.map(|pattern| bytes(pattern, start, sent.len() as u64));
    let mut found = [0; N];
    for (n, got) in sent.chunks(4).enumerate() {
        let which = wanted.iter().position(|bytes| bytes[n * 4..][..4] == *got);
        let which = which.with_context(|| format!("half word {n} is {got:x?}: of no pattern"))?;
        found[which] += 1;
    }
    Ok(found)
}

/// Do `work` until it says that it is done, while another thread acts again and again.
fn beside(
    mut act: impl FnMut(u64) -> CaseResult + Send,
    mut work: impl FnMut() -> Result<bool>,
) -> CaseResult {
    let stop = &AtomicBool::new(false);
    thread::scope(|scope| -> CaseResult {
        let actor = scope.spawn(move || -> Result<u64> {
            let mut n = 0;
            while !stop.load(Ordering::Relaxed) {
                act(n)?;
                n += 1;
            }
            Ok(n)
        });
        let mut result = Ok(false);
        while matches!(result, Ok(false)) && !actor.is_finished() {
            result = work();
        }
        stop.store(true, Ordering::Relaxed);
        let acted = actor.join().map_err(|_| anyhow!("the actor panicked"))??;
        println!("{acted} times beside");
        result.map(drop)
    })
}

/// A host that takes the pages of guests away, in a zone and a cgroup of their own.
struct Host {
    // In this order: a guest is gone before, and its swap after it.
    cgroup: Cgroup,
    _swap: Swap,
    zone: MovableZone,
    _pages: Option<Setting>,
}

impl Host {
    fn new() -> Result<Host> {
        let _pages = pressure::base_pages()?;
        let zone = MovableZone::make(2)?;
        let _swap = Swap::on(64 * MIB)?;
        Ok(Host { cgroup: Cgroup::enter()?, _swap, zone, _pages })
    }

    /// Do `work` while the pages of a slot of [`SIZE`] bytes move and are swapped and its last one is
    /// punched, until enough have been moved and swapped. It needs few pages, so that it is those.
    fn disturb(&self, fd: &OwnedFd, mut work: impl FnMut() -> CaseResult) -> CaseResult {
        let counts = Counts::now()?;
        let act = |_| -> CaseResult {
            allocate(fd, SIZE - PAGE, PAGE)?;
            punch(fd, SIZE - PAGE, PAGE)?;
            self.zone.shuffle()?;
            self.cgroup.reclaim(SIZE).map(drop)
        };
        beside(act, || {
            work()?;
            Ok(counts.grown("memfile.migrate")? >= 20 && counts.grown("memfile.swap_out")? >= 20)
        })
    }
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

/// Copy words of a pattern from private memory to MMIO.
fn copy_to_mmio(vcpu: &mut Vcpu, from: u64, words: u64, pattern: Pattern) -> CaseResult {
    let mut exit = vcpu.start(Command::Copy, &[MMIO, from, words])?;
    for at in (0..words * 8).step_by(8) {
        ensure!(exit == Exit::Mmio { gpa: MMIO + at, write: true }, "{exit:x?}");
        let data = vcpu.mmio_data();
        ensure!(data == pattern.word(from + at).to_le_bytes(), "+{at:#x}: {data:x?}");
        exit = vcpu.run()?;
    }
    ensure!(exit == Exit::Done, "{exit:x?}");
    Ok(())
}

/// The other way; the guest sees them.
fn copy_from_mmio(vcpu: &mut Vcpu, to: u64, words: u64, pattern: Pattern) -> CaseResult {
    let mut exit = vcpu.start(Command::Copy, &[to, MMIO, words])?;
    for at in (0..words * 8).step_by(8) {
        ensure!(exit == Exit::Mmio { gpa: MMIO + at, write: false }, "{exit:x?}");
        vcpu.mmio_data().copy_from_slice(&pattern.word(to + at).to_le_bytes());
        exit = vcpu.run()?;
    }
    ensure!(exit == Exit::Done, "{exit:x?}");
    vcpu.verify(to, words * 8, pattern)
}

fn copy_reaches_private_memory_and_mmio() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let gpa = s.slot.gpa;
    s.vcpu.fill(gpa, SIZE, GUEST)?;
    copy_to_mmio(&mut s.vcpu, gpa + PAGE - 8, 2, GUEST)?;
    copy_from_mmio(&mut s.vcpu, gpa + 2 * PAGE - 8, 2, Pattern::Generation(1))
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

/// The exit where KVM needs the page at `gpa`, which has a memory error.
fn lost(gpa: u64) -> Exit {
    let flags = u64::from(kvm_bindings::KVM_MEMORY_EXIT_FLAG_PRIVATE);
    Exit::MemoryFault { errno: Errno::EHWPOISON, gpa, size: PAGE, flags }
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
    let fault = lost(gpa + PAGE);
    ensure!(read == fault, "KVM reads: {read:x?}");
    ensure!(write == fault, "KVM writes: {write:x?}");
    ensure!(!matches!(gone, Exit::MemoryFault { .. } | Exit::Error(_)), "no slot: {gone:x?}");
    Ok(())
}

/// KVM completes an access to the private page at `gpa` when there is memory for it, and not before.
fn completes_with_memory(s: &mut Setup, gpa: u64) -> CaseResult {
    refuse(s, gpa)?;
    let exit = s.vcpu.run()?;
    ensure!(exit == Exit::Done, "with memory: {exit:x?}");
    Ok(())
}

/// The same, as far as there is none.
fn refuse(s: &mut Setup, gpa: u64) -> CaseResult {
    let failing = Failing::pages(100, 100_000)?;
    // Without an alarm: a timer needs memory as well.
    let (exit, again) = (s.vcpu.enter(), s.vcpu.enter());
    drop(failing);
    let flags = u64::from(kvm_bindings::KVM_MEMORY_EXIT_FLAG_PRIVATE);
    let wanted = Exit::MemoryFault { errno: Errno::ENOMEM, gpa, size: PAGE, flags };
    ensure!(exit == Ok(wanted) && again == exit, "without memory: {exit:x?} and {again:x?}");
    Ok(())
}

/// Let the guest ask a device for a string, and give it `content`.
fn supply(vcpu: &mut Vcpu, gpa: u64, content: &[u8]) -> CaseResult {
    let exit = vcpu.start(Command::Input, &[gpa, content.len() as u64 / 4, PORT])?;
    ensure!(exit == Exit::Port { port: PORT as u16, write: false }, "{exit:x?}");
    let data = vcpu.port_data();
    ensure!(data.len() == content.len(), "{} bytes are wanted", data.len());
    data.copy_from_slice(content);
    Ok(())
}

/// A device gives its data once. So the instruction goes on with them when there is memory.
fn data_of_a_device_waits_for_memory() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let (gpa, given) = (s.slot.gpa, Pattern::Generation(3));
    // From here on KVM has the memory that it needs for itself.
    s.vcpu.store(gpa, 1)?;
    let at = gpa + PAGE;
    supply(&mut s.vcpu, at, &bytes(given, at, 64))?;
    completes_with_memory(&mut s, at)?;
    s.vcpu.verify(at, 64, given)?;
    s.vcpu.verify(at + 64, PAGE - 64, Pattern::ZERO)?;

    let at = gpa + 2 * PAGE;
    let exit = s.vcpu.start(Command::Copy, &[at, MMIO, 1])?;
    ensure!(exit == Exit::Mmio { gpa: MMIO, write: false }, "{exit:x?}");
    s.vcpu.mmio_data().copy_from_slice(&given.word(at).to_le_bytes());
    completes_with_memory(&mut s, at)?;
    s.vcpu.verify(at, 8, given)?;

    // A VMM may give the instruction up.
    let at = gpa + 3 * PAGE;
    supply(&mut s.vcpu, at, &bytes(given, at, 64))?;
    refuse(&mut s, at)?;
    s.vcpu.restart()?;
    s.vcpu.verify(at, PAGE, Pattern::ZERO)
}

/// The emulator must not begin again for ever, as it does where a descriptor is in MMIO.
fn descriptor_that_kvm_cannot_read_ends_kvm_run() -> CaseResult {
    const SELECTOR: u64 = 3 * 8;
    let _emulation = emulation()?;
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let gpa = s.slot.gpa;
    s.vcpu.fill(gpa, PAGE, Pattern::ZERO)?;
    s.vcpu.store(gpa + SELECTOR, DATA_SEGMENT)?;
    let exit = s.vcpu.start(Command::Segment, &[gpa, SELECTOR])?;
    ensure!(exit == Exit::Done, "it can be read: {exit:x?}");
    let frames = pressure::frames(&s.vcpu, &s.slot, &s.fd)?;
    let frame = frames.get(&0).context("the page is not traced")?.pfn;
    pressure::poison(frame)?;
    let exit = s.vcpu.start(Command::Segment, &[gpa, SELECTOR]);
    drop(s);
    pressure::unpoison(frame)?;
    let exit = exit?;
    ensure!(exit == lost(gpa), "it is lost: {exit:x?}");

    let mut s = Setup::used_by_kvm(PINNED, false, SIZE)?;
    s.vcpu.fill(gpa, PAGE, Pattern::ZERO)?;
    s.vcpu.store(gpa + SELECTOR, DATA_SEGMENT)?;
    let exit = s.vcpu.start(Command::Segment, &[gpa, SELECTOR])?;
    ensure!(exit == INTERNAL_ERROR, "KVM may not read it: {exit:x?}");
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
    let host = Host::new()?;
    let mut s = Setup::used_by_kvm(BOTH, true, SIZE)?;
    let mut second = s.vm.vcpu(1)?;
    s.private_page_tables()?;
    second.set_page_tables(s.slot.gpa + PAGE)?;
    let (fd, mut wanted) = (s.fd.try_clone()?, 0);
    host.disturb(&fd, || {
        wanted += count_both_ways(&mut s, &mut second)?;
        Ok(())
    })?;
    let word = s.vcpu.load(s.slot.gpa)?;
    ensure!(word == wanted, "counted to {word}, wanted {wanted}");
    Ok(())
}

/// The word begins at 0 again, and no exchange brings back what it was.
fn locked_instruction_is_atomic_while_its_page_is_punched() -> CaseResult {
    let _emulation = emulation()?;
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let mut second = s.vm.vcpu(1)?;
    let (fd, gpa) = (s.fd.try_clone()?, s.slot.gpa);
    let (mut counted, mut fewer) = (0, 0);
    let hole = |_| Ok(punch(&fd, 0, PAGE)?);
    beside(hole, || {
        counted += count_both_ways(&mut s, &mut second)?;
        let word = s.vcpu.load(gpa)?;
        ensure!(word <= counted, "counted to {word} in {counted} rounds");
        fewer += u64::from(word < counted);
        Ok(fewer >= 2)
    })?;
    let before = s.vcpu.load(gpa)?;
    let wanted = before + count_both_ways(&mut s, &mut second)?;
    let word = s.vcpu.load(gpa)?;
    ensure!(word == wanted, "counted from {before} to {word}, wanted {wanted}");
    Ok(())
}

const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;

/// Memory that only KVM touches, each in a GiB of its own: what it reads, and what it writes.
const READ: u64 = 40 * GIB;
const WRITTEN: u64 = 41 * GIB;

fn add_memory_for_kvm(vm: &Vm) -> CaseResult {
    for (id, gpa) in [(SLOT + 1, READ), (SLOT + 2, WRITTEN)] {
        vm.add_private(id, gpa, PAGE, Private::Memfile, memfile(PAGE)?.as_fd(), 0)?;
        vm.set_private(gpa, PAGE)?;
    }
    Ok(())
}

/// Clear the bits in the entries for that memory, and have KVM set them again.
fn expect_exact_bits(vcpu: &mut Vcpu, pdpt: u64) -> CaseResult {
    let touches = [(READ, 0, ACCESSED), (WRITTEN, 1, ACCESSED | DIRTY)];
    for (gpa, write, bits) in touches {
        let entry = pdpt + gpa / GIB * 8;
        let plain = vcpu.load(entry)? & !(ACCESSED | DIRTY);
        vcpu.store(entry, plain)?;
        vcpu.call(Command::Touch, &[gpa, write, 0x77])?;
        let now = vcpu.load(entry)?;
        ensure!(now == plain | bits, "{plain:#x} has become {now:#x} by access {write}");
    }
    Ok(())
}

fn page_walk_sets_accessed_and_dirty_bits() -> CaseResult {
    let _emulation = emulation()?;
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    add_memory_for_kvm(&s.vm)?;
    let pdpt = s.private_page_tables()?;
    expect_exact_bits(&mut s.vcpu, pdpt)?;
    let word = s.vcpu.load(WRITTEN)?;
    ensure!(word == 0x77, "the guest reads {word:#x}");
    Ok(())
}

fn page_walk_sets_exact_bits_while_page_tables_move_and_are_swapped() -> CaseResult {
    let _emulation = emulation()?;
    let host = Host::new()?;
    let mut s = Setup::used_by_kvm(BOTH, true, SIZE)?;
    add_memory_for_kvm(&s.vm)?;
    let pdpt = s.private_page_tables()?;
    let mut rounds = 0;
    host.disturb(&s.fd, || {
        rounds += 1;
        expect_exact_bits(&mut s.vcpu, pdpt)
    })?;
    println!("{rounds} rounds");
    Ok(())
}

/// For KVM as for the CPU no address is mapped then, and the guest has no handler for that.
fn page_walk_finds_punched_page_tables_empty() -> CaseResult {
    let _emulation = emulation()?;
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let (gpa, target) = (s.slot.gpa, s.slot.gpa + 3 * PAGE);
    s.vcpu.fill(target, PAGE, GUEST)?;
    for id in 1..=8 {
        let tables = s.write_page_tables()?;
        let punched = tables[id as usize % 2];
        let mut second = s.vm.vcpu(id)?;
        second.set_page_tables(tables[0])?;
        let touched = AtomicU64::new(0);
        let exit = thread::scope(|scope| -> Result<Exit> {
            let walker = scope.spawn(|| -> Result<Exit> {
                loop {
                    let exit = second.start(Command::Touch, &[target, 0])?;
                    if exit != Exit::Done {
                        return Ok(exit);
                    }
                    let word = second.result(0);
                    ensure!(word == GUEST.word(target), "KVM reads {word:#x}");
                    touched.fetch_add(1, Ordering::Relaxed);
                }
            });
            while touched.load(Ordering::Relaxed) < 10 * id && !walker.is_finished() {
                thread::yield_now();
            }
            punch(&s.fd, punched - gpa, PAGE)?;
            walker.join().map_err(|_| anyhow!("the vCPU thread panicked"))?
        })?;
        let touched = touched.into_inner();
        ensure!(exit == Exit::Shutdown && touched >= 10 * id, "{exit:x?} after {touched} walks");
        s.vcpu.verify(punched, PAGE, Pattern::ZERO).context("a walk has left something")?;
    }
    Ok(())
}

/// One vCPU changes the entries again and again, to what they are, and another counts in one of the same
/// page, while KVM sets accessed and dirty bits.
fn page_walk_and_guest_change_one_entry_at_once() -> CaseResult {
    const ROUNDS: u64 = 1000;
    let _emulation = emulation()?;
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let (mut second, mut third) = (s.vm.vcpu(1)?, s.vm.vcpu(2)?);
    add_memory_for_kvm(&s.vm)?;
    let pdpt = s.private_page_tables()?;
    let (entries, unused) = (pdpt + READ / GIB * 8, pdpt + PAGE - 8);
    let first = s.vcpu.load(unused)?;
    let watcher = second.stopper();
    let (mut during, mut counted) = (0, 0);
    thread::scope(|scope| -> CaseResult {
        let watch = scope.spawn(|| second.watch(entries, 16, 8, true));
        let walks = beside(
            |_| {
                third.call(Command::Count, &[unused, ROUNDS, 0])?;
                counted += ROUNDS;
                Ok(())
            },
            || {
                let before = watcher.rounds();
                expect_exact_bits(&mut s.vcpu, pdpt)?;
                during += u64::from(watcher.rounds() > before);
                Ok(during >= 100)
            },
        );
        watcher.stop();
        watch.join().map_err(|_| anyhow!("the vCPU thread panicked"))??;
        walks
    })?;
    println!("{} changes of the entries, counted to {counted}", watcher.rounds());
    let word = s.vcpu.load(unused)?;
    ensure!(counted > 0 && word == first + counted, "counted to {}", word.wrapping_sub(first));
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

/// A vCPU that reads the clock of another knows by the version whether it has all of it.
fn clock_is_read_whole_while_kvm_writes_it() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let mut second = s.vm.vcpu(1)?;
    let gpa = s.slot.gpa;
    let read = |vcpu: &mut Vcpu| -> Result<(u64, [u64; 3])> {
        vcpu.call(Command::Clock, &[gpa])?;
        Ok((vcpu.result(0), [1, 2, 3].map(|n| vcpu.result(n))))
    };
    // KVM writes it only when its own vCPU is entered, so that one reads what has been written.
    set_clock(&mut s.vcpu, gpa)?;
    expect_clock(&mut s.vcpu, gpa, "first")?;
    let (mut written, mut versions) = (BTreeMap::new(), BTreeSet::new());
    // How often the vCPUs change places depends on the machine.
    while versions.len() < 20 {
        let (mut seen, enough) = (Vec::new(), written.len() + 2000);
        beside(
            |_| {
                seen.push(read(&mut second)?);
                Ok(())
            },
            || {
                set_clock(&mut s.vcpu, gpa)?;
                written.extend([read(&mut s.vcpu)?]);
                Ok(written.len() >= enough)
            },
        )?;
        for (version, content) in seen {
            if let Some(wanted) = written.get(&version) {
                ensure!(content == *wanted, "version {version}: {content:x?}, wanted {wanted:x?}");
                versions.insert(version);
            }
        }
        println!("{} of {} versions were read", versions.len(), written.len());
    }
    Ok(())
}

/// Its version is in the second word's lower half, after the time itself.
fn steal_version(vcpu: &mut Vcpu, gpa: u64) -> Result<u32> {
    Ok(vcpu.load(gpa + 8)? as u32)
}

/// Have KVM write it; at the next entry.
fn set_steal_time(vcpu: &mut Vcpu, gpa: u64) -> CaseResult {
    vcpu.set_msr(MSR_KVM_STEAL_TIME, gpa | 1)
}

/// Have KVM write it. Returns the version.
fn expect_steal_time(vcpu: &mut Vcpu, gpa: u64, when: &str) -> Result<u32> {
    set_steal_time(vcpu, gpa)?;
    let version = steal_version(vcpu, gpa)?;
    ensure!(version != 0 && version % 2 == 0, "{when}: version {version}");
    Ok(version)
}

fn steal_time_is_in_private_memory() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let gpa = s.slot.gpa + 0x80;
    expect_steal_time(&mut s.vcpu, gpa, "first")?;
    punch(&s.fd, 0, PAGE)?;
    expect_steal_time(&mut s.vcpu, gpa, "in a new page")?;
    check_view(&s.slot, 0, SIZE, SHARED)
}

/// The shared side of the slot's first page is empty, and shared; then KVM writes steal time there.
fn expect_shared_steal_time(s: &mut Setup) -> CaseResult {
    s.vm.set_shared(s.slot.gpa, PAGE)?;
    fill_view_part(&s.slot, 0, PAGE, Pattern::ZERO);
    expect_steal_time(&mut s.vcpu, s.slot.gpa, "shared")?;
    ensure!(s.slot.view.load(8) as u32 != 0, "the shared side has none");
    Ok(())
}

fn steal_time_follows_a_conversion() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let gpa = s.slot.gpa;
    let private = expect_steal_time(&mut s.vcpu, gpa, "private")?;
    expect_shared_steal_time(&mut s)?;
    s.vm.set_private(gpa, PAGE)?;
    let before = s.slot.view.load(8);
    let now = expect_steal_time(&mut s.vcpu, gpa, "private again")?;
    ensure!(now > private, "version {private}, then {now}");
    ensure!(s.slot.view.load(8) == before, "KVM writes the shared side");
    Ok(())
}

fn clock_and_steal_time_stay_while_pages_move_and_are_swapped() -> CaseResult {
    let host = Host::new()?;
    let mut s = Setup::used_by_kvm(BOTH, true, SIZE)?;
    let gpa = s.slot.gpa;
    let mut last = (0, 0);
    host.disturb(&s.fd, || {
        set_clock(&mut s.vcpu, gpa)?;
        expect_clock(&mut s.vcpu, gpa, "the clock")?;
        let steal = expect_steal_time(&mut s.vcpu, gpa + PAGE, "steal time")?;
        let now = (clock(&mut s.vcpu, gpa)?.0, steal);
        ensure!(now.0 > last.0 && now.1 > last.1, "versions {last:?}, then {now:?}");
        last = now;
        Ok(())
    })?;
    println!("versions {last:?}");
    Ok(())
}

/// Whoever reads them meanwhile has them or zeros, and never an update that does not end.
fn clock_and_steal_time_are_right_while_their_pages_are_punched() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let (fd, gpa) = (s.fd.try_clone()?, s.slot.gpa);
    set_clock(&mut s.vcpu, gpa)?;
    expect_clock(&mut s.vcpu, gpa, "first")?;
    let (_, wanted) = clock(&mut s.vcpu, gpa)?;
    let (mut empty, mut there) = (0, 0);
    let hole = |n| Ok(punch(&fd, n % 2 * PAGE, PAGE)?);
    beside(hole, || {
        set_clock(&mut s.vcpu, gpa)?;
        set_steal_time(&mut s.vcpu, gpa + PAGE)?;
        let (version, factor) = clock(&mut s.vcpu, gpa)?;
        ensure!(version % 2 == 0, "the clock has version {version}");
        ensure!(factor == 0 || factor == wanted, "the clock has {factor:#x}, not {wanted:#x}");
        let steal = steal_version(&mut s.vcpu, gpa + PAGE)?;
        ensure!(steal % 2 == 0, "steal time has version {steal}");
        for version in [version, steal] {
            *(if version == 0 { &mut empty } else { &mut there }) += 1;
        }
        Ok(empty >= 50 && there >= 50)
    })?;
    println!("{empty} times empty, {there} times there");
    punch(&fd, 0, 2 * PAGE)?;
    set_clock(&mut s.vcpu, gpa)?;
    expect_clock(&mut s.vcpu, gpa, "at last")?;
    expect_steal_time(&mut s.vcpu, gpa + PAGE, "at last")?;
    check_view(&s.slot, 0, SIZE, SHARED)
}

/// KVM writes into the midst of a page in which a vCPU counts.
fn clock_and_steal_time_leave_alone_what_the_guest_writes_beside_them() -> CaseResult {
    /// The two structures, of 32 and 64 bytes, and the words around them.
    const CLOCK: u64 = 0x40;
    const STEAL: u64 = 0x80;
    const AROUND: [u64; 4] = [CLOCK - 8, CLOCK + 32, STEAL - 8, STEAL + 64];
    const ROUNDS: u64 = 200;
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let mut second = s.vm.vcpu(1)?;
    let gpa = s.slot.gpa;
    let mut counted = [0; 4];
    let (mut last, mut updates) = ((0, 0), 0);
    beside(
        |n| {
            let n = n as usize % AROUND.len();
            second.call(Command::Count, &[gpa + AROUND[n], ROUNDS, 0])?;
            counted[n] += ROUNDS;
            Ok(())
        },
        || {
            set_clock(&mut s.vcpu, gpa + CLOCK)?;
            expect_clock(&mut s.vcpu, gpa + CLOCK, "the clock")?;
            let steal = expect_steal_time(&mut s.vcpu, gpa + STEAL, "steal time")?;
            let now = (clock(&mut s.vcpu, gpa + CLOCK)?.0, steal);
            ensure!(now.0 > last.0 && now.1 > last.1, "versions {last:?}, then {now:?}");
            last = now;
            updates += 1;
            Ok(updates >= 500)
        },
    )?;
    println!("{updates} updates, counted to {counted:?}");
    for (at, wanted) in AROUND.into_iter().zip(counted) {
        let word = s.vcpu.load(gpa + at)?;
        ensure!(word == wanted && wanted > 0, "+{at:#x}: counted to {word}, wanted {wanted}");
    }
    Ok(())
}

/// A word that the guest loads, again if a conversion has overtaken its fault.
fn load_again(vcpu: &mut Vcpu, gpa: u64) -> Result<u64> {
    let mut exit = vcpu.start(Command::Load, &[gpa])?;
    while let Exit::MemoryFault { errno: Errno::EFAULT, .. } = exit {
        exit = vcpu.run()?;
    }
    ensure!(exit == Exit::Done, "{exit:x?}");
    Ok(vcpu.result(0))
}

/// KVM writes again and again while another thread converts the pages. No update ends on the other
/// side than that on which it began, and none after a conversion that it overtook. Only a page may
/// come late to the private side: a fault may allocate one that it then does not map.
fn clock_and_steal_time_go_where_a_conversion_beside_says() -> CaseResult {
    // A hole leaves nothing of its pages.
    let _pages = pressure::base_pages()?;
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let gpa = s.slot.gpa;
    fill_view_part(&s.slot, 0, 2 * PAGE, Pattern::ZERO);
    set_clock(&mut s.vcpu, gpa)?;
    let (_, factor) = clock(&mut s.vcpu, gpa)?;
    // By KVM, and how often that was seen on the shared side.
    let (updates, written) = (AtomicU64::new(0), AtomicU64::new(0));
    let (vm, slot, fd) = (&s.vm, &s.slot, &s.fd);
    let shared = || [0, 8, 24, PAGE, PAGE + 8].map(|at| slot.view.load(at));
    // Some updates after now, unless there are no more.
    let done = AtomicBool::new(false);
    let await_updates = || {
        let end = updates.load(Ordering::SeqCst) + 3;
        while updates.load(Ordering::SeqCst) < end && !done.load(Ordering::SeqCst) {
            thread::yield_now();
        }
    };
    let vcpu = &mut s.vcpu;
    let mut update = || -> Result<bool> {
        set_clock(vcpu, gpa)?;
        set_steal_time(vcpu, gpa + PAGE)?;
        let (version, now) = (load_again(vcpu, gpa)? as u32, load_again(vcpu, gpa + 24)?);
        ensure!(version % 2 == 0, "the clock has version {version}");
        ensure!(now == 0 || now == factor, "the clock has {now:#x}, not {factor:#x}");
        let steal = load_again(vcpu, gpa + PAGE + 8)? as u32;
        ensure!(steal % 2 == 0, "steal time has version {steal}");
        updates.fetch_add(1, Ordering::SeqCst);
        Ok(written.load(Ordering::SeqCst) >= 40)
    };
    beside(
        |_| {
            vm.set_private(gpa, 2 * PAGE)?;
            let before = shared();
            await_updates();
            ensure!(shared() == before, "KVM writes the shared side of private pages");
            vm.set_shared(gpa, 2 * PAGE)?;
            await_updates();
            punch(fd, 0, 2 * PAGE)?;
            await_updates();
            expect_allocated(fd, 0, "KVM writes the private side of shared pages")?;
            written.fetch_add((shared() != before).into(), Ordering::SeqCst);
            Ok(())
        },
        || {
            let result = update();
            done.store(!matches!(result, Ok(false)), Ordering::SeqCst);
            result
        },
    )?;
    println!("{} updates", updates.into_inner());
    for private in [true, false] {
        s.vm.convert(ConvertBy::Attributes, gpa, 2 * PAGE, private)?;
        set_clock(&mut s.vcpu, gpa)?;
        expect_clock(&mut s.vcpu, gpa, "at last")?;
        expect_steal_time(&mut s.vcpu, gpa + PAGE, "at last")?;
    }
    Ok(())
}

/// An observer delays a hole after KVM's callback. It is not in the same huge page.
fn clock_and_steal_time_wait_for_no_hole_elsewhere() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, true, 2 * HUGE)?;
    let (gpa, last) = (s.slot.gpa, s.slot.size - PAGE);
    let (fd, vcpu) = (&s.fd, &mut s.vcpu);
    let observer = Consumer::bound(fd, Mode::Observer, Span::same(last / PAGE, 1))?;
    vcpu.store(gpa + last, 1)?;
    observer.block(true)?;
    thread::scope(|scope| {
        let puncher = scope.spawn(|| punch(fd, last, PAGE));
        let result = observer.wait_until_called().and_then(|()| {
            set_clock(vcpu, gpa)?;
            expect_clock(vcpu, gpa, "beside a hole")?;
            expect_steal_time(vcpu, gpa + PAGE, "beside a hole")
        });
        let hole_is_open = !puncher.is_finished();
        observer.block(false)?;
        puncher.join().map_err(|_| anyhow!("the puncher panicked"))?.context("punch")?;
        result?;
        ensure!(hole_is_open, "the hole has ended");
        Ok(())
    })
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
fn access_is_right_while(s: &mut Setup, act: impl FnMut(u64) -> CaseResult + Send) -> CaseResult {
    let (gpa, mut round) = (s.slot.gpa, 0);
    beside(act, || {
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
        round += 1;
        Ok(round == 3)
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
    // And the pages themselves: a string that meets a hole has zeros there.
    let (gpa, mut rounds) = (s.slot.gpa, 0);
    let hole = |_| Ok(punch(&fd, 0, PAGE)?);
    beside(hole, || {
        s.vcpu.fill(gpa, PAGE, GUEST)?;
        judge(&output(&mut s.vcpu, gpa, PAGE)?, gpa, [Pattern::ZERO, GUEST])?;
        let new = Pattern::Generation(rounds);
        input(&mut s.vcpu, gpa, &bytes(new, gpa, PAGE))?;
        judge(&output(&mut s.vcpu, gpa, PAGE)?, gpa, [Pattern::ZERO, new])?;
        rounds += 1;
        Ok(rounds == 6)
    })?;
    input(&mut s.vcpu, gpa, &bytes(GUEST, gpa, PAGE))?;
    s.vcpu.verify(gpa, PAGE, GUEST)
}

/// KVM against the guest: of what both write at once, each half word is that of one of them.
fn access_is_right_while_the_guest_writes() -> CaseResult {
    const OTHER: Pattern = Pattern::Generation(3);
    const KVM: Pattern = Pattern::Generation(4);
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let mut second = s.vm.vcpu(1)?;
    let gpa = s.slot.gpa;
    s.vcpu.fill(gpa, PAGE, GUEST)?;
    let mut alternate = |n| second.fill(gpa, PAGE, [OTHER, GUEST][n as usize % 2]);
    let (mut rounds, mut read) = (0, [0; 2]);
    beside(&mut alternate, || {
        let found = judge(&output(&mut s.vcpu, gpa, PAGE)?, gpa, [GUEST, OTHER])?;
        read = [read[0] + found[0], read[1] + found[1]];
        rounds += 1;
        Ok(rounds >= 8 && read.iter().all(|&n| n > 0))
    })?;
    println!("{read:?} half words of two patterns in {rounds} strings");
    let (mut rounds, mut ours, mut theirs) = (0, 0, 0);
    beside(&mut alternate, || {
        input(&mut s.vcpu, gpa, &bytes(KVM, gpa, PAGE))?;
        let found = judge(&output(&mut s.vcpu, gpa, PAGE)?, gpa, [GUEST, OTHER, KVM])?;
        (ours, theirs) = (ours + found[2], theirs + found[0] + found[1]);
        rounds += 1;
        Ok(rounds >= 8 && ours > 0 && theirs > 0)
    })?;
    println!("{ours} half words of KVM's, {theirs} of the guest's in {rounds} strings");
    Ok(())
}

/// The page of the code moves and is swapped, and both pages at each end of a copy.
fn private_code_does_mmio_while_pages_move_and_are_swapped() -> CaseResult {
    let host = Host::new()?;
    let mut s = Setup::used_by_kvm(BOTH, true, SIZE)?;
    run_from_private_memory(&mut s)?;
    let [from, to] = [2, 4].map(|page| s.slot.gpa + page * PAGE - 8);
    s.vcpu.fill(from, 16, GUEST)?;
    let mut round = 0;
    host.disturb(&s.fd, || {
        copy_to_mmio(&mut s.vcpu, from, 2, GUEST)?;
        round += 1;
        copy_from_mmio(&mut s.vcpu, to, 2, Pattern::Generation(round))
    })?;
    println!("{round} rounds");
    Ok(())
}

/// A page of instructions of 8 bytes, `mov [rdi + generation + 8n], rdi` or, for the side that nobody
/// uses, the same with rsi.
fn stores(generation: u64, unused: bool) -> impl Iterator<Item = u64> {
    let register = if unused { 0xb7 } else { 0xbf };
    (0..PAGE).step_by(8).map(move |at| {
        let [a, b, c, d] = ((generation + at) as u32).to_le_bytes();
        u64::from_le_bytes([0x3e, 0x48, 0x89, register, a, b, c, d])
    })
}

/// Code in private memory stores to MMIO, so that KVM fetches each of its instructions, until its page
/// is punched. Zeros are code as well, `add [rax], al`, and the next page returns. Each round has code
/// of its own, so that nothing is fetched from where the page was, nor from the shared side.
fn private_code_that_does_mmio_ends_at_the_hole_and_begins_anew() -> CaseResult {
    const WORDS: u64 = PAGE / 8;
    let _pages = pressure::base_pages()?;
    let mut s = Setup::used_by_kvm(PINNED, true, SIZE)?;
    let gpa = s.slot.gpa;
    for (at, word) in (0..).step_by(8).zip(stores(0, true)) {
        s.slot.view.store(at, word);
    }
    // Two returns: an instruction of zeros may begin at an odd address.
    s.vcpu.store(gpa + PAGE, 0xc3c3)?;
    let (mut cut, mut rng) = (0, Rng::new(seed()));
    for round in 0..400 {
        let generation = round % 64 * PAGE;
        for (at, word) in (0..).step_by(8).zip(stores(generation, false)) {
            s.vm.system().store(guest::SCRATCH + at, word);
        }
        s.vcpu.call(Command::Copy, &[gpa, guest::SCRATCH, WORDS])?;
        let (goal, done) = (rng.below(WORDS), AtomicU64::new(0));
        let vcpu = &mut s.vcpu;
        thread::scope(|scope| -> CaseResult {
            let runner = scope.spawn(|| -> CaseResult {
                let mut exit = vcpu.start(Command::Execute, &[gpa, 0, 0, MMIO])?;
                for n in 0..WORDS {
                    if exit == Exit::Done {
                        break;
                    }
                    let at = MMIO + generation + 8 * n;
                    ensure!(exit == Exit::Mmio { gpa: at, write: true }, "store {n}: {exit:x?}");
                    let data = vcpu.mmio_data();
                    ensure!(data == MMIO.to_le_bytes(), "store {n} of {data:x?}");
                    done.fetch_add(1, Ordering::SeqCst);
                    exit = vcpu.run()?;
                }
                ensure!(exit == Exit::Done, "{exit:x?}");
                Ok(())
            });
            while done.load(Ordering::SeqCst) < goal && !runner.is_finished() {
                std::hint::spin_loop();
            }
            punch(&s.fd, 0, PAGE)?;
            runner.join().map_err(|_| anyhow!("the vCPU thread panicked"))?
        })
        .with_context(|| format!("round {round}"))?;
        let done = done.into_inner();
        ensure!(done >= goal, "round {round}: {done} stores before the hole, wanted {goal}");
        cut += u64::from(done < WORDS);
        s.vcpu.verify(gpa, PAGE, Pattern::ZERO)?;
        if cut >= 100 {
            println!("{cut} of {} rounds were cut", round + 1);
            return Ok(());
        }
    }
    bail!("only {cut} rounds were cut");
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
    s.private_page_tables()?;
    // The CPU walks them, but KVM does not: for KVM no address is mapped.
    s.vcpu.fill(s.slot.gpa + 4 * PAGE, PAGE, GUEST)?;
    match s.vcpu.start(Command::Touch, &[s.slot.gpa, 0])? {
        Exit::Shutdown | INTERNAL_ERROR => Ok(()),
        exit => bail!("{exit:x?}"),
    }
}

fn locked_instruction_is_refused_without_it() -> CaseResult {
    let _emulation = emulation()?;
    let mut s = Setup::used_by_kvm(PINNED, false, SIZE)?;
    s.vcpu.fill(s.slot.gpa, PAGE, GUEST)?;
    match s.vcpu.start(Command::Count, &[s.slot.gpa, 1, 1])? {
        Exit::Shutdown | INTERNAL_ERROR => {}
        exit => bail!("{exit:x?}"),
    }
    s.vm.vcpu(1)?.verify(s.slot.gpa, PAGE, GUEST)?;
    check_view(&s.slot, 0, SIZE, SHARED)
}

/// It pushes once to MMIO, and then to private memory. The kernel warns at the next KVM_RUN if the MMIO
/// of the first push is still to be done.
fn instruction_that_is_given_up_leaves_no_mmio_behind() -> CaseResult {
    const SELECTOR: u64 = 8;
    const POINTER: u64 = guest::SCRATCH + PAGE;
    let _emulation = emulation()?;
    let mut s = Setup::used_by_kvm(PINNED, false, SIZE)?;
    let system = s.vm.system();
    system.store(guest::SCRATCH + SELECTOR, CODE_SEGMENT);
    system.store(POINTER, SELECTOR << 32 | guest::CODE);
    // Two pushes of four bytes each, the first just behind the end of the memory.
    let stack = s.slot.gpa + SIZE + 4;
    let exit = s.vcpu.start(Command::CallFar, &[guest::SCRATCH, stack, POINTER])?;
    ensure!(exit == INTERNAL_ERROR, "{exit:x?}");
    // KVM has queued a #UD as well, and the guest is not prepared for that.
    let exit = s.vcpu.run()?;
    ensure!(exit == Exit::Shutdown, "then: {exit:x?}");
    check_view(&s.slot, 0, SIZE, SHARED)
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

fn steal_time_stays_away_without_it() -> CaseResult {
    let mut s = Setup::used_by_kvm(PINNED, false, SIZE)?;
    let gpa = s.slot.gpa;
    let _ = set_steal_time(&mut s.vcpu, gpa);
    s.vcpu.verify(gpa, PAGE, Pattern::ZERO)?;
    check_view(&s.slot, 0, SIZE, SHARED)?;

    // And when that page was shared.
    expect_shared_steal_time(&mut s)?;
    s.vm.set_private(gpa, PAGE)?;
    let before = s.slot.view.load(8);
    let _ = set_steal_time(&mut s.vcpu, gpa);
    s.vcpu.verify(gpa, PAGE, Pattern::ZERO)?;
    ensure!(s.slot.view.load(8) == before, "KVM writes the shared side");
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
