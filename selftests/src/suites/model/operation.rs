// SPDX-License-Identifier: GPL-2.0
//! The operations on a file of shmem, and which of them comes next.

use super::dice::{Dice, KEEP, PUNCH, REFUSED};
use crate::uapi::*;

/// The operations on a file.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    Read {
        at: u64,
        len: u64,
    },
    Write {
        at: u64,
        len: u64,
    },
    /// Through a mapping: shared or not, existing or new, by this program or by the kernel on its
    /// behalf.
    Touch {
        at: u64,
        write: bool,
        shared: bool,
        held: bool,
        by_kernel: bool,
    },
    Fallocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
    Refused(usize),
    Truncate(u64),
    Seal(u32),
    Seek {
        from: u64,
        data: bool,
    },
    /// To or from a pipe.
    Splice {
        at: u64,
        len: u64,
        write: bool,
    },
    /// To a pipe, or from another file.
    Send {
        at: u64,
        len: u64,
        write: bool,
    },
    Copy {
        from: u64,
        to: u64,
        len: u64,
    },
}

impl Operation {
    /// A random one on a file of `size` bytes.
    pub fn random(dice: &mut Dice, size: u64) -> Operation {
        let (at, len) = dice.range(size);
        match dice.below(20) {
            0 | 1 => Operation::Read { at, len },
            2..5 => Operation::Write { at, len },
            5..9 => Operation::Touch {
                at: at & !7,
                write: dice.coin(),
                shared: dice.below(4) > 0,
                held: dice.coin(),
                by_kernel: dice.coin(),
            },
            9 | 10 => {
                Operation::Fallocate { mode: [0, KEEP][dice.coin() as usize], offset: at, len }
            }
            11 | 12 => Operation::Fallocate { mode: PUNCH, offset: at, len },
            13 => match dice.below(16) {
                0 => Operation::Fallocate { mode: PUNCH, offset: at, len: i64::MAX as u64 - at },
                1 | 2 => Operation::Refused(dice.below(REFUSED.len() as u64) as usize),
                _ => Operation::Seek { from: at, data: dice.coin() },
            },
            14 => Operation::Truncate(at),
            15 => Operation::Seek { from: at, data: dice.coin() },
            16 => Operation::Splice { at, len, write: dice.coin() },
            17 => Operation::Send { at, len, write: dice.coin() },
            18 => Operation::Copy { from: at, to: dice.offset(size), len },
            _ => match dice.below(40) {
                0 => Operation::Seal(F_SEAL_SHRINK),
                1 => Operation::Seal(F_SEAL_GROW),
                2 => Operation::Seal(F_SEAL_FUTURE_WRITE),
                3 => Operation::Seal(F_SEAL_WRITE | F_SEAL_SHRINK),
                4 => Operation::Seal(F_SEAL_SEAL),
                _ => Operation::Write { at, len },
            },
        }
    }
}
