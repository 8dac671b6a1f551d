// SPDX-License-Identifier: GPL-2.0
//! A VM with one vCPU and one slot of private memory: the start of most cases.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};

use crate::guest::{self, Command};
use crate::mem;
use crate::pattern::Pattern;
use crate::pressure::Cgroup;
use crate::support::backend::{Backend, MEMFILE};
use crate::sys;
use crate::uapi::*;
use crate::vm::{ConvertBy, Exit, Slot, Vcpu, Vm, VmType, open_kvm, region, small_pages, supports};
use crate::{GIB, HUGE, MIB, PAGE};

/// A port that no device has.
pub const PORT: u64 = 0x6d67;
/// The slot number that [`Setup`] uses.
pub const SLOT: u32 = 1;
/// The pattern that [`Setup::fill_both`] puts into the shared side.
pub const SHARED: Pattern = Pattern::Generation(1000);
/// The pattern that [`Setup::fill_both`] lets the guest write.
pub const GUEST: Pattern = Pattern::Generation(2000);

/// Where a slot lies in guest physical memory and in its file.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub gpa: u64,
    pub offset: u64,
}

/// Every relation of base gfn and file offset that offset arithmetic can get wrong.
pub const LAYOUTS: [Layout; 6] = [
    // No offset.
    Layout { gpa: 4 * GIB, offset: 0 },
    // Base gfn above the file offset, below it, and equal to it.
    Layout { gpa: 4 * GIB, offset: 8 * MIB },
    Layout { gpa: 16 * MIB, offset: 64 * MIB },
    Layout { gpa: 16 * MIB, offset: 16 * MIB },
    // Neither is a multiple of 2 MiB, and they are not congruent.
    Layout { gpa: 4 * GIB + 3 * PAGE, offset: HUGE + 5 * PAGE },
    Layout { gpa: 16 * MIB + 7 * PAGE, offset: 64 * MIB + PAGE },
];

/// The choices of `KVM_CAP_MEMFILE`, named after what the host may do with the pages.
pub const PINNED: u64 = MEMFILE_F_ALL;
/// Pinned, and not in the kernel's direct map.
pub const HIDDEN: u64 = PINNED | MEMFILE_F_KERNEL_INACCESSIBLE;
pub const MOVABLE: u64 = MEMFILE_F_USER_INACCESSIBLE | MEMFILE_F_UNRECLAIMABLE;
pub const RECLAIMABLE: u64 = MEMFILE_F_USER_INACCESSIBLE | MEMFILE_F_UNMOVABLE;
pub const BOTH: u64 = MEMFILE_F_USER_INACCESSIBLE;

/// A VM with a private slot.
pub struct Setup {
    pub on: &'static Backend,
    pub vm: Vm,
    pub vcpu: Vcpu,
    pub fd: OwnedFd,
    pub slot: Slot,
    offset: u64,
}

impl Setup {
    /// A slot of `size` bytes at [`LAYOUTS`]`[0]`, all private.
    pub fn new(on: impl Into<&'static Backend>, size: u64) -> Result<Setup> {
        Setup::at(on, size, LAYOUTS[0])
    }

    /// A slot of `size` bytes, all private, bound to a part of a file that is 2 MiB longer.
    pub fn at(on: impl Into<&'static Backend>, size: u64, layout: Layout) -> Result<Setup> {
        let on = on.into();
        Setup::in_vm(on.vm()?, on, size, layout)
    }

    /// The same as [`Setup::new`], with a memfile and the flags that the VM chooses for it.
    pub fn with_flags(flags: u64, size: u64) -> Result<Setup> {
        Setup::with_flags_on(&MEMFILE, flags, size)
    }

    /// The same with another kind of memfile.
    pub fn with_flags_on(on: &'static Backend, flags: u64, size: u64) -> Result<Setup> {
        Setup::in_vm(vm_with_flags(flags)?, on, size, LAYOUTS[0])
    }

