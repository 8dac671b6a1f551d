// SPDX-License-Identifier: GPL-2.0
//! Trace events, in a buffer of the test's own.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};

use super::{drop_caches, raw_write, read, write};
use crate::PAGE;
use crate::sys::{fstat, require_root, thread_id};
use crate::vm::{Slot, Vcpu};

const INSTANCES: &str = "/sys/kernel/tracing/instances";

/// An entry of a guest's page table changed: by a fault, or because its accessed bit was cleared.
pub const ENTRY_CHANGED: &str = "kvmmmu:kvm_tdp_mmu_spte_changed";

/// A tracing instance, until it is dropped.
pub struct Trace {
    path: PathBuf,
}

/// The place of a page of a memfile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    pub pfn: u64,
    /// The order at which KVM was allowed to map it.
    pub order: u32,
}

impl Trace {
    /// Record these events, `system:name` each. SKIP if the kernel does not have them.
    pub fn start(events: &[&str]) -> Result<Trace> {
        let trace = Trace::empty()?;
        for event in events {
            trace.enable(event, None)?;
        }
        Ok(trace)
    }

    /// Record these of the events, and wake who waits at [`Trace::pipe`] for each of them.
    pub fn waking(event: &str, filter: &str) -> Result<Trace> {
        let trace = Trace::empty()?;
        write(trace.path.join("buffer_percent"), "0")?;
        trace.enable(event, Some(filter))?;
        Ok(trace)
    }

    /// Record only those of one thread.
    pub fn of_thread(event: &str, thread: i32) -> Result<Trace> {
        Trace::only(event, &format!("common_pid == {thread}"))
    }

    /// Record these of the events: not those that come of the test's reading, or it never ends.
    pub fn only(event: &str, filter: &str) -> Result<Trace> {
        let trace = Trace::empty()?;
        trace.enable(event, Some(filter))?;
        Ok(trace)
    }

    /// The events as they come. A read takes them, and waits for no other thread of the kernel's.
    pub fn pipe(&self) -> Result<Pipe> {
        let mut open = fs::OpenOptions::new();
        let open = open.read(true).custom_flags(libc::O_NONBLOCK);
        open.open(self.path.join("trace_pipe")).context("trace_pipe").map(Pipe)
    }

    fn enable(&self, event: &str, filter: Option<&str>) -> Result<()> {
        let folder = self.path.join("events").join(event.replace(':', "/"));
        if let Some(filter) = filter {
            write(folder.join("filter"), filter)?;
        }
        write(folder.join("enable"), "1")
    }

