// SPDX-License-Identifier: GPL-2.0
//! A guest uses an area privately and shared in turn: the scenarios of the tests of the 2022
//! series, written anew.
//!
//! An area is a huge page and a small one. Each scenario runs with one vCPU, and with two areas of
//! one file side by side, each with two vCPUs; for each way to convert; and for both ways in which
//! the VMM learns that memory has to be converted:
//!
//! - *explicit*: the guest asks by hypercall, then accesses.
//! - *implicit*: the guest just accesses, KVM_RUN fails, and the VMM converts.
//!
//! On `KVM_X86_SW_PROTECTED_VM` an access is of the kind that the attribute says, so a test cannot
//! force an access of the other kind. It can only force an access to a side that the VMM has taken
//! away before:
//!
//! - the slot has no private backing: KVM_RUN fails with `KVM_EXIT_MEMORY_FAULT`, with the page and
//!   the flag for private, and the VMM makes this page shared;
//! - the shared side is out of reach: KVM_RUN fails with a bare EFAULT (Linux 7.3 gives no address
//!   for a shared access), and the VMM makes private the range that it took away.
//!
//! Pages are small on both sides; the last cases do everything explicitly with huge ones.

use std::os::fd::{AsFd, OwnedFd};
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::guest::Command;
use crate::ktap::CaseResult;
use crate::pattern::Pattern;
use crate::support::backend::{Backend, MEMFILE};
use crate::support::setup::{check_view, convert_by_hypercall, fill_view_part};
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{ConvertBy, Exit, Slot, Vcpu, Vm, region, sequence, small_pages};
use crate::{GIB, HUGE, MIB, PAGE, conformance, pressure};

conformance!(
    "scenarios",
    [],
    converting: [
        private_memory_private_access,
        private_memory_shared_access,
        shared_memory_shared_access,
        shared_memory_private_access,
        private_shared_access,
        shared_private_access,
        private_shared_private_access,
        private_shared_access_without_double_allocation,
        part_of_private_memory_is_shared_and_back,
    ],
    memfile: [
        all_on_huge_shared_pages,
        all_on_huge_private_pages,
        all_on_huge_pages,
    ],
    // Two are not for hugetlbfs. A VMM that converts small page by small page frees a part of a huge
    // page each time, which gives nothing back: there are both sides for a while, as
    // `private_shared_access_without_double_allocation` forbids. (`all_on_huge_pages` has it with one
    // conversion of all.) And `all_on_huge_shared_pages` has small pages on the private side.
    huge: [
        private_memory_private_access,
        private_memory_shared_access,
        shared_memory_shared_access,
        shared_memory_private_access,
        private_shared_access,
        shared_private_access,
        private_shared_private_access,
        part_of_private_memory_is_shared_and_back,
        all_on_huge_private_pages,
        all_on_huge_pages,
    ],
    hidden: [
        private_memory_private_access,
        private_memory_shared_access,
        shared_memory_private_access,
        shared_memory_shared_access,
        private_shared_access,
        shared_private_access,
        private_shared_private_access,
        part_of_private_memory_is_shared_and_back,
        all_on_huge_private_pages,
        all_on_huge_pages,
    ],
    // Two areas are two slots on parts of one page. The other scenarios convert all of an area.
    gigantic: [part_of_private_memory_is_shared_and_back],
);

/// The patterns of the host, then of the guest, then of each next stage.
const HOST: Pattern = Pattern::Generation(1);
const FIRST: Pattern = Pattern::Generation(2);
const SECOND: Pattern = Pattern::Generation(3);
const THIRD: Pattern = Pattern::Generation(4);
const FOURTH: Pattern = Pattern::Generation(5);

/// Bytes of an area.
const SIZE: u64 = HUGE + PAGE;
/// From one area to the next, in the file and in guest memory.
const STRIDE: u64 = 2 * HUGE;

/// Bytes `[start, start + len)` of an area.
#[derive(Clone, Copy, Debug)]
struct Part {
    start: u64,
    len: u64,
}

const ALL: Part = Part { start: 0, len: SIZE };
/// The part that [`part_of_private_memory_is_shared_and_back`] converts, and what is around it.
const MIDDLE: Part = Part { start: MIB, len: 10 * PAGE };
const AROUND: [Part; 2] = [
    Part { start: 0, len: MIDDLE.start },
    Part { start: MIDDLE.start + MIDDLE.len, len: SIZE - MIDDLE.start - MIDDLE.len },
];

