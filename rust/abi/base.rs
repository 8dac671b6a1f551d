// SPDX-License-Identifier: GPL-2.0

//! All differences between the kernels that the module is made for: a move to another kernel begins
//! here. `Documentation/porting.rst` has the steps.
//!
//! Errors: `kernel::error::code` has these since 7.3. An [`Error`] can be made in a constant only
//! there, hence functions. Devices: the open files of `kernel::miscdevice` hold their module since
//! 7.3.

#![allow(
    dead_code,
    reason = "each module takes all of this file, and uses some of it"
)]

use core::marker::PhantomData;
use kernel::bindings;
use kernel::error::{
    to_result,
    Error, //
};
use kernel::miscdevice::{
    MiscDevice,
    MiscDeviceOptions,
    MiscDeviceRegistration, //
};
use pin_init::{
    pin_init_from_closure,
    PinInit, //
};

/// A page is lost to a memory error.
pub(crate) fn ehwpoison() -> Error {
    error(bindings::EHWPOISON)
}

/// There is no such call.
pub(crate) fn enosys() -> Error {
    error(bindings::ENOSYS)
}

/// The request is not supported.
pub(crate) fn eopnotsupp() -> Error {
    error(bindings::EOPNOTSUPP)
}

/// Registers a device whose open files hold this module: `MiscDeviceRegistration::register()`, which
/// before 7.3 lets a module go while a process still has its device open.
pub(crate) fn register_device<T: MiscDevice>(
    options: MiscDeviceOptions,
) -> impl PinInit<MiscDeviceRegistration<T>, Error> {
    let register = move |slot: *mut MiscDeviceRegistration<T>| {
        let device = slot.cast::<bindings::miscdevice>();
        let mut content = options.into_raw::<T>();
        content.fops = &Operations::<T>::OWNED;
        // SAFETY: The slot can be written to. A registration is nothing but a `struct miscdevice`:
        // it is `repr(transparent)`.
        unsafe { device.write(content) };
        // SAFETY: The device is complete. It is unregistered before it moves or goes: it is pinned,
        // and this is done when the registration is dropped.
        to_result(unsafe { bindings::misc_register(device) })
    };
    // SAFETY: The slot is a registered device if this succeeds, the invariant of the type, and
    // nothing to be dropped if it fails.
    unsafe { pin_init_from_closure(register) }
}

/// The file operations of a device.
struct Operations<T>(PhantomData<T>);

impl<T: MiscDevice> Operations<T> {
    /// Those of the kernel crate, with this module as the owner.
    const OWNED: bindings::file_operations = {
        let device = MiscDeviceOptions { name: c"" }.into_raw::<T>();
        // SAFETY: `into_raw()` points to a constant.
        let mut operations = unsafe { *device.fops };
        operations.owner = (&raw const bindings::__this_module).cast_mut();
        operations
    };
}

fn error(errno: u32) -> Error {
    // CAST: It is below `MAX_ERRNO`.
    Error::from_errno(-(errno as i32))
}
