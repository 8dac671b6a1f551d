// SPDX-License-Identifier: GPL-2.0

//! A backing store beside shmem, for tests: plain pages in a tree, in files of `/dev/memfile-store`.
//!
//! It registers with memfile.ko when it is loaded. Consumers bind its files as they bind memfds, so
//! it proves that neither they nor the core need shmem. `selftests/src/store.rs` is the other side.

#[path = "store/abi.rs"]
mod abi;
#[path = "../abi/base.rs"]
mod base;
#[path = "../bindings.rs"]
mod bindings;
#[path = "store/memory.rs"]
mod memory;

use kernel::fs::file::{
    flags::O_CLOEXEC,
    File,
    FileDescriptorReservation, //
};
use kernel::ioctl::{
    _IO,
    _IOC_SIZE,
    _IOWR, //
};
use kernel::miscdevice::{
    MiscDevice,
    MiscDeviceOptions,
    MiscDeviceRegistration, //
};
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::uaccess::{
    UserPtr,
    UserSlice, //
};

module! {
    type: Module,
    name: "memfile_store",
    authors: ["The memfile authors"],
    description: "Memfiles that are not of shmem, for tests",
    license: "GPL",
}

#[pin_data]
struct Module {
    /// Dropped first, because its ioctls register the store.
    #[pin]
    _device: MiscDeviceRegistration<Device>,
    _registration: abi::Registration,
}

impl kernel::InPlaceModule for Module {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _registration: abi::Registration::new()?,
            _device <- base::register_device(MiscDeviceOptions {
                name: c"memfile-store",
            }),
        })
    }
}

const MAGIC: u32 = b'M' as u32;

/// Makes a file of that many pages and returns its descriptor.
const CREATE: u32 = _IO(MAGIC, 1);
/// Registers the store.
const REGISTER: u32 = _IO(MAGIC, 2);
/// Unregisters it.
const UNREGISTER: u32 = _IO(MAGIC, 3);
/// Reports an error in the page frame of that number, as hardware does.
const HARD_ERROR: u32 = _IO(MAGIC, 11);
/// Pins a page of the memfd with that descriptor for a device, and lets go of it.
const PIN: u32 = _IO(MAGIC, 12);
/// Reads a page frame as the kernel sees it: its number in the first word; its content.
const READ_FRAME: u32 = _IOWR::<[u64; 512]>(MAGIC, 13);
/// Makes a file with the page cache of the file with that descriptor, and returns its descriptor.
const ALIAS: u32 = _IO(MAGIC, 14);

/// A new descriptor for a new file.
fn install(file: ARef<File>) -> Result<isize> {
    let descriptor = FileDescriptorReservation::get_unused_fd_flags(O_CLOEXEC)?;
    let number = descriptor.reserved_fd();
    descriptor.fd_install(file);
    // CAST: A descriptor is a small number.
    Ok(number as isize)
}

struct Device;

#[vtable]
impl MiscDevice for Device {
    type Ptr = ();

    fn open(_file: &File, _misc: &MiscDeviceRegistration<Self>) -> Result {
        Ok(())
    }

    fn ioctl(_me: (), _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        match cmd {
            CREATE => return install(abi::create(arg)?),
            ALIAS => return install(abi::alias(arg.try_into()?)?),
            REGISTER => abi::register()?,
            UNREGISTER => abi::unregister()?,
            HARD_ERROR => abi::hard_error(arg)?,
            PIN => abi::pin(arg.try_into()?)?,
            READ_FRAME => {
                let user = UserSlice::new(UserPtr::from_addr(arg), _IOC_SIZE(cmd));
                let (mut reader, mut writer) = user.reader_writer();
                writer.write_slice(&abi::read_frame(reader.read()?)?)?;
            }
            _ => return Err(ENOTTY),
        }
        Ok(0)
    }
}
