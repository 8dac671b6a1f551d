// SPDX-License-Identifier: GPL-2.0
//! Movable pages of a guest do move, and the guest does not notice (rule 19).
//!
//! The trace events of `get_pfn` show the place of a page, and that it has moved.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use crate::ktap::{CaseResult, Suite};
use crate::pattern::Pattern;
use crate::pressure::{self, Counts, Failing, Frame, MovableZone, Trace, frames, moved};
use crate::support::setup::{BOTH, GUEST, MOVABLE, SLOT, Setup};
use crate::sys::*;
use crate::{MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "migrate",
    [
        new_pages_come_from_movable_memory,
        offlining_moves_pages_and_keeps_content,
        offlining_moves_huge_pages_and_keeps_content,
        compaction_moves_pages_and_keeps_content,
        page_without_a_new_place_stays,
        all_vcpus_see_the_new_place,
        migration_is_traced,
        accounting_is_the_same_afterwards,
    ]
);

const SIZE: u64 = 4 * MIB;

/// A guest with content whose pages lie in blocks that can be taken away.
fn movable_guest(flags: u64, zone: &MovableZone) -> Result<(Setup, BTreeMap<u64, Frame>)> {
    let mut s = Setup::with_flags(flags, SIZE)?;
    s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
    let before = frames(&s.vcpu, &s.slot, &s.fd)?;
    ensure!(before.len() as u64 == SIZE / PAGE, "{} pages were traced", before.len());
    for (offset, frame) in &before {
        ensure!(zone.holds(frame.pfn)?, "the page at +{offset:#x} is elsewhere: {frame:x?}");
    }
    Ok((s, before))
}

fn new_pages_come_from_movable_memory() -> CaseResult {
    let zone = MovableZone::make(1)?;
    for flags in [MOVABLE, BOTH] {
        movable_guest(flags, &zone)?;
    }
    Ok(())
}

/// Take each block away in turn; every page must have moved, none may have changed.
fn offlining_moves(flags: u64) -> CaseResult {
    let zone = MovableZone::make(2)?;
    let (mut s, before) = movable_guest(flags, &zone)?;
    let counts = Counts::now()?;
    let folios = before.values().map(|frame| frame.pfn >> frame.order);
    let folios = folios.collect::<std::collections::BTreeSet<_>>().len() as u64;
    for round in 0..2 {
        for block in &zone.blocks {
            block.offline()?;
            let now = frames(&s.vcpu, &s.slot, &s.fd)?;
            for frame in now.values() {
                ensure!(!block.holds(frame.pfn)?, "{frame:x?} is in a block that is gone");
            }
            s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
            block.give_back("online_movable")?;
        }
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST).with_context(|| format!("round {round}"))?;
    }
    counts.expect_grown(&pressure::MOVED, folios)?;
    let next = Pattern::Generation(7);
    s.vcpu.fill(s.slot.gpa, s.slot.size, next)?;
    zone.shuffle()?;
    s.vcpu.verify(s.slot.gpa, s.slot.size, next)
}

fn offlining_moves_pages_and_keeps_content() -> CaseResult {
    offlining_moves(MOVABLE)?;
    offlining_moves(BOTH)
}

fn offlining_moves_huge_pages_and_keeps_content() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    offlining_moves(MOVABLE)?;
    offlining_moves(BOTH)
}

fn compaction_moves_pages_and_keeps_content() -> CaseResult {
    let _pages = pressure::base_pages()?;
    // Much more memory than the lists of the CPUs, which compaction cannot use.
    let (size, stride) = (32 * MIB, 16 * PAGE);
    let _zone = MovableZone::make(1)?;
    for flags in [MOVABLE, BOTH] {
        let mut s = Setup::with_flags(flags, size)?;
        s.vcpu.fill_pages(s.slot.gpa, s.slot.size, GUEST)?;
        // Leave one page of sixteen: no huge block is free where the guest's memory was.
        for offset in (0..size).step_by(stride as usize) {
            punch(&s.fd, offset + PAGE, stride - PAGE)?;
        }
        let (counts, free) = (Counts::now()?, pressure::free_huge_blocks()?);
        pressure::compact()?;
        counts.expect_grown(&pressure::MOVED, size / stride / 4)?;
        let now = pressure::free_huge_blocks()?;
        // The figure lags behind: CPUs keep freed pages for a while.
        println!("{free} free blocks of 2 MiB before, {now} after");
        for offset in (0..size).step_by(stride as usize) {
            s.vcpu.verify_pages(s.slot.gpa + offset, PAGE, GUEST)?;
        }
        s.vcpu.fill(s.slot.gpa, SIZE, GUEST)?;
        s.vcpu.verify(s.slot.gpa, SIZE, GUEST)?;
    }
    Ok(())
}

