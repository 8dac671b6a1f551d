// SPDX-License-Identifier: GPL-2.0

//! memfile: private memory for guests, through a file descriptor.
//!
//! Five layers. Each uses only those below it, and no file uses itself by way of others;
//! `scripts/check-layers` proves it.
//!
//! * [`entry`]: the functions that C calls, the core's callbacks and the exports for other modules.
//! * [`engine`]: the behaviour of a memfile, for every store. No `unsafe`.
//! * [`store`]: the owners of the pages: one trait, shmem, hugetlbfs, and the stores of other
//!   modules. No `unsafe`.
//! * [`abi`]: C's objects as safe Rust.
//! * [`policy`]: rules and arithmetic. No `unsafe`, no `kernel::`, tested on the host as well.
//!
//! Only `entry` and `abi` use C (`bindings`), and all `unsafe` is there. `kunit`, above all of
//! them, tests the engine.
//!
//! Start reading at [`engine::node`]: it owns the lock, and states the lock order.

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
        // The registration comes first: it initialises what the files show. The files come last,
        // because they cannot fail: a task may have one open by then, so the module must stay.
        let registration = entry::ops::Registration::new()?;
        let debugfs = abi::debugfs::Dir::new(c"memfile");
        debugfs.add::<engine::stats::Totals>();
        debugfs.add::<engine::stats::Each>();
        debugfs.add::<engine::stats::Hidden>();
        Ok(Self {
            _registration: registration,
            _debugfs: debugfs,
        })
    }
}
