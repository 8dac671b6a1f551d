// SPDX-License-Identifier: GPL-2.0
//! Cases that fail on purpose, to prove that the runner and its scripts notice.
//!
//! Hidden: they run only if named.

use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, bail, ensure};

use crate::knobs::Setting;
use crate::ktap::{CaseResult, Suite, skip};
use crate::suite;
use crate::support::{KNOB_PATH, KNOB_VALUE};

pub static SUITE: Suite =
    suite!("control", [pass, fail, skipped, panic, crash, hang: 2], hidden = true);
/// A suite of its own, so that the name of the other one never takes the machine down.
pub static OOPS: Suite = suite!("control_oops", [oops], hidden = true);
/// Also a suite of its own: they change the machine.
pub static KNOB: Suite =
    suite!("control_knob", [changes_a_knob, changes_a_knob_and_hangs: 2], hidden = true);
/// In one child, until one of them fails.
pub static TOGETHER: Suite = suite!(
    "control_together",
    [first_of_two, second_of_two, fail, first_of_two_again, hang: 2, first_after_all],
    hidden = true,
    together = true
);
pub static EMPTY: Suite = suite!("control_empty", [], hidden = true);

fn pass() -> CaseResult {
    println!("this case passes");
    Ok(())
}

/// How many cases this child has run.
fn expect_earlier(cases: u32) -> CaseResult {
    static CASES: AtomicU32 = AtomicU32::new(0);
    let earlier = CASES.fetch_add(1, Ordering::Relaxed);
    ensure!(earlier == cases, "{earlier} cases came before");
    println!("{earlier} before");
    Ok(())
}

fn first_of_two() -> CaseResult {
    expect_earlier(0)
}

fn second_of_two() -> CaseResult {
    expect_earlier(1)
}

fn first_of_two_again() -> CaseResult {
    expect_earlier(0)
}

fn first_after_all() -> CaseResult {
    expect_earlier(0)
}

fn fail() -> CaseResult {
    bail!("this case fails on purpose")
}

fn skipped() -> CaseResult {
    skip("this case is skipped on purpose")
}

fn panic() -> CaseResult {
    panic!("this case panics on purpose")
}

fn crash() -> CaseResult {
    // SAFETY: Kills only this case.
    unsafe { libc::abort() }
}

fn hang() -> CaseResult {
    loop {
        std::thread::park();
    }
}

fn changes_a_knob() -> CaseResult {
    std::mem::forget(Setting::set(KNOB_PATH, KNOB_VALUE)?);
    Ok(())
}

fn changes_a_knob_and_hangs() -> CaseResult {
    let _setting = Setting::set(KNOB_PATH, KNOB_VALUE)?;
    hang()
}

/// Panics the kernel, if the kernel lets us.
fn oops() -> CaseResult {
    if !std::path::Path::new("/proc/sysrq-trigger").exists() {
        return skip("the kernel has no sysrq");
    }
    std::fs::write("/proc/sysrq-trigger", "c").context("sysrq")?;
    bail!("the kernel survived sysrq c")
}
