// SPDX-License-Identifier: GPL-2.0

//! A module for guests: `/dev/memfile-guest` asks the host to convert pages. For tests, because
//! userspace may not make hypercalls.
//!
//! The pages belong to the test that asks; the module does not look at their content.

#[path = "guest/abi.rs"]
mod abi;
#[path = "../abi/base.rs"]
mod base;

use kernel::fs::File;
use kernel::ioctl::{
    _IOC_SIZE,
    _IOW, //
};
use kernel::miscdevice::{
    MiscDevice,
    MiscDeviceOptions,
    MiscDeviceRegistration, //
};
use kernel::prelude::*;
use kernel::uaccess::{
    UserPtr,
    UserSlice, //
};

module! {
    type: Module,
    name: "memfile_guest",
    authors: ["The memfile authors"],
    description: "Asks the host to convert pages, for tests",
    license: "GPL",
}

#[pin_data]
struct Module {
    #[pin]
    _device: MiscDeviceRegistration<Device>,
}

impl kernel::InPlaceModule for Module {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _device <- base::register_device(MiscDeviceOptions {
                name: c"memfile-guest",
            }),
        })
    }
}

/// The arguments of `KVM_HC_MAP_GPA_RANGE`: the first page frame, how many, and the attributes.
const CONVERT: u32 = _IOW::<[u64; 3]>(b'G' as u32, 1);

struct Device;

#[vtable]
impl MiscDevice for Device {
    type Ptr = ();

    fn open(_file: &File, _misc: &MiscDeviceRegistration<Self>) -> Result {
        Ok(())
    }

    fn ioctl(_me: (), _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        if cmd != CONVERT {
            return Err(ENOTTY);
        }
        let user = UserSlice::new(UserPtr::from_addr(arg), _IOC_SIZE(cmd));
        let [frame, pages, attributes] = user.reader().read()?;
        abi::map_gpa_range(frame, pages, attributes)?;
        Ok(0)
    }
}
