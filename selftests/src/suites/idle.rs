// SPDX-License-Identifier: GPL-2.0
//! Idle page tracking and DAMON see what guests use (rule 19).

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::guest::Command;
use crate::ktap::{CaseResult, Suite};
use crate::pattern::Pattern;
use crate::pressure::{self, Cgroup, Idle, Setting, Swap, Trace, frames};
use crate::support::setup::{BOTH, GUEST, MOVABLE, PINNED, RECLAIMABLE, Setup};
use crate::sys::*;
use crate::{HUGE, MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "idle",
    [
        bitmap_tells_what_the_guest_used,
        what_the_bitmap_found_counts_in_reclaim,
        what_the_bitmap_found_counts_with_the_multi_generational_lru,
        damon_reclaims_what_the_guest_does_not_use: 240,
        damon_reclaims_likewise_with_the_multi_generational_lru: 240,
    ]
);

fn bitmap_tells_what_the_guest_used() -> CaseResult {
    let idle = Idle::open()?;
    let size = 4 * MIB;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        for flags in [PINNED, MOVABLE, RECLAIMABLE, BOTH] {
            let mut s = Setup::with_flags(flags, size)?;
            let gpa = s.slot.gpa;
            s.vcpu.fill(gpa, size, GUEST)?;
            let mut frames = frames(&s.vcpu, &s.slot, &s.fd)?;
            if huge == "always" {
                // The bitmap has large folios by their first page.
                frames.retain(|offset, _| offset % HUGE == 0);
            }
            frames.retain(|_, frame| idle.knows(frame.pfn));
            ensure!(!frames.is_empty(), "the bitmap knows no page of the guest");
            let pfns = || frames.values().map(|frame| frame.pfn);
            for used in [size / 2..size, 0..0, 0..size / 2] {
                idle.mark_all(pfns())?;
                s.vcpu.verify_pages(gpa + used.start, used.end - used.start, GUEST)?;
                for (offset, frame) in &frames {
                    let (got, wanted) = (idle.get(frame.pfn)?, !used.contains(offset));
                    ensure!(
                        got == wanted,
                        "the page at {offset:#x} is {}idle; huge pages {huge}, flags {flags:#x}, \
                         the guest used {used:x?}",
                        if got { "" } else { "not " },
                    );
                }
            }
        }
    }
    Ok(())
}

/// A read of the bitmap clears the accessed bits. Reclaim, which asks next, gets the result.
fn bitmap_found() -> CaseResult {
    let _pages = pressure::base_pages()?;
    lock_own_memory()?;
    let (size, idle) = (8 * MIB, Idle::open()?);
    let (cgroup, _swap) = (Cgroup::enter()?, Swap::on(64 * MIB)?);
    let mut s = Setup::with_flags(BOTH, size)?;
    let (gpa, ino) = (s.slot.gpa, fstat(&s.fd)?.st_ino);
    // Unused pages: both would see a used one.
    let pfns = pressure::reserved_by(&cgroup, || allocate(&s.fd, 0, size).context("reserve"))?;
    ensure!(pfns.len() as u64 == size / PAGE, "{} pages are reserved", pfns.len());
    idle.mark_all(pfns.iter().copied())?;
    // The oldest pages, which are reclaimed first.
    let hot = size / 4;
    s.vcpu.fill_pages(gpa, hot, GUEST)?;
    let mut found = 0;
    for pfn in pfns.iter().filter(|pfn| idle.knows(**pfn)) {
        found += u64::from(!idle.get(*pfn)?);
    }
    // The last few may not be in the bitmap.
    ensure!((hot / PAGE - 63..=hot / PAGE).contains(&found), "{found} pages are not idle");
    let trace = Trace::start(&["memfile:memfile_swap_out"])?;
    cgroup.reclaim(hot)?;
    let gone = trace.events()?;
    let mine = gone.iter().filter(|e| e.number("ino") == Some(ino));
    let all = mine.clone().count();
    let used = mine.filter(|e| e.number("start") < Some(hot / PAGE)).count();
    println!("{used} of {all} swapped out were among the {} that were used", hot / PAGE);
    ensure!(all > 0, "nothing was swapped out");
    ensure!(used <= all / 8, "{used} of {all} swapped out had been used");
    s.vcpu.verify_pages(gpa, hot, GUEST)?;
    s.vcpu.verify(gpa + hot, size - hot, Pattern::ZERO)
}

