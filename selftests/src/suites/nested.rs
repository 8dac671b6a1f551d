// SPDX-License-Identifier: GPL-2.0
//! A guest that is a hypervisor itself. KVM shadows the page tables of its guest, and looks into them
//! again when they change: it could not if they were private.

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};

use crate::guest::Command;
use crate::ktap::CaseResult;
use crate::pattern::Pattern;
use crate::pressure::{Idle, base_pages, frames, mapped_frames};
use crate::support::backend::Backend;
use crate::support::nested::{self, EXIT_HLT, EXIT_NPF};
use crate::support::setup::{
    GUEST, LAYOUTS, Layout, PINNED, PORT, SHARED, SLOT, Setup, fill_view_part,
};
use crate::support::uffd::Userfault;
use crate::support::wait::{sleeps_in, wait_until};
use crate::sys::*;
use crate::vm::{Exit, small_pages};
use crate::{MIB, PAGE, conformance};

conformance!(
    "nested",
    [],
    converting: [
        nested_guest_runs_in_private_memory,
        nested_guest_gets_no_shared_page_beside_a_shared_one,
        hole_beside_the_first_shadow_root_and_a_deletion,
        nested_guest_runs_while_other_pages_go: 120,
    ],
    memfile: [
        look_at_a_shared_page_does_not_hide_what_a_nested_guest_uses,
        control_block_in_private_memory_is_refused,
        private_page_tables_are_not_shadowed,
        private_page_tables_are_not_walked_without_access,
    ],
    // The others count small pages, or convert them.
    huge: [nested_guest_runs_in_private_memory],
    // The other one frees thousands of pages, which come back into the direct map one by one.
    hidden: [
        nested_guest_runs_in_private_memory,
        nested_guest_gets_no_shared_page_beside_a_shared_one,
        hole_beside_the_first_shadow_root_and_a_deletion,
    ],
);

const SIZE: u64 = MIB;
/// Where a nested guest without paging can address private memory.
const LOW: Layout = LAYOUTS[2];

/// A guest that can be a hypervisor, and whose private memory KVM may use if `access` is set.
fn hypervisor(access: bool) -> Result<Setup> {
    let mut s = Setup::used_by_kvm(PINNED, access, SIZE)?;
    nested::enable(&mut s.vcpu)?;
    Ok(s)
}

/// The same on any kind of memory, which KVM may not use, at [`LOW`].
fn hypervisor_low(on: &'static Backend, size: u64) -> Result<Setup> {
    let mut s = Setup::at(on, size, LOW)?;
    nested::enable(&mut s.vcpu)?;
    Ok(s)
}

fn nested_guest_runs_in_private_memory(on: &'static Backend) -> CaseResult {
    let mut s = hypervisor_low(on, on.whole())?;
    let gpa = s.slot.gpa;
    s.vcpu.store(gpa, nested::HLT)?;
    s.expect_whole()?;
    nested::prepare(&s.vm, gpa, nested::TABLES);
    let exit = nested::run(&s.vm, &mut s.vcpu)?;
    ensure!(exit == EXIT_HLT, "the nested guest exits with {exit:#x}");
    // KVM follows its rmaps when the page goes.
    punch(&s.fd, LOW.offset, on.page)?;
    s.vcpu.store(gpa, nested::HLT)?;
    let exit = nested::run(&s.vm, &mut s.vcpu)?;
    ensure!(exit == EXIT_HLT, "in a new page the nested guest exits with {exit:#x}");
    Ok(())
}

/// Let the nested guest load a word or, if there is one, store it; what it has in `eax` then.
fn access(s: &mut Setup, gpa: u64, word: Option<u32>) -> Result<u32> {
    nested::prepare_access(&s.vm, nested::TABLES, gpa, word);
    let exit = nested::run(&s.vm, &mut s.vcpu)?;
    ensure!(exit == EXIT_HLT, "at {gpa:#x} the nested guest exits with {exit:#x}");
    Ok(nested::number(&s.vm))
}