/// The side that an access is meant for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Shared,
    Private,
}
use Side::{Private as Priv, Shared};

/// How the VMM learns that memory has to be converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asking {
    Explicit,
    Implicit,
}

/// Sizes of pages.
#[derive(Clone, Copy, Debug, Default)]
struct Pages {
    huge_shared: bool,
    huge_private: bool,
}

/// Areas, and vCPUs of each.
const ONE: (u64, u64) = (1, 1);
const SEVERAL: (u64, u64) = (2, 2);

/// A variant of a scenario.
#[derive(Clone, Copy, Debug)]
struct Variant {
    by: ConvertBy,
    asking: Asking,
    areas: u64,
    vcpus: u64,
    pages: Pages,
}

/// One area, its vCPUs, and the VMM's part.
struct Area<'a> {
    vm: &'a Vm,
    on: &'static Backend,
    file: &'a OwnedFd,
    /// Its offset in the file.
    offset: u64,
    /// The file of the shared side, if the VMM gives that side up while the memory is private.
    shared_file: Option<OwnedFd>,
    slot: Slot,
    /// The first accesses, all check.
    vcpus: Vec<Vcpu>,
    how: Variant,
    /// The current side of each page.
    sides: Vec<Side>,
}

type Scenario = fn(&mut Area) -> Result<()>;

/// Named by their initials, except the last. The one that needs a seal runs separately.
const SCENARIOS: [Scenario; 8] = [pmpa, pmsa, smsa, smpa, psa, spa, pspa, middle];

