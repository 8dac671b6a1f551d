// SPDX-License-Identifier: GPL-2.0
//! Initial content of private memory, `KVM_MEMFILE_POPULATE` (rule 26).

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::ktap::{CaseResult, Suite};
use crate::pattern::Pattern;
use crate::pressure::{self, Cgroup, Disk, Swap};
use crate::support::setup::{
    BOTH, GUEST, PINNED, SHARED, SLOT, check_view, content, fill_view_part,
};
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{Private, Slot, Vm, VmType, small_pages};
use crate::{GIB, HUGE, MIB, PAGE, mem, suite};

pub static SUITE: Suite = suite!(
    "populate",
    [
        guest_finds_the_content,
        huge_pages_are_populated,
        allocated_pages_are_populated,
        pages_done_are_taken_off_the_range,
        nothing_is_done_once_a_vcpu_has_run,
        first_run_ends_it_for_good,
        page_with_content_is_refused,
        content_in_swap_is_refused,
        zeros_in_swap_are_no_content,
        bad_range_is_refused,
        memory_that_is_not_private_is_refused,
        bad_source_changes_nothing,
        signal_ends_it_between_pages,
        vm_without_private_memory_has_none,
    ]
);

const GPA: u64 = 4 * GIB;
const SIZE: u64 = 2 * MIB;
const CONTENT: Pattern = Pattern::Generation(5);

/// A VM whose vCPU is not made yet, with a slot that is all private.
struct Fresh {
    vm: Vm,
    fd: OwnedFd,
    slot: Slot,
}

impl Fresh {
    fn new(flags: u64) -> Result<Fresh> {
        Fresh::on_file(flags, memfile(SIZE)?)
    }

    fn on_file(flags: u64, fd: OwnedFd) -> Result<Fresh> {
        let vm = Vm::protected()?;
        vm.raw_enable_cap(KVM_CAP_MEMFILE, flags).context("KVM_CAP_MEMFILE")?;
        ensure!(vm.check_extension(KVM_CAP_MEMFILE_POPULATE) == 1);
        let slot = vm.add_private(SLOT, GPA, SIZE, Private::Memfile, fd.as_fd(), 0)?;
        vm.set_private(GPA, SIZE)?;
        fill_view_part(&slot, 0, SIZE, SHARED);
        Ok(Fresh { vm, fd, slot })
    }

    /// Populate a part of the slot, which begins `offset` bytes into it, to the end.
    fn populate(&self, offset: u64, len: u64) -> (SysResult<()>, u64) {
        let source = content(GPA + offset, len, CONTENT).expect("memory for the content");
        self.vm.raw_populate(GPA + offset, len, source.addr())
    }

    /// The same, and fail unless it succeeds.
    fn populated(&self, offset: u64, len: u64) -> CaseResult {
        let (result, left) = self.populate(offset, len);
        result.with_context(|| format!("[+{offset:#x}, +{len:#x}), {left:#x} bytes left"))?;
        ensure!(left == 0, "{left:#x} bytes left");
        Ok(())
    }

    fn expect_refused(&self, what: &str, offset: u64, len: u64, errno: Errno) -> CaseResult {
        let (result, left) = self.populate(offset, len);
        expect_errno(what, result, &[errno])?;
        ensure!(left == len, "{what}: {left:#x} of {len:#x} bytes left");
        Ok(())
    }
}

fn guest_finds_the_content() -> CaseResult {
    for flags in [PINNED, BOTH] {
        let f = Fresh::new(flags)?;
        f.populated(PAGE, 5 * PAGE)?;
        let mut vcpu = f.vm.vcpu(0)?;
        vcpu.verify(GPA, PAGE, Pattern::ZERO)?;
        vcpu.verify(GPA + PAGE, 5 * PAGE, CONTENT)?;
        vcpu.verify(GPA + 6 * PAGE, SIZE - 6 * PAGE, Pattern::ZERO)?;
        check_view(&f.slot, 0, SIZE, SHARED)?;
    }
    Ok(())
}

