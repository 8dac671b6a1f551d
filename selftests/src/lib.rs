// SPDX-License-Identifier: GPL-2.0
//! The library of the memfile selftests and the demo.
//!
//! Layers, each using only those above it; `scripts/check-layers` proves it:
//!
//! - [`uapi`]: numbers and structures of the kernel interface, checked at compile time.
//! - [`pattern`]: the position- and generation-dependent content that makes a stale read visible.
//! - [`skip`]: the error of a case that this machine cannot test.
//! - [`sys`]: thin system call wrappers that keep the errno.
//! - [`mem`]: the kernel's figures of memory use.
//! - [`guest`]: the guest program and its mailbox.
//! - [`knobs`]: settings of the kernel.
//! - [`ktap`]: the test runner.
//! - [`module`]: loading and unloading kernel modules.
//! - [`vm`]: virtual machines, memory slots and vCPUs.
//! - [`consumer`]: the second consumer of memfiles, `/dev/memfile-test`.
//! - [`store`]: the second store of memfiles, `/dev/memfile-store`.
//! - [`pressure`]: ways to make the kernel move, swap or lose memory, and checks that it did.
//! - [`script`]: sequences of operations of several threads, as data.
//! - [`agent`]: process 1 of a real guest.
//! - [`qemu`]: a real QEMU with a real guest.
//! - [`demo`]: what each kind of memory costs the host, and when.
//! - [`bench`]: the cost of operations, in instructions.
//! - [`trace`]: the life of one page.
//! - [`support`]: helpers of several suites.
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
pub mod script;
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
