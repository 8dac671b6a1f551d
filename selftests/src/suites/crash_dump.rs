// SPDX-License-Identifier: GPL-2.0
//! The dump of a kernel that crashed while guests had private memory. `scripts/check` boots a
//! machine for it: there `memfile-crash` makes the guests and crashes the kernel, and the suite
//! runs on the next kernel.

use anyhow::ensure;

use crate::ktap::{CaseResult, Suite};
use crate::pressure::Dump;
use crate::support::crash::{HIDDEN, PINNED, SIZE};
use crate::{MIB, suite};

pub static SUITE: Suite =
    suite!("crash_dump", [memory_out_of_the_direct_map_can_be_dumped_like_any_other: 300]);

/// Higher than any address of these guests.
const END: u64 = 1 << 40;

fn memory_out_of_the_direct_map_can_be_dumped_like_any_other() -> CaseResult {
    let dump = Dump::open()?;
    // All of it is read, so that no page ends that with an error.
    let found = dump.search(&[HIDDEN, PINNED], 0, END)?;
    println!("{} MiB of a dump; found {found:?} times", dump.size() / MIB);
    ensure!(dump.size() > 1024 * MIB, "the dump has {} bytes", dump.size());
    for (name, found) in ["hidden", "pinned"].into_iter().zip(found) {
        ensure!(found >= SIZE / 64, "what the guest wrote to {name} memory: {found} times");
    }
    Ok(())
}
