// SPDX-License-Identifier: GPL-2.0
//! Skips: a case ends with one if this machine cannot test its promise.

use std::fmt;

use anyhow::Result;

/// The error of a case that this machine cannot test.
#[derive(Debug)]
pub struct Skip(pub String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "skipped: {}", self.0)
    }
}

impl std::error::Error for Skip {}

/// End the case as skipped.
pub fn skip<T>(reason: impl Into<String>) -> Result<T> {
    Err(Skip(reason.into()).into())
}

/// End the case because the kernel lacks memfile: skipped, or failed under `--require-memfile`.
pub fn missing_memfile<T>(reason: &str) -> Result<T> {
    if std::env::var_os(REQUIRE).is_some() {
        anyhow::bail!("memfile is required, but {reason}");
    }
    skip(reason)
}

/// Environment variable by which a child knows that `--require-memfile` was given.
pub const REQUIRE: &str = "MEMFILE_REQUIRE";
