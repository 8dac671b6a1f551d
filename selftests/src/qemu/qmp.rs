// SPDX-License-Identifier: GPL-2.0
//! QEMU's own protocol: a line of JSON for each command, answer and event.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::lines::Lines;

/// A connection to one QEMU.
pub struct Qmp {
    lines: Lines,
    /// Events that were received and not read yet.
    events: VecDeque<Value>,
    number: u64,
}

impl Qmp {
    /// Wait for QEMU's greeting, and enable commands.
    pub fn new(stream: UnixStream, deadline: Instant) -> Result<Qmp> {
        let mut qmp = Qmp { lines: Lines::new(stream), events: VecDeque::new(), number: 0 };
        let greeting = qmp.next(deadline)?;
        ensure!(greeting.get("QMP").is_some(), "QEMU greets with {greeting}");
        qmp.execute("qmp_capabilities", json!({}), deadline)?;
        Ok(qmp)
    }

    fn next(&mut self, deadline: Instant) -> Result<Value> {
        let line = self.lines.next(deadline)?;
        serde_json::from_str(&line).with_context(|| format!("QEMU says {line:?}"))
    }

    /// Execute a command, and return its result.
    pub fn execute(&mut self, name: &str, arguments: Value, deadline: Instant) -> Result<Value> {
        self.number += 1;
        let command = json!({ "execute": name, "arguments": arguments, "id": self.number });
        self.lines.send(&format!("{command}\n"))?;
        loop {
            let mut message = self.next(deadline).with_context(|| name.to_owned())?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if message.get("id").and_then(Value::as_u64) == Some(self.number) {
                if let Some(error) = message.get("error") {
                    let text = error.get("desc").and_then(Value::as_str).unwrap_or("no reason");
                    bail!("{name}: QEMU refuses: {text}");
                }
                return Ok(message["return"].take());
            }
        }
    }

    /// The data of the next event of this name; earlier events are dropped.
    pub fn event(&mut self, name: &str, deadline: Instant) -> Result<Value> {
        loop {
            let mut event = match self.events.pop_front() {
                Some(event) => event,
                None => self.next(deadline).with_context(|| format!("wait for {name}"))?,
            };
            if event.get("event").and_then(Value::as_str) == Some(name) {
                return Ok(event["data"].take());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::time::Duration;

    use super::*;

    #[test]
    fn answers_and_events_find_who_waits_for_them() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let qemu = std::thread::spawn(move || {
            theirs.write_all(b"{\"QMP\": {}}\n").unwrap();
            let mut lines = BufReader::new(theirs.try_clone().unwrap()).lines();
            let mut answer = |text: &str| {
                lines.next().unwrap().unwrap();
                theirs.write_all(text.as_bytes()).unwrap();
            };
            answer("{\"return\": {}, \"id\": 1}\n");
            answer("{\"event\": \"A\", \"data\": 1}\n{\"return\": 7, \"id\": 2}\n");
            answer(
                "{\"error\": {\"class\": \"C\", \"desc\": \"why\"}, \"id\": 3}\n{\"event\": \"B\"}\n",
            );
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut qmp = Qmp::new(ours, deadline).unwrap();
        assert_eq!(qmp.execute("two", json!({}), deadline).unwrap(), 7);
        let error = qmp.execute("three", json!({}), deadline).unwrap_err();
        assert_eq!(error.to_string(), "three: QEMU refuses: why");
        assert_eq!(qmp.event("A", deadline).unwrap(), 1);
        assert_eq!(qmp.event("B", deadline).unwrap(), Value::Null);
        qemu.join().unwrap();
        // Now it is gone.
        assert!(qmp.event("C", deadline).is_err());
    }
}
