// SPDX-License-Identifier: GPL-2.0
//! A small test runner that speaks KTAP version 1.
//!
//! Suites and cases are static tables. Each case runs in a forked child that leads a process group
//! of its own: a crash, a panic or a hang fails that case alone, and all processes that it started
//! are killed with it. The child's output becomes `# ` diagnostics, in order and as it comes.
//!
//! Where setting up takes long, the cases of a suite run in one child, one after the other, and
//! share the setup. A case that does not pass ends that child: the next case starts a new one.
//!
//! A case that leaves a knob of the kernel changed fails; the runner sets it back for the next one.
//!
//! The runner has one thread; only children start others.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::knobs::Knobs;
pub use crate::skip::{REQUIRE, Skip, missing_memfile, skip};
use crate::sys::{self, Errno, check};

/// The result of a case; an error with a [`Skip`] inside is not a failure.
pub type CaseResult = Result<()>;

/// The default time limit of a case, in seconds.
pub const TIME_LIMIT: u32 = 60;

/// A case or a suite that takes longer reports its time.
const SLOW: Duration = Duration::from_secs(5);

/// A case: the test of one promise.
pub struct Case {
    /// The promise in snake case.
    pub name: &'static str,
    pub func: fn() -> CaseResult,
    /// Seconds it may take on the plain kernel; see [`Options::time_factor`].
    pub limit: u32,
}

/// A suite: the tests of promises about one subject.
pub struct Suite {
    pub name: &'static str,
    pub cases: &'static [Case],
    /// Runs only if a pattern names it; for the controls, which test the runner itself.
    pub hidden: bool,
    /// The cases run in one child, as long as they pass.
    pub together: bool,
}

/// Declare a suite: `suite!("name", [case, slow_case: 120])`.
#[macro_export]
macro_rules! suite {
    ($name:literal, [$($case:ident $(: $limit:literal)?),* $(,)?]
     $(, hidden = $hidden:literal)? $(, together = $together:literal)?) => {
        $crate::ktap::Suite {
            name: $name,
            cases: &[$($crate::ktap::Case {
                name: stringify!($case),
                func: $case,
                limit: [$($limit,)? $crate::ktap::TIME_LIMIT][0],
            }),*],
            hidden: [$($hidden,)? false][0],
            together: [$($together,)? false][0],
        }
    };
}

/// How to run.
#[derive(Debug, Default)]
pub struct Options {
    /// `suite`, `suite.case`, with `*` and `?`; none means all.
    pub patterns: Vec<String>,
    /// Multiplies every time limit; 1 if 0.
    pub time_factor: u32,
    /// Name each case in the kernel log, so that a splat there can be assigned to its case.
    pub kmsg: bool,
}

/// The number of cases by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub passed: u32,
    pub failed: u32,
    pub skipped: u32,
}

impl Totals {
    /// Whether no case failed, and at least one ran.
    pub fn good(self) -> bool {
        self.failed == 0 && self.passed + self.skipped > 0
    }
}

/// The outcome of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Pass,
    Skip(String),
    Fail(String),
    Timeout(u32),
}

/// Whether `text` matches a pattern of `*`, `?` and literal characters.
pub fn glob(pattern: &str, text: &str) -> bool {
    let (p, t): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    // The position of the last `*`, and how much of the text it has matched.
    let (mut i, mut j, mut star) = (0, 0, None);
    while j < t.len() {
        match p.get(i) {
            Some('*') => {
                star = Some((i, j));
                i += 1;
            }
            Some(&c) if c == '?' || c == t[j] => {
                i += 1;
                j += 1;
            }
            _ => match star {
                Some((si, sj)) => {
                    star = Some((si, sj + 1));
                    i = si + 1;
                    j = sj + 1;
                }
                None => return false,
            },
        }
    }
    p[i..].iter().all(|&c| c == '*')
}

/// Whether the patterns choose this case.
fn chosen(suite: &Suite, case: &Case, patterns: &[String]) -> bool {
    if patterns.is_empty() {
        return !suite.hidden;
    }
    let name = format!("{}.{}", suite.name, case.name);
    patterns.iter().any(|p| {
        let named = !suite.hidden || p.starts_with(suite.name);
        named && (glob(p, suite.name) || glob(p, &name))
    })
}