impl Area<'_> {
    fn new<'a>(
        vm: &'a Vm,
        on: &'static Backend,
        file: &'a OwnedFd,
        number: u64,
        sealed: bool,
        how: Variant,
    ) -> Result<Area<'a>> {
        let (offset, gpa) = (number * STRIDE, 4 * GIB + number * STRIDE);
        let shared_file = sealed.then(sealed_memfd).transpose()?;
        let view = match &shared_file {
            Some(shared) => Mapping::shared(shared, 0, SIZE)?,
            None if how.pages.huge_shared => {
                let view = Mapping::anonymous(SIZE)?;
                view.madvise(0, SIZE, libc::MADV_HUGEPAGE).context("MADV_HUGEPAGE")?;
                view
            }
            None => small_pages(SIZE)?,
        };
        let id = number as u32 + 1;
        let slot = vm.add(id, gpa, view, Some((on.kind, file.as_fd(), offset)))?;
        let vcpus = (0..how.vcpus).map(|n| vm.vcpu(number * how.vcpus + n));
        let vcpus = vcpus.collect::<Result<_>>()?;
        let sides = vec![Shared; (SIZE / PAGE) as usize];
        Ok(Area { vm, on, file, offset, shared_file, slot, vcpus, how, sides })
    }

    /// The scenario begins with all memory on this side; the other side is empty, or has what the
    /// host writes.
    fn begin(&mut self, side: Side) -> Result<()> {
        match side {
            Shared => punch(self.file, self.offset, SIZE).context("free the private side")?,
            Priv => allocate(self.file, self.offset, SIZE).context("fallocate")?,
        }
        self.convert(ALL, side)
    }

    /// The host writes its side.
    fn host_writes(&self, part: Part, pattern: Pattern) {
        fill_view_part(&self.slot, part.start, part.len, pattern);
    }

    /// The host's side must have this content.
    fn host_sees(&self, part: Part, pattern: Pattern) -> Result<()> {
        check_view(&self.slot, part.start, part.len, pattern)
            .with_context(|| format!("{part:x?}, {pattern:?}"))
    }

    /// The guest writes a side.
    fn guest_writes(&mut self, side: Side, part: Part, pattern: Pattern) -> Result<()> {
        self.access(side, part, Command::Fill, pattern)
            .with_context(|| format!("{side:?} write of {part:x?}, {pattern:?}"))
    }

    /// The guest must find this content, on every vCPU.
    fn guest_sees(&mut self, side: Side, part: Part, pattern: Pattern) -> Result<()> {
        let gpa = self.slot.gpa + part.start;
        self.access(side, part, Command::Verify, pattern)
            .and_then(|()| self.vcpus[0].judge(gpa, part.len, 8, pattern))
            .and_then(|()| {
                self.vcpus[1..].iter_mut().try_for_each(|vcpu| vcpu.verify(gpa, part.len, pattern))
            })
            .with_context(|| format!("{side:?} read of {part:x?}, {pattern:?}"))
    }

    /// The first vCPU accesses a part, which is converted on the way if it is not of that side.
    fn access(&mut self, side: Side, part: Part, command: Command, pattern: Pattern) -> Result<()> {
        let pages = (part.start / PAGE) as usize..((part.start + part.len) / PAGE) as usize;
        let gpa = self.slot.gpa + part.start;
        let args = sequence(gpa, part.len, 8, pattern);
        let converted = self.sides[pages].iter().all(|&now| now == side);
        match self.how.asking {
            _ if converted => self.vcpus[0].call(command, &args),
            Asking::Explicit => {
                self.exchange_memory(part, side)?;
                let (by, private) = (self.how.by, side == Priv);
                convert_by_hypercall(self.vm, &mut self.vcpus[0], by, gpa, part.len, private)?;
                self.note(part, side);
                self.vcpus[0].call(command, &args)
            }
            Asking::Implicit => {
                match side {
                    Shared => self.set_private_backing(false)?,
                    Priv => self.set_shared_backing(part, false)?,
                }
                self.vcpus[0].post(command, &args)?;
                self.run_converting(part, side)?;
                match side {
                    Shared => self.set_private_backing(true),
                    Priv => self.set_shared_backing(part, true),
                }
            }
        }
    }

    /// Enter until the posted command is done, and convert each range that it faults on.
    fn run_converting(&mut self, part: Part, side: Side) -> Result<()> {
        let range = self.slot.gpa + part.start..self.slot.gpa + part.start + part.len;
        let mut exits = 0;
        loop {
            match (side, self.vcpus[0].run()?) {
                (_, Exit::Done) => break,
                (Shared, Exit::MemoryFault { errno: Errno::EFAULT, gpa, size: PAGE, flags })
                    if flags == KVM_MEMORY_EXIT_FLAG_PRIVATE && range.contains(&gpa) =>
                {
                    self.convert(Part { start: gpa - self.slot.gpa, len: PAGE }, side)?;
                }
                (Priv, Exit::Error(Errno::EFAULT)) => self.convert(part, side)?,
                (_, exit) => bail!("{exit:x?}"),
            }
            exits += 1;
        }
        let wanted = if side == Shared { part.len / PAGE } else { 1 };
        ensure!(exits == wanted, "{exits} exits, wanted {wanted}");
        Ok(())
    }

    /// The VMM converts a part.
    fn convert(&mut self, part: Part, side: Side) -> Result<()> {
        self.exchange_memory(part, side)?;
        let gpa = self.slot.gpa + part.start;
        self.vm.convert(self.how.by, gpa, part.len, side == Priv)?;
        self.note(part, side);
        Ok(())
    }

    fn note(&mut self, part: Part, side: Side) {
        let pages = (part.start / PAGE) as usize..((part.start + part.len) / PAGE) as usize;
        self.sides[pages].fill(side);
    }

    /// Free the memory of the old side, and allocate memory of the new side.
    fn exchange_memory(&self, part: Part, side: Side) -> Result<()> {
        let Some(shared) = &self.shared_file else {
            return Ok(());
        };
        let private = (self.file, self.offset + part.start);
        let shared = (shared, part.start);
        let ((left, at), (entered, to)) =
            if side == Priv { (shared, private) } else { (private, shared) };
        punch(left, at, part.len).context("give up the other side")?;
        allocate(entered, to, part.len).context("fallocate")
    }

    /// Take the private backing away from the slot, or give it back.
    fn set_private_backing(&self, there: bool) -> Result<()> {
        let Slot { id, gpa, view, .. } = &self.slot;
        let backing = there.then(|| (self.on.kind, self.file.as_fd(), self.offset));
        self.vm.raw_delete(*id).context("delete the slot")?;
        self.vm.raw_set_region(&region(*id, *gpa, view, backing)).context("make the slot again")
    }

    /// Take the shared side out of the guest's reach, or give it back.
    fn set_shared_backing(&self, part: Part, there: bool) -> Result<()> {
        let prot = if there { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_NONE };
        match &self.shared_file {
            // An access to a hole of a sealed file fails.
            Some(file) if !there => punch(file, part.start, part.len).context("punch"),
            Some(_) => Ok(()),
            None => self.slot.view.protect(part.start, part.len, prot).context("mprotect"),
        }
    }

    /// The file holds the pages of that many bytes, if huge pages of shmem and other users do not
    /// count.
    fn expect_private_memory(&self, bytes: u64, when: &str) -> Result<()> {
        if !self.on.counted || self.how.areas > 1 || self.how.pages.huge_private {
            return Ok(());
        }
        expect_allocated(self.file, bytes.next_multiple_of(self.on.page), when)
    }

    /// The file holds what a hole of all of the area leaves: only whole pages are freed.
    fn expect_no_private_memory(&self, when: &str) -> Result<()> {
        let whole = SIZE / self.on.page * self.on.page;
        self.expect_private_memory(SIZE - whole, when)
    }
}

