// SPDX-License-Identifier: GPL-2.0
//! Changes system calls of another process: makes them fail, or changes what they ask for.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::ptr;

use anyhow::{Context, Result, bail};

use crate::sys::{Errno, SysResult, check};

/// The status that waitpid() gives for a stop at a system call, with `PTRACE_O_TRACESYSGOOD`.
const AT_CALL: i32 = libc::SIGTRAP | 0x80;

fn trace(request: libc::c_uint, pid: i32, data: u64) -> SysResult {
    // SAFETY: These requests take a number and no pointer.
    check(unsafe { libc::ptrace(request, pid, ptr::null_mut::<libc::c_void>(), data) })
}

fn registers(pid: i32) -> Result<libc::user_regs_struct> {
    // SAFETY: All zero is a valid value, and the kernel writes no more than that.
    unsafe {
        let mut registers: libc::user_regs_struct = std::mem::zeroed();
        let at = &raw mut registers;
        check(libc::ptrace(libc::PTRACE_GETREGS, pid, ptr::null_mut::<libc::c_void>(), at))
            .context("read registers")?;
        Ok(registers)
    }
}

fn set_registers(pid: i32, registers: &libc::user_regs_struct) -> Result<()> {
    let at = &raw const *registers;
    // SAFETY: The kernel reads the registers during the call.
    check(unsafe { libc::ptrace(libc::PTRACE_SETREGS, pid, ptr::null_mut::<libc::c_void>(), at) })
        .map(drop)
        .context("write registers")
}

/// At the beginning of a system call: it does nothing.
fn suppress(pid: i32) -> Result<()> {
    // There is no such call.
    set_registers(pid, &libc::user_regs_struct { orig_rax: u64::MAX, ..registers(pid)? })
}

/// At the end of a system call: it has failed.
fn set_error(pid: i32, errno: Errno) -> Result<()> {
    let rax = i64::from(-errno.0) as u64;
    set_registers(pid, &libc::user_regs_struct { rax, ..registers(pid)? })
}

/// To be called in a new process before it executes a program: it then stops at its first
/// instruction, until [`fail_fallocate`].
pub fn wait_for_tracer() -> SysResult {
    // SAFETY: Takes no pointer.
    check(unsafe { libc::ptrace(libc::PTRACE_TRACEME) })
}

fn begin(pid: i32) -> Result<()> {
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;
    trace(libc::PTRACE_SETOPTIONS, pid, options as u64).context("trace the process").map(drop)
}

/// The next stop of a process or thread that we trace: the signal, or an event, which is above eight
/// bits; or the status with which it has ended.
fn next_stop(pid: i32) -> Result<Result<i32, ExitStatus>> {
    let mut status = 0;
    // SAFETY: The status outlives the call.
    check(unsafe { libc::waitpid(pid, &mut status, libc::__WALL) }).context("waitpid")?;
    Ok(if libc::WIFSTOPPED(status) { Ok(status >> 8) } else { Err(ExitStatus::from_raw(status)) })
}

/// Let a process go on that has waited for its tracer, and let each fallocate() of its main thread
/// fail `times` times with `errno`, and do nothing, before it is carried out. Ends when the process
/// has ended, and returns its status, or when it is `enough` after a call that was carried out.
/// Also returns how many calls failed.
pub fn fail_fallocate(
    pid: i32,
    errno: Errno,
    times: u32,
    mut enough: impl FnMut() -> Result<bool>,
) -> Result<(u32, Option<ExitStatus>)> {
    let (mut failed, mut tries) = (0, 0);
    // Within a call, and whether that is a fallocate() and is to fail.
    let (mut inside, mut ours, mut fails) = (false, false, false);
    loop {
        let stop = match next_stop(pid)? {
            Ok(stop) => stop,
            Err(ended) => return Ok((failed, Some(ended))),
        };
        let mut signal = 0;
        match stop {
            AT_CALL if !inside => {
                inside = true;
                ours = registers(pid)?.orig_rax == libc::SYS_fallocate as u64;
                fails = ours && tries < times;
                if fails {
                    suppress(pid)?;
                }
            }
            AT_CALL => {
                inside = false;
                if fails {
                    set_error(pid, errno)?;
                    (failed, tries) = (failed + 1, tries + 1);
                } else if ours {
                    tries = 0;
                    if enough()? {
                        trace(libc::PTRACE_DETACH, pid, 0).context("let the process go")?;
                        return Ok((failed, None));
                    }
                }
            }
            // It has begun.
            libc::SIGTRAP => begin(pid)?,
            other => signal = other,
        }
        go_on(pid, signal)?;
    }
}

