// SPDX-License-Identifier: GPL-2.0
//! Processes of a guest, each with memory of its own that it writes once and then only reads.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::area::Area;
use crate::pattern::Pattern;
use crate::sys;

/// The argument that makes the program such a process.
pub const WORKER: &str = "worker";

/// A process that waits for requests.
pub struct Worker {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    /// A process with that many bytes of `kind`, which it has written when this returns.
    pub fn start(kind: &str, bytes: u64, seed: u64) -> Result<Worker> {
        let mut worker = Worker::begin(kind, bytes, seed, None)?;
        worker.expect_answer()?;
        Ok(worker)
    }

    /// The same, perhaps on one CPU only, which writes it from now on.
    pub fn begin(kind: &str, bytes: u64, seed: u64, cpu: Option<&str>) -> Result<Worker> {
        let mut child = Command::new("/proc/self/exe")
            .args([WORKER, kind, &bytes.to_string(), &seed.to_string()])
            .args(cpu)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a process")?;
        let orders = child.stdin.take();
        let answers = child.stdout.take().context("the process has no output")?;
        Ok(Worker { child, orders, answers: BufReader::new(answers) })
    }

    fn order(&mut self, what: &str) -> Result<()> {
        let Some(orders) = &mut self.orders else { bail!("the process has ended") };
        orders.write_all(format!("{what}\n").as_bytes()).context("order a process")
    }

    /// Its next line; none if it has ended.
    fn answer(&mut self) -> Result<Option<String>> {
        let mut line = String::new();
        let count = self.answers.read_line(&mut line)?;
        Ok((count > 0).then(|| line.trim_end().to_owned()))
    }

    /// Wait until it has found its content right.
    pub fn expect_answer(&mut self) -> Result<()> {
        let line = self.answer()?.unwrap_or_default();
        ensure!(line == "right", "process {} says {line:?}", self.child.id());
        Ok(())
    }

    /// Let it read its memory; an error if the content differs.
    pub fn verify(&mut self) -> Result<()> {
        self.order("verify")?;
        self.expect_answer()
    }

    /// The guest's page frames of its memory, in order.
    pub fn frames(&mut self) -> Result<Vec<String>> {
        self.order("frames")?;
        let line = self.answer()?.context("the process has ended")?;
        Ok(line.split_whitespace().map(str::to_owned).collect())
    }

    /// Let it read its memory, and return the signal that ends it meanwhile.
    pub fn die(mut self) -> Result<i32> {
        self.order("verify")?;
        if let Some(line) = self.answer()? {
            bail!("process {} lives and says {line:?}", self.child.id());
        }
        let status = self.child.wait()?;
        status.signal().with_context(|| format!("the process ended with {status}"))
    }

    /// Let it read its memory once more, and end.
    pub fn end(mut self) -> Result<()> {
        self.verify()?;
        self.orders = None;
        let status = self.child.wait()?;
        ensure!(status.success(), "a process ended with {status}");
        Ok(())
    }
}

/// The process itself.
pub fn work(kind: &str, bytes: u64, seed: u64, cpu: Option<&str>) -> Result<()> {
    if let Some(cpu) = cpu {
        sys::run_on_cpu(cpu.parse()?)?;
    }
    let (area, pattern) = (Area::new(kind, "worker", bytes)?, Pattern::Generation(seed));
    area.fill(pattern)?;
    let answer = || match area.verify(pattern, 0, None) {
        Ok(()) => println!("right"),
        Err(e) => println!("{e:#}"),
    };
    answer();
    for order in std::io::stdin().lines() {
        match order?.as_str() {
            "verify" => answer(),
            "frames" => {
                let frames: Vec<_> = area.frames()?.iter().map(u64::to_string).collect();
                println!("{}", frames.join(" "));
            }
            other => bail!("there is no order {other}"),
        }
    }
    Ok(())
}
