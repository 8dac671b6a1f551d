// SPDX-License-Identifier: GPL-2.0
//! A storm of signals.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::sys::{check, thread_id};

/// Signals that arrived.
pub static ARRIVED: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: libc::c_int) {
    ARRIVED.fetch_add(1, Ordering::Relaxed);
}

/// Run `work` while a timer of 1 ms and another thread send signals to this thread.
pub fn in_a_storm<R>(work: impl FnOnce() -> R) -> Result<R> {
    for signal in [libc::SIGALRM, libc::SIGUSR1] {
        // SAFETY: The handler only counts. Without SA_RESTART, so that calls can be interrupted.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = count as extern "C" fn(libc::c_int) as usize;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
    let tick = libc::timeval { tv_sec: 0, tv_usec: 1000 };
    let timer = |interval| {
        let spec = libc::itimerval { it_interval: interval, it_value: interval };
        // SAFETY: The specification outlives the call.
        check(unsafe {
            libc::syscall(
                libc::SYS_setitimer,
                libc::ITIMER_REAL,
                &raw const spec,
                std::ptr::null::<libc::itimerval>(),
            )
        })
    };
    let (pid, tid) = (std::process::id() as i32, thread_id());
    let stop = AtomicBool::new(false);
    timer(tick).context("setitimer")?;
    let result = thread::scope(|scope| {
        let flood = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // SAFETY: Takes no pointer.
                unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, libc::SIGUSR1) };
                thread::sleep(Duration::from_micros(200));
            }
        });
        let result = work();
        stop.store(true, Ordering::Relaxed);
        flood.join().map_err(|_| anyhow!("the flood panicked"))?;
        Ok(result)
    });
    timer(libc::timeval { tv_sec: 0, tv_usec: 0 }).context("setitimer")?;
    result
}
