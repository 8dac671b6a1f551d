// SPDX-License-Identifier: GPL-2.0
//! A fuzzer of memfile, guided by the code that the kernel runs or, on a kernel without KCOV, by the
//! results of operations and the kernel's counters; `scripts/fuzz` starts it.
//!
//! LibAFL decides which script is changed next and which is kept; the crate of the selftests has the
//! code that runs and judges a script. The fuzzer runs in the machine that it tests, so the host
//! records every script before it runs.

mod generate;
mod input;
mod kcov;
mod minimise;
mod mutate;
mod outcome;
mod record;
mod watch;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use libafl::corpus::{Corpus, InMemoryCorpus};
use libafl::events::SimpleEventManager;
use libafl::executors::{Executor, ExitKind, WithObservers};
use libafl::feedbacks::{CrashFeedback, MaxMapFeedback};
use libafl::monitors::NopMonitor;
use libafl::mutators::HavocScheduledMutator;
use libafl::observers::StdMapObserver;
use libafl::schedulers::QueueScheduler;
use libafl::stages::StdMutationalStage;
use libafl::state::{HasCorpus, StdState};
use libafl::{Error, Evaluator, Fuzzer, StdFuzzer};
use libafl_bolts::rands::StdRand;
use libafl_bolts::tuples::tuple_list;
use memfile_selftests::script::op::Op;
use memfile_selftests::script::{self, End, NoProbe, Probe, Script, System};
use memfile_selftests::sys::{self, Errno};

use crate::input::ScriptInput;
use crate::kcov::{Kcov, STEPS};
use crate::mutate::Change;
use crate::outcome::{CHANGES, Counters, OUTCOMES, Outcomes};
use crate::record::Record;
use crate::watch::KernelLog;

/// How often a script runs anew to see whether it fails again.
const AGAIN: u32 = 4;
/// How many scripts that fail in the same way are made shorter.
const SAME: u32 = 2;

/// Run scripts, keep those that reach new code, change them, until time is up.
///
/// Exit status: 0 nothing was wrong, 1 something was, 2 wrong usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Files with the scripts to begin with
    corpus: Vec<PathBuf>,

    /// How long, in seconds
    #[arg(long, value_name = "S", default_value_t = 60)]
    time: u64,

    /// Where chance begins
    #[arg(long, value_name = "N")]
    seed: u64,

    /// Where the record goes
    #[arg(long, value_name = "FILE", default_value = "/dev/fuzz")]
    record: PathBuf,

    /// Messages of the kernel that are a failure, as a regular expression
    #[arg(long, value_name = "REGEX")]
    splat: String,

    /// Multiply every time limit, for slow kernels
    #[arg(long, value_name = "N", default_value_t = 5)]
    time_factor: u32,

    /// Run the scripts as this user, who may use the devices
    #[arg(long, value_name = "UID")]
    user: Option<u32>,
}

/// Bytes of what is seen of a run.
const SEEN: usize = STEPS + OUTCOMES + CHANGES;

/// Observers of a run.
struct Look {
    kcov: Option<Kcov>,
    outcomes: Outcomes,
    before: Counters,
}

impl Look {
    /// A run begins.
    fn begin(&mut self) {
        if let Some(kcov) = &self.kcov {
            kcov.clear();
        }
        self.outcomes.clear();
        self.before = Counters::now();
    }

    /// Observations of the run; the number of places in the code.
    fn mark(&self, map: &mut [u8]) -> u64 {
        let (steps, rest) = map.split_at_mut(STEPS);
        let (outcomes, changes) = rest.split_at_mut(OUTCOMES);
        self.outcomes.mark(outcomes);
        self.before.mark(changes);
        self.kcov.as_ref().map_or(0, |kcov| kcov.mark(steps))
    }
}

impl Probe for Look {
    fn enter(&self, thread: usize) {
        if let Some(kcov) = &self.kcov {
            kcov.enter(thread);
        }
    }

    fn leave(&self, thread: usize) {
        if let Some(kcov) = &self.kcov {
            kcov.leave(thread);
        }
    }

    fn ended(&self, thread: usize, op: &Op, errno: Errno) {
        self.outcomes.ended(thread, op, errno);
    }
}

/// Runs scripts and judges them.
struct Target {
    system: System,
    look: Look,
    log: KernelLog,
    record: Record,
    /// The steps of the last run, for the observer.
    map: *mut u8,
    /// Places in the code that were recorded.
    places: u64,
    runs: u64,
    /// How often scripts were wrong, by what was.
    wrong: BTreeMap<String, u32>,
    killed: u64,
    /// Seconds that scripts take to be made shorter do not count.
    until: Instant,
}

impl Target {
    /// Run one, with or without a look at what it reaches: what is wrong, if anything.
    fn run(&mut self, script: &Script, look: bool) -> Result<Option<String>> {
        self.runs += 1;
        self.record.note(&format!("run-{}", self.runs), "", script)?;
        let end = if look {
            self.look.begin();
            script::run(script, &self.system, &self.look)?
        } else {
            script::run(script, &self.system, &NoProbe)?
        };
        let said = self.log.failure();
        Ok(match end {
            End::Wrong(what) => Some(what),
            End::Killed(_) => {
                self.killed += 1;
                said
            }
            End::Well => said,
        })
    }

