// SPDX-License-Identifier: GPL-2.0

//! KVM's hypercalls, seen from inside of a guest.

use crate::base::enosys;
use kernel::error::to_result;
use kernel::prelude::*;

/// `KVM_HC_MAP_GPA_RANGE` of `include/uapi/linux/kvm_para.h`.
const MAP_GPA_RANGE: usize = 12;

/// Asks the host to map `pages` pages from page frame `frame` on as `attributes` say, which are the
/// hypercall's own. The host may keep or drop the old content.
pub(crate) fn map_gpa_range(frame: u64, pages: u64, attributes: u64) -> Result {
    let (mut result, address) = (MAP_GPA_RANGE, frame << 12);
    // SAFETY: The instruction changes `rax` only, and memory as the caller asks: the user
    // of this module answers for the content of the range, see `memfile_guest.rs`. `rbx`,
    // which a block of assembly may not name, is as it was. A machine that is no guest of KVM's
    // takes it for an invalid instruction, which is an oops.
    unsafe {
        core::arch::asm!(
            "xchg {address}, rbx",
            "vmmcall",
            "xchg {address}, rbx",
            address = inout(reg) address => _,
            inout("rax") result,
            in("rcx") pages,
            in("rdx") attributes,
            options(nostack, preserves_flags),
        );
    }
    // KVM's errors are the kernel's, but for ENOSYS, which is 1000.
    to_result(match i32::try_from(result as isize) {
        Ok(-1000) => enosys().to_errno(),
        Ok(result) => result,
        Err(_) => EIO.to_errno(),
    })
}
