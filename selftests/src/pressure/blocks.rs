// SPDX-License-Identifier: GPL-2.0
//! Memory blocks: taking memory away from the kernel while it runs.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{KPF_HWPOISON, page_flags_from, raw_write, read};
use crate::PAGE;
use crate::skip::skip;
use crate::sys::{Alarm, Errno, SysResult, expect_errno, require_root};

const ROOT: &str = "/sys/devices/system/memory";

/// The kernel tries for ever to take a block offline if a page of it does not move. The time limits
/// where a page may refuse, and where no page may.
const LIMIT: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(30);

/// A block of memory that can go offline as a whole.
#[derive(Clone, Debug)]
pub struct Block {
    path: PathBuf,
    number: u64,
}

impl Block {
    /// Bytes in each.
    pub fn size() -> Result<u64> {
        let text = read(format!("{ROOT}/block_size_bytes"))?;
        u64::from_str_radix(&text, 16).context("block_size_bytes")
    }

    /// All blocks that are online and would come back if they went offline, in order: the kernel
    /// refuses a block of which a frame is broken (`EHWPOISON`). SKIP without memory hotplug.
    pub fn online() -> Result<Vec<Block>> {
        require_root()?;
        let Ok(entries) = fs::read_dir(ROOT) else {
            return skip("the kernel has no memory hotplug");
        };
        let mut blocks = Vec::new();
        for entry in entries {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some(number) = name.strip_prefix("memory").and_then(|n| n.parse().ok()) {
                blocks.push(Block { path, number });
            }
        }
        blocks.retain(|block| block.state().is_ok_and(|state| state == "online"));
        blocks.sort_by_key(|block| block.number);
        if crate::mem::meminfo("HardwareCorrupted")? == 0 {
            return Ok(blocks);
        }
        let mut sound = Vec::new();
        for block in blocks {
            match block.broken_frame()? {
                Some(pfn) => println!("{}: frame {pfn:#x} is broken", block.path.display()),
                None => sound.push(block),
            }
        }
        Ok(sound)
    }

    /// The first of its page frames that an earlier memory error keeps out of use.
    fn broken_frame(&self) -> Result<Option<u64>> {
        let frames = Block::size()? / PAGE;
        let first = self.number * frames;
        let flags = page_flags_from(first, frames)?;
        let broken = (first..).zip(flags).find(|(_, flags)| flags & KPF_HWPOISON != 0);
        Ok(broken.map(|(pfn, _)| pfn))
    }

    fn state(&self) -> Result<String> {
        read(self.path.join("state"))
    }

    /// Whether a page frame is in it.
    pub fn holds(&self, pfn: u64) -> Result<bool> {
        Ok(pfn * PAGE / Block::size()? == self.number)
    }

    fn raw_set(&self, state: &str) -> SysResult<()> {
        raw_write(&self.path.join("state"), state).map_err(|e| Errno(e.raw_os_error().unwrap_or(0)))
    }

    /// Move all pages out of it and take it offline. `EBUSY` if a page of it never moves; `EINTR`
    /// if a page did not move for [`LIMIT`]; `EINVAL` if it has holes.
    pub fn raw_offline(&self) -> SysResult<()> {
        self.offline_within(LIMIT)
    }

    /// The same, until the calling thread is interrupted.
    pub fn raw_offline_until_interrupted(&self) -> SysResult<()> {
        self.raw_set("offline")
    }

    fn offline_within(&self, limit: Duration) -> SysResult<()> {
        let _alarm = Alarm::set(limit).map_err(|_| Errno::EINVAL)?;
        self.raw_set("offline")
    }

    /// A block of movable pages goes offline, at once or after a few more tries: a page that is in
    /// use for a moment, or that a CPU is about to add to a list, looks like one that cannot move.
    pub fn offline(&self) -> Result<()> {
        let mut result = Ok(());
        for _ in 0..5 {
            result = self.offline_within(PATIENCE);
            if result != Err(Errno::EBUSY) {
                break;
            }
        }
        result.with_context(|| format!("take {} offline", self.path.display()))
    }

