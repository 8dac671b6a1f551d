// SPDX-License-Identifier: GPL-2.0
//! Waits for what the kernel, or another thread, is about to do.

use std::fs::read_to_string;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::ktap::CaseResult;
use crate::sys::time_factor;
use crate::vm::Stats;

/// Wait until `done` says so; an error after the time limit.
pub fn wait_until(what: &str, mut done: impl FnMut() -> Result<bool>) -> CaseResult {
    let limit = Instant::now() + Duration::from_secs(30) * time_factor();
    while !done()? {
        ensure!(Instant::now() < limit, "waited too long until {what}");
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Wait until a vCPU has faulted often enough since its count of faults was `before` to show that it
/// faults in vain, or has `ended`.
pub fn wait_for_vain_faults(stats: &Stats, before: u64, ended: impl Fn() -> bool) -> CaseResult {
    wait_until("the vCPU has faulted in vain", || {
        Ok(stats.get("pf_taken")? >= before + 20 || ended())
    })
}

/// Whether a thread of this process sleeps in a function of the kernel whose name has one of these
/// parts.
pub fn sleeps_in(thread: i32, parts: &[&str]) -> bool {
    let name = read_to_string(format!("/proc/self/task/{thread}/wchan")).unwrap_or_default();
    parts.iter().any(|part| name.contains(part))
}