/// Migration that finds no memory leaves the page where it is, and the guest its content.
fn page_without_a_new_place_stays() -> CaseResult {
    let zone = MovableZone::make(2)?;
    let (mut s, before) = movable_guest(MOVABLE, &zone)?;
    let counts = Counts::now()?;
    for (n, block) in zone.blocks.iter().enumerate() {
        let failing = Failing::pages(100, 50)?;
        let result = block.raw_offline();
        drop(failing);
        println!("block {n}: {result:?}");
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
        if result.is_ok() {
            block.give_back("online_movable")?;
        }
    }
    counts.expect_grown(&["pgmigrate_fail"], 1)?;
    let after = frames(&s.vcpu, &s.slot, &s.fd)?;
    println!("{} of {} pages moved in the end", moved(&before, &after), before.len());
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
    s.vcpu.fill(s.slot.gpa, s.slot.size, Pattern::Generation(9))?;
    zone.shuffle()?;
    s.vcpu.verify(s.slot.gpa, s.slot.size, Pattern::Generation(9))
}

/// A vCPU that has a page mapped must lose the mapping, also if other vCPUs have it.
fn all_vcpus_see_the_new_place() -> CaseResult {
    let zone = MovableZone::make(2)?;
    let (mut s, _) = movable_guest(BOTH, &zone)?;
    let mut second = s.vm.vcpu(1)?;
    let (gpa, size, mut last) = (s.slot.gpa, s.slot.size, GUEST);
    for (generation, block) in (10..14).zip(zone.blocks.iter().cycle()) {
        let next = Pattern::Generation(generation);
        second.verify(gpa, size, last)?;
        // One block at a time, because pages may come back from the other one to the same place.
        block.offline()?;
        s.vcpu.fill(gpa, size, next)?;
        second.verify(gpa, size, next)?;
        // They share the file's pages, and not the frames that it has left.
        s.vm.raw_delete(SLOT).context("delete the slot")?;
        s.bind_again()?;
        second.verify(gpa, size, next).context("in the file")?;
        block.give_back("online_movable")?;
        last = next;
    }
    Ok(())
}

fn migration_is_traced() -> CaseResult {
    let zone = MovableZone::make(2)?;
    let (s, _) = movable_guest(MOVABLE, &zone)?;
    let ino = fstat(&s.fd)?.st_ino;
    let trace = Trace::start(&[
        "memfile:memfile_migrate",
        "memfile:memfile_invalidate_start",
        "memfile:memfile_invalidate_end",
    ])?;
    zone.shuffle()?;
    let events = trace.events()?;
    let of = |name: &str| -> Vec<(u64, u64)> {
        let mine = events.iter().filter(|e| e.name == name && e.number("ino") == Some(ino));
        mine.filter_map(|e| Some((e.number("start")?, e.number("end")?))).collect()
    };
    let (started, ended) = (of("memfile_invalidate_start"), of("memfile_invalidate_end"));
    let moved = of("memfile_migrate");
    println!("{} invalidations, {} pages moved", started.len(), moved.len());
    ensure!(!moved.is_empty(), "no migration was traced");
    ensure!(started == ended, "the invalidations do not pair up");
    ensure!(moved.iter().all(|range| started.contains(range)), "a page moved uninvalidated");
    Ok(())
}

fn accounting_is_the_same_afterwards() -> CaseResult {
    let zone = MovableZone::make(2)?;
    let before = pressure::Accounts::now()?;
    for flags in [MOVABLE, BOTH] {
        let (s, _) = movable_guest(flags, &zone)?;
        let held = pressure::Accounts::now()?;
        zone.shuffle()?;
        held.expect_back(MIB).context("while the guest lives")?;
        expect_allocated(&s.fd, SIZE, "after migration")?;
        drop(s);
        before.expect_back(MIB).context("after the guest")?;
    }
    Ok(())
}
