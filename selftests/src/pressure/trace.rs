// SPDX-License-Identifier: GPL-2.0
//! Trace events, in a buffer of the test's own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};

use super::{drop_caches, raw_write, read, write};
use crate::PAGE;
use crate::sys::{fstat, require_root};
use crate::vm::{Slot, Vcpu};

const INSTANCES: &str = "/sys/kernel/tracing/instances";

/// A tracing instance, until it is dropped.
pub struct Trace {
    path: PathBuf,
}

/// Where a page of a memfile is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    pub pfn: u64,
    /// The order at which KVM was allowed to map it.
    pub order: u32,
}

impl Trace {
    /// Record these events, `system:name` each. SKIP if the kernel does not have them.
    pub fn start(events: &[&str]) -> Result<Trace> {
        require_root()?;
        read("/sys/kernel/tracing/trace_clock")?;
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let (pid, number) = (std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let path = PathBuf::from(format!("{INSTANCES}/memfile-{pid}-{number}"));
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        let trace = Trace { path };
        write(trace.path.join("buffer_size_kb"), "4096")?;
        for event in events {
            write(trace.path.join("events").join(event.replace(':', "/")).join("enable"), "1")?;
        }
        Ok(trace)
    }

    /// Forget what was recorded.
    pub fn clear(&self) -> Result<()> {
        write(self.path.join("trace"), "")
    }

    /// Events recorded since: name and `key=value` fields. An error if some were lost.
    pub fn events(&self) -> Result<Vec<Event>> {
        let text = read(self.path.join("trace"))?;
        // # entries-in-buffer/entries-written: 3/3   #P:2
        let counts =
            text.lines().find_map(|l| l.strip_prefix("# entries-in-buffer/entries-written: "));
        let counts = counts.and_then(|l| l.split_whitespace().next()?.split_once('/'));
        let (kept, written) = counts.context("the trace has no head")?;
        ensure!(kept == written, "{kept} of {written} events were kept");
        Ok(text.lines().filter(|l| !l.starts_with('#')).filter_map(Event::parse).collect())
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = raw_write(&self.path.join("events/enable"), "0");
        let _ = fs::remove_dir(&self.path);
    }
}

/// One recorded event.
#[derive(Clone, Debug)]
pub struct Event {
    pub name: String,
    fields: String,
}

impl Event {
    /// `  task-pid  [000] flags  time: name: key=value key=value`
    fn parse(line: &str) -> Option<Event> {
        let mut parts = line.splitn(3, ": ");
        let (_, name, fields) = (parts.next()?, parts.next()?, parts.next()?);
        Some(Event { name: name.trim().to_owned(), fields: fields.to_owned() })
    }

    fn field(&self, key: &str) -> Option<&str> {
        self.fields.split_whitespace().find_map(|f| f.strip_prefix(key)?.strip_prefix('='))
    }

    /// A decimal field.
    pub fn number(&self, key: &str) -> Option<u64> {
        self.field(key)?.parse().ok()
    }

    /// A hexadecimal field.
    pub fn hex(&self, key: &str) -> Option<u64> {
        hex(self.field(key)?)
    }

    /// The page frames that compaction means: `range=(0x1000 ~ 0x1200)`.
    pub fn pfns(&self) -> Option<Range<u64>> {
        let (range, _) = self.fields.split_once("range=(")?.1.split_once(')')?;
        let (start, end) = range.split_once(" ~ ")?;
        Some(hex(start)?..hex(end)?)
    }
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).ok()
}

/// Where the pages of a slot are now, by offset in the file: faults them in as
/// `KVM_PRE_FAULT_MEMORY` does, which leaves a page where it is and as it is.
pub fn frames(vcpu: &Vcpu, slot: &Slot, fd: impl AsFd) -> Result<BTreeMap<u64, Frame>> {
    let ino = fstat(fd).context("fstat")?.st_ino;
    let trace = Trace::start(&["memfile:memfile_get_pfn"])?;
    vcpu.raw_pre_fault(slot.gpa, slot.size).0.context("pre-fault")?;
    let mut frames = BTreeMap::new();
    for event in trace.events()? {
        if event.number("ino") == Some(ino) {
            let place = (event.number("index"), event.hex("pfn"), event.number("order"));
            let (Some(index), Some(pfn), Some(order)) = place else { continue };
            // One event tells of all pages that may be mapped with it.
            let (order, pages) = (order as u32, 1 << order);
            let (index, pfn) = (index & !(pages - 1), pfn & !(pages - 1));
            frames.extend((0..pages).map(|n| ((index + n) * PAGE, Frame { pfn: pfn + n, order })));
        }
    }
    ensure!(!frames.is_empty(), "get_pfn was not traced");
    Ok(frames)
}

/// How many pages are not where they were.
pub fn moved(before: &BTreeMap<u64, Frame>, after: &BTreeMap<u64, Frame>) -> u64 {
    let elsewhere =
        |(offset, old): &(&u64, &Frame)| after.get(offset).is_none_or(|new| new.pfn != old.pfn);
    before.iter().filter(elsewhere).count() as u64
}

/// What happens to a guest's pages while somebody looks for pages to move.
#[derive(Clone, Copy, Debug)]
pub struct Isolation {
    /// How many of the pages were looked at.
    pub seen: u64,
    /// How often a page was isolated in vain: taken off its list, refused, and put back. It counts
    /// those of others as well, but few of them do not move.
    pub vain: u64,
}

impl Isolation {
    /// Watch `work` look for pages.
    pub fn during(
        before: &BTreeMap<u64, Frame>,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<Isolation> {
        let pfns: BTreeSet<u64> = before.values().map(|frame| frame.pfn).collect();
        // What waits in lists of each CPU joins those that are meant.
        drop_caches()?;
        let trace = Trace::start(&[
            "compaction:mm_compaction_isolate_migratepages",
            "migrate:mm_migrate_pages",
        ])?;
        work()?;
        let mut isolation = Isolation { seen: 0, vain: 0 };
        for event in trace.events()? {
            isolation.seen += event.pfns().map_or(0, |range| pfns.range(range).count() as u64);
            isolation.vain += event.number("nr_failed").unwrap_or(0);
        }
        println!("{isolation:?}");
        Ok(isolation)
    }

    /// Fail unless those that were looked at were isolated in vain.
    pub fn expect_vain(&self) -> Result<()> {
        ensure!(self.seen > 0 && self.vain >= self.seen / 2, "{} were isolated", self.vain);
        Ok(())
    }
}