/// With a page that a nested guest uses, KVM maps those beside it that are in memory. Here they are,
/// as the VMM has written to them, but some are private.
fn nested_guest_gets_no_shared_page_beside_a_shared_one(on: &'static Backend) -> CaseResult {
    /// As many pages KVM looks at, from a multiple of it on.
    const BESIDE: u64 = 8;
    // CAST: The nested guest loads the lower half of a word.
    let word = |pattern: Pattern, gpa| pattern.word(gpa) as u32;
    // Shared pages. The nested guest uses the first of them first, then all in their order.
    let cases: [&[u64]; 7] =
        [&[0, 1], &[7, 0], &[3, 4], &[3, 0], &[2], &[0, 2], &[4, 0, 1, 5, 6, 7]];
    let mut s = hypervisor_low(on, SIZE)?;
    let gpa = s.slot.gpa;
    s.fill_both()?;
    for (n, shared) in (0..).zip(cases) {
        let start = gpa + n * BESIDE * PAGE;
        for page in shared {
            s.vm.set_shared(start + page * PAGE, PAGE)?;
        }
        let pages = shared[..1].iter().copied().chain((0..BESIDE).filter(|n| *n != shared[0]));
        for page in pages.clone() {
            let at = start + page * PAGE;
            let wanted = if shared.contains(&page) { SHARED } else { GUEST };
            let got = access(&mut s, at, None)?;
            ensure!(
                got == word(wanted, at),
                "shared {shared:?}: in page {page} the nested guest loads {got:#x}, {}",
                if got == word(SHARED, at) {
                    "which is in the shared page"
                } else {
                    "from nowhere"
                }
            );
        }
        for page in pages {
            let at = start + page * PAGE;
            access(&mut s, at, Some(0x5a5a))?;
            let seen = s.slot.view.load(at - gpa) != SHARED.word(at);
            let wanted = shared.contains(&page);
            ensure!(seen == wanted, "shared {shared:?}: store to page {page}, VMM sees it: {seen}");
            // CAST: The lower half.
            let got = s.vcpu.load(at)? as u32;
            ensure!(got == 0x5a5a, "shared {shared:?}: our guest loads {got:#x} in page {page}");
        }
    }
    Ok(())
}

/// The host asks for the page that the VMM has at the address of a private one. See
/// `aging.look_at_a_shared_page_does_not_make_the_private_one_idle`.
fn look_at_a_shared_page_does_not_hide_what_a_nested_guest_uses(
    on: &'static Backend,
) -> CaseResult {
    let idle = Idle::open()?;
    let _pages = base_pages()?;
    let mut s = hypervisor_low(on, SIZE)?;
    s.fill_both()?;
    let places = frames(&s.vcpu, &s.slot, &s.fd)?;
    let shared = mapped_frames(&s.slot.view)?;
    ensure!(shared.len() == places.len(), "{} and {} pages", shared.len(), places.len());
    let pairs = places.iter().zip(shared).map(|((at, frame), shared)| (*at, frame.pfn, shared));
    let mut pairs =
        pairs.filter(|(_, private, shared)| idle.knows(*private) && idle.knows(*shared));
    let (at, private, shared) = pairs.next().context("the bitmap knows no page of both sides")?;
    let gpa = s.slot.gpa + at - LOW.offset;
    // It is mapped the second time.
    for round in 0..2 {
        idle.mark_all([private, shared])?;
        let got = access(&mut s, gpa, None)?;
        // CAST: The lower half.
        ensure!(got == GUEST.word(gpa) as u32, "the nested guest loads {got:#x}");
        let shared_idle = idle.get(shared)?;
        ensure!(
            !idle.get(private)?,
            "the private page is idle, as the shared one was looked at; the shared one is idle: \
             {shared_idle}, round {round}"
        );
        ensure!(shared_idle, "use of the private page counted, round {round}");
    }
    Ok(())
}

/// No notifier would remove the mapping when the page leaves the file.
fn control_block_in_private_memory_is_refused(_: &'static Backend) -> CaseResult {
    let mut s = hypervisor(true)?;
    let gpa = s.slot.gpa;
    nested::prepare(&s.vm, nested::CODE, nested::TABLES);
    s.vcpu.call(Command::Copy, &[gpa, nested::VMCB, PAGE / 8])?;
    let exit = s.vcpu.start(Command::Vmrun, &[gpa])?;
    ensure!(exit == Exit::Other(kvm_bindings::KVM_EXIT_INTERNAL_ERROR), "{exit:x?}");
    Ok(())
}

/// Nested page tables in private memory, from the start of the slot on.
fn private_page_tables(s: &mut Setup) -> CaseResult {
    for (offset, word) in nested::page_tables(s.slot.gpa) {
        s.vcpu.store(s.slot.gpa + offset, word)?;
    }
    nested::prepare(&s.vm, nested::CODE, s.slot.gpa);
    Ok(())
}

