// SPDX-License-Identifier: GPL-2.0

//! What C and Rust call each other through pointers has the same type in both, also by the measure
//! of control-flow integrity.
//!
//! With `CONFIG_CFI` an indirect call goes only where a hash of the function's type is the same. C
//! and Rust make the same one of integers of the same size and sign (Rust needs
//! `CFI_ICALL_NORMALIZE_INTEGERS`), of `bool`, of structs by their names, and of pointers to all of
//! these. So it is nearly enough that rustc takes no function where bindgen's type is wanted. Not
//! enough is it where bindgen says something else than C: an enum has its name in C and is an alias
//! of an integer in the bindings, and a callback among the arguments becomes an [`Option`].
//!
//! Therefore the bindings are compiled here once more, with an `int` that is a type of its own, and
//! nothing is taken for an argument of a callback that might be an alias of an enum. If a callback
//! has a new one, make a type with the enum's name, as [`bindings::migrate_mode`] is, or give it an
//! `int` in C.

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

// No `u32`, no `i32`: an enum looks like that.
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

/// Has the same hash in both.
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

// All there is in them: a new callback does not compile unless it is here.
check! {
    memfile_core_ops {
        create destroy set_size fallocate show_fdinfo register_notifier unregister_notifier
        referenced writeout_start writeout_undone invalidate_start invalidate_end next_range
        migrate_folio error_folio; owner
    }
    memfile_backing_store { get_pfn put_pfn }
    memfile_notifier_ops { invalidate_start invalidate_end test_clear_young }
    memfile_store {
        lookup get_page fallocate set_flags allocate_movable leave_movable_areas migrate_folio
    }
}

const _: fn(&c::memfile_show_t) = same;
