// SPDX-License-Identifier: GPL-2.0
//! The module can be loaded and unloaded; while it is in use it stays (rule 21).
//!
//! Every case leaves it loaded, also if the case fails.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::consumer::{Consumer, MAPPER, Mode, Span};
use crate::ktap::{CaseResult, Suite, skip};
use crate::module::Module;
use crate::pressure::Setting;
use crate::store::Store;
use crate::support::setup::{GUEST, Setup};
use crate::sys::*;
use crate::trace::TRACEFS;
use crate::uapi::*;
use crate::vm::Private;
use crate::{MIB, PAGE, mem, suite};

pub static SUITE: Suite = suite!(
    "module",
    [
        loads_and_unloads_leak_nothing: 240,
        without_it_memfd_create_says_eopnotsupp,
        is_loaded_on_demand,
        nobody_asks_for_it_again_and_again,
        ordinary_memfds_work_all_the_while,
        open_file_keeps_it,
        bound_slot_keeps_it_though_the_fd_is_closed,
        second_descriptor_keeps_it,
        open_devices_keep_their_modules,
        file_of_a_store_keeps_both_modules,
        files_about_it_may_be_open_while_it_goes,
        loading_twice_is_eexist,
        works_after_reloading,
    ]
);

/// How often the modules are loaded and unloaded: `MEMFILE_CYCLES`, or a number that an emulated
/// machine does in a moment.
fn cycles() -> u64 {
    std::env::var("MEMFILE_CYCLES").ok().and_then(|s| s.parse().ok()).unwrap_or(50)
}

/// The figures that a leak grows, in bytes: slab objects, per-CPU memory, mapped kernel memory.
fn kernel_memory() -> Result<[u64; 3]> {
    mem::refresh_counters();
    Ok([mem::meminfo("SUnreclaim")?, mem::meminfo("Percpu")?, mem::meminfo("VmallocUsed")?])
}

/// Load all modules, let them use each other, unload them.
fn cycle(core: &Module, consumer: &Module, store: &Module) -> Result<()> {
    core.load().context("load memfile.ko")?;
    consumer.load().context("load memfile_test.ko")?;
    store.load().context("load memfile_store.ko")?;
    for fd in [memfile(MIB)?, Store::open()?.create(MIB)?] {
        let observer = Consumer::bound(&fd, Mode::Observer, Span::same(0, MIB / PAGE))?;
        let mapper = Consumer::bound(&fd, MAPPER, Span::same(0, MIB / PAGE))?;
        mapper.get(7)?;
        punch(&fd, 0, MIB)?;
        observer.expect_callbacks(&[(0, MIB / PAGE)])?;
        mapper.get(7)?;
    }
    consumer.unload()?;
    store.unload()?;
    core.unload()?;
    ensure!(!core.loaded() && !consumer.loaded() && !store.loaded());
    Ok(())
}

/// Does memory grow with the cycles?
fn grows(mut cycle: impl FnMut() -> Result<()>) -> Result<bool> {
    let before = kernel_memory()?;
    for round in 0..cycles() {
        cycle().with_context(|| format!("round {round}"))?;
    }
    // In a thousand cycles an object of 96 bytes each is more than this. Some memory is freed late.
    let allowed = 64 * 1024;
    let grown = |after: [u64; 3]| std::array::from_fn(|i| after[i].saturating_sub(before[i]));
    let mut growth: [u64; 3] = grown(kernel_memory()?);
    for _ in 0..50 {
        if growth.iter().all(|&bytes| bytes <= allowed) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        growth = grown(kernel_memory()?);
    }
    println!("{} cycles: slab, per-CPU, mapped memory grew by {growth:?} bytes", cycles());
    Ok(growth.iter().any(|&bytes| bytes > allowed))
}

fn loads_and_unloads_leak_nothing() -> CaseResult {
    let (core, consumer, store) = (Module::memfile()?, Module::test()?, Module::store()?);
    consumer.unload()?;
    core.unload()?;
    // Memory that is allocated once and kept is no leak.
    for round in 0..5 {
        cycle(&core, &consumer, &store).with_context(|| format!("round {round}"))?;
    }
    // A leak grows each time. A kernel thread is allocated once, and KASAN keeps freed memory until
    // that is a 32nd of the memory.
    for _ in 0..8 {
        if !grows(|| cycle(&core, &consumer, &store))? {
            return Ok(());
        }
    }
    bail!("it grew each time")
}

fn without_it_memfd_create_says_eopnotsupp() -> CaseResult {
    let module = Module::memfile()?;
    module.unload()?;
    let result = memfd_create(MFD_CLOEXEC | MFD_INACCESSIBLE);
    expect_errno("memfd_create", result, &[Errno::EOPNOTSUPP])?;
    // Requests that are wrong for other reasons give the same errors.
    let result = memfd_create(MFD_INACCESSIBLE | MFD_ALLOW_SEALING);
    expect_errno("with sealing", result, &[Errno::EINVAL])?;
    module.load().context("load")?;
    memfile(MIB).map(drop)
}

