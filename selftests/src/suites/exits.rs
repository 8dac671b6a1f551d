// SPDX-License-Identifier: GPL-2.0
//! An access that cannot be served ends KVM_RUN with an exit that tells exactly where and why.
//!
//! On `KVM_X86_SW_PROTECTED_VM` the attribute decides which kind an access is, so a test cannot
//! force a private access to a shared gfn, only an access to a private gfn without private backing.
//! The other mismatch happens only when a conversion overtakes a fault.

use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::guest::Command;
use crate::ktap::CaseResult;
use crate::pattern::Pattern;
use crate::support::backend::Backend;
use crate::support::setup::{GUEST, SHARED, SLOT, Setup, fill_view};
use crate::sys::{Errno, Mapping};
use crate::uapi::KVM_MEMORY_EXIT_FLAG_PRIVATE;
use crate::vm::{CONVERT_BY, Exit, Vcpu, Vm, small_pages};
use crate::{GIB, MIB, PAGE, conformance};

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

/// Conversions run against accesses. Nearly always the fault waits; when it does not, the exit must
/// be well-formed, and the next KVM_RUN must work.
fn conversion_that_overtakes_a_fault_names_the_page(on: &'static Backend) -> CaseResult {
    let mut s = Setup::new(on, 64 * PAGE)?;
    fill_view(&s.slot, Pattern::ZERO);
    let (gpa, size) = (s.slot.gpa, s.slot.size);
    s.vcpu.post(Command::Watch, &[gpa, gpa + size, PAGE, 1])?;
    let stopper = s.vcpu.stopper();
    let vm = &s.vm;
    let vcpu = &mut s.vcpu;
    thread::scope(|scope| {
        let runner = scope.spawn(move || -> Result<u64> {
            let mut seen = 0;
            loop {
                match vcpu.run()? {
                    Exit::Done => return Ok(seen),
                    Exit::MemoryFault { errno: Errno::EFAULT, gpa: at, size: PAGE, flags }
                        if (gpa..gpa + size).contains(&at)
                            && at % PAGE == 0
                            && flags & !KVM_MEMORY_EXIT_FLAG_PRIVATE == 0 =>
                    {
                        seen += 1;
                    }
                    other => bail!("not a well-formed exit: {other:x?}"),
                }
            }
        });
        let mut result = Ok(());
        for round in 0..400 {
            if result.is_err() || runner.is_finished() {
                break;
            }
            result = vm.convert(crate::vm::ConvertBy::Attributes, gpa, size, round % 2 == 1);
        }
        stopper.stop();
        let seen = runner.join().map_err(|_| anyhow!("the vCPU thread panicked"))??;
        println!("{seen} exits seen, each well-formed");
        result
    })
}
