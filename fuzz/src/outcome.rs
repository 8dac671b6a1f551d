// SPDX-License-Identifier: GPL-2.0
//! The outcome of a script on any kernel: how its operations ended, and what the kernel
//! counted.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::mem::discriminant;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Result;
use memfile_selftests::script::op::{Op, THREADS};
use memfile_selftests::sys::{self, Errno, Mapping};

/// Outcomes that are told apart.
pub const OUTCOMES: usize = 1 << 14;
/// Changes of counters that are told apart.
pub const CHANGES: usize = 1 << 12;

/// Counters of the kernel that change with what scripts do.
const FILES: [&str; 2] = ["/sys/kernel/debug/memfile/counters", "/proc/vmstat"];
const PREFIXES: [&str; 9] = [
    "thp_",
    "pgmigrate",
    "compact_",
    "pswp",
    "htlb_",
    "pgsteal_",
    "pgrefill",
    "ksm_",
    "direct_map",
];

fn hash(what: impl Hash) -> usize {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish() as usize
}

/// The kind of an operation, without its places.
fn kind(op: &Op) -> usize {
    let detail = match op {
        Op::File { flags, .. } | Op::HugeFile { flags, .. } => *flags as usize,
        Op::Fallocate { mode, .. } => usize::from(*mode),
        Op::Seal { seals, .. } => usize::from(*seals),
        Op::Reach { way, .. } => hash(way),
        Op::Guest { act, answer, .. } => hash((act, answer)),
        Op::Advise { advice, .. } => hash(advice),
        Op::Slot { flags, shift, .. } => hash((flags, *shift != 0)),
        Op::Convert { private, region, .. } => hash((private, region)),
        Op::Bind { mode, .. } => usize::from(*mode % 3),
        Op::Store { what, .. } => hash(discriminant(what)),
        Op::Machine(machine) => hash(discriminant(machine)),
        _ => 0,
    };
    hash((discriminant(op), detail))
}

/// How operations ended, shared with the process that runs the script.
pub struct Outcomes {
    seen: Mapping,
    last: [AtomicU64; THREADS],
}

impl Outcomes {
    pub fn new() -> Result<Outcomes> {
        let len = OUTCOMES as u64 * 8;
        let fd = sys::memfd(len)?;
        Ok(Outcomes { seen: Mapping::shared(&fd, 0, len)?, last: Default::default() })
    }

    /// Forget what was seen.
    pub fn clear(&self) {
        (0..OUTCOMES as u64).for_each(|n| self.seen.store(n * 8, 0));
        self.last.iter().for_each(|last| last.store(0, Ordering::Relaxed));
    }

    /// An operation has ended: what it was, and what came before it in its thread.
    pub fn ended(&self, thread: usize, op: &Op, errno: Errno) {
        let now = hash((kind(op), errno)) as u64;
        let last = self.last[thread].swap(now, Ordering::Relaxed);
        for what in [hash(now), hash((last, now))] {
            self.seen.store((what % OUTCOMES) as u64 * 8, 1);
        }
    }

    /// Mark in `map` what was seen.
    pub fn mark(&self, map: &mut [u8]) {
        for (n, byte) in (0..OUTCOMES as u64).zip(map) {
            *byte = u8::from(self.seen.load(n * 8) != 0);
        }
    }
}

/// The counters of the kernel.
pub struct Counters(HashMap<String, u64>);

impl Counters {
    pub fn now() -> Counters {
        let mut counters = HashMap::new();
        for file in FILES {
            // A counter that a kernel does not have does not change.
            for line in std::fs::read_to_string(file).unwrap_or_default().lines() {
                let Some((name, value)) = line.split_once(' ') else { continue };
                let ours = file == FILES[0] || PREFIXES.iter().any(|p| name.starts_with(p));
                if let (true, Ok(value)) = (ours, value.trim().parse()) {
                    counters.insert(name.to_owned(), value);
                }
            }
        }
        Counters(counters)
    }

    /// Mark in `map` which have grown since, each by about how much.
    pub fn mark(&self, map: &mut [u8]) {
        let now = Counters::now();
        for (name, value) in &now.0 {
            let grown = value.saturating_sub(self.0.get(name).copied().unwrap_or(0));
            if grown != 0 {
                map[hash((name, grown.ilog2() / 2)) % CHANGES] = 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcome_is_told_from_another() {
        let outcomes = Outcomes::new().unwrap();
        let op = Op::Close { file: 1 };
        let mut maps = vec![vec![0; OUTCOMES]; 3];
        for (errno, map) in [0, 0, libc::EPERM].into_iter().zip(&mut maps) {
            outcomes.clear();
            outcomes.ended(0, &op, Errno(errno));
            outcomes.mark(map);
        }
        assert_eq!(maps[0], maps[1]);
        assert_ne!(maps[0], maps[2]);
    }
}
