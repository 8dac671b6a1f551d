// SPDX-License-Identifier: GPL-2.0
//! What the memfile selftests and the demo share.
//!
//! Layers, each using only those above it; `scripts/check-layers` proves it:
//!
//! - [`uapi`]: numbers and structures of the kernel interface, checked at compile time.
//! - [`pattern`]: the position- and generation-dependent content that makes a stale read visible.
//! - [`skip`]: how a case says that this machine cannot show what it promises.
//! - [`sys`]: thin system call wrappers that keep the errno.
//! - [`mem`]: ways to see from user space who holds how much memory.
//! - [`guest`]: the guest program and its mailbox.
//! - [`knobs`]: settings of the kernel.
//! - [`ktap`]: the test runner.
//! - [`module`]: loading and unloading kernel modules.
//! - [`vm`]: virtual machines, memory slots and vCPUs.
//! - [`consumer`]: the second consumer of memfiles, `/dev/memfile-test`.
//! - [`store`]: the second store of memfiles, `/dev/memfile-store`.
//! - [`pressure`]: making the kernel move, swap or lose memory, and seeing that it did.
//! - [`agent`]: process 1 of a real guest.
//! - [`qemu`]: a real QEMU with a real guest.
//! - [`demo`]: the table of who pays for which memory, and when.
//! - [`bench`]: what operations cost, in instructions.
//! - [`trace`]: the life of one page.
//! - [`support`]: what several suites need.
//! - [`suites`]: the tests.

pub mod agent;
pub mod bench;
pub mod consumer;
pub mod demo;
pub mod guest;
pub mod knobs;
pub mod ktap;
pub mod mem;
pub mod module;
pub mod pattern;
pub mod pressure;
pub mod qemu;
pub mod skip;
pub mod store;
pub mod suites;
pub mod support;
pub mod sys;
pub mod trace;
pub mod uapi;
pub mod vm;

/// Bytes in a base page. x86-64 has no other.
pub const PAGE: u64 = 4096;
/// Bytes in a page of the next level.
pub const HUGE: u64 = 2 << 20;
/// Bytes in a MiB.
pub const MIB: u64 = 1 << 20;
/// Bytes in a GiB.
pub const GIB: u64 = 1 << 30;