    /// The same, in a VM whose private memory KVM itself may use if `access` is set. The shared
    /// side contains [`SHARED`].
    pub fn used_by_kvm(flags: u64, access: bool, size: u64) -> Result<Setup> {
        let vm = vm_with_flags(flags)?;
        vm.raw_enable_cap(KVM_CAP_MEMFILE_ACCESS, access.into())
            .context("KVM_CAP_MEMFILE_ACCESS")?;
        let s = Setup::in_vm(vm, &MEMFILE, size, LAYOUTS[0])?;
        fill_view(&s.slot, SHARED);
        Ok(s)
    }

    /// The same, after the guest has filled it with [`GUEST`].
    pub fn filled(flags: u64, size: u64) -> Result<Setup> {
        let mut s = Setup::with_flags(flags, size)?;
        s.vcpu.fill(s.slot.gpa, size, GUEST)?;
        Ok(s)
    }

    /// The same with a file whose pages were allocated before it was bound.
    pub fn allocated_first(flags: u64, size: u64) -> Result<Setup> {
        let vm = vm_with_flags(flags)?;
        let fd = MEMFILE.create(&vm, LAYOUTS[0].offset + size + HUGE)?;
        sys::allocate(&fd, LAYOUTS[0].offset, size).context("fallocate")?;
        Setup::on_file(vm, &MEMFILE, fd, size, LAYOUTS[0])
    }

    /// The same file with its content, in another VM with these flags.
    pub fn pass_on(self, flags: u64) -> Result<Setup> {
        self.pass_on_after(flags, || Ok(()))
    }

    /// The same, and do `work` in between, while the file is in no VM.
    pub fn pass_on_after(self, flags: u64, work: impl FnOnce() -> Result<()>) -> Result<Setup> {
        let Setup { on, vm, vcpu, fd, slot, offset } = self;
        drop((vcpu, vm));
        work()?;
        let layout = Layout { gpa: slot.gpa, offset };
        Setup::on_file(vm_with_flags(flags)?, on, fd, slot.size, layout)
    }

    fn in_vm(vm: Vm, on: &'static Backend, size: u64, layout: Layout) -> Result<Setup> {
        let fd = on.create(&vm, layout.offset + size + HUGE)?;
        Setup::on_file(vm, on, fd, size, layout)
    }

    /// The same as [`Setup::at`], on an existing file.
    pub fn on_file(
        vm: Vm,
        on: impl Into<&'static Backend>,
        fd: OwnedFd,
        size: u64,
        layout: Layout,
    ) -> Result<Setup> {
        let on = on.into();
        let slot = on.add_slot(&vm, SLOT, (layout.gpa, layout.offset), size, &fd)?;
        let vcpu = vm.vcpu(0)?;
        Ok(Setup { on, vm, vcpu, fd, slot, offset: layout.offset })
    }

    /// Make the slot again after it was deleted by its number.
    pub fn bind_again(&self) -> Result<()> {
        let private = Some((self.on.kind, self.fd.as_fd(), self.offset));
        let request = region(self.slot.id, self.slot.gpa, &self.slot.view, private);
        self.vm.raw_set_region(&request).context("make the slot again")
    }

    /// Pages of the file that are in memory.
    pub fn resident(&self) -> Result<u64> {
        mem::resident_pages(&self.fd)
    }

    /// Swap the guest out, `bytes` at a time, until its file has no page in memory. The guest must
    /// not run. Pages under writeback may still be in memory.
    pub fn swap_out(&self, cgroup: &Cgroup, bytes: u64) -> Result<()> {
        for _ in 0..8 {
            if self.resident()? == 0 {
                return Ok(());
            }
            cgroup.reclaim_unused(bytes)?;
        }
        let left = self.resident()?;
        ensure!(left == 0, "{left} pages are still in memory");
        Ok(())
    }

    /// Write page tables to private memory, the slot's second and third page: where they are.
    pub fn write_page_tables(&mut self) -> Result<[u64; 2]> {
        let (pml4, pdpt) = (self.slot.gpa + PAGE, self.slot.gpa + 2 * PAGE);
        self.vcpu.call(Command::Copy, &[pdpt, guest::PML4 + PAGE, PAGE / 8])?;
        self.vcpu.fill(pml4, PAGE, Pattern::ZERO)?;
        self.vcpu.store(pml4, pdpt | 3)?;
        Ok([pml4, pdpt])
    }

