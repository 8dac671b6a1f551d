// SPDX-License-Identifier: GPL-2.0
//! An access that cannot be served ends KVM_RUN with an exit that tells exactly where and why.
//!
//! On `KVM_X86_SW_PROTECTED_VM` the attribute decides which kind an access is, so a test cannot
//! force a private access to a shared gfn, only an access to a private gfn without private backing.
//! The other mismatch happens only when a conversion overtakes a fault.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::guest::Command;
use crate::ktap::CaseResult;
use crate::qemu::Hold;
use crate::support::backend::Backend;
use crate::support::setup::{GUEST, SHARED, SLOT, Setup, fill_view_part};
use crate::support::wait::wait_until;
use crate::sys::{Errno, Mapping, run_on_cpu, thread_id, time_factor};
use crate::uapi::KVM_MEMORY_EXIT_FLAG_PRIVATE;
use crate::vm::{CONVERT_BY, ConvertBy, Exit, Vcpu, Vm, small_pages};
use crate::{GIB, HUGE, MIB, PAGE, conformance};

conformance!(
    "exits",
    [],
    converting: [
        private_access_without_private_backing,
        private_access_never_reaches_the_shared_page,
        private_access_to_a_deleted_slot,
        private_access_to_no_slot_at_all,
        exit_is_repeated_until_resolved,
        access_completes_after_conversion_to_shared,
        access_completes_after_private_backing_arrives,
        access_completes_after_conversion_to_private,
        slot_deleted_and_made_again_has_its_content,
        private_access_where_there_was_emulated_io,
        private_access_to_no_slot_where_there_was_emulated_io,
        conversion_that_overtakes_a_fault_names_the_page,
    ],
    huge: all,
    // The others end before a page is there, or use a slot that no page of 1 GiB fits into.
    gigantic: [
        slot_deleted_and_made_again_has_its_content,
        conversion_that_overtakes_a_fault_names_the_page,
    ],
);

/// The exit of a private access to the page at `gpa`.
fn private_exit(gpa: u64) -> Exit {
    Exit::MemoryFault { errno: Errno::EFAULT, gpa, size: PAGE, flags: KVM_MEMORY_EXIT_FLAG_PRIVATE }
}

/// Loading and storing at `addr` both leave with the exit of that page.
fn expect_private_exits(vcpu: &mut Vcpu, addr: u64) -> Result<()> {
    for (command, args) in [(Command::Load, vec![addr]), (Command::Store, vec![addr, 1])] {
        let exit = vcpu.start(command, &args)?;
        ensure!(exit == private_exit(addr & !(PAGE - 1)), "{command:?} at {addr:#x}: {exit:x?}");
        vcpu.restart()?;
    }
    Ok(())
}

/// A VM whose slot has no private backing though its gfns are private.
fn unbacked() -> Result<(Vm, Mapping)> {
    let vm = Vm::protected()?;
    let view = small_pages(MIB)?;
    vm.raw_set_region(&crate::vm::region(SLOT, GIB, &view, None))?;
    vm.set_private(GIB, MIB)?;
    Ok((vm, view))
}

fn private_access_without_private_backing(_: &'static Backend) -> CaseResult {
    let (vm, _view) = unbacked()?;
    for (id, addr) in [(0, GIB), (1, GIB + 5 * PAGE + 0x128), (2, GIB + MIB - 8)] {
        expect_private_exits(&mut vm.vcpu(id)?, addr)?;
    }
    Ok(())
}

fn private_access_never_reaches_the_shared_page(_: &'static Backend) -> CaseResult {
    let (vm, view) = unbacked()?;
    view.store(0, 0x5a5a);
    let mut vcpu = vm.vcpu(0)?;
    expect_private_exits(&mut vcpu, GIB)?;
    ensure!(view.load(0) == 0x5a5a, "the private store hit the shared page");
    ensure!(vcpu.result(0) == 0, "the private load returned {:#x}", vcpu.result(0));
    Ok(())
}

fn private_access_to_a_deleted_slot(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, MIB)?;
    s.fill_both()?;
    let gpa = s.slot.gpa;
    s.vm.delete(s.slot)?;
    expect_private_exits(&mut s.vcpu, gpa + 3 * PAGE)
}

fn private_access_to_no_slot_at_all(_: &'static Backend) -> CaseResult {
    let vm = Vm::protected()?;
    vm.set_private(GIB, MIB)?;
    expect_private_exits(&mut vm.vcpu(0)?, GIB + 0x23000)?;
    // Shared and without memory: emulated I/O, as always.
    let exit = vm.vcpu(1)?.start(Command::Load, &[GIB + MIB])?;
    ensure!(exit == Exit::Mmio { gpa: GIB + MIB, write: false }, "{exit:x?}");
    Ok(())
}

