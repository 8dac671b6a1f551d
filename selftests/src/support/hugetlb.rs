// SPDX-License-Identifier: GPL-2.0
//! Guests on memfiles of hugetlbfs, and suites that run with huge pages of each size.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};

use crate::ktap::CaseResult;
use crate::pattern::Pattern;
use crate::pressure::{self, Counts, Frame, MovableZone, Pool, Setting, frames};
use crate::skip::skip;
use crate::support::backend::Backend;
use crate::support::setup::{Layout, SLOT, vm_with_flags};
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{Private, Slot, Vcpu, Vm, region, small_pages};
use crate::{GIB, HUGE, PAGE};

/// Suites whose cases get the size of the huge pages that they use, and leave none of them behind.
macro_rules! suites {
    ($([$name:ident, $title:literal, $page:expr]: [$($case:ident $(: $limit:literal)?),* $(,)?])*) => {
        $(pub static $name: Suite = Suite {
            name: $title,
            cases: &[$(crate::ktap::Case {
                name: stringify!($case),
                func: || crate::support::hugetlb::run($page, $case),
                limit: [$($limit,)? crate::ktap::TIME_LIMIT][0],
            }),*],
            hidden: false,
            together: false,
        };)*
    };
}
pub(crate) use suites;

/// What a case of [`suites`] gets, of which the size of the huge pages is known.
pub trait Huge: Copy {
    fn page(self) -> u64;
}

impl Huge for u64 {
    fn page(self) -> u64 {
        self
    }
}

impl Huge for &Backend {
    fn page(self) -> u64 {
        self.page
    }
}

/// Run a case. It leaves the pool as it was.
pub fn run<T: Huge>(on: T, case: fn(T) -> CaseResult) -> CaseResult {
    let pool = Pool::of(on.page())?;
    let before = pool.usage()?;
    case(on)?;
    pool.expect_same(before)
}

/// A memfile of `count` huge pages of `page` bytes.
pub fn file(page: u64, count: u64) -> Result<OwnedFd> {
    memfile_huge(page, count * page)
}

/// A pool of `count` pages, none of them in use. Of gigantic pages the machine has what it was
/// given at boot.
pub fn pool(page: u64, count: u64) -> Result<(Pool, Option<Setting>)> {
    drop(memfile_unsized()?);
    let pool = Pool::of(page)?;
    if page == GIB {
        let usage = pool.usage()?;
        if usage.free < count {
            return skip(format!("{count} pages of 1 GiB are wanted, {} are free", usage.free));
        }
        return Ok((pool, None));
    }
    let setting = pool.fill(count)?;
    pool.expect_used(0, "before the test")?;
    Ok((pool, Some(setting)))
}

/// The pool's pages in a zone of movable memory; the rest of the pool is empty.
pub fn movable_pool(count: u64) -> Result<(MovableZone, Pool, Setting)> {
    drop(memfile_unsized()?);
    let zone = MovableZone::make(2)?;
    let pool = Pool::of(HUGE)?;
    let setting = pool.fill(count)?;
    Ok((zone, pool, setting))
}

/// Address space whose place in a huge page is that of the guest's, for the shared side. Nothing is
/// allocated before it is touched.
fn view(page: u64, size: u64) -> Result<(Mapping, u64)> {
    let view = small_pages(size + 2 * page)?;
    let start = view.addr().next_multiple_of(page);
    Ok((view, start))
}

/// A VM with a slot on a huge page file.
pub struct Guest {
    pub vm: Vm,
    pub vcpu: Vcpu,
    pub fd: OwnedFd,
    pub view: Mapping,
    pub gpa: u64,
    pub size: u64,
}

impl Guest {
    /// All of a new file of `count` huge pages.
    pub fn new(flags: u64, page: u64, count: u64) -> Result<Guest> {
        Guest::on(flags, page, file(page, count)?, count * page, Layout { gpa: 4 * GIB, offset: 0 })
    }

