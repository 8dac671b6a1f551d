// SPDX-License-Identifier: GPL-2.0
//! Pinned means pinned: the frame that a guest got is its own until it is punched (rule 18).

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};

use crate::ktap::{CaseResult, Suite, skip};
use crate::pressure::{
    self, Cgroup, Counts, Frame, Isolation, MovableZone, Swap, Trace, expect_online, frames, moved,
};
use crate::support::setup::{BOTH, GUEST, MOVABLE, PINNED, RECLAIMABLE, Setup};
use crate::sys::*;
use crate::{HUGE, MIB, PAGE, mem, suite};

pub static SUITE: Suite = suite!(
    "pinned",
    [
        frames_never_change,
        frames_of_huge_pages_never_change,
        pages_come_from_unmovable_memory,
        block_with_a_pinned_page_does_not_go_offline,
        migration_is_refused_before_isolation: 240,
        unmovable_alone_is_refused_after_isolation,
        reclaim_does_not_look_at_pinned_pages,
        page_older_than_its_binding_is_isolated_once,
        page_older_than_its_binding_is_scanned_once,
        unmovable_alone_keeps_the_frame,
        unreclaimable_alone_keeps_the_page_in_memory,
        pages_stay_pinned_when_their_slot_is_deleted,
        pages_stay_pinned_when_their_vm_is_gone,
        huge_pages_stay_pinned_when_their_slot_is_deleted,
        last_unbinding_looks_at_no_page,
        pages_leave_movable_memory_when_they_are_pinned,
    ]
);

const SIZE: u64 = 8 * MIB;

/// A guest with content, and its frames.
fn guest(flags: u64) -> Result<(Setup, BTreeMap<u64, Frame>)> {
    let mut s = Setup::with_flags(flags, SIZE)?;
    s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
    let frames = frames(&s.vcpu, &s.slot, &s.fd)?;
    ensure!(frames.len() as u64 == SIZE / PAGE, "{} pages were traced", frames.len());
    Ok((s, frames))
}

fn expect_same_frames(s: &Setup, before: &BTreeMap<u64, Frame>, when: &str) -> Result<()> {
    for (offset, now) in frames(&s.vcpu, &s.slot, &s.fd)? {
        let old = before.get(&offset);
        ensure!(old == Some(&now), "{when}: the page at +{offset:#x} was {old:x?}, is {now:x?}");
    }
    Ok(())
}

/// All that moves or takes movable or reclaimable pages.
fn under_all_pressure() -> CaseResult {
    lock_own_memory()?;
    let (cgroup, zone, _swap) = (Cgroup::enter()?, MovableZone::make(1)?, Swap::on(64 * MIB)?);
    let (mut s, before) = guest(PINNED)?;
    let counts = Counts::now()?;
    for round in 0..2 {
        pressure::compact()?;
        expect_same_frames(&s, &before, "after compaction")?;
        zone.shuffle()?;
        expect_same_frames(&s, &before, "after a block went offline")?;
        cgroup.reclaim(SIZE)?;
        expect_same_frames(&s, &before, "after reclaim")?;
        pressure::drop_caches()?;
        pressure::gigantic_pages(1)?;
        expect_same_frames(&s, &before, "after an allocation of 1 GiB")?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST).with_context(|| format!("round {round}"))?;
    }
    counts.expect_same(&["memfile.migrate", "memfile.swap_out", "memfile.invalidate"])?;
    // The pressure was real: the program's own pages, or those of others, had to move.
    counts.expect_grown(&["compact_migrate_scanned"], 1)
}

fn frames_never_change() -> CaseResult {
    under_all_pressure()
}

fn frames_of_huge_pages_never_change() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    under_all_pressure()
}

/// Neither in the zone nor in the blocks that the kernel keeps for movable pages.
fn pages_come_from_unmovable_memory() -> CaseResult {
    const UNMOVABLE: u64 = 0;
    let zone = MovableZone::make(1)?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let trace = Trace::start(&["kmem:mm_page_alloc"])?;
        let mut s = Setup::with_flags(PINNED, SIZE)?;
        trace.clear()?;
        s.vcpu.fill_pages(s.slot.gpa, s.slot.size, GUEST)?;
        let mut types = BTreeMap::new();
        for event in trace.events()? {
            if let (Some(pfn), Some(kind)) = (event.hex("pfn"), event.number("migratetype")) {
                types.insert(pfn, kind);
            }
        }
        drop(trace);
        let frames = frames(&s.vcpu, &s.slot, &s.fd)?;
        for (offset, frame) in &frames {
            let head = frame.pfn & !((1 << frame.order) - 1);
            let kind = types.get(&head).with_context(|| format!("{frame:x?} is not new"))?;
            ensure!(*kind == UNMOVABLE, "+{offset:#x} {frame:x?} is of migrate type {kind}");
            ensure!(!zone.holds(frame.pfn)?, "+{offset:#x} {frame:x?} is in the movable zone");
        }
        println!("huge pages {huge}: {} pages seen", frames.len());
    }
    Ok(())
}

