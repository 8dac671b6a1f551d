// SPDX-License-Identifier: GPL-2.0

//! Writes broken variants of the engine, which test the checker in `protocol.rs`: it must find the
//! fault of each.
//!
//! Each is `engine/node.rs` with one text replaced. If that text does not occur exactly once, the
//! variant is unchanged and its test fails: then give it a text that does.

use std::fmt::Write;
use std::path::PathBuf;
use std::{env, fs};

/// Name, text, and replacement.
const MUTANTS: &[(&str, &str, &str)] = &[
    (
        "bind_does_not_wait",
        "other.holds_up_birth(birth, pages)",
        "{ let _ = other; false }",
    ),
    (
        "unbind_does_not_wait",
        "other.holds_up_death(life, pages)",
        "{ let _ = other; false }",
    ),
    (
        "new_bindings_are_called_by_the_older",
        "tree.life(notifier).called_at(scope.seq)",
        "(scope.seq < tree.life(notifier).death)",
    ),
    (
        "dead_bindings_are_called_by_the_younger",
        "tree.life(notifier).called_at(scope.seq)",
        "(tree.life(notifier).birth < scope.seq)",
    ),
    ("nobody_is_woken", "self.ended.notify_all();", ""),
    (
        "woken_without_the_lock",
        "self.ended.notify_all();",
        "drop(state); self.ended.notify_all();",
    ),
    (
        "starts_are_not_called",
        "notifier.invalidate_start(inv, frames);",
        "",
    ),
    (
        "ends_are_not_called",
        "notifier.invalidate_end(inv, frames);",
        "",
    ),
    (
        "nothing_is_clipped",
        "span.frames_of(scope.pages)",
        "span.frames_of(span.pages())",
    ),
    (
        "exclusive_bindings_may_overlap",
        "self.exclusive.next(pages, None).is_some()",
        "false",
    ),
    (
        "each_binding_is_called_by_itself",
        "first == Some(notifier) || self.state.lock().leads(scope, notifier)",
        "true",
    ),
    (
        "peers_are_left_out",
        "self.state.lock().peer(scope, after)?",
        "self.state.lock().peer(scope, after).filter(|_| false)?",
    ),
];

const NODE: &str = "../engine/node.rs";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={NODE}");
    let whole = fs::read_to_string(NODE).expect(NODE);
    // Inner documentation cannot be included.
    let lines = whole.lines().filter(|line| !line.starts_with("//!"));
    let whole = lines.map(|line| format!("{line}\n")).collect::<String>();

    let mut out = String::new();
    for &(name, from, to) in MUTANTS {
        let source = if whole.matches(from).count() == 1 {
            whole.replace(from, to)
        } else {
            println!("cargo::warning=mutant {name} does not fit {NODE} any more");
            whole.clone()
        };
        write!(out, "pub(crate) mod {name} {{\n{source}}}\n").expect("a String grows");
    }
    let path = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("mutants.rs");
    fs::write(&path, out).expect("OUT_DIR is ours");
}
