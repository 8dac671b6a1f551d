// SPDX-License-Identifier: GPL-2.0
//! The kernel's direct map, and what is out of it.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use anyhow::{Context, Result, bail, ensure};

use crate::ktap::{CaseResult, skip};
use crate::module::Module;
use crate::pattern::Pattern;
use crate::pressure::{Frame, Memory, frames};
use crate::store::{FRAME_WORDS, Store};
use crate::support::setup::{GUEST, Setup, content};
use crate::sys::{Errno, allocate, expect_errno, memfile_unsized};
use crate::vm::{Slot, Vm};
use crate::{PAGE, mem};

/// The kernel's view of physical memory; SKIP where there are no memfiles.
pub fn memory() -> Result<Memory> {
    drop(memfile_unsized()?);
    Memory::open()
}

/// The kernel reads page frames by their addresses in the direct map: a test module does so, with
/// `copy_from_kernel_nofault()`.
pub struct Reader {
    store: Store,
    _module: Module,
}

impl Reader {
    /// SKIP if the module is not there.
    pub fn load() -> Result<Reader> {
        drop(memfile_unsized()?);
        let (store, module) = Store::load()?;
        Ok(Reader { store, _module: module })
    }

    /// The content of a frame; None if it gets EFAULT.
    fn frame(&self, pfn: u64) -> Result<Option<[u64; FRAME_WORDS]>> {
        match self.store.read_frame(pfn) {
            Ok(content) => Ok(Some(content)),
            Err(Errno::EFAULT) => Ok(None),
            Err(e) => bail!("the kernel reads frame {pfn:#x}: {e}"),
        }
    }

    /// Fail unless each of these frames gives EFAULT.
    pub fn expect_fault(&self, pfns: &[u64], when: &str) -> Result<()> {
        for pfn in pfns {
            ensure!(self.frame(*pfn)?.is_none(), "{when}: the kernel reads frame {pfn:#x}");
        }
        Ok(())
    }

    /// Fail unless the kernel finds `pattern` in these frames, as it is from `gpa` on.
    pub fn expect_pattern(
        &self,
        pfns: &[u64],
        pattern: Pattern,
        gpa: u64,
        when: &str,
    ) -> Result<()> {
        for (gpa, pfn) in (gpa..).step_by(PAGE as usize).zip(pfns) {
            let content = self.frame(*pfn)?;
            let content =
                content.with_context(|| format!("{when}: frame {pfn:#x} gives EFAULT"))?;
            for (addr, word) in (gpa..).step_by(8).zip(content) {
                let wanted = pattern.word(addr);
                ensure!(word == wanted, "{when}: {word:#x} for {addr:#x}, not {wanted:#x}");
            }
        }
        Ok(())
    }

    /// Fail unless the kernel can read these frames, which have left a file, and reads zeros. Of
    /// those that return to the page allocator a few may be others' again.
    pub fn expect_cleared(&self, pfns: &[u64], others: usize) -> Result<()> {
        let mut used = 0;
        for pfn in pfns {
            let content = self.frame(*pfn)?;
            let content = content.with_context(|| format!("frame {pfn:#x} gives EFAULT"))?;
            used += usize::from(content != [0; FRAME_WORDS]);
        }
        ensure!(used <= others, "{used} of {} frames do not read as zeros", pfns.len());
        Ok(())
    }
}

/// The pages that are out of the direct map because of `work`.
pub struct Hidden(u64);

impl Hidden {
    pub fn now() -> Result<Hidden> {
        drop(memfile_unsized()?);
        mem::hidden_pages().map(Hidden)
    }

    /// How many more there are.
    pub fn more(&self) -> Result<u64> {
        Ok(mem::hidden_pages()?.saturating_sub(self.0))
    }

    pub fn expect(&self, more: u64, when: &str) -> Result<()> {
        let now = mem::hidden_pages()?;
        ensure!(now == self.0 + more, "{when}: {} pages were out, {now} are", self.0);
        Ok(())
    }
}

/// The flushes of the kernel's TLB entries on all CPUs because of `work`: each calls a function on
/// all others.
pub struct Flushes {
    others: u64,
    before: u64,
}

impl Flushes {
    pub fn now() -> Result<Flushes> {
        let cpus = std::thread::available_parallelism().context("how many CPUs?")?;
        Ok(Flushes { others: cpus.get() as u64 - 1, before: mem::interrupts("CAL")? })
    }

