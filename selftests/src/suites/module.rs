// SPDX-License-Identifier: GPL-2.0
//! The module comes and goes; while it is in use it stays (rule 21).
//!
//! Every case leaves it loaded, whatever happens.

use std::ffi::CString;

use anyhow::{Context, Result, bail, ensure};

use super::setup::{GUEST, Setup};
use crate::ktap::{CaseResult, Suite, missing_memfile, skip};
use crate::sys::*;
use crate::uapi::*;
use crate::vm::Private;
use crate::{MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "module",
    [
        unloads_and_loads_again_many_times,
        without_it_memfd_create_says_eopnotsupp,
        ordinary_memfds_work_all_the_while,
        open_file_keeps_it,
        bound_slot_keeps_it_though_the_fd_is_closed,
        second_descriptor_keeps_it,
        loading_twice_is_eexist,
        works_after_reloading,
    ]
);

/// Where the boot script puts it; `MEMFILE_KO` says otherwise.
const PATH: &str = "/lib/modules/memfile.ko";

/// What delete_module answers for a module in use.
const IN_USE: &[Errno] = &[Errno::EAGAIN, Errno::EBUSY];

fn loaded() -> bool {
    std::path::Path::new("/sys/module/memfile").exists()
}

fn image() -> Result<Vec<u8>> {
    let path = std::env::var("MEMFILE_KO").unwrap_or_else(|_| PATH.into());
    match std::fs::read(&path) {
        Ok(image) => Ok(image),
        Err(_) if !loaded() => missing_memfile(&format!("{path} is not there")),
        Err(_) => skip(format!("memfile is loaded, but {path} is not there to load it again")),
    }
}

fn unload() -> SysResult<()> {
    // SAFETY: The name is a C string.
    check(unsafe { libc::syscall(libc::SYS_delete_module, c"memfile".as_ptr(), libc::O_NONBLOCK) })
        .map(drop)
}

/// A loaded module, and its image to load it again, which `drop` does at the latest.
struct Module(Vec<u8>);

impl Module {
    fn new() -> Result<Module> {
        require_root()?;
        let module = Module(image()?);
        if !loaded() {
            module.load().context("load memfile.ko")?;
        }
        Ok(module)
    }

    fn load(&self) -> SysResult<()> {
        let (image, len) = (self.0.as_ptr(), self.0.len());
        let parameters = CString::default();
        // SAFETY: The image has this length, the parameters are a C string.
        check(unsafe { libc::syscall(libc::SYS_init_module, image, len, parameters.as_ptr()) })
            .map(drop)
    }

    /// Unload, allowing the last user a moment to be gone for good.
    fn unload(&self) -> Result<()> {
        for _ in 0..100 {
            match unload() {
                Ok(()) => return Ok(()),
                Err(errno) if IN_USE.contains(&errno) => {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                Err(errno) => return Err(errno).context("unload memfile"),
            }
        }
        let count = std::fs::read_to_string("/sys/module/memfile/refcnt").unwrap_or_default();
        bail!("memfile is still in use after a second: {} references", count.trim())
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if !loaded() {
            if let Err(errno) = self.load() {
                println!("memfile.ko cannot be loaded again: {errno}");
            }
        }
    }
}

fn unloads_and_loads_again_many_times() -> CaseResult {
    let module = Module::new()?;
    for round in 0..20 {
        module.unload().with_context(|| format!("round {round}"))?;
        ensure!(!loaded());
        module.load().with_context(|| format!("load in round {round}"))?;
        drop(memfile(MIB)?);
    }
    Ok(())
}

fn without_it_memfd_create_says_eopnotsupp() -> CaseResult {
    let module = Module::new()?;
    module.unload()?;
    let result = memfd_create(MFD_CLOEXEC | MFD_INACCESSIBLE);
    expect_errno("memfd_create", result, &[Errno::EOPNOTSUPP])?;
    // What is wrong for other reasons is wrong as before.
    let result = memfd_create(MFD_INACCESSIBLE | MFD_ALLOW_SEALING);
    expect_errno("with sealing", result, &[Errno::EINVAL])?;
    module.load().context("load")?;
    memfile(MIB).map(drop)
}

fn use_ordinary_memfd() -> Result<()> {
    let fd = memfd_create(MFD_CLOEXEC | MFD_ALLOW_SEALING)?;
    ftruncate(&fd, 8 * PAGE)?;
    let view = Mapping::shared(&fd, 0, 8 * PAGE)?;
    for page in 0..8 {
        view.store(page * PAGE, page);
    }
    punch(&fd, 0, 4 * PAGE)?;
    expect_allocated(&fd, 4 * PAGE, "half of it punched")?;
    ensure!(view.load(PAGE) == 0 && view.load(7 * PAGE) == 7);
    drop(view);
    add_seals(&fd, F_SEAL_WRITE | F_SEAL_SHRINK).context("seal it")
}

fn ordinary_memfds_work_all_the_while() -> CaseResult {
    let module = Module::new()?;
    let before = memfd(MIB)?;
    let view = Mapping::shared(&before, 0, MIB)?;
    view.store(0, 1);
    use_ordinary_memfd().context("while it is loaded")?;
    module.unload()?;
    use_ordinary_memfd().context("while it is not")?;
    ensure!(view.load(0) == 1, "a memfd lost its content");
    module.load()?;
    use_ordinary_memfd().context("after it was loaded again")?;
    ensure!(view.load(0) == 1, "a memfd lost its content");
    Ok(())
}

fn expect_in_use(what: &str) -> Result<()> {
    expect_errno(&format!("unload with {what}"), unload(), IN_USE)
}

fn open_file_keeps_it() -> CaseResult {
    let module = Module::new()?;
    for (what, fd) in [("an empty file", memfile_unsized()?), ("a sized file", memfile(MIB)?)] {
        expect_in_use(what)?;
        allocate(&fd, 0, file_size(&fd)?.max(1)).or_else(|errno| match errno {
            Errno::EINVAL => Ok(()),
            _ => Err(errno),
        })?;
        expect_in_use(what)?;
    }
    module.unload()
}

fn bound_slot_keeps_it_though_the_fd_is_closed() -> CaseResult {
    let module = Module::new()?;
    let mut s = Setup::new(Private::Memfile, MIB)?;
    drop(s.fd);
    s.vcpu.fill(s.slot.gpa, MIB, GUEST)?;
    expect_in_use("a bound slot")?;
    s.vcpu.verify(s.slot.gpa, MIB, GUEST)?;
    s.vm.delete(s.slot)?;
    module.unload()
}

fn second_descriptor_keeps_it() -> CaseResult {
    let module = Module::new()?;
    let first = memfile(MIB)?;
    let second = reopen(&first, libc::O_RDONLY)?;
    drop(first);
    expect_in_use("a second descriptor")?;
    drop(second);
    module.unload()
}

fn loading_twice_is_eexist() -> CaseResult {
    let module = Module::new()?;
    expect_errno("load it twice", module.load(), &[Errno::EEXIST])
}

fn works_after_reloading() -> CaseResult {
    let module = Module::new()?;
    module.unload()?;
    module.load()?;
    let mut s = Setup::new(Private::Memfile, MIB)?;
    s.fill_both()?;
    s.vcpu.verify(s.slot.gpa, MIB, GUEST)
}
