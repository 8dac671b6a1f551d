// SPDX-License-Identifier: GPL-2.0
//! The guest program, where it lies in guest memory, and its commands.
//!
//! All of it lies in one shared slot at guest physical address 0, see [`SYSTEM_SIZE`]. Virtual
//! addresses are physical addresses, for [`ADDRESS_SPACE`] bytes.

use std::arch::global_asm;

use crate::sys::Mapping;
use crate::{GIB, PAGE};

global_asm!(include_str!("program.s"));

unsafe extern "C" {
    static memfile_guest_start: u8;
    static memfile_guest_end: u8;
    static memfile_payload_start: u8;
    static memfile_payload_end: u8;
}

/// Bytes of the shared slot at guest physical address 0.
pub const SYSTEM_SIZE: u64 = 1 << 20;
/// Bytes that the guest can address.
pub const ADDRESS_SPACE: u64 = 512 * GIB;
/// vCPUs that have a mailbox and a stack.
pub const MAX_VCPUS: u64 = 32;
/// The port that means "done".
pub const PORT_DONE: u16 = 0x6d66;

/// Guest physical address of the top-level page table.
pub const PML4: u64 = 0x2000;
const PDPT: u64 = 0x3000;
/// Guest physical address of the program.
pub const CODE: u64 = 0x10000;
/// Guest physical address of [`payload`]'s copy.
pub const PAYLOAD: u64 = 0x18000;
const MAILBOXES: u64 = 0x20000;
const STACKS: u64 = 0x60000;
/// Tests may use the shared slot as they like from this guest physical address on.
pub const SCRATCH: u64 = 0x80000;

/// Guest physical address of a vCPU's mailbox.
pub fn mailbox(vcpu: u64) -> u64 {
    MAILBOXES + vcpu * PAGE
}

/// Initial stack pointer of a vCPU.
pub fn stack_top(vcpu: u64) -> u64 {
    STACKS + (vcpu + 1) * PAGE
}

// Offsets in a mailbox, in bytes; program.s has the same list.
pub const BOX_COMMAND: u64 = 0x00;
pub const BOX_ARGS: u64 = 0x08;
pub const BOX_RESULTS: u64 = 0x80;
pub const BOX_STOP: u64 = 0xc0;
pub const BOX_ROUNDS: u64 = 0xc8;
pub const BOX_DISCARDED: u64 = 0xd0;

// Data of the stress command; program.s has the same list.
/// Words of a page that the table describes; the words after them belong to the vCPUs.
pub const STRESS_WORDS: u64 = 448;
/// Bytes of a table entry: epoch, first word, difference, unused.
pub const STRESS_ENTRY: u64 = 32;
/// Bytes of a note: epoch, word.
pub const STRESS_NOTE: u64 = 16;

/// Commands to the guest; program.s documents the arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Command {
    Fill = 2,
    Verify = 3,
    Load = 4,
    Store = 5,
    Execute = 6,
    Hypercall = 7,
    Watch = 8,
    Stress = 9,
    Output = 10,
    Input = 11,
    Copy = 12,
    Count = 13,
    Touch = 14,
    Vmrun = 15,
    Clock = 16,
    Segment = 17,
    CallFar = 18,
}

/// The bytes between two symbols of program.s.
///
/// # Safety
///
/// Both lie in one read-only section, the second not before the first.
unsafe fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: By this function's requirement.
    unsafe { std::slice::from_raw_parts(start, end.offset_from(start) as usize) }
}

/// The interpreter.
fn program() -> &'static [u8] {
    // SAFETY: program.s puts these two in that order.
    unsafe { between(&raw const memfile_guest_start, &raw const memfile_guest_end) }
}

/// A function for the guest to copy and call: see [`payload_result`].
pub fn payload() -> &'static [u8] {
    // SAFETY: program.s puts these two in that order.
    unsafe { between(&raw const memfile_payload_start, &raw const memfile_payload_end) }
}

/// The return value of the payload for an argument.
pub fn payload_result(argument: u64) -> u64 {
    argument ^ 0x6d65_6d66_696c_6521
}

/// Put program and page tables into the system slot.
pub fn install(system: &Mapping) {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    system.store(PML4, PDPT | PRESENT_WRITABLE);
    for gib in 0..ADDRESS_SPACE / GIB {
        system.store(PDPT + gib * 8, (gib * GIB) | PRESENT_WRITABLE | LARGE);
    }
    system.copy_in(CODE, program());
    system.copy_in(PAYLOAD, payload());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap() {
        assert!(program().len() as u64 <= PAYLOAD - CODE && !program().is_empty());
        // A test can copy it to another page.
        assert!(program().len() as u64 <= PAGE);
        assert!(payload().len() as u64 <= MAILBOXES - PAYLOAD && !payload().is_empty());
        assert!(mailbox(MAX_VCPUS) <= STACKS);
        assert!(stack_top(MAX_VCPUS - 1) <= SCRATCH);
        const { assert!(STRESS_WORDS * 8 + MAX_VCPUS * 8 <= PAGE) };
    }
}
