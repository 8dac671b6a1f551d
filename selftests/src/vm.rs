// SPDX-License-Identifier: GPL-2.0
//! Virtual machines for tests: private and shared slots, conversions, vCPUs that never hang.
//!
//! Methods return errors that a test passes on; those named `raw_*` return the errno, for tests
//! that want a call to fail.

mod stats;
mod vcpu;

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_enc_region};
use kvm_bindings::{kvm_create_guest_memfd, kvm_memory_attributes, kvm_userspace_memory_region2};
use kvm_ioctls::{Kvm, VmFd};

use crate::PAGE;
use crate::guest;
use crate::skip::{missing_memfile, skip};
use crate::sys::{self, Errno, Mapping, SysResult};
use crate::uapi::*;

pub use stats::Stats;
pub use vcpu::{Exit, RunCounters, Stopper, Vcpu, sequence};

/// A type of VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmType {
    /// An ordinary VM: no private memory.
    Default,
    /// `KVM_X86_SW_PROTECTED_VM`: an access is private where the attribute is private.
    Protected,
}

/// Backings of private memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Private {
    Memfile,
    GuestMemfd,
}

/// The ioctl that converts memory between private and shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConvertBy {
    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    Attributes,
    /// `KVM_MEMORY_ENCRYPT_REG_REGION` and `UNREG_REGION`, as in v7.
    Region,
}

/// Both ioctls.
pub const CONVERT_BY: [ConvertBy; 2] = [ConvertBy::Attributes, ConvertBy::Region];

/// The slot that holds program, page tables and mailboxes.
pub const SYSTEM_SLOT: u32 = 0;

/// A memory slot and the memory that userspace sees at its addresses.
#[derive(Debug)]
pub struct Slot {
    pub id: u32,
    /// First guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    pub flags: u32,
    /// The shared side.
    pub view: Mapping,
}

/// A virtual machine whose guest runs [`guest`]'s program.
pub struct Vm {
    fd: VmFd,
    cpuid: CpuId,
    system: Arc<Mapping>,
    vm_type: VmType,
}

/// Open `/dev/kvm`.
pub fn open_kvm() -> Result<Kvm> {
    Kvm::new().or_else(|e| missing_memfile(&format!("/dev/kvm cannot be opened ({e})")))
}

/// The option of the kernel's configuration for VMs with private memory.
pub const PROTECTED_VM: &str = "CONFIG_KVM_SW_PROTECTED_VM";

/// Whether the kernel can make VMs of this type.
pub fn supports(kvm: &Kvm, vm_type: VmType) -> bool {
    let types = kvm.check_extension_raw(KVM_CAP_VM_TYPES.into());
    types & (1 << vm_type.number()) != 0 || vm_type == VmType::Default
}

impl VmType {
    pub fn number(self) -> u64 {
        match self {
            VmType::Default => KVM_X86_DEFAULT_VM,
            VmType::Protected => KVM_X86_SW_PROTECTED_VM,
        }
    }
}

impl Private {
    /// A file of `size` bytes that can back private memory of `vm`.
    pub fn create(self, vm: &Vm, size: u64) -> Result<OwnedFd> {
        match self {
            Private::Memfile => sys::memfile(size),
            Private::GuestMemfd => vm.guest_memfd(size),
        }
    }

    /// The slot flag that binds such a file.
    pub fn flag(self) -> u32 {
        match self {
            Private::Memfile => KVM_MEM_PRIVATE,
            Private::GuestMemfd => KVM_MEM_GUEST_MEMFD,
        }
    }
}

/// The request that describes a slot.
///
/// `private` is the backing of private accesses: the file, and the offset in bytes.
pub fn region(
    id: u32,
    gpa: u64,
    view: &Mapping,
    private: Option<(Private, BorrowedFd, u64)>,
) -> kvm_userspace_memory_region2 {
    let (flags, fd, offset) = match private {
        Some((kind, fd, offset)) => (kind.flag(), fd.as_raw_fd() as u32, offset),
        None => (0, 0, 0),
    };
    kvm_userspace_memory_region2 {
        slot: id,
        flags,
        guest_phys_addr: gpa,
        memory_size: view.len(),
        userspace_addr: view.addr(),
        guest_memfd_offset: offset,
        guest_memfd: fd,
        ..Default::default()
    }
}

