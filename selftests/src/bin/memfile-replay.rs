// SPDX-License-Identifier: GPL-2.0
//! Runs scripts: what the fuzzer has found, or what somebody has written.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use memfile_selftests::script::{self, End, NoProbe, Script, System};
use memfile_selftests::sys;

/// Run scripts in this machine and say how each ends.
///
/// Exit status: 0 nothing is wrong, 1 something is, 2 wrong usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Files with one script each, or with several that have names
    #[arg(required = true)]
    files: Vec<PathBuf>,

    /// How often to run each
    #[arg(long, value_name = "N", default_value_t = 1)]
    times: u32,

    /// Multiply every time limit, for slow kernels
    #[arg(long, value_name = "N", default_value_t = 1)]
    time_factor: u32,

    /// Run the scripts as this user, who may use the devices
    #[arg(long, value_name = "UID")]
    user: Option<u32>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    sys::set_time_factor(args.time_factor);
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("memfile-replay: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Whether nothing is wrong.
fn run(args: &Args) -> Result<bool> {
    let mut system = System::new()?;
    if let Some(user) = args.user {
        system = system.as_user(user)?;
    }
    let mut well = true;
    for path in &args.files {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let mut scripts = Script::parse_all(&text)?;
        if scripts.is_empty() {
            scripts.push((path.display().to_string(), Script::parse(&text)?));
        }
        for (name, script) in scripts {
            for _ in 0..args.times {
                // Before: the machine may not survive it.
                println!("{name}: {} operations", script.steps.len());
                match script::run(&script, &system, &NoProbe)? {
                    End::Well => {}
                    End::Killed(signal) => println!("{name}: killed by signal {signal}"),
                    End::Wrong(what) => {
                        println!("{name}: WRONG: {what}");
                        well = false;
                    }
                }
            }
        }
    }
    Ok(well)
}
