// SPDX-License-Identifier: GPL-2.0
//! Converting memory in either way: both change the same state.

use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kvm_bindings::kvm_userspace_memory_region2;

use crate::guest::Command;
use crate::ktap::{CaseResult, skip};
use crate::pattern::{Pattern, Rng, seed};
use crate::pressure::{Cgroup, anonymous_huge, shmem_huge};
use crate::support::backend::Backend;
use crate::support::setup::{GUEST, Layout, SHARED, Setup, fill_view};
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{CONVERT_BY, ConvertBy, Exit, Vm, VmType, region, small_pages_aligned};
use crate::{GIB, HUGE, MIB, PAGE, conformance};

conformance!(
    "convert",
    [],
    converting: [
        regions_convert,
        both_ioctls_change_one_state,
        converting_twice_is_fine,
        bad_ranges_are_refused,
        unknown_attributes_are_refused,
        refused_conversion_changes_nothing,
        range_without_slot_may_be_converted,
        single_pages_convert_alone,
        page_of_a_huge_shared_one_converts_alone,
        fatal_signal_ends_the_conversion_of_a_huge_range,
        huge_range_with_little_in_it_is_cleared,
        large_range_costs_hardly_any_memory,
        range_from_the_first_gfn_on_converts,
        any_range_converts_and_no_other_page,
        dirty_log_ends_over_private_gfns_of_a_plain_slot,
    ],
    memfile: [page_of_a_huge_private_one_converts_alone],
    huge: all,
    shmem: [vm_without_private_memory_has_no_regions],
    // Refusals, and ranges without memory, do not look at pages.
    gigantic: [both_ioctls_change_one_state, single_pages_convert_alone],
);

/// A private slot of which both sides are filled; SKIP where there is no memfile.
fn filled(on: &'static Backend, size: u64) -> Result<Setup> {
    let mut s = Setup::new(on, size)?;
    s.fill_both()?;
    Ok(s)
}

fn regions_convert(on: &'static Backend) -> CaseResult {
    let mut s = filled(on, MIB)?;
    let (gpa, size) = (s.slot.gpa, s.slot.size);
    s.vm.convert(ConvertBy::Region, gpa, size, false)?;
    s.vcpu.verify(gpa, size, SHARED)?;
    s.vm.convert(ConvertBy::Region, gpa, size, true)?;
    s.vcpu.verify(gpa, size, GUEST)
}

fn both_ioctls_change_one_state(on: &'static Backend) -> CaseResult {
    let mut s = filled(on, MIB)?;
    let (gpa, half) = (s.slot.gpa, s.slot.size / 2);
    for (one, other) in
        [(ConvertBy::Attributes, ConvertBy::Region), (ConvertBy::Region, ConvertBy::Attributes)]
    {
        s.vm.convert(one, gpa, 2 * half, false)?;
        s.vcpu.verify(gpa, 2 * half, SHARED)?;
        s.vm.convert(other, gpa, half, true)?;
        s.vcpu.verify(gpa, half, GUEST)?;
        s.vcpu.verify(gpa + half, half, SHARED)?;
        s.vm.convert(one, gpa + half, half, true)?;
        s.vm.convert(other, gpa + PAGE, PAGE, false)?;
        s.vcpu.verify(gpa, PAGE, GUEST)?;
        s.vcpu.verify(gpa + PAGE, PAGE, SHARED)?;
        s.vcpu.verify(gpa + 2 * PAGE, 2 * half - 2 * PAGE, GUEST)?;
        s.vm.convert(one, gpa, 2 * half, true)?;
        s.vcpu.verify(gpa, 2 * half, GUEST)?;
    }
    Ok(())
}

fn converting_twice_is_fine(on: &'static Backend) -> CaseResult {
    let mut s = filled(on, MIB)?;
    for by in CONVERT_BY {
        for (private, wanted) in [(false, SHARED), (true, GUEST)] {
            for _ in 0..3 {
                s.vm.convert(by, s.slot.gpa, s.slot.size, private)?;
                s.vcpu.verify(s.slot.gpa, s.slot.size, wanted)?;
            }
        }
    }
    Ok(())
}