fn private_page_tables_are_not_shadowed(_: &'static Backend) -> CaseResult {
    let mut s = hypervisor(true)?;
    private_page_tables(&mut s)?;
    let exit = s.vcpu.start(Command::Vmrun, &[nested::VMCB])?;
    ensure!(exit == Exit::Error(Errno::EFAULT), "{exit:x?}");
    // Nothing is wrong with them otherwise.
    let (gpa, len) = (s.slot.gpa, 2 * PAGE);
    s.vm.set_shared(gpa, len)?;
    for (offset, word) in nested::page_tables(gpa) {
        s.slot.view.store(offset, word);
    }
    let exit = s.vcpu.run()?;
    ensure!(exit == Exit::Done, "with shared page tables: {exit:x?}");
    let exit = s.vm.system().load(nested::VMCB + 0x70);
    ensure!(exit == EXIT_HLT, "with shared page tables the nested guest exits with {exit:#x}");
    Ok(())
}

/// For KVM nothing is mapped.
fn private_page_tables_are_not_walked_without_access(_: &'static Backend) -> CaseResult {
    let mut s = hypervisor(false)?;
    private_page_tables(&mut s)?;
    let exit = nested::run(&s.vm, &mut s.vcpu)?;
    ensure!(exit == EXIT_NPF, "the nested guest exits with {exit:#x}");
    Ok(())
}

/// A nested guest executes page after page of private memory, and each tells which content it had. Its
/// pages are punched and written anew between runs. Meanwhile others at both sides are filled, punched
/// and converted, and a slot of the same file is deleted and made again.
fn nested_guest_runs_while_other_pages_go(on: &'static Backend) -> CaseResult {
    const ROUNDS: u64 = 24;
    // Of the slot: pages that the nested guest executes, with others around them.
    const CODE: Range<u64> = 64..80;
    const REBOUND: u64 = 16 * PAGE;
    const SPARE: u64 = 16 * PAGE;
    let mut s = hypervisor_low(on, SIZE)?;
    let mut other = s.vm.vcpu(1)?;
    let gpa = s.slot.gpa;
    let second = (gpa + SIZE, LOW.offset + SIZE);
    let rebound = s.vm.add_private(SLOT + 1, second.0, REBOUND, on.kind, &s.fd, second.1)?;
    let mut rebound = Some(rebound);
    s.vm.set_private(second.0, REBOUND)?;
    let (runs, over) = (AtomicU64::new(0), AtomicBool::new(false));
    let Setup { vm, vcpu, fd, slot, .. } = &mut s;
    let (vm, fd, slot) = (&*vm, &*fd, &*slot);
    let conversions = vm.conversions();
    thread::scope(|scope| -> CaseResult {
        let nested = scope.spawn(|| -> CaseResult {
            let (mut n, mut taken) = (0, Vec::new());
            while n < ROUNDS || !over.load(Ordering::Relaxed) {
                n += 1;
                let page = CODE.start + n % (CODE.end - CODE.start);
                let code = gpa + page * PAGE;
                // At once a second code in the same page, before the other thread has had all pages
                // of nested guests unmapped.
                for number in [0x1000_0000 + n as u32, 0x2000_0000 + n as u32] {
                    punch(fd, LOW.offset + page * PAGE, PAGE).context("punch the code")?;
                    // The new page must not be the old one, which was freed last.
                    let spare = on.create(vm, SPARE)?;
                    allocate(&spare, 0, SPARE)?;
                    taken.truncate(64);
                    taken.insert(0, spare);
                    vcpu.store(code, nested::number_and_halt(number))?;
                    // The second time its page is mapped, unless others were unmapped with it.
                    for _ in 0..2 {
                        nested::prepare(vm, code, nested::TABLES);
                        let exit = nested::run(vm, vcpu)?;
                        ensure!(exit == EXIT_HLT, "run {n}: the nested guest exits with {exit:#x}");
                        let told = nested::number(vm);
                        ensure!(told == number, "run {n}: {told:#x} was executed, not {number:#x}");
                    }
                }
                runs.store(n, Ordering::Relaxed);
            }
            Ok(())
        });
        let mut work = || -> CaseResult {
            let mut round = 0;
            while (round < ROUNDS || runs.load(Ordering::Relaxed) < ROUNDS) && !nested.is_finished()
            {
                round += 1;
                let (mine, theirs) = (Pattern::Generation(round), Pattern::Generation(!round));
                for pages in [0..CODE.start, CODE.end..SIZE / PAGE] {
                    let (start, len) = (pages.start * PAGE, (pages.end - pages.start) * PAGE);
                    other.fill(gpa + start, len, mine)?;
                    let half = len / 2;
                    for &by in conversions {
                        vm.convert(by, gpa + start, half, false)?;
                        fill_view_part(slot, start, half, theirs);
                        other.verify(gpa + start, half, theirs).context("shared")?;
                        vm.convert(by, gpa + start, half, true)?;
                        other.verify(gpa + start, len, mine).context("private")?;
                    }
                    punch(fd, LOW.offset + start, half).context("punch")?;
                    other.verify(gpa + start, half, Pattern::ZERO).context("punched")?;
                    other.verify(gpa + start + half, len - half, mine).context("beside a hole")?;
                }
                other.fill(second.0, REBOUND, mine)?;
                let view = vm.delete(rebound.take().context("the slot is gone")?)?;
                let private = Some((on.kind, fd.as_fd(), second.1));
                rebound = Some(vm.add(SLOT + 1, second.0, view, private)?);
                other.verify(second.0, REBOUND, mine).context("bound again")?;
            }
            Ok(())
        };
        let result = work();
        over.store(true, Ordering::Relaxed);
        let nested = nested.join().map_err(|_| anyhow!("the nested guest's thread panicked"))?;
        println!("the nested guest ran {} times", 4 * runs.load(Ordering::Relaxed));
        nested.and(result)
    })
}

