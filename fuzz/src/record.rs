// SPDX-License-Identifier: GPL-2.0
//! The record of a run, on the host: it stays when this machine dies.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use memfile_selftests::script::Script;

/// Scripts under names, as one text.
pub struct Record(File);

impl Record {
    pub fn open(path: &Path) -> Result<Record> {
        let file = File::options().append(true).create(true).open(path);
        Ok(Record(file.with_context(|| path.display().to_string())?))
    }

    /// `name` is of one word, a kind and a number; what is said goes into comments.
    pub fn note(&mut self, name: &str, said: &str, script: &Script) -> Result<()> {
        let mut text = format!("== {name}\n");
        for line in said.lines() {
            text += &format!("# {line}\n");
        }
        text += &script.to_string();
        self.0.write_all(text.as_bytes()).context("the record")
    }
}
