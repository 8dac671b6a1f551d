// SPDX-License-Identifier: GPL-2.0
//! A script and its text.

use std::fmt::{self, Write as _};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::op::{Op, THREADS};
use crate::sys::Errno;

/// An operation and the thread that does it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Step {
    pub thread: u8,
    pub op: Op,
}

/// A script.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Script {
    pub steps: Vec<Step>,
}

impl fmt::Display for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for step in &self.steps {
            let op = serde_json::to_string(&step.op).map_err(|_| fmt::Error)?;
            writeln!(f, "{} {op}", step.thread)?;
        }
        Ok(())
    }
}

impl Script {
    /// The script of a text.
    pub fn parse(text: &str) -> Result<Script> {
        let lines = text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#'));
        let steps = lines.map(|line| {
            let step = || -> Result<Step> {
                let (thread, op) = line.split_once(' ').context("no thread")?;
                Ok(Step { thread: thread.parse()?, op: serde_json::from_str(op)? })
            };
            step().with_context(|| format!("the line {line:?}"))
        });
        Ok(Script { steps: steps.collect::<Result<_>>()? })
    }

    /// The scripts of a text with several, by name.
    pub fn parse_all(text: &str) -> Result<Vec<(String, Script)>> {
        let mut texts: Vec<(String, String)> = Vec::new();
        for line in text.lines() {
            if let Some(name) = line.strip_prefix("==") {
                texts.push((name.trim().to_owned(), String::new()));
            } else if let Some((_, text)) = texts.last_mut() {
                writeln!(text, "{line}")?;
            }
        }
        let parsed = |(name, text): (String, String)| {
            let script = Script::parse(&text).with_context(|| name.clone())?;
            Ok((name, script))
        };
        texts.into_iter().map(parsed).collect()
    }

    /// The operations of a thread.
    pub(super) fn of(&self, thread: usize) -> impl Iterator<Item = &Op> {
        let mine = move |s: &&Step| usize::from(s.thread) % THREADS == thread || s.op == Op::Meet;
        self.steps.iter().filter(mine).map(|step| &step.op)
    }
}

/// Called when a thread of a script begins and ends, and with the result of each operation.
pub trait Probe: Sync {
    fn enter(&self, thread: usize);
    fn leave(&self, thread: usize);
    /// `errno` is the last that the operation met, 0 if it met none.
    fn ended(&self, thread: usize, op: &Op, errno: Errno);
}

/// Ignores all calls.
pub struct NoProbe;

impl Probe for NoProbe {
    fn enter(&self, _thread: usize) {}
    fn leave(&self, _thread: usize) {}
    fn ended(&self, _thread: usize, _op: &Op, _errno: Errno) {}
}

#[cfg(test)]
mod tests {
    use super::super::op::{Machine, Range};
    use super::*;

    fn script() -> Script {
        let range = Range { at: 3, pages: 9 };
        let steps = [
            (0, Op::File { file: 1, flags: 0x20, pages: 16 }),
            (2, Op::Fallocate { file: 1, mode: 3, range, bytes: 0 }),
            (0, Op::Meet),
            (1, Op::Machine(Machine::Reclaim { pages: 7 })),
        ];
        Script { steps: steps.map(|(thread, op)| Step { thread, op }).to_vec() }
    }

    #[test]
    fn text_is_the_script() {
        let script = script();
        assert_eq!(Script::parse(&script.to_string()).unwrap(), script);
        let text = format!("# a comment\n== first\n{script}\n== second\n{script}");
        let all = Script::parse_all(&text).unwrap();
        assert_eq!(all, [("first".into(), script.clone()), ("second".into(), script)]);
    }

    #[test]
    fn threads_share_their_meetings_only() {
        let script = script();
        assert_eq!(script.of(0).count(), 2);
        assert_eq!(script.of(1).count(), 2);
        assert_eq!(script.of(2).count(), 2);
    }

    #[test]
    fn line_that_is_no_operation_is_an_error() {
        assert!(Script::parse("0 {\"Sing\":{}}").is_err());
        assert!(Script::parse("Meet").is_err());
    }
}