fn exit_is_repeated_until_resolved(_: &'static Backend) -> CaseResult {
    let (vm, _view) = unbacked()?;
    let mut vcpu = vm.vcpu(0)?;
    ensure!(vcpu.start(Command::Load, &[GIB])? == private_exit(GIB));
    for _ in 0..10 {
        let exit = vcpu.run()?;
        ensure!(exit == private_exit(GIB), "{exit:x?}");
    }
    Ok(())
}

fn access_completes_after_conversion_to_shared(_: &'static Backend) -> CaseResult {
    let (vm, view) = unbacked()?;
    view.store(2 * PAGE, 77);
    let mut vcpu = vm.vcpu(0)?;
    ensure!(vcpu.start(Command::Load, &[GIB + 2 * PAGE])? == private_exit(GIB + 2 * PAGE));
    vm.set_shared(GIB + 2 * PAGE, PAGE)?;
    ensure!(vcpu.run()? == Exit::Done && vcpu.result(0) == 77);
    ensure!(vcpu.start(Command::Load, &[GIB + PAGE])? == private_exit(GIB + PAGE));
    Ok(())
}

fn access_completes_after_private_backing_arrives(on: &'static Backend) -> CaseResult {
    let (vm, view) = unbacked()?;
    let mut vcpu = vm.vcpu(0)?;
    ensure!(vcpu.start(Command::Store, &[GIB + PAGE, 78])? == private_exit(GIB + PAGE));
    vm.raw_delete(SLOT)?;
    let fd = on.create(&vm, MIB)?;
    let slot = vm.add_private(SLOT, GIB, MIB, on.kind, &fd, 0)?;
    ensure!(vcpu.run()? == Exit::Done);
    ensure!(vcpu.load(GIB + PAGE)? == 78);
    ensure!(slot.view.load(PAGE) == 0 && view.load(PAGE) == 0, "the store is visible outside");
    Ok(())
}

fn access_completes_after_conversion_to_private(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, MIB)?;
    s.fill_both()?;
    let gpa = s.slot.gpa;
    s.vm.set_shared(gpa, s.slot.size)?;
    s.vcpu.verify(gpa, s.slot.size, SHARED)?;
    s.vm.set_private(gpa, s.slot.size)?;
    s.vcpu.verify(gpa, s.slot.size, GUEST)
}

fn slot_deleted_and_made_again_has_its_content(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, on.whole())?;
    s.fill_both()?;
    let gpa = s.slot.gpa;
    let view = s.vm.delete(s.slot)?;
    ensure!(s.vcpu.start(Command::Store, &[gpa, 1])? == private_exit(gpa));
    let slot = on.add_slot(&s.vm, SLOT, (gpa, 0), on.whole(), &s.fd)?;
    // The store that exited is done now.
    ensure!(s.vcpu.run()? == Exit::Done);
    ensure!(s.vcpu.load(gpa)? == 1);
    on.expect_whole(&s.vm, &slot, 0)?;
    ensure!(view.load(0) == SHARED.word(gpa), "the store is visible outside");
    s.vcpu.verify(gpa + PAGE, slot.size - PAGE, GUEST)
}

/// KVM remembers that an address is emulated I/O. It must forget when the address becomes private.
fn private_access_where_there_was_emulated_io(on: &'static Backend) -> CaseResult {
    for write in [false, true] {
        let vm = Vm::protected()?;
        let fd = on.create(&vm, MIB)?;
        let mut vcpu = vm.vcpu(0)?;
        let exit = vcpu.start(Command::Load, &[GIB])?;
        ensure!(exit == Exit::Mmio { gpa: GIB, write: false }, "{exit:x?}");
        ensure!(vcpu.run()? == Exit::Done);
        let slot = vm.add_private(SLOT, GIB, MIB, on.kind, &fd, 0)?;
        slot.view.store(0, 0x5a5a);
        vm.set_private(GIB, MIB)?;
        if write {
            vcpu.store(GIB, 7).context("store")?;
            ensure!(slot.view.load(0) == 0x5a5a, "the store is visible outside");
        }
        let got = vcpu.load(GIB).context("load")?;
        ensure!(got == if write { 7 } else { 0 }, "the guest loads {got:#x}");
    }
    Ok(())
}

