// SPDX-License-Identifier: GPL-2.0
//! The machine around scripts: its setup for them, and its reset after each.

use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::op::Machine;
use crate::knobs::raw_write;
use crate::module::Module;
use crate::pressure::{self, Cgroup, Pool, Setting, Settings, Swap};
use crate::sys::check;
use crate::{HUGE, MIB, PAGE};

const SHMEM_HUGE: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const ANONYMOUS_HUGE: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
const KHUGEPAGED: &str = "/sys/kernel/mm/transparent_hugepage/khugepaged";
const KSM: &str = "/sys/kernel/mm/ksm/run";
const NX_HUGE_PAGES: &str = "/sys/module/kvm/parameters/nx_huge_pages";
const GENERATIONS: &str = "/sys/kernel/mm/lru_gen/enabled";
const INJECTION: &str = "/sys/kernel/debug";
const POOL_SIZE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const COUNTERS: &str = "/sys/kernel/debug/memfile";

/// Huge pages in the pool.
const POOL: u64 = 12;

/// The machine.
pub struct System {
    cgroup: Cgroup,
    swap: Option<Swap>,
    pool: Option<(Pool, Setting)>,
    store: Option<Module>,
    /// Knobs that scripts change, with their values.
    knobs: Vec<(PathBuf, String)>,
    /// Settings for as long as scripts run.
    _settings: Settings,
    /// Frames with errors, a line for each.
    lost: PathBuf,
    /// The user that scripts run as.
    user: Option<u32>,
}

impl System {
    /// Prepare it. SKIP without root; other things may be missing.
    pub fn new() -> Result<System> {
        let cgroup = Cgroup::new()?;
        drop(Module::memfile()?);
        let _ = Module::test();
        let store = Module::store().ok().filter(|store| store.loaded() || store.load().is_ok());
        let swap = Swap::on(64 * MIB).ok();
        let pool = Pool::of(HUGE).and_then(|pool| pool.fill(POOL).map(|set| (pool, set))).ok();
        // The filter goes last, or else other tasks' allocations fail, also those that set a knob back.
        let mut settings = Settings::default();
        // Too quick to fail all, too often to fail nothing.
        for (what, percent) in [("fail_page_alloc", "3"), ("failslab", "2")] {
            for (knob, value) in [
                ("task-filter", "Y"),
                ("ignore-gfp-wait", "N"),
                ("verbose", "0"),
                ("times", "-1"),
                ("probability", percent),
            ] {
                settings.extend(Setting::set(format!("{INJECTION}/{what}/{knob}"), value).ok());
            }
        }
        settings.extend(Setting::set(format!("{INJECTION}/fail_page_alloc/min-order"), "0").ok());
        let names = [
            SHMEM_HUGE.to_owned(),
            ANONYMOUS_HUGE.to_owned(),
            format!("{KHUGEPAGED}/scan_sleep_millisecs"),
            KSM.to_owned(),
            NX_HUGE_PAGES.to_owned(),
            GENERATIONS.to_owned(),
        ];
        let knobs = names.into_iter().filter_map(|name| {
            let text = fs::read_to_string(&name).ok()?;
            Some((name.into(), chosen(&text)))
        });
        let lost = std::env::temp_dir().join(format!("memfile-lost-{}", std::process::id()));
        Ok(System {
            cgroup,
            swap,
            pool,
            store,
            knobs: knobs.collect(),
            _settings: settings,
            lost,
            user: None,
        })
    }

    /// Let scripts run as this user, who may use the devices.
    pub fn as_user(mut self, user: u32) -> Result<System> {
        for device in ["/dev/kvm", "/dev/memfile-test", "/dev/memfile-store"] {
            if Path::new(device).exists() {
                fs::set_permissions(device, PermissionsExt::from_mode(0o666)).context(device)?;
            }
        }
        self.user = Some(user);
        Ok(self)
    }

    /// Whether the second store is there.
    pub fn has_store(&self) -> bool {
        self.store.is_some()
    }

    /// The calling process becomes one of a script.
    pub(super) fn enter(&self) -> Result<()> {
        self.cgroup.join()?;
        if let Some(user) = self.user {
            // SAFETY: Take no pointers.
            unsafe {
                check(libc::setresgid(user, user, user)).context("setresgid")?;
                check(libc::setresuid(user, user, user)).context("setresuid")?;
            }
        }
        Ok(())
    }

