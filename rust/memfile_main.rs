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

use kernel::debugfs;
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
#[pin_data]
struct Memfile {
    _registration: abi::ops::Registration,
    #[pin]
    _counters: debugfs::File<()>,
    #[pin]
    _files: debugfs::File<()>,
    _debugfs: debugfs::Dir,
}

impl kernel::InPlaceModule for Memfile {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        let debugfs = debugfs::Dir::new(c"memfile");
        try_pin_init!(Self {
            // First: it initialises what the files show.
            _registration: abi::ops::Registration::new()?,
            _counters <- debugfs.read_callback_file(c"counters", (), &engine::stats::show),
            _files <- debugfs.read_callback_file(c"files", (), &engine::stats::show_files),
            _debugfs: debugfs,
        })
    }
}
