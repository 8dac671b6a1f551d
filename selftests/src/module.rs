// SPDX-License-Identifier: GPL-2.0
//! Loading and unloading kernel modules.

use std::ffi::CString;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::skip::{missing_memfile, skip};
use crate::sys::*;

/// The folder of the modules in the booted machine; `MEMFILE_KO` names another memfile.ko, and its
/// folder.
const FOLDER: &str = "/lib/modules";

/// The errno of delete_module for a module in use.
pub const IN_USE: &[Errno] = &[Errno::EAGAIN, Errno::EBUSY];

/// A module: its name and its image. `drop` restores the state that tests expect.
pub struct Module {
    name: &'static std::ffi::CStr,
    image: Vec<u8>,
    /// Whether tests expect it loaded.
    wanted: bool,
}

impl Module {
    /// memfile.ko, loaded.
    pub fn memfile() -> Result<Module> {
        Module::new(c"memfile", true)
    }

    /// memfile_test.ko, loaded.
    pub fn test() -> Result<Module> {
        Module::new(c"memfile_test", true)
    }

    /// memfile_store.ko, not loaded: while it is, memfile.ko cannot be unloaded.
    pub fn store() -> Result<Module> {
        Module::new(c"memfile_store", false)
    }

    /// SKIP if it is not there.
    fn new(name: &'static std::ffi::CStr, wanted: bool) -> Result<Module> {
        require_root()?;
        let memfile =
            std::env::var("MEMFILE_KO").unwrap_or_else(|_| format!("{FOLDER}/memfile.ko"));
        let path = Path::new(&memfile).with_file_name(format!("{}.ko", name.to_string_lossy()));
        let module = Module { name, image: std::fs::read(&path).unwrap_or_default(), wanted };
        match (module.image.is_empty(), module.loaded()) {
            (true, false) => missing_memfile(&format!("{} is not there", path.display())),
            (true, true) => {
                let name = name.to_string_lossy();
                skip(format!("{name} is loaded, but {} cannot be loaded again", path.display()))
            }
            (false, false) if wanted => {
                module.load().with_context(|| format!("load {}", path.display()))?;
                Ok(module)
            }
            (false, _) => Ok(module),
        }
    }

    fn folder(&self) -> String {
        format!("/sys/module/{}", self.name.to_string_lossy())
    }

    /// Is it loaded?
    pub fn loaded(&self) -> bool {
        Path::new(&self.folder()).exists()
    }

    /// Write the image to a file, for other programs to load. KUnit suites as with [`Self::load`].
    pub fn save(&self, path: &Path) -> Result<()> {
        run_no_kunit_suites();
        std::fs::write(path, &self.image).with_context(|| format!("write {}", path.display()))
    }

    /// The names by which the kernel may request it.
    pub fn aliases(&self) -> Vec<String> {
        let strings = self.image.split(|&byte| byte == 0);
        let aliases = strings.filter_map(|string| string.strip_prefix(b"alias="));
        aliases.map(|alias| String::from_utf8_lossy(alias).into_owned()).collect()
    }

    /// `init_module(2)`. The module's KUnit suites, which ran at the first load, do not run again.
    pub fn load(&self) -> SysResult<()> {
        run_no_kunit_suites();
        let (image, len) = (self.image.as_ptr(), self.image.len());
        // SAFETY: The image has this length, the parameters are a C string.
        check(unsafe { libc::syscall(libc::SYS_init_module, image, len, c"".as_ptr()) }).map(drop)
    }

    /// `delete_module(2)`.
    pub fn raw_unload(&self) -> SysResult<()> {
        let name = self.name.as_ptr();
        // SAFETY: The name is a C string.
        check(unsafe { libc::syscall(libc::SYS_delete_module, name, libc::O_NONBLOCK) }).map(drop)
    }

    /// Fail if it is in use; the last user gets a moment to go.
    pub fn expect_unused(&self) -> Result<()> {
        let path = format!("{}/refcnt", self.folder());
        let mut count = String::new();
        for _ in 0..1000 {
            count = std::fs::read_to_string(&path).with_context(|| path.clone())?;
            if count.trim() == "0" {
                return Ok(());
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        bail!("{} is still in use after a second: {} references", self.folder(), count.trim())
    }

    /// Unload; the last user gets a moment to go.
    pub fn unload(&self) -> Result<()> {
        self.expect_unused()?;
        self.raw_unload().with_context(|| format!("unload {}", self.folder()))
    }

    /// Fail unless it refuses to unload.
    pub fn expect_in_use(&self, what: &str) -> Result<()> {
        expect_errno(&format!("unload with {what}"), self.raw_unload(), IN_USE)
    }
}

/// Load the module in a file, with parameters as `insmod` takes them.
pub fn load_file(path: &Path, parameters: &str) -> Result<()> {
    let image = std::fs::read(path).with_context(|| path.display().to_string())?;
    let parameters = CString::new(parameters)?;
    let (start, len) = (image.as_ptr(), image.len());
    // SAFETY: The image has this length, the parameters are a C string.
    let ret = unsafe { libc::syscall(libc::SYS_init_module, start, len, parameters.as_ptr()) };
    check(ret).map(drop).with_context(|| format!("load {}", path.display()))
}

/// Unload the module of this name.
pub fn unload(name: &str) -> Result<()> {
    let name = CString::new(name)?;
    // SAFETY: The name is a C string.
    check(unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) })
        .map(drop)
        .with_context(|| format!("unload {}", name.to_string_lossy()))
}

/// Best effort: without KUnit there is no such file.
fn run_no_kunit_suites() {
    let _ = std::fs::write("/sys/module/kunit/parameters/filter_glob", "none");
}

impl Drop for Module {
    fn drop(&mut self) {
        let result = match (self.wanted, self.loaded()) {
            (true, false) => self.load().map_err(anyhow::Error::from),
            (false, true) => self.unload(),
            _ => Ok(()),
        };
        if let Err(error) = result {
            println!("{} stays as it is: {error:#}", self.name.to_string_lossy());
        }
    }
}