fn block_with_a_pinned_page_does_not_go_offline() -> CaseResult {
    // Until one lies where the kernel tries.
    let (mut tried, mut guests) = (0, Vec::new());
    while tried == 0 && guests.len() < 12 {
        let mut s = Setup::filled(PINNED, 32 * MIB)?;
        let before = frames(&s.vcpu, &s.slot, &s.fd)?;
        let pages: Vec<u64> = before.values().map(|frame| frame.pfn).collect();
        tried += expect_online(&pages)?;
        expect_same_frames(&s, &before, "after the attempts")?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
        guests.push(s);
    }
    println!("{tried} blocks were tried, {} guests", guests.len());
    if tried == 0 {
        return skip("no block with their pages can go offline here");
    }
    Ok(())
}

/// A guest with each eighth page left, all of them older than the binding with these flags, and
/// most free memory above them. (The kernel allocates memory from its end. Compaction looks for
/// room from there, and for pages to move from the start, until the two meet.)
fn older_guest(flags: u64) -> Result<(Setup, BTreeMap<u64, Frame>)> {
    let stride = 8 * PAGE;
    let above = mem::meminfo("MemFree")?.saturating_sub(64 * MIB) & !(HUGE - 1);
    // An ordinary memfd: compaction can still move pages to its blocks.
    let filler = memfd(above.max(HUGE))?;
    allocate(&filler, 0, above.max(HUGE)).context("memory above the guest")?;
    let mut s = Setup::allocated_first(flags, SIZE)?;
    s.vcpu.fill_pages(s.slot.gpa, s.slot.size, GUEST)?;
    let mut before = frames(&s.vcpu, &s.slot, &s.fd)?;
    before.retain(|offset, _| offset % stride == 0);
    for offset in (0..SIZE).step_by(stride as usize) {
        punch(&s.fd, offset + PAGE, stride - PAGE)?;
    }
    drop(filler);
    Ok((s, before))
}

/// An [`older_guest`] that a compaction has scanned; not every compaction does.
fn compacted_guest(flags: u64) -> Result<(Setup, BTreeMap<u64, Frame>, Isolation)> {
    for _ in 0..9 {
        let (s, before) = older_guest(flags)?;
        let isolation = Isolation::during(&before, pressure::compact)?;
        if isolation.seen > 0 {
            return Ok((s, before, isolation));
        }
    }
    bail!("no compaction came by")
}

/// The pages of [`older_guest`] have the same frames and content. This fills the holes.
fn expect_left_alone(mut s: Setup, before: &BTreeMap<u64, Frame>) -> CaseResult {
    for offset in before.keys() {
        s.vcpu.verify_pages(s.slot.gpa + offset, PAGE, GUEST)?;
    }
    let moved = moved(before, &frames(&s.vcpu, &s.slot, &s.fd)?);
    ensure!(moved == 0, "{moved} pages have moved");
    Ok(())
}

fn migration_is_refused_before_isolation() -> CaseResult {
    let _pages = pressure::base_pages()?;
    lock_own_memory()?;
    let (cgroup, _swap) = (Cgroup::enter()?, Swap::on(64 * MIB)?);
    // A compaction scans some of the pages: take more guests until it is enough.
    let (mut rounds, mut seen, mut vain) = (0, 0, 0);
    while seen < 32 && rounds < 40 {
        let (s, before) = older_guest(PINNED)?;
        // They are older than the binding: reclaim puts them aside.
        pressure::drop_caches()?;
        cgroup.reclaim(SIZE)?;
        let isolation = Isolation::during(&before, pressure::compact)?;
        expect_left_alone(s, &before)?;
        (rounds, seen, vain) = (rounds + 1, seen + isolation.seen, vain + isolation.vain);
    }
    ensure!(seen >= 32, "only {seen} pages were looked at");
    // Each time there may be another page that does not move.
    ensure!(vain <= rounds + seen / 8, "{vain} of {seen} pages were isolated in vain");
    Ok(())
}