    /// A part of a file, which is `size` bytes long.
    pub fn on(flags: u64, page: u64, fd: OwnedFd, size: u64, layout: Layout) -> Result<Guest> {
        let vm = vm_with_flags(flags)?;
        let (view, start) = view(page, size)?;
        let mut request =
            region(SLOT, layout.gpa, &view, Some((Private::Memfile, fd.as_fd(), layout.offset)));
        // KVM maps huge pages only where this agrees as well.
        request.userspace_addr = start + layout.gpa % page;
        request.memory_size = size;
        vm.raw_set_region(&request).context("make the slot")?;
        vm.set_private(layout.gpa, size)?;
        let vcpu = vm.vcpu(0)?;
        Ok(Guest { vm, vcpu, fd, view, gpa: layout.gpa, size })
    }

    /// The file in another VM, from its beginning; this one ends first.
    pub fn in_another_vm(self, flags: u64, page: u64) -> Result<Guest> {
        let Guest { vm, vcpu, fd, gpa, size, .. } = self;
        drop((vcpu, vm));
        Guest::on(flags, page, fd, size, Layout { gpa, offset: 0 })
    }

    /// How many pages of `page` bytes KVM has mapped.
    pub fn mapped(&self, page: u64) -> Result<u64> {
        self.vm.stats()?.get(match page {
            PAGE => "pages_4k",
            HUGE => "pages_2m",
            GIB => "pages_1g",
            _ => bail!("KVM has no level of {page} bytes"),
        })
    }

    pub fn expect_mapped(&self, page: u64, wanted: u64, when: &str) -> Result<()> {
        let got = self.mapped(page)?;
        ensure!(got == wanted, "{when}: {got} pages of {} KiB, not {wanted}", page >> 10);
        Ok(())
    }

    /// The guest writes one word to each huge page, and to the ends of each.
    pub fn touch(&mut self, page: u64, pattern: Pattern) -> Result<()> {
        for offset in self.marks(page) {
            self.vcpu.store(self.gpa + offset, pattern.word(self.gpa + offset))?;
        }
        Ok(())
    }

    /// The guest finds what [`Self::touch`] wrote.
    pub fn expect(&mut self, page: u64, pattern: Pattern) -> Result<()> {
        for offset in self.marks(page) {
            let (got, wanted) =
                (self.vcpu.load(self.gpa + offset)?, pattern.word(self.gpa + offset));
            ensure!(got == wanted, "the guest reads {got:#x} at +{offset:#x}, not {wanted:#x}");
        }
        Ok(())
    }

    fn marks(&self, page: u64) -> Vec<u64> {
        let starts = (0..self.size).step_by(page as usize);
        starts.flat_map(|at| [at, at + page / 2, at + page - 8]).collect()
    }
}

/// A page frame with a memory error. It stays out of use: a broken huge page never returns to use.
pub fn break_at(guest: &Guest, offset: u64) -> Result<u64> {
    let frame = frames_of(guest)?.get(&offset).context("the page has no frame")?.pfn;
    let counts = Counts::now()?;
    pressure::poison(frame)?;
    counts.expect_grown(&["memfile.poison", "memfile.invalidate"], 1)?;
    Ok(frame)
}

/// The broken frames of a huge page: usable again when this is dropped, after the guest has ended.
pub struct Broken {
    pub page: u64,
    pub frames: Vec<u64>,
}

impl Broken {
    /// None yet.
    pub fn none(page: u64) -> Broken {
        Broken { page, frames: Vec::new() }
    }
}

impl Drop for Broken {
    fn drop(&mut self) {
        // The kernel mends all of a huge page, by its first frame.
        let Some(frame) = self.frames.first() else { return };
        let head = frame & !(self.page / PAGE - 1);
        if let Err(e) = pressure::unpoison(head) {
            println!("frame {head:#x} stays broken: {e:#}");
        }
    }
}

/// The places of the small pages of the guest, by offset in the file.
pub fn frames_of(guest: &Guest) -> Result<BTreeMap<u64, Frame>> {
    let view = small_pages(PAGE)?;
    let slot = Slot { id: SLOT, gpa: guest.gpa, size: guest.size, flags: KVM_MEM_PRIVATE, view };
    frames(&guest.vcpu, &slot, &guest.fd)
}