/// Ranges that are refused in both ways.
const BAD: [(u64, u64); 9] = [
    (GIB, 0),
    (0, 0),
    (GIB + 1, PAGE),
    (GIB, PAGE + 1),
    (GIB, 1),
    (GIB + PAGE / 2, PAGE / 2),
    (!(PAGE - 1), 2 * PAGE),
    (PAGE, !(PAGE - 1)),
    (1 << 63, 1 << 63),
];

fn bad_ranges_are_refused(on: &'static Backend) -> CaseResult {
    let vm = on.vm()?;
    drop(on.create(&vm, PAGE)?);
    for by in CONVERT_BY {
        for (gpa, size) in BAD {
            for private in [true, false] {
                let result = vm.raw_convert(by, gpa, size, private);
                on.errno(&format!("bad range by {by:?}"), result, &[Errno::EINVAL])
                    .with_context(|| format!("[{gpa:#x}, +{size:#x})"))?;
            }
        }
    }
    Ok(())
}

fn unknown_attributes_are_refused(on: &'static Backend) -> CaseResult {
    let vm = Vm::protected()?;
    for bit in (0..64).filter(|&bit| bit != 3) {
        let result = vm.raw_set_attributes(GIB, PAGE, 1 << bit);
        on.errno("unknown attribute", result, &[Errno::EINVAL])
            .with_context(|| format!("bit {bit}"))?;
    }
    Ok(())
}

fn refused_conversion_changes_nothing(on: &'static Backend) -> CaseResult {
    let mut s = filled(on, MIB)?;
    let (gpa, size) = (s.slot.gpa, s.slot.size);
    for by in CONVERT_BY {
        for (private, wanted) in [(true, GUEST), (false, SHARED)] {
            s.vm.convert(by, gpa, size, private)?;
            for (start, len) in [(gpa + 1, size), (gpa, size - 1), (gpa, 0)] {
                let result = s.vm.raw_convert(by, start, len, !private);
                on.errno("bad range", result, &[Errno::EINVAL])?;
            }
            s.vcpu.verify(gpa, size, wanted)?;
        }
    }
    Ok(())
}

/// There the ioctl is SEV's, with host addresses, and this VM has no SEV: as on a kernel without
/// memfiles.
fn vm_without_private_memory_has_no_regions(on: &'static Backend) -> CaseResult {
    let vm = Vm::new(VmType::Default)?;
    for private in [true, false] {
        on.errno("default VM", vm.raw_region(GIB, PAGE, private), &[Errno::ENOTTY])?;
    }
    Ok(())
}

fn range_without_slot_may_be_converted(on: &'static Backend) -> CaseResult {
    for by in CONVERT_BY {
        let vm = on.vm()?;
        vm.convert(by, GIB, MIB, true)?;
        let fd = on.create(&vm, MIB)?;
        let slot = vm.add_private(1, GIB, MIB, on.kind, &fd, 0)?;
        let mut vcpu = vm.vcpu(0)?;
        vcpu.fill(GIB, MIB, GUEST).context("the slot came later")?;
        ensure!(slot.view.load(0) == 0, "the access was not private");
        vm.delete(slot)?;
        vm.convert(by, GIB, MIB, false)?;
        let exit = vcpu.start(Command::Load, &[GIB])?;
        ensure!(exit == Exit::Mmio { gpa: GIB, write: false }, "{exit:x?}");
    }
    Ok(())
}

/// v7's array lost the neighbours of a page whose state was stored alone.
fn single_pages_convert_alone(on: &'static Backend) -> CaseResult {
    let mut s = filled(on, HUGE + PAGE)?;
    let (gpa, pages) = (s.slot.gpa, s.slot.size / PAGE);
    for by in CONVERT_BY {
        s.vm.convert(by, gpa, s.slot.size, true)?;
        for page in (0..pages).step_by(3) {
            s.vm.convert(by, gpa + page * PAGE, PAGE, false)?;
        }
        for page in 0..pages {
            let wanted = if page % 3 == 0 { SHARED } else { GUEST };
            let seen = s.vcpu.verify(gpa + page * PAGE, PAGE, wanted);
            seen.with_context(|| format!("{by:?}, page {page}"))?;
        }
    }
    Ok(())
}

