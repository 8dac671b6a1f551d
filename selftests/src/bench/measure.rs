// SPDX-License-Identifier: GPL-2.0
//! The cost of an operation, and the report.

use std::ops::{AddAssign, Sub};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::skip::Skip;
use crate::sys;
use crate::vm::Stats;

/// KVM's requests to flush the TLBs of a VM.
const FLUSHES: &str = "remote_tlb_flush_requests";

/// Windows that were begun.
static WINDOWS: AtomicU32 = AtomicU32::new(0);

/// The cost of some work, or the difference or sum of several costs.
#[derive(Clone, Debug, Default)]
pub struct Cost {
    instructions: i64,
    /// Unknown without statistics.
    flushes: Option<i64>,
    /// The windows of scripts/profile.c: number, and how often they count.
    windows: Vec<(u32, i32)>,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.instructions += other.instructions;
        // Nothing yet: a sum begins with the default value.
        self.flushes = match (self.windows.is_empty(), self.flushes, other.flushes) {
            (true, None, flushes) => flushes,
            (_, Some(a), Some(b)) => Some(a + b),
            _ => None,
        };
        self.windows.extend(other.windows);
    }
}

impl Sub<&Cost> for Cost {
    type Output = Cost;

    fn sub(mut self, other: &Cost) -> Cost {
        self.instructions -= other.instructions;
        self.flushes = self.flushes.zip(other.flushes).map(|(a, b)| a - b);
        self.windows.extend(other.windows.iter().map(|(number, times)| (*number, -times)));
        self
    }
}

/// The cost of those of `times` operations that no interrupt came into, and how many these are. A
/// tick of the timer takes as long as two short operations, and which of them it meets is chance. An
/// eighth of them is enough: all cost the same, and long ones meet a tick more often than not.
pub fn undisturbed(
    times: u64,
    mut operation: impl FnMut(u64) -> Result<Cost>,
) -> Result<(Cost, u64)> {
    let (mut total, mut counted) = (Cost::default(), 0);
    for n in 0..times {
        let before = sys::interrupts()?;
        let cost = operation(n)?;
        if sys::interrupts()? == before {
            total += cost;
            counted += 1;
        }
    }
    ensure!(counted >= times / 8, "interrupts came into {} of {times}", times - counted);
    Ok((total, counted))
}

/// One figure of one run.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// The operation.
    pub name: String,
    /// The kind of memory.
    pub subject: &'static str,
    /// Bytes of the pages that the memory consists of.
    pub page: u64,
    /// The run; all are of the same boot.
    pub run: u32,
    /// The number of operations.
    pub times: u64,
    /// Instructions of all of them.
    pub instructions: i64,
    /// KVM's requests to flush TLBs.
    pub flushes: Option<i64>,
    /// The windows of scripts/profile.c that make up the operations.
    pub windows: Vec<(u32, i32)>,
}

/// The cost of an operation at one size of its surroundings.
#[derive(Clone, Debug, Serialize)]
pub struct Point {
    /// The size: a number of things, or bytes, as the figure's name says.
    pub size: u64,
    /// The work of the operation, which its cost may grow with.
    pub work: u64,
    #[serde(flatten)]
    pub figure: Figure,
}

/// A figure that this machine does not give.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Missing {
    pub name: String,
    pub subject: &'static str,
    pub reason: String,
}

#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    pub kernel: String,
    pub figures: Vec<Figure>,
    pub growth: Vec<Point>,
    pub missing: Vec<Missing>,
    /// The figures that are wanted; all if there are none.
    #[serde(skip)]
    only: Vec<String>,
    #[serde(skip)]
    run: u32,
}

/// The subject of the figures of an operation.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    pub name: &'static str,
    /// Bytes of its pages.
    pub page: u64,
}

impl Report {
    /// A report of these figures, or of all if none is named.
    pub fn new(only: Vec<String>) -> Result<Report> {
        Ok(Report { kernel: sys::kernel_release()?, only, ..Report::default() })
    }

    /// The figures that follow are of this run.
    pub fn begin_run(&mut self, run: u32) {
        self.run = run;
    }

    /// A report of the same figures that is discarded: the first operation of a kind costs more,
    /// with empty per-CPU caches, static calls to be patched and page tables to be made.
    pub fn scratch(&self) -> Report {
        Report { only: self.only.clone(), ..Report::default() }
    }

    /// Whether one of these figures is wanted.
    pub fn wants<N: AsRef<str>>(&self, names: &[N]) -> bool {
        self.only.is_empty() || names.iter().any(|n| self.only.iter().any(|o| o == n.as_ref()))
    }

    pub fn add(&mut self, name: impl Into<String>, subject: Subject, cost: Cost, times: u64) {
        self.figures.extend(self.figure(name.into(), subject, cost, times));
    }

    /// The cost of work that is the same at all sizes.
    pub fn grow(&mut self, name: &str, subject: Subject, size: u64, cost: Cost, times: u64) {
        self.grow_with_work(name, subject, (size, 1), cost, times);
    }

