// SPDX-License-Identifier: GPL-2.0
//! Injected failures of allocations.

use std::fmt::Debug;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, bail, ensure};

use crate::pressure::{Setting, Settings};
use crate::skip::skip;
use crate::sys::{Errno, SysResult, require_root};

/// More tries than any call needs.
const LIMIT: u32 = 2000;

/// Rounds of tries in which something has to fail at last.
const ROUNDS: u32 = 8;

/// How many more bytes a call gets at each try: less than a single allocation.
const STEP: u32 = 128;

/// The allocations that fail.
#[derive(Clone, Copy, Debug)]
pub enum Shortage {
    /// One allocation: the first of a call, then its second, and so on.
    Once,
    /// All slab allocations once a call has had that many bytes from the slab: none, then a few,
    /// and so on. Code often retries a failed allocation in another way; the retry fails as well.
    Lasting,
}

/// Both.
pub const SHORTAGES: [Shortage; 2] = [Shortage::Once, Shortage::Lasting];

/// Fails allocations of the thread that made it, and of no other.
pub struct Injector {
    /// The number of the thread's allocation that fails next.
    nth: File,
    /// The percentage of its allocations that fail, and after how many bytes.
    percent: File,
    bytes: File,
    _settings: Settings,
}

impl Injector {
    /// SKIP where the kernel cannot do this.
    pub fn new() -> Result<Injector> {
        require_root()?;
        let open = |path: &str| match File::options().read(true).write(true).open(path) {
            Ok(file) => Ok(file),
            Err(_) => skip(format!("the kernel has no {path}")),
        };
        // Opened now, because an open fails when allocations fail.
        let nth = open("/proc/thread-self/fail-nth")?;
        let percent = open("/sys/kernel/debug/failslab/probability")?;
        let bytes = open("/sys/kernel/debug/failslab/space")?;
        // Include allocations that may wait, allocations for user memory, and single pages; print
        // nothing.
        let settings = [
            ("failslab/task-filter", "Y"),
            ("failslab/times", "-1"),
            ("failslab/probability", "0"),
            ("failslab/space", "0"),
            ("failslab/ignore-gfp-wait", "N"),
            ("failslab/verbose", "0"),
            ("fail_page_alloc/times", "-1"),
            ("fail_page_alloc/ignore-gfp-wait", "N"),
            ("fail_page_alloc/ignore-gfp-highmem", "N"),
            ("fail_page_alloc/min-order", "0"),
            ("fail_page_alloc/verbose", "0"),
        ];
        let mut set = Settings::default();
        set.push(Setting::set("/proc/thread-self/make-it-fail", "1")?);
        for (name, value) in settings {
            set.push(Setting::set(format!("/sys/kernel/debug/{name}"), value)?);
        }
        Ok(Injector { nth, percent, bytes, _settings: set })
    }

    /// Try `n`, counted from 1, of `call` without memory: its result, and whether an allocation
    /// failed. For [`Shortage::Lasting`] `failed` tells the latter.
    ///
    /// `call` must not allocate in userspace.
    pub fn call<R>(
        &self,
        shortage: Shortage,
        n: u32,
        call: impl FnOnce() -> R,
        failed: impl FnOnce(&R) -> bool,
    ) -> Result<(R, bool)> {
        match shortage {
            Shortage::Once => {
                write(&self.nth, n)?;
                let result = call();
                let mut left = [0; 16];
                let len = self.nth.read_at(&mut left, 0);
                write(&self.nth, 0)?;
                let left = std::str::from_utf8(&left[..len.context("fail-nth")?])?.trim();
                Ok((result, left == "0"))
            }
            Shortage::Lasting => {
                write(&self.bytes, (n - 1) * STEP)?;
                write(&self.percent, 100)?;
                let result = call();
                write(&self.percent, 0)?;
                let failed = failed(&result);
                Ok((result, failed))
            }
        }
    }

    /// Make `call` with less memory than it needs, a little more each time, until it has enough; in
    /// both ways. `check` checks the state after each try and prepares the next one. Returns how
    /// many failed; all of them gave ENOMEM.
    pub fn sweep<S, T: Debug>(
        &self,
        what: &str,
        state: &mut S,
        mut call: impl FnMut(&mut S) -> SysResult<T>,
        mut check: impl FnMut(&mut S, SysResult<T>) -> Result<()>,
    ) -> Result<u32> {
        let mut failed = 0;
        for shortage in SHORTAGES {
            let (mut tries, mut short) = (0, true);
            let before = failed;
            while short {
                tries += 1;
                ensure!(tries < LIMIT, "{what}: it never has enough");
                let (result, now) =
                    self.call(shortage, tries, || call(state), SysResult::is_err)?;
                short = now;
                let words = format!("{what}, {shortage:?} {tries}: {result:?}");
                let good = matches!(result, Ok(_) | Err(Errno::ENOMEM));
                ensure!(good && (short || result.is_ok()), "{words}");
                failed += u32::from(result.is_err());
                check(state, result).context(words)?;
            }
            let failed = failed - before;
            println!("{what}, {shortage:?}: {} tries with too little, {failed} failed", tries - 1);
        }
        Ok(failed)
    }

    /// [`Injector::sweep`], for a call that cannot do without memory.
    pub fn sweep_that_fails<S, T: Debug>(
        &self,
        what: &str,
        state: &mut S,
        mut call: impl FnMut(&mut S) -> SysResult<T>,
        mut check: impl FnMut(&mut S, SysResult<T>) -> Result<()>,
    ) -> Result<()> {
        until_one_fails(|| self.sweep(what, state, &mut call, &mut check)).map(drop)
    }
}

/// Repeat `round`, a round of tries, until something fails in it; how much did. An allocation that
/// only one of the tries makes, for a slab that is full or for the kernel's debugging, moves those
/// behind it by one: so a round may pass the one over that a call cannot do without.
pub fn until_one_fails(mut round: impl FnMut() -> Result<u32>) -> Result<u32> {
    for _ in 0..ROUNDS {
        let failed = round()?;
        if failed > 0 {
            return Ok(failed);
        }
    }
    bail!("no allocation was needed in {ROUNDS} rounds")
}

fn write(mut file: &File, number: u32) -> Result<()> {
    // On the stack: the write may make allocations fail.
    let mut text = [0; 12];
    let mut rest = &mut text[..];
    write!(rest, "{number}")?;
    let left = rest.len();
    file.write_all(&text[..text.len() - left]).context("fault injection")
}
