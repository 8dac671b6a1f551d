// SPDX-License-Identifier: GPL-2.0

//! Checks that each function that C and Rust call through a pointer has the same type in both
//! languages, also for control-flow integrity.
//!
//! With `CONFIG_CFI` an indirect call succeeds only if caller and function have the same hash of
//! the function's type. C and Rust compute the same hash for integers of the same size and sign
//! (Rust needs `CFI_ICALL_NORMALIZE_INTEGERS`), for `bool`, for structs by their names, and for
//! pointers to all of these. So rustc's own type check against bindgen's types is nearly enough. It
//! is not enough where bindgen's type differs from C's: an enum has its name in C and is an alias
//! of an integer in the bindings, and a callback among the arguments becomes an [`Option`].
//!
//! Therefore this module compiles the bindings once more, with an `int` that is a type of its own,
//! and accepts no argument type that may be an alias of an enum. If a new callback takes an enum,
//! make a type with the enum's name, as [`bindings::migrate_mode`] is, or give it an `int` in C.

use crate::bindings;
use kernel::ffi::c_void;

#[allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    non_camel_case_types,
    non_upper_case_globals,
    unreachable_pub,
    reason = "generated"
)]
mod c {
    pub(super) mod ctypes {
        pub(crate) use kernel::ffi::*;

        #[derive(Clone, Copy, Default)]
        #[repr(transparent)]
        pub(crate) struct c_int(i32);
    }

    use crate::bindings::*;
    include!(env!("MEMFILE_BINDINGS"));
}

/// May be passed by value.
trait Value {}

/// May be pointed to.
trait Target {}

macro_rules! implement {
    ($name:ident: $($type:ty,)*) => { $(impl $name for $type {})* };
}

// No `u32`, no `i32`: an enum is an alias of one of them.
implement! {
    Value: (), bool, u64, i64, usize, isize, c::ctypes::c_int, bindings::migrate_mode,
}
implement! {
    Target: c_void, bindings::address_space, bindings::file, bindings::folio, bindings::inode,
    bindings::page, bindings::seq_file, c::memfile_invalidation, c::memfile_node,
    c::memfile_notifier, c::memfile_pfn, c::memfile_range,
}
impl<T: Target> Value for *mut T {}
impl<T: Target> Value for *const T {}

/// Has the same hash in both languages.
trait Callback {}

macro_rules! callbacks {
    ($($($arg:ident)*,)*) => {
        $(impl<R: Value, $($arg: Value),*> Callback for unsafe extern "C" fn($($arg),*) -> R {})*
    };
}
callbacks! { A, A B, A B C, A B C D, A B C D E, }

fn same<T: Callback>(_: &Option<T>) {}

macro_rules! check {
    ($($name:ident { $($callback:ident)* $(; $other:ident)* })*) => {
        $(const _: fn(&c::$name) = |c::$name { $($callback,)* $($other: _,)* }| {
            $(same($callback);)*
        };)*
    };
}

// All fields: a new callback does not compile unless it is listed here.
check! {
    memfile_core_ops {
        create destroy set_size fallocate show_fdinfo register_notifier unregister_notifier
        referenced writeout_start writeout_undone invalidate_start invalidate_end next_range
        migrate_folio error_folio; owner
    }
    memfile_backing_store { get_pfn put_pfn prefault }
    memfile_notifier_ops { invalidate_start invalidate_end test_clear_young }
    memfile_store {
        lookup get_page fallocate set_flags allocate_movable leave_movable_areas migrate_folio
    }
}

const _: fn(&c::memfile_show_t) = same;