/// The suites and the cases that the patterns choose.
///
/// A suite that has no case at all is kept if it is named, because running it must fail.
pub fn select<'a>(suites: &[&'a Suite], patterns: &[String]) -> Vec<(&'a Suite, Vec<&'a Case>)> {
    let selected = suites.iter().map(|suite| {
        let cases = suite.cases.iter().filter(|case| chosen(suite, case, patterns));
        (*suite, cases.collect::<Vec<_>>())
    });
    let named = |suite: &Suite| {
        (patterns.is_empty() && !suite.hidden) || patterns.iter().any(|p| p == suite.name)
    };
    selected.filter(|(suite, cases)| !cases.is_empty() || named(suite)).collect()
}

/// Run what the patterns choose and write one KTAP document to `out`.
pub fn run(suites: &[&Suite], options: &Options, out: &mut dyn Write) -> Result<Totals> {
    let selected = select(suites, &options.patterns);
    // SAFETY: Takes no pointer.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    let mut totals = Totals::default();
    let knobs = Knobs::now();
    writeln!(out, "KTAP version 1\n1..{}", selected.len())?;
    for (number, (suite, cases)) in (1..).zip(&selected) {
        let mut sum = Totals::default();
        let begin = Instant::now();
        writeln!(out, "  KTAP version 1\n  # Subtest: {}\n  1..{}", suite.name, cases.len())?;
        let mut worker = None;
        for (n, case) in (1..).zip(cases) {
            out.flush()?;
            let start = Instant::now();
            let outcome = run_case(suite, case, options, &mut worker, out)?;
            if !suite.together || outcome != Outcome::Pass {
                worker = None;
            }
            let outcome = with_changed_knobs(outcome, &knobs.set_back());
            let took = start.elapsed();
            if took > SLOW {
                writeln!(out, "  # {} took {} s", case.name, took.as_secs())?;
            }
            write_result(out, n, case.name, &outcome)?;
            match outcome {
                Outcome::Pass => sum.passed += 1,
                Outcome::Skip(_) => sum.skipped += 1,
                Outcome::Fail(_) | Outcome::Timeout(_) => sum.failed += 1,
            }
        }
        if cases.is_empty() {
            writeln!(out, "# suite {} has no case", suite.name)?;
            sum.failed += 1;
        }
        if begin.elapsed() > SLOW {
            writeln!(out, "# {} took {} s", suite.name, begin.elapsed().as_secs())?;
        }
        let Totals { passed, failed, skipped } = sum;
        writeln!(out, "# {}: {passed} passed, {failed} failed, {skipped} skipped", suite.name)?;
        let verdict = if failed == 0 { "ok" } else { "not ok" };
        let all_skipped = if passed + failed == 0 { " # SKIP every case was skipped" } else { "" };
        writeln!(out, "{verdict} {number} {}{all_skipped}", suite.name)?;
        totals.passed += passed;
        totals.failed += failed;
        totals.skipped += skipped;
    }
    let Totals { passed, failed, skipped } = totals;
    if selected.is_empty() {
        writeln!(out, "# no case was chosen; that is a failure")?;
    }
    writeln!(out, "# totals: {passed} passed, {failed} failed, {skipped} skipped")?;
    out.flush()?;
    Ok(totals)
}

/// An outcome, and the knobs that the case left changed.
fn with_changed_knobs(outcome: Outcome, changed: &[String]) -> Outcome {
    if changed.is_empty() {
        return outcome;
    }
    let changed = format!("left changed: {}", changed.join("; "));
    match outcome {
        Outcome::Pass | Outcome::Skip(_) => Outcome::Fail(changed),
        Outcome::Fail(reason) => Outcome::Fail(format!("{reason}\n{changed}")),
        // A child that is killed undoes none of its changes.
        Outcome::Timeout(seconds) => Outcome::Timeout(seconds),
    }
}