/// Pages that are older than the binding are still on the evictable lists. If compaction isolates
/// one, its migration is refused, and it is put on the right list.
fn page_older_than_its_binding_is_isolated_once() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let (s, before, first) = compacted_guest(PINNED)?;
    first.expect_vain()?;
    // A compaction may end before it has seen all of them.
    let mut vain = first.vain;
    for _ in 0..3 {
        vain += Isolation::during(&before, pressure::compact)?.vain;
    }
    let pages = before.len() as u64;
    ensure!(vain < pages + pages / 8, "{pages} pages were isolated {vain} times");
    expect_left_alone(s, &before)
}

/// Compaction that may wait looks at the mapping of unevictable pages only: the others it isolates,
/// is refused, and puts them back.
fn unmovable_alone_is_refused_after_isolation() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let (s, before, first) = compacted_guest(RECLAIMABLE)?;
    first.expect_vain()?;
    // Not every compaction comes by.
    let mut again = Isolation::during(&before, pressure::compact)?;
    for _ in 0..8 {
        if again.seen > 0 {
            break;
        }
        again = Isolation::during(&before, pressure::compact)?;
    }
    again.expect_vain()?;
    expect_left_alone(s, &before)
}

/// Reclaim, too, looks at each page that is older than the binding once, and puts it aside.
fn scanned_once() -> CaseResult {
    lock_own_memory()?;
    let (cgroup, _swap) = (Cgroup::enter()?, Swap::on(64 * MIB)?);
    let mut s = Setup::allocated_first(PINNED, SIZE)?;
    s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
    // Pages in the lists of the CPUs join the lists of the zone.
    pressure::drop_caches()?;
    let before = frames(&s.vcpu, &s.slot, &s.fd)?;
    let counts = Counts::now()?;
    let reclaim = || -> Result<u64> {
        let scanned = || cgroup.line("memory.stat", "pgscan");
        let start = scanned()?;
        for _ in 0..4 {
            cgroup.reclaim(SIZE)?;
        }
        Ok(scanned()? - start)
    };
    let (first, again, all) = (reclaim()?, reclaim()?, SIZE / PAGE);
    println!("of {all} pages {first} were scanned, and {again} again");
    ensure!(first >= all / 2, "reclaim hardly looked");
    ensure!(first + again < all + all / 8, "reclaim looked again");
    expect_same_frames(&s, &before, "after reclaim")?;
    counts.expect_same(&["memfile.migrate", "memfile.swap_out", "memfile.invalidate"])?;
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)
}

fn page_older_than_its_binding_is_scanned_once() -> CaseResult {
    scanned_once()?;
    let _generations = pressure::generations()?;
    scanned_once()
}

fn reclaim_does_not_look_at_pinned_pages() -> CaseResult {
    lock_own_memory()?;
    let (cgroup, _swap) = (Cgroup::enter()?, Swap::on(64 * MIB)?);
    let unevictable = || -> Result<u64> {
        mem::refresh_counters();
        mem::meminfo("Unevictable")
    };
    let before = unevictable()?;
    let (mut s, _) = guest(PINNED)?;
    let grown = unevictable()? - before;
    ensure!(grown + MIB > SIZE, "only {} KiB of {} are unevictable", grown >> 10, SIZE >> 10);
    let scanned = || -> Result<u64> { cgroup.line("memory.stat", "pgscan") };
    let before = scanned()?;
    for _ in 0..4 {
        cgroup.reclaim(SIZE)?;
    }
    let pages = scanned()? - before;
    println!("{pages} pages scanned, {} are pinned", SIZE / PAGE);
    ensure!(pages < SIZE / PAGE / 4, "reclaim scanned {pages} pages");
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)
}

/// Swap may take the page, and then it comes back elsewhere; but nothing moves it.
fn unmovable_alone_keeps_the_frame() -> CaseResult {
    let zone = MovableZone::make(1)?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let (mut s, before) = guest(RECLAIMABLE)?;
        let counts = Counts::now()?;
        for frame in before.values() {
            ensure!(!zone.holds(frame.pfn)?, "{frame:x?} is in the movable zone");
        }
        pressure::compact()?;
        zone.shuffle()?;
        expect_same_frames(&s, &before, "after compaction")?;
        counts.expect_same(&["memfile.migrate"])?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
    }
    Ok(())
}

