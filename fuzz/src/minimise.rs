// SPDX-License-Identifier: GPL-2.0
//! The shortest script that still fails.

use anyhow::Result;
use memfile_selftests::script::Script;

/// Take away steps as long as what is left still fails: halves first, single ones last.
pub fn minimise(script: &Script, mut fails: impl FnMut(&Script) -> Result<bool>) -> Result<Script> {
    let mut least = script.clone();
    let mut part = least.steps.len().div_ceil(2);
    while part > 0 {
        let mut at = 0;
        let before = least.steps.len();
        while at < least.steps.len() {
            let mut less = least.clone();
            less.steps.drain(at..(at + part).min(least.steps.len()));
            if fails(&less)? {
                least = less;
            } else {
                at += part;
            }
        }
        // Single steps once more while that helps.
        if part > 1 {
            part = part.div_ceil(2).min(part - 1);
        } else if least.steps.len() == before {
            part = 0;
        }
    }
    Ok(least)
}

#[cfg(test)]
mod tests {
    use memfile_selftests::script::Step;
    use memfile_selftests::script::op::Op;

    use super::*;

    #[test]
    fn only_what_is_needed_is_left() {
        let step = |file| Step { thread: 0, op: Op::Close { file } };
        let script = Script { steps: (0..40).map(step).collect() };
        let needed = [step(3), step(17), step(39)];
        let fails = |s: &Script| Ok(needed.iter().all(|step| s.steps.contains(step)));
        assert_eq!(minimise(&script, fails).unwrap().steps, needed);
    }

    #[test]
    fn script_of_one_step_stays() {
        let script = Script { steps: vec![Step { thread: 0, op: Op::Meet }] };
        assert_eq!(minimise(&script, |s| Ok(!s.steps.is_empty())).unwrap(), script);
    }
}