/// Write the result line of a case, with the reason of a failure before it.
fn write_result(out: &mut dyn Write, n: u32, name: &str, outcome: &Outcome) -> Result<()> {
    match outcome {
        Outcome::Pass => writeln!(out, "  ok {n} {name}")?,
        Outcome::Skip(reason) => writeln!(out, "  ok {n} {name} # SKIP {}", one_line(reason))?,
        Outcome::Timeout(s) => writeln!(out, "  not ok {n} {name} # TIMEOUT {s} seconds")?,
        Outcome::Fail(reason) => {
            for line in reason.lines() {
                writeln!(out, "  # {line}")?;
            }
            writeln!(out, "  not ok {n} {name}")?;
        }
    }
    Ok(())
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Run one case in a child, pass on its output, and return the outcome.
fn run_case(
    suite: &Suite,
    case: &Case,
    options: &Options,
    worker: &mut Option<Worker>,
    out: &mut dyn Write,
) -> Result<Outcome> {
    let limit = case.limit * options.time_factor.max(1);
    if options.kmsg {
        // Best effort: the user may lack the permission.
        let line = format!("memfile-tests: {}.{}\n", suite.name, case.name);
        let _ = std::fs::write("/dev/kmsg", line);
    }
    if worker.is_none() {
        *worker = Some(Worker::start(suite)?);
    }
    let number = suite.cases.iter().position(|other| std::ptr::eq(other, case));
    let (Some(worker), Some(number)) = (worker, number) else {
        anyhow::bail!("{} is no case of {}", case.name, suite.name);
    };
    worker.run(number, limit, out)
}

/// A child that runs cases of one suite, one after the other on request. Dropping this kills it and
/// all processes that it started.
struct Worker {
    pid: libc::pid_t,
    pidfd: OwnedFd,
    /// Its output.
    output: OwnedFd,
    /// The outcomes of cases: [`Verdict`]s.
    verdicts: std::fs::File,
    /// Numbers of cases, one byte each.
    orders: std::fs::File,
    status: Option<i32>,
}

/// A code of the child and a reason, as sent through a pipe.
struct Verdict(i32, String);

impl Verdict {
    /// The size that a pipe takes in one piece.
    const REASON: usize = 4000;

    fn send(&self, pipe: &mut std::fs::File) -> std::io::Result<()> {
        let mut end = self.1.len().min(Self::REASON);
        while !self.1.is_char_boundary(end) {
            end -= 1;
        }
        let mut bytes = vec![self.0 as u8];
        bytes.extend((end as u16).to_ne_bytes());
        bytes.extend(&self.1.as_bytes()[..end]);
        pipe.write_all(&bytes)
    }

    fn receive(pipe: &mut std::fs::File) -> std::io::Result<Verdict> {
        let mut head = [0; 3];
        pipe.read_exact(&mut head)?;
        let mut reason = vec![0; u16::from_ne_bytes([head[1], head[2]]).into()];
        pipe.read_exact(&mut reason)?;
        Ok(Verdict(head[0].into(), String::from_utf8_lossy(&reason).into_owned()))
    }
}

impl Worker {
    fn start(suite: &Suite) -> Result<Worker> {
        let (output, child_output) = sys::pipe()?;
        let (verdicts, child_verdicts) = sys::pipe()?;
        let (child_orders, orders) = sys::pipe()?;
        // SAFETY: The runner has one thread, so the child may do what it likes.
        let pid = check(unsafe { libc::fork() }).context("fork")? as libc::pid_t;
        if pid == 0 {
            drop((output, verdicts, orders));
            run_child(suite, child_output, child_orders.into(), child_verdicts.into());
        }
        // SAFETY: Takes no pointer. Both sides set the group, so that neither can be too late.
        unsafe { libc::setpgid(pid, pid) };
        let pidfd = sys::pidfd_open(pid).context("pidfd_open")?;
        let (verdicts, orders) = (verdicts.into(), orders.into());
        Ok(Worker { pid, pidfd, output, verdicts, orders, status: None })
    }

    /// Run one case, within that many seconds.
    fn run(&mut self, number: usize, limit: u32, out: &mut dyn Write) -> Result<Outcome> {
        let deadline = Instant::now() + Duration::from_secs(limit.into());
        self.orders.write_all(&[u8::try_from(number)?]).context("tell the child")?;
        let mut lines = Lines::default();
        let mut open = true;
        let (timed_out, verdict) = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break (true, None);
            }
            let output = open.then_some(self.output.as_fd());
            let fds = [output, Some(self.verdicts.as_fd()), Some(self.pidfd.as_fd())];
            match wait(fds, left)? {
                [true, _, _] => open = pass_on(&self.output, &mut lines, out)?,
                // If the child is gone, the end of the file, which is an error.
                [_, true, _] => break (false, Verdict::receive(&mut self.verdicts).ok()),
                [_, _, true] => break (false, None),
                _ => {}
            }
        };
        if verdict.is_none() {
            self.end();
        }
        // The rest of its output, without waiting for other processes that hold the pipe.
        while open && wait([Some(self.output.as_fd()), None, None], Duration::ZERO)?[0] {
            open = pass_on(&self.output, &mut lines, out)?;
        }
        lines.finish(out)?;
        Ok(match (timed_out, verdict) {
            (true, _) => Outcome::Timeout(limit),
            (_, Some(verdict)) => outcome_of(verdict),
            (_, None) => Outcome::Fail(without_verdict(self.status.unwrap_or(0))),
        })
    }

    /// Kill it and all processes that it started.
    fn end(&mut self) {
        if self.status.is_none() {
            let (mut status, mut other) = (0, 0);
            // SAFETY: The child is not reaped yet, so the group is still its own; the statuses
            // outlive the calls.
            unsafe {
                libc::kill(-self.pid, libc::SIGKILL);
                libc::waitpid(self.pid, &mut status, 0);
                // The processes that it started are our children now, and hold memory until they
                // are gone.
                while libc::waitpid(-self.pid, &mut other, 0) > 0 {}
            }
            self.status = Some(status);
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end();
    }
}

