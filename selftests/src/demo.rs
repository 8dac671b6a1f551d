// SPDX-License-Identifier: GPL-2.0
//! The costs of memory for the host over time: the same guest on each kind of memory.
//!
//! Every figure is read from the kernel after its step; none is computed from a request.

mod backing;
mod missing;
mod page;
mod plot;
mod real;
mod story;
mod table;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::guest::{Command, MAX_VCPUS};
use crate::pattern::Pattern;
use crate::pressure;
use crate::skip::Skip;
use crate::sys::{self, Errno};
use crate::vm::{Exit, Vm, VmType, region};
use crate::{GIB, MIB, mem};

pub use backing::{Backing, KINDS};
use backing::{GPA, Memory};
pub use missing::Missing;
use missing::unless_missing;
pub use page::{html, real_html};
pub use plot::svg;
pub use real::{Real, ragged_memory, tell as tell_real};
pub use story::Story;
pub use table::{csv, real_text, story_csv, text};

/// The parameters of a row.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub name: &'static str,
    pub backing: Backing,
    /// Bytes of the slot.
    pub size: u64,
    /// Bytes that the guest writes: the start of the slot, or spread all over it.
    pub touch: u64,
    /// In how many pieces, evenly spread from the first to the last byte of the slot.
    pub places: u64,
}

/// Host memory in bytes, as two counters of the kernel have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figure {
    /// `st_blocks` of the file, or `Rss` of the mapping in smaps; none where the kernel has no
    /// such counter.
    pub by_object: Option<u64>,
    /// Growth of `Cached` + `AnonPages` in `/proc/meminfo` since before the row began. Includes a
    /// few hundred KiB for VM and page tables of the test program itself.
    pub by_machine: i64,
}

/// One row: the figures of host memory, step by step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    pub name: String,
    /// Bytes of the slot.
    pub size: u64,
    /// Bytes that the guest writes.
    pub touched: u64,
    /// The counter behind `by_object`.
    pub source: String,
    pub after_creation: Figure,
    pub after_write: Figure,
    /// None if it can have no hole.
    pub after_punch: Option<Figure>,
    pub after_touch_again: Option<Figure>,
    pub after_end: Figure,
    /// The guest read zeros from all of the hole.
    pub hole_reads_zeros: Option<bool>,
    /// The guest read its own content everywhere else.
    pub own_data_elsewhere: bool,
    /// The guest's content was found in the kernel's direct map; none if no process may look.
    #[serde(default)]
    pub kernel_reads_it: Option<bool>,
    /// Pages that KVM had mapped for the guest after it wrote, from KVM's statistics.
    pub kvm_pages_4k: u64,
    pub kvm_pages_2m: u64,
    #[serde(default)]
    pub kvm_pages_1g: u64,
}

/// The results of the demo.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Kernel release.
    pub kernel: String,
    /// Bytes of memory in the machine.
    pub machine: u64,
    pub rows: Vec<Row>,
    pub missing: Vec<Missing>,
    pub story: Story,
}

impl Report {
    /// Did every guest read the right content, and the kernel what it may?
    pub fn is_right(&self) -> bool {
        self.rows.iter().all(|row| row.hole_reads_zeros != Some(false) && row.own_data_elsewhere)
            && self.rows.iter().all(|row| row.kernel_reads_it != Some(backing::is_out(&row.name)))
            && self.story.courses.iter().all(|course| course.own_data)
    }
}

/// Make all rows, and then the story; those that the kernel cannot run are listed in `missing`.
pub fn run(size: u64, progress: &mut dyn FnMut(&str)) -> Result<Report> {
    let kernel = sys::kernel_release()?;
    let machine = mem::meminfo("MemTotal")?;
    let (mut rows, mut missing) = (Vec::new(), Vec::new());
    let plans = KINDS.map(|(name, backing)| {
        // The guest writes as much on each kind, though a slot may have to be larger.
        let touch = size / 4;
        let gigantic = backing == Backing::MemfileGigantic;
        let size = if gigantic { size.next_multiple_of(GIB) } else { size };
        Plan { name, backing, size, touch, places: 1 }
    });
    let large = Plan {
        name: "memfile, on demand, 32 GiB",
        backing: Backing::MemfileOnDemand,
        size: 32 * GIB,
        touch: 64 * MIB,
        places: 16,
    };
    for (n, plan) in (1..).zip(plans.into_iter().chain([large])) {
        progress(plan.name);
        // Freed memory still has what other rows wrote.
        let written = Pattern::Generation(n);
        let row = match plan.backing {
            Backing::Secret => make_row_without_guest(plan, written),
            _ => make_row(plan, written),
        };
        rows.extend(unless_missing(row, plan.name, &mut missing)?);
    }
    let story = story::tell(progress)?;
    Ok(Report { kernel, machine, rows, missing, story })
}

/// The pieces of the slot that the guest writes: offset and length in bytes.
fn pieces(plan: &Plan) -> Vec<(u64, u64)> {
    let len = plan.touch / plan.places;
    let last = plan.size - len;
    let step = if plan.places > 1 { (last / (plan.places - 1)) & !(len - 1) } else { 0 };
    (0..plan.places)
        .map(|n| (if n + 1 == plan.places { n.min(1) * last } else { n * step }, len))
        .collect()
}

