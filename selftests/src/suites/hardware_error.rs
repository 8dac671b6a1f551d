// SPDX-License-Identifier: GPL-2.0
//! Memory errors that hardware reports, in pages that are out of the direct map: not even a CPU that
//! speculates may read the broken page, so it never comes back, and the others do (rules 21 and 25).
//!
//! A test module reports them as x86's machine check handlers do. From then on the kernel takes no
//! injected error back: `scripts/check` runs the suite in a machine of its own.

use anyhow::{Result, ensure};

use crate::ktap::{CaseResult, Suite, skip};
use crate::pattern::Pattern;
use crate::pressure::{self, Counts, Failing, Memory, Pool};
use crate::store::Store;
use crate::support::directmap::{Hidden, every_pfn, memory, pfns};
use crate::support::hugetlb::{Guest, frames_of};
use crate::support::setup::{GUEST, HIDDEN, Setup};
use crate::sys::*;
use crate::vm::Vcpu;
use crate::{HUGE, MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "hardware_error",
    [
        broken_page_never_comes_back: 120,
        broken_page_of_a_huge_page_never_comes_back: 120,
        broken_page_of_hugetlbfs_never_comes_back: 240,
        // Last: what it leaves outside stays there.
        page_that_cannot_come_back_stays_out: 240,
    ]
);

const SIZE: u64 = 4 * MIB;
/// The page with the error.
const BROKEN: u64 = 37;

/// The broken page is lost to the guest, and no other.
fn expect_lost(vcpu: &mut Vcpu, gpa: u64, size: u64) -> Result<()> {
    vcpu.expect_lost(gpa + BROKEN * PAGE)?;
    expect_neighbours(vcpu, gpa, size)
}

fn expect_neighbours(vcpu: &mut Vcpu, gpa: u64, size: u64) -> Result<()> {
    let after = (BROKEN + 1) * PAGE;
    vcpu.verify(gpa, BROKEN * PAGE, GUEST)?;
    vcpu.verify(gpa + after, size - after, GUEST)
}

/// All have left their file: what is not broken is in the direct map, and empty.
fn expect_given_back(memory: &Memory, pfns: &[u64], gpa: u64) -> Result<()> {
    let size = pfns.len() as u64 * PAGE;
    for (page, pfn) in (0..).zip(pfns) {
        if page == BROKEN {
            ensure!(!memory.has(*pfn)?, "the broken frame {pfn:#x} is in the direct map");
        } else {
            memory.expect_empty(*pfn, GUEST, gpa, size)?;
        }
    }
    Ok(())
}

fn broken_page(huge: &str) -> CaseResult {
    let (memory, hidden, reporter) = (memory()?, Hidden::now()?, Store::load()?);
    let _huge = pressure::shmem_huge(huge)?;
    let absent = memory.absent()?;
    let counts = Counts::now()?;
    let mut s = Setup::filled(HIDDEN, SIZE)?;
    if huge == "always" {
        counts.expect_grown(&["thp_file_alloc"], SIZE / HUGE)?;
    }
    let gpa = s.slot.gpa;
    let pfns = pfns(&s)?;

    reporter.0.hard_error(pfns[BROKEN as usize])?;
    memory.expect_all(&pfns, false, "a page is broken")?;
    expect_lost(&mut s.vcpu, gpa, SIZE)?;
    // The hole makes room for another page in its place.
    punch(&s.fd, BROKEN * PAGE, PAGE)?;
    ensure!(!memory.has(pfns[BROKEN as usize])?, "the hole brought the broken frame back");
    s.vcpu.verify(gpa + BROKEN * PAGE, PAGE, Pattern::ZERO)?;
    expect_neighbours(&mut s.vcpu, gpa, SIZE)?;

    drop(s);
    hidden.expect(0, "the VM is gone")?;
    expect_given_back(&memory, &pfns, gpa)?;
    memory.expect_absent(absent + 1, "in the end")
}

fn broken_page_never_comes_back() -> CaseResult {
    broken_page("never")
}

fn broken_page_of_a_huge_page_never_comes_back() -> CaseResult {
    broken_page("always")
}

/// The broken page stays in the pool, in use, so the pool has to be the machine's.
fn huge_guest() -> Result<Guest> {
    if Pool::of(HUGE)?.usage()?.free == 0 {
        return skip("a huge page that was reserved at boot is wanted");
    }
    Guest::new(HIDDEN, HUGE, 1)
}

fn broken_page_of_hugetlbfs_never_comes_back() -> CaseResult {
    let (memory, hidden, reporter) = (memory()?, Hidden::now()?, Store::load()?);
    for whole in [true, false] {
        let absent = memory.absent()?;
        let mut guest = huge_guest()?;
        let gpa = guest.gpa;
        guest.vcpu.fill(gpa, HUGE, GUEST)?;
        let pfns = every_pfn(frames_of(&guest)?, HUGE)?;

        reporter.0.hard_error(pfns[BROKEN as usize])?;
        memory.expect_all(&pfns, false, "a page is broken")?;
        expect_lost(&mut guest.vcpu, gpa, HUGE)?;
        if !whole {
            punch(&guest.fd, (BROKEN - 1) * PAGE, 3 * PAGE)?;
            memory.expect_all(&pfns, false, "a hole around it")?;
            for page in [BROKEN - 1, BROKEN + 1] {
                guest.vcpu.verify(gpa + page * PAGE, PAGE, Pattern::ZERO)?;
            }
        }
        drop(guest);
        hidden.expect(0, "the VM is gone")?;
        expect_given_back(&memory, &pfns, gpa)?;
        memory.expect_absent(absent + 1, "in the end")?;
    }
    Ok(())
}

/// Its good parts come back one by one, for which the direct map has to be split.
fn page_that_cannot_come_back_stays_out() -> CaseResult {
    let (memory, hidden, reporter) = (memory()?, Hidden::now()?, Store::load()?);
    let pool = Pool::of(HUGE)?;
    let mut guest = huge_guest()?;
    let gpa = guest.gpa;
    guest.vcpu.fill(gpa, HUGE, GUEST)?;
    let pfns = every_pfn(frames_of(&guest)?, HUGE)?;
    let free = pool.usage()?.free;

    // No memory for that either, so that the entry of 2 MiB stays whole.
    let failing = Failing::pages(100, 100_000)?;
    let reported = reporter.0.hard_error(pfns[BROKEN as usize]);
    drop(failing);
    ensure!(matches!(reported, Ok(()) | Err(Errno::ENOMEM)), "the report: {reported:?}");
    expect_lost(&mut guest.vcpu, gpa, HUGE)?;
    let failing = Failing::pages(100, 100_000)?;
    drop(guest);
    drop(failing);

    memory.expect_all(&pfns, false, "the VM is gone")?;
    hidden.expect(HUGE / PAGE - 1, "the VM is gone")?;
    // Nobody gets it.
    ensure!(pool.usage()?.free == free, "the pool has it again");
    let mut next = huge_guest()?;
    next.vcpu.fill(next.gpa, PAGE, GUEST)?;
    ensure!(
        every_pfn(frames_of(&next)?, HUGE).is_ok_and(|next| next != pfns),
        "it is in use again"
    );
    drop(next);
    hidden.expect(HUGE / PAGE - 1, "another one came and went")
}
