// SPDX-License-Identifier: GPL-2.0
//! `debugfs/memfile`: the counters of all files, and of each.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::consumer::{Consumer, MAPPER, Mode, Span};
use crate::ktap::{CaseResult, Suite};
use crate::module::Module;
use crate::sys::*;
use crate::{MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "debugfs",
    [
        file_has_its_own_counters,
        line_goes_with_the_file,
        totals_keep_what_happened_to_files_that_are_gone,
        open_file_keeps_the_module,
        open_file_goes_on_after_an_attempt_to_reload,
    ]
);

const ALL: Span = Span::same(0, MIB / PAGE);

type Counters = HashMap<String, u64>;

const FOLDER: &str = "/sys/kernel/debug/memfile";

fn read(name: &str) -> Result<String> {
    drop(memfile_unsized()?);
    let path = format!("{FOLDER}/{name}");
    std::fs::read_to_string(&path).context(path)
}

/// All files that the module has there.
fn paths() -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(FOLDER).context(FOLDER)?;
    let paths: Vec<_> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    ensure!(paths.len() >= 2, "{FOLDER} has {paths:?}");
    Ok(paths)
}

/// The totals.
fn totals() -> Result<Counters> {
    let counter = |line: &str| -> Result<(String, u64)> {
        let (name, value) = line.split_once(' ').context("no value")?;
        Ok((name.to_owned(), value.parse().context("no number")?))
    };
    let text = read("counters")?;
    text.lines().map(|line| counter(line).with_context(|| format!("line {line:?}"))).collect()
}

/// The counters of each file, by inode number.
fn files() -> Result<HashMap<u64, Counters>> {
    let text = read("files")?;
    let mut lines = text.lines().map(|line| line.split(' '));
    let names: Vec<_> = lines.next().context("no names")?.skip(1).collect();
    let file = |mut words: std::str::Split<char>| -> Result<(u64, Counters)> {
        let ino = words.next().context("no inode number")?.parse()?;
        let values: Vec<u64> = words.map(str::parse).collect::<Result<_, _>>()?;
        ensure!(values.len() == names.len(), "{} values for {names:?}", values.len());
        Ok((ino, names.iter().map(|&name| name.to_owned()).zip(values).collect()))
    };
    lines.map(file).collect()
}

fn inode(fd: impl AsFd) -> Result<u64> {
    Ok(fstat(fd).context("fstat")?.st_ino)
}

/// Fail unless these counters have these values, and all others are 0.
fn expect(got: &Counters, wanted: &[(&str, u64)], what: &str) -> Result<()> {
    for &(name, value) in wanted {
        let got = got.get(name).with_context(|| format!("{what}: there is no {name}"))?;
        ensure!(*got == value, "{what}: {name} is {got}, wanted {value}");
    }
    for (name, value) in got {
        let wanted = wanted.iter().any(|(wanted, _)| name == wanted);
        ensure!(wanted || *value == 0, "{what}: {name} is {value}, wanted 0");
    }
    Ok(())
}

fn file_has_its_own_counters() -> CaseResult {
    let (busy, idle) = (memfile(MIB)?, memfile(MIB)?);
    let observer = Consumer::bound(&busy, Mode::Observer, ALL)?;
    let mapper = Consumer::bound(&busy, MAPPER, ALL)?;
    for frame in 0..5 {
        mapper.get(frame)?;
    }
    expect_errno("outside", mapper.get(1 << 30), &[Errno::EINVAL])?;
    punch(&busy, 0, PAGE)?;
    punch(&busy, 0, MIB)?;
    observer.unbind()?;
    let files = files()?;
    let line = |fd| files.get(&inode(fd)?).context("the file has no line");
    let wanted = [
        ("create", 1),
        ("bind", 2),
        ("unbind", 1),
        ("get_pfn", 5),
        ("get_pfn_error", 1),
        ("put_pfn", 5),
        ("invalidate", 2),
        ("punch", 2),
    ];
    expect(line(busy.as_fd())?, &wanted, "the file in use")?;
    expect(line(idle.as_fd())?, &[("create", 1)], "the other file")
}

fn line_goes_with_the_file() -> CaseResult {
    let fd = memfile(MIB)?;
    let ino = inode(&fd)?;
    let observer = Consumer::bound(&fd, Mode::Observer, ALL)?;
    drop(fd);
    ensure!(files()?.contains_key(&ino), "a file that is bound has no line");
    observer.unbind()?;
    ensure!(!files()?.contains_key(&ino), "a file that is gone has a line");
    Ok(())
}

fn totals_keep_what_happened_to_files_that_are_gone() -> CaseResult {
    let before = totals()?;
    for _ in 0..3 {
        let fd = memfile(MIB)?;
        let mapper = Consumer::bound(&fd, MAPPER, ALL)?;
        mapper.get(1)?;
        punch(&fd, 0, MIB)?;
    }
    let there = memfile(MIB)?;
    punch(&there, 0, MIB)?;
    let after = totals()?;
    let difference = after.iter().map(|(name, value)| -> Result<(String, u64)> {
        let before = before.get(name).context("a new counter")?;
        Ok((name.clone(), value - before))
    });
    // The read makes a memfile as well.
    let wanted = [
        ("create", 5),
        ("destroy", 4),
        ("bind", 3),
        ("unbind", 3),
        ("get_pfn", 3),
        ("put_pfn", 3),
        ("invalidate", 4),
        ("punch", 4),
    ];
    expect(&difference.collect::<Result<_>>()?, &wanted, "the totals")
}

fn open_file_keeps_the_module() -> CaseResult {
    let module = Module::memfile()?;
    for path in paths()? {
        let mut file = File::open(&path).with_context(|| format!("{path:?}"))?;
        module.expect_in_use(&format!("{path:?} open"))?;
        let mut text = String::new();
        file.read_to_string(&mut text).with_context(|| format!("{path:?}"))?;
        ensure!(text.ends_with('\n'), "{path:?}: {text:?}");
        module.expect_in_use(&format!("{path:?} open, and read"))?;
        drop(file);
        module.unload().with_context(|| format!("{path:?} is closed"))?;
        module.load()?;
    }
    Ok(())
}

fn open_file_goes_on_after_an_attempt_to_reload() -> CaseResult {
    let module = Module::memfile()?;
    let open = |path: PathBuf| File::open(&path).with_context(|| format!("{path:?}"));
    let mut files: Vec<_> = paths()?.into_iter().map(open).collect::<Result<_>>()?;
    let mut begun = [0; 1];
    for file in &mut files {
        file.read_exact(&mut begun)?;
    }
    for _ in 0..3 {
        module.expect_in_use("files open")?;
        expect_errno("load it", module.load(), &[Errno::EEXIST])?;
    }
    while let Some(mut file) = files.pop() {
        let mut rest = String::new();
        file.read_to_string(&mut rest).context("read on")?;
        ensure!(rest.ends_with('\n'), "the rest is {rest:?}");
        module.expect_in_use("files open")?;
    }
    module.unload()?;
    module.load()?;
    totals().map(drop)
}