    fn judge(&mut self, script: &Script) -> Result<bool> {
        let Some(what) = self.run(script, true)? else { return Ok(false) };
        let kind = kind_of(&what);
        let count = self.wrong.entry(kind.clone()).or_default();
        *count += 1;
        let (count, number) = (*count, self.runs);
        println!("WRONG in run {number}: {what}");
        self.record.note(&format!("wrong-{number}"), &what, script)?;
        if count <= SAME {
            let start = Instant::now();
            let least = minimise::minimise(script, |less| {
                for _ in 0..AGAIN {
                    let again = self.run(less, false)?;
                    if again.is_some_and(|what| kind_of(&what) == kind) {
                        return Ok(true);
                    }
                }
                Ok(false)
            })?;
            println!("run {number} with {} steps:\n{least}", least.steps.len());
            self.record.note(&format!("least-{number}"), &what, &least)?;
            self.until += start.elapsed();
        }
        Ok(true)
    }
}

/// The failure, without the numbers and addresses of this run, and without the operation.
fn kind_of(what: &str) -> String {
    let end = what.rsplit("}: ").next().unwrap_or(what);
    end.chars().filter(|c| !c.is_ascii_hexdigit()).take(60).collect()
}

/// The same, for LibAFL.
struct Runner(Rc<RefCell<Target>>);

impl<EM, S, Z> Executor<EM, ScriptInput, S, Z> for Runner {
    fn run_target(
        &mut self,
        _fuzzer: &mut Z,
        _state: &mut S,
        _mgr: &mut EM,
        input: &ScriptInput,
    ) -> Result<ExitKind, Error> {
        let mut target = self.0.borrow_mut();
        let wrong = target.judge(&input.0).map_err(|e| Error::unknown(format!("{e:#}")))?;
        // SAFETY: The map is of this size, is never freed, and the observer, its only other user,
        // does not use it while a script runs.
        let map = unsafe { std::slice::from_raw_parts_mut(target.map, SEEN) };
        let places = target.look.mark(map);
        target.places += places;
        Ok(if wrong { ExitKind::Crash } else { ExitKind::Ok })
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    sys::set_time_factor(args.time_factor);
    match fuzz(&args) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("memfile-fuzz: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// The number of scripts that were wrong.
fn fuzz(args: &Args) -> Result<u32> {
    let mut seeds = Vec::new();
    for path in &args.corpus {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        seeds.extend(Script::parse_all(&text)?.into_iter().map(|(_, script)| script));
    }
    let mut system = System::new()?;
    if let Some(user) = args.user {
        system = system.as_user(user)?;
    }
    let map: *mut u8 = Box::leak(vec![0u8; SEEN].into_boxed_slice()).as_mut_ptr();
    let target = Rc::new(RefCell::new(Target {
        system,
        look: Look { kcov: Kcov::open()?, outcomes: Outcomes::new()?, before: Counters::now() },
        log: KernelLog::open(&args.splat)?,
        record: Record::open(&args.record)?,
        map,
        places: 0,
        runs: 0,
        wrong: BTreeMap::new(),
        killed: 0,
        until: Instant::now() + Duration::from_secs(args.time),
    }));

    // SAFETY: The map is of this size and is never freed.
    let observer = unsafe { StdMapObserver::from_mut_ptr("seen", map, SEEN) };
    let mut feedback = MaxMapFeedback::new(&observer);
    let mut objective = CrashFeedback::new();
    let mut state = StdState::new(
        StdRand::with_seed(args.seed),
        InMemoryCorpus::<ScriptInput>::new(),
        InMemoryCorpus::new(),
        &mut feedback,
        &mut objective,
    )?;
    let mut manager = SimpleEventManager::new(NopMonitor::new());
    let mut fuzzer = StdFuzzer::new(QueueScheduler::new(), feedback, objective);
    let mut executor = WithObservers::new(Runner(target.clone()), tuple_list!(observer));
    let mutator = HavocScheduledMutator::new(tuple_list!(
        Change::Insert,
        Change::Insert,
        Change::Remove,
        Change::Number,
        Change::Number,
        Change::Repeat,
        Change::Swap,
        Change::Thread,
        Change::Splice,
    ));
    let mut stages = tuple_list!(StdMutationalStage::new(mutator));

    println!("seed {}, {} scripts to begin with", args.seed, seeds.len());
    for script in seeds {
        fuzzer.evaluate_input(&mut state, &mut executor, &mut manager, &ScriptInput(script))?;
    }
    match target.borrow().look.kcov {
        Some(_) => ensure!(target.borrow().places != 0, "the kernel has recorded nothing"),
        None => println!("this kernel does not tell which code it runs"),
    }
    ensure!(state.corpus().count() != 0, "no script reaches anything");
    let mut kept = state.corpus().count();
    let start = Instant::now();
    let mut said = start;
    while Instant::now() < target.borrow().until {
        fuzzer.fuzz_one(&mut stages, &mut executor, &mut state, &mut manager)?;
        while kept < state.corpus().count() {
            let id = state.corpus().nth(kept);
            let script = state.corpus().cloned_input_for_id(id)?.0;
            kept += 1;
            target.borrow_mut().record.note(&format!("kept-{kept}"), "", &script)?;
        }
        if said.elapsed() > Duration::from_secs(20) {
            said = Instant::now();
            let target = target.borrow();
            println!(
                "{} s: {} runs, {kept} kept, {} killed, wrong {:?}",
                start.elapsed().as_secs(),
                target.runs,
                target.killed,
                target.wrong.values().sum::<u32>(),
            );
        }
    }
    let target = target.borrow();
    for (kind, count) in &target.wrong {
        println!("{count} times: {kind}");
    }
    println!("{} runs, {kept} scripts kept, {} killed", target.runs, target.killed);
    Ok(target.wrong.values().sum())
}
