// SPDX-License-Identifier: GPL-2.0
//! A guest of the guest, on AMD: it executes one instruction, HLT, and so exits.
//!
//! Its control block and its other parts lie in the system slot. It has no paging of its own;
//! its nested page tables map every address to itself, as mainline takes the address of the nested guest
//! for that of our guest when it asks whether memory is private.

use anyhow::{Result, ensure};

use crate::guest::{ADDRESS_SPACE, Command, SCRATCH};
use crate::skip::skip;
use crate::sys::Mapping;
use crate::vm::{Exit, Vcpu, Vm};
use crate::{GIB, PAGE};

/// Where the control block is.
pub const VMCB: u64 = SCRATCH;
/// Where the CPU keeps the state of the host, that is, of our guest.
const HOST_SAVE: u64 = SCRATCH + PAGE;
/// Nested page tables in shared memory.
pub const TABLES: u64 = SCRATCH + 2 * PAGE;
/// A page with the instruction, in shared memory.
pub const CODE: u64 = SCRATCH + 4 * PAGE;

const MSR_VM_HSAVE_PA: u32 = 0xc001_0117;
// Fields of the control block.
const DATA_BASE: u64 = 0x438;
const RAX: u64 = 0x5f8;
/// The word with the instruction.
pub const HLT: u64 = 0xf4;

/// The word with `mov eax, number` and then HLT, for code of 16 bits.
pub fn number_and_halt(number: u32) -> u64 {
    HLT << 48 | u64::from(number) << 16 | 0xb866
}

/// Why the nested guest has exited: it executed HLT.
pub const EXIT_HLT: u64 = 0x78;
/// Its nested page tables do not map what it uses.
pub const EXIT_NPF: u64 = 0x400;

/// Words of nested page tables at `gpa`, which take two pages: offset, and word.
pub fn page_tables(gpa: u64) -> impl Iterator<Item = (u64, u64)> {
    const ALL_ACCESS: u64 = 7;
    const LARGE: u64 = 1 << 7;
    let entries = (0..ADDRESS_SPACE / GIB).map(|n| (n * 8, (n * GIB) | ALL_ACCESS | LARGE));
    std::iter::once((0, (gpa + PAGE) | ALL_ACCESS))
        .chain(entries.map(|(offset, word)| (PAGE + offset, word)))
}

/// Let the vCPU be a hypervisor; SKIP if it cannot.
pub fn enable(vcpu: &mut Vcpu) -> Result<()> {
    if !vcpu.is_amd() {
        return skip("VMRUN is AMD's");
    }
    vcpu.enable_svm()?;
    vcpu.set_msr(MSR_VM_HSAVE_PA, HOST_SAVE)
}

/// Prepare a nested guest that executes what is at `code`, below 4 GiB, with the nested page tables at
/// `tables`.
pub fn prepare(vm: &Vm, code: u64, tables: u64) {
    let system = vm.system();
    for (offset, word) in page_tables(TABLES) {
        system.store(TABLES + offset, word);
    }
    system.store(CODE, HLT);
    write_control_block(system, code, tables);
}

/// The fields of the control block that are not 0, and those that an earlier run has left.
fn write_control_block(system: &Mapping, code: u64, tables: u64) {
    const INTERCEPT_HLT: u64 = 1 << 24;
    const INTERCEPT_SHUTDOWN: u64 = 1 << 31;
    const INTERCEPT_VMRUN: u64 = 1;
    const SEGMENT: u64 = 0xffff << 32 | 0x93 << 16;
    const CODE_SEGMENT: u64 = 0xffff << 32 | 0x9b << 16;
    const LDT: u64 = 0xffff << 32 | 0x82 << 16;
    const TSS: u64 = 0xffff << 32 | 0x8b << 16;
    let fields = [
        (0x008, (INTERCEPT_HLT | INTERCEPT_SHUTDOWN) << 32),
        (0x010, INTERCEPT_VMRUN),
        (0x058, 1),      // address space identifier
        (0x070, 0),      // exit code
        (0x090, 1),      // nested paging
        (0x0b0, tables), // nested CR3
        (0x400, SEGMENT),
        (0x410, CODE_SEGMENT),
        (0x418, code),
        (0x420, SEGMENT),
        (0x430, SEGMENT),
        (DATA_BASE, 0),
        (0x440, SEGMENT),
        (0x450, SEGMENT),
        (0x460, 0xffff << 32),
        (0x470, LDT),
        (0x480, 0xffff << 32),
        (0x490, TSS),
        (0x4d0, 1 << 12),     // EFER.SVME
        (0x558, 0x10),        // CR0.ET
        (0x560, 0x400),       // DR7
        (0x568, 0xffff_0ff0), // DR6
        (0x570, 2),           // RFLAGS
        (0x578, 0),           // RIP
        (RAX, 0),
        (0x668, 0x0007_0406_0007_0406),
    ];
    for (offset, word) in fields {
        system.store(VMCB + offset, word);
    }
}

/// Prepare a nested guest that loads a word at `gpa`, below 4 GiB, or stores this one there, and then
/// exits.
pub fn prepare_access(vm: &Vm, tables: u64, gpa: u64, stored: Option<u32>) {
    // mov eax, [0], or mov [0], eax
    let code = if stored.is_some() { 0xa366 } else { 0xa166 };
    prepare(vm, CODE, tables);
    let system = vm.system();
    system.store(CODE, HLT << 32 | code);
    system.store(VMCB + DATA_BASE, gpa);
    system.store(VMCB + RAX, stored.unwrap_or(0).into());
}

/// Run it until it exits; the reason.
pub fn run(vm: &Vm, vcpu: &mut Vcpu) -> Result<u64> {
    let exit = vcpu.start(Command::Vmrun, &[VMCB])?;
    ensure!(exit == Exit::Done, "{exit:x?}");
    Ok(vm.system().load(VMCB + 0x70))
}

/// What the nested guest had in `eax` when it exited.
pub fn number(vm: &Vm) -> u32 {
    // CAST: The lower half of `rax`.
    vm.system().load(VMCB + RAX) as u32
}
