// SPDX-License-Identifier: GPL-2.0
//! Prints the life of one page of a memfile, as the tracepoints see it.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use memfile_selftests::trace;

/// Run a small guest with the tracepoints `memfile:*` on, and print the life of one of its pages.
///
/// Exit status: 0 success, 1 failure, 2 wrong usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Also write the trace as tracefs has it
    #[arg(long, value_name = "FILE")]
    raw: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("memfile-trace: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let story = trace::run()?;
    print!("{}", story.text);
    if let Some(path) = &args.raw {
        std::fs::write(path, story.trace).with_context(|| path.display().to_string())?;
    }
    Ok(())
}