    /// Run the guest on such page tables: where the second is.
    pub fn private_page_tables(&mut self) -> Result<u64> {
        let [pml4, pdpt] = self.write_page_tables()?;
        self.vcpu.set_page_tables(pml4)?;
        Ok(pdpt)
    }

    /// Fill the shared side with [`SHARED`], and let the guest fill the private side with
    /// [`GUEST`].
    pub fn fill_both(&mut self) -> Result<()> {
        fill_view(&self.slot, SHARED);
        self.vcpu.fill(self.slot.gpa, self.slot.size, GUEST)?;
        self.expect_whole()
    }

    /// Fail unless KVM has mapped each huge page of hugetlbfs that the slot has all of as one.
    pub fn expect_whole(&self) -> Result<()> {
        self.on.expect_whole(&self.vm, &self.slot, self.offset)
    }
}

/// The flags on the device if it can make a VM that has them, else none. See the suites
/// `cap_without_*`.
pub fn expect_as_vm_types_say() -> Result<()> {
    let kvm = open_kvm()?;
    let wanted = if supports(&kvm, VmType::Protected) { HIDDEN as i32 } else { 0 };
    let mask = kvm.check_extension_raw(KVM_CAP_MEMFILE.into());
    ensure!(mask == wanted, "KVM_CHECK_EXTENSION on the device gives {mask:#x}, not {wanted:#x}");
    Ok(())
}

/// A VM that has chosen these flags for its memfiles.
pub fn vm_with_flags(flags: u64) -> Result<Vm> {
    drop(sys::memfile_unsized()?);
    let vm = Vm::protected()?;
    vm.raw_enable_cap(KVM_CAP_MEMFILE, flags).with_context(|| format!("choose {flags:#x}"))?;
    Ok(vm)
}

/// Write a pattern all over the shared side of a slot; addresses are guest addresses.
pub fn fill_view(slot: &Slot, pattern: Pattern) {
    fill_view_part(slot, 0, slot.size, pattern);
}

/// [`fill_view`] for a part, which begins `start` bytes into the slot.
pub fn fill_view_part(slot: &Slot, start: u64, len: u64, pattern: Pattern) {
    for offset in (start..start + len).step_by(8) {
        slot.view.store(offset, pattern.word(slot.gpa + offset));
    }
}

/// Memory of the VMM with what the guest is to find from `gpa` on, to populate its memory from.
pub fn content(gpa: u64, len: u64, pattern: Pattern) -> Result<sys::Mapping> {
    let source = small_pages(len)?;
    for offset in (0..len).step_by(8) {
        source.store(offset, pattern.word(gpa + offset));
    }
    Ok(source)
}

/// Fail unless a pattern is all over a part of the shared side.
pub fn check_view(slot: &Slot, start: u64, len: u64, pattern: Pattern) -> Result<()> {
    for offset in (start..start + len).step_by(8) {
        let (got, wanted) = (slot.view.load(offset), pattern.word(slot.gpa + offset));
        ensure!(got == wanted, "host reads {got:#x} at +{offset:#x}, wanted {wanted:#x}");
    }
    Ok(())
}

/// The guest asks by hypercall for the conversion of a range, and the VMM obeys.
pub fn convert_by_hypercall(
    vm: &Vm,
    vcpu: &mut Vcpu,
    by: ConvertBy,
    gpa: u64,
    len: u64,
    private: bool,
) -> Result<()> {
    let exit = vcpu.start_map_gpa(gpa, len, private)?;
    let Exit::Hypercall { nr: KVM_HC_MAP_GPA_RANGE, args: [start, pages, attributes] } = exit
    else {
        bail!("wanted a hypercall exit, got {exit:x?}");
    };
    let asked = attributes & KVM_MAP_GPA_RANGE_ENCRYPTED != 0;
    ensure!((start, pages * PAGE, asked) == (gpa, len, private), "{exit:x?}");
    vm.convert(by, start, pages * PAGE, asked)?;
    let exit = vcpu.run()?;
    ensure!(exit == Exit::Done && vcpu.result(0) == 0, "{exit:x?}, result {}", vcpu.result(0));
    Ok(())
}
