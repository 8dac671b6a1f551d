// SPDX-License-Identifier: GPL-2.0
//! Processes of a guest, each with memory of its own that it writes once and then only reads.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::area::Area;
use crate::pattern::Pattern;

/// The argument that makes the program such a process.
pub const WORKER: &str = "worker";

/// A process that waits for requests.
pub struct Worker {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    /// A process with that many bytes, which it has written when this returns.
    pub fn start(bytes: u64, seed: u64) -> Result<Worker> {
        let mut child = Command::new("/proc/self/exe")
            .args([WORKER, &bytes.to_string(), &seed.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a process")?;
        let orders = child.stdin.take();
        let answers = child.stdout.take().context("the process has no output")?;
        let mut worker = Worker { child, orders, answers: BufReader::new(answers) };
        worker.expect_answer()?;
        Ok(worker)
    }

    fn expect_answer(&mut self) -> Result<()> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(line == "right\n", "process {} says {:?}", self.child.id(), line.trim_end());
        Ok(())
    }

    /// Let it read its memory; an error if the content differs.
    pub fn verify(&mut self) -> Result<()> {
        let Some(orders) = &mut self.orders else { bail!("the process has ended") };
        orders.write_all(b"verify\n")?;
        self.expect_answer()
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
pub fn work(bytes: u64, seed: u64) -> Result<()> {
    let (area, pattern) = (Area::new("memory", "worker", bytes)?, Pattern::Generation(seed));
    area.fill(pattern)?;
    let answer = || match area.verify(pattern, 0, None) {
        Ok(()) => println!("right"),
        Err(e) => println!("{e:#}"),
    };
    answer();
    for order in std::io::stdin().lines() {
        match order?.as_str() {
            "verify" => answer(),
            other => bail!("there is no order {other}"),
        }
    }
    Ok(())
}
