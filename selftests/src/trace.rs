// SPDX-License-Identifier: GPL-2.0
//! The life of one page of a memfile, from the tracepoints `memfile:*`.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::pattern::Pattern;
use crate::sys;
use crate::vm::{Private, Vm};
use crate::{GIB, PAGE};

/// The page to follow.
const SUBJECT: u64 = 6;
/// Pages of the file, and those that the slot binds.
const FILE_PAGES: u64 = 16;
const FIRST: u64 = 4;
const BOUND: u64 = 8;
const GPA: u64 = 4 * GIB;

/// Where tracefs is.
pub const TRACEFS: &str = "/sys/kernel/tracing";

/// tracefs, with the memfile events on until it is dropped.
struct Tracing(PathBuf);

impl Tracing {
    fn start() -> Result<Tracing> {
        let tracing = Tracing(TRACEFS.into());
        tracing.write("trace", "")?;
        tracing.write("events/memfile/enable", "1")?;
        tracing.write("tracing_on", "1")?;
        Ok(tracing)
    }

    fn write(&self, file: &str, text: &str) -> Result<()> {
        fs::write(self.0.join(file), text).with_context(|| format!("tracefs: {file}"))
    }

    /// Write the next step between the events.
    fn mark(&self, text: &str) -> Result<()> {
        self.write("trace_marker", text)
    }

    fn read(&self) -> Result<String> {
        fs::read_to_string(self.0.join("trace")).context("tracefs: trace")
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        let _ = self.write("events/memfile/enable", "0");
    }
}

/// A line of the trace.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Mark(&'a str),
    Event { name: &'a str, values: HashMap<&'a str, u64> },
}

/// Reads `task-pid [cpu] flags time: event: key=value ...`; pfns are hexadecimal.
fn parse(line: &str) -> Option<Line<'_>> {
    let (_, event) = line.split_once(": ")?;
    let (name, rest) = event.split_once(": ")?;
    let Some(name) = name.strip_prefix("memfile_") else {
        return (name == "tracing_mark_write").then_some(Line::Mark(rest));
    };
    let value = |field: &'static str, text| match field {
        "pfn" => u64::from_str_radix(text, 16).ok(),
        _ => str::parse(text).ok(),
    };
    let fields = ["ino", "index", "pfn", "order", "start", "end"];
    let values = rest.split_whitespace().filter_map(|pair| {
        let (key, text) = pair.split_once('=')?;
        let field = fields.into_iter().find(|&field| field == key)?;
        Some((field, value(field, text)?))
    });
    Some(Line::Event { name, values: values.collect() })
}

/// The lines about page `subject` of file `ino`, for people.
fn tell(trace: &str, ino: u64, subject: u64) -> String {
    let mut out = String::new();
    let mut pfn = None;
    for line in trace.lines().filter_map(parse) {
        let (name, values) = match line {
            Line::Mark(text) => {
                out += &format!("{text}\n");
                continue;
            }
            Line::Event { name, values } => (name, values),
        };
        let get = |key| values.get(key).copied();
        let said = match (get("start"), get("end"), get("index")) {
            (Some(start), Some(end), _) if get("ino") == Some(ino) => {
                (start..end).contains(&subject).then(|| format!("pages [{start}, {end})"))
            }
            (_, _, Some(index)) if get("ino") == Some(ino) && index == subject => {
                pfn = get("pfn");
                let order = get("order").unwrap_or(0);
                pfn.map(|pfn| format!("page {index} is at pfn {pfn:#x}, order {order}"))
            }
            _ if name == "put_pfn" && get("pfn") == pfn => {
                pfn.take().map(|pfn| format!("pfn {pfn:#x}"))
            }
            _ => None,
        };
        if let Some(said) = said {
            out += &format!("    {name:<18}{said}\n");
        }
    }
    out
}

/// The events of the page, in order.
const LIFE: [&str; 8] = [
    "bind",
    "get_pfn",
    "put_pfn",
    "invalidate_start",
    "invalidate_end",
    "get_pfn",
    "put_pfn",
    "unbind",
];

