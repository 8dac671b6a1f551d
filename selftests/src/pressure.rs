// SPDX-License-Identifier: GPL-2.0
//! Ways to make the kernel move, swap or lose memory, and to see that it did.
//!
//! Each value here undoes its change when it is dropped. All of them need root. If the kernel lacks
//! a feature, the case is skipped and names it.

mod area;
mod blocks;
mod cgroup;
mod disk;
mod dump;
mod idle;
mod image;
mod memory;
mod pool;
mod swap;
mod trace;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::knobs::raw_write;
use crate::skip::skip;
use crate::sys::{Errno, Mapping, SysResult, check, require_root};
use crate::{HUGE, PAGE, mem};

pub use crate::knobs::{Setting, Settings, read, read_number, write};
pub use area::{Area, Taken};
pub use blocks::{Block, MovableZone, SmallMachine, expect_online};
pub use cgroup::{Cgroup, ROOT as CGROUPS};
pub use disk::Disk;
pub use dump::{Dump, load_crash_kernel};
pub use idle::Idle;
pub use image::Image;
pub use memory::{Memory, word};
pub use pool::{Pool, Usage};
pub use swap::Swap;
pub use trace::{ENTRY_CHANGED, Event, Frame, Isolation, Pipe, Trace, frames, mapped_at, moved};

const MEMFILE_COUNTERS: &str = "/sys/kernel/debug/memfile/counters";

/// The counters that grow when a page of a memfile has moved.
pub const MOVED: [&str; 3] = ["memfile.migrate", "memfile.invalidate", "pgmigrate_success"];

/// The setting of huge pages for files in no mounted file system: memfds, and so memfiles.
pub fn shmem_huge(policy: &str) -> Result<Setting> {
    Setting::set("/sys/kernel/mm/transparent_hugepage/shmem_enabled", policy)
}

/// The setting of huge pages for anonymous memory.
pub fn anonymous_huge(policy: &str) -> Result<Setting> {
    Setting::set("/sys/kernel/mm/transparent_hugepage/enabled", policy)
}

/// Files get pages of 4 KiB, for a case that counts pages; nothing if that is so already.
pub fn base_pages() -> Result<Option<Setting>> {
    Setting::unless_so("/sys/kernel/mm/transparent_hugepage/shmem_enabled", "never")
}

/// Compact all memory: pages move towards the end of their zone.
pub fn compact() -> Result<()> {
    require_root()?;
    write("/proc/sys/vm/compact_memory", "1")
}

/// The other implementation of page ageing.
pub fn generations() -> Result<Setting> {
    Setting::set("/sys/kernel/mm/lru_gen/enabled", "y")
}

/// Without it: reclaim does not wait for what it writes.
pub fn no_generations() -> Result<Setting> {
    Setting::set("/sys/kernel/mm/lru_gen/enabled", "n")
}

/// Drop clean pages.
pub fn drop_caches() -> Result<()> {
    require_root()?;
    write("/proc/sys/vm/drop_caches", "3")
}

/// Free blocks of at least 2 MiB, counted in 2 MiB.
pub fn free_huge_blocks() -> Result<u64> {
    let text = fs::read_to_string("/proc/buddyinfo").context("/proc/buddyinfo")?;
    // Node 0, zone    DMA32      1      2 ... one column per order.
    let order = (HUGE / PAGE).ilog2();
    let counts = |line: &str| -> Option<u64> {
        let columns = line.split_whitespace().skip(4);
        let big = (0u32..).zip(columns).skip(order as usize);
        big.map(|(n, count)| Some(count.parse::<u64>().ok()? << (n - order))).sum()
    };
    text.lines().map(counts).sum::<Option<u64>>().context("/proc/buddyinfo")
}

/// Take `count` gigantic pages (1 GiB), or as many as there are, and empty the pool again: how
/// many. This is `alloc_contig_pages()`, which moves pages in the way.
pub fn gigantic_pages(count: u64) -> Result<u64> {
    let path = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";
    let pool = Setting::set(path, &count.to_string())?;
    let got = read_number(path)?;
    drop(pool);
    Ok(got)
}

/// Inject a memory error into a page frame.
pub fn poison(pfn: u64) -> Result<()> {
    raw_poison(pfn)?.with_context(|| format!("inject a memory error into frame {pfn:#x}"))
}

/// The same; whether the kernel says that it has dealt with it. The frame may be broken if it has not.
pub fn raw_poison(pfn: u64) -> Result<SysResult<()>> {
    const PATH: &str = "/sys/kernel/debug/hwpoison/corrupt-pfn";
    require_root()?;
    match raw_write(Path::new(PATH), &format!("{pfn:#x}")) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => skip(format!("the kernel has no {PATH}")),
        result => Ok(result.map_err(|e| Errno(e.raw_os_error().unwrap_or(0)))),
    }
}

