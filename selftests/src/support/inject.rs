// SPDX-License-Identifier: GPL-2.0
//! Allocations that fail to order.

use std::fmt::Debug;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use crate::pressure::Setting;
use crate::skip::skip;
use crate::sys::{Errno, SysResult, require_root};

/// More tries than any call needs.
const LIMIT: u32 = 2000;

/// By how much a call gets more memory from one try to the next, in bytes: less than what it asks
/// for at once.
const STEP: u32 = 128;

/// Which allocations fail.
#[derive(Clone, Copy, Debug)]
pub enum Shortage {
    /// One of them: the first of a call, then its second, and so on.
    Once,
    /// All from the slab once a call has had so many bytes from there: none, then a few, and so on.
    /// What fails once is often tried again in some other way; this fails again.
    Lasting,
}

/// Both.
pub const SHORTAGES: [Shortage; 2] = [Shortage::Once, Shortage::Lasting];

/// Fails allocations of the thread that made it, and of no other.
pub struct Injector {
    /// Which of the thread's allocations fails next.
    nth: File,
    /// How many percent of its allocations fail, once it has had so many bytes.
    percent: File,
    bytes: File,
    _settings: Vec<Setting>,
}

impl Injector {
    /// SKIP where the kernel cannot do this.
    pub fn new() -> Result<Injector> {
        require_root()?;
        let open = |path: &str| match File::options().read(true).write(true).open(path) {
            Ok(file) => Ok(file),
            Err(_) => skip(format!("the kernel has no {path}")),
        };
        // Opened now, because that cannot be done any more when allocations fail.
        let nth = open("/proc/thread-self/fail-nth")?;
        let percent = open("/sys/kernel/debug/failslab/probability")?;
        let bytes = open("/sys/kernel/debug/failslab/space")?;
        // Those that may wait as well, those for user memory, single pages; and no word about it.
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
        let mut set = vec![Setting::set("/proc/thread-self/make-it-fail", "1")?];
        for (name, value) in settings {
            set.push(Setting::set(format!("/sys/kernel/debug/{name}"), value)?);
        }
        Ok(Injector { nth, percent, bytes, _settings: set })
    }

    /// Try `n`, counted from 1, of `call` without memory: what it returns, and whether it came to
    /// an allocation that failed. For [`Shortage::Lasting`] `failed` says so.
    ///
    /// `call` had better not allocate in user space.
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

    /// Make `call` with less memory than it needs, a little more each time, until it has enough;
    /// in both ways. `check` looks at what each try left behind, and gets everything ready for the
    /// next. How many failed; all of those said ENOMEM.
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
}

fn write(mut file: &File, number: u32) -> Result<()> {
    // On the stack: the file may be what makes allocations fail.
    let mut text = [0; 12];
    let mut rest = &mut text[..];
    write!(rest, "{number}")?;
    let left = rest.len();
    file.write_all(&text[..text.len() - left]).context("fault injection")
}
