// SPDX-License-Identifier: GPL-2.0
//! The operations of scripts.
//!
//! Numbers of files, VMs and so on are taken modulo how many there are, and positions are pages of
//! a file or of its place in a VM: nearly every operation means something, whatever its numbers.

use serde::{Deserialize, Serialize};

/// How many of each there can be at a time.
pub const FILES: usize = 4;
pub const VMS: usize = 2;
pub const VCPUS: usize = 2;
pub const SLOTS: usize = 6;
pub const CONSUMERS: usize = 3;
/// Threads of a script.
pub const THREADS: usize = 3;
/// The largest file, in pages.
pub const PAGES: u64 = 2048;

/// A range of pages. The length is at least 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Range {
    pub at: u16,
    pub pages: u16,
}

/// One operation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Op {
    /// `memfd_create(2)` with these flags, and a size.
    File { file: u8, flags: u32, pages: u16 },
    /// The same with pages of 2 MiB from the pool.
    HugeFile { file: u8, flags: u32, pages: u16 },
    /// A file of the second store.
    StoreFile { file: u8, pages: u16 },
    /// `KVM_CREATE_GUEST_MEMFD`.
    GuestMemfd { file: u8, vm: u8, pages: u16, flags: u8 },
    /// Close the descriptor.
    Close { file: u8 },
    /// `ftruncate(2)`; `bytes` more than whole pages.
    Truncate { file: u8, pages: u16, bytes: u16 },
    /// `fallocate(2)`; `bytes` are added to the offset.
    Fallocate { file: u8, mode: u8, range: Range, bytes: u16 },
    /// `F_ADD_SEALS`.
    Seal { file: u8, seals: u8 },
    /// A way to the content that does not lead through a guest.
    Reach { file: u8, way: Way, range: Range },

    /// `KVM_CREATE_VM`.
    Vm { vm: u8, protected: bool },
    /// Close it, its slots and its vCPUs.
    CloseVm { vm: u8 },
    /// `KVM_ENABLE_CAP` of one of memfile's.
    Cap { vm: u8, cap: u8, argument: u8 },
    /// `KVM_SET_USER_MEMORY_REGION2`: the file from a page on, at its place in the VM, or `shift`
    /// pages from there.
    Slot { vm: u8, slot: u8, file: u8, range: Range, shift: i16, flags: u8 },
    /// Delete a slot.
    Delete { vm: u8, slot: u8 },
    /// Convert, by one of the two ioctls.
    Convert { vm: u8, file: u8, range: Range, private: bool, region: bool },
    /// `KVM_MEMFILE_POPULATE`.
    Populate { vm: u8, file: u8, range: Range },
    /// `KVM_PRE_FAULT_MEMORY`.
    PreFault { vm: u8, vcpu: u8, file: u8, range: Range },
    /// A vCPU does something to the first words of pages. Faults are answered as a VMM does, if
    /// `answer`.
    Guest { vm: u8, vcpu: u8, file: u8, act: Act, range: Range, answer: bool },
    /// `madvise(2)` of the shared side of a slot.
    Advise { vm: u8, slot: u8, range: Range, advice: Advice },

    /// A second consumer binds a file.
    Bind { consumer: u8, file: u8, range: Range, mode: u8, flags: u8 },
    /// It unbinds.
    Unbind { consumer: u8 },
    /// It accesses a page.
    Get { consumer: u8, at: u16, how: How },

    /// The second store: an event of a page.
    Store { file: u8, at: u16, what: StoreWhat },

    /// The memory management of the machine.
    Machine(Machine),
    /// A memory error, or a page that is to leave its frame, in a page that a consumer gets.
    Lose { consumer: u8, at: u16, soft: bool },
    /// All threads wait for each other.
    Meet,
}

/// Ways to content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Way {
    Read,
    Write,
    Map,
    Send,
    Copy,
    Seek,
    Reopen,
    Forget,
    CacheStat,
    FdInfo,
}

/// The work of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Act {
    Fill,
    Check,
    Execute,
    /// It asks the host for a conversion to private or to shared memory.
    Privatise,
    Share,
}

/// Advice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Advice {
    Discard,
    Huge,
    Small,
    Mergeable,
    PageOut,
    Collapse,
}

/// How a consumer gets a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum How {
    Get,
    Hold,
    Fault,
}

/// An event that the second store receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum StoreWhat {
    Migrate,
    Referenced,
    WriteOut { refused: bool },
    Break,
    Fail { errno: u8 },
}

/// A request to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Machine {
    Compact,
    DropCaches,
    /// `memory.reclaim` of the cgroup of the script.
    Reclaim {
        pages: u16,
    },
    /// `memory.max`, in units of 4 MiB above 16 MiB; 0 takes it away.
    Limit {
        units: u8,
    },
    /// Swap on or off.
    Swap {
        on: bool,
    },
    /// Policy of huge pages for memfiles.
    ShmemHuge {
        policy: u8,
    },
    /// Policy of huge pages for anonymous memory.
    AnonymousHuge {
        policy: u8,
    },
    /// khugepaged looks at more pages, or at fewer.
    Khugepaged {
        eager: bool,
    },
    /// KSM runs or not.
    Ksm {
        on: bool,
    },
    /// KVM splits what a guest executes.
    NxHugePages {
        on: bool,
    },
    /// The multi-generational LRU decides.
    Generations {
        on: bool,
    },
    /// Fewer or more pages in the pool of huge pages.
    Pool {
        pages: u8,
    },
    /// Allocations of the calling thread fail at random.
    Fail {
        on: bool,
    },
    /// Look at all counters of memfile.
    ReadCounters,
}
