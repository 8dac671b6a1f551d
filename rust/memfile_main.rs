// SPDX-License-Identifier: GPL-2.0

//! memfile: private memory for guests, through a file descriptor.
//!
//! Three layers, each knows only those below it:
//!
//! * [`engine`]: what a memfile does. No `unsafe`.
//! * [`abi`]: C as safe Rust, and Rust as C callbacks. All the `unsafe`.
//! * [`policy`]: what is allowed and who hears of what. No `unsafe`, no `kernel::`, tested on the
//!   host as well.
//!
//! Start reading at [`engine::node`]: it owns the lock, and says in which order things are taken.

use kernel::prelude::*;

mod abi;
mod bindings;
mod engine;
mod policy;

module! {
    type: Memfile,
    name: "memfile",
    authors: ["The memfile authors"],
    description: "Private memory for guests, through a file descriptor",
    license: "GPL",
    alias: ["memfile-core"],
}

/// The loaded module: registered with the kernel from its load to its unload.
struct Memfile {
    _registration: abi::ops::Registration,
    _debugfs: abi::debugfs::Dir,
}

impl kernel::Module for Memfile {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        // First: it initialises what the files show. And last what cannot fail: whoever has opened
        // a file by then may not be left without a module.
        let registration = abi::ops::Registration::new()?;
        let debugfs = abi::debugfs::Dir::new(c"memfile");
        debugfs.add::<engine::stats::Totals>();
        debugfs.add::<engine::stats::Each>();
        Ok(Self {
            _registration: registration,
            _debugfs: debugfs,
        })
    }
}