fn huge_pages_are_populated() -> CaseResult {
    let _huge = pressure::shmem_huge("always")?;
    let f = Fresh::new(PINNED)?;
    // Piece by piece: the rest of a huge page has no content either.
    for (offset, len) in [(HUGE / 2, PAGE), (0, HUGE / 2), (HUGE / 2 + PAGE, HUGE / 2 - PAGE)] {
        f.populated(offset, len)?;
    }
    let mut vcpu = f.vm.vcpu(0)?;
    vcpu.verify(GPA, SIZE, CONTENT)
}

fn allocated_pages_are_populated() -> CaseResult {
    let f = Fresh::new(PINNED)?;
    allocate(&f.fd, 0, SIZE)?;
    f.populated(0, SIZE)?;
    let mut vcpu = f.vm.vcpu(0)?;
    vcpu.verify(GPA, SIZE, CONTENT)
}

fn pages_done_are_taken_off_the_range() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let f = Fresh::new(PINNED)?;
    f.populated(3 * PAGE, PAGE)?;
    // Up to the page that has content already, and no further.
    let source = content(GPA, 8 * PAGE, CONTENT)?;
    let mut range = kvm_memfile_populate {
        gpa: GPA,
        size: 8 * PAGE,
        source: source.addr(),
        ..Default::default()
    };
    f.vm.raw_populate_once(&mut range).context("the first part")?;
    let wanted = (GPA + 3 * PAGE, 5 * PAGE, source.addr() + 3 * PAGE);
    ensure!((range.gpa, range.size, range.source) == wanted, "{range:x?}");
    expect_errno("the second", f.vm.raw_populate_once(&mut range), &[Errno::EEXIST])?;
    ensure!((range.gpa, range.size, range.source) == wanted, "{range:x?}");
    expect_allocated(&f.fd, 4 * PAGE, "four pages")
}

fn nothing_is_done_once_a_vcpu_has_run() -> CaseResult {
    let f = Fresh::new(PINNED)?;
    f.populated(0, PAGE)?;
    let mut vcpu = f.vm.vcpu(0)?;
    for offset in [0, 2 * PAGE] {
        f.expect_refused("after KVM_RUN", offset, PAGE, Errno::EPERM)?;
    }
    vcpu.verify(GPA, PAGE, CONTENT)?;
    vcpu.verify(GPA + PAGE, SIZE - PAGE, Pattern::ZERO)
}

/// While one thread populates, another runs a vCPU: all content from before is there, and none from
/// after.
fn first_run_ends_it_for_good() -> CaseResult {
    // A run that came before the first page or after the last one proves nothing.
    let (mut in_time, mut tries) = (0, 0);
    while in_time < 3 {
        ensure!(tries < 200, "only {in_time} of {tries} runs began during the call");
        tries += 1;
        let f = Fresh::new(PINNED)?;
        let mut vcpu = f.vm.vcpu_that_has_not_run(0)?;
        let left = thread::scope(|scope| -> Result<u64> {
            let populate = scope.spawn(|| f.populate(0, SIZE));
            while allocated(&f.fd)? == 0 && !populate.is_finished() {
                thread::yield_now();
            }
            vcpu.restart()?;
            let mut first = 0;
            while first < SIZE && vcpu.load(GPA + first)? == CONTENT.word(GPA + first) {
                first += PAGE;
            }
            let (result, left) = populate.join().map_err(|_| anyhow!("populate panicked"))?;
            ensure!(result == Ok(()) || result == Err(Errno::EPERM), "{result:?}");
            ensure!(first == SIZE - left, "{first:#x} bytes are there, {left:#x} were left");
            vcpu.verify(GPA, first, CONTENT)?;
            vcpu.verify(GPA + first, left, Pattern::ZERO)?;
            Ok(left)
        })?;
        println!("{left:#x} bytes were too late");
        in_time += u32::from((1..SIZE).contains(&left));
    }
    Ok(())
}

