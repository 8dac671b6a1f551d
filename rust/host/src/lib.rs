// SPDX-License-Identifier: GPL-2.0

//! The policy layer of the kernel module, compiled for the host.

#![forbid(unsafe_code)]
#![allow(dead_code, reason = "the module uses it, here it is only tested")]

#[path = "../../policy/mod.rs"]
mod policy;

#[cfg(test)]
mod properties;
