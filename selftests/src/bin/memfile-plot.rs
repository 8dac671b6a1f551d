// SPDX-License-Identifier: GPL-2.0
//! Makes a picture and a page from the figures of memfile-demo. Runs on the host.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use memfile_selftests::demo;

/// Draw the figures that memfile-demo wrote with --json.
///
/// Exit status: 0 success, 1 failure, 2 wrong usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The output of memfile-demo
    json: PathBuf,

    /// Write the plot of the story as SVG
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,

    /// Write tables and plot as one HTML page
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,

    /// HTML that comes last on that page
    #[arg(long, value_name = "FILE")]
    section: Option<PathBuf>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("memfile-plot: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let name = args.json.display();
    let json = std::fs::read_to_string(&args.json).with_context(|| format!("read {name}"))?;
    let section = match &args.section {
        Some(path) => {
            std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?
        }
        None => String::new(),
    };
    // The figures of real guests, or of the test's own.
    let (svg, html) = match serde_json::from_str::<demo::Real>(&json) {
        Ok(real) => {
            (demo::svg(&real.story, "A real Linux in a real QEMU")?, demo::real_html(&real)?)
        }
        Err(_) => {
            let report: demo::Report =
                serde_json::from_str(&json).with_context(|| format!("{name} is no report"))?;
            (demo::svg(&report.story, "A guest under pressure")?, demo::html(&report, &section)?)
        }
    };
    for (path, text) in [(&args.svg, svg), (&args.html, html)] {
        if let Some(path) = path {
            write(path, &text)?;
        }
    }
    Ok(())
}

fn write(path: &Path, content: &str) -> Result<()> {
    std::fs::write(path, content).with_context(|| format!("write {}", path.display()))
}
