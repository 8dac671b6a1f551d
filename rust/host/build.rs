// SPDX-License-Identifier: GPL-2.0

//! Writes the mutants of the engine that test the checker in `protocol.rs`: it must find the fault
//! of each.
//!
//! `scripts/mutants` makes them from the list that the mutants of the kernel and of the module are
//! made from, `scripts/mutants.toml`. Each is `engine/node.rs` with one text replaced.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::{env, fs};

const SCRIPTS: &str = "../../scripts";

fn main() {
    for path in ["build.rs", "../engine/node.rs"] {
        println!("cargo::rerun-if-changed={path}");
    }
    for path in ["mutants", "mutants.toml", "memfile/mutants"] {
        println!("cargo::rerun-if-changed={SCRIPTS}/{path}");
    }
    let run = Command::new(format!("{SCRIPTS}/mutants"))
        .arg("--host")
        .stderr(Stdio::inherit())
        .output()
        .expect("scripts/mutants runs");
    assert!(run.status.success(), "scripts/mutants --host failed");
    let path = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("mutants.rs");
    fs::write(&path, run.stdout).expect("OUT_DIR is ours");
}