/// Undo [`poison`]. The page frame must not be in use any more.
pub fn unpoison(pfn: u64) -> Result<()> {
    write("/sys/kernel/debug/hwpoison/unpoison-pfn", &format!("{pfn:#x}"))
}

/// Undo [`poison`] in a page frame that may be a part of a huge page of the pool.
///
/// The pool keeps a broken huge page as a whole, and the kernel mends it by its first frame only.
/// An additional one, or one that was moved away from, is given back in parts.
pub fn mend(pfn: u64) {
    // Only one of the two is broken, or neither.
    let _ = unpoison(pfn & !(HUGE / PAGE - 1));
    let _ = unpoison(pfn);
}

/// Ask the kernel to do without a page frame: it moves what is there and takes the frame out of use.
pub fn soft_offline(pfn: u64) -> Result<()> {
    write("/sys/devices/system/memory/soft_offline_page", &format!("{:#x}", pfn * PAGE))
}

/// Flags of a page frame in `/proc/kpageflags`.
pub fn page_flags(pfn: u64) -> Result<u64> {
    page_flags_from(pfn, 1)?.first().copied().with_context(|| format!("kpageflags of {pfn:#x}"))
}

/// The same of `count` page frames in a row.
fn page_flags_from(pfn: u64, count: u64) -> Result<Vec<u64>> {
    words_of("/proc/kpageflags", pfn, count)
}

/// Page frames of a mapping of this process that are in memory.
pub fn mapped_frames(mapping: &Mapping) -> Result<Vec<u64>> {
    const PRESENT: u64 = 1 << 63;
    let words = words_of("/proc/self/pagemap", mapping.addr() / PAGE, mapping.len() / PAGE)?;
    let present = words.into_iter().filter(|word| word & PRESENT != 0);
    Ok(present.map(|word| word & ((1 << 55) - 1)).collect())
}

/// The words of `count` pages from `first` on, in a file of procfs that has a word for each.
fn words_of(path: &str, first: u64, count: u64) -> Result<Vec<u64>> {
    use std::os::unix::fs::FileExt;
    require_root()?;
    let mut bytes = vec![0; (count * 8) as usize];
    let file = fs::File::open(path).with_context(|| path.to_owned())?;
    file.read_exact_at(&mut bytes, first * 8)
        .with_context(|| format!("{path}, page {first:#x}"))?;
    let words = bytes.chunks_exact(8);
    Ok(words.map(|word| word.iter().rev().fold(0, |w, b| w << 8 | u64::from(*b))).collect())
}

/// The page frames that are charged to a cgroup and that `work` has added to its shmem, neither
/// cleared nor written yet.
pub fn reserved_by(cgroup: &Cgroup, work: impl FnOnce() -> Result<()>) -> Result<BTreeSet<u64>> {
    let wanted = cgroup.number()?.to_ne_bytes();
    // Other frames come and go meanwhile, so the charge alone does not identify them.
    let reserved = || -> Result<BTreeSet<u64>> {
        let bytes = fs::read("/proc/kpagecgroup").context("/proc/kpagecgroup")?;
        let mut pfns = BTreeSet::new();
        for (pfn, owner) in (0..).zip(bytes.chunks_exact(8)) {
            if *owner == wanted
                && page_flags(pfn)? & (KPF_SWAPBACKED | KPF_UPTODATE) == KPF_SWAPBACKED
            {
                pfns.insert(pfn);
            }
        }
        Ok(pfns)
    };
    let before = reserved()?;
    work()?;
    Ok(reserved()?.difference(&before).copied().collect())
}

/// Access to the content of a page frame, by `/dev/mem`.
fn frame(pfn: u64, f: impl FnOnce(&fs::File, u64) -> io::Result<()>) -> Result<()> {
    require_root()?;
    let file = match fs::OpenOptions::new().read(true).write(true).open("/dev/mem") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return skip("the kernel has no /dev/mem"),
        file => file.context("/dev/mem")?,
    };
    f(&file, pfn * PAGE).with_context(|| format!("frame {pfn:#x} in /dev/mem"))
}

/// Read a page frame, regardless of its owner.
pub fn read_frame(pfn: u64) -> Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let mut content = vec![0; PAGE as usize];
    frame(pfn, |file, at| file.read_exact_at(&mut content, at))?;
    Ok(content)
}

