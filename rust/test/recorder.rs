// SPDX-License-Identifier: GPL-2.0

//! A consumer that records its callbacks, and that can delay them.

use crate::memfile::Consumer;
use core::ops::Range;
use kernel::prelude::*;
use kernel::sync::{
    Arc,
    CondVar,
    SpinLock, //
};
use kernel::{
    new_condvar,
    new_spinlock, //
};

/// How many events are recorded; later ones are only counted.
pub(crate) const KEPT: usize = 32;

/// Kinds of callbacks, with the numbers that userspace sees.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Start = 1,
    End = 2,
    Young = 3,
}

/// The record of a binding's callbacks. Outlives the binding.
#[pin_data]
pub(crate) struct Log {
    #[pin]
    state: SpinLock<State>,
    #[pin]
    changed: CondVar,
}

struct State {
    /// Kind, start and end of the first [`KEPT`] events.
    events: [[u64; 3]; KEPT],
    /// How many events there were, each kind by its number.
    counts: [u64; 4],
    /// Callbacks stay in [`Consumer::invalidate_start`].
    blocked: bool,
    /// There is no binding: a callback now comes too late.
    closed: bool,
    /// How many came too late.
    late: u64,
}

impl State {
    fn push(&mut self, kind: Kind, frames: Range<u64>) {
        if self.closed {
            self.late += 1;
        }
        let total: u64 = self.counts.iter().sum();
        let slot = usize::try_from(total)
            .ok()
            .and_then(|total| self.events.get_mut(total));
        if let Some(slot) = slot {
            *slot = [kind as u64, frames.start, frames.end];
        }
        if let Some(count) = self.counts.get_mut(kind as usize) {
            *count += 1;
        }
    }

    /// How many invalidations have ended.
    fn ends(&self) -> u64 {
        self.counts[Kind::End as usize]
    }
}

impl Log {
    /// An empty record without a binding.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                state <- new_spinlock!(State {
                    events: [[0; 3]; KEPT],
                    counts: [0; 4],
                    blocked: false,
                    closed: true,
                    late: 0,
                }),
                changed <- new_condvar!(),
            }),
            GFP_KERNEL,
        )
    }

    /// A new binding records here.
    pub(crate) fn open(&self) {
        let mut state = self.state.lock();
        state.events = [[0; 3]; KEPT];
        state.counts = [0; 4];
        state.closed = false;
    }

    /// The binding is gone.
    pub(crate) fn close(&self) {
        self.state.lock().closed = true;
    }

    /// Holds callbacks, or lets them go.
    pub(crate) fn block(&self, blocked: bool) {
        self.state.lock().blocked = blocked;
        self.changed.notify_all();
    }

    /// How many invalidations have ended.
    pub(crate) fn ends(&self) -> u64 {
        self.state.lock().ends()
    }

    /// Waits until more than `before` invalidations have ended. `EINTR` if a signal comes first.
    pub(crate) fn wait_for_end(&self, before: u64) -> Result {
        let mut state = self.state.lock();
        while state.ends() == before {
            if self.changed.wait_interruptible(&mut state) {
                return Err(EINTR);
            }
        }
        Ok(())
    }

    /// Numbers for userspace: callbacks that came too late, how many of each kind, the events.
    pub(crate) fn read(&self) -> (u64, [u64; 4], [[u64; 3]; KEPT]) {
        let state = self.state.lock();
        (state.late, state.counts, state.events)
    }
}

/// The consumer that writes into a [`Log`].
pub(crate) struct Recorder(pub(crate) Arc<Log>);

impl Consumer for Recorder {
    fn invalidate_start(&self, frames: Range<u64>) {
        let mut state = self.0.state.lock();
        state.push(Kind::Start, frames);
        // A task that is killed meanwhile must be able to end.
        while state.blocked && !self.0.changed.wait_interruptible(&mut state) {}
    }

    fn invalidate_end(&self, frames: Range<u64>) {
        self.0.state.lock().push(Kind::End, frames);
        self.0.changed.notify_all();
    }

    fn test_clear_young(&self, frames: Range<u64>) -> bool {
        self.0.state.lock().push(Kind::Young, frames);
        false
    }
}