/// Two huge pages on each side. One page of the first is converted; the guest must see the content
/// of each side, and have no huge mapping over both.
fn convert_page_of_a_huge_one(on: &Backend, by: ConvertBy, private: bool) -> CaseResult {
    let policy = shmem_huge("always")?;
    let _anonymous = anonymous_huge("madvise")?;
    let vm = on.vm()?;
    let (gpa, size) = (4 * GIB, 2 * HUGE);
    let view = Mapping::anonymous(size)?;
    view.madvise(0, size, libc::MADV_HUGEPAGE).context("MADV_HUGEPAGE")?;
    let fd = on.create(&vm, size)?;
    let slot = vm.add(1, gpa, view, Some((on.kind, fd.as_fd(), 0)))?;
    let mut vcpu = vm.vcpu(0)?;
    fill_view(&slot, SHARED);
    vm.convert(by, gpa, size, true)?;
    vcpu.fill(gpa, size, GUEST)?;
    drop(policy);
    vm.convert(by, gpa, size, private)?;
    let (whole, other) = if private { (GUEST, SHARED) } else { (SHARED, GUEST) };
    vcpu.verify_pages(gpa, size, whole)?;
    let stats = vm.stats()?;
    let huge = stats.get("pages_2m")?;
    if huge < 2 {
        return skip(format!("{huge} huge pages are mapped, where there could be two"));
    }
    for page in [0, 100, 511] {
        let at = page * PAGE;
        vm.convert(by, gpa + at, PAGE, !private)?;
        vcpu.verify(gpa, at, whole)?;
        vcpu.verify(gpa + at, PAGE, other)?;
        vcpu.verify(gpa + at + PAGE, size - at - PAGE, whole)?;
        let left = stats.get("pages_2m")?;
        ensure!(left == huge - 1, "{huge} huge pages were mapped, now {left}");
        vm.convert(by, gpa + at, PAGE, private)?;
        vcpu.verify(gpa, size, whole).context("converted back")?;
    }
    Ok(())
}

fn page_of_a_huge_private_one_converts_alone(on: &'static Backend) -> CaseResult {
    CONVERT_BY.into_iter().try_for_each(|by| convert_page_of_a_huge_one(on, by, true))
}

fn page_of_a_huge_shared_one_converts_alone(on: &'static Backend) -> CaseResult {
    CONVERT_BY.into_iter().try_for_each(|by| convert_page_of_a_huge_one(on, by, false))
}

/// The page tables of a converted range stay, so KVM asks how large a page could be in their place.
fn dirty_log_ends_over_private_gfns_of_a_plain_slot(on: &'static Backend) -> CaseResult {
    let vm = on.vm()?;
    let view = small_pages_aligned(2 * HUGE, HUGE)?;
    let plain = region(1, 4 * GIB, &view, None);
    let logged = kvm_userspace_memory_region2 { flags: KVM_MEM_LOG_DIRTY_PAGES, ..plain };
    let (gpa, size) = (plain.guest_phys_addr, plain.memory_size);
    vm.raw_set_region(&logged).context("a slot with a dirty log")?;
    let mut vcpu = vm.vcpu(0)?;
    for &by in vm.conversions() {
        vcpu.fill_pages(gpa, size, SHARED)?;
        vm.convert(by, gpa, HUGE, true)?;
        vm.raw_set_region(&plain).context("the log ends")?;
        vcpu.verify_pages(gpa + HUGE, HUGE, SHARED)?;
        vm.convert(by, gpa, HUGE, false)?;
        vcpu.verify_pages(gpa, size, SHARED)?;
        vm.raw_set_region(&logged).context("the log begins again")?;
    }
    Ok(())
}