    /// Of `work`, and of all that the kernel does meanwhile. None if they cannot be seen: there
    /// is one CPU, or the CPUs need not be called.
    pub fn since(&self) -> Result<Option<u64>> {
        if self.others == 0 || mem::cpu_has("invlpgb")? {
            return Ok(None);
        }
        Ok(Some((mem::interrupts("CAL")? - self.before) / self.others))
    }

    /// Fail if there was one for each of `pages`, or for every few.
    pub fn expect_batches(&self, pages: u64, what: &str) -> Result<()> {
        let Some(flushes) = self.since()? else {
            println!("{what}: no flush can be seen");
            return Ok(());
        };
        println!("{what}: {pages} pages, the CPUs were called {flushes} times");
        ensure!(flushes < pages / 8, "{what}: {flushes} calls for {pages} pages");
        Ok(())
    }
}

/// The guest finds the first `len` bytes of its initial content, which can be written
/// once; none of them are in the direct map, nor does the writing bring them there.
pub fn populate_hidden(
    memory: &Memory,
    vm: &Vm,
    slot: &Slot,
    fd: &OwnedFd,
    len: u64,
) -> Result<()> {
    let source = content(slot.gpa, len, GUEST)?;
    let populate = |offset: u64, len: u64| -> Result<()> {
        let (result, left) = vm.raw_populate(slot.gpa + offset, len, source.addr() + offset);
        result.with_context(|| format!("+{offset:#x}: {left:#x} bytes left"))
    };
    // The first page, which is of any size, then what is allocated meanwhile, then what is there.
    let half = len / 2;
    populate(0, PAGE)?;
    let flushes = Flushes::now()?;
    populate(PAGE, half - PAGE)?;
    flushes.expect_batches(half / PAGE, "populate what is not there")?;
    allocate(fd, 0, slot.size)?;
    let flushes = Flushes::now()?;
    populate(half, half)?;
    flushes.expect_batches(half / PAGE, "populate what is")?;
    // A second time it has content, which has to be looked at.
    let again = vm.raw_populate(slot.gpa, PAGE, source.addr()).0;
    expect_errno("again", again, &[Errno::EEXIST])?;
    let mut vcpu = vm.vcpu(0)?;
    vcpu.verify(slot.gpa, len, GUEST)?;
    for (offset, frame) in frames(&vcpu, slot, fd)?.range(..len) {
        ensure!(!memory.has(frame.pfn)?, "+{offset:#x} is in the direct map");
    }
    Ok(())
}

/// Entries of 2 MiB that are split because of `work`.
pub struct Splits(u64);

impl Splits {
    pub fn now() -> Result<Splits> {
        mem::vmstat("direct_map_level2_splits").map(Splits)
    }

    pub fn since(&self) -> Result<u64> {
        Ok(mem::vmstat("direct_map_level2_splits")? - self.0)
    }

    /// Fail unless splits were needed and could fail, which `failed` tells. SKIP if none was needed.
    pub fn expect_failures(&self, failed: u32) -> CaseResult {
        let splits = self.since()?;
        println!("{splits} times an entry of 2 MiB was split, {failed} times that failed");
        if splits == 0 {
            return skip("the direct map has no large entries here");
        }
        ensure!(failed > 0, "no allocation was needed");
        Ok(())
    }
}

/// The frames of all pages of a guest, in their order.
pub fn pfns(s: &Setup) -> Result<Vec<u64>> {
    every_pfn(frames(&s.vcpu, &s.slot, &s.fd)?, s.slot.size)
}

/// The frames of `size` bytes of a guest, which must all be there.
pub fn every_pfn(frames: BTreeMap<u64, Frame>, size: u64) -> Result<Vec<u64>> {
    ensure!(frames.len() as u64 == size / PAGE, "only {} pages have a frame", frames.len());
    Ok(frames.into_values().map(|frame| frame.pfn).collect())
}

/// How much of it has entries of 4 KiB, 2 MiB and 1 GiB, in bytes.
pub fn direct_map() -> Result<[u64; 3]> {
    let part = |name: &str| mem::meminfo(name).unwrap_or(0);
    Ok([part("DirectMap4k"), part("DirectMap2M"), part("DirectMap1G")])
}
