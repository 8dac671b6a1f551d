// SPDX-License-Identifier: GPL-2.0
//! A machine on which no VM can have private memory, though the kernel has memfiles: KVM without nested
//! paging, with another MMU than the one that knows of private memory, or built without the VM type.
//!
//! The kernel's command line decides the first two: `scripts/check` boots a machine for each of them. The
//! third needs a kernel of its own: `make check KERNEL=unprotected`.

use std::os::fd::AsFd;

use anyhow::{Context, ensure};

use crate::consumer::{Consumer, MAPPER, Span};
use crate::ktap::{Case, CaseResult, Suite, TIME_LIMIT, skip};
use crate::pressure::read;
use crate::support::setup::GUEST;
use crate::support::setup::expect_as_vm_types_say;
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{PROTECTED_VM, Private, Vm, VmType, open_kvm, region, small_pages, supports};
use crate::{GIB, MIB, PAGE};

/// The cases of a suite, where this condition holds.
macro_rules! suite_without {
    ($name:literal, $condition:expr) => {
        Suite {
            name: $name,
            cases: &[
                suite_without!(@case $condition, device_says_what_vm_types_say),
                suite_without!(@case $condition, vm_has_nothing_of_memfiles),
                suite_without!(@case $condition, file_works_for_other_consumers),
            ],
            hidden: false,
            together: false,
        }
    };
    (@case $condition:expr, $case:ident) => {
        Case {
            name: stringify!($case),
            func: || $condition.and_then(|()| without()).and_then(|()| $case()),
            limit: TIME_LIMIT,
        }
    };
}
/// Nested paging is off.
pub static NPT: Suite =
    suite_without!("cap_without_npt", is_off("/sys/module/kvm_amd/parameters/npt"));
/// The MMU for nested paging is the one that is for shadow paging as well.
pub static TDP_MMU: Suite =
    suite_without!("cap_without_tdp_mmu", is_off("/sys/module/kvm/parameters/tdp_mmu"));
/// The kernel has no VM type with private memory.
pub static PROTECTED: Suite = suite_without!("cap_without_protected", is_not_built());

/// SKIP unless the parameter in this file is off.
fn is_off(parameter: &str) -> CaseResult {
    match read(parameter)?.as_str() {
        "N" => Ok(()),
        _ => skip(format!("{parameter} is on")),
    }
}

/// SKIP unless the configuration has not the VM type.
fn is_not_built() -> CaseResult {
    match built_with(PROTECTED_VM)? {
        false => Ok(()),
        true => skip(format!("the kernel is built with {PROTECTED_VM}")),
    }
}

/// This kernel has memfiles, but KVM has not the VMs for them.
fn without() -> CaseResult {
    drop(memfile_unsized()?);
    let kvm = open_kvm()?;
    ensure!(!supports(&kvm, VmType::Protected), "KVM has protected VMs all the same");
    Ok(())
}

fn device_says_what_vm_types_say() -> CaseResult {
    expect_as_vm_types_say()
}

fn vm_has_nothing_of_memfiles() -> CaseResult {
    let kvm = open_kvm()?;
    let result = kvm.create_vm_with_type(VmType::Protected.number());
    let result = result.map(drop).map_err(|e| Errno(e.errno()));
    expect_errno("a protected VM", result, &[Errno::EINVAL])?;

    let vm = Vm::new(VmType::Default)?;
    let mask = vm.check_extension(KVM_CAP_MEMFILE);
    ensure!(mask == 0, "a default VM says {mask:#x}");
    let result = vm.raw_enable_cap(KVM_CAP_MEMFILE, MEMFILE_F_ALL);
    expect_errno("choose flags", result, &[Errno::EINVAL])?;
    let (fd, view) = (memfile(MIB)?, small_pages(MIB)?);
    let request = region(1, GIB, &view, Some((Private::Memfile, fd.as_fd(), 0)));
    expect_errno("a private slot", vm.raw_set_region(&request), &[Errno::EINVAL])?;
    for private in [true, false] {
        let result = vm.raw_region(GIB, PAGE, private);
        expect_errno("convert a region", result, &[Errno::ENOTTY])?;
    }
    // The VM itself works.
    let slot = vm.add_shared(1, GIB, view)?;
    let mut vcpu = vm.vcpu(0)?;
    vcpu.fill(slot.gpa, slot.size, GUEST)?;
    vcpu.verify(slot.gpa, slot.size, GUEST)
}

fn file_works_for_other_consumers() -> CaseResult {
    let fd = memfile(MIB)?;
    let mapper = Consumer::bound(&fd, MAPPER, Span::same(0, MIB / PAGE))?;
    mapper.get(3).context("get_pfn")?;
    expect_allocated(&fd, PAGE, "one page is in use")?;
    punch(&fd, 0, MIB)?;
    mapper.expect_callbacks(&[(0, MIB / PAGE)])?;
    expect_allocated(&fd, 0, "punched")
}