/// More than any machine has memory to convert, and more than ends if all of it is visited.
const HUGE_RANGE: u64 = 1 << 60;

/// A guest of whose slot all is shared but for one page; both sides are filled.
fn nearly_shared(on: &'static Backend) -> Result<(Setup, u64)> {
    let mut s = filled(on, MIB)?;
    let one = s.slot.gpa + 3 * PAGE;
    s.vm.set_shared(s.slot.gpa, s.slot.size)?;
    s.vm.set_private(one, PAGE)?;
    expect_nearly_shared(&mut s, one)?;
    Ok((s, one))
}

fn expect_nearly_shared(s: &mut Setup, one: u64) -> Result<()> {
    let (gpa, end) = (s.slot.gpa, s.slot.gpa + s.slot.size);
    s.vcpu.verify(gpa, one - gpa, SHARED)?;
    s.vcpu.verify(one, PAGE, GUEST)?;
    s.vcpu.verify(one + PAGE, end - one - PAGE, SHARED)
}

/// A process that only makes a range private. It shares our memory, so for KVM it is the VM's
/// process.
struct Converter {
    pid: libc::pid_t,
    _stack: Mapping,
    _order: Box<Order>,
}

/// Its request.
#[repr(C)]
struct Order {
    vm: i64,
    request: u64,
    argument: [u64; 4],
}

/// Uses no part of the standard library, which assumes that it still runs in the thread that made
/// it.
extern "C" fn obey(order: *mut libc::c_void) -> libc::c_int {
    let order = order.cast::<Order>();
    // SAFETY: The order outlives the process that obeys it. The kernel reads the argument, which is that
    // of the request.
    unsafe {
        let argument = &raw const (*order).argument;
        let mut result = libc::SYS_ioctl;
        std::arch::asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") (*order).vm,
            in("rsi") (*order).request,
            in("rdx") argument,
            lateout("rcx") _,
            lateout("r11") _,
        );
        i32::from(result != 0)
    }
}

impl Converter {
    fn start(s: &Setup, by: ConvertBy, gpa: u64, size: u64) -> Result<Converter> {
        let (request, argument) = match by {
            // Address, size, attributes, flags.
            ConvertBy::Attributes => {
                (KVM_SET_MEMORY_ATTRIBUTES(), [gpa, size, KVM_MEMORY_ATTRIBUTE_PRIVATE, 0])
            }
            ConvertBy::Region => (KVM_MEMORY_ENCRYPT_REG_REGION(), [gpa, size, 0, 0]),
        };
        let vm = s.vm.fd().as_raw_fd().into();
        let mut order = Box::new(Order { vm, request, argument });
        let stack = Mapping::anonymous(16 * PAGE)?;
        let top = stack.addr() + stack.len();
        let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::SIGCHLD;
        // SAFETY: The stack and the order live until the process is waited for; it touches nothing else.
        let pid = check(unsafe {
            libc::clone(obey, top as *mut libc::c_void, flags, (&raw mut *order).cast())
        });
        let pid = pid.context("clone")? as libc::pid_t;
        Ok(Converter { pid, _stack: stack, _order: order })
    }

    /// Kill it, and wait until it is dead.
    fn kill(self) -> Result<()> {
        // SAFETY: Takes no pointer.
        check(unsafe { libc::kill(self.pid, libc::SIGKILL) }).context("kill")?;
        let mut status = 0;
        // SAFETY: The status outlives the call.
        check(unsafe { libc::waitpid(self.pid, &mut status, 0) }).context("waitpid")?;
        let killed = libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL;
        ensure!(killed, "the conversion ended by itself: status {status:#x}");
        Ok(())
    }
}

/// Wait for a value of the cgroup's charge.
fn wait_for_charge(cgroup: &Cgroup, what: &str, enough: impl Fn(u64) -> bool) -> Result<u64> {
    let alarm = Alarm::set(Duration::from_secs(30))?;
    loop {
        let current = cgroup.current()?;
        if enough(current) {
            return Ok(current);
        }
        ensure!(!alarm.due(), "{what}: {} KiB are charged", current >> 10);
        std::thread::yield_now();
    }
}

