// SPDX-License-Identifier: GPL-2.0
//! A consumer of memfiles that tests control: `/dev/memfile-test`.
//!
//! `rust/test/memfile_test.rs` of the kernel module is the other side.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

use crate::module::Module;
use crate::sys::{self, SysResult, ioctl_mut, ioctl_val};
use crate::uapi::MEMFILE_F_ALL;

/// How many events the kernel keeps.
const KEPT: usize = 32;

const MAGIC: u32 = b'm' as u32;

ioctl_iow_nr!(BIND, MAGIC, 1, [u64; 6]);
ioctl_io_nr!(UNBIND, MAGIC, 2);
ioctl_ior_nr!(EVENTS, MAGIC, 3, [u64; 5 + 3 * KEPT]);
ioctl_io_nr!(BLOCK, MAGIC, 4);
ioctl_iowr_nr!(GET, MAGIC, 5, [u64; 3]);
ioctl_iowr_nr!(HOLD, MAGIC, 6, [u64; 3]);
ioctl_iowr_nr!(FAULT, MAGIC, 7, [u64; 3]);
ioctl_iowr_nr!(ENTRY, MAGIC, 8, [u64; 3]);

/// Kinds of bindings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// An observer.
    Observer,
    /// A mapper, with these `MEMFILE_F_*`.
    Mapper(u64),
    /// The device of the abstraction's example: a mapper that also maps the pages. Binds
    /// [`DEVICE_FRAMES`].
    Device,
}

/// A mapper with KVM's default flags.
pub const MAPPER: Mode = Mode::Mapper(MEMFILE_F_ALL);
/// Number of pages that a [`Mode::Device`] binds, regardless of the span.
pub const DEVICE_FRAMES: u64 = 64;

/// The span of a binding: pages of the file, and the consumer's frame for the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    pub pgoff: u64,
    pub pages: u64,
    pub frame: u64,
}

impl Span {
    /// File pages and frames have the same numbers.
    pub const fn same(pgoff: u64, pages: u64) -> Span {
        Span { pgoff, pages, frame: pgoff }
    }
}

/// A callback; ranges are `[start, end)` in frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Start(u64, u64),
    End(u64, u64),
    Young(u64, u64),
}

/// The recorded callbacks of a binding.
#[derive(Debug)]
pub struct Callbacks {
    /// Callbacks without a binding.
    pub late: u64,
    pub starts: u64,
    pub ends: u64,
    /// The first few.
    pub events: Vec<Event>,
}

/// A page that a mapper got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    pub pfn: u64,
    pub order: u64,
}

/// An open `/dev/memfile-test`: one consumer.
#[derive(Debug)]
pub struct Consumer(OwnedFd);

impl Consumer {
    /// A consumer without a binding; loads memfile_test.ko, SKIP if it is not there.
    pub fn new() -> Result<Consumer> {
        let device = "/dev/memfile-test";
        let fd = sys::open(device, libc::O_RDWR).or_else(|_| {
            Module::test()?;
            sys::open(device, libc::O_RDWR).context(device)
        });
        fd.map(Consumer)
    }

    /// A consumer with a binding.
    pub fn bound(file: impl AsFd, mode: Mode, span: Span) -> Result<Consumer> {
        let consumer = Consumer::new()?;
        consumer.bind(file, mode, span).with_context(|| format!("bind {mode:?} to {span:?}"))?;
        Ok(consumer)
    }

    pub fn bind(&self, file: impl AsFd, mode: Mode, span: Span) -> SysResult<()> {
        self.raw_bind(file.as_fd().as_raw_fd() as u64, mode, span)
    }

    /// Bind a file by the number of its descriptor.
    pub fn raw_bind(&self, fd: u64, mode: Mode, span: Span) -> SysResult<()> {
        let (what, flags) = match mode {
            Mode::Observer => (0, 0),
            Mode::Mapper(flags) => (1, flags),
            Mode::Device => (2, MEMFILE_F_ALL),
        };
        let mut arg = [fd, what, flags, span.pgoff, span.pages, span.frame];
        // SAFETY: The array is the one of this ioctl.
        unsafe { ioctl_mut(self.0.as_fd(), BIND(), &mut arg) }.map(drop)
    }

