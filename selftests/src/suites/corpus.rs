// SPDX-License-Identifier: GPL-2.0
//! The scripts of `fuzz/corpus` run without anything wrong.

use crate::ktap::{CaseResult, Suite};
use crate::{script, suite};

pub static SUITE: Suite =
    suite!("fuzz_corpus", [scripts_that_the_fuzzer_begins_with_run_well: 120]);

fn scripts_that_the_fuzzer_begins_with_run_well() -> CaseResult {
    script::run_all(include_str!("../../../fuzz/corpus/seeds"))
}