/// The same where no slot comes, for the vCPU that did the I/O and for another.
fn private_access_to_no_slot_where_there_was_emulated_io(_: &'static Backend) -> CaseResult {
    for by in CONVERT_BY {
        let vm = Vm::protected()?;
        if !vm.conversions().contains(&by) {
            continue;
        }
        let mut vcpus = [vm.vcpu(0)?, vm.vcpu(1)?];
        let io = |vcpu: &mut Vcpu| -> CaseResult {
            let exit = vcpu.start(Command::Store, &[GIB + 8, 1])?;
            ensure!(exit == Exit::Mmio { gpa: GIB + 8, write: true }, "{exit:x?}");
            ensure!(vcpu.run()? == Exit::Done);
            Ok(())
        };
        for round in 0..2 {
            io(&mut vcpus[0]).with_context(|| format!("shared, {by:?}, round {round}"))?;
            vm.convert(by, GIB, MIB, true)?;
            for vcpu in &mut vcpus {
                expect_private_exits(vcpu, GIB + 8)
                    .with_context(|| format!("private, {by:?}, round {round}"))?;
            }
            vm.convert(by, GIB, MIB, false)?;
        }
    }
    Ok(())
}

/// A fault takes the kind of an access from the attribute, then memory for page tables, then looks at
/// the attribute again. It is held where it takes that memory, until the page has been converted: the
/// exit names the page and the kind that the access had, and the next KVM_RUN works.
fn conversion_that_overtakes_a_fault_names_the_page(on: &'static Backend) -> CaseResult {
    /// Each of these pages needs a page table of its own. KVM takes memory for 40 at once.
    const FAR: u64 = 64 * GIB;
    const TABLES: u64 = 128;
    let mut s = Setup::new(on, 64 * PAGE)?;
    let page = s.slot.gpa + 5 * PAGE;
    s.vcpu.fill(page, PAGE, GUEST)?;
    fill_view_part(&s.slot, 5 * PAGE, PAGE, SHARED);
    let _far = s.vm.add_shared(SLOT + 1, FAR, small_pages(TABLES * HUGE)?)?;
    let limit = Duration::from_secs(30) * time_factor();
    let mut fars = (0..TABLES).map(|n| FAR + n * HUGE);
    for private in [true, false] {
        let word = |private: bool| if private { GUEST } else { SHARED }.word(page);
        let (vm, vcpu, fars) = (&s.vm, &mut s.vcpu, &mut fars);
        let (runner, accessed) = (&AtomicI32::new(0), &AtomicU64::new(0));
        let exit = thread::scope(|scope| -> Result<Exit> {
            // Starts when the tracepoint is watched, and faults until it is held.
            let (start, wait) = mpsc::channel();
            let running = scope.spawn(move || -> Result<Exit> {
                run_on_cpu(0)?;
                runner.store(thread_id(), Ordering::SeqCst);
                wait.recv()?;
                for far in fars {
                    accessed.store(far, Ordering::SeqCst);
                    vcpu.load(far)?;
                    // So that the next access faults.
                    vm.convert(ConvertBy::Attributes, page, PAGE, !private)?;
                    vm.convert(ConvertBy::Attributes, page, PAGE, private)?;
                    accessed.store(page, Ordering::SeqCst);
                    let exit = vcpu.start(Command::Load, &[page])?;
                    if exit != Exit::Done {
                        return Ok(exit);
                    }
                    ensure!(vcpu.result(0) == word(private), "the guest reads the other side");
                }
                bail!("no fault of the page was overtaken")
            });
            let overtake = move || -> CaseResult {
                wait_until("the thread is there", || Ok(runner.load(Ordering::SeqCst) != 0))?;
                let thread = runner.load(Ordering::SeqCst);
                let taker = "__kvm_mmu_topup_memory_cache";
                let filter = format!("common_pid == {thread} && call_site.function == {taker}");
                let hold = Hold::at("kmem:kmem_cache_alloc", &filter, 0, vec![thread_id()])?;
                start.send(())?;
                loop {
                    hold.wait(limit)?;
                    if accessed.load(Ordering::SeqCst) == page {
                        break;
                    }
                    hold.let_go();
                }
                vm.convert(ConvertBy::Attributes, page, PAGE, !private)?;
                hold.end()
            };
            let overtaken = overtake();
            let exit = running.join().map_err(|_| anyhow!("the vCPU thread panicked"))??;
            overtaken.map(|()| exit)
        })?;
        let flags = if private { KVM_MEMORY_EXIT_FLAG_PRIVATE } else { 0 };
        let wanted = Exit::MemoryFault { errno: Errno::EFAULT, gpa: page, size: PAGE, flags };
        ensure!(exit == wanted, "{exit:x?}, wanted {wanted:x?}");
        let exit = s.vcpu.run()?;
        ensure!(exit == Exit::Done, "the next KVM_RUN: {exit:x?}");
        ensure!(s.vcpu.result(0) == word(!private), "the guest reads the side that it had before");
    }
    Ok(())
}
