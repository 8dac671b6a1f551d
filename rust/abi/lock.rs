// SPDX-License-Identifier: GPL-2.0

//! Locks that belong to the whole module.

/// A static mutex: `kernel::sync::global_lock!`, whose `unsafe` stays in this layer.
///
/// The registration of the core initialises each of them, before any other code can call the
/// module. A new one must be added there.
macro_rules! module_mutex {
    ($(#[$doc:meta])* static $name:ident: $type:ty = $value:expr;) => {
        kernel::sync::global_lock! {
            $(#[$doc])*
            // SAFETY: The core's registration initialises it before C can call the module.
            pub(crate) unsafe(uninit) static $name: Mutex<$type> = $value;
        }
    };
}

pub(crate) use module_mutex;
