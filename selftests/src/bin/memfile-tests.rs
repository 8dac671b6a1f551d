// SPDX-License-Identifier: GPL-2.0
//! The tests of memfile, as one program that writes KTAP.

use std::process::ExitCode;

use clap::Parser;
use memfile_selftests::ktap::{self, Options};
use memfile_selftests::suites;
use memfile_selftests::sys;

/// Run the tests of memfile and write one KTAP document to standard output.
///
/// Exit status: 0 all passed or skipped, 1 one failed or none was chosen, 2 wrong usage.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The tests to run: `suite`, `suite.case`, with `*` and `?`; all of them without this
    patterns: Vec<String>,

    /// Print the names, one `suite.case` per line, and run nothing
    #[arg(long)]
    list: bool,

    /// A kernel without memfile is a failure, not a reason to skip
    #[arg(long)]
    require_memfile: bool,

    /// Multiply every time limit, for slow kernels
    #[arg(long, value_name = "N", default_value_t = 1)]
    time_factor: u32,

    /// Name each case in the kernel log before it runs
    #[arg(long)]
    kmsg: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let Args { patterns, list, require_memfile, time_factor, kmsg } = args;
    let all = suites::all();
    if list {
        for (suite, cases) in ktap::select(&all, &patterns) {
            for case in cases {
                println!("{}.{}", suite.name, case.name);
            }
        }
        return ExitCode::SUCCESS;
    }
    if require_memfile {
        // SAFETY: The program has one thread.
        unsafe { std::env::set_var(ktap::REQUIRE, "1") };
    }
    sys::set_time_factor(time_factor);
    let options = Options { patterns, time_factor, kmsg };
    match ktap::run(&all, &options, &mut std::io::stdout()) {
        Ok(totals) if totals.good() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(e) => {
            println!("Bail out! {e:#}");
            ExitCode::FAILURE
        }
    }
}