/// The offset in `/proc/kcore` of a physical address.
pub fn kcore_offset(core: &fs::File, physical: u64) -> Result<u64> {
    let segments = dump::segments(core).context("/proc/kcore")?;
    let holds = |s: &&dump::Segment| (s.start..s.start.saturating_add(s.bytes)).contains(&physical);
    // An address that the kernel does not know is all ones.
    let found = segments.iter().filter(|s| s.start != u64::MAX).find(holds);
    let segment = found.with_context(|| format!("/proc/kcore has no segment for {physical:#x}"))?;
    Ok(segment.offset + (physical - segment.start))
}

/// Overwrite a page frame, regardless of its owner.
pub fn write_frame(pfn: u64, content: &[u8]) -> Result<()> {
    use std::os::unix::fs::FileExt;
    frame(pfn, |file, at| file.write_all_at(content, at))
}

// Bits of `page_flags()`.
pub const KPF_LOCKED: u64 = 1 << 0;
pub const KPF_UPTODATE: u64 = 1 << 3;
pub const KPF_DIRTY: u64 = 1 << 4;
pub const KPF_LRU: u64 = 1 << 5;
pub const KPF_WRITEBACK: u64 = 1 << 8;
pub const KPF_SWAPCACHE: u64 = 1 << 13;
pub const KPF_SWAPBACKED: u64 = 1 << 14;
pub const KPF_UNEVICTABLE: u64 = 1 << 18;
pub const KPF_HWPOISON: u64 = 1 << 19;
pub const KPF_KSM: u64 = 1 << 21;
pub const KPF_THP: u64 = 1 << 22;

/// A process with memory that the OOM killer kills before any other, until this is dropped: for
/// cases that leave the kernel too little memory.
pub struct Victim(libc::pid_t);