/// The result of [`run`].
pub struct Story {
    /// For people.
    pub text: String,
    /// As tracefs had it.
    pub trace: String,
}

/// A guest gets a page, loses it, gets it again, and the slot is deleted. An error if the
/// tracepoints show anything else.
pub fn run() -> Result<Story> {
    let vm = Vm::protected()?;
    let fd = sys::memfile(FILE_PAGES * PAGE)?;
    let ino = sys::fstat(&fd).context("fstat")?.st_ino;
    let mut vcpu = vm.vcpu(0)?;
    let at = |page: u64| GPA + (page - FIRST) * PAGE;
    let (start, len) = (at(FIRST), BOUND * PAGE);
    let seven = Pattern::Generation(7);

    let tracing = Tracing::start()?;
    tracing.mark(&format!("a slot binds pages [{FIRST}, {}) of inode {ino}", FIRST + BOUND))?;
    let slot = vm.add_private(1, GPA, len, Private::Memfile, &fd, FIRST * PAGE)?;
    vm.set_private(start, len)?;
    tracing.mark(&format!("the guest writes all of them, page {SUBJECT} at {:#x}", at(SUBJECT)))?;
    vcpu.fill_pages(start, len, seven)?;
    tracing.mark("the guest reads them: they are mapped")?;
    vcpu.verify_pages(start, len, seven)?;
    tracing.mark(&format!("a hole beside it, in page {}", SUBJECT + 1))?;
    sys::punch(&fd, (SUBJECT + 1) * PAGE, PAGE)?;
    tracing.mark(&format!("a hole from page {} to the end", SUBJECT - 1))?;
    sys::punch(&fd, (SUBJECT - 1) * PAGE, (FILE_PAGES - SUBJECT + 1) * PAGE)?;
    tracing.mark("the guest reads it again, and gets a new page")?;
    vcpu.verify_pages(at(SUBJECT), PAGE, Pattern::ZERO)?;
    tracing.mark("the slot is deleted; the page stays in the file")?;
    vm.delete(slot)?;
    tracing.mark("the file is closed")?;
    drop(fd);

    let trace = tracing.read()?;
    let text = tell(&trace, ino, SUBJECT);
    let events = text.lines().filter(|line| line.starts_with(' '));
    let names: Vec<_> = events.filter_map(|line| line.split_whitespace().next()).collect();
    ensure!(names == LIFE, "the trace should say {LIFE:?}, but it says {names:?}:\n{trace}");
    Ok(Story { text, trace })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "\
# tracer: nop
  memfile-trace-50      [000] .....     3.1: tracing_mark_write: bind
  memfile-trace-50      [000] .....     3.2: memfile_bind: ino=9 start=4 end=12
  memfile-trace-50      [000] .....     3.3: memfile_get_pfn: ino=9 index=5 pfn=1a order=0
  memfile-trace-50      [000] .....     3.4: memfile_put_pfn: pfn=1a
  memfile-trace-50      [000] .....     3.5: memfile_get_pfn: ino=9 index=6 pfn=1b order=0
  memfile-trace-50      [000] .....     3.6: memfile_put_pfn: pfn=1b
  memfile-trace-50      [000] .....     3.7: memfile_get_pfn: ino=8 index=6 pfn=1c order=0
  memfile-trace-50      [000] .....     3.8: memfile_invalidate_start: ino=9 start=7 end=8
  memfile-trace-50      [000] .....     3.9: memfile_invalidate_start: ino=9 start=6 end=8
";

    #[test]
    fn only_what_concerns_the_page_is_told() {
        let told = tell(TRACE, 9, 6);
        let lines: Vec<_> = told.lines().collect();
        let want = [
            "bind",
            "    bind              pages [4, 12)",
            "    get_pfn           page 6 is at pfn 0x1b, order 0",
            "    put_pfn           pfn 0x1b",
            "    invalidate_start  pages [6, 8)",
        ];
        assert_eq!(lines, want);
    }
}