/// A slot that is being deleted has no rmaps if the first shadow root is allocated meanwhile; a hole in
/// its file must not follow them.
///
/// The deletion waits as long as another vCPU is in the middle of an access by KVM to memory that the
/// VMM does not give.
fn hole_beside_the_first_shadow_root_and_a_deletion(on: &'static Backend) -> CaseResult {
    let _pages = base_pages()?;
    let mut s = hypervisor_low(on, SIZE)?;
    let mut second = s.vm.vcpu(1)?;
    s.vcpu.store(s.slot.gpa, 1)?;
    nested::prepare(&s.vm, nested::CODE, nested::TABLES);
    let at = s.slot.gpa + SIZE;
    let missing = s.vm.add_shared(SLOT + 1, at, small_pages(PAGE)?)?;
    let faults = Userfault::on(&missing.view)?;

    let deleter = AtomicI32::new(0);
    thread::scope(|scope| -> CaseResult {
        let output = scope.spawn(|| second.start(Command::Output, &[at, 1, PORT]));
        let vm = &s.vm;
        let mut meanwhile = || -> Result<thread::ScopedJoinHandle<SysResult<()>>> {
            wait_until("KVM waits for memory", || faults.has_event())?;
            let deletion = scope.spawn(|| {
                deleter.store(thread_id(), Ordering::Relaxed);
                vm.raw_delete(SLOT)
            });
            wait_until("the deletion waits for KVM", || {
                Ok(sleeps_in(deleter.load(Ordering::Relaxed), &["synchronize_srcu"]))
            })?;
            let exit = nested::run(vm, &mut s.vcpu)?;
            ensure!(exit == EXIT_HLT, "the nested guest exits with {exit:#x}");
            // Also one that does not begin where the slot does: KVM ends a walk at a null pointer.
            punch(&s.fd, LOW.offset + PAGE, SIZE - PAGE).context("punch most of it")?;
            punch(&s.fd, LOW.offset, SIZE).context("punch")?;
            ensure!(!deletion.is_finished(), "the deletion did not wait");
            Ok(deletion)
        };
        let result = meanwhile();
        faults.zero(&missing.view, 0).context("UFFDIO_ZEROPAGE")?;
        let exit = output.join().map_err(|_| anyhow!("the vCPU thread panicked"))??;
        ensure!(exit == Exit::Port { port: PORT as u16, write: true }, "{exit:x?}");
        result?.join().map_err(|_| anyhow!("the deleting thread panicked"))?.context("delete")
    })?;
    on.check_allocated(&s.fd, 0, "punched")?;
    // The slot has rmaps from the start when it is made anew.
    s.bind_again()?;
    s.vcpu.store(s.slot.gpa, nested::HLT)?;
    nested::prepare(&s.vm, s.slot.gpa, nested::TABLES);
    let exit = nested::run(&s.vm, &mut s.vcpu)?;
    ensure!(exit == EXIT_HLT, "then the nested guest exits with {exit:#x}");
    punch(&s.fd, LOW.offset, SIZE).context("punch again")
}
