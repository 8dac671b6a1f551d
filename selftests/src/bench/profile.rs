// SPDX-License-Identifier: GPL-2.0
//! Where the kernel spends its instructions: perf's CPU clock, which counts them as well.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};

use crate::PAGE;
use crate::pattern::Rng;
use crate::sys::{self, Mapping, check};

/// Instructions between two samples, at least; perf takes no fewer.
const PERIOD: u64 = 10_000;
/// Pages of samples.
const BUFFER: u64 = 2048;

/// `PERF_EVENT_IOC_ENABLE`, `_DISABLE` and `_PERIOD`.
const ENABLE: u64 = 0x2400;
const DISABLE: u64 = 0x2401;
const SET_PERIOD: u64 = 0x4008_2404;

/// The first version of `struct perf_event_attr`.
#[repr(C)]
#[derive(Default)]
struct Attr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    bp_type: u32,
    config1: u64,
}

const _: () = assert!(size_of::<Attr>() == 64);

/// Samples the kernel, on behalf of this thread, between start and stop.
pub struct Profiler {
    fd: OwnedFd,
    ring: Mapping,
    symbols: Vec<(u64, String)>,
    rng: Rng,
}

impl Profiler {
    pub fn new() -> Result<Profiler> {
        const SOFTWARE: u32 = 1;
        const CALLCHAIN: u64 = 1 << 5;
        const DISABLED: u64 = 1 << 0;
        const EXCLUDE_USER: u64 = 1 << 4;
        const EXCLUDE_CALLCHAIN_USER: u64 = 1 << 22;
        std::fs::write("/proc/sys/kernel/perf_event_max_sample_rate", "1000000")
            .context("perf_event_max_sample_rate")?;
        let attr = Attr {
            kind: SOFTWARE,
            size: size_of::<Attr>() as u32,
            sample_period: PERIOD,
            sample_type: CALLCHAIN,
            flags: DISABLED | EXCLUDE_USER | EXCLUDE_CALLCHAIN_USER,
            ..Attr::default()
        };
        // SAFETY: The structure has the size that it says.
        let fd = check(unsafe {
            libc::syscall(libc::SYS_perf_event_open, &raw const attr, 0, -1, -1, 0)
        })
        .context("perf_event_open")?;
        // SAFETY: A new descriptor.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        let ring = Mapping::anywhere(&fd, 0, (BUFFER + 1) * PAGE).context("map the samples")?;
        let symbols = symbols()?;
        Ok(Profiler { fd, ring, symbols, rng: Rng::new(1) })
    }

    /// Go on, with another period than before: one that fits what is sampled would hit the same
    /// places again and again.
    pub fn start(&mut self) -> Result<()> {
        let mut period = PERIOD + self.rng.next_u64() % PERIOD;
        // SAFETY: The request reads 64 bits.
        unsafe { sys::ioctl_mut(self.fd.as_fd(), SET_PERIOD, &mut period) }.context("period")?;
        sys::ioctl_val(&self.fd, ENABLE, 0).context("enable the samples").map(drop)
    }

    pub fn stop(&self) -> Result<()> {
        sys::ioctl_val(&self.fd, DISABLE, 0).context("disable the samples").map(drop)
    }

    /// Stacks, outermost function first, and how often each was met.
    pub fn stacks(&self) -> Result<Vec<(String, u64)>> {
        const DATA_HEAD: u64 = 1024;
        const SAMPLE: u32 = 9;
        /// From here on it is the name of a context, not an address.
        const CONTEXTS: u64 = -4096i64 as u64;
        let head = self.ring.load(DATA_HEAD);
        ensure!(head > 0, "no sample was taken");
        ensure!(head < BUFFER * PAGE, "too many samples for the buffer");
        let word = |at: u64| self.ring.load(PAGE + at);
        let mut stacks = BTreeMap::new();
        let mut at = 0;
        while at < head {
            let header = word(at);
            if header as u32 == SAMPLE {
                let frames = (0..word(at + 8)).map(|n| word(at + 16 + n * 8));
                let mut names: Vec<_> =
                    frames.filter(|&f| f < CONTEXTS).map(|f| self.name(f)).collect();
                names.reverse();
                *stacks.entry(names.join(";")).or_insert(0) += 1;
            }
            at += header >> 48;
        }
        Ok(stacks.into_iter().collect())
    }

    fn name(&self, address: u64) -> &str {
        let after = self.symbols.partition_point(|&(start, _)| start <= address);
        after.checked_sub(1).map_or("?", |n| &self.symbols[n].1)
    }
}

/// The kernel's functions by address; those of modules with "[module]".
fn symbols() -> Result<Vec<(u64, String)>> {
    let text = std::fs::read_to_string("/proc/kallsyms").context("/proc/kallsyms")?;
    let mut symbols: Vec<_> = text.lines().filter_map(symbol).collect();
    symbols.sort();
    ensure!(symbols.last().is_some_and(|last| last.0 > 0), "/proc/kallsyms hides the addresses");
    Ok(symbols)
}

fn symbol(line: &str) -> Option<(u64, String)> {
    let mut fields = line.split_whitespace();
    let address = u64::from_str_radix(fields.next()?, 16).ok()?;
    let kind = fields.next()?;
    let name = fields.next()?;
    let module = fields.next().unwrap_or("");
    matches!(kind, "t" | "T" | "w" | "W").then(|| (address, format!("{name}{module}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_have_names_and_modules() {
        let function = "ffffffff81000000 T start_kernel";
        assert_eq!(symbol(function), Some((0xffff_ffff_8100_0000, "start_kernel".into())));
        let module = "ffffffffc0000000 t _RNv4node\t[memfile]";
        assert_eq!(symbol(module), Some((0xffff_ffff_c000_0000, "_RNv4node[memfile]".into())));
        assert_eq!(symbol("0000000000000000 D jiffies"), None);
    }
}