impl Victim {
    /// A process with that many bytes of memory.
    pub fn with(bytes: u64) -> Result<Victim> {
        let memory = Mapping::anonymous(bytes)?;
        // SAFETY: The child calls nothing but system calls, and never returns.
        let pid = check(unsafe { libc::fork() }).context("fork")? as libc::pid_t;
        if pid != 0 {
            let victim = Victim(pid);
            // Wait until it has its memory and stops.
            // SAFETY: A system call.
            check(unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::WUNTRACED) })?;
            return Ok(victim);
        }
        // SAFETY: The path and the text are as long as is said; the rest are system calls.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY);
            libc::write(fd, c"1000".as_ptr().cast(), 4);
        }
        for offset in (0..memory.len()).step_by(PAGE as usize) {
            memory.store(offset, 1);
        }
        loop {
            // SAFETY: A system call.
            unsafe { libc::raise(libc::SIGSTOP) };
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // SAFETY: System calls; the child is ours and was not waited for.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}

/// Makes allocations of the calling thread fail, until it is dropped.
///
/// Another thread must end that, because the caller cannot even open a file.
pub struct Failing {
    end: Option<(mpsc::Sender<()>, thread::JoinHandle<()>)>,
    settings: Settings,
}

impl Failing {
    /// That percentage of all page allocations fails, at most `times` of them.
    pub fn pages(percent: u32, times: u32) -> Result<Failing> {
        Failing::prepare("fail_page_alloc", percent, times)?.for_pages(0)
    }

    /// All page allocations fail once `pages` are allocated.
    pub fn after_pages(pages: u64) -> Result<Failing> {
        Failing::prepare("fail_page_alloc", 100, 100_000)?.for_pages(pages)
    }

    fn for_pages(mut self, space: u64) -> Result<Failing> {
        let space = space.to_string();
        for (knob, value) in [("ignore-gfp-highmem", "N"), ("min-order", "0"), ("space", &space)] {
            self.settings.push(Setting::set(knob_of("fail_page_alloc", knob), value)?);
        }
        self.start()
    }

    /// The same for objects of the slab allocator: all, or those of one cache.
    pub fn objects(cache: Option<&str>, percent: u32, times: u32) -> Result<Failing> {
        let mut failing = Failing::prepare("failslab", percent, times)?;
        if let Some(cache) = cache {
            let chosen = format!("/sys/kernel/slab/{cache}/failslab");
            failing.settings.push(Setting::set(chosen, "1")?);
            failing.settings.push(Setting::set(knob_of("failslab", "cache-filter"), "Y")?);
        }
        failing.start()
    }

    /// Splits of huge pages of files: there is no node for their parts.
    pub fn splits() -> Result<Failing> {
        Failing::objects(Some("radix_tree_node"), 100, 100_000)
    }

    fn prepare(what: &str, percent: u32, times: u32) -> Result<Failing> {
        // Its filter is set back last, or else other tasks' allocations fail.
        let mut settings = Settings::default();
        for (knob, value) in [
            ("task-filter", "Y".to_owned()),
            ("ignore-gfp-wait", "N".to_owned()),
            ("verbose", "0".to_owned()),
            ("times", times.to_string()),
            ("probability", percent.to_string()),
        ] {
            settings.push(Setting::set(knob_of(what, knob), &value)?);
        }
        Ok(Failing { end: None, settings })
    }

    fn start(mut self) -> Result<Failing> {
        // SAFETY: Takes nothing.
        let thread = unsafe { libc::gettid() };
        let flag = PathBuf::from(format!("/proc/self/task/{thread}/make-it-fail"));
        let (end, ended) = mpsc::channel();
        let switch = flag.clone();
        let ender = thread::spawn(move || {
            // Nothing is ever sent.
            let _ = ended.recv();
            let _ = raw_write(&switch, "0");
        });
        self.end = Some((end, ender));
        write(&flag, "1")?;
        Ok(self)
    }
}

/// A knob of fault injection.
fn knob_of(what: &str, knob: &str) -> PathBuf {
    Path::new("/sys/kernel/debug").join(what).join(knob)
}

impl Drop for Failing {
    fn drop(&mut self) {
        if let Some((end, ender)) = self.end.take() {
            drop(end);
            let _ = ender.join();
        }
    }
}

/// All counters of memfile.ko and of the virtual memory, at one moment.
#[derive(Clone, Debug)]
pub struct Counts(HashMap<String, u64>);

impl Counts {
    /// Read them. Those of memfile.ko are called `memfile.NAME`; SKIP without them.
    pub fn now() -> Result<Counts> {
        mem::refresh_counters();
        let mut counts = HashMap::new();
        let mut add = |prefix: &str, text: &str| {
            for line in text.lines() {
                if let Some((name, value)) = line.split_once(' ') {
                    counts.insert(format!("{prefix}{name}"), value.trim().parse().unwrap_or(0));
                }
            }
        };
        add("memfile.", &read(MEMFILE_COUNTERS)?);
        add("", &read("/proc/vmstat")?);
        Ok(Counts(counts))
    }

    /// One of them.
    pub fn get(&self, name: &str) -> Result<u64> {
        self.0.get(name).copied().with_context(|| format!("there is no counter {name}"))
    }

    /// How much it has grown since these counters were read.
    pub fn grown(&self, name: &str) -> Result<u64> {
        Ok(Counts::now()?.get(name)? - self.get(name)?)
    }

    /// Fail unless each of them has grown by `least` or more; returns by how much.
    pub fn expect_grown(&self, names: &[&str], least: u64) -> Result<()> {
        let now = Counts::now()?;
        for name in names {
            let grown = now.get(name)? - self.get(name)?;
            println!("{name} +{grown}");
            ensure!(grown >= least, "{name} has grown by {grown}, wanted {least}");
        }
        Ok(())
    }

    /// Fail if one of them has grown.
    pub fn expect_same(&self, names: &[&str]) -> Result<()> {
        let now = Counts::now()?;
        for name in names {
            let grown = now.get(name)? - self.get(name)?;
            ensure!(grown == 0, "{name} has grown by {grown}");
        }
        Ok(())
    }
}

/// Memory that the kernel counts as content, in bytes, without what the test program has locked.
#[derive(Clone, Debug)]
pub struct Accounts(Vec<(&'static str, u64)>);

impl Accounts {
    const NAMES: [&'static str; 5] =
        ["AnonPages", "Shmem", "Unevictable", "ShmemHugePages", "HardwareCorrupted"];

    pub fn now() -> Result<Accounts> {
        mem::refresh_counters();
        let mut accounts = Vec::new();
        for name in Self::NAMES {
            // The test program's heap, which it may have locked, grows by megabytes with what it reads,
            // and keeps them.
            let own = match name {
                "AnonPages" => mem::own("Anonymous")?,
                "Unevictable" => mem::own("Locked")?,
                _ => 0,
            };
            accounts.push((name, mem::meminfo(name)?.saturating_sub(own)));
        }
        accounts.push(("swap", mem::meminfo("SwapTotal")? - mem::meminfo("SwapFree")?));
        Ok(Accounts(accounts))
    }

    /// Fail unless each is back where it was, within `slack` bytes: the test program itself
    /// allocates meanwhile.
    pub fn expect_back(&self, slack: u64) -> Result<()> {
        let mut wrong = Vec::new();
        for ((name, before), (_, now)) in self.0.iter().zip(Accounts::now()?.0) {
            if before.abs_diff(now) > slack {
                wrong.push(format!("{name} was {} KiB, is {} KiB", before >> 10, now >> 10));
            }
        }
        if !wrong.is_empty() {
            bail!("{}", wrong.join(", "));
        }
        Ok(())
    }
}