/// To the next system call.
fn go_on(pid: i32, signal: i32) -> Result<()> {
    match trace(libc::PTRACE_SYSCALL, pid, signal as u64) {
        // It was killed meanwhile.
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(e) => bail!("the process cannot go on: {e}"),
    }
}

/// Let a process go on that has waited for its tracer, and add these to the first seals that it
/// puts on a file.
pub fn add_to_seals(pid: i32, seals: u32) -> Result<()> {
    loop {
        let Ok(stop) = next_stop(pid)? else {
            bail!("the process has ended, and sealed nothing");
        };
        let mut signal = 0;
        match stop {
            AT_CALL => {
                let mut registers = registers(pid)?;
                let command = (registers.orig_rax as i64, registers.rsi as i32);
                if command == (libc::SYS_fcntl, libc::F_ADD_SEALS) {
                    registers.rdx |= u64::from(seals);
                    set_registers(pid, &registers)?;
                    trace(libc::PTRACE_DETACH, pid, 0).context("let the process go")?;
                    return Ok(());
                }
            }
            libc::SIGTRAP => begin(pid)?,
            other => signal = other,
        }
        go_on(pid, signal)?;
    }
}

/// A thread whose system calls are traced. Dropping this lets it go on without.
pub struct Traced(i32);

/// The same, stopped at a system call that it has not carried out. Dropping this carries it out.
pub struct Stopped(Traced);

impl Traced {
    /// Trace a thread that runs, and stop it until [`Traced::stop_at`].
    pub fn begin(thread: i32) -> Result<Traced> {
        trace(libc::PTRACE_SEIZE, thread, libc::PTRACE_O_TRACESYSGOOD as u64)
            .context("trace it")?;
        let traced = Traced(thread);
        trace(libc::PTRACE_INTERRUPT, thread, 0).context("interrupt it")?;
        Ok(traced)
    }

    /// Wait until it makes that call.
    pub fn stop_at(self, call: i64) -> Result<Stopped> {
        loop {
            let Ok(stop) = next_stop(self.0)? else {
                bail!("the thread has ended");
            };
            let mut signal = 0;
            match stop {
                AT_CALL => {
                    let registers = registers(self.0)?;
                    // It has this value from the beginning of a call on to its end.
                    let begins = registers.rax as i64 == -i64::from(libc::ENOSYS);
                    if begins && registers.orig_rax as i64 == call {
                        return Ok(Stopped(self));
                    }
                }
                // Stops that are no signals are events.
                other if other > 0xff => {}
                other => signal = other,
            }
            go_on(self.0, signal)?;
        }
    }
}

impl Stopped {
    /// Let it carry the call out, and go on.
    pub fn let_go(self) {
        drop(self.0);
    }

    /// Let the call fail with `errno`, and do nothing; then let it go on.
    pub fn fail(self, errno: Errno) -> Result<()> {
        let thread = self.0.0;
        suppress(thread)?;
        go_on(thread, 0)?;
        loop {
            match next_stop(thread)? {
                Ok(AT_CALL) => break,
                Ok(other) => go_on(thread, if other > 0xff { 0 } else { other })?,
                Err(ended) => bail!("the thread has ended: {ended}"),
            }
        }
        set_error(thread, errno)
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        // Only a stopped thread can be let go; one that runs is, when its tracer ends.
        let _ = trace(libc::PTRACE_DETACH, self.0, 0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn calls_fail_as_often_as_wanted_and_then_work() {
        let file = std::env::temp_dir().join(format!("memfile-tracer-{}", std::process::id()));
        let run = |errno, times, enough: bool| {
            let mut command = Command::new("fallocate");
            command.args(["-l", "8192"]).arg(&file).stderr(Stdio::null());
            // SAFETY: A system call.
            unsafe {
                command.pre_exec(|| {
                    wait_for_tracer().map(drop).map_err(|e| std::io::Error::from_raw_os_error(e.0))
                });
            }
            let mut child = command.spawn().ok()?;
            let result = fail_fallocate(child.id() as i32, errno, times, || Ok(enough)).unwrap();
            let status = result.1.or_else(|| child.wait().ok()).unwrap();
            let size = std::fs::metadata(&file).map_or(0, |data| data.len());
            let _ = std::fs::remove_file(&file);
            Some((result.0, result.1.is_some(), status.success(), size))
        };
        // None without that program.
        let Some(untouched) = run(Errno::EIO, 0, false) else { return };
        assert_eq!(untouched, (0, true, true, 8192));
        assert_eq!(run(Errno::EIO, 0, true), Some((0, false, true, 8192)));
        assert_eq!(run(Errno::EIO, 1, false), Some((1, true, false, 0)));
    }
}
