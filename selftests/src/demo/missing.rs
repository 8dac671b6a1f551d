// SPDX-License-Identifier: GPL-2.0
//! The rows that the demo cannot make on this machine.

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::skip::Skip;

/// A row that could not be made, and why.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Missing {
    pub name: String,
    pub reason: String,
}

/// The value, or nothing and an entry in `missing` if the kernel lacks something.
pub fn unless_missing<T>(
    result: Result<T>,
    name: &str,
    missing: &mut Vec<Missing>,
) -> Result<Option<T>> {
    let Err(error) = result else { return result.map(Some) };
    match error.chain().find_map(|e| e.downcast_ref::<Skip>()) {
        Some(Skip(reason)) => {
            missing.push(Missing { name: name.into(), reason: reason.clone() });
            Ok(None)
        }
        None => Err(error.context(name.to_owned())),
    }
}