fn page_with_content_is_refused() -> CaseResult {
    let f = Fresh::new(PINNED)?;
    f.populated(0, PAGE)?;
    f.expect_refused("once more", 0, PAGE, Errno::EEXIST)?;
    // Content of an earlier VM.
    let mut vcpu = f.vm.vcpu(0)?;
    vcpu.fill(GPA, SIZE, GUEST)?;
    drop(vcpu);
    let Fresh { vm, fd, slot } = f;
    drop((vm, slot));
    let f = Fresh::on_file(PINNED, fd)?;
    f.expect_refused("another VM's content", 2 * PAGE, PAGE, Errno::EEXIST)?;
    punch(&f.fd, 2 * PAGE, PAGE)?;
    f.populated(2 * PAGE, PAGE)?;
    let mut vcpu = f.vm.vcpu(0)?;
    vcpu.verify(GPA, 2 * PAGE, GUEST)?;
    vcpu.verify(GPA + 2 * PAGE, PAGE, CONTENT)?;
    vcpu.verify(GPA + 3 * PAGE, SIZE - 3 * PAGE, GUEST)
}

fn content_in_swap_is_refused() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let _swap = Swap::on(64 * MIB)?;
    let cgroup = Cgroup::enter()?;
    let f = Fresh::new(BOTH)?;
    f.populated(0, PAGE)?;
    while mem::resident_pages(&f.fd)? > 0 {
        cgroup.reclaim(SIZE)?;
    }
    f.expect_refused("content in swap", 0, PAGE, Errno::EEXIST)?;
    let mut vcpu = f.vm.vcpu(0)?;
    vcpu.verify(GPA, PAGE, CONTENT)
}

/// The call reads them back from a disk to check them.
fn zeros_in_swap_are_no_content() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let _swap = Swap::on_disk(Disk::new(64 * MIB, Duration::from_millis(5))?)?;
    let cgroup = Cgroup::enter()?;
    let f = Fresh::new(BOTH)?;
    allocate(&f.fd, 0, 8 * PAGE)?;
    while mem::resident_pages(&f.fd)? > 0 {
        pressure::drop_caches()?;
        cgroup.reclaim(SIZE)?;
    }
    f.populated(0, 8 * PAGE)?;
    let mut vcpu = f.vm.vcpu(0)?;
    vcpu.verify(GPA, 8 * PAGE, CONTENT)
}

fn bad_range_is_refused() -> CaseResult {
    let f = Fresh::new(PINNED)?;
    let source = content(GPA, SIZE, CONTENT)?;
    let good =
        kvm_memfile_populate { gpa: GPA, size: PAGE, source: source.addr(), ..Default::default() };
    let bad = [
        kvm_memfile_populate { gpa: GPA + 8, ..good },
        kvm_memfile_populate { size: PAGE + 8, ..good },
        kvm_memfile_populate { source: source.addr() + 8, ..good },
        kvm_memfile_populate { gpa: !(PAGE - 1), size: 2 * PAGE, ..good },
        kvm_memfile_populate { source: !(PAGE - 1), size: 2 * PAGE, ..good },
        kvm_memfile_populate { size: 0, ..good },
        kvm_memfile_populate { flags: 1, ..good },
        kvm_memfile_populate { padding: [0, 0, 0, 1], ..good },
    ];
    for range in bad {
        let mut now = range;
        let what = format!("{range:x?}");
        expect_errno(&what, f.vm.raw_populate_once(&mut now), &[Errno::EINVAL])?;
        ensure!(now == range, "{what} became {now:x?}");
    }
    expect_allocated(&f.fd, 0, "nothing")
}