/// Whether the kernel can read what the guest wrote to `len` bytes at `start`: looks for it in all
/// of physical memory, through the direct map.
fn kernel_reads(written: Pattern, start: u64, len: u64) -> Result<Option<bool>> {
    match pressure::Memory::open() {
        Ok(memory) => memory.finds(written, start, len).map(Some),
        Err(error) if error.is::<Skip>() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The measurement of a row: the object's own counter, and the growth of the machine's.
struct Scale(u64);

impl Scale {
    fn start() -> Result<Scale> {
        mem::content().map(Scale)
    }

    fn read(&self, by_object: Option<u64>) -> Result<Figure> {
        Ok(Figure { by_object, by_machine: mem::content()? as i64 - self.0 as i64 })
    }
}

fn make_row(plan: Plan, written: Pattern) -> Result<Row> {
    let pieces = pieces(&plan);
    let scale = Scale::start()?;

    let vm = plan.backing.vm()?;
    let memory = Memory::create(plan.backing, &vm, GPA, plan.size, &pieces)?;
    let measure = || scale.read(memory.held()?);
    let mut vcpu = vm.vcpu(MAX_VCPUS - 1)?;
    let stats = vm.stats()?;
    let after_creation = measure()?;

    for &(offset, len) in &pieces {
        vcpu.fill(GPA + offset, len, written).context("the guest writes")?;
    }
    let after_write = measure()?;
    let (kvm_pages_4k, kvm_pages_2m) = (stats.get("pages_4k")?, stats.get("pages_2m")?);
    let kvm_pages_1g = stats.get("pages_1g")?;
    let kernel_reads_it = kernel_reads(written, GPA, plan.size)?;

    // The second half of each piece becomes a hole.
    for &(offset, len) in &pieces {
        memory.punch(offset + len / 2, len / 2).context("punch")?;
    }
    let after_punch = measure()?;

    let (mut hole_reads_zeros, mut own_data_elsewhere) = (true, true);
    for &(offset, len) in &pieces {
        let half = len / 2;
        hole_reads_zeros &= vcpu.verify(GPA + offset + half, half, Pattern::ZERO).is_ok();
        own_data_elsewhere &= vcpu.verify(GPA + offset, half, written).is_ok();
    }
    let again = Pattern::Generation(100);
    for &(offset, len) in &pieces {
        vcpu.fill(GPA + offset + len / 2, len / 2, again).context("the guest writes again")?;
    }
    let after_touch_again = measure()?;

    let source = memory.source().into();
    drop((stats, vcpu, vm, memory));
    let after_end = scale.read(None)?;
    Ok(Row {
        name: plan.name.into(),
        size: plan.size,
        touched: plan.touch,
        source,
        after_creation,
        after_write,
        after_punch: Some(after_punch),
        after_touch_again: Some(after_touch_again),
        after_end,
        hole_reads_zeros: Some(hole_reads_zeros),
        own_data_elsewhere,
        kernel_reads_it,
        kvm_pages_4k,
        kvm_pages_2m,
        kvm_pages_1g,
    })
}

/// A row of memory that KVM gives to no guest: this process writes and reads it instead.
fn make_row_without_guest(plan: Plan, written: Pattern) -> Result<Row> {
    let scale = Scale::start()?;
    let fd = sys::memfd_secret(plan.size)?;
    let memory = sys::Mapping::shared(&fd, 0, plan.size)?;
    let measure = || scale.read(Some(mem::resident(&memory)?));
    let after_creation = measure()?;

    for offset in (0..plan.touch).step_by(8) {
        memory.store(offset, written.word(GPA + offset));
    }
    let after_write = measure()?;
    let kernel_reads_it = kernel_reads(written, GPA, plan.size)?;
    let own_data_elsewhere =
        (0..plan.touch).step_by(8).all(|offset| memory.load(offset) == written.word(GPA + offset));
    expect_no_guest(&memory)?;

    drop((memory, fd));
    let after_end = scale.read(None)?;
    Ok(Row {
        name: plan.name.into(),
        size: plan.size,
        touched: plan.touch,
        source: "smaps".into(),
        after_creation,
        after_write,
        after_punch: None,
        after_touch_again: None,
        after_end,
        hole_reads_zeros: None,
        own_data_elsewhere,
        kernel_reads_it,
        kvm_pages_4k: 0,
        kvm_pages_2m: 0,
        kvm_pages_1g: 0,
    })
}

/// Fail if a guest can use memory of memfd_secret(): then it should have a row like the others.
fn expect_no_guest(memory: &sys::Mapping) -> Result<()> {
    let vm = Vm::new(VmType::Default)?;
    vm.raw_set_region(&region(1, GPA, memory, None)).context("a slot of memfd_secret")?;
    let mut vcpu = vm.vcpu(0)?;
    let exit = vcpu.start(Command::Load, &[GPA])?;
    ensure!(exit == Exit::Error(Errno::EFAULT), "a guest that uses memfd_secret: {exit:x?}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_lie_inside_and_reach_the_end() {
        let plan = Plan {
            name: "",
            backing: Backing::Anonymous,
            size: 32 * GIB,
            touch: 64 * MIB,
            places: 16,
        };
        let many = pieces(&plan);
        assert_eq!(many.iter().map(|p| p.1).sum::<u64>(), 64 * MIB);
        assert_eq!(many[0].0, 0);
        assert_eq!(many[15], (32 * GIB - 4 * MIB, 4 * MIB));
        assert!(many.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
        assert_eq!(pieces(&Plan { size: 256 * MIB, places: 1, ..plan }), [(0, 64 * MIB)]);
    }
}