fn unreclaimable_alone_keeps_the_page_in_memory() -> CaseResult {
    lock_own_memory()?;
    let (cgroup, swap) = (Cgroup::enter()?, Swap::on(64 * MIB)?);
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let (mut s, before) = guest(MOVABLE)?;
        let counts = Counts::now()?;
        ensure!(!cgroup.reclaim(SIZE)?, "as much as the guest has was reclaimed");
        counts.expect_same(&["memfile.swap_out"])?;
        swap.expect_used(0, "after reclaim")?;
        expect_same_frames(&s, &before, "after reclaim")?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
    }
    Ok(())
}

/// All that moves or takes pages, while there is no binding: what `unbound` does around its work.
/// No page moves or goes to swap, because promises hold until pages are punched (rule 8).
fn pressed_while(
    unbound: impl FnOnce(Setup, &dyn Fn() -> CaseResult) -> Result<Setup>,
) -> CaseResult {
    lock_own_memory()?;
    let (cgroup, zone, swap) = (Cgroup::enter()?, MovableZone::make(1)?, Swap::on(64 * MIB)?);
    let (s, before) = guest(PINNED)?;
    let counts = Counts::now()?;
    let mut s = unbound(s, &|| {
        for _ in 0..2 {
            cgroup.reclaim(SIZE)?;
            pressure::compact()?;
            zone.shuffle()?;
            pressure::drop_caches()?;
            pressure::gigantic_pages(1)?;
        }
        swap.expect_used(0, "while there was no binding")?;
        let swapped = cgroup.get("memory.swap.current")?;
        ensure!(swapped == 0, "the cgroup has {swapped} bytes in swap");
        let counters = ["memfile.migrate", "memfile.swap_out", "memfile.invalidate", "pswpout"];
        counts.expect_same(&counters)?;
        // The pressure was real.
        counts.expect_grown(&["compact_migrate_scanned"], 1)
    })?;
    expect_same_frames(&s, &before, "bound again")?;
    s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
    // They stay there.
    cgroup.reclaim(SIZE)?;
    pressure::compact()?;
    expect_same_frames(&s, &before, "bound again and pressed")?;
    swap.expect_used(0, "bound again")
}

fn without_its_slot(s: Setup, work: &dyn Fn() -> CaseResult) -> Result<Setup> {
    s.vm.raw_delete(s.slot.id)?;
    work()?;
    s.bind_again()?;
    Ok(s)
}

fn pages_stay_pinned_when_their_slot_is_deleted() -> CaseResult {
    pressed_while(without_its_slot)
}

fn huge_pages_stay_pinned_when_their_slot_is_deleted() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    pressed_while(without_its_slot)
}

fn pages_stay_pinned_when_their_vm_is_gone() -> CaseResult {
    pressed_while(|s, work| s.pass_on_after(PINNED, work))
}

/// What the pages were promised holds (rule 8), so nothing has to be done to each of them while
/// KVM holds `slots_lock`. Pages that change their promise are looked up in lists of the reclaim,
/// which counts them.
fn last_unbinding_looks_at_no_page() -> CaseResult {
    for flags in [PINNED, MOVABLE, RECLAIMABLE, BOTH] {
        let (s, _) = guest(flags)?;
        let before = mem::vmstat("unevictable_pgs_scanned")?;
        s.vm.raw_delete(s.slot.id)?;
        // Few, because others may unlock memory of theirs.
        let scanned = mem::vmstat("unevictable_pgs_scanned")? - before;
        ensure!(scanned < SIZE / PAGE / 2, "flags {flags:#x}: {scanned} pages were looked at");
        s.bind_again()?;
    }
    Ok(())
}

/// Pages that were movable, and are bound again as pinned, do not stay in the movable zone.
fn pages_leave_movable_memory_when_they_are_pinned() -> CaseResult {
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        for (first, second) in [(MOVABLE, PINNED), (BOTH, PINNED), (BOTH, RECLAIMABLE)] {
            let zone = MovableZone::make(1)?;
            let (s, before) = guest(first)?;
            for (offset, frame) in &before {
                ensure!(
                    zone.holds(frame.pfn)?,
                    "the page at +{offset:#x} is elsewhere: {frame:x?}"
                );
            }
            let mut s = s.pass_on(second)?;
            let after = frames(&s.vcpu, &s.slot, &s.fd)?;
            for (offset, frame) in &after {
                ensure!(!zone.holds(frame.pfn)?, "the page at +{offset:#x} stays: {frame:x?}");
            }
            zone.shuffle()?;
            expect_same_frames(&s, &after, "after the block went offline")?;
            s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
        }
    }
    Ok(())
}