// Codes of a child: those of kselftest.
const CHILD_PASS: i32 = 0;
const CHILD_FAIL: i32 = 1;
const CHILD_SKIP: i32 = 4;

fn outcome_of(Verdict(code, reason): Verdict) -> Outcome {
    match code {
        CHILD_PASS => Outcome::Pass,
        CHILD_SKIP => Outcome::Skip(reason),
        _ => Outcome::Fail(reason),
    }
}

/// The outcome of a case whose child ended without a verdict.
fn without_verdict(status: i32) -> String {
    match libc::WIFSIGNALED(status) {
        true => format!("killed by signal {}", libc::WTERMSIG(status)),
        false => format!("exited with {} without a verdict", libc::WEXITSTATUS(status)),
    }
}

/// The child: run the requested cases, and report the outcome of each.
fn run_child(
    suite: &Suite,
    output: OwnedFd,
    mut orders: std::fs::File,
    mut verdicts: std::fs::File,
) -> ! {
    // SAFETY: None of these takes a pointer; the descriptors are open.
    unsafe {
        libc::setpgid(0, 0);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::dup2(output.as_raw_fd(), 1);
        libc::dup2(output.as_raw_fd(), 2);
    }
    drop(output);
    let mut order = [0];
    while orders.read_exact(&mut order).is_ok() {
        let Some(case) = suite.cases.get(usize::from(order[0])) else { break };
        let (code, reason) = match std::panic::catch_unwind(case.func) {
            Ok(Ok(())) => (CHILD_PASS, String::new()),
            Ok(Err(error)) => match error.chain().find_map(|e| e.downcast_ref::<Skip>()) {
                Some(Skip(reason)) => (CHILD_SKIP, reason.clone()),
                None => (CHILD_FAIL, format!("{error:#}")),
            },
            Err(_) => (CHILD_FAIL, "the test itself panicked".into()),
        };
        let _ = std::io::stdout().flush();
        if Verdict(code, reason).send(&mut verdicts).is_err() {
            break;
        }
    }
    // SAFETY: Ends the child at once; nothing of the runner's may be torn down twice.
    unsafe { libc::_exit(0) }
}

/// Wait until one of the descriptors is readable or closed, and return which.
fn wait(fds: [Option<BorrowedFd>; 3], left: Duration) -> Result<[bool; 3]> {
    let mut fds = fds.map(|fd| libc::pollfd {
        fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
        events: libc::POLLIN,
        revents: 0,
    });
    let millis = left.as_micros().div_ceil(1000).min(60_000) as i32;
    // SAFETY: The array outlives the call.
    match check(unsafe { libc::poll(fds.as_mut_ptr(), 3, millis) }) {
        Ok(_) => Ok(fds.map(|fd| fd.revents != 0)),
        Err(Errno::EINTR) => Ok([false; 3]),
        Err(errno) => Err(errno).context("poll"),
    }
}

