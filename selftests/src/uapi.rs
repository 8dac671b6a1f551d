// SPDX-License-Identifier: GPL-2.0
//! The memfile user interface, and the parts of KVM's that the `kvm-*` crates do not have yet.

use std::mem::{offset_of, size_of};

use kvm_bindings::{kvm_enc_region, kvm_memory_attributes, kvm_pre_fault_memory, kvm_stats_header};
use kvm_bindings::{kvm_stats_desc, kvm_userspace_memory_region2};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

// memfd_create(2) and fcntl(2).
pub const MFD_CLOEXEC: u32 = 0x0001;
pub const MFD_ALLOW_SEALING: u32 = 0x0002;
pub const MFD_HUGETLB: u32 = 0x0004;
pub const MFD_HUGE_SHIFT: u32 = 26;
pub const MFD_NOEXEC_SEAL: u32 = 0x0008;
pub const MFD_EXEC: u32 = 0x0010;
/// memfile: no one can read, write or map the file.
pub const MFD_INACCESSIBLE: u32 = 0x0020;
/// memfile: the first VM that binds the file is the only one that can.
pub const MFD_ONE_VM: u32 = 0x0040;

pub const F_SEAL_SEAL: u32 = 0x0001;
pub const F_SEAL_SHRINK: u32 = 0x0002;
pub const F_SEAL_GROW: u32 = 0x0004;
pub const F_SEAL_WRITE: u32 = 0x0008;
pub const F_SEAL_FUTURE_WRITE: u32 = 0x0010;
pub const F_SEAL_EXEC: u32 = 0x0020;
/// memfile: only `fallocate` allocates.
pub const F_SEAL_AUTO_ALLOCATE: u32 = 0x0040;

// Flags of a binding.
pub const MEMFILE_F_USER_INACCESSIBLE: u64 = 1 << 0;
pub const MEMFILE_F_UNMOVABLE: u64 = 1 << 1;
pub const MEMFILE_F_UNRECLAIMABLE: u64 = 1 << 2;
pub const MEMFILE_F_KERNEL_INACCESSIBLE: u64 = 1 << 3;
/// v7's pinned behaviour, and the default.
pub const MEMFILE_F_ALL: u64 =
    MEMFILE_F_USER_INACCESSIBLE | MEMFILE_F_UNMOVABLE | MEMFILE_F_UNRECLAIMABLE;

// KVM: memory slots.
pub const KVM_MEM_LOG_DIRTY_PAGES: u32 = 1 << 0;
pub const KVM_MEM_READONLY: u32 = 1 << 1;
pub const KVM_MEM_GUEST_MEMFD: u32 = 1 << 2;
/// memfile: `guest_memfd` and `guest_memfd_offset` carry the private fd and offset.
pub const KVM_MEM_PRIVATE: u32 = 1 << 3;

// KVM: capabilities, VM types, attributes, exits.
pub const KVM_CAP_MEMFILE: u32 = 0x6d66;
/// memfile: KVM itself uses private memory.
pub const KVM_CAP_MEMFILE_ACCESS: u32 = 0x6d67;
/// memfile: there is [`KVM_MEMFILE_POPULATE`].
pub const KVM_CAP_MEMFILE_POPULATE: u32 = 0x6d68;
pub const KVM_CAP_EXIT_HYPERCALL: u32 = 201;
pub const KVM_CAP_GUEST_MEMFD: u32 = 234;
pub const KVM_CAP_VM_TYPES: u32 = 235;
pub const KVM_CAP_PRE_FAULT_MEMORY: u32 = 236;
/// The mask of flags that `KVM_CREATE_GUEST_MEMFD` knows for this VM.
pub const KVM_CAP_GUEST_MEMFD_FLAGS: u32 = 244;
/// The host can map the guest_memfd ...
pub const GUEST_MEMFD_FLAG_MMAP: u64 = 1 << 0;
/// ... and use the mapping from the beginning.
pub const GUEST_MEMFD_FLAG_INIT_SHARED: u64 = 1 << 1;
pub const KVM_X86_DEFAULT_VM: u64 = 0;
pub const KVM_X86_SW_PROTECTED_VM: u64 = 1;
pub const KVM_MEMORY_ATTRIBUTE_PRIVATE: u64 = 1 << 3;
pub const KVM_MEMORY_EXIT_FLAG_PRIVATE: u64 = 1 << 3;
pub const KVM_HC_MAP_GPA_RANGE: u64 = 12;
/// In the attributes of `KVM_HC_MAP_GPA_RANGE`: make the range private.
pub const KVM_MAP_GPA_RANGE_ENCRYPTED: u64 = 1 << 4;