    fn empty() -> Result<Trace> {
        require_root()?;
        read("/sys/kernel/tracing/trace_clock")?;
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let (pid, number) = (std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let path = PathBuf::from(format!("{INSTANCES}/memfile-{pid}-{number}"));
        fs::create_dir(&path).with_context(|| format!("make {}", path.display()))?;
        let trace = Trace { path };
        // The kernel refuses, instead of reclaiming, if not enough is free at this moment.
        let size = trace.path.join("buffer_size_kb");
        if write(&size, "4096").is_err() {
            drop_caches()?;
            write(&size, "4096")?;
        }
        Ok(trace)
    }

    /// Forget what was recorded.
    pub fn clear(&self) -> Result<()> {
        // Opening with O_TRUNC empties the buffer.
        let path = self.path.join("trace");
        fs::OpenOptions::new().write(true).truncate(true).open(&path).context("clear the trace")?;
        Ok(())
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

/// See [`Trace::pipe`].
pub struct Pipe(fs::File);

impl Pipe {
    /// Take what there is; returns the last event of it.
    pub fn last(&mut self) -> Result<Option<Event>> {
        let mut text = Vec::new();
        match self.0.read_to_end(&mut text) {
            Err(e) if e.kind() != ErrorKind::WouldBlock => Err(e).context("trace_pipe"),
            _ => Ok(String::from_utf8_lossy(&text).lines().filter_map(Event::parse).next_back()),
        }
    }
}

impl AsRawFd for Pipe {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
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
    /// Its thread.
    pub thread: i32,
    /// How many spinlocks and the like that thread held: its preemption count.
    pub depth: u32,
    fields: String,
}

impl Event {
    /// `  task-pid  [000] flags  time: name: key=value key=value`
    fn parse(line: &str) -> Option<Event> {
        let mut parts = line.splitn(3, ": ");
        let (head, name, fields) = (parts.next()?, parts.next()?, parts.next()?);
        let mut head = head.split_whitespace().rev().skip(1);
        // Interrupts, rescheduling, kind of context, preemption count, migration.
        let depth = match head.next()?.chars().nth(3)? {
            '.' => 0,
            digit => digit.to_digit(16)?,
        };
        let thread = head.nth(1)?.rsplit_once('-')?.1.parse().ok()?;
        Some(Event { name: name.trim().to_owned(), thread, depth, fields: fields.to_owned() })
    }

    /// The value of `key=value` or `(key=value)`, if it has no space.
    pub fn field(&self, key: &str) -> Option<&str> {
        let bare = |word| -> Option<&str> { str::strip_prefix(word, '(')?.strip_suffix(')') };
        let mut words = self.fields.split_whitespace().map(|word| bare(word).unwrap_or(word));
        words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    /// Whether its fields begin with this text.
    pub fn says(&self, text: &str) -> bool {
        self.fields.starts_with(text)
    }

    /// The hexadecimal number that follows a word, for events that have `key value`.
    pub fn hex_after(&self, key: &str) -> Option<u64> {
        let mut words = self.fields.split_whitespace();
        words.find(|word| *word == key)?;
        hex(words.next()?)
    }

    /// A decimal field.
    pub fn number(&self, key: &str) -> Option<u64> {
        self.field(key)?.parse().ok()
    }

    /// A hexadecimal field.
    pub fn hex(&self, key: &str) -> Option<u64> {
        hex(self.field(key)?)
    }

    /// The page frames of an event of compaction: `range=(0x1000 ~ 0x1200)`.
    pub fn pfns(&self) -> Option<Range<u64>> {
        let (range, _) = self.fields.split_once("range=(")?.1.split_once(')')?;
        let (start, end) = range.split_once(" ~ ")?;
        Some(hex(start)?..hex(end)?)
    }
}

fn hex(text: &str) -> Option<u64> {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).ok()
}

/// The places of the pages of a slot, by offset in the file. Faults them in by
/// `KVM_PRE_FAULT_MEMORY`, which neither moves nor changes a page.
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

/// The frame that KVM maps at `gpa`, whatever kind of memory it is of. `work` runs a vCPU on the calling
/// thread, and has it touch the page, which KVM has not mapped before.
pub fn mapped_at(gpa: u64, work: impl FnOnce() -> Result<()>) -> Result<u64> {
    let trace = Trace::of_thread(ENTRY_CHANGED, thread_id())?;
    work()?;
    let entries = trace.events()?.iter().filter_map(Entry::of).collect::<Vec<_>>();
    let last = entries.iter().rfind(|entry| entry.covers(gpa / PAGE));
    let frame = last.and_then(|entry| entry.frame(gpa / PAGE));
    frame.with_context(|| format!("of {} entries, none maps {gpa:#x}", entries.len()))
}

/// An entry of a guest's page table after a change, at a level of 1 for small pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    gfn: u64,
    level: u64,
    value: u64,
}

impl Entry {
    /// `as id 0 gfn 1f level 1 old_spte 0 new_spte 8c3`, of [`ENTRY_CHANGED`]. The level has one digit.
    fn of(event: &Event) -> Option<Entry> {
        let number = |key| event.hex_after(key);
        Some(Entry { gfn: number("gfn")?, level: number("level")?, value: number("new_spte")? })
    }

    /// How many pages it is for.
    fn pages(&self) -> u64 {
        1 << (9 * self.level.saturating_sub(1))
    }

    fn covers(&self, gfn: u64) -> bool {
        (self.gfn..self.gfn + self.pages()).contains(&gfn)
    }

    /// The frame of one of its pages, if it maps them and does not lead to another table.
    fn frame(&self, gfn: u64) -> Option<u64> {
        /// KVM's own mark.
        const PRESENT: u64 = 1 << 11;
        const LARGE: u64 = 1 << 7;
        const ADDRESS: u64 = (1 << 52) - PAGE;
        let maps = self.value & PRESENT != 0 && (self.level == 1 || self.value & LARGE != 0);
        maps.then_some((self.value & ADDRESS) / PAGE + (gfn - self.gfn))
    }
}

/// How many pages have moved.
pub fn moved(before: &BTreeMap<u64, Frame>, after: &BTreeMap<u64, Frame>) -> u64 {
    let elsewhere =
        |(offset, old): &(&u64, &Frame)| after.get(offset).is_none_or(|new| new.pfn != old.pfn);
    before.iter().filter(elsewhere).count() as u64
}

/// The scans and isolations of a guest's pages while the kernel looks for pages to move.
#[derive(Clone, Copy, Debug)]
pub struct Isolation {
    /// How many of the pages were scanned.
    pub seen: u64,
    /// How often an isolated page did not move: taken off its list, refused, and put back. It
    /// counts other pages as well, but nearly all of them move.
    pub vain: u64,
}

impl Isolation {
    /// Watch while `work` looks for pages.
    pub fn during(
        before: &BTreeMap<u64, Frame>,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<Isolation> {
        let pfns: BTreeSet<u64> = before.values().map(|frame| frame.pfn).collect();
        // Pages in the lists of the CPUs join the lists of the zone.
        drop_caches()?;
        let trace = Trace::start(&[
            "compaction:mm_compaction_isolate_migratepages",
            "migrate:mm_migrate_pages",
        ])?;
        work()?;
        let mut isolation = Isolation { seen: 0, vain: 0 };
        // The threads whose compaction has taken pages near ours, and not yet tried to migrate them.
        // What fails at other times is not ours.
        let mut near = BTreeSet::new();
        for event in trace.events()? {
            let ours = event.pfns().map_or(0, |range| pfns.range(range).count() as u64);
            isolation.seen += ours;
            if ours > 0 && event.number("nr_taken") != Some(0) {
                near.insert(event.thread);
            }
            if let Some(failed) = event.number("nr_failed") {
                let compaction = event.field("reason") == Some("compaction");
                if near.remove(&event.thread) || !compaction {
                    isolation.vain += failed;
                }
            }
        }
        println!("{isolation:?}");
        Ok(isolation)
    }

    /// Fail unless the scanned pages were isolated and put back.
    pub fn expect_vain(&self) -> Result<()> {
        ensure!(self.seen > 0 && self.vain >= self.seen / 2, "{} were isolated", self.vain);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_line() {
        let line = "   memfile-tests-51      [001] d..2.     3.1: memfile_bind: ino=9 pfn=1a";
        let event = Event::parse(line).unwrap();
        assert_eq!((event.name.as_str(), event.thread, event.depth), ("memfile_bind", 51, 2));
        assert_eq!((event.number("ino"), event.hex("pfn")), (Some(9), Some(0x1a)));
        let line = "   a name-with-7  [001] .....     3.1: f: as id 0 gfn 1f level 2";
        let event = Event::parse(line).unwrap();
        assert_eq!((event.hex_after("gfn"), event.hex_after("pfn")), (Some(0x1f), None));
        assert_eq!((event.thread, event.depth), (7, 0));
        let line = "   a-63      [000] ...1.     7.9: contention_begin: 00000000b4aac53d (flags=SPIN|READ)";
        let event = Event::parse(line).unwrap();
        assert_eq!((event.depth, event.field("flags")), (1, Some("SPIN|READ")));
    }

    #[test]
    fn reads_the_frame_of_an_entry() {
        let entry = |text: &str| {
            let head = "   a-7  [001] ...2.     3.1: kvm_tdp_mmu_spte_changed: as id 0 ";
            Entry::of(&Event::parse(&format!("{head}{text}")).unwrap()).unwrap()
        };
        let small = entry("gfn 100025 level 1 old_spte 0 new_spte 86000001a2b3c877");
        assert_eq!(
            [0x100024, 0x100025, 0x100026].map(|gfn| small.covers(gfn)),
            [false, true, false]
        );
        assert_eq!(small.frame(0x100025), Some(0x1a2b3c));
        let huge = entry("gfn 100200 level 2 old_spte 0 new_spte 86000000456008f7");
        assert_eq!(
            [0x1001ff, 0x1003ff, 0x100400].map(|gfn| huge.covers(gfn)),
            [false, true, false]
        );
        assert_eq!(huge.frame(0x100225), Some(0x45625));
        let table = entry("gfn 100200 level 2 old_spte 0 new_spte 7654867");
        assert_eq!((table.covers(0x100225), table.frame(0x100225)), (true, None));
        let gone = entry("gfn 100025 level 1 old_spte 86000001a2b3c877 new_spte 1a0");
        assert_eq!((gone.covers(0x100025), gone.frame(0x100025)), (true, None));
    }
}