    /// Take it online: `online_movable` for movable pages only, `online_kernel` for all.
    pub fn give_back(&self, how: &str) -> Result<()> {
        self.raw_set(how).with_context(|| format!("{how} {}", self.path.display()))
    }
}

/// No block with one of these pages goes offline. Returns how many the kernel has tried.
pub fn expect_online(pages: &[u64]) -> Result<u32> {
    let size = Block::size()?;
    let numbers: BTreeSet<u64> = pages.iter().map(|pfn| pfn * PAGE / size).collect();
    let mut tried = 0;
    for block in Block::online()? {
        if numbers.contains(&block.number) {
            // EINVAL: the block has holes, or more than one zone.
            let refused = [Errno::EBUSY, Errno::EINTR, Errno::EINVAL];
            let result = block.raw_offline();
            expect_errno("offline", result, &refused)?;
            tried += u32::from(result != Err(Errno::EINVAL));
        }
    }
    Ok(tried)
}

/// Blocks for movable pages only, from which all movable pages come first. They are ordinary memory
/// again when this is dropped.
pub struct MovableZone {
    pub blocks: Vec<Block>,
}

impl MovableZone {
    /// `count` blocks. SKIP if that many are not available.
    pub fn make(count: usize) -> Result<MovableZone> {
        let mut zone = MovableZone { blocks: Vec::new() };
        for again in [false, true] {
            if again && zone.blocks.len() < count {
                // The kernel's caches may have a page in each of the other blocks.
                super::drop_caches()?;
            }
            // From the end: the kernel's own pages are more often at the start. The last block holds
            // the first allocations of all.
            for block in Block::online()?.into_iter().rev().skip(1) {
                if zone.blocks.len() == count {
                    break;
                }
                let known = zone.blocks.iter().any(|other| other.number == block.number);
                if !known && block.raw_offline().is_ok() {
                    if again {
                        println!("{} goes offline without caches", block.path.display());
                    }
                    zone.blocks.push(block.clone());
                    block.give_back("online_movable")?;
                }
            }
        }
        if zone.blocks.len() < count {
            return skip(format!("{} of {count} memory blocks go offline", zone.blocks.len()));
        }
        Ok(zone)
    }

    /// Whether a page frame is in it.
    pub fn holds(&self, pfn: u64) -> Result<bool> {
        for block in &self.blocks {
            if block.holds(pfn)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Move all pages out of each block in turn. With two blocks or more all pages stay in the
    /// zone, and each moves at least once.
    pub fn shuffle(&self) -> Result<()> {
        for block in &self.blocks {
            block.offline()?;
            block.give_back("online_movable")?;
        }
        Ok(())
    }
}

impl Drop for MovableZone {
    fn drop(&mut self) {
        for block in &self.blocks {
            let back = block.offline().and_then(|()| block.give_back("online_kernel"));
            if let Err(e) = back {
                println!("{} stays movable: {e:#}", block.path.display());
            }
        }
    }
}

/// A smaller machine: blocks that are offline until this is dropped.
pub struct SmallMachine {
    blocks: Vec<Block>,
}

impl SmallMachine {
    /// Take memory offline until about `bytes` are left in `MemTotal`, or as near as possible.
    pub fn shrink_to(bytes: u64) -> Result<SmallMachine> {
        let mut machine = SmallMachine { blocks: Vec::new() };
        let size = Block::size()?;
        for block in Block::online()?.into_iter().rev() {
            if crate::mem::meminfo("MemTotal")? < bytes + size {
                break;
            }
            if block.raw_offline().is_ok() {
                machine.blocks.push(block);
            }
        }
        let left = crate::mem::meminfo("MemTotal")?;
        println!("a machine of {} MiB", left >> 20);
        ensure!(!machine.blocks.is_empty() || left <= bytes + size, "no block goes offline");
        Ok(machine)
    }
}

impl Drop for SmallMachine {
    fn drop(&mut self) {
        for block in &self.blocks {
            if let Err(e) = block.give_back("online_kernel") {
                println!("{e:#}");
            }
        }
    }
}
