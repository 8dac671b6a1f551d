// SPDX-License-Identifier: GPL-2.0

use crate::memfile::{
    Consumer,
    Flags,
    Mapper,
    Span, //
};
use core::ops::Range;
use kernel::fs::LocalFile;
use kernel::new_condvar;
use kernel::new_spinlock;
use kernel::prelude::*;
use kernel::sync::{
    CondVar,
    SpinLock, //
};

/// How many pages the device can address: its frames are `0..FRAMES`.
const FRAMES: u64 = 64;

/// A device that accesses a memfile through a table of its own.
#[pin_data]
pub(crate) struct Device {
    #[pin]
    table: SpinLock<Table>,
    /// An invalidation has ended.
    #[pin]
    ended: CondVar,
}

struct Table {
    /// The device's table: the pfn behind each frame.
    entries: [Option<u64>; FRAMES as usize],
    /// How many invalidations are running.
    running: u64,
    /// How many have ended.
    ended: u64,
}

impl Table {
    fn entry(&mut self, frame: u64) -> Result<&mut Option<u64>> {
        let index = usize::try_from(frame).map_err(|_| EINVAL)?;
        self.entries.get_mut(index).ok_or(EINVAL)
    }
}

impl Consumer for Device {
    fn invalidate_start(&self, frames: Range<u64>) {
        let mut table = self.table.lock();
        table.running += 1;
        for frame in frames {
            if let Ok(entry) = table.entry(frame) {
                *entry = None;
            }
        }
        // Real hardware has a TLB as well: its flush belongs here, or into `flush()`.
    }

    fn invalidate_end(&self, _frames: Range<u64>) {
        let mut table = self.table.lock();
        table.running -= 1;
        table.ended += 1;
        self.ended.notify_all();
    }
}

impl Device {
    /// Binds the first pages of `file` to a new device.
    pub(crate) fn attach(file: &LocalFile, flags: Flags) -> Result<Pin<KBox<Mapper<Self>>>> {
        let span = Span {
            pgoff: 0,
            nr_pages: FRAMES,
            frame: 0,
        };
        let device = try_pin_init!(Self {
            table <- new_spinlock!(Table {
                entries: [None; FRAMES as usize],
                running: 0,
                ended: 0,
            }),
            ended <- new_condvar!(),
        }? Error);
        KBox::try_pin_init(Mapper::new(file, span, flags, device), GFP_KERNEL)
    }

    /// Makes an entry for `frame`, which has none.
    pub(crate) fn fault(mapper: &Mapper<Self>, frame: u64) -> Result<u64> {
        let device = mapper.consumer();
        loop {
            let mut table = device.table.lock();
            while table.running != 0 {
                device.ended.wait(&mut table);
            }
            let ended = table.ended;
            drop(table);

            // Sleeps, and an invalidation may run meanwhile.
            let page = mapper.get_pfn(frame)?;

            let mut table = device.table.lock();
            if table.running == 0 && table.ended == ended {
                // From here on the invalidation that takes the page away finds the entry, and
                // the reference is not needed any more.
                *table.entry(frame)? = Some(page.pfn());
                return Ok(page.pfn());
            }
            // The page may have left the file already: try again.
        }
    }

    /// The device's entry for `frame`.
    pub(crate) fn entry(&self, frame: u64) -> Result<Option<u64>> {
        self.table.lock().entry(frame).copied()
    }
}