fn fatal_signal_ends_the_conversion_of_a_huge_range(on: &'static Backend) -> CaseResult {
    let cgroup = Cgroup::enter()?;
    let (mut s, one) = nearly_shared(on)?;
    for by in CONVERT_BY {
        let before = cgroup.current()?;
        // Only the signal may end it.
        cgroup.set("memory.max", before + 256 * MIB)?;
        let limit = || cgroup.line("memory.events", "max");
        let reached = limit()?;
        // It begins below the slot, and is past it when it has taken this much memory.
        let converter = Converter::start(&s, by, s.slot.gpa - 16 * MIB, HUGE_RANGE)?;
        let taken = wait_for_charge(&cgroup, "converting", |now| now >= before + 16 * MIB);
        converter.kill()?;
        println!("{by:?}: killed with {} KiB more", (taken? - before) >> 10);
        // A huge page of our own may be among it.
        let after = wait_for_charge(&cgroup, "killed", |now| now <= before + 4 * MIB)?;
        println!("{} KiB are left of them", after.saturating_sub(before) >> 10);
        ensure!(limit()? == reached, "it went on until there was no memory");
        cgroup.unlimit("memory.max")?;
        expect_nearly_shared(&mut s, one).with_context(|| format!("{by:?}"))?;
        // The state is unchanged for later callers.
        s.vm.convert(by, s.slot.gpa, s.slot.size, true)?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
        s.vm.convert(by, s.slot.gpa, s.slot.size, false)?;
        s.vm.convert(by, one, PAGE, true)?;
        expect_nearly_shared(&mut s, one).with_context(|| format!("after {by:?}"))?;
    }
    Ok(())
}

/// Entry by entry it would take hours, if there were any.
fn huge_range_with_little_in_it_is_cleared(on: &'static Backend) -> CaseResult {
    for by in CONVERT_BY {
        let (mut s, _) = nearly_shared(on)?;
        let last = GIB + HUGE_RANGE - PAGE;
        s.vm.convert(by, last, PAGE, true)?;
        s.vm.convert(by, GIB, HUGE_RANGE, false)?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, SHARED)?;
        // Also where no page is private.
        s.vm.convert(by, GIB, HUGE_RANGE, false)?;
        s.vm.convert(by, s.slot.gpa, s.slot.size, true)?;
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST)?;
        // Pages outside of the range stay.
        s.vm.convert(by, s.slot.gpa + s.slot.size / 2, HUGE_RANGE, false)?;
        s.vcpu.verify(s.slot.gpa, s.slot.size / 2, GUEST)?;
        s.vcpu.verify(s.slot.gpa + s.slot.size / 2, s.slot.size / 2, SHARED)?;
    }
    Ok(())
}

/// An entry for each page would take 8 bytes of each, and nodes: 150 MiB.
fn large_range_costs_hardly_any_memory(on: &'static Backend) -> CaseResult {
    let cgroup = Cgroup::enter()?;
    let vm = on.vm()?;
    let before = cgroup.current()?;
    for by in CONVERT_BY {
        // Nothing that it begins or ends with is as large as it could be.
        let (gpa, size) = (GIB - PAGE, 64 * GIB + 2 * PAGE);
        vm.convert(by, gpa, size, true)?;
        vm.convert(by, 5 * GIB, PAGE, false)?;
        let more = cgroup.current()?.saturating_sub(before);
        println!("{by:?}: {} KiB for 64 GiB", more >> 10);
        // A huge page of our own may be among it.
        ensure!(more < 4 * MIB, "{} KiB more are charged", more >> 10);
        vm.convert(by, gpa, size, false)?;
    }
    Ok(())
}

/// The host's words of the pages of [`any_range_converts_and_no_other_page`], and the guest's.
const SIDES: [Pattern; 2] = [SHARED, GUEST];

