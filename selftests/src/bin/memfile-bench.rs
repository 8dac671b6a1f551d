// SPDX-License-Identifier: GPL-2.0
//! Counts the instructions of operations on private memory and on ordinary memfds.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use memfile_selftests::bench::{self, Report};

/// Measure and write JSON; see scripts/bench, which runs this and makes the table.
///
/// Exit status: 0 measured, 1 something failed, 2 wrong usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The measurement
    what: What,

    /// Only this figure; repeatable
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,

    /// How often to measure all of it; how far the runs differ is the noise
    #[arg(long, value_name = "N", default_value_t = 2)]
    runs: u32,

    /// The file for the figures; standard output if it is not given
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum What {
    /// memfile against guest_memfd
    Private,
    /// A GiB in pages of every size
    Stores,
    /// Out of the direct map against in it
    Hidden,
    /// To swap and back, and elsewhere
    Motion,
    /// Ordinary memfds
    Ordinary,
    /// How costs grow with the size of things
    Growth,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("memfile-bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    let mut report = Report::new(args.only)?;
    for run in 0..args.runs {
        report.begin_run(run);
        match args.what {
            What::Private => bench::private(&mut report)?,
            What::Stores => bench::stores(&mut report)?,
            What::Hidden => bench::hidden(&mut report)?,
            What::Motion => bench::motion(&mut report)?,
            What::Ordinary => bench::ordinary(&mut report)?,
            What::Growth => bench::growth(&mut report)?,
        }
    }
    let json = serde_json::to_string_pretty(&report).context("JSON")? + "\n";
    match &args.json {
        Some(path) => std::fs::write(path, json).with_context(|| path.display().to_string()),
        None => {
            print!("{json}");
            Ok(())
        }
    }
}
