// SPDX-License-Identifier: GPL-2.0
//! How long a fault is held off by invalidations of other pages.
//!
//! KVM keeps one range for all running invalidations: their union, reset when none is running any
//! more. A fault inside of it starts over, also where no page is being taken away. The worst case
//! is many reclaimers whose pages lie on both sides. Counted in tries, not in time: in an emulated
//! machine many of them are one reclaimer that has no CPU.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Result, anyhow, bail, ensure};

use crate::ktap::{CaseResult, Suite};
use crate::pressure::{Cgroup, Counts, Swap, base_pages};
use crate::support::setup::{BOTH, GUEST, Setup};
use crate::sys::lock_own_memory;
use crate::{MIB, PAGE, suite};

pub static SUITE: Suite = suite!("starvation", [faults_between_many_reclaimers_get_through: 120]);

const RECLAIMERS: usize = 8;
/// The part that is reclaimed repeatedly: this many bytes at each end of the slot.
const END: u64 = 8 * MIB;
/// The part between the ends, which is touched for the first time meanwhile.
const FRESH: u64 = 2 * MIB;
const SIZE: u64 = 2 * END + FRESH;

/// Tries of a fault: of half of them at most, of 99 in 100, of all.
type Tries = [u64; 3];

/// Private memory compared with anonymous memory, for which KVM does the same in the callbacks of
/// an mmu_notifier.
fn faults_between_many_reclaimers_get_through() -> CaseResult {
    let _pages = base_pages()?;
    let anonymous = measure(false)?;
    let private = measure(true)?;
    println!("tries, half, 99 in 100, all: private {private:?}, anonymous {anonymous:?}");
    ensure!(private[0] == 1, "half of the faults are not through at once");
    Ok(())
}

fn measure(private: bool) -> Result<Tries> {
    let (cgroup, _swap) = (Cgroup::enter()?, Swap::on(64 * MIB)?);
    let mut s = Setup::with_flags(BOTH, SIZE)?;
    if private {
        lock_own_memory()?;
    } else {
        s.vm.set_shared(s.slot.gpa, s.slot.size)?;
    }
    let mut user = s.vm.vcpu(1)?;
    let ends = [s.slot.gpa, s.slot.gpa + END + FRESH];
    for end in ends {
        user.fill_pages(end, END, GUEST)?;
    }
    let (stats, counts) = (s.vcpu.stats()?, Counts::now()?);
    // The rest of a command's cost: the second store to a page.
    s.vcpu.store(s.slot.gpa + END, 1)?;

    let done = AtomicBool::new(false);
    let mut tries = thread::scope(|scope| -> Result<Vec<u64>> {
        let reclaim = || -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                cgroup.raw_reclaim(MIB).ok();
            }
            Ok(())
        };
        let reclaimers: Vec<_> = (0..RECLAIMERS).map(|_| scope.spawn(reclaim)).collect();
        let user = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                for end in ends {
                    user.verify_pages(end, END, GUEST)?;
                }
            }
            Ok(())
        });
        let fresh = (PAGE..FRESH).step_by(PAGE as usize).map(|offset| -> Result<u64> {
            let before = stats.get("pf_taken")?;
            s.vcpu.store(s.slot.gpa + END + offset, offset)?;
            Ok(stats.get("pf_taken")? - before)
        });
        let tries = fresh.collect::<Result<Vec<u64>>>();
        done.store(true, Ordering::Relaxed);
        for thread in reclaimers.into_iter().chain([user]) {
            thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        }
        tries
    })?;
    let left = if private { "memfile.swap_out" } else { "pswpout" };
    counts.expect_grown(&[left], 1)?;
    println!("{left} meanwhile: {}", counts.grown(left)?);
    // No content was lost.
    let (word, fresh) = (s.slot.gpa + END + 5 * PAGE, 5 * PAGE);
    let (first, second) = (s.vcpu.load(word)?, s.vcpu.load(word + 8)?);
    ensure!((first, second) == (fresh, 0), "page 5 has {first:#x} and {second:#x}");
    tries.sort_unstable();
    let at = |percent: usize| tries.get((tries.len() - 1) * percent / 100).copied();
    let [Some(half), Some(most), Some(all)] = [50, 99, 100].map(at) else {
        bail!("no fault");
    };
    Ok([half, most, all])
}