/// A program in the place of modprobe. It records its arguments; while it obeys, it loads a
/// memfile.ko of its own.
struct Modprobe {
    folder: PathBuf,
    _setting: Setting,
}

impl Modprobe {
    fn new(module: &Module) -> Result<Modprobe> {
        let folder = std::env::temp_dir().join(format!("memfile-modprobe-{}", std::process::id()));
        std::fs::create_dir(&folder).with_context(|| format!("{folder:?}"))?;
        module.save(&folder.join("memfile.ko"))?;
        let (script, place) = (folder.join("modprobe"), folder.display());
        let text = format!(
            "#!/bin/sh\necho \"$@\" >>{place}/asked\n[ ! -e {place}/obey ] || exec insmod {place}/memfile.ko\nexit 1\n"
        );
        std::fs::write(&script, text).with_context(|| format!("{script:?}"))?;
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
        let script = script.to_str().context("the name of the temporary folder")?;
        let setting = Setting::set("/proc/sys/kernel/modprobe", script)?;
        Ok(Modprobe { folder, _setting: setting })
    }

    fn obey(&self) -> Result<()> {
        std::fs::write(self.folder.join("obey"), "").context("obey")
    }

    /// Its arguments, a line for each call.
    fn asked(&self) -> String {
        std::fs::read_to_string(self.folder.join("asked")).unwrap_or_default()
    }

    /// Repeat until the kernel asks: it does not within a second after the last refusal.
    fn wait_until_asked(&self) -> Result<SysResult<OwnedFd>> {
        let limit = Instant::now() + Duration::from_secs(30);
        loop {
            let result = memfd_create(MFD_CLOEXEC | MFD_INACCESSIBLE);
            if !self.asked().is_empty() {
                return Ok(result);
            }
            expect_errno("memfd_create", result.map(drop), &[Errno::EOPNOTSUPP])?;
            ensure!(Instant::now() < limit, "the kernel has not asked for the module for 30 s");
            std::thread::yield_now();
        }
    }
}

