// SPDX-License-Identifier: GPL-2.0

//! memfile: private memory for guests, through a file descriptor.
//!
//! Five layers. Each knows only those below it, and no file knows, by way of others, itself;
//! `scripts/check-layers` proves it.
//!
//! * [`entry`]: what C calls, the core's callbacks and the exports for other modules.
//! * [`engine`]: what a memfile does, whatever its store. No `unsafe`.
//! * [`store`]: where the pages are: one trait, shmem, and the stores of other modules. No `unsafe`.
//! * [`abi`]: C's objects as safe Rust.
//! * [`policy`]: what is allowed and who hears of what. No `unsafe`, no `kernel::`, tested on the
//!   host as well.
//!
//! Only `entry` and `abi`, where all the `unsafe` is, see C itself (`bindings`). `kunit`, above all of
//! them, tests the engine.
//!
//! Start reading at [`engine::node`]: it owns the lock, and says in which order things are taken.

use kernel::prelude::*;

mod abi;
mod bindings;
mod engine;
mod entry;
#[cfg(CONFIG_KUNIT = "y")]
mod kunit;
mod policy;
mod store;

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
    _registration: entry::ops::Registration,
    _debugfs: abi::debugfs::Dir,
}

impl kernel::Module for Memfile {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        // First: it initialises what the files show. And last what cannot fail: whoever has opened
        // a file by then may not be left without a module.
        let registration = entry::ops::Registration::new()?;
        let debugfs = abi::debugfs::Dir::new(c"memfile");
        debugfs.add::<engine::stats::Totals>();
        debugfs.add::<engine::stats::Each>();
        Ok(Self {
            _registration: registration,
            _debugfs: debugfs,
        })
    }
}