/// A memfd that only fallocate fills.
fn sealed_memfd() -> Result<OwnedFd> {
    let file = memfd_create(MFD_CLOEXEC | MFD_ALLOW_SEALING).context("memfd_create")?;
    ftruncate(&file, SIZE).context("ftruncate")?;
    seal(&file)?;
    Ok(file)
}

/// Run a scenario on a VM of its own.
fn run(on: &'static Backend, how: Variant, sealed: bool, scenario: Scenario) -> CaseResult {
    let vm = on.vm()?;
    vm.exit_on_map_gpa()?;
    let file = on.create(&vm, how.areas * STRIDE)?;
    let areas = (0..how.areas).map(|n| Area::new(&vm, on, &file, n, sealed, how));
    let mut areas = areas.collect::<Result<Vec<_>>>()?;
    thread::scope(|scope| {
        let running: Vec<_> =
            areas.iter_mut().map(|area| scope.spawn(move || scenario(area))).collect();
        let ended = running.into_iter().map(|r| r.join().unwrap_or_else(|_| bail!("a panic")));
        ended.collect::<Vec<_>>().into_iter().collect()
    })
}

/// Run a scenario in variants in which each pair of choices occurs.
fn run_variants(
    on: &'static Backend,
    pages: Pages,
    sealed: bool,
    scenario: Scenario,
) -> CaseResult {
    let conversions = Vm::protected()?.conversions();
    let both = [(Asking::Explicit, ONE), (Asking::Implicit, SEVERAL)];
    let other = [(Asking::Explicit, SEVERAL), (Asking::Implicit, ONE)];
    for (&by, variants) in conversions.iter().zip([both, other]) {
        for (asking, (areas, vcpus)) in variants {
            // guest_memfd is here for comparison, and not under test.
            if on.kind != MEMFILE.kind && areas > 1 {
                continue;
            }
            let how = Variant { by, asking, areas, vcpus, pages };
            run(on, how, sealed, scenario).with_context(|| format!("{how:?}"))?;
        }
    }
    Ok(())
}

fn run_small(on: &'static Backend, scenario: Scenario) -> CaseResult {
    run_variants(on, Pages::default(), false, scenario)
}

/// The guest's private content is not in the host's memory, and does not change.
fn private_memory_private_access(on: &'static Backend) -> CaseResult {
    let _pages = pressure::base_pages()?;
    run_small(on, pmpa)
}

fn pmpa(a: &mut Area) -> Result<()> {
    a.begin(Priv)?;
    a.host_writes(ALL, HOST);
    a.guest_writes(Priv, ALL, FIRST)?;
    a.host_sees(ALL, HOST)?;
    a.guest_sees(Priv, ALL, FIRST)?;
    a.expect_private_memory(SIZE, "all touched")
}

/// A shared access to private memory finds the host's, for reading and writing.
fn private_memory_shared_access(on: &'static Backend) -> CaseResult {
    run_small(on, pmsa)
}

fn pmsa(a: &mut Area) -> Result<()> {
    a.begin(Priv)?;
    a.host_writes(ALL, HOST);
    a.guest_sees(Shared, ALL, HOST)?;
    a.guest_writes(Shared, ALL, FIRST)?;
    a.host_sees(ALL, FIRST)
}

/// Memory that was never private is the host's, and takes no private page.
fn shared_memory_shared_access(on: &'static Backend) -> CaseResult {
    run_small(on, smsa)
}

fn smsa(a: &mut Area) -> Result<()> {
    a.begin(Shared)?;
    a.host_writes(ALL, HOST);
    a.guest_sees(Shared, ALL, HOST)?;
    a.guest_writes(Shared, ALL, FIRST)?;
    a.host_sees(ALL, FIRST)?;
    a.expect_private_memory(0, "shared all the while")
}

