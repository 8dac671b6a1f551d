// SPDX-License-Identifier: GPL-2.0
//! Requests to a real guest, and their answers. See [`crate::agent`].

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::lines::{Gone, Lines, TimeIsUp};
use super::records::Records;
use crate::agent::{Answer, READY, answer, line, words};

/// The port to a guest's process 1.
pub struct Guest {
    lines: Lines,
    number: u64,
    /// The time limit of a request.
    limit: Duration,
    release: String,
    records: Records,
}

impl Guest {
    pub(super) fn new(stream: UnixStream, limit: Duration, records: Records) -> Guest {
        let lines = Lines::new(stream);
        Guest { lines, number: 0, limit, release: String::new(), records }
    }

    /// Wait until process 1 is ready.
    pub(super) fn wait(&mut self, deadline: Instant) -> Result<()> {
        loop {
            // Firmware and kernel can write to the port as well: skip other lines.
            let line = self.lines.next(deadline)?;
            if let Ok([first, release, _memory]) = words(&line).as_deref()
                && first == READY
            {
                self.release = release.clone();
                return Ok(());
            }
        }
    }

    /// Set the time limit of all requests from now on.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// Its kernel's release.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Make a request, and do not wait for the answer.
    fn request(&mut self, request: &[&str]) -> Result<()> {
        self.number += 1;
        let number = self.number.to_string();
        self.lines.send(&line([number.as_str()].iter().chain(request)))
    }

    /// Make a request, and return the words of the answer.
    fn ask(&mut self, request: &[&str], said: &mut dyn FnMut(&str)) -> Result<Vec<String>> {
        let deadline = Instant::now() + self.limit;
        self.request(request)?;
        loop {
            let text = match self.lines.next(deadline) {
                Ok(text) => text,
                Err(e) if e.is::<Gone>() => {
                    bail!("{}: {e}, {}", request.join(" "), self.records.end())
                }
                Err(e) => return Err(e.context(request.join(" "))),
            };
            match answer(&text) {
                Some((n, _)) if n != self.number => {
                    bail!("the guest answers {n}, not {}", self.number)
                }
                Some((_, Answer::Out(text))) => said(&text),
                Some((_, Answer::Done(words))) => return Ok(words),
                Some((_, Answer::Refused(why))) => bail!("the guest: {}: {why}", request.join(" ")),
                None => bail!("the guest says {text:?}"),
            }
        }
    }

    fn tell(&mut self, request: &[&str]) -> Result<()> {
        let words = self.ask(request, &mut |_| {})?;
        ensure!(words.is_empty(), "the guest answers {words:?} to {request:?}");
        Ok(())
    }

    /// Make an area of `kind`: `memory`, `locked` or `file`.
    pub fn area(&mut self, kind: &str, name: &str, bytes: u64) -> Result<()> {
        self.tell(&["area", kind, name, &bytes.to_string()])
    }

    /// Write all of an area with a pattern of its own.
    pub fn fill(&mut self, name: &str, seed: u64) -> Result<()> {
        self.tell(&["fill", name, &seed.to_string()])
    }

    /// Make an area and fill it.
    pub fn hold(&mut self, kind: &str, name: &str, bytes: u64, seed: u64) -> Result<()> {
        self.area(kind, name, bytes)?;
        self.fill(name, seed)
    }

    /// Fail unless the area has the content that was written.
    pub fn verify(&mut self, name: &str, seed: u64) -> Result<()> {
        self.tell(&["verify", name, &seed.to_string()])
    }

    /// The same for that many pages from `first` on.
    pub fn verify_pages(&mut self, name: &str, seed: u64, first: u64, pages: u64) -> Result<()> {
        self.tell(&["verify", name, &seed.to_string(), &first.to_string(), &pages.to_string()])
    }

    /// Fail unless these pages read as zeros.
    pub fn verify_zeros(&mut self, name: &str, first: u64, pages: u64) -> Result<()> {
        self.tell(&["verify", name, "zero", &first.to_string(), &pages.to_string()])
    }

    /// Give an area up.
    pub fn release_area(&mut self, name: &str) -> Result<()> {
        self.tell(&["release", name])
    }

    /// Where an area lies in the guest: page frames in order.
    pub fn frames(&mut self, name: &str) -> Result<Vec<u64>> {
        let words = self.ask(&["frames", name], &mut |_| {})?;
        words.iter().map(|word| word.parse().context("a page frame")).collect()
    }

    /// Start that many processes, each with memory of `kind` that it writes.
    pub fn fork(&mut self, kind: &str, count: u64, bytes: u64, seed: u64) -> Result<()> {
        self.tell(&["fork", kind, &count.to_string(), &bytes.to_string(), &seed.to_string()])
    }

    /// Start a process on one CPU, and do not wait until it has written its memory.
    pub fn begin_to_fork(&mut self, kind: &str, bytes: u64, seed: u64, cpu: u32) -> Result<()> {
        self.tell(&["begin", kind, &bytes.to_string(), &seed.to_string(), &cpu.to_string()])
    }

    /// Wait until it has.
    pub fn end_to_fork(&mut self) -> Result<()> {
        self.tell(&["process", "ready"])
    }

    /// Where the memory of the last process lies in the guest.
    pub fn last_process_frames(&mut self) -> Result<Vec<u64>> {
        let words = self.ask(&["process", "frames"], &mut |_| {})?;
        words.iter().map(|word| word.parse().context("a page frame")).collect()
    }

