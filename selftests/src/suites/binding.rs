// SPDX-License-Identifier: GPL-2.0
//! Binding a slot to a file: legal requests, and the errnos of all others (rules 6 and 7).

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use kvm_bindings::kvm_userspace_memory_region2;

use crate::ktap::{CaseResult, Suite};
use crate::module::Module;
use crate::pressure::base_pages;
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{Private, Vm, VmType, region, small_pages};
use crate::{GIB, MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "binding",
    [
        bad_descriptor_is_ebadf,
        read_only_descriptor_is_eacces,
        unaligned_offset_is_refused,
        overflowing_offset_is_refused,
        range_past_the_end_is_refused,
        file_without_size_is_refused,
        unaligned_slot_is_refused,
        log_dirty_readonly_and_guest_memfd_exclude_private,
        every_reserved_flag_is_refused,
        old_ioctl_does_not_know_private,
        vm_without_private_memory_refuses,
        private_slot_is_immutable,
        private_flag_cannot_be_toggled,
        overlap_in_the_file_is_eexist,
        neighbours_in_the_file_are_fine,
        range_is_free_again_after_deletion,
        range_is_free_again_after_the_vm_is_gone,
        refused_binding_leaves_nothing_behind,
        overlap_in_guest_memory_is_eexist,
    ]
);

/// A VM, a file of 1 MiB, and memory for the shared side.
struct Bench {
    vm: Vm,
    fd: OwnedFd,
    view: Mapping,
}

impl Bench {
    fn new() -> Result<Bench> {
        let fd = memfile(MIB)?;
        Ok(Bench { vm: Vm::protected()?, fd, view: small_pages(MIB)? })
    }

    /// A good request: slot 1 at 1 GiB, all of the file.
    fn request(&self) -> kvm_userspace_memory_region2 {
        region(1, GIB, &self.view, Some((Private::Memfile, self.fd.as_fd(), 0)))
    }

    /// Fail unless the request is refused with `errno`.
    fn refused(&self, what: &str, request: kvm_userspace_memory_region2, e: Errno) -> Result<()> {
        expect_errno(what, self.vm.raw_set_region(&request), &[e])
    }

    /// The good request still works, and is undone: refused ones have left no state.
    fn still_works(&self) -> Result<()> {
        self.vm.raw_set_region(&self.request()).context("the good request")?;
        self.vm.raw_delete(1).context("delete the slot")
    }
}

fn bad_descriptor_is_ebadf() -> CaseResult {
    let b = Bench::new()?;
    let closed = memfile(MIB)?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&closed) as u32;
    drop(closed);
    for guest_memfd in [number, 100_000, u32::MAX, i32::MAX as u32, 1 << 31] {
        let request = kvm_userspace_memory_region2 { guest_memfd, ..b.request() };
        b.refused(&format!("fd {guest_memfd:#x}"), request, Errno::EBADF)?;
    }
    // O_PATH descriptors cannot be used for anything but their path.
    let path = reopen(&b.fd, libc::O_PATH)?;
    let request = region(1, GIB, &b.view, Some((Private::Memfile, path.as_fd(), 0)));
    b.refused("O_PATH", request, Errno::EBADF)?;
    b.still_works()
}

fn read_only_descriptor_is_eacces() -> CaseResult {
    let b = Bench::new()?;
    let reader = reopen(&b.fd, libc::O_RDONLY)?;
    let request = region(1, GIB, &b.view, Some((Private::Memfile, reader.as_fd(), 0)));
    b.refused("read-only fd", request, Errno::EACCES)?;
    let writer = reopen(&b.fd, libc::O_WRONLY)?;
    let request = region(1, GIB, &b.view, Some((Private::Memfile, writer.as_fd(), 0)));
    b.vm.raw_set_region(&request).context("write-only fd")?;
    b.vm.raw_delete(1)?;
    b.still_works()
}

fn unaligned_offset_is_refused() -> CaseResult {
    let b = Bench::new()?;
    for bit in 0..12 {
        let request = kvm_userspace_memory_region2 {
            memory_size: PAGE,
            guest_memfd_offset: 1 << bit,
            ..b.request()
        };
        b.refused(&format!("offset 1 << {bit}"), request, Errno::EINVAL)?;
    }
    b.still_works()
}

fn overflowing_offset_is_refused() -> CaseResult {
    let b = Bench::new()?;
    for offset in [!(PAGE - 1), u64::MAX - MIB + 1, 1 << 63, (1 << 63) - PAGE, 1 << 44] {
        let request = kvm_userspace_memory_region2 { guest_memfd_offset: offset, ..b.request() };
        b.refused(&format!("offset {offset:#x}"), request, Errno::EINVAL)?;
    }
    b.still_works()
}

