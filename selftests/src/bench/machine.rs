// SPDX-License-Identifier: GPL-2.0
//! A VM whose memory is measured.

use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, ensure};

use super::measure::{Cost, count_with};
use crate::guest::Command;
use crate::pattern::Pattern;
use crate::sys::{self, Mapping};
use crate::vm::{Private, Stats, Vcpu, Vm, VmType, region, sequence, small_pages};
use crate::{GIB, HUGE, PAGE};

/// Guest physical address of the memory under test.
pub const GPA: u64 = 4 * GIB;
/// First slot under test.
const SLOT: u32 = 1;

/// A VM, a file, and one or more slots that bind parts of it, as far as possible of equal size.
pub struct Bench {
    pub vm: Vm,
    vcpu: Vcpu,
    pub fd: OwnedFd,
    stats: Stats,
    /// None if the memory is ordinary: the file is then what `view` maps.
    kind: Option<Private>,
    /// The shared side of all slots, and its first address in use.
    view: Mapping,
    address: u64,
    size: u64,
    bindings: u64,
}

impl Bench {
    pub fn new(kind: Private, size: u64, bindings: u64) -> Result<Bench> {
        Bench::partly_bound(kind, size, bindings, bindings)
    }

    /// With this file, whose pages have `page` bytes.
    pub fn on(
        vm: Vm,
        kind: Private,
        fd: OwnedFd,
        page: u64,
        size: u64,
        bindings: u64,
    ) -> Result<Bench> {
        Bench::unbound(vm, kind, fd, page, size, bindings)?.bound(bindings, size)
    }

    /// Only the first `bound` parts of `parts` have a slot.
    pub fn partly_bound(kind: Private, size: u64, parts: u64, bound: u64) -> Result<Bench> {
        let vm = Vm::protected()?;
        let fd = kind.create(&vm, size)?;
        Bench::unbound(vm, kind, fd, PAGE, size, parts)?.bound(bound, size)
    }

    /// The same with a VM and its memfile.
    pub fn partly_on(vm: Vm, fd: OwnedFd, size: u64, parts: u64, bound: u64) -> Result<Bench> {
        Bench::unbound(vm, Private::Memfile, fd, PAGE, size, parts)?.bound(bound, size)
    }

    /// An ordinary VM with one slot of an ordinary file, whose pages have `page` bytes.
    pub fn ordinary(fd: OwnedFd, page: u64, size: u64) -> Result<Bench> {
        // The kernel aligns what is larger than a huge page.
        let view = match page {
            0..=HUGE => Mapping::shared(&fd, 0, size)?,
            _ => Mapping::anywhere(&fd, 0, size).context("map a file")?,
        };
        let vm = Vm::new(VmType::Default)?;
        ensure!(view.addr() % page == 0, "KVM cannot map huge pages at {:#x}", view.addr());
        let (vcpu, stats, address) = (vm.vcpu(0)?, vm.stats()?, view.addr());
        let b = Bench { vm, vcpu, fd, stats, kind: None, view, address, size, bindings: 1 };
        b.bind(1)?;
        Ok(b)
    }

    /// One slot of the first `size` bytes of a file of `file` bytes, the first `private` of them
    /// private.
    pub fn sparse(kind: Private, file: u64, size: u64, private: u64) -> Result<Bench> {
        let vm = Vm::protected()?;
        let fd = kind.create(&vm, file)?;
        Bench::unbound(vm, kind, fd, PAGE, size, 1)?.bound(1, private)
    }

    /// With slots for the first `parts`, and so many private bytes.
    fn bound(self, parts: u64, private: u64) -> Result<Bench> {
        self.bind(parts)?;
        self.vm.set_private(GPA, private)?;
        Ok(self)
    }

    fn unbound(
        vm: Vm,
        kind: Private,
        fd: OwnedFd,
        page: u64,
        size: u64,
        bindings: u64,
    ) -> Result<Bench> {
        let vcpu = vm.vcpu(0)?;
        let stats = vm.stats()?;
        // KVM maps huge pages only where this address is aligned as well.
        let view = small_pages(size + page)?;
        let address = view.addr().next_multiple_of(page);
        let kind = Some(kind);
        Ok(Bench { vm, vcpu, fd, stats, kind, view, address, size, bindings })
    }