/// KVM keeps attributes in entries of 1, 64, 4096 and 262,144 pages: ranges that begin and end at the
/// ends of such entries, and next to them.
fn any_range_converts_and_no_other_page(on: &'static Backend) -> CaseResult {
    const LARGEST: u64 = 1 << 18;
    let mut rng = Rng::new(seed());
    let (gpa, size) = (8 * GIB - 17 * MIB, GIB + 34 * MIB);
    let mut s = Setup::at(on, size, Layout { gpa, offset: 0 })?;
    let mut pages = vec![0, 17 * MIB / PAGE - 1, (size - PAGE) / PAGE];
    // Its gfn is a multiple of all of them.
    let first = 17 * MIB / PAGE;
    for entry in [64, 4096, LARGEST] {
        for edge in [first, first + entry, first + 5 * entry] {
            pages.extend([edge - 1, edge, edge + 1]);
        }
    }
    pages.retain(|page| page * PAGE < size);
    pages.sort_unstable();
    pages.dedup();
    for gpa in pages.iter().map(|page| gpa + page * PAGE) {
        s.slot.view.store(gpa - s.slot.gpa, SHARED.word(gpa));
        s.vcpu.store(gpa, GUEST.word(gpa))?;
    }
    // The largest entry takes the place of smaller ones, and goes as a whole; then what comes.
    let (all, largest) = (0..=size / PAGE - 1, first..=first + LARGEST - 1);
    let mut ranges = vec![
        (all.clone(), false),
        (all, true),
        (first + 64..=first + 64, false),
        (largest.clone(), true),
        (largest.clone(), false),
        (largest, true),
    ];
    for _ in 0..60 {
        let (a, b) = (rng.below(pages.len() as u64), rng.below(pages.len() as u64));
        ranges.push((pages[a.min(b) as usize]..=pages[a.max(b) as usize], rng.below(2) == 1));
    }
    let mut private = vec![true; pages.len()];
    let request = region(s.slot.id, gpa, &s.slot.view, Some((on.kind, s.fd.as_fd(), 0)));
    for (round, (range, to)) in ranges.into_iter().enumerate() {
        let by = CONVERT_BY[rng.below(CONVERT_BY.len() as u64) as usize];
        let (first, last) = (*range.start(), *range.end());
        s.vm.convert(by, gpa + first * PAGE, (last - first + 1) * PAGE, to)?;
        // A page that is mapped does not show what became of its attributes.
        s.vm.raw_delete(s.slot.id)?;
        s.vm.raw_set_region(&request)?;
        for (page, private) in pages.iter().zip(&mut private) {
            if range.contains(page) {
                *private = to;
            }
        }
        for (page, private) in pages.iter().zip(&private) {
            let addr = gpa + page * PAGE;
            let (got, wanted) = (s.vcpu.load(addr)?, SIDES[usize::from(*private)].word(addr));
            ensure!(
                got == wanted,
                "round {round}: pages {first} to {last} became private: {to}; page {page} has {got:#x}, \
                 not {wanted:#x}"
            );
        }
    }
    Ok(())
}

/// The guest does not run while its own program would be private.
fn range_from_the_first_gfn_on_converts(on: &'static Backend) -> CaseResult {
    let mut s = Setup::at(on, MIB, Layout { gpa: 16 * MIB, offset: 0 })?;
    s.fill_both()?;
    let (gpa, size) = (s.slot.gpa, s.slot.size);
    for by in CONVERT_BY {
        s.vm.convert(by, 0, 2 * GIB, true)?;
        s.vm.convert(by, 63 * PAGE, 2 * PAGE, false)?;
        s.vm.convert(by, 0, gpa, false)?;
        s.vcpu.verify(gpa, size, GUEST)?;
        s.vm.convert(by, 0, gpa + PAGE, false)?;
        s.vcpu.verify(gpa, PAGE, SHARED)?;
        s.vcpu.verify(gpa + PAGE, size - PAGE, GUEST)?;
        s.vm.convert(by, 0, 2 * GIB, false)?;
        s.vcpu.verify(gpa, size, SHARED)?;
    }
    Ok(())
}
