// SPDX-License-Identifier: GPL-2.0
//! Counts the instructions of operations on private memory and ordinary shmem.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use memfile_selftests::bench;

/// Measure and write JSON; see scripts/bench, which runs this and makes the table.
///
/// Exit status: 0 measured, 1 something failed, 2 wrong usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// What to measure
    what: What,

    /// The file for the figures; standard output if it is not given
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// memfile against guest_memfd
    Private,
    /// Where their instructions go
    Profile,
    /// An ordinary memfd
    Shmem,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("memfile-bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let report = match args.what {
        What::Private => bench::private()?,
        What::Profile => bench::profiles()?,
        What::Shmem => bench::shmem()?,
    };
    let json = serde_json::to_string_pretty(&report).context("JSON")? + "\n";
    match &args.json {
        Some(path) => std::fs::write(path, json).with_context(|| path.display().to_string()),
        None => {
            print!("{json}");
            Ok(())
        }
    }
}
