// SPDX-License-Identifier: GPL-2.0
//! Kinds of memory that QEMU can give a guest, and QEMU's arguments for them.

use crate::MIB;

/// Backings of a guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Anonymous,
    SharedMemfd,
    /// A memfile beside a shared memfd, with the VM's flags.
    Private {
        movable: bool,
        reclaimable: bool,
    },
    /// The same, pinned, of huge pages of 2 MiB from their pool.
    Huge,
    GuestMemfd,
}

impl Kind {
    pub const PINNED: Kind = Kind::Private { movable: false, reclaimable: false };
    pub const MOVABLE: Kind = Kind::Private { movable: true, reclaimable: false };
    pub const RECLAIMABLE: Kind = Kind::Private { movable: false, reclaimable: true };
    pub const BOTH: Kind = Kind::Private { movable: true, reclaimable: true };

    /// Every kind, by the name that a user gives.
    pub const NAMES: [(&str, Kind); 8] = [
        ("anonymous", Kind::Anonymous),
        ("shared", Kind::SharedMemfd),
        ("pinned", Kind::PINNED),
        ("movable", Kind::MOVABLE),
        ("reclaimable", Kind::RECLAIMABLE),
        ("both", Kind::BOTH),
        ("huge", Kind::Huge),
        ("guest_memfd", Kind::GuestMemfd),
    ];

    pub fn name(self) -> &'static str {
        Kind::NAMES.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }

    /// In words.
    pub fn what(self) -> &'static str {
        match self {
            Kind::Anonymous => "anonymous memory",
            Kind::SharedMemfd => "shared memfd",
            Kind::PINNED => "private, pinned",
            Kind::MOVABLE => "private, movable",
            Kind::RECLAIMABLE => "private, reclaimable",
            Kind::Private { .. } => "private, movable + reclaimable",
            Kind::Huge => "private, huge pages",
            Kind::GuestMemfd => "guest_memfd",
        }
    }

    /// Does the VM have private memory?
    pub fn is_private(self) -> bool {
        self.is_memfile() || self == Kind::GuestMemfd
    }

    /// Is its private side a memfile?
    pub fn is_memfile(self) -> bool {
        matches!(self, Kind::Private { .. } | Kind::Huge)
    }

    /// The choice of the VM for its pages: movable, reclaimable.
    fn choice(self) -> (bool, bool) {
        match self {
            Kind::Private { movable, reclaimable } => (movable, reclaimable),
            _ => (false, false),
        }
    }
}

/// The part of the guest's memory that is of the kind under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// All, firmware and page tables included: KVM's own accesses have to reach it.
    All,
    /// A DIMM beside that many bytes of ordinary memory, which has the guest's kernel.
    Dimm { low: u64 },
    /// The same with virtio-mem, and that many bytes at first.
    Device { low: u64, requested: u64 },
    /// A NUMA node that follows one of that many bytes of ordinary memory.
    Node { low: u64 },
}

impl Layout {
    /// In words.
    pub fn what(self) -> &'static str {
        match self {
            Layout::All => "all memory",
            Layout::Dimm { .. } => "a DIMM",
            Layout::Device { .. } => "virtio-mem",
            Layout::Node { .. } => "a NUMA node",
        }
    }
}

/// A guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    pub kind: Kind,
    pub layout: Layout,
    /// Bytes of this kind.
    pub size: u64,
    /// All of it is allocated before the guest runs.
    pub prealloc: bool,
}

impl Memory {
    /// A DIMM, on demand.
    pub fn dimm(kind: Kind, size: u64) -> Memory {
        Memory { kind, layout: Layout::Dimm { low: 256 * MIB }, size, prealloc: false }
    }

    /// The options for `-machine`.
    pub(super) fn machine(&self) -> String {
        let mut properties = String::new();
        if self.kind.is_private() {
            properties += ",confidential-guest-support=vm";
        }
        if self.layout == Layout::All {
            properties += ",memory-backend=ram";
        }
        properties
    }

