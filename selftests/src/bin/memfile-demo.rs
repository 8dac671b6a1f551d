// SPDX-License-Identifier: GPL-2.0
//! Shows, with real guests, what each kind of guest memory costs the host, and when.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use memfile_selftests::qemu::Lab;
use memfile_selftests::{MIB, demo};

/// Run the same guest on each kind of memory, at ease and under pressure, and print two tables.
///
/// Exit status: 0 success, 1 if a guest read wrong content or the measurement failed, 2 wrong
/// usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Guest memory under test, in MiB; a multiple of 8
    #[arg(long, value_name = "MIB", default_value_t = 256,
          value_parser = clap::value_parser!(u64).range(8..=65536))]
    size: u64,

    /// Instead a real Linux in a real QEMU on memory of every kind, one table
    #[arg(long)]
    guest: bool,

    /// Also write the figures of the first table, in bytes, as CSV
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,

    /// Also write the figures under pressure, step by step, as CSV
    #[arg(long, value_name = "FILE")]
    story_csv: Option<PathBuf>,

    /// Also write all figures as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("memfile-demo: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// True if every guest read the right content.
fn run(args: &Args) -> Result<bool> {
    if args.guest {
        return run_guest(args);
    }
    let size = (args.size & !7) * MIB;
    let report = demo::run(size, &mut |name| eprintln!("measuring: {name}"))?;
    print!("\n{}", demo::text(&report));
    write(args.csv.as_deref(), "/out/demo.csv", &demo::csv(&report))?;
    let story = demo::story_csv(&report.story);
    write(args.story_csv.as_deref(), "/out/story.csv", &story)?;
    let json = serde_json::to_string_pretty(&report).context("JSON")? + "\n";
    write(args.json.as_deref(), "/out/demo.json", &json)?;
    Ok(report.is_right())
}

/// The same with real guests.
fn run_guest(args: &Args) -> Result<bool> {
    let real = demo::tell_real(&Lab::find()?, &mut |name| eprintln!("measuring: {name}"))?;
    print!("\n{}", demo::real_text(&real));
    let story = demo::story_csv(&real.story);
    write(args.story_csv.as_deref(), "/out/guest.csv", &story)?;
    let json = serde_json::to_string_pretty(&real).context("JSON")? + "\n";
    write(args.json.as_deref(), "/out/guest.json", &json)?;
    Ok(real.is_right())
}

/// Write a file to the given path, or else to its place in /out, where scripts/boot collects files.
fn write(asked: Option<&Path>, usual: &str, content: &str) -> Result<()> {
    let usual = Path::new(usual);
    let path = match asked {
        Some(path) => path,
        None if usual.parent().is_some_and(Path::is_dir) => usual,
        None => return Ok(()),
    };
    std::fs::write(path, content).with_context(|| format!("write {}", path.display()))
}