    pub fn unbind(&self) -> SysResult<()> {
        ioctl_val(&self.0, UNBIND(), 0).map(drop)
    }

    /// Hold callbacks in `invalidate_start`, or let them go.
    pub fn block(&self, blocked: bool) -> SysResult<()> {
        ioctl_val(&self.0, BLOCK(), blocked.into()).map(drop)
    }

    /// The callbacks since it was last bound.
    pub fn callbacks(&self) -> Result<Callbacks> {
        let mut arg = [0; 6 + 3 * KEPT];
        // SAFETY: The array is the one of this ioctl.
        unsafe { ioctl_mut(self.0.as_fd(), EVENTS(), &mut arg) }.context("EVENTS")?;
        let [late, _, starts, ends, _, events @ ..] = arg;
        let events = events.chunks(3).map_while(|event| match *event {
            [1, start, end] => Some(Event::Start(start, end)),
            [2, start, end] => Some(Event::End(start, end)),
            [3, start, end] => Some(Event::Young(start, end)),
            _ => None,
        });
        Ok(Callbacks { late, starts, ends, events: events.collect() })
    }

    /// Fail unless the callbacks are exactly these invalidations, one after the other.
    pub fn expect_callbacks(&self, ranges: &[(u64, u64)]) -> Result<()> {
        let callbacks = self.callbacks()?;
        let whole = |&(start, end): &(u64, u64)| [Event::Start(start, end), Event::End(start, end)];
        let wanted: Vec<Event> = ranges.iter().flat_map(whole).collect();
        ensure!(callbacks.events == wanted, "callbacks {:?}, wanted {wanted:?}", callbacks.events);
        ensure!(callbacks.late == 0, "{} callbacks after the end of the binding", callbacks.late);
        Ok(())
    }

    /// Fail unless each start had its end, and no callback came too late.
    pub fn expect_balanced(&self) -> Result<()> {
        let callbacks = self.callbacks()?;
        let Callbacks { late, starts, ends, .. } = callbacks;
        ensure!(starts == ends, "{starts} starts, {ends} ends: {callbacks:?}");
        ensure!(late == 0, "{late} callbacks after the end of the binding: {callbacks:?}");
        Ok(())
    }

    /// Wait until it is in its first callback.
    pub fn wait_until_called(&self) -> Result<()> {
        let limit = Instant::now() + Duration::from_secs(30);
        while self.callbacks()?.starts == 0 {
            ensure!(Instant::now() < limit, "no callback for 30 s");
            std::thread::yield_now();
        }
        Ok(())
    }

    fn page(&self, request: u64, frame: u64) -> SysResult<[u64; 2]> {
        let mut arg = [frame, 0, 0];
        // SAFETY: The array is the one of these ioctls.
        unsafe { ioctl_mut(self.0.as_fd(), request, &mut arg) }?;
        Ok([arg[1], arg[2]])
    }

    /// Get the page behind a frame, and give it back.
    pub fn get(&self, frame: u64) -> SysResult<Page> {
        self.page(GET(), frame).map(|[pfn, order]| Page { pfn, order })
    }

    /// Get the page behind a frame, and give it back when the next invalidation has ended.
    pub fn hold(&self, frame: u64) -> SysResult<Page> {
        self.page(HOLD(), frame).map(|[pfn, order]| Page { pfn, order })
    }

    /// The device accesses a frame: its pfn.
    pub fn fault(&self, frame: u64) -> SysResult<u64> {
        self.page(FAULT(), frame).map(|[pfn, _]| pfn)
    }

    /// The device's entry for a frame.
    pub fn entry(&self, frame: u64) -> Result<Option<u64>> {
        match self.page(ENTRY(), frame) {
            Ok([pfn, 1]) => Ok(Some(pfn)),
            Ok(_) => Ok(None),
            Err(errno) => bail!("ENTRY of frame {frame}: {errno}"),
        }
    }
}