fn range_past_the_end_is_refused() -> CaseResult {
    let b = Bench::new()?;
    for (offset, size) in [(PAGE, MIB), (MIB - PAGE, 2 * PAGE), (MIB, PAGE), (2 * MIB, PAGE)] {
        let request = kvm_userspace_memory_region2 {
            memory_size: size,
            guest_memfd_offset: offset,
            ..b.request()
        };
        b.refused(&format!("[{offset:#x}, +{size:#x})"), request, Errno::EINVAL)?;
    }
    b.still_works()
}

fn file_without_size_is_refused() -> CaseResult {
    let b = Bench::new()?;
    let empty = memfile_unsized()?;
    let request = region(1, GIB, &b.view, Some((Private::Memfile, empty.as_fd(), 0)));
    b.refused("file without a size", request, Errno::EINVAL)?;
    ftruncate(&empty, MIB)?;
    b.vm.raw_set_region(&request).context("once it has one")
}

fn unaligned_slot_is_refused() -> CaseResult {
    let b = Bench::new()?;
    let good = b.request();
    for bit in 0..12 {
        let off = 1 << bit;
        let gpa = kvm_userspace_memory_region2 { guest_phys_addr: GIB + off, ..good };
        let hva =
            kvm_userspace_memory_region2 { userspace_addr: good.userspace_addr + off, ..good };
        let size = kvm_userspace_memory_region2 { memory_size: MIB - off, ..good };
        for (what, request) in [("gpa", gpa), ("hva", hva), ("size", size)] {
            b.refused(&format!("{what} off by {off}"), request, Errno::EINVAL)?;
        }
    }
    b.still_works()
}

fn log_dirty_readonly_and_guest_memfd_exclude_private() -> CaseResult {
    let b = Bench::new()?;
    for extra in 1..8 {
        let request =
            kvm_userspace_memory_region2 { flags: KVM_MEM_PRIVATE | extra, ..b.request() };
        b.refused(&format!("flags {:#x}", request.flags), request, Errno::EINVAL)?;
    }
    // With a file that would be right for the other flag, too.
    let gmem = b.vm.guest_memfd(MIB)?;
    let mut request = region(1, GIB, &b.view, Some((Private::GuestMemfd, gmem.as_fd(), 0)));
    request.flags |= KVM_MEM_PRIVATE;
    b.refused("guest_memfd with both flags", request, Errno::EINVAL)?;
    b.still_works()
}

fn every_reserved_flag_is_refused() -> CaseResult {
    let b = Bench::new()?;
    for bit in 4..32 {
        let request =
            kvm_userspace_memory_region2 { flags: KVM_MEM_PRIVATE | 1 << bit, ..b.request() };
        b.refused(&format!("flag bit {bit}"), request, Errno::EINVAL)?;
    }
    b.still_works()
}

fn old_ioctl_does_not_know_private() -> CaseResult {
    const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
    let b = Bench::new()?;
    let good = b.request();
    let mut old = kvm_bindings::kvm_userspace_memory_region {
        slot: 1,
        flags: KVM_MEM_PRIVATE,
        guest_phys_addr: good.guest_phys_addr,
        memory_size: good.memory_size,
        userspace_addr: good.userspace_addr,
    };
    // SAFETY: The structure is the one of this ioctl, and names memory of a `Mapping`.
    let result = unsafe { ioctl_mut(b.vm.fd(), KVM_SET_USER_MEMORY_REGION, &mut old) };
    expect_errno("KVM_SET_USER_MEMORY_REGION", result, &[Errno::EINVAL])?;
    b.still_works()
}

fn vm_without_private_memory_refuses() -> CaseResult {
    let b = Bench::new()?;
    let vm = Vm::new(VmType::Default)?;
    expect_errno("default VM", vm.raw_set_region(&b.request()), &[Errno::EINVAL])?;
    b.still_works()
}

fn private_slot_is_immutable() -> CaseResult {
    let _pages = base_pages()?;
    let b = Bench::new()?;
    let good = b.request();
    let other = memfile(MIB)?;
    let spare = small_pages(MIB)?;
    b.vm.raw_set_region(&good)?;
    let changes = [
        ("nothing", good),
        ("gpa", kvm_userspace_memory_region2 { guest_phys_addr: 2 * GIB, ..good }),
        ("size", kvm_userspace_memory_region2 { memory_size: MIB / 2, ..good }),
        ("hva", kvm_userspace_memory_region2 { userspace_addr: spare.addr(), ..good }),
        ("file", region(1, GIB, &b.view, Some((Private::Memfile, other.as_fd(), 0)))),
        (
            "log",
            kvm_userspace_memory_region2 { flags: good.flags | KVM_MEM_LOG_DIRTY_PAGES, ..good },
        ),
    ];
    for (what, request) in changes {
        b.refused(what, request, Errno::EINVAL)?;
    }
    // The slot is as it was.
    b.vm.set_private(GIB, MIB)?;
    let mut vcpu = b.vm.vcpu(0)?;
    vcpu.store(GIB + MIB - 8, 5)?;
    expect_allocated(&b.fd, PAGE, "the guest touched a page")
}

