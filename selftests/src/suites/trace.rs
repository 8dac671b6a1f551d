// SPDX-License-Identifier: GPL-2.0
//! The tracepoints `memfile:*`.

use crate::ktap::{CaseResult, Suite, missing_memfile};
use crate::{suite, trace};

pub static SUITE: Suite = suite!("trace", [life_of_a_page_is_told_in_order]);

fn life_of_a_page_is_told_in_order() -> CaseResult {
    if !std::path::Path::new(trace::TRACEFS).join("events/memfile").exists() {
        return missing_memfile("there is no tracefs, or no memfile in it");
    }
    print!("{}", trace::run()?.text);
    Ok(())
}