fn memory_that_is_not_private_is_refused() -> CaseResult {
    let f = Fresh::new(PINNED)?;
    f.vm.set_shared(GPA + PAGE, PAGE)?;
    f.expect_refused("shared", PAGE, PAGE, Errno::EINVAL)?;
    f.expect_refused("no slot", SIZE, PAGE, Errno::EINVAL)?;
    let ordinary = f.vm.add_shared(SLOT + 1, GPA + GIB, small_pages(PAGE)?)?;
    f.expect_refused("no private slot", GIB, PAGE, Errno::EINVAL)?;
    f.vm.set_private(ordinary.gpa, PAGE)?;
    f.expect_refused("private without backing", GIB, PAGE, Errno::EINVAL)?;
    expect_allocated(&f.fd, 0, "nothing")
}

fn bad_source_changes_nothing() -> CaseResult {
    let _pages = pressure::base_pages()?;
    let f = Fresh::new(PINNED)?;
    let source = content(GPA, 2 * PAGE, CONTENT)?;
    source.protect(PAGE, PAGE, libc::PROT_NONE).context("mprotect")?;
    let (result, left) = f.vm.raw_populate(GPA, 2 * PAGE, source.addr());
    expect_errno("half a source", result, &[Errno::EFAULT])?;
    ensure!(left == PAGE, "{left:#x} bytes left");
    expect_allocated(&f.fd, PAGE, "one page")?;
    f.populated(PAGE, PAGE)?;
    let mut vcpu = f.vm.vcpu(0)?;
    vcpu.verify(GPA, 2 * PAGE, CONTENT)
}

fn signal_ends_it_between_pages() -> CaseResult {
    let f = Fresh::new(PINNED)?;
    let source = content(GPA, SIZE, CONTENT)?;
    let mut range =
        kvm_memfile_populate { gpa: GPA, size: SIZE, source: source.addr(), ..Default::default() };
    // One signal for each call, until one interrupts a call: between two calls it has no effect.
    let (calls, done) = (AtomicU64::new(0), AtomicBool::new(false));
    let me = Interrupter::of_this_thread();
    let cut = thread::scope(|scope| -> Result<u64> {
        let signals = scope.spawn(|| -> CaseResult {
            let mut last = 0;
            while !done.load(Ordering::Relaxed) {
                let now = calls.load(Ordering::Relaxed);
                if now != last {
                    me.interrupt().context("tgkill")?;
                    last = now;
                }
                thread::yield_now();
            }
            Ok(())
        });
        let mut populate = || -> Result<u64> {
            let mut cut = 0;
            loop {
                calls.fetch_add(1, Ordering::Relaxed);
                match f.vm.raw_populate_once(&mut range) {
                    Ok(()) if range.size == 0 && cut > 0 => return Ok(cut),
                    // The call was faster: start again, with new pages.
                    Ok(()) if range.size == 0 => {
                        punch(&f.fd, 0, SIZE)?;
                        (range.gpa, range.size, range.source) = (GPA, SIZE, source.addr());
                    }
                    Ok(()) | Err(Errno::EINTR) => {
                        cut += 1;
                        done.store(true, Ordering::Relaxed);
                    }
                    Err(errno) => bail!("{errno}, {:#x} bytes left", range.size),
                }
            }
        };
        let cut = populate();
        done.store(true, Ordering::Relaxed);
        signals.join().map_err(|_| anyhow!("the signals panicked"))??;
        cut
    })?;
    println!("{cut} signals were in time");
    let mut vcpu = f.vm.vcpu(0)?;
    vcpu.verify(GPA, SIZE, CONTENT)
}

fn vm_without_private_memory_has_none() -> CaseResult {
    let vm = Vm::new(VmType::Default)?;
    ensure!(vm.check_extension(KVM_CAP_MEMFILE_POPULATE) == 0);
    let source = content(GPA, PAGE, CONTENT)?;
    let (result, _) = vm.raw_populate(GPA, PAGE, source.addr());
    expect_errno("KVM_MEMFILE_POPULATE", result, &[Errno(libc::ENOTTY)])
}