impl Drop for Modprobe {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// The arguments that the kernel gives to modprobe.
const ASKED: &str = "-q -- memfile-core\n";

fn is_loaded_on_demand() -> CaseResult {
    let module = Module::memfile()?;
    module.unload()?;
    let modprobe = Modprobe::new(&module)?;
    modprobe.obey()?;
    // A request that is refused anyway loads no module, and neither does one that is not for
    // memfile.
    let result = memfd_create(MFD_INACCESSIBLE | MFD_ALLOW_SEALING);
    expect_errno("with sealing", result, &[Errno::EINVAL])?;
    use_ordinary_memfd()?;
    ensure!(!module.loaded() && modprobe.asked().is_empty(), "asked: {}", modprobe.asked());

    let fd = modprobe.wait_until_asked()?.context("memfd_create")?;
    ensure!(module.loaded(), "a memfile without a module");
    ensure!(modprobe.asked() == ASKED, "asked: {:?}", modprobe.asked());
    module.expect_in_use("the file open")?;
    drop(fd);
    let mut s = Setup::new(Private::Memfile, MIB)?;
    s.vcpu.fill(s.slot.gpa, MIB, GUEST)?;
    s.vcpu.verify(s.slot.gpa, MIB, GUEST)?;
    drop(s);
    ensure!(modprobe.asked() == ASKED, "asked: {:?}", modprobe.asked());
    // No other module has that alias.
    for (module, wanted) in [(&module, 1), (&Module::test()?, 0), (&Module::store()?, 0)] {
        let aliases = module.aliases();
        ensure!(aliases.len() == wanted, "{aliases:?}");
        ensure!(aliases.iter().all(|alias| alias == "memfile-core"), "{aliases:?}");
    }
    Ok(())
}

/// Any user can make the kernel ask; after a failure it asks at most once a second.
fn nobody_asks_for_it_again_and_again() -> CaseResult {
    let module = Module::memfile()?;
    module.unload()?;
    let modprobe = Modprobe::new(&module)?;
    let start = Instant::now();
    let result = modprobe.wait_until_asked()?;
    expect_errno("memfd_create", result, &[Errno::EOPNOTSUPP])?;
    for _ in 0..100 {
        let result = memfd_create(MFD_CLOEXEC | MFD_INACCESSIBLE);
        expect_errno("memfd_create", result, &[Errno::EOPNOTSUPP])?;
    }
    let (asked, seconds) = (modprobe.asked(), start.elapsed().as_secs());
    println!("101 attempts in {seconds} s and more:\n{asked}");
    ensure!(asked.lines().all(|line| line == ASKED.trim_end()), "asked: {asked:?}");
    ensure!(asked.lines().count() as u64 <= 1 + seconds, "it was asked for again and again");
    // A user that has loaded it by hand need not wait.
    module.load()?;
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
    let module = Module::memfile()?;
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

fn open_file_keeps_it() -> CaseResult {
    let module = Module::memfile()?;
    for (what, fd) in [("an empty file", memfile_unsized()?), ("a sized file", memfile(MIB)?)] {
        module.expect_in_use(what)?;
        allocate(&fd, 0, file_size(&fd)?.max(1)).or_else(|errno| match errno {
            Errno::EINVAL => Ok(()),
            _ => Err(errno),
        })?;
        module.expect_in_use(what)?;
    }
    module.unload()
}

fn bound_slot_keeps_it_though_the_fd_is_closed() -> CaseResult {
    let module = Module::memfile()?;
    let mut s = Setup::new(Private::Memfile, MIB)?;
    drop(s.fd);
    s.vcpu.fill(s.slot.gpa, MIB, GUEST)?;
    module.expect_in_use("a bound slot")?;
    s.vcpu.verify(s.slot.gpa, MIB, GUEST)?;
    s.vm.delete(s.slot)?;
    module.unload()
}

fn second_descriptor_keeps_it() -> CaseResult {
    let module = Module::memfile()?;
    let first = memfile(MIB)?;
    let second = reopen(&first, libc::O_RDONLY)?;
    drop(first);
    module.expect_in_use("a second descriptor")?;
    drop(second);
    module.unload()
}

fn open_devices_keep_their_modules() -> CaseResult {
    let (consumer, store) = (Module::test()?, Module::store()?);
    let device = Consumer::new()?;
    consumer.expect_in_use("its device open")?;
    drop(device);
    consumer.unload()?;
    store.load()?;
    let device = Store::open()?;
    store.expect_in_use("its device open")?;
    drop(device);
    store.unload()
}

fn file_of_a_store_keeps_both_modules() -> CaseResult {
    let (core, store) = (Module::memfile()?, Module::store()?);
    store.load()?;
    let file = Store::open()?.create(MIB)?;
    store.expect_in_use("a file of it open")?;
    core.expect_in_use("a store's file open")?;
    let observer = Consumer::bound(&file, Mode::Observer, Span::same(0, MIB / PAGE))?;
    drop(file);
    store.expect_in_use("a file of it bound")?;
    observer.unbind()?;
    store.unload()?;
    core.unload()
}

/// All files under `folder`, but for those that are not to be read.
fn files_under(folder: &Path, found: &mut Vec<(PathBuf, File)>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("{folder:?}"))? {
        let path = entry?.path();
        if path.is_dir() {
            files_under(&path, found)?;
        } else if let Ok(file) = File::open(&path) {
            found.push((path, file));
        }
    }
    Ok(())
}

/// The kernel's own files about a module: its events, KUnit's results, its folder in sysfs.
fn files_about_it_may_be_open_while_it_goes() -> CaseResult {
    let module = Module::memfile()?;
    let events = Path::new(TRACEFS).join("events/memfile");
    if !events.exists() {
        return skip("there is no tracefs");
    }
    let mut files = Vec::new();
    files_under(&events, &mut files)?;
    files_under(Path::new("/sys/module/memfile"), &mut files)?;
    for entry in std::fs::read_dir("/sys/kernel/debug/kunit").into_iter().flatten() {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("memfile")) {
            files_under(&path, &mut files)?;
        }
    }
    println!("{} files", files.len());
    // Events from before the unload may be read after it.
    std::fs::write(events.join("enable"), "1").context("enable the events")?;
    let fd = memfile(MIB)?;
    punch(&fd, 0, MIB)?;
    drop(fd);
    let mut told = File::open(Path::new(TRACEFS).join("trace")).context("trace")?;
    let mut begun = [0; 16];
    told.read_exact(&mut begun).context("trace")?;

    module.unload()?;
    let mut text = Vec::new();
    for (path, file) in &mut files {
        text.clear();
        // It may be gone, or show the same text.
        if let Err(error) = file.read_to_end(&mut text) {
            let gone = [Some(libc::ENODEV), Some(libc::EIO), Some(libc::EINVAL)];
            ensure!(gone.contains(&error.raw_os_error()), "{path:?}: {error}");
        }
    }
    text.clear();
    told.read_to_end(&mut text).context("trace")?;
    module.load()?;
    drop((files, told));
    memfile(MIB).map(drop)
}

fn loading_twice_is_eexist() -> CaseResult {
    let module = Module::memfile()?;
    expect_errno("load it twice", module.load(), &[Errno::EEXIST])
}

fn works_after_reloading() -> CaseResult {
    let module = Module::memfile()?;
    module.unload()?;
    module.load()?;
    let mut s = Setup::new(Private::Memfile, MIB)?;
    s.fill_both()?;
    s.vcpu.verify(s.slot.gpa, MIB, GUEST)
}