    /// Which of its pages the last process has in a frame of the guest. (The console is too slow to
    /// ask for the frames of a large one.)
    pub fn place_in_last_process(&mut self, frame: u64) -> Result<u64> {
        let words = self.ask(&["process", "place", &frame.to_string()], &mut |_| {})?;
        words.first().and_then(|place| place.parse().ok()).context("no place")
    }

    /// Let the last process read its memory, which it must not survive: the signal that ended it.
    pub fn last_process_dies(&mut self) -> Result<i32> {
        let words = self.ask(&["process", "dies"], &mut |_| {})?;
        words.first().and_then(|signal| signal.parse().ok()).context("no signal")
    }

    /// Each of the processes reads its memory.
    pub fn check_processes(&mut self) -> Result<()> {
        self.tell(&["check"])
    }

    /// Each of them reads its memory once more, and ends.
    pub fn join(&mut self) -> Result<()> {
        self.tell(&["join"])
    }

    /// Ask KVM, by `KVM_HC_MAP_GPA_RANGE`, to convert pages.
    pub fn convert(&mut self, frame: u64, pages: u64, attributes: u64) -> Result<()> {
        self.tell(&["convert", &frame.to_string(), &pages.to_string(), &attributes.to_string()])
    }

    /// The same, and do not wait: see [`Guest::end_to_convert`].
    pub fn begin_to_convert(&mut self, frame: u64, pages: u64, attributes: u64) -> Result<()> {
        self.request(&["convert", &frame.to_string(), &pages.to_string(), &attributes.to_string()])
    }

    /// Wait for KVM's answer: whether the pages were converted.
    pub fn end_to_convert(&mut self) -> Result<bool> {
        let text = self.lines.next(Instant::now() + self.limit)?;
        match answer(&text) {
            Some((n, Answer::Done(_))) if n == self.number => Ok(true),
            Some((n, Answer::Refused(_))) if n == self.number => Ok(false),
            _ => bail!("the guest says {text:?}"),
        }
    }

    /// Let both of its CPUs convert the pages of a locked area at once, there and back, in that many
    /// rounds; an odd number ends with shared pages, whose content is the number of the last round.
    pub fn convert_from_two_cpus(&mut self, name: &str, rounds: u64) -> Result<()> {
        self.tell(&["conversions", "two", name, &rounds.to_string()])
    }

    /// Let its second CPU make the first page of a locked area private, and the first CPU, as soon
    /// as it is so, shared again, and write it. Does not wait: see [`Guest::has_answered`].
    pub fn begin_to_convert_against(&mut self, name: &str, seed: u64) -> Result<()> {
        self.request(&["conversions", "against", name, &seed.to_string()])
    }

    /// Wait until the second CPU has made that conversion.
    pub fn end_to_convert_against(&mut self) -> Result<()> {
        self.tell(&["conversions", "joined"])
    }

    /// Whether the answer to a request comes within that time: it must be a plain yes.
    pub fn has_answered(&mut self, within: Duration) -> Result<bool> {
        match self.lines.next(Instant::now() + within) {
            Ok(text) => match answer(&text) {
                Some((n, Answer::Done(_))) if n == self.number => Ok(true),
                _ => bail!("the guest says {text:?}"),
            },
            Err(e) if e.is::<TimeIsUp>() => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Let it convert the pages of an area there and back, and write them each time, until QEMU is
    /// gone.
    pub fn convert_for_ever(&mut self, name: &str) -> Result<()> {
        self.request(&["storm", name])
    }

    /// A file of the guest's.
    pub fn read(&mut self, path: &str) -> Result<String> {
        let mut words = self.ask(&["read", path], &mut |_| {})?;
        words.pop().with_context(|| format!("{path} is not there"))
    }

    pub fn write(&mut self, path: &str, text: &str) -> Result<()> {
        self.tell(&["write", path, text])
    }

    /// A figure of the guest's `/proc/meminfo`, in bytes.
    pub fn meminfo(&mut self, key: &str) -> Result<u64> {
        let text = self.read("/proc/meminfo")?;
        crate::mem::kib_of(&text, key).with_context(|| format!("the guest has no {key}"))
    }

    /// Run a shell command, and return its exit code. `said` gets its output, a `char` per byte.
    pub fn run(&mut self, command: &str, said: &mut dyn FnMut(&str)) -> Result<i32> {
        let words = self.ask(&["run", command], said)?;
        words.first().and_then(|code| code.parse().ok()).context("the command has no exit code")
    }

    /// A shell on the console, until it ends.
    pub fn shell(&mut self) -> Result<i32> {
        let words = self.ask(&["shell"], &mut |_| {})?;
        words.first().and_then(|code| code.parse().ok()).context("the shell has no exit code")
    }

    /// Switch it off. QEMU ends.
    pub fn off(&mut self) -> Result<()> {
        self.tell(&["off"])
    }

    /// Drop the caches of the guest's kernel and compact its memory, so that figures do not depend
    /// on its boot.
    pub fn tidy(&mut self) -> Result<()> {
        self.write("/proc/sys/vm/drop_caches", "3")?;
        // Not every kernel has this.
        let _ = self.write("/proc/sys/vm/compact_memory", "1");
        Ok(())
    }
}
