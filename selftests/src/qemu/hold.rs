// SPDX-License-Identifier: GPL-2.0
//! Holds a thread, of any process, in the midst of the kernel, where it passes a tracepoint.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::pressure::{Pipe, Setting, Trace};
use crate::sys::{self, Errno, check};

/// How long each look at the tracepoint waits before it is repeated.
const LOOK_MS: i32 = 50;

/// The order of our thread, and that of those who work meanwhile.
const OURS: i32 = 50;
const OTHERS: i32 = 60;

/// A thread of ours that sleeps until the tracepoint is passed, and then takes the CPU from who has
/// passed it: that one stays where it is until [`Hold::let_go`]. One CPU is enough: threads that are
/// to go on come before ours, which has no other work than to keep the CPU busy.
pub struct Hold {
    state: Arc<State>,
    thread: Option<JoinHandle<Result<()>>>,
    // In this order: those of the scheduler last.
    _trace: Trace,
    _settings: Vec<Setting>,
}

#[derive(Default)]
struct State {
    held: AtomicBool,
    go_on: AtomicBool,
    end: AtomicBool,
}

impl Hold {
    /// Hold whoever passes this tracepoint, `system:name`, in an event that the filter lets through.
    /// It must run on this CPU only. Meanwhile only `others` work there, and no thread of the kernel's:
    /// whatever waits for one waits until the end.
    pub fn at(event: &str, filter: &str, cpu: usize, others: Vec<i32>) -> Result<Hold> {
        // Otherwise the scheduler ends a hold after nearly a second.
        let mut settings = vec![Setting::set("/proc/sys/kernel/sched_rt_runtime_us", "-1")?];
        let server = format!("/sys/kernel/debug/sched/fair_server/cpu{cpu}/runtime");
        if std::path::Path::new(&server).exists() {
            settings.push(Setting::set(&server, "0")?);
        }
        let trace = Trace::waking(event, filter)?;
        let pipe = trace.pipe()?;
        let state = Arc::new(State::default());
        let ours = Arc::clone(&state);
        let thread = Some(thread::spawn(move || ours.run(pipe, cpu, &others)));
        Ok(Hold { state, thread, _trace: trace, _settings: settings })
    }

    /// Wait until the thread is held.
    pub fn wait(&self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        while !self.state.held.load(Ordering::SeqCst) {
            ensure!(Instant::now() < end, "nobody has passed the tracepoint");
            ensure!(self.thread.as_ref().is_some_and(|t| !t.is_finished()), "nobody waits");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Let it go on, until it passes the tracepoint again.
    pub fn let_go(&self) {
        self.state.held.store(false, Ordering::SeqCst);
        self.state.go_on.store(true, Ordering::SeqCst);
    }

    /// Let it go for ever.
    pub fn end(mut self) -> Result<()> {
        self.stop()
    }

    fn stop(&mut self) -> Result<()> {
        self.state.end.store(true, Ordering::SeqCst);
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().map_err(|_| anyhow!("the thread that holds panicked"))?
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

impl State {
    fn run(&self, mut pipe: Pipe, cpu: usize, others: &[i32]) -> Result<()> {
        sys::run_on_cpu(cpu)?;
        sys::set_order(0, OURS)?;
        let order = |order| others.iter().try_for_each(|&other| sys::set_order(other, order));
        let ended = || self.end.load(Ordering::SeqCst);
        while !ended() {
            let mut fds = [libc::pollfd { fd: pipe.as_raw_fd(), events: libc::POLLIN, revents: 0 }];
            // SAFETY: The array outlives the call.
            match check(unsafe { libc::poll(fds.as_mut_ptr(), 1, LOOK_MS) }) {
                Ok(0) | Err(Errno::EINTR) => continue,
                ready => ready.context("poll")?,
            };
            order(OTHERS)?;
            self.held.store(true, Ordering::SeqCst);
            while !self.go_on.swap(false, Ordering::SeqCst) && !ended() {
                std::hint::spin_loop();
            }
            order(0)?;
            pipe.last()?;
        }
        Ok(())
    }
}