    /// As it was before the script.
    pub(super) fn set_back(&self) -> Result<()> {
        self.cgroup.unlimit("memory.max")?;
        for (path, before) in &self.knobs {
            let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
            if chosen(&text) != *before {
                pressure::write(path, before)?;
            }
        }
        for pfn in fs::read_to_string(&self.lost).unwrap_or_default().lines() {
            // Some frames stay out of use.
            let _ = pfn.parse().map(pressure::mend);
        }
        let _ = fs::remove_file(&self.lost);
        if self.pool.is_some() {
            pressure::write(POOL_SIZE, &POOL.to_string())?;
        }
        self.swap(true);
        Ok(())
    }

    /// The resources that a script left behind, once it is over, its files are gone, and the
    /// system is set back; none if all is well.
    pub(super) fn left(&self) -> Result<Option<String>> {
        let Some((pool, _)) = &self.pool else { return Ok(None) };
        let usage = pool.usage()?;
        let well = usage.reserved == 0 && usage.free == usage.total;
        Ok((!well).then(|| format!("the pool of huge pages is left with {usage:?}")))
    }

    fn swap(&self, on: bool) {
        let Some(device) = self.swap.as_ref().and_then(|s| CString::new(s.device()).ok()) else {
            return;
        };
        // SAFETY: The path is a C string. Either may fail: it may be on, or off, already.
        unsafe {
            match on {
                true => libc::swapon(device.as_ptr(), 0),
                false => libc::swapoff(device.as_ptr()),
            };
        }
    }

    /// An error in a frame, or a request to take it out of use.
    pub(super) fn lose(&self, pfn: u64, soft: bool) {
        let file = fs::OpenOptions::new().create(true).append(true).open(&self.lost);
        // A frame that is not recorded only stays out of use.
        let _ = file.and_then(|mut file| writeln!(file, "{pfn}"));
        let _ = if soft { pressure::soft_offline(pfn) } else { pressure::poison(pfn) };
    }

    /// Requests that may fail: for lack of rights, or because of other threads.
    pub(super) fn tell(&self, machine: Machine) {
        let set = |path: &str, value: &str| drop(raw_write(Path::new(path), value));
        let switch = |path: &str, on: bool| set(path, if on { "1" } else { "0" });
        let in_cgroup = |name, value: &str| drop(raw_write(&self.cgroup.path().join(name), value));
        match machine {
            Machine::Compact => switch("/proc/sys/vm/compact_memory", true),
            Machine::DropCaches => set("/proc/sys/vm/drop_caches", "3"),
            Machine::Reclaim { pages } => {
                in_cgroup("memory.reclaim", &(u64::from(pages) * PAGE).to_string());
            }
            Machine::Limit { units: 0 } => in_cgroup("memory.max", "max"),
            Machine::Limit { units } => {
                in_cgroup("memory.max", &((16 + 4 * u64::from(units)) * MIB).to_string());
            }
            Machine::Swap { on } => self.swap(on),
            Machine::ShmemHuge { policy } => {
                let policies = ["never", "always", "within_size", "advise"];
                set(SHMEM_HUGE, policies[usize::from(policy) % policies.len()]);
            }
            Machine::AnonymousHuge { policy } => {
                let policies = ["never", "always", "madvise"];
                set(ANONYMOUS_HUGE, policies[usize::from(policy) % policies.len()]);
            }
            Machine::Khugepaged { eager } => {
                let millis = if eager { "10" } else { "10000" };
                set(&format!("{KHUGEPAGED}/scan_sleep_millisecs"), millis);
            }
            Machine::Ksm { on } => switch(KSM, on),
            Machine::NxHugePages { on } => switch(NX_HUGE_PAGES, on),
            Machine::Generations { on } => switch(GENERATIONS, on),
            Machine::Pool { pages } => {
                set(POOL_SIZE, &(u64::from(pages) % (2 * POOL)).to_string());
            }
            Machine::Fail { on } => {
                // To open the file may fail as well.
                let path = Path::new("/proc/thread-self/make-it-fail");
                let value = if on { "1" } else { "0" };
                let _ = (0..100).find(|_| raw_write(path, value).is_ok());
            }
            Machine::ReadCounters => {
                for entry in fs::read_dir(COUNTERS).into_iter().flatten().flatten() {
                    let _ = fs::read(entry.path());
                }
            }
        }
    }
}

/// The value in force: of several words, the one in brackets.
fn chosen(text: &str) -> String {
    let word = text.split_whitespace().find_map(|w| w.strip_prefix('[')?.strip_suffix(']'));
    word.unwrap_or(text.trim_end()).to_owned()
}