impl Vm {
    /// A VM of the given type, with the system slot in place; SKIP if KVM has no such type.
    pub fn new(vm_type: VmType) -> Result<Vm> {
        let kvm = open_kvm()?;
        if !supports(&kvm, vm_type) {
            // A kernel that should have them and has not is no reason to skip.
            if sys::built_with(PROTECTED_VM).is_ok_and(|built| !built) {
                return skip(format!("the kernel is built without {PROTECTED_VM}"));
            }
            return missing_memfile(&format!("KVM has no {vm_type:?} VMs"));
        }
        let fd = kvm.create_vm_with_type(vm_type.number()).context("KVM_CREATE_VM")?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("supported CPUID")?;
        // Only Intel needs it, and only for real mode; elsewhere it does nothing.
        let _ = fd.set_tss_address(0xfffb_d000);
        let system = Mapping::anonymous(guest::SYSTEM_SIZE)?;
        guest::install(&system);
        let vm = Vm { fd, cpuid, system: Arc::new(system), vm_type };
        vm.raw_set_region(&region(SYSTEM_SLOT, 0, &vm.system, None)).context("system slot")?;
        Ok(vm)
    }

    /// A VM with private memory.
    pub fn protected() -> Result<Vm> {
        Vm::new(VmType::Protected)
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: The descriptor stays open as long as `self`.
        unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) }
    }

    pub fn vm_type(&self) -> VmType {
        self.vm_type
    }

    /// The memory of the system slot.
    pub fn system(&self) -> &Mapping {
        &self.system
    }

    /// Add a slot without private memory.
    pub fn add_shared(&self, id: u32, gpa: u64, view: Mapping) -> Result<Slot> {
        self.add(id, gpa, view, None)
    }

    /// Add a slot of `size` bytes: private memory from byte `offset` of `fd` on, anonymous memory
    /// as the shared side.
    pub fn add_private(
        &self,
        id: u32,
        gpa: u64,
        size: u64,
        kind: Private,
        fd: impl AsFd,
        offset: u64,
    ) -> Result<Slot> {
        self.add(id, gpa, small_pages(size)?, Some((kind, fd.as_fd(), offset)))
    }

    /// Add a slot with any backing.
    pub fn add(
        &self,
        id: u32,
        gpa: u64,
        view: Mapping,
        private: Option<(Private, BorrowedFd, u64)>,
    ) -> Result<Slot> {
        let region = region(id, gpa, &view, private);
        self.raw_set_region(&region).with_context(|| format!("add slot {id} at {gpa:#x}"))?;
        Ok(Slot { id, gpa, size: view.len(), flags: region.flags, view })
    }

    /// Delete a slot; returns the shared side.
    pub fn delete(&self, slot: Slot) -> Result<Mapping> {
        self.raw_delete(slot.id).with_context(|| format!("delete slot {}", slot.id))?;
        Ok(slot.view)
    }

    /// Delete the slot with this number.
    pub fn raw_delete(&self, id: u32) -> SysResult<()> {
        self.raw_set_region(&kvm_userspace_memory_region2 { slot: id, ..Default::default() })
    }

    /// `KVM_SET_USER_MEMORY_REGION2`.
    pub fn raw_set_region(&self, region: &kvm_userspace_memory_region2) -> SysResult<()> {
        let mut region = *region;
        // SAFETY: The structure is the one of this ioctl. The memory it names is a `Mapping`, whose
        // words may change at any time.
        unsafe { sys::ioctl_mut(self.fd(), KVM_SET_USER_MEMORY_REGION2(), &mut region) }.map(drop)
    }

    /// `KVM_SET_MEMORY_ATTRIBUTES`.
    pub fn raw_set_attributes(&self, gpa: u64, size: u64, attributes: u64) -> SysResult<()> {
        let mut arg = kvm_memory_attributes { address: gpa, size, attributes, flags: 0 };
        // SAFETY: The structure is the one of this ioctl.
        unsafe { sys::ioctl_mut(self.fd(), KVM_SET_MEMORY_ATTRIBUTES(), &mut arg) }.map(drop)
    }

    /// `KVM_MEMORY_ENCRYPT_REG_REGION` or, for shared, `UNREG_REGION`, with guest addresses.
    pub fn raw_region(&self, gpa: u64, size: u64, private: bool) -> SysResult<()> {
        let mut arg = kvm_enc_region { addr: gpa, size };
        let request = if private {
            KVM_MEMORY_ENCRYPT_REG_REGION()
        } else {
            KVM_MEMORY_ENCRYPT_UNREG_REGION()
        };
        // SAFETY: The structure is the one of these ioctls.
        unsafe { sys::ioctl_mut(self.fd(), request, &mut arg) }.map(drop)
    }

    /// Convert a range in one of the two ways.
    pub fn raw_convert(&self, by: ConvertBy, gpa: u64, size: u64, private: bool) -> SysResult<()> {
        match by {
            ConvertBy::Attributes if private => {
                self.raw_set_attributes(gpa, size, KVM_MEMORY_ATTRIBUTE_PRIVATE)
            }
            ConvertBy::Attributes => self.raw_set_attributes(gpa, size, 0),
            ConvertBy::Region => self.raw_region(gpa, size, private),
        }
    }

    /// Convert a range in one of the two ways.
    pub fn convert(&self, by: ConvertBy, gpa: u64, size: u64, private: bool) -> Result<()> {
        let to = if private { "private" } else { "shared" };
        self.raw_convert(by, gpa, size, private)
            .with_context(|| format!("make [{gpa:#x}, +{size:#x}) {to} by {by:?}"))
    }

    /// The ioctls that this kernel has; that of v7 comes with memfile.
    pub fn conversions(&self) -> &'static [ConvertBy] {
        // A page without a slot is shared already.
        match self.raw_region(guest::ADDRESS_SPACE - PAGE, PAGE, false) {
            Ok(()) => &CONVERT_BY,
            Err(_) => &CONVERT_BY[..1],
        }
    }

    /// Make a range private.
    pub fn set_private(&self, gpa: u64, size: u64) -> Result<()> {
        self.convert(ConvertBy::Attributes, gpa, size, true)
    }

    /// Make a range shared.
    pub fn set_shared(&self, gpa: u64, size: u64) -> Result<()> {
        self.convert(ConvertBy::Attributes, gpa, size, false)
    }

    /// A guest_memfd of this VM; SKIP if KVM has none.
    pub fn guest_memfd(&self, size: u64) -> Result<OwnedFd> {
        if self.fd.check_extension_raw(KVM_CAP_GUEST_MEMFD.into()) <= 0 {
            return skip("KVM has no guest_memfd for this VM type");
        }
        self.raw_guest_memfd(size, 0).context("KVM_CREATE_GUEST_MEMFD")
    }

    /// `KVM_CREATE_GUEST_MEMFD`.
    pub fn raw_guest_memfd(&self, size: u64, flags: u64) -> SysResult<OwnedFd> {
        let arg = kvm_create_guest_memfd { size, flags, ..Default::default() };
        let fd = self.fd.create_guest_memfd(arg).map_err(|e| Errno(e.errno()))?;
        // SAFETY: A new descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    /// `KVM_CHECK_EXTENSION` on the VM.
    pub fn check_extension(&self, capability: u32) -> i32 {
        self.fd.check_extension_raw(capability.into())
    }

    /// `KVM_ENABLE_CAP` with one argument.
    pub fn raw_enable_cap(&self, capability: u32, argument: u64) -> SysResult<()> {
        self.raw_enable_cap_full(capability, 0, [argument, 0, 0, 0])
    }

    /// `KVM_ENABLE_CAP` with flags and all arguments.
    pub fn raw_enable_cap_full(
        &self,
        capability: u32,
        flags: u32,
        args: [u64; 4],
    ) -> SysResult<()> {
        let cap = kvm_enable_cap { cap: capability, flags, args, ..Default::default() };
        self.fd.enable_cap(&cap).map_err(|e| Errno(e.errno()))
    }

    /// Let `KVM_HC_MAP_GPA_RANGE` exit to userspace.
    pub fn exit_on_map_gpa(&self) -> Result<()> {
        self.raw_enable_cap(KVM_CAP_EXIT_HYPERCALL, 1 << KVM_HC_MAP_GPA_RANGE)
            .context("KVM_CAP_EXIT_HYPERCALL")
    }

    /// `KVM_MEMFILE_POPULATE` once; the range becomes the part that is left.
    pub fn raw_populate_once(&self, range: &mut kvm_memfile_populate) -> SysResult<()> {
        // SAFETY: The structure is the one of this ioctl, which only reads the memory it names.
        unsafe { sys::ioctl_mut(self.fd(), KVM_MEMFILE_POPULATE(), range) }.map(drop)
    }

    /// `KVM_MEMFILE_POPULATE` until all is done or it fails: the errno, and the bytes left.
    pub fn raw_populate(&self, gpa: u64, size: u64, source: u64) -> (SysResult<()>, u64) {
        let mut range = kvm_memfile_populate { gpa, size, source, ..Default::default() };
        loop {
            match self.raw_populate_once(&mut range) {
                Ok(()) if range.size == 0 => return (Ok(()), 0),
                Ok(()) | Err(Errno::EINTR) => {}
                Err(errno) => return (Err(errno), range.size),
            }
        }
    }

    /// The VM's statistics.
    pub fn stats(&self) -> Result<Stats> {
        Stats::open(self.fd())
    }
}

/// Anonymous memory without huge pages, so that figures count single pages.
pub fn small_pages(len: u64) -> Result<Mapping> {
    without_huge_pages(Mapping::anonymous(len)?)
}

/// The same, at an address aligned to `align` bytes.
pub fn small_pages_aligned(len: u64, align: u64) -> Result<Mapping> {
    without_huge_pages(Mapping::anonymous_aligned(len, align)?)
}

fn without_huge_pages(view: Mapping) -> Result<Mapping> {
    match view.madvise(0, view.len(), libc::MADV_NOHUGEPAGE) {
        // EINVAL: the kernel has no huge pages anyway.
        Ok(()) | Err(Errno::EINVAL) => Ok(view),
        Err(errno) => Err(errno).context("MADV_NOHUGEPAGE"),
    }
}
