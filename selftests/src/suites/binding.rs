// SPDX-License-Identifier: GPL-2.0
//! Binding a slot to a file: legal requests, and the errnos of all others (rules 6 and 7).

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use kvm_bindings::kvm_userspace_memory_region2;

use crate::ktap::CaseResult;
use crate::module::Module;
use crate::pressure::base_pages;
use crate::support::backend::Backend;
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{Private, Vm, VmType, region, small_pages};
use crate::{GIB, MIB, PAGE, conformance};

conformance!(
    "binding",
    [
        bad_descriptor_is_ebadf,
        read_only_descriptor_is_eacces,
        unaligned_offset_is_refused,
        overflowing_offset_is_refused,
        range_past_the_end_is_refused,
        unaligned_slot_is_refused,
        log_dirty_readonly_and_guest_memfd_exclude_private,
        every_reserved_flag_is_refused,
        old_ioctl_does_not_know_private,
        private_slot_is_immutable,
        private_flag_cannot_be_toggled,
        overlap_in_the_file_is_eexist,
        neighbours_in_the_file_are_fine,
        range_is_free_again_after_deletion,
        range_is_free_again_after_the_vm_is_gone,
        overlap_in_guest_memory_is_eexist,
    ],
    converting: [vm_without_private_memory_refuses],
    memfile: [file_without_size_is_refused, refused_binding_leaves_nothing_behind],
    huge: all,
);

/// A VM, a file of 1 MiB or a page, and memory for the shared side.
struct Bench {
    on: &'static Backend,
    /// Bytes of the file.
    size: u64,
    vm: Vm,
    fd: OwnedFd,
    view: Mapping,
}

impl Bench {
    fn new(on: &'static Backend) -> Result<Bench> {
        let size = MIB.next_multiple_of(on.page);
        let vm = on.vm()?;
        let fd = on.create(&vm, size)?;
        Ok(Bench { on, size, vm, fd, view: small_pages(size)? })
    }

    /// A good request: slot 1 at 1 GiB, all of the file.
    fn request(&self) -> kvm_userspace_memory_region2 {
        region(1, GIB, &self.view, Some((self.on.kind, self.fd.as_fd(), 0)))
    }

    /// A memfile refuses the request with that errno. A slot of another backend is deleted again.
    fn refused(&self, what: &str, request: kvm_userspace_memory_region2, e: Errno) -> Result<()> {
        let result = self.vm.raw_set_region(&request);
        self.on.errno(what, result, &[e])?;
        if result.is_ok() {
            self.vm.raw_delete(request.slot).context("delete the slot")?;
        }
        Ok(())
    }

    /// The good request still works, and is undone: refused ones have left no state.
    fn still_works(&self) -> Result<()> {
        self.vm.raw_set_region(&self.request()).context("the good request")?;
        self.vm.raw_delete(1).context("delete the slot")
    }
}

fn bad_descriptor_is_ebadf(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    let closed = on.create(&b.vm, MIB)?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&closed) as u32;
    drop(closed);
    for guest_memfd in [number, 100_000, u32::MAX, i32::MAX as u32, 1 << 31] {
        let request = kvm_userspace_memory_region2 { guest_memfd, ..b.request() };
        b.refused("bad descriptor", request, Errno::EBADF)
            .with_context(|| format!("fd {guest_memfd:#x}"))?;
    }
    // O_PATH descriptors cannot be used for anything but their path.
    let path = reopen(&b.fd, libc::O_PATH)?;
    let request = region(1, GIB, &b.view, Some((on.kind, path.as_fd(), 0)));
    b.refused("O_PATH descriptor", request, Errno::EBADF)?;
    b.still_works()
}

fn read_only_descriptor_is_eacces(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    let Some(reader) = on.works("reopen", reopen(&b.fd, libc::O_RDONLY))? else {
        return b.still_works();
    };
    let request = region(1, GIB, &b.view, Some((on.kind, reader.as_fd(), 0)));
    b.refused("read-only fd", request, Errno::EACCES)?;
    let writer = reopen(&b.fd, libc::O_WRONLY)?;
    let request = region(1, GIB, &b.view, Some((on.kind, writer.as_fd(), 0)));
    b.vm.raw_set_region(&request).context("write-only fd")?;
    b.vm.raw_delete(1)?;
    b.still_works()
}

fn unaligned_offset_is_refused(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    for bit in 0..12 {
        let request = kvm_userspace_memory_region2 {
            memory_size: PAGE,
            guest_memfd_offset: 1 << bit,
            ..b.request()
        };
        b.refused("unaligned offset", request, Errno::EINVAL)
            .with_context(|| format!("1 << {bit}"))?;
    }
    b.still_works()
}

fn overflowing_offset_is_refused(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    for offset in [!(PAGE - 1), u64::MAX - b.size + 1, 1 << 63, (1 << 63) - PAGE, 1 << 44] {
        let request = kvm_userspace_memory_region2 { guest_memfd_offset: offset, ..b.request() };
        b.refused("offset that overflows", request, Errno::EINVAL)
            .with_context(|| format!("offset {offset:#x}"))?;
    }
    b.still_works()
}

