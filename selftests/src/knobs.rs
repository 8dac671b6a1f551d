// SPDX-License-Identifier: GPL-2.0
//! The kernel's knobs: settings in files of procfs, sysfs and debugfs.
//!
//! A case that needs another value of a knob sets it with a [`Setting`], which restores it; all
//! other cases run with the values from boot. By [`Knobs`] the runner sees that a case left one
//! changed.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::skip::skip;
use crate::sys::require_root;

/// The trimmed content of a file of procfs, sysfs or debugfs; SKIP if there is no such file.
pub fn read(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.trim_end().to_owned()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            skip(format!("the kernel has no {}", path.display()))
        }
        Err(e) => Err(e).with_context(|| format!("read {}", path.display())),
    }
}

/// Write to such a file; SKIP if there is none.
pub fn write(path: impl AsRef<Path>, value: &str) -> Result<()> {
    let path = path.as_ref();
    match raw_write(path, value) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            skip(format!("the kernel has no {}", path.display()))
        }
        Err(e) => Err(e).with_context(|| format!("write {value} to {}", path.display())),
    }
}

/// Write to such a file with one system call, which must not create anything.
pub fn raw_write(path: &Path, value: &str) -> io::Result<()> {
    use std::io::Write;
    // Not write_all(), which would go on after EINTR: the time limit of such a call is a signal.
    let written = fs::OpenOptions::new().write(true).open(path)?.write(value.as_bytes())?;
    if written == value.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// A number in such a file.
pub fn read_number(path: impl AsRef<Path>) -> Result<u64> {
    let text = read(&path)?;
    text.parse().with_context(|| format!("{} reads {text}", path.as_ref().display()))
}

/// The old value of a setting that was changed, restored when this is dropped.
pub struct Setting {
    path: PathBuf,
    before: String,
}

impl Setting {
    /// Set it. SKIP if the kernel does not have it.
    pub fn set(path: impl Into<PathBuf>, value: &str) -> Result<Setting> {
        require_root()?;
        let path = path.into();
        let before = in_force(&read(&path)?).to_owned();
        write(&path, value)?;
        Ok(Setting { path, before })
    }

    /// The same; does nothing if it has that value already, or if the kernel does not have it.
    pub fn unless_so(path: impl Into<PathBuf>, value: &str) -> Result<Option<Setting>> {
        let path = path.into();
        match fs::read_to_string(&path) {
            Ok(text) if in_force(&text) == value => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            _ => Setting::set(path, value).map(Some),
        }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Err(e) = raw_write(&self.path, &self.before) {
            println!("{} could not be set back to {}: {e}", self.path.display(), self.before);
        }
    }
}

/// Settings that depend on each other. They are set back in the opposite order.
#[derive(Default)]
pub struct Settings(Vec<Setting>);

impl Settings {
    /// Adds one that has just been set.
    pub fn push(&mut self, setting: Setting) {
        self.0.push(setting);
    }
}

impl Extend<Setting> for Settings {
    fn extend<I: IntoIterator<Item = Setting>>(&mut self, settings: I) {
        self.0.extend(settings);
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        while self.0.pop().is_some() {}
    }
}

/// The current value; of several words, the one in brackets.
fn in_force(text: &str) -> &str {
    let chosen = text.split_whitespace().find_map(|w| w.strip_prefix('[')?.strip_suffix(']'));
    chosen.unwrap_or(text.trim_end())
}

/// The folders of the knobs that cases change, or that affect cases.
const FOLDERS: [&str; 9] = [
    "/proc/sys/vm",
    "/sys/kernel/mm/hugepages",
    "/sys/kernel/mm/lru_gen",
    "/sys/kernel/mm/transparent_hugepage",
    "/sys/module/kvm/parameters",
    "/sys/module/kvm_amd/parameters",
    "/sys/module/kvm_intel/parameters",
    "/sys/kernel/debug/fail_page_alloc",
    "/sys/kernel/debug/failslab",
];

/// Exceptions: a read of the first is a command, and the kernel itself sets the others when memory
/// goes online or offline.
const OTHERS: [&str; 4] =
    ["stat_refresh", "min_free_kbytes", "user_reserve_kbytes", "admin_reserve_kbytes"];

/// The value of each knob.
pub struct Knobs(Vec<(PathBuf, String)>);

impl Knobs {
    /// All knobs that can be read.
    pub fn now() -> Knobs {
        Knobs::below(&FOLDERS)
    }

    fn below(folders: &[impl AsRef<Path>]) -> Knobs {
        let mut knobs = Vec::new();
        for folder in folders {
            collect(folder.as_ref(), &mut knobs);
        }
        Knobs(knobs)
    }

    /// Restore the knobs that have changed, and report one line for each.
    pub fn set_back(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (path, before) in &self.0 {
            let now = match fs::read_to_string(path) {
                Ok(text) => in_force(&text).to_owned(),
                // A module may have been unloaded, and its parameters with it.
                Err(_) => continue,
            };
            if now != *before {
                let mut line = format!("{} was {before}, is {now}", path.display());
                if let Err(e) = raw_write(path, before) {
                    line += &format!(", and cannot be set back: {e}");
                }
                lines.push(line);
            }
        }
        lines
    }
}

/// The knobs in a folder and in those below it: all files that can be both read and written.
fn collect(folder: &Path, knobs: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, Ok(kind)) = (entry.path(), entry.file_type()) else { continue };
        if kind.is_dir() {
            collect(&path, knobs);
        }
        let mode = entry.metadata().map_or(0, |data| data.permissions().mode());
        let other = OTHERS.iter().any(|name| entry.file_name() == *name);
        if !kind.is_file() || mode & 0o600 != 0o600 || other {
            continue;
        }
        if let Ok(text) = fs::read_to_string(&path) {
            knobs.push((path, in_force(&text).to_owned()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of two knobs and a command, until it is dropped.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let folder = std::env::temp_dir().join(format!("{name}-{}", std::process::id()));
            fs::create_dir_all(folder.join("below")).unwrap();
            fs::write(folder.join("policy"), "always [madvise] never\n").unwrap();
            fs::write(folder.join("below/number"), "60\n").unwrap();
            fs::write(folder.join("command"), "").unwrap();
            fs::set_permissions(folder.join("command"), PermissionsExt::from_mode(0o200)).unwrap();
            Folder(folder)
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.0.join(name)).unwrap()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn knob_that_was_changed_is_named_and_set_back() {
        let folder = Folder::new("memfile-knobs-changed");
        let knobs = Knobs::below(&[&folder.0]);
        assert_eq!(knobs.0.len(), 2);
        fs::write(folder.0.join("policy"), "[always] madvise never\n").unwrap();
        let lines = knobs.set_back();
        assert_eq!(lines, [format!("{}/policy was madvise, is always", folder.0.display())]);
        assert!(folder.read("policy").starts_with("madvise"));
        assert_eq!(folder.read("below/number"), "60\n");
    }

    #[test]
    fn knobs_as_they_were_are_left_alone() {
        let folder = Folder::new("memfile-knobs-same");
        let knobs = Knobs::below(&[&folder.0]);
        fs::remove_file(folder.0.join("below/number")).unwrap();
        assert!(knobs.set_back().is_empty());
        assert_eq!(folder.read("policy"), "always [madvise] never\n");
    }

    #[test]
    fn setting_that_is_so_already_is_not_set() {
        let folder = Folder::new("memfile-knobs-so");
        assert!(Setting::unless_so(folder.0.join("policy"), "madvise").unwrap().is_none());
        assert!(Setting::unless_so(folder.0.join("none"), "madvise").unwrap().is_none());
    }
}
