// SPDX-License-Identifier: GPL-2.0
//! Changes of scripts that leave them scripts.

use std::borrow::Cow;

use libafl::Error;
use libafl::corpus::{Corpus, CorpusId};
use libafl::mutators::{MutationResult, Mutator};
use libafl::random_corpus_id;
use libafl::state::{HasCorpus, HasRand};
use libafl_bolts::Named;
use libafl_bolts::rands::Rand;
use memfile_selftests::script::Step;
use memfile_selftests::script::op::THREADS;
use serde_json::Value;

use crate::generate::Dice;
use crate::input::ScriptInput;

/// The longest script.
const STEPS: usize = 48;

/// The ways to change a script.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// A new operation anywhere.
    Insert,
    /// One operation less, or a few.
    Remove,
    /// Another number or word in an operation.
    Number,
    /// An operation once more, elsewhere or in another thread.
    Repeat,
    /// Two operations change places.
    Swap,
    /// An operation gets another thread.
    Thread,
    /// A part of another script.
    Splice,
}

impl Named for Change {
    fn name(&self) -> &Cow<'static, str> {
        match self {
            Change::Insert => &Cow::Borrowed("insert"),
            Change::Remove => &Cow::Borrowed("remove"),
            Change::Number => &Cow::Borrowed("number"),
            Change::Repeat => &Cow::Borrowed("repeat"),
            Change::Swap => &Cow::Borrowed("swap"),
            Change::Thread => &Cow::Borrowed("thread"),
            Change::Splice => &Cow::Borrowed("splice"),
        }
    }
}

impl<S> Mutator<ScriptInput, S> for Change
where
    S: HasRand + HasCorpus<ScriptInput>,
{
    fn mutate(&mut self, state: &mut S, input: &mut ScriptInput) -> Result<MutationResult, Error> {
        // Before the dice: both are of the state.
        let other = match self {
            Change::Splice => {
                let id = random_corpus_id!(state.corpus(), state.rand_mut());
                let other = state.corpus().cloned_input_for_id(id)?;
                other.0.steps
            }
            _ => Vec::new(),
        };
        let mut dice = Dice(state.rand_mut());
        let changed = self.change(&mut dice, &mut input.0.steps, &other);
        input.0.steps.truncate(STEPS);
        Ok(if changed { MutationResult::Mutated } else { MutationResult::Skipped })
    }

    fn post_exec(&mut self, _state: &mut S, _id: Option<CorpusId>) -> Result<(), Error> {
        Ok(())
    }
}

impl Change {
    /// Whether there was anything to change.
    fn change<R: Rand>(self, dice: &mut Dice<R>, steps: &mut Vec<Step>, other: &[Step]) -> bool {
        if matches!(self, Change::Insert) {
            for _ in 0..=dice.below(3) {
                let at = dice.below(steps.len() + 1);
                steps.insert(at, dice.step());
            }
            return true;
        }
        if steps.is_empty() || (matches!(self, Change::Splice) && other.is_empty()) {
            return false;
        }
        let at = dice.below(steps.len());
        match self {
            Change::Insert => {}
            Change::Remove => {
                let end = (at + 1 + dice.below(3)).min(steps.len());
                steps.drain(at..end);
            }
            Change::Number => return change_number(dice, &mut steps[at]),
            Change::Repeat => {
                let mut step = steps[at].clone();
                if dice.coin() {
                    step.thread = dice.below(THREADS) as u8;
                }
                let to = dice.below(steps.len() + 1);
                steps.insert(to, step);
            }
            Change::Swap => {
                let with = dice.below(steps.len());
                steps.swap(at, with);
            }
            Change::Thread => steps[at].thread = dice.below(THREADS) as u8,
            Change::Splice => {
                let from = dice.below(other.len());
                let end = (from + 1 + dice.below(12)).min(other.len());
                let part = other[from..end].iter().cloned();
                steps.splice(at..at, part);
            }
        }
        true
    }
}

/// Change one number or one truth of an operation; those that do not fit its type are tried again.
fn change_number<R: Rand>(dice: &mut Dice<R>, step: &mut Step) -> bool {
    let Ok(before) = serde_json::to_value(&step.op) else { return false };
    for _ in 0..8 {
        let mut value = before.clone();
        let mut leaves = Vec::new();
        collect(&mut value, &mut leaves);
        if leaves.is_empty() {
            return false;
        }
        let leaf = leaves.swap_remove(dice.below(leaves.len()));
        match leaf {
            Value::Bool(truth) => *truth = !*truth,
            Value::Number(number) => {
                let old = number.as_i64().unwrap_or(0);
                let new = match dice.below(6) {
                    0 => old + 1,
                    1 => old - 1,
                    2 => old ^ (1 << dice.below(16)),
                    3 => 0,
                    4 => old * 2,
                    _ => dice.below(256) as i64,
                };
                *number = new.into();
            }
            _ => continue,
        }
        if let Ok(op) = serde_json::from_value(value) {
            step.op = op;
            return true;
        }
    }
    false
}

fn collect<'a>(value: &'a mut Value, leaves: &mut Vec<&'a mut Value>) {
    match value {
        Value::Bool(_) | Value::Number(_) => leaves.push(value),
        Value::Object(fields) => fields.values_mut().for_each(|field| collect(field, leaves)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use libafl_bolts::rands::StdRand;
    use memfile_selftests::script::Script;

    use super::*;

    /// After every change the text of a script still is the script.
    #[test]
    fn changed_script_has_a_text() {
        let mut rand = StdRand::with_seed(1);
        let mut dice = Dice(&mut rand);
        let (mut script, other) = (Script::default(), vec![dice.step(), dice.step()]);
        let changes = [
            Change::Insert,
            Change::Remove,
            Change::Number,
            Change::Repeat,
            Change::Swap,
            Change::Thread,
            Change::Splice,
        ];
        for _ in 0..3000 {
            let change = changes[dice.below(changes.len())];
            change.change(&mut dice, &mut script.steps, &other);
            script.steps.truncate(STEPS);
            assert_eq!(Script::parse(&script.to_string()).unwrap(), script);
        }
        assert!(!script.steps.is_empty());
    }

    /// A change of a number changes that operation and leaves its kind.
    #[test]
    fn number_is_another_one() {
        let mut rand = StdRand::with_seed(2);
        let mut dice = Dice(&mut rand);
        let text = r#"0 {"Fallocate":{"file":0,"mode":3,"range":{"at":8,"pages":16},"bytes":0}}"#;
        let before = Script::parse(text).unwrap();
        let mut differ = 0;
        for _ in 0..100 {
            let mut script = before.clone();
            assert!(change_number(&mut dice, &mut script.steps[0]));
            assert!(script.to_string().contains("Fallocate"));
            differ += u32::from(script != before);
        }
        assert!(differ > 50);
    }
}
