// SPDX-License-Identifier: GPL-2.0
//! The test library itself, on memory that every kernel has.

use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};

use crate::guest::{self, Command};
use crate::knobs::{self, Setting};
use crate::ktap::{CaseResult, Suite};
use crate::pattern::Pattern;
use crate::support::{KNOB_PATH, KNOB_VALUE};
use crate::sys::{Errno, Mapping, memfd};
use crate::uapi::*;
use crate::vm::{Exit, Vm, VmType, small_pages};
use crate::{GIB, MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "infra",
    [
        guest_runs_on_default_vm,
        guest_runs_on_protected_vm,
        guest_reaches_high_addresses,
        verify_reports_the_first_wrong_word,
        shared_memfd_is_seen_by_both_sides,
        two_vcpus_share_memory,
        endless_command_stops,
        stuck_vcpu_is_reported,
        stats_count_pages,
        hypercall_exits,
        missing_memory_is_mmio,
        private_fault_without_backing_says_where,
        knob_left_changed_fails_the_case_and_is_set_back,
    ]
);

fn guest_runs_on_default_vm() -> CaseResult {
    guest_runs(VmType::Default)
}

fn guest_runs_on_protected_vm() -> CaseResult {
    guest_runs(VmType::Protected)
}

fn guest_runs(vm_type: VmType) -> CaseResult {
    let vm = Vm::new(vm_type)?;
    let mut vcpu = vm.vcpu(0)?;
    let slot = vm.add_shared(1, 16 * MIB, Mapping::anonymous(MIB)?)?;
    let pattern = Pattern::Generation(1);
    vcpu.fill(slot.gpa, slot.size, pattern)?;
    vcpu.verify(slot.gpa, slot.size, pattern)?;
    for offset in (0..slot.size).step_by(8) {
        let (got, wanted) = (slot.view.load(offset), pattern.word(slot.gpa + offset));
        ensure!(got == wanted, "host reads {got:#x} at {offset:#x}, wanted {wanted:#x}");
    }
    vcpu.execute_at(slot.gpa + 0x123, 42)
}

fn guest_reaches_high_addresses() -> CaseResult {
    let vm = Vm::new(VmType::Default)?;
    let mut vcpu = vm.vcpu(0)?;
    for (id, gpa) in [(1, 4 * GIB), (2, 64 * GIB), (3, guest::ADDRESS_SPACE - 2 * MIB)] {
        let slot = vm.add_shared(id, gpa, Mapping::anonymous(2 * MIB)?)?;
        vcpu.store(gpa + slot.size - 8, gpa)?;
        ensure!(slot.view.load(slot.size - 8) == gpa);
    }
    Ok(())
}

fn verify_reports_the_first_wrong_word() -> CaseResult {
    let vm = Vm::new(VmType::Default)?;
    let mut vcpu = vm.vcpu(0)?;
    let slot = vm.add_shared(1, 16 * MIB, Mapping::anonymous(MIB)?)?;
    vcpu.fill(slot.gpa, slot.size, Pattern::Generation(1))?;
    slot.view.store(0x1238, 7);
    slot.view.store(0x2000, 8);
    match vcpu.verify(slot.gpa, slot.size, Pattern::Generation(1)) {
        Ok(()) => bail!("two wrong words were not seen"),
        Err(e) => {
            let text = e.to_string();
            ensure!(text.contains("read 2 of") && text.contains("0x1001238, got 0x7"), "{text}");
        }
    }
    ensure!(vcpu.verify(slot.gpa, slot.size, Pattern::Generation(2)).is_err());
    Ok(())
}

fn shared_memfd_is_seen_by_both_sides() -> CaseResult {
    let vm = Vm::new(VmType::Default)?;
    let mut vcpu = vm.vcpu(0)?;
    let fd = memfd(MIB)?;
    let slot = vm.add_shared(1, 16 * MIB, Mapping::shared(&fd, 0, MIB)?)?;
    let other = Mapping::shared(&fd, 0, MIB)?;
    vcpu.store(slot.gpa + PAGE, 5)?;
    ensure!(other.load(PAGE) == 5);
    other.store(PAGE, 6);
    ensure!(vcpu.load(slot.gpa + PAGE)? == 6);
    Ok(())
}

fn two_vcpus_share_memory() -> CaseResult {
    let vm = Vm::protected()?;
    let (mut a, mut b) = (vm.vcpu(0)?, vm.vcpu(1)?);
    let slot = vm.add_shared(1, 16 * MIB, Mapping::anonymous(MIB)?)?;
    a.fill(slot.gpa, slot.size, Pattern::Generation(3))?;
    b.verify(slot.gpa, slot.size, Pattern::Generation(3))
}

