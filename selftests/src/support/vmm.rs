// SPDX-License-Identifier: GPL-2.0
//! A VMM in a process of its own, which is killed.

use std::fs::File;
use std::io::{Read, Write};

use anyhow::{Context, Result, ensure};

use crate::sys::{check, pipe};

/// A process that runs a guest until it is killed, by [`Vmm::kill`] or when this is dropped.
pub struct Vmm(libc::pid_t);

impl Vmm {
    /// Start it. `guest` calls its argument when its guest is as the case wants it, and then goes on;
    /// this returns at that moment. It fails if `guest` ends before.
    pub fn start(guest: impl FnOnce(&dyn Fn()) -> Result<()>) -> Result<Vmm> {
        let (ready, tell) = pipe()?;
        let (mut ready, tell) = (File::from(ready), File::from(tell));
        // SAFETY: The child has one thread, and leaves by _exit().
        let pid = check(unsafe { libc::fork() }).context("fork")? as libc::pid_t;
        if pid == 0 {
            // SAFETY: Takes no pointer.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            let tell = || drop((&tell).write_all(b"1"));
            println!("the VMM: {:?}", guest(&tell));
            // SAFETY: Ends the child at once.
            unsafe { libc::_exit(1) }
        }
        let vmm = Vmm(pid);
        drop(tell);
        ready.read_exact(&mut [0]).context("the VMM ended before its guest was ready")?;
        Ok(vmm)
    }

    /// Kill it, and wait until it is gone. Fails if it has ended by itself.
    pub fn kill(self) -> Result<()> {
        let status = self.end()?;
        std::mem::forget(self);
        let killed = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL;
        ensure!(killed, "the VMM ended by itself: status {status:#x}");
        Ok(())
    }

    fn end(&self) -> Result<libc::c_int> {
        // SAFETY: Takes no pointer; the child was not waited for.
        check(unsafe { libc::kill(self.0, libc::SIGKILL) }).context("kill")?;
        let mut status = 0;
        // SAFETY: The status outlives the call.
        check(unsafe { libc::waitpid(self.0, &mut status, 0) }).context("waitpid")?;
        Ok(status)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if let Err(e) = self.end() {
            println!("the VMM is still there: {e:#}");
        }
    }
}
