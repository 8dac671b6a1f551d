// SPDX-License-Identifier: GPL-2.0
//! zswap may refuse a page: pages that leave are counted, and pages that stay are not unmapped.

use anyhow::{Result, ensure};

use crate::ktap::{CaseResult, Suite};
use crate::pattern::Pattern;
use crate::pressure::{self, Cgroup, Counts, Setting, Swap};
use crate::support::setup::{BOTH, GUEST, Setup};
use crate::sys::*;
use crate::{MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "zswap",
    [
        pages_go_to_the_pool_and_come_back,
        full_pool_is_known_before_guests_lose_a_page,
        limit_of_a_cgroup_is_known_before_guests_lose_a_page,
        what_the_pool_does_not_take_is_not_counted_as_gone,
    ]
);

const SIZE: u64 = 8 * MIB;
const PAGES: u64 = SIZE / PAGE;

/// A cgroup and swap behind zswap, which pages never leave for the swap device.
///
/// Field order: the cgroup's setting is restored before the cgroup is removed.
struct Host {
    _settings: [Setting; 2],
    swap: Swap,
    cgroup: Cgroup,
}

/// How much of the memory the pool may have.
fn pool(percent: u32) -> Result<Setting> {
    Setting::set("/sys/module/zswap/parameters/max_pool_percent", &percent.to_string())
}

impl Host {
    fn new() -> Result<Host> {
        lock_own_memory()?;
        let enabled = Setting::set("/sys/module/zswap/parameters/enabled", "Y")?;
        let cgroup = Cgroup::enter()?;
        let writeback = cgroup.setting("memory.zswap.writeback", "0")?;
        Ok(Host { cgroup, swap: Swap::on(64 * MIB)?, _settings: [writeback, enabled] })
    }

    /// Reclaim as much as possible.
    fn reclaim(&self) -> CaseResult {
        for _ in 0..8 {
            self.cgroup.reclaim_unused(SIZE)?;
        }
        Ok(())
    }
}

/// A guest whose pages compress well: a word each.
fn thin(pattern: Pattern) -> Result<Setup> {
    let mut s = Setup::with_flags(BOTH, SIZE)?;
    s.vcpu.fill_pages(s.slot.gpa, SIZE, pattern)?;
    Ok(s)
}

fn pages_go_to_the_pool_and_come_back() -> CaseResult {
    let host = Host::new()?;
    let _pool = pool(50)?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let mut s = thin(GUEST)?;
        for generation in 0..2 {
            let pattern = Pattern::Generation(generation);
            s.vcpu.fill_pages(s.slot.gpa, SIZE, pattern)?;
            let counts = Counts::now()?;
            host.reclaim()?;
            ensure!(s.resident()? == 0, "{} pages are still in memory", s.resident()?);
            counts.expect_grown(&["zswpout"], PAGES)?;
            counts.expect_grown(&["memfile.swap_out", "memfile.invalidate"], 1)?;
            counts.expect_same(&["pswpout"])?;
            host.swap.expect_used(SIZE, "all in the pool")?;
            s.vcpu.verify_pages(s.slot.gpa, SIZE, pattern)?;
            counts.expect_grown(&["zswpin"], PAGES)?;
        }
    }
    Ok(())
}

fn full_pool_is_known_before_guests_lose_a_page() -> CaseResult {
    no_page_is_lost_to(|_| pool(0))
}

fn limit_of_a_cgroup_is_known_before_guests_lose_a_page() -> CaseResult {
    no_page_is_lost_to(|host| host.cgroup.setting("memory.zswap.max", "0"))
}

/// Half of the guest goes to swap, then there is no room any more: reclaim tries repeatedly, and takes
/// no page from the guest.
fn no_page_is_lost_to(fill: impl Fn(&Host) -> Result<Setting>) -> CaseResult {
    let host = Host::new()?;
    let attempts = 8;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let mut s = thin(GUEST)?;
        let gpa = s.slot.gpa;
        let room = pool(50)?;
        pressure::drop_caches()?;
        host.cgroup.reclaim(SIZE / 2)?;
        let left = s.resident()?;
        println!("huge pages {huge}: {left} of {PAGES} pages stay");
        ensure!((1..PAGES).contains(&left), "{left} pages stay");
        // Pages that the guest has not read back yet do not count.
        let full = fill(&host)?;
        let counts = Counts::now()?;
        for _ in 0..attempts {
            host.reclaim()?;
        }
        ensure!(s.resident()? == left, "{} pages stay of {left}", s.resident()?);
        counts.expect_same(&[
            "memfile.invalidate",
            "memfile.swap_out",
            "memfile.swap_out_undone",
        ])?;
        s.vcpu.verify_pages(gpa, SIZE, GUEST)?;
        drop((full, room));
        // When there is room again, they go to zswap.
        let _room = pool(50)?;
        host.reclaim()?;
        ensure!(s.resident()? == 0, "{} pages are still in memory", s.resident()?);
        s.vcpu.verify_pages(gpa, SIZE, GUEST)?;
    }
    Ok(())
}

/// Pages that do not compress are refused by zswap, but late.
fn what_the_pool_does_not_take_is_not_counted_as_gone() -> CaseResult {
    let host = Host::new()?;
    let _pool = pool(50)?;
    for huge in ["never", "always"] {
        let _huge = pressure::shmem_huge(huge)?;
        let mut s = Setup::with_flags(BOTH, SIZE)?;
        let gpa = s.slot.gpa;
        s.vcpu.fill(gpa, SIZE / 2, GUEST)?;
        s.vcpu.fill_pages(gpa + SIZE / 2, SIZE / 2, GUEST)?;
        let counts = Counts::now()?;
        host.reclaim()?;
        let left = s.resident()?;
        ensure!(left == PAGES / 2, "{left} pages stay, not {}", PAGES / 2);
        let (gone, undone) =
            (counts.grown("memfile.swap_out")?, counts.grown("memfile.swap_out_undone")?);
        println!("huge pages {huge}: {gone} folios have left, {undone} did and came back");
        // That many pages, in fewer folios if they are large.
        let pages = host.swap.used()? / PAGE;
        ensure!(pages == PAGES / 2, "{pages} pages are in swap");
        ensure!(gone > 0 && gone <= pages, "{gone} folios were counted for {pages} pages");
        ensure!(huge == "always" || gone == pages, "{gone} folios were counted for {pages} pages");
        ensure!(undone > 0, "nothing came back");
        s.vcpu.verify(gpa, SIZE / 2, GUEST)?;
        s.vcpu.verify_pages(gpa + SIZE / 2, SIZE / 2, GUEST)?;
    }
    Ok(())
}
