// SPDX-License-Identifier: GPL-2.0
//! A guest checks every word it reads while the host compacts, reclaims, takes memory blocks away,
//! punches and converts: for each choice of flags, page size and number of vCPUs (rules 14 to 19).
//!
//! [`crate::support::stress`] describes how a wrong word is found; its controls test these cases as
//! well.

use std::time::Duration;

use anyhow::Context;

use crate::ktap::{Case, CaseResult, Suite};
use crate::pressure::{self, Cgroup, Counts, MovableZone, Swap};
use crate::support::setup::{BOTH, LAYOUTS, MOVABLE, PINNED, RECLAIMABLE, Setup};
use crate::support::stress::{Action, Bench, EVERYTHING, Host, Length, PAGES};
use crate::sys::lock_own_memory;
use crate::{MIB, PAGE};

/// How long each lasts.
const DURATION: Duration = Duration::from_millis(1500);

/// Actions of the host in addition to [`EVERYTHING`].
const MOTION: [Action; 3] = [Action::Compact, Action::Reclaim, Action::Take];

fn checked(flags: u64, huge: &str, vcpus: u64) -> CaseResult {
    lock_own_memory()?;
    let _huge = pressure::shmem_huge(huge)?;
    let _swap = Swap::on(64 * MIB)?;
    let (cgroup, zone) = (Cgroup::enter()?, MovableZone::make(2)?);
    let host = Host { cgroup, take: Box::new(move || zone.shuffle()) };
    let s = Setup::with_flags(flags, PAGES * PAGE)?;
    let counts = Counts::now()?;
    let bench = Bench::of(s, LAYOUTS[0], Some(host), Length::Time(DURATION))?;
    // The vCPUs find all pages in swap, if they may go there.
    for _ in 0..4 {
        bench.host()?.cgroup.reclaim(PAGES * PAGE)?;
    }
    bench.run(vcpus, &[&MOTION[..], &EVERYTHING].concat())?;
    // Each allowed event has happened, and no other.
    let happened = |names: &[&str], may: bool| match may {
        true => counts.expect_grown(names, 1),
        false => counts.expect_same(names),
    };
    happened(&["memfile.migrate"], flags == MOVABLE || flags == BOTH)?;
    happened(&["memfile.swap_out"], flags == RECLAIMABLE || flags == BOTH).context("swap")?;
    if huge == "always" {
        counts.expect_grown(&["thp_file_alloc"], 1)?;
    }
    counts.expect_grown(&["memfile.punch", "memfile.get_pfn"], 1)
}

/// Declare a case per line.
macro_rules! cases {
    ($($name:ident: $flags:ident $huge:literal $vcpus:literal,)*) => {
        pub static SUITE: Suite = Suite {
            name: "motion",
            cases: &[$(Case {
                name: stringify!($name),
                func: || checked($flags, $huge, $vcpus),
                limit: crate::ktap::TIME_LIMIT,
            }),*],
            hidden: false,
            together: false,
        };
    };
}

cases! {
    pinned_4k_one_vcpu: PINNED "never" 1,
    pinned_4k_several_vcpus: PINNED "never" 3,
    pinned_huge_one_vcpu: PINNED "always" 1,
    pinned_huge_several_vcpus: PINNED "always" 3,
    movable_4k_one_vcpu: MOVABLE "never" 1,
    movable_4k_several_vcpus: MOVABLE "never" 3,
    movable_huge_one_vcpu: MOVABLE "always" 1,
    movable_huge_several_vcpus: MOVABLE "always" 3,
    reclaimable_4k_one_vcpu: RECLAIMABLE "never" 1,
    reclaimable_4k_several_vcpus: RECLAIMABLE "never" 3,
    reclaimable_huge_one_vcpu: RECLAIMABLE "always" 1,
    reclaimable_huge_several_vcpus: RECLAIMABLE "always" 3,
    both_4k_one_vcpu: BOTH "never" 1,
    both_4k_several_vcpus: BOTH "never" 3,
    both_huge_one_vcpu: BOTH "always" 1,
    both_huge_several_vcpus: BOTH "always" 3,
}
