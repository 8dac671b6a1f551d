// SPDX-License-Identifier: GPL-2.0
//! Scripts: operations of several threads on memfiles, as data.
//!
//! The fuzzer makes them, `fuzz/corpus` keeps them, `memfile-replay` and the suite `fuzz_corpus`
//! run them. The text of a script has one operation per line, after the number of its thread; a
//! line that begins with `#` is a comment, one that begins with `==` the name of the next script.
//!
//! A script runs in a process of its own, so that all that it leaves open is closed when it ends.
//! It fails if the guests or the ways around them see content that they cannot see, if memory is
//! lost that no operation freed, if it does not end, or if a file stays.

mod marks;
pub mod op;
mod steps;
mod system;
mod world;

use std::io::{Read, Write as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::pressure;
use crate::sys::{self, check};

pub use steps::{NoProbe, Probe, Script, Step};
pub use system::System;

/// How long a script may take; what its threads wait for ends before.
const LIMIT: Duration = Duration::from_secs(60);
/// How long what it has closed may take to go.
const GONE: Duration = Duration::from_secs(20);

/// How a script ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Nothing is wrong.
    Well,
    /// The kernel killed it: a memory error, no memory.
    Killed(i32),
    /// Something is wrong.
    Wrong(String),
}

/// Run a script.
pub fn run(script: &Script, system: &System, probe: &dyn Probe) -> Result<End> {
    let (read, write) = sys::pipe()?;
    // SAFETY: This program has one thread when it runs scripts.
    let pid = check(unsafe { libc::fork() }).context("fork")? as libc::pid_t;
    if pid == 0 {
        drop(read);
        child(script, system, probe, write);
    }
    drop(write);
    let end = watch(pid, read);
    let end = match end? {
        End::Well | End::Killed(_) if !all_gone()? => {
            let files = std::fs::read_to_string(FILES)?;
            End::Wrong(format!("files stay after the end of their last user:\n{files}"))
        }
        end => end,
    };
    system.set_back()?;
    let left = system.left()?;
    Ok(match (end, left) {
        (End::Well | End::Killed(_), Some(left)) => End::Wrong(left),
        (end, _) => end,
    })
}

/// The child: never returns.
fn child(script: &Script, system: &System, probe: &dyn Probe, write: OwnedFd) -> ! {
    let work = || -> Result<()> {
        system.enter()?;
        world::World::new(system)?.play(script, probe)
    };
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    let (code, text) = match result {
        Ok(Ok(())) => (0, String::new()),
        Ok(Err(error)) => (1, format!("{error:#}")),
        Err(_) => (1, "a thread of the script panicked".into()),
    };
    // No other process is left to report a failure to.
    let _ = std::fs::File::from(write).write_all(text.as_bytes());
    // SAFETY: Ends the process without what the parent has registered for its own end.
    unsafe { libc::_exit(code) }
}

/// Wait for the end of the child.
fn watch(pid: libc::pid_t, read: OwnedFd) -> Result<End> {
    let pidfd = sys::pidfd_open(pid).context("pidfd_open")?;
    let late = !ends(&pidfd, LIMIT)?;
    if late {
        pressure::write("/proc/sysrq-trigger", "w")?;
        // SAFETY: The process is a child of this one that nobody has waited for.
        check(unsafe { libc::kill(pid, libc::SIGKILL) }).context("kill")?;
        if !ends(&pidfd, LIMIT)? {
            return Ok(End::Wrong("a script that was killed does not end".into()));
        }
    }
    let mut status = 0;
    // SAFETY: The status outlives the call.
    check(unsafe { libc::waitpid(pid, &mut status, 0) }).context("waitpid")?;
    let mut text = String::new();
    std::fs::File::from(read).read_to_string(&mut text).context("what the script says")?;
    if late {
        return Ok(End::Wrong("a script does not end".into()));
    }
    Ok(match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
        (true, 0) => End::Well,
        (true, _) => End::Wrong(text),
        (false, _) => End::Killed(libc::WTERMSIG(status)),
    })
}

/// Whether the process ends in time.
fn ends(pidfd: &OwnedFd, limit: Duration) -> Result<bool> {
    let limit = limit * sys::time_factor();
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: One structure, which outlives the call.
    let ready = check(unsafe { libc::poll(&mut poll, 1, limit.as_millis() as i32) });
    Ok(ready.context("poll")? > 0)
}

/// The memfiles that exist, after a line of names.
const FILES: &str = "/sys/kernel/debug/memfile/files";

/// Whether no memfile is there any more. The last reference to a file may be another task's.
fn all_gone() -> Result<bool> {
    let limit = Instant::now() + GONE * sys::time_factor();
    loop {
        match std::fs::read_to_string(FILES) {
            Ok(text) if text.lines().count() > 1 && Instant::now() < limit => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(text) => return Ok(text.lines().count() <= 1),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(true),
            Err(e) => return Err(e).context(FILES),
        }
    }
}

/// Run scripts of a text one after the other; fails at the first that something is wrong with.
pub fn run_all(text: &str) -> Result<()> {
    let system = System::new()?;
    let scripts = Script::parse_all(text)?;
    ensure!(!scripts.is_empty(), "no script");
    for (name, script) in scripts {
        match run(&script, &system, &NoProbe)? {
            End::Well => {}
            End::Killed(signal) => println!("{name} was killed by signal {signal}"),
            End::Wrong(what) => bail!("{name}: {what}\n{script}"),
        }
    }
    Ok(())
}