const KVMIO: u32 = 0xae;

ioctl_io_nr!(KVM_RUN, KVMIO, 0x80);
ioctl_iow_nr!(KVM_SET_USER_MEMORY_REGION2, KVMIO, 0x49, kvm_userspace_memory_region2);
ioctl_ior_nr!(KVM_MEMORY_ENCRYPT_REG_REGION, KVMIO, 0xbb, kvm_enc_region);
ioctl_ior_nr!(KVM_MEMORY_ENCRYPT_UNREG_REGION, KVMIO, 0xbc, kvm_enc_region);
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);
ioctl_iow_nr!(KVM_SET_MEMORY_ATTRIBUTES, KVMIO, 0xd2, kvm_memory_attributes);
ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);
ioctl_iowr_nr!(KVM_MEMFILE_POPULATE, KVMIO, 0xdf, kvm_memfile_populate);

/// The argument of [`KVM_MEMFILE_POPULATE`]; addresses and sizes in bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct kvm_memfile_populate {
    pub gpa: u64,
    pub size: u64,
    /// The address of the content in the caller's memory.
    pub source: u64,
    pub flags: u64,
    pub padding: [u64; 4],
}

// The layouts that the numbers above depend on.
const _: () = {
    assert!(size_of::<kvm_userspace_memory_region2>() == 160);
    assert!(offset_of!(kvm_userspace_memory_region2, slot) == 0);
    assert!(offset_of!(kvm_userspace_memory_region2, flags) == 4);
    assert!(offset_of!(kvm_userspace_memory_region2, guest_phys_addr) == 8);
    assert!(offset_of!(kvm_userspace_memory_region2, memory_size) == 16);
    assert!(offset_of!(kvm_userspace_memory_region2, userspace_addr) == 24);
    // v7's private_offset and private_fd.
    assert!(offset_of!(kvm_userspace_memory_region2, guest_memfd_offset) == 32);
    assert!(offset_of!(kvm_userspace_memory_region2, guest_memfd) == 40);
    assert!(size_of::<kvm_memory_attributes>() == 32);
    assert!(size_of::<kvm_enc_region>() == 16);
    assert!(size_of::<kvm_pre_fault_memory>() == 64);
    assert!(size_of::<kvm_memfile_populate>() == 64);
    assert!(size_of::<kvm_stats_header>() == 24);
    assert!(offset_of!(kvm_stats_desc, name) == 16);
};

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers as `include/uapi/linux/kvm.h` expands them.
    #[test]
    fn ioctl_numbers() {
        assert_eq!(KVM_RUN(), 0xae80);
        assert_eq!(KVM_SET_USER_MEMORY_REGION2(), 0x40a0_ae49);
        assert_eq!(KVM_MEMORY_ENCRYPT_REG_REGION(), 0x8010_aebb);
        assert_eq!(KVM_MEMORY_ENCRYPT_UNREG_REGION(), 0x8010_aebc);
        assert_eq!(KVM_GET_STATS_FD(), 0xaece);
        assert_eq!(KVM_SET_MEMORY_ATTRIBUTES(), 0x4020_aed2);
        assert_eq!(KVM_PRE_FAULT_MEMORY(), 0xc040_aed5);
        assert_eq!(KVM_MEMFILE_POPULATE(), 0xc040_aedf);
    }
}