/// A private access to shared memory leaves the host's as it was.
fn shared_memory_private_access(on: &'static Backend) -> CaseResult {
    let _pages = pressure::base_pages()?;
    run_small(on, smpa)
}

fn smpa(a: &mut Area) -> Result<()> {
    a.begin(Shared)?;
    a.host_writes(ALL, HOST);
    a.guest_writes(Priv, ALL, FIRST)?;
    a.host_sees(ALL, HOST)?;
    a.guest_sees(Priv, ALL, FIRST)?;
    a.expect_private_memory(SIZE, "all touched")
}

/// Private memory that the host frees is gone: the guest gets the host's, and never the old pages.
fn private_shared_access(on: &'static Backend) -> CaseResult {
    let _pages = pressure::base_pages()?;
    run_small(on, psa)
}

fn psa(a: &mut Area) -> Result<()> {
    a.begin(Priv)?;
    a.host_writes(ALL, HOST);
    a.guest_writes(Priv, ALL, FIRST)?;
    a.host_sees(ALL, HOST)?;
    a.guest_sees(Priv, ALL, FIRST)?;
    punch(a.file, a.offset, SIZE).context("free the private side")?;
    a.expect_no_private_memory("freed")?;
    a.guest_sees(Priv, ALL, Pattern::ZERO).context("freed while mapped")?;
    punch(a.file, a.offset, SIZE).context("free the private side again")?;
    a.guest_writes(Shared, ALL, SECOND)?;
    a.host_sees(ALL, SECOND)?;
    a.guest_sees(Shared, ALL, SECOND)?;
    a.guest_sees(Priv, ALL, Pattern::ZERO)
}

/// Shared memory that gets private backing while the guest has it mapped is private from the first
/// private access on.
fn shared_private_access(on: &'static Backend) -> CaseResult {
    run_small(on, spa)
}

fn spa(a: &mut Area) -> Result<()> {
    a.begin(Shared)?;
    a.host_writes(ALL, HOST);
    a.guest_sees(Shared, ALL, HOST)?;
    a.guest_writes(Shared, ALL, FIRST)?;
    a.host_sees(ALL, FIRST)?;
    allocate(a.file, a.offset, SIZE).context("fallocate")?;
    a.guest_writes(Priv, ALL, SECOND)?;
    a.host_sees(ALL, FIRST)?;
    a.guest_sees(Priv, ALL, SECOND)
}

/// Private, shared, private: each side keeps what was written to it last.
fn private_shared_private_access(on: &'static Backend) -> CaseResult {
    run_small(on, pspa)
}

fn pspa(a: &mut Area) -> Result<()> {
    a.begin(Priv)?;
    a.host_writes(ALL, HOST);
    a.guest_writes(Priv, ALL, FIRST)?;
    a.host_sees(ALL, HOST)?;
    a.guest_sees(Shared, ALL, HOST)?;
    a.guest_writes(Shared, ALL, SECOND)?;
    a.host_sees(ALL, SECOND)?;
    a.guest_sees(Priv, ALL, FIRST)?;
    a.guest_writes(Priv, ALL, THIRD)?;
    a.host_sees(ALL, SECOND)?;
    a.guest_sees(Priv, ALL, THIRD)
}

/// A VMM that keeps one side only, with F_SEAL_AUTO_ALLOCATE on the shared one: a stray access
/// allocates no page, and both sides are never allocated together.
fn private_shared_access_without_double_allocation(on: &'static Backend) -> CaseResult {
    let _pages = pressure::base_pages()?;
    run_variants(on, Pages::default(), true, psawda)
}

