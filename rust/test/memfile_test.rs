// SPDX-License-Identifier: GPL-2.0

//! A second consumer of memfiles beside KVM, for tests: `/dev/memfile-test`.
//!
//! Each open file of the device is one consumer, and has at most one binding. Arguments are arrays
//! of 64-bit numbers, described at the constants; `selftests/src/consumer.rs` is the other side.
//!
//! No `unsafe` here: this module shows what a driver needs of [`memfile`], the abstraction whose
//! only user it is so far. It does not depend on memfile.ko, which may come and go.

#[path = "../abi/base.rs"]
mod base;
#[path = "../bindings.rs"]
mod bindings;
mod example;
#[path = "../consumer/memfile.rs"]
mod memfile;
mod recorder;

use example::Device;
use kernel::fs::{
    File,
    LocalFile, //
};
use kernel::ioctl::{
    _IO,
    _IOC_SIZE,
    _IOR,
    _IOW,
    _IOWR, //
};
use kernel::miscdevice::{
    MiscDevice,
    MiscDeviceOptions,
    MiscDeviceRegistration, //
};
use kernel::new_mutex;
use kernel::prelude::*;
use kernel::sync::{
    Arc,
    Mutex, //
};
use kernel::uaccess::{
    UserPtr,
    UserSlice, //
};
use memfile::{
    Flags,
    Mapper,
    Observer,
    Page,
    Span, //
};
use recorder::{
    Log,
    Recorder,
    KEPT, //
};

module! {
    type: Module,
    name: "memfile_test",
    authors: ["The memfile authors"],
    description: "A consumer of memfiles, for tests",
    license: "GPL",
}

#[pin_data]
struct Module {
    #[pin]
    _device: MiscDeviceRegistration<Session>,
}

impl kernel::InPlaceModule for Module {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            _device <- base::register_device(MiscDeviceOptions {
                name: c"memfile-test",
            }),
        })
    }
}

const MAGIC: u32 = b'm' as u32;

/// Binds: fd, what (0 observer, 1 mapper, 2 the device of the example), `MEMFILE_F_*`, pgoff,
/// nr_pages, frame. The device binds its own number of pages. `EBUSY` if something is bound.
const BIND: u32 = _IOW::<[u64; 6]>(MAGIC, 1);
/// Unbinds. `EINVAL` if nothing is bound.
const UNBIND: u32 = _IO(MAGIC, 2);
/// The callbacks since the last [`BIND`]: how many came after [`UNBIND`] (since the device was
/// opened), how many of each kind, then kind, start and end of the first events.
const EVENTS: u32 = _IOR::<[u64; 5 + 3 * KEPT]>(MAGIC, 3);
/// Holds callbacks in `invalidate_start` (argument not 0), or lets them go (0).
const BLOCK: u32 = _IO(MAGIC, 4);
/// Gets the page behind a frame and gives it back: frame; pfn, order.
const GET: u32 = _IOWR::<[u64; 3]>(MAGIC, 5);
/// Likewise, but keeps the reference until the next invalidation has ended.
const HOLD: u32 = _IOWR::<[u64; 3]>(MAGIC, 6);
/// The device accesses a frame: frame; pfn, unused.
const FAULT: u32 = _IOWR::<[u64; 3]>(MAGIC, 7);
/// The device's entry for a frame: frame; pfn, whether there is one.
const ENTRY: u32 = _IOWR::<[u64; 3]>(MAGIC, 8);

enum Binding {
    Observer(#[expect(dead_code, reason = "listens")] Pin<KBox<Observer<Recorder>>>),
    Mapper(Pin<KBox<Mapper<Recorder>>>),
    Device(Pin<KBox<Mapper<Device>>>),
}

impl Binding {
    fn new([fd, what, flags, pgoff, nr_pages, frame]: [u64; 6], log: &Arc<Log>) -> Result<Self> {
        let file = LocalFile::fget(u32::try_from(fd).map_err(|_| EBADF)?)?;
        let flags = Flags::from_bits(flags);
        let span = Span {
            pgoff,
            nr_pages,
            frame,
        };
        let recorder = Recorder(log.clone());
        match what {
            0 => KBox::try_pin_init(Observer::new(&file, span, Ok(recorder)), GFP_KERNEL)
                .map(Self::Observer),
            1 => KBox::try_pin_init(Mapper::new(&file, span, flags, Ok(recorder)), GFP_KERNEL)
                .map(Self::Mapper),
            2 => Device::attach(&file, flags).map(Self::Device),
            _ => Err(EINVAL),
        }
    }

