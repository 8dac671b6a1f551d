// SPDX-License-Identifier: GPL-2.0

//! The policy layer of the kernel module, compiled for the host; for the tests also
//! `engine/node.rs`, without a kernel.

#![deny(unsafe_code)]
#![allow(dead_code, reason = "the module uses it, here it is only tested")]

#[path = "../../policy/mod.rs"]
mod policy;

#[cfg(test)]
extern crate self as kernel;
#[cfg(test)]
use stand_in::{new_condvar, new_spinlock, prelude, seq_file, seq_print, sync};

#[cfg(test)]
mod abi;
#[cfg(test)]
mod allocation;
#[cfg(test)]
mod cost;
#[cfg(test)]
mod engine;
#[cfg(test)]
mod stand_in;

#[cfg(test)]
mod lifetime;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod protocol;
#[cfg(test)]
mod sequence;
#[cfg(test)]
mod store;
