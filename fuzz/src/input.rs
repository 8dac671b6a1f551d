// SPDX-License-Identifier: GPL-2.0
//! Scripts as the inputs of the fuzzer.

use libafl::inputs::{HasTargetBytes, Input};
use libafl_bolts::ownedref::OwnedSlice;
use memfile_selftests::script::Script;
use serde::{Deserialize, Serialize};

/// A script.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ScriptInput(pub Script);

impl Input for ScriptInput {}

impl HasTargetBytes for ScriptInput {
    fn target_bytes(&self) -> OwnedSlice<'_, u8> {
        OwnedSlice::from(self.0.to_string().into_bytes())
    }
}