/// Pass on one read of the child's output; false at its end.
fn pass_on(output: &OwnedFd, lines: &mut Lines, out: &mut dyn Write) -> Result<bool> {
    let mut bytes = [0u8; 4096];
    // SAFETY: The buffer outlives the call.
    let ret = unsafe { libc::read(output.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
    let n = check(ret as i64).context("read the child's output")? as usize;
    lines.add(&bytes[..n], out)?;
    Ok(n > 0)
}

/// Turns a stream of bytes into indented diagnostic lines.
#[derive(Default)]
struct Lines(Vec<u8>);

impl Lines {
    fn add(&mut self, bytes: &[u8], out: &mut dyn Write) -> Result<()> {
        self.0.extend_from_slice(bytes);
        while let Some(end) = self.0.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = self.0.drain(..=end).collect();
            write_diagnostic(&line[..end], out)?;
        }
        Ok(())
    }

    fn finish(self, out: &mut dyn Write) -> Result<()> {
        if !self.0.is_empty() {
            write_diagnostic(&self.0, out)?;
        }
        Ok(())
    }
}

fn write_diagnostic(line: &[u8], out: &mut dyn Write) -> Result<()> {
    let mut text = String::from("  # ");
    for c in String::from_utf8_lossy(line).chars() {
        if c.is_control() && c != '\t' {
            write!(text, "{}", c.escape_default())?;
        } else {
            text.push(c);
        }
    }
    writeln!(out, "{text}")?;
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    // Running cases forks, which a threaded test harness must not: see tests/runner.rs.

    fn passes() -> CaseResult {
        Ok(())
    }
    fn fails() -> CaseResult {
        anyhow::bail!("wanted 1, got 2")
    }

    static GOOD: Suite = suite!("good", [passes]);
    static BAD: Suite = suite!("bad", [passes, fails: 1]);
    static EMPTY: Suite = suite!("empty", []);
    static HIDDEN: Suite = suite!("hidden", [passes], hidden = true);

    #[test]
    fn suite_macro_sets_limits() {
        let limits: Vec<_> = BAD.cases.iter().map(|c| (c.name, c.limit)).collect();
        assert_eq!(limits, [("passes", TIME_LIMIT), ("fails", 1)]);
    }

    #[test]
    fn patterns_choose() {
        let names = |patterns: &[&str]| {
            let patterns: Vec<_> = patterns.iter().map(|p| p.to_string()).collect();
            let list = select(&[&GOOD, &BAD, &EMPTY, &HIDDEN], &patterns);
            list.iter().map(|(s, c)| (s.name, c.len())).collect::<Vec<_>>()
        };
        assert_eq!(names(&[]), [("good", 1), ("bad", 2), ("empty", 0)]);
        assert_eq!(names(&["bad"]), [("bad", 2)]);
        assert_eq!(names(&["empty"]), [("empty", 0)]);
        assert_eq!(names(&["*.pa*"]), [("good", 1), ("bad", 1)]);
        assert_eq!(names(&["*"]), [("good", 1), ("bad", 2)]);
        assert_eq!(names(&["hidden"]), [("hidden", 1)]);
        assert_eq!(names(&["bad.fail", "good.passes"]), [("good", 1)]);
        assert_eq!(names(&["nothing"]), []);
    }

    #[test]
    fn only_a_run_that_did_something_is_good() {
        assert!(!Totals::default().good());
        assert!(Totals { skipped: 1, ..Totals::default() }.good());
        assert!(!Totals { passed: 1, failed: 1, skipped: 0 }.good());
    }

    #[test]
    fn outcomes() {
        let outcome = |code| outcome_of(Verdict(code, "why".into()));
        assert_eq!(outcome(0), Outcome::Pass);
        assert_eq!(outcome(1), Outcome::Fail("why".into()));
        assert_eq!(outcome(4), Outcome::Skip("why".into()));
        assert!(without_verdict(101 << 8).contains("exited with 101"));
        assert!(without_verdict(libc::SIGSEGV).contains("signal 11"));
    }

    #[test]
    fn case_that_leaves_a_knob_changed_fails() {
        let changed = ["a was 1, is 2".to_owned(), "b was 3, is 4".to_owned()];
        let text = "left changed: a was 1, is 2; b was 3, is 4";
        for outcome in [Outcome::Pass, Outcome::Skip("why".into())] {
            assert_eq!(with_changed_knobs(outcome.clone(), &[]), outcome);
            assert_eq!(with_changed_knobs(outcome, &changed), Outcome::Fail(text.into()));
        }
        let failed = with_changed_knobs(Outcome::Fail("why".into()), &changed);
        assert_eq!(failed, Outcome::Fail(format!("why\n{text}")));
        assert_eq!(with_changed_knobs(Outcome::Timeout(2), &changed), Outcome::Timeout(2));
    }

    #[test]
    fn diagnostics_are_lines() {
        let mut out = Vec::new();
        let mut lines = Lines::default();
        lines.add(b"one\ntw", &mut out).unwrap();
        lines.add(b"o\r\nthree", &mut out).unwrap();
        lines.finish(&mut out).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "  # one\n  # two\\r\n  # three\n");
    }

    #[test]
    fn glob_matches() {
        for (p, t) in [("*", ""), ("a*c", "abbc"), ("a?c", "abc"), ("**b*", "ab"), ("a", "a")] {
            assert!(glob(p, t), "{p} {t}");
        }
        for (p, t) in [("", "a"), ("a*c", "abcd"), ("a?c", "ac"), ("a", "ab"), ("ab", "a")] {
            assert!(!glob(p, t), "{p} {t}");
        }
    }
}