fn what_the_bitmap_found_counts_in_reclaim() -> CaseResult {
    bitmap_found()
}

fn what_the_bitmap_found_counts_with_the_multi_generational_lru() -> CaseResult {
    let _generations = pressure::generations()?;
    bitmap_found()
}

/// DAMON_RECLAIM at work, until it is dropped. It is switched off first, then set back.
struct Damon {
    _settings: Vec<Setting>,
}

impl Damon {
    /// Reclaim all pages in these page frames that are not used for half a second.
    fn start(pfns: std::ops::Range<u64>) -> Result<Damon> {
        let mut settings = Vec::new();
        let times = [
            ("sample_interval", 20_000),
            ("aggr_interval", 200_000),
            ("min_age", 400_000),
            // No limits.
            ("quota_ms", 0),
            ("quota_sz", 0),
            ("wmarks_interval", 100_000),
            ("wmarks_high", 1000),
            ("wmarks_mid", 1000),
            ("wmarks_low", 0),
            ("monitor_region_start", pfns.start * PAGE),
            ("monitor_region_end", pfns.end * PAGE),
        ];
        for (name, value) in times {
            settings.push(Setting::set(parameter(name), &value.to_string())?);
        }
        settings.insert(0, Setting::set(parameter("enabled"), "Y")?);
        Ok(Damon { _settings: settings })
    }
}

fn parameter(name: &str) -> String {
    format!("/sys/module/damon_reclaim/parameters/{name}")
}

fn damon_reclaims() -> CaseResult {
    lock_own_memory()?;
    let (size, hot) = (16 * MIB, 4 * MIB);
    let (cgroup, _swap) = (Cgroup::enter()?, Swap::on(256 * MIB)?);
    // Others have memory between the guest's.
    let swapped = || cgroup.get("memory.swap.current");
    let mut s = Setup::with_flags(BOTH, size)?;
    let (gpa, ino) = (s.slot.gpa, fstat(&s.fd)?.st_ino);
    s.vcpu.fill(gpa, size, GUEST)?;
    let frames = frames(&s.vcpu, &s.slot, &s.fd)?;
    let pfns = || frames.values().map(|frame| frame.pfn);
    let (first, last) = (pfns().min().context("no frame")?, pfns().max().context("no frame")?);
    pressure::drop_caches()?;
    let mut worker = s.vm.vcpu(1)?;
    worker.post(Command::Watch, &[gpa, gpa + hot, PAGE, 0])?;
    let stopper = worker.stopper();
    let trace = Trace::start(&["memfile:memfile_swap_out"])?;
    thread::scope(|scope| -> CaseResult {
        let watching = scope.spawn(|| worker.run_endless(Command::Watch));
        let damon = (|| -> CaseResult {
            let _damon = Damon::start(first..last + 1)?;
            let limit = Instant::now() + Duration::from_secs(200);
            // Most of the cold pages.
            while swapped()? < (size - hot) / 4 * 3 {
                ensure!(!watching.is_finished(), "the guest does not run");
                ensure!(Instant::now() < limit, "{} KiB were reclaimed", swapped()? >> 10);
                thread::sleep(Duration::from_millis(10));
            }
            Ok(())
        })();
        stopper.stop();
        watching.join().map_err(|_| anyhow!("the vCPU thread panicked"))??;
        damon
    })?;
    let gone = trace.events()?;
    let mine = gone.iter().filter(|e| e.number("ino") == Some(ino));
    let all = mine.clone().count() as u64;
    let used = mine.filter(|e| e.number("start") < Some(hot / PAGE)).count() as u64;
    println!("{used} of {all} paged out were among the {} in use", hot / PAGE);
    ensure!(all > 0, "none of the guest's pages was paged out");
    ensure!(used <= hot / PAGE / 16, "{used} pages in use were paged out");
    s.vcpu.verify(gpa, size, GUEST)?;
    s.vcpu.fill(gpa, size, Pattern::ZERO)
}

fn damon_reclaims_what_the_guest_does_not_use() -> CaseResult {
    damon_reclaims()
}

fn damon_reclaims_likewise_with_the_multi_generational_lru() -> CaseResult {
    let _generations = pressure::generations()?;
    damon_reclaims()
}
