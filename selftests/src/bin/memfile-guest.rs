// SPDX-License-Identifier: GPL-2.0
//! Process 1 of a real guest. See [`memfile_selftests::agent`].

use std::process::ExitCode;

use memfile_selftests::agent;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().collect();
    let arguments: Vec<_> = arguments.iter().skip(1).map(String::as_str).collect();
    let done = match arguments.as_slice() {
        ["worker", kind, bytes, seed, cpu @ ..] => match (bytes.parse(), seed.parse()) {
            (Ok(bytes), Ok(seed)) => agent::work(kind, bytes, seed, cpu.first().copied()),
            _ => Err(anyhow::anyhow!("worker KIND BYTES SEED [CPU]")),
        },
        // A kernel passes other arguments of its command line to its init: ignore them.
        _ if std::process::id() == 1 => agent::run(),
        _ => Err(anyhow::anyhow!("this program runs only as process 1 of a guest")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("memfile-guest: {e:#}");
            ExitCode::FAILURE
        }
    }
}