    fn get_pfn(&self, frame: u64) -> Result<Page<'_>> {
        match self {
            Self::Mapper(mapper) => mapper.get_pfn(frame),
            _ => Err(EINVAL),
        }
    }

    fn device(&self) -> Result<&Mapper<Device>> {
        match self {
            Self::Device(mapper) => Ok(mapper),
            _ => Err(EINVAL),
        }
    }
}

/// An open file of the device.
#[pin_data(PinnedDrop)]
struct Session {
    #[pin]
    binding: Mutex<Option<Binding>>,
    /// May be used while `binding` is locked.
    log: Arc<Log>,
}

#[pinned_drop]
impl PinnedDrop for Session {
    fn drop(self: Pin<&mut Self>) {
        // The binding goes next, and waits for callbacks.
        self.log.block(false);
    }
}

#[vtable]
impl MiscDevice for Session {
    type Ptr = Pin<KBox<Self>>;

    fn open(_file: &File, _misc: &MiscDeviceRegistration<Self>) -> Result<Pin<KBox<Self>>> {
        let log = Log::new()?;
        KBox::pin_init(
            pin_init!(Self {
                binding <- new_mutex!(None),
                log,
            }),
            GFP_KERNEL,
        )
    }

    fn ioctl(me: Pin<&Self>, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        let user = || UserSlice::new(UserPtr::from_addr(arg), _IOC_SIZE(cmd));
        match cmd {
            BIND => me.bind(user().reader().read()?)?,
            UNBIND => me.unbind()?,
            EVENTS => {
                let (late, counts, events) = me.log.read();
                let mut writer = user().writer();
                writer.write(&late)?;
                writer.write(&counts)?;
                writer.write(&events)?;
            }
            BLOCK => me.log.block(arg != 0),
            GET | HOLD | FAULT | ENTRY => {
                let (mut reader, mut writer) = user().reader_writer();
                let [frame, ..] = reader.read::<[u64; 3]>()?;
                writer.write(&me.page(cmd, frame)?)?;
            }
            _ => return Err(ENOTTY),
        }
        Ok(0)
    }
}

impl Session {
    fn bind(&self, request: [u64; 6]) -> Result {
        let mut binding = self.binding.lock();
        if binding.is_some() {
            return Err(EBUSY);
        }
        self.log.open();
        *binding = Some(Binding::new(request, &self.log).inspect_err(|_| self.log.close())?);
        Ok(())
    }

    fn unbind(&self) -> Result {
        let mut binding = self.binding.lock();
        // Waits for running callbacks.
        drop(binding.take().ok_or(EINVAL)?);
        self.log.close();
        Ok(())
    }

    /// The commands on a frame. The answer: frame, and two words.
    fn page(&self, cmd: u32, frame: u64) -> Result<[u64; 3]> {
        let binding = self.binding.lock();
        let binding = binding.as_ref().ok_or(EINVAL)?;
        match cmd {
            GET | HOLD => {
                // One may end as soon as others can see that there is a page.
                let ends = self.log.ends();
                let page = binding.get_pfn(frame)?;
                if cmd == HOLD {
                    self.log.wait_for_end(ends)?;
                }
                Ok([frame, page.pfn(), u64::from(page.order())])
            }
            FAULT => Ok([frame, Device::fault(binding.device()?, frame)?, 0]),
            _ => {
                let entry = binding.device()?.consumer().entry(frame)?;
                Ok([frame, entry.unwrap_or(0), u64::from(entry.is_some())])
            }
        }
    }
}