fn endless_command_stops() -> CaseResult {
    let vm = Vm::protected()?;
    let mut vcpu = vm.vcpu(0)?;
    let slot = vm.add_shared(1, 16 * MIB, Mapping::anonymous(MIB)?)?;
    let stopper = vcpu.stopper();
    thread::scope(|scope| {
        let runner = scope.spawn(|| vcpu.watch(slot.gpa, slot.size, PAGE, true));
        while stopper.rounds() == 0 && !runner.is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
        stopper.stop();
        let counters = runner.join().map_err(|_| anyhow!("the vCPU thread panicked"))??;
        ensure!(counters.rounds > 0);
        Ok(())
    })
}

fn stuck_vcpu_is_reported() -> CaseResult {
    let vm = Vm::protected()?;
    let mut vcpu = vm.vcpu(0)?;
    vcpu.post(Command::Watch, &[guest::SCRATCH, guest::SCRATCH + 8, 8, 0])?;
    match vcpu.run_for(Duration::from_millis(200)) {
        Err(e) if e.to_string().contains("still runs") => Ok(()),
        other => bail!("wanted an error, got {other:?}"),
    }
}

fn stats_count_pages() -> CaseResult {
    let vm = Vm::new(VmType::Default)?;
    let mut vcpu = vm.vcpu(0)?;
    let stats = vm.stats()?;
    let slot = vm.add_shared(1, 16 * MIB, small_pages(4 * MIB)?)?;
    let before = stats.get("pages_4k")?;
    vcpu.fill_pages(slot.gpa, slot.size, Pattern::Generation(1))?;
    let mapped = stats.get("pages_4k")?.saturating_sub(before);
    ensure!(mapped >= slot.size / PAGE, "pages_4k grew by {mapped}");
    vcpu.stats()?.get("exits").map(drop)
}

fn hypercall_exits() -> CaseResult {
    let vm = Vm::protected()?;
    vm.exit_on_map_gpa()?;
    let mut vcpu = vm.vcpu(0)?;
    let exit = vcpu.start_map_gpa(16 * MIB, 3 * PAGE, true)?;
    let wanted = [16 * MIB, 3, KVM_MAP_GPA_RANGE_ENCRYPTED];
    ensure!(exit == Exit::Hypercall { nr: KVM_HC_MAP_GPA_RANGE, args: wanted }, "{exit:x?}");
    ensure!(vcpu.run()? == Exit::Done);
    ensure!(vcpu.result(0) == 0, "the hypercall returned {:#x}", vcpu.result(0));
    Ok(())
}

fn missing_memory_is_mmio() -> CaseResult {
    let vm = Vm::protected()?;
    let mut vcpu = vm.vcpu(0)?;
    let exit = vcpu.start(Command::Store, &[16 * MIB, 1])?;
    ensure!(exit == Exit::Mmio { gpa: 16 * MIB, write: true }, "{exit:x?}");
    Ok(())
}

fn private_fault_without_backing_says_where() -> CaseResult {
    let vm = Vm::protected()?;
    let mut vcpu = vm.vcpu(0)?;
    let slot = vm.add_shared(1, 16 * MIB, Mapping::anonymous(MIB)?)?;
    vm.set_private(slot.gpa, slot.size)?;
    let exit = vcpu.start(Command::Load, &[slot.gpa + PAGE + 8])?;
    let wanted = Exit::MemoryFault {
        errno: Errno::EFAULT,
        gpa: slot.gpa + PAGE,
        size: PAGE,
        flags: KVM_MEMORY_EXIT_FLAG_PRIVATE,
    };
    ensure!(exit == wanted, "{exit:x?}");
    Ok(())
}

/// The runner, on cases that change a knob and do not set it back.
fn knob_left_changed_fails_the_case_and_is_set_back() -> CaseResult {
    let before = "60";
    let _known = Setting::set(KNOB_PATH, before)?;
    let program = std::env::current_exe().context("the program's own path")?;
    let output = std::process::Command::new(program).arg("control_knob").output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let left = format!("  # left changed: {KNOB_PATH} was {before}, is {KNOB_VALUE}\n");
    for wanted in [&*left, "  not ok 1 changes_a_knob\n", "  not ok 2 changes_a_knob_and_hangs #"] {
        ensure!(text.contains(wanted), "no {wanted:?} in:\n{text}");
    }
    let now = knobs::read(KNOB_PATH)?;
    ensure!(now == before, "{KNOB_PATH} was {before}, is {now}");
    ensure!(output.status.code() == Some(1), "{:?}", output.status);
    Ok(())
}
