// SPDX-License-Identifier: GPL-2.0
//! The kinds of guest memory that the demo compares.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};

use crate::mem;
use crate::pressure::{Pool, Setting};
use crate::skip::{missing_memfile, skip};
use crate::sys::{self, Mapping};
use crate::uapi::{KVM_CAP_MEMFILE, MEMFILE_F_ALL, MEMFILE_F_KERNEL_INACCESSIBLE};
use crate::vm::{Private, Slot, Vm, VmType, small_pages, small_pages_aligned};
use crate::{GIB, HUGE};

/// Guest physical address of the memory under test.
pub const GPA: u64 = 4 * GIB;

/// Kinds of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    Anonymous,
    SharedMemfd,
    /// Everything allocated at creation, as the QEMU branch of 2022 did.
    MemfileFallocate,
    MemfileOnDemand,
    /// Out of the kernel's direct map.
    MemfileHidden,
    /// On hugetlbfs, from a pool of pages of 2 MiB that is as large as the slot.
    MemfileHuge,
    /// On hugetlbfs, from the pages of 1 GiB that the machine has.
    MemfileGigantic,
    GuestMemfd,
    /// Out of the kernel's direct map, but a process has it mapped. KVM refuses to give it to guests.
    Secret,
}

/// The rows, in their order.
pub const KINDS: [(&str, Backing); 9] = [
    ("anonymous memory", Backing::Anonymous),
    ("shared memfd", Backing::SharedMemfd),
    ("memfile, fallocate first", Backing::MemfileFallocate),
    ("memfile, on demand", Backing::MemfileOnDemand),
    ("memfile, kernel inaccessible", Backing::MemfileHidden),
    ("memfile on hugetlbfs, 2M", Backing::MemfileHuge),
    ("memfile on hugetlbfs, 1G", Backing::MemfileGigantic),
    ("guest_memfd", Backing::GuestMemfd),
    ("memfd_secret", Backing::Secret),
];

/// Is the memory of the row of this name out of the kernel's direct map?
pub fn is_out(row: &str) -> bool {
    KINDS.iter().any(|(name, backing)| {
        *name == row && matches!(backing, Backing::MemfileHidden | Backing::Secret)
    })
}

impl Backing {
    fn private(self) -> Option<Private> {
        match self {
            Backing::Anonymous | Backing::SharedMemfd | Backing::Secret => None,
            Backing::MemfileFallocate
            | Backing::MemfileOnDemand
            | Backing::MemfileHidden
            | Backing::MemfileHuge
            | Backing::MemfileGigantic => Some(Private::Memfile),
            Backing::GuestMemfd => Some(Private::GuestMemfd),
        }
    }

    /// A VM that can use it.
    pub fn vm(self) -> Result<Vm> {
        let vm = Vm::new(match self.private() {
            Some(_) => VmType::Protected,
            None => VmType::Default,
        })?;
        if self == Backing::MemfileHidden {
            let flags = MEMFILE_F_ALL | MEMFILE_F_KERNEL_INACCESSIBLE;
            if vm.raw_enable_cap(KVM_CAP_MEMFILE, flags).is_err() {
                return missing_memfile("KVM cannot keep memory out of the direct map");
            }
        }
        Ok(vm)
    }
}

/// Guest memory of some kind, in its slot.
pub struct Memory {
    backing: Backing,
    fd: Option<OwnedFd>,
    slot: Slot,
    /// Dropped last: its pages are free by then.
    _pool: Option<Setting>,
}

impl Memory {
    /// `size` bytes in slot 1 at `gpa`; the `pieces` (offset, length) are private if the kind has
    /// private memory, and all of a page of 1 GiB.
    ///
    /// Only these, because KVM keeps an attribute per page, which for 32 GiB would be the largest
    /// item.
    pub fn create(
        backing: Backing,
        vm: &Vm,
        gpa: u64,
        size: u64,
        pieces: &[(u64, u64)],
    ) -> Result<Memory> {
        let Some(kind) = backing.private() else {
            let fd = match backing {
                Backing::SharedMemfd => Some(sys::memfd(size)?),
                _ => None,
            };
            let view = match &fd {
                Some(fd) => Mapping::shared(fd, 0, size)?,
                None => small_pages(size)?,
            };
            return Ok(Memory { backing, fd, slot: vm.add_shared(1, gpa, view)?, _pool: None });
        };
        let (fd, pool) = match backing {
            Backing::MemfileHuge => {
                (sys::memfile_huge(HUGE, size)?, Some(Pool::of(HUGE)?.fill(size / HUGE)?))
            }
            Backing::MemfileGigantic => {
                let free = Pool::of(GIB)?.usage()?.free;
                if free < size / GIB {
                    return skip(format!("{free} pages of 1 GiB are free"));
                }
                (sys::memfile_huge(GIB, size)?, None)
            }
            _ => (kind.create(vm, size)?, None),
        };
        if backing == Backing::MemfileFallocate {
            sys::allocate(&fd, 0, size).context("fallocate")?;
        }
        // KVM maps a huge page as one only if the shared side lies in its own pages as well.
        let view = small_pages_aligned(size, if size % GIB == 0 { GIB } else { HUGE })?;
        let slot = vm.add(1, gpa, view, Some((kind, fd.as_fd(), 0)))?;
        // KVM maps a huge page as one if all of it is private.
        let all = [(0, size)];
        for &(offset, len) in if backing == Backing::MemfileGigantic { &all } else { pieces } {
            vm.set_private(gpa + offset, len)?;
        }
        Ok(Memory { backing, fd: Some(fd), slot, _pool: pool })
    }

    /// Give a range back to the host.
    pub fn punch(&self, offset: u64, len: u64) -> Result<()> {
        match &self.fd {
            Some(fd) => sys::punch(fd, offset, len).context("fallocate(PUNCH_HOLE)"),
            None => {
                let view = &self.slot.view;
                view.madvise(offset, len, libc::MADV_DONTNEED).context("MADV_DONTNEED")
            }
        }
    }

    /// Bytes of host memory it holds, by its own counter; a guest_memfd has none.
    pub fn held(&self) -> Result<Option<u64>> {
        match (&self.fd, self.backing) {
            (_, Backing::GuestMemfd) => Ok(None),
            (Some(fd), _) => sys::allocated(fd).map(Some),
            (None, _) => mem::resident(&self.slot.view).map(Some),
        }
    }

    /// Bytes it holds in memory and in swap, by its own counters; a guest_memfd has none.
    pub fn allocated(&self) -> Result<Option<u64>> {
        let held = self.held()?;
        let Some(held) = held.filter(|_| self.fd.is_none()) else { return Ok(held) };
        Ok(Some(held + mem::smaps(&self.slot.view, "Swap")?))
    }

    /// The counter that [`Memory::held`] reads.
    pub fn source(&self) -> &'static str {
        match (&self.fd, self.backing) {
            (_, Backing::GuestMemfd) => "meminfo",
            (Some(_), _) => "st_blocks",
            (None, _) => "smaps",
        }
    }
}