fn psawda(a: &mut Area) -> Result<()> {
    let one_side = |a: &Area, side| -> Result<()> {
        let shared = a.shared_file.as_ref().context("no file behind the shared side")?;
        let when = format!("the private side while {side:?}");
        match side {
            Priv => a.expect_private_memory(SIZE, &when)?,
            Shared => a.expect_no_private_memory(&when)?,
        }
        let held = if side == Priv { 0 } else { SIZE };
        expect_allocated(shared, held, &format!("the shared side while {side:?}"))
    };
    // Shared accesses are not served yet.
    let gpa = a.slot.gpa;
    a.vm.set_shared(gpa, SIZE)?;
    for (command, args) in [(Command::Load, vec![gpa]), (Command::Store, vec![gpa + HUGE, 1])] {
        let exit = a.vcpus[0].start(command, &args)?;
        ensure!(exit == Exit::Error(Errno::EFAULT), "stray {command:?}: {exit:x?}");
        a.vcpus[0].restart()?;
    }
    a.begin(Priv)?;
    for (private, shared, host) in [(FIRST, SECOND, HOST), (THIRD, FOURTH, SECOND)] {
        a.guest_sees(Priv, ALL, Pattern::ZERO).context("fresh")?;
        a.guest_writes(Priv, ALL, private)?;
        a.guest_sees(Priv, ALL, private)?;
        one_side(a, Priv)?;

        a.guest_writes(Shared, ALL, shared)?;
        a.host_sees(ALL, shared)?;
        a.host_writes(ALL, host);
        a.guest_sees(Shared, ALL, host)?;
        one_side(a, Shared)?;
    }
    Ok(())
}

/// A part in the middle becomes shared and private again; it keeps the content of both sides, and
/// the rest of the area does not change.
fn part_of_private_memory_is_shared_and_back(on: &'static Backend) -> CaseResult {
    run_small(on, middle)
}

fn middle(a: &mut Area) -> Result<()> {
    let host_sees_around = |a: &Area| AROUND.iter().try_for_each(|&part| a.host_sees(part, HOST));
    a.begin(Priv)?;
    a.host_writes(ALL, HOST);
    a.guest_writes(Priv, ALL, FIRST)?;
    a.guest_sees(Priv, ALL, FIRST)?;
    a.host_sees(ALL, HOST)?;

    a.guest_writes(Shared, MIDDLE, SECOND)?;
    a.host_sees(MIDDLE, SECOND)?;
    host_sees_around(a)?;
    a.host_writes(MIDDLE, THIRD);
    a.guest_sees(Shared, MIDDLE, THIRD)?;
    for part in AROUND {
        a.guest_sees(Priv, part, FIRST)?;
    }

    a.guest_sees(Priv, MIDDLE, FIRST)?;
    a.guest_writes(Priv, MIDDLE, FOURTH)?;
    a.host_sees(MIDDLE, THIRD)?;
    host_sees_around(a)?;
    a.guest_sees(Priv, MIDDLE, FOURTH)?;
    for part in AROUND {
        a.guest_sees(Priv, part, FIRST)?;
    }
    Ok(())
}

/// Every scenario with pages of these sizes; SKIP where the kernel gives none.
fn run_all(on: &'static Backend, pages: Pages) -> CaseResult {
    let _policy = pressure::shmem_huge(if pages.huge_private { "always" } else { "never" })?;
    let _anonymous = pages.huge_shared.then(|| pressure::anonymous_huge("madvise")).transpose()?;
    let (by, asking) = (ConvertBy::Attributes, Asking::Explicit);
    let how = Variant { by, asking, areas: 1, vcpus: 1, pages };
    run(on, how, false, pages_are_as_asked_for)?;
    let how = Variant { vcpus: 2, ..how };
    for scenario in SCENARIOS {
        run(on, how, false, scenario).with_context(|| format!("{how:?}"))?;
    }
    // One setting decides the size of pages of memfds on both sides.
    if pages.huge_shared && pages.huge_private {
        run(on, how, true, psawda)?;
    }
    Ok(())
}

/// KVM maps each side with pages of the right size.
fn pages_are_as_asked_for(a: &mut Area) -> Result<()> {
    let stats = a.vm.stats()?;
    a.begin(Priv)?;
    for (side, huge) in [(Priv, a.how.pages.huge_private), (Shared, a.how.pages.huge_shared)] {
        a.guest_writes(side, ALL, FIRST)?;
        let mapped = stats.get("pages_2m")?;
        ensure!(mapped == u64::from(huge), "{mapped} huge pages of the {side:?} side are mapped");
    }
    Ok(())
}

fn all_on_huge_shared_pages(on: &'static Backend) -> CaseResult {
    run_all(on, Pages { huge_shared: true, huge_private: false })
}

fn all_on_huge_private_pages(on: &'static Backend) -> CaseResult {
    run_all(on, Pages { huge_shared: false, huge_private: true })
}

fn all_on_huge_pages(on: &'static Backend) -> CaseResult {
    run_all(on, Pages { huge_shared: true, huge_private: true })
}