fn range_past_the_end_is_refused(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    let all = b.size;
    for (offset, size) in [(PAGE, all), (all - PAGE, 2 * PAGE), (all, PAGE), (2 * all, PAGE)] {
        let request = kvm_userspace_memory_region2 {
            memory_size: size,
            guest_memfd_offset: offset,
            ..b.request()
        };
        b.refused("range past the end", request, Errno::EINVAL)
            .with_context(|| format!("[{offset:#x}, +{size:#x})"))?;
    }
    b.still_works()
}

fn file_without_size_is_refused(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    let empty = on.new_file()?;
    let request = region(1, GIB, &b.view, Some((on.kind, empty.as_fd(), 0)));
    b.refused("file without a size", request, Errno::EINVAL)?;
    ftruncate(&empty, b.size)?;
    b.vm.raw_set_region(&request).context("once it has one")
}

fn unaligned_slot_is_refused(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    let good = b.request();
    for bit in 0..12 {
        let off = 1 << bit;
        let gpa = kvm_userspace_memory_region2 { guest_phys_addr: GIB + off, ..good };
        let hva =
            kvm_userspace_memory_region2 { userspace_addr: good.userspace_addr + off, ..good };
        let size = kvm_userspace_memory_region2 { memory_size: b.size - off, ..good };
        for (what, request) in [("gpa", gpa), ("hva", hva), ("size", size)] {
            b.refused(&format!("unaligned {what}"), request, Errno::EINVAL)
                .with_context(|| format!("by {off}"))?;
        }
    }
    b.still_works()
}

fn log_dirty_readonly_and_guest_memfd_exclude_private(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    let names = [
        (KVM_MEM_LOG_DIRTY_PAGES, "LOG_DIRTY_PAGES"),
        (KVM_MEM_READONLY, "READONLY"),
        (KVM_MEM_GUEST_MEMFD | KVM_MEM_PRIVATE, "both kinds"),
    ];
    for extra in 1..16 {
        let good = b.request();
        let request = kvm_userspace_memory_region2 { flags: good.flags | extra, ..good };
        if request.flags == good.flags {
            continue;
        }
        let told = names.iter().filter(|(bits, _)| request.flags & bits == *bits);
        let told = told.map(|(_, name)| *name).collect::<Vec<_>>().join(", ");
        b.refused(&told, request, Errno::EINVAL)?;
    }
    if on.kind == Private::GuestMemfd {
        return b.still_works();
    }
    // With a file that would be right for the other flag, too.
    let gmem = b.vm.guest_memfd(b.size)?;
    let mut request = region(1, GIB, &b.view, Some((Private::GuestMemfd, gmem.as_fd(), 0)));
    request.flags |= KVM_MEM_PRIVATE;
    let result = b.vm.raw_set_region(&request);
    expect_errno("guest_memfd with both flags", result, &[Errno::EINVAL])?;
    b.still_works()
}

fn every_reserved_flag_is_refused(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    for bit in 4..32 {
        let request =
            kvm_userspace_memory_region2 { flags: on.kind.flag() | 1 << bit, ..b.request() };
        b.refused("reserved flag", request, Errno::EINVAL).with_context(|| format!("bit {bit}"))?;
    }
    b.still_works()
}

fn old_ioctl_does_not_know_private(on: &'static Backend) -> CaseResult {
    const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_ae46;
    let b = Bench::new(on)?;
    let good = b.request();
    let mut old = kvm_bindings::kvm_userspace_memory_region {
        slot: 1,
        flags: on.kind.flag(),
        guest_phys_addr: good.guest_phys_addr,
        memory_size: good.memory_size,
        userspace_addr: good.userspace_addr,
    };
    // SAFETY: The structure is the one of this ioctl, and names memory of a `Mapping`.
    let result = unsafe { ioctl_mut(b.vm.fd(), KVM_SET_USER_MEMORY_REGION, &mut old) };
    on.errno("KVM_SET_USER_MEMORY_REGION", result, &[Errno::EINVAL])?;
    b.still_works()
}

fn vm_without_private_memory_refuses(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    let vm = Vm::new(VmType::Default)?;
    let result = vm.raw_set_region(&b.request());
    on.errno("VM without private memory", result, &[Errno::EINVAL])?;
    b.still_works()
}

fn private_slot_is_immutable(on: &'static Backend) -> CaseResult {
    let _pages = base_pages()?;
    let b = Bench::new(on)?;
    let good = b.request();
    let other = on.create(&b.vm, b.size)?;
    let spare = small_pages(b.size)?;
    b.vm.raw_set_region(&good)?;
    let changes = [
        ("nothing", good),
        ("gpa", kvm_userspace_memory_region2 { guest_phys_addr: 2 * GIB, ..good }),
        ("size", kvm_userspace_memory_region2 { memory_size: b.size / 2, ..good }),
        ("hva", kvm_userspace_memory_region2 { userspace_addr: spare.addr(), ..good }),
        ("file", region(1, GIB, &b.view, Some((on.kind, other.as_fd(), 0)))),
        (
            "log",
            kvm_userspace_memory_region2 { flags: good.flags | KVM_MEM_LOG_DIRTY_PAGES, ..good },
        ),
    ];
    for (what, request) in changes {
        b.refused(&format!("change of {what}"), request, Errno::EINVAL)?;
    }
    // The slot is as it was.
    on.set_private(&b.vm, GIB, b.size)?;
    let mut vcpu = b.vm.vcpu(0)?;
    vcpu.store(GIB + b.size - 8, 5)?;
    on.expect_allocated(&b.fd, on.page, "the guest touched a page")
}