    /// The arguments for it.
    pub(super) fn arguments(&self) -> Vec<String> {
        let mut line = Vec::new();
        let mut add = |option: &str, value: String| line.extend([option.to_owned(), value]);
        let on = |yes| if yes { "on" } else { "off" };
        if self.kind.is_memfile() {
            let (movable, reclaimable) = self.kind.choice();
            let (movable, reclaimable) = (on(movable), on(reclaimable));
            let object = "sw-protected-vm,id=vm";
            add("-object", format!("{object},movable={movable},reclaimable={reclaimable}"));
        } else if self.kind == Kind::GuestMemfd {
            add("-object", "sw-protected-vm,id=vm,guest-memfd=on".into());
        }
        let backend = match self.kind {
            Kind::Anonymous => "memory-backend-ram",
            Kind::SharedMemfd => "memory-backend-memfd",
            Kind::Private { .. } | Kind::Huge | Kind::GuestMemfd => "memory-backend-memfd-private",
        };
        let mut object = format!("{backend},id=ram,size={}", self.size);
        if self.kind == Kind::Huge {
            object += &format!(",hugetlb=on,hugetlbsize={}", crate::HUGE);
        }
        if self.prealloc {
            object += ",prealloc=on";
        }
        add("-object", object);
        match self.layout {
            Layout::All => add("-m", format!("{}M", self.size / MIB)),
            Layout::Dimm { low } | Layout::Device { low, .. } => {
                let most = (low + self.size).next_multiple_of(crate::GIB) / MIB + 1024;
                add("-m", format!("{}M,slots=2,maxmem={most}M", low / MIB));
            }
            Layout::Node { low } => add("-m", format!("{}M", (low + self.size) / MIB)),
        }
        match self.layout {
            Layout::All => {}
            Layout::Dimm { .. } => add("-device", "pc-dimm,id=dimm,memdev=ram".into()),
            Layout::Device { requested, .. } => {
                let device =
                    format!("virtio-mem-pci,id=memory,memdev=ram,requested-size={requested}");
                add("-device", device);
            }
            Layout::Node { low } => {
                add("-object", format!("memory-backend-ram,id=low,size={low}"));
                add("-numa", "node,memdev=low".into());
                add("-numa", "node,memdev=ram".into());
            }
        }
        line
    }

    /// Arguments of the guest's kernel.
    pub(super) fn kernel_arguments(&self) -> &'static str {
        match (self.layout, self.kind.is_private()) {
            (Layout::All | Layout::Node { .. }, _) => "",
            // Devices can access ordinary memory only.
            (_, true) => " memhp_default_state=online_movable swiotlb=2048,force",
            (_, false) => " memhp_default_state=online_movable",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_say_what_the_memory_is() {
        let line = |memory: Memory| memory.machine() + " " + &memory.arguments().join(" ");
        assert_eq!(
            line(Memory::dimm(Kind::MOVABLE, 1024 * MIB)),
            ",confidential-guest-support=vm -object sw-protected-vm,id=vm,movable=on,\
             reclaimable=off -object memory-backend-memfd-private,id=ram,size=1073741824 \
             -m 256M,slots=2,maxmem=3072M -device pc-dimm,id=dimm,memdev=ram"
        );
        let all =
            Memory { layout: Layout::All, prealloc: true, ..Memory::dimm(Kind::Anonymous, MIB) };
        assert_eq!(
            line(all),
            ",memory-backend=ram -object memory-backend-ram,id=ram,size=1048576,prealloc=on -m 1M"
        );
        assert_eq!(Kind::NAMES.map(|(name, kind)| kind.name() == name), [true; 8]);
        let huge = line(Memory::dimm(Kind::Huge, 1024 * MIB));
        assert!(huge.contains(",hugetlb=on,hugetlbsize=2097152 "), "{huge}");
    }
}