/// v7's hole: a request without the flag went through and freed a slot that was still bound.
fn private_flag_cannot_be_toggled() -> CaseResult {
    let b = Bench::new()?;
    let private = b.request();
    let shared = region(1, GIB, &b.view, None);
    b.vm.raw_set_region(&private)?;
    for flags in [0, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY] {
        let request = kvm_userspace_memory_region2 { flags, ..shared };
        b.refused(&format!("to flags {flags}"), request, Errno::EINVAL)?;
        let moved = kvm_userspace_memory_region2 { guest_phys_addr: 2 * GIB, ..request };
        b.refused(&format!("move to flags {flags}"), moved, Errno::EINVAL)?;
    }
    punch(&b.fd, 0, MIB).context("punch while the slot is as it was")?;
    b.vm.raw_delete(1)?;
    b.vm.raw_set_region(&shared)?;
    b.refused("from shared to private", private, Errno::EINVAL)
}

/// The guest ranges do not overlap, only the file ranges do: upstream's test of guest_memfd does
/// not cover this.
fn overlap_in_the_file_is_eexist() -> CaseResult {
    let b = Bench::new()?;
    let other_vm = Vm::protected()?;
    let half = MIB / 2;
    let part = |id, gpa, offset, size| kvm_userspace_memory_region2 {
        slot: id,
        guest_phys_addr: gpa,
        memory_size: size,
        guest_memfd_offset: offset,
        ..b.request()
    };
    let quarter = MIB / 4;
    b.vm.raw_set_region(&part(1, GIB, quarter, half))?;
    let overlaps = [
        ("the same", quarter, half),
        ("inside", quarter + PAGE, PAGE),
        ("first page", quarter, PAGE),
        ("last page", quarter + half - PAGE, PAGE),
        ("around", 0, MIB),
        ("front half", 0, half),
        ("back half", half, half),
        ("one page at the start", 0, quarter + PAGE),
        ("one page at the end", quarter + half - PAGE, quarter + PAGE),
    ];
    for (what, offset, size) in overlaps {
        let request = part(2, 2 * GIB, offset, size);
        b.refused(what, request, Errno::EEXIST)?;
        let result = other_vm.raw_set_region(&request);
        expect_errno(&format!("{what}, other VM"), result, &[Errno::EEXIST])?;
    }
    Ok(())
}

fn neighbours_in_the_file_are_fine() -> CaseResult {
    let b = Bench::new()?;
    let other_vm = Vm::protected()?;
    let quarter = MIB / 4;
    // In no order, and one of them in another VM at the same guest addresses.
    for (vm, id, index) in [(&b.vm, 1, 2), (&b.vm, 2, 0), (&other_vm, 1, 1), (&b.vm, 3, 3)] {
        let request = kvm_userspace_memory_region2 {
            slot: id,
            guest_phys_addr: u64::from(id) * GIB,
            memory_size: quarter,
            guest_memfd_offset: index * quarter,
            ..b.request()
        };
        vm.raw_set_region(&request).with_context(|| format!("quarter {index}"))?;
    }
    Ok(())
}

fn range_is_free_again_after_deletion() -> CaseResult {
    let b = Bench::new()?;
    for _ in 0..20 {
        b.still_works()?;
    }
    Ok(())
}

fn range_is_free_again_after_the_vm_is_gone() -> CaseResult {
    let b = Bench::new()?;
    for _ in 0..5 {
        let vm = Vm::protected()?;
        vm.raw_set_region(&b.request())?;
        vm.set_private(GIB, MIB)?;
        vm.vcpu(0)?.store(GIB, 1)?;
        b.refused("bound elsewhere", b.request(), Errno::EEXIST)?;
    }
    b.still_works()
}

fn refused_binding_leaves_nothing_behind() -> CaseResult {
    let module = Module::memfile()?;
    let b = Bench::new()?;
    let taken = small_pages(MIB)?;
    b.vm.raw_set_region(&region(2, 2 * GIB, &taken, None))?;
    let collides = kvm_userspace_memory_region2 { guest_phys_addr: 2 * GIB, ..b.request() };
    for _ in 0..20 {
        b.refused("guest range taken", collides, Errno::EEXIST)?;
    }
    let other_vm = Vm::protected()?;
    other_vm.raw_set_region(&b.request()).context("the file is not bound")?;
    b.refused("now it is", b.request(), Errno::EEXIST)?;
    // There is no reference to the file any more.
    drop((b, other_vm));
    module.expect_unused()
}

fn overlap_in_guest_memory_is_eexist() -> CaseResult {
    let b = Bench::new()?;
    let other = memfile(MIB)?;
    b.vm.raw_set_region(&b.request())?;
    for gpa in [GIB, GIB + PAGE, GIB + MIB - PAGE, GIB - PAGE] {
        let request = region(2, gpa, &b.view, Some((Private::Memfile, other.as_fd(), 0)));
        b.refused(&format!("gpa {gpa:#x}"), request, Errno::EEXIST)?;
    }
    Ok(())
}