/// v7's hole: a request without the flag went through and freed a slot that was still bound.
fn private_flag_cannot_be_toggled(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    let private = b.request();
    let shared = region(1, GIB, &b.view, None);
    b.vm.raw_set_region(&private)?;
    for flags in [0, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY] {
        let request = kvm_userspace_memory_region2 { flags, ..shared };
        b.refused("private to shared", request, Errno::EINVAL)
            .with_context(|| format!("flags {flags}"))?;
        let moved = kvm_userspace_memory_region2 { guest_phys_addr: 2 * GIB, ..request };
        b.refused("private to shared, and moved", moved, Errno::EINVAL)
            .with_context(|| format!("flags {flags}"))?;
    }
    punch(&b.fd, 0, b.size).context("punch while the slot is as it was")?;
    b.vm.raw_delete(1)?;
    b.vm.raw_set_region(&shared)?;
    b.refused("shared to private", private, Errno::EINVAL)
}

/// The guest ranges do not overlap, only the file ranges do: upstream's test of guest_memfd does
/// not cover this.
fn overlap_in_the_file_is_eexist(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    let other_vm = on.vm()?;
    let half = b.size / 2;
    let part = |id, gpa, offset, size| kvm_userspace_memory_region2 {
        slot: id,
        guest_phys_addr: gpa,
        memory_size: size,
        guest_memfd_offset: offset,
        ..b.request()
    };
    let quarter = b.size / 4;
    b.vm.raw_set_region(&part(1, GIB, quarter, half))?;
    let overlaps = [
        ("the same", quarter, half),
        ("inside", quarter + PAGE, PAGE),
        ("first page", quarter, PAGE),
        ("last page", quarter + half - PAGE, PAGE),
        ("around", 0, b.size),
        ("front half", 0, half),
        ("back half", half, half),
        ("one page at the start", 0, quarter + PAGE),
        ("one page at the end", quarter + half - PAGE, quarter + PAGE),
    ];
    for (what, offset, size) in overlaps {
        let request = part(2, 2 * GIB, offset, size);
        b.refused("overlap", request, Errno::EEXIST).context(what)?;
        let result = other_vm.raw_set_region(&request);
        on.errno("overlap, in another VM", result, &[Errno::EEXIST]).context(what)?;
    }
    Ok(())
}

fn neighbours_in_the_file_are_fine(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    let other_vm = on.vm()?;
    let quarter = b.size / 4;
    // In no order, and one of them in another VM at the same guest addresses.
    for (vm, id, index) in [(&b.vm, 1, 2), (&b.vm, 2, 0), (&other_vm, 1, 1), (&b.vm, 3, 3)] {
        let request = kvm_userspace_memory_region2 {
            slot: id,
            guest_phys_addr: u64::from(id) * GIB,
            memory_size: quarter,
            guest_memfd_offset: index * quarter,
            ..b.request()
        };
        let what = if std::ptr::eq(vm, &b.vm) { "neighbour" } else { "neighbour, in another VM" };
        on.works(what, vm.raw_set_region(&request)).with_context(|| format!("quarter {index}"))?;
    }
    Ok(())
}

fn range_is_free_again_after_deletion(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    for _ in 0..20 {
        b.still_works()?;
    }
    Ok(())
}

fn range_is_free_again_after_the_vm_is_gone(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    for _ in 0..5 {
        let vm = on.vm()?;
        if on.works("another VM", vm.raw_set_region(&b.request()))?.is_none() {
            break;
        }
        on.set_private(&vm, GIB, b.size)?;
        vm.vcpu(0)?.store(GIB, 1)?;
        b.refused("bound elsewhere", b.request(), Errno::EEXIST)?;
    }
    b.still_works()
}

fn refused_binding_leaves_nothing_behind(on: &'static Backend) -> CaseResult {
    let module = Module::memfile()?;
    let b = Bench::new(on)?;
    let taken = small_pages(b.size)?;
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

fn overlap_in_guest_memory_is_eexist(on: &'static Backend) -> CaseResult {
    let b = Bench::new(on)?;
    let other = on.create(&b.vm, b.size)?;
    b.vm.raw_set_region(&b.request())?;
    for gpa in [GIB, GIB + PAGE, GIB + b.size - PAGE, GIB - PAGE] {
        let request = region(2, gpa, &b.view, Some((on.kind, other.as_fd(), 0)));
        b.refused("overlap in guest memory", request, Errno::EEXIST)
            .with_context(|| format!("gpa {gpa:#x}"))?;
    }
    Ok(())
}