    /// The cost at a size, and the work there.
    pub fn grow_with_work(
        &mut self,
        name: &str,
        subject: Subject,
        (size, work): (u64, u64),
        cost: Cost,
        times: u64,
    ) {
        let figure = self.figure(name.into(), subject, cost, times);
        self.growth.extend(figure.map(|figure| Point { size, work, figure }));
    }

    fn figure(&self, name: String, subject: Subject, cost: Cost, times: u64) -> Option<Figure> {
        if !self.wants(&[&name]) {
            return None;
        }
        let Cost { instructions, flushes, windows } = cost;
        eprintln!("{name}, {}: {}", subject.name, instructions / times as i64);
        let (subject, page, run) = (subject.name, subject.page, self.run);
        Some(Figure { name, subject, page, run, times, instructions, flushes, windows })
    }

    /// The result of work that gives these figures; they are missing if it was skipped.
    pub fn unless_missing(
        &mut self,
        names: &[&str],
        subject: Subject,
        result: Result<()>,
    ) -> Result<()> {
        let Err(error) = result else { return Ok(()) };
        let Some(Skip(reason)) = error.chain().find_map(|e| e.downcast_ref::<Skip>()) else {
            return Err(error.context(subject.name));
        };
        for name in names {
            let there = |f: &Figure| f.name == *name && f.subject == subject.name;
            let missing =
                Missing { name: (*name).into(), subject: subject.name, reason: reason.clone() };
            if self.wants(&[name])
                && !self.figures.iter().any(there)
                && !self.missing.contains(&missing)
            {
                eprintln!("{name}, {}: missing: {reason}", subject.name);
                self.missing.push(missing);
            }
        }
        Ok(())
    }
}

/// The time stamp counter.
fn now() -> i64 {
    // SAFETY: Every x86-64 has it.
    unsafe { std::arch::x86_64::_rdtsc() as i64 }
}

/// A marker for scripts/profile.c: 1 begins a window, 0 ends it. To a CPU it is a no-op.
#[inline(always)]
fn mark<const N: u32>() {
    // SAFETY: A no-op that touches no memory.
    unsafe { std::arch::asm!("nopl 0x4d454d00 + {}(%rax)", const N, options(att_syntax)) }
}

/// The cost of `work`.
pub fn count(work: impl FnOnce() -> Result<()>) -> Result<Cost> {
    let window = WINDOWS.fetch_add(1, Ordering::Relaxed);
    mark::<1>();
    let start = now();
    let result = work();
    let end = now();
    mark::<0>();
    result?;
    Ok(Cost { instructions: end - start, flushes: None, windows: vec![(window, 1)] })
}

/// The cost of `work`, with the flushes of the VM that has these statistics.
pub fn count_with(stats: &Stats, work: impl FnOnce() -> Result<()>) -> Result<Cost> {
    let flushes = || stats.get(FLUSHES).context("count flushes");
    let before = flushes()?;
    let cost = count(work)?;
    Ok(Cost { flushes: Some(flushes()? as i64 - before as i64), ..cost })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::skip::skip;

    const SUBJECT: Subject = Subject { name: "s", page: 4096 };

    fn cost(instructions: i64, flushes: Option<i64>, window: u32) -> Cost {
        Cost { instructions, flushes, windows: vec![(window, 1)] }
    }

    #[test]
    fn costs_add_up_with_their_windows() {
        let mut sum = Cost::default();
        sum += cost(10, Some(1), 0);
        sum += cost(5, Some(2), 1);
        assert_eq!((sum.instructions, sum.flushes), (15, Some(3)));
        let rest = sum - &cost(3, Some(1), 2);
        assert_eq!((rest.instructions, rest.flushes), (12, Some(2)));
        assert_eq!(rest.windows, [(0, 1), (1, 1), (2, -1)]);
    }

    #[test]
    fn unknown_flushes_stay_unknown() {
        let mut sum = Cost::default();
        sum += cost(1, None, 0);
        sum += cost(1, Some(2), 1);
        assert_eq!(sum.flushes, None);
        assert_eq!((cost(1, Some(1), 2) - &cost(1, None, 3)).flushes, None);
    }

    #[test]
    fn only_what_is_wanted_is_reported() {
        let mut report = Report { only: vec!["a".into()], ..Report::default() };
        report.add("a", SUBJECT, Cost::default(), 1);
        report.add("b", SUBJECT, Cost::default(), 1);
        assert_eq!(report.figures.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["a"]);
        assert!(report.wants(&["b", "a"]) && !report.wants(&["b"]));
        assert!(Report::default().wants(&["b"]));
    }

    #[test]
    fn what_was_skipped_is_missing_once_and_what_failed_fails() {
        let mut report = Report::default();
        report.add("a", SUBJECT, Cost::default(), 1);
        for _ in 0..2 {
            report.unless_missing(&["a", "b"], SUBJECT, skip("no such pages")).unwrap();
        }
        let reason = "no such pages".to_owned();
        assert_eq!(report.missing, [Missing { name: "b".into(), subject: "s", reason }]);
        assert!(report.unless_missing(&["c"], SUBJECT, Err(anyhow::anyhow!("broken"))).is_err());
    }
}