    /// The cost of `work`.
    pub fn count(&mut self, work: impl FnOnce(&mut Use) -> Result<()>) -> Result<Cost> {
        let Bench { vm, vcpu, fd, stats, view, address, size, .. } = self;
        let offset = *address - view.addr();
        let mut parts = Use { vm, vcpu, fd, view, offset, size: *size };
        count_with(stats, || work(&mut parts))
    }

    /// Do something that is not measured.
    pub fn prepare(&mut self, work: impl FnOnce(&mut Use) -> Result<()>) -> Result<()> {
        self.count(work).map(drop)
    }

    /// Offset and length of each slot.
    fn parts(&self) -> impl Iterator<Item = (u32, u64, u64)> + use<> {
        let (size, bindings) = (self.size, self.bindings);
        let step = size / bindings / PAGE * PAGE;
        (0..bindings).map(move |n| {
            let len = if n + 1 == bindings { size - n * step } else { step };
            (SLOT + n as u32, n * step, len)
        })
    }

    fn bind_part(&self, (slot, offset, len): (u32, u64, u64)) -> Result<()> {
        let private = self.kind.map(|kind| (kind, self.fd.as_fd(), offset));
        let mut region = region(slot, GPA + offset, &self.view, private);
        region.userspace_addr = self.address + offset;
        region.memory_size = len;
        self.vm.raw_set_region(&region).with_context(|| format!("add slot {slot}"))
    }

    fn unbind_part(&self, (slot, ..): (u32, u64, u64)) -> Result<()> {
        self.vm.raw_delete(slot).with_context(|| format!("delete slot {slot}"))
    }

    /// The first parts, so many.
    fn bind(&self, parts: u64) -> Result<()> {
        self.parts().take(parts as usize).try_for_each(|part| self.bind_part(part))
    }

    /// The cost of binding all slots.
    pub fn count_bind(&self) -> Result<Cost> {
        count_with(&self.stats, || self.bind(self.bindings))
    }

    /// The cost of deleting all slots.
    pub fn count_unbind(&self) -> Result<Cost> {
        count_with(&self.stats, || self.parts().try_for_each(|part| self.unbind_part(part)))
    }

    /// The cost of binding the last part, which was not bound.
    pub fn count_bind_last(&self) -> Result<Cost> {
        let part = self.parts().last().context("no part")?;
        count_with(&self.stats, || self.bind_part(part))
    }

    /// The cost of deleting the last part's slot.
    pub fn count_unbind_last(&self) -> Result<Cost> {
        let part = self.parts().last().context("no part")?;
        count_with(&self.stats, || self.unbind_part(part))
    }

    /// The cost of ending the VM with its file.
    pub fn count_end(self) -> Result<Cost> {
        let Bench { vm, vcpu, fd, stats, view, kind, .. } = self;
        // Statistics keep the VM; the shared side of private memory has no pages.
        drop(stats);
        let view = kind.is_none().then_some(view);
        super::measure::count(|| {
            drop((vcpu, vm, view, fd));
            Ok(())
        })
    }
}

/// The objects that measured work may use.
pub struct Use<'a> {
    pub vm: &'a Vm,
    vcpu: &'a mut Vcpu,
    pub fd: &'a OwnedFd,
    view: &'a Mapping,
    /// Where in `view` the slots begin.
    offset: u64,
    size: u64,
}

impl Use<'_> {
    /// Lets the guest write one word in each `stride` bytes.
    pub fn touch(&mut self, start: u64, len: u64, stride: u64) -> Result<()> {
        let words = sequence(GPA + start, len, stride, Pattern::Constant(1));
        self.vcpu.call(Command::Fill, &words)
    }

    /// Lets all pages be allocated and mapped.
    pub fn populate(&self) -> Result<()> {
        let (result, left) = self.vcpu.raw_pre_fault(GPA, self.size);
        result.with_context(|| format!("pre-fault, {left} bytes left"))
    }

    pub fn punch(&self, offset: u64, len: u64) -> Result<()> {
        sys::punch(self.fd, offset, len).context("punch")
    }

    pub fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        sys::allocate(self.fd, offset, len).context("allocate")
    }

    /// Frees a part of the shared side.
    pub fn discard_shared(&self, offset: u64, len: u64) -> Result<()> {
        self.view
            .madvise(self.offset + offset, len, libc::MADV_DONTNEED)
            .context("discard the shared side")
    }
}
