// SPDX-License-Identifier: GPL-2.0
//! KVM_CAP_MEMFILE: the flags with which a VM's slots are registered (rule 8).

use std::os::fd::AsFd;
use std::sync::Barrier;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};

use crate::ktap::{CaseResult, Suite, missing_memfile};
use crate::pressure::{Cgroup, Swap};
use crate::support::setup::{
    BOTH, GUEST, HIDDEN, MOVABLE, PINNED, RECLAIMABLE, Setup, expect_as_vm_types_say,
};
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{Private, Vm, VmType};
use crate::{GIB, MIB, PAGE, mem, suite};

pub static SUITE: Suite = suite!(
    "cap",
    [
        check_on_the_device,
        check_on_a_vm,
        chosen_flags_reach_the_file,
        may_be_chosen_again,
        is_busy_with_a_private_slot,
        bad_arguments_are_refused,
        vm_without_private_memory_refuses,
        different_flags_on_one_file_are_refused,
        racing_bindings_leave_the_flags_of_the_winner,
        stronger_flags_join_while_others_are_bound,
        weaker_flags_are_refused_while_there_is_a_page,
        pages_in_swap_keep_their_promise,
        empty_file_may_be_anything_again,
    ]
);

/// A VM with private memory; SKIP if it has no KVM_CAP_MEMFILE.
fn protected() -> Result<Vm> {
    drop(memfile_unsized()?);
    let vm = Vm::protected()?;
    if vm.check_extension(KVM_CAP_MEMFILE) <= 0 {
        return missing_memfile("KVM has no KVM_CAP_MEMFILE");
    }
    Ok(vm)
}

fn choose(vm: &Vm, flags: u64) -> SysResult<()> {
    vm.raw_enable_cap(KVM_CAP_MEMFILE, flags)
}

/// The flags that fdinfo shows for a file.
fn flags_of(fd: impl AsFd) -> Result<String> {
    mem::fdinfo(fd, "memfile-flags")?.context("fdinfo has no memfile-flags")
}

fn check_on_the_device() -> CaseResult {
    drop(protected()?);
    expect_as_vm_types_say()
}

fn check_on_a_vm() -> CaseResult {
    let mask = protected()?.check_extension(KVM_CAP_MEMFILE);
    ensure!(mask == HIDDEN as i32, "a protected VM says {mask:#x}");
    let mask = Vm::new(VmType::Default)?.check_extension(KVM_CAP_MEMFILE);
    ensure!(mask == 0, "a default VM says {mask:#x}");
    Ok(())
}

fn chosen_flags_reach_the_file() -> CaseResult {
    for flags in [PINNED, HIDDEN, MOVABLE, RECLAIMABLE, BOTH] {
        let vm = protected()?;
        choose(&vm, flags).with_context(|| format!("choose {flags:#x}"))?;
        let fd = memfile(MIB)?;
        let slot = vm.add_private(1, GIB, MIB, Private::Memfile, &fd, 0)?;
        let got = flags_of(&fd)?;
        ensure!(got == format!("{flags:#x}"), "chose {flags:#x}, fdinfo says {got}");
        vm.set_private(GIB, MIB)?;
        vm.vcpu(0)?.store(GIB, 1)?;
        vm.delete(slot)?;
        let got = flags_of(&fd)?;
        ensure!(got == format!("{flags:#x}"), "unbound, fdinfo says {got}");
    }
    Ok(())
}

fn may_be_chosen_again() -> CaseResult {
    let vm = protected()?;
    let fd = memfile(MIB)?;
    for flags in [MOVABLE, RECLAIMABLE, PINNED, BOTH] {
        choose(&vm, PINNED)?;
        choose(&vm, flags)?;
        let slot = vm.add_private(1, GIB, MIB, Private::Memfile, &fd, 0)?;
        let got = flags_of(&fd)?;
        ensure!(got == format!("{flags:#x}"), "chose {flags:#x}, fdinfo says {got}");
        vm.delete(slot)?;
    }
    Ok(())
}

fn is_busy_with_a_private_slot() -> CaseResult {
    let vm = protected()?;
    let fd = memfile(2 * MIB)?;
    let first = vm.add_private(1, GIB, MIB, Private::Memfile, &fd, 0)?;
    let second = vm.add_private(2, 2 * GIB, MIB, Private::Memfile, &fd, MIB)?;
    for flags in [BOTH, PINNED] {
        expect_errno("two slots", choose(&vm, flags), &[Errno::EBUSY])?;
    }
    vm.delete(first)?;
    expect_errno("one slot left", choose(&vm, BOTH), &[Errno::EBUSY])?;
    vm.delete(second)?;
    choose(&vm, BOTH).context("no slot left")
}

fn bad_arguments_are_refused() -> CaseResult {
    let vm = protected()?;
    let refused = |what: &str, flags, args| {
        let result = vm.raw_enable_cap_full(KVM_CAP_MEMFILE, flags, args);
        expect_errno(what, result, &[Errno::EINVAL])
    };
    for bit in 4..64 {
        refused(&format!("bit {bit}"), 0, [PINNED | 1 << bit, 0, 0, 0])?;
    }
    for flags in [0, MEMFILE_F_UNMOVABLE, MEMFILE_F_UNRECLAIMABLE, PINNED & !BOTH] {
        refused(&format!("{flags:#x} without USER_INACCESSIBLE"), 0, [flags, 0, 0, 0])?;
    }
    for bit in 0..32 {
        refused(&format!("cap.flags bit {bit}"), 1 << bit, [PINNED, 0, 0, 0])?;
    }
    for n in 1..4 {
        let mut args = [PINNED, 0, 0, 0];
        args[n] = 1;
        refused(&format!("args[{n}]"), 0, args)?;
    }
    // A refused request leaves the default.
    let fd = memfile(MIB)?;
    let _slot = vm.add_private(1, GIB, MIB, Private::Memfile, &fd, 0)?;
    let got = flags_of(&fd)?;
    ensure!(got == format!("{PINNED:#x}"), "fdinfo says {got}");
    Ok(())
}

fn vm_without_private_memory_refuses() -> CaseResult {
    drop(protected()?);
    let vm = Vm::new(VmType::Default)?;
    expect_errno("default VM", choose(&vm, PINNED), &[Errno::EINVAL])
}

fn different_flags_on_one_file_are_refused() -> CaseResult {
    let (a, b) = (protected()?, protected()?);
    let fd = memfile(2 * MIB)?;
    choose(&b, MOVABLE)?;
    let slot = a.add_private(1, GIB, MIB, Private::Memfile, &fd, 0)?;
    let other = crate::vm::small_pages(MIB)?;
    let half = Some((Private::Memfile, fd.as_fd(), MIB));
    let request = crate::vm::region(1, GIB, &other, half);
    expect_errno("other flags", b.raw_set_region(&request), &[Errno::EINVAL])?;
    let got = flags_of(&fd)?;
    ensure!(got == format!("{PINNED:#x}"), "the refused binding left {got}");
    a.delete(slot)?;
    b.raw_set_region(&request).context("alone on the file")?;
    let got = flags_of(&fd)?;
    ensure!(got == format!("{MOVABLE:#x}"), "fdinfo says {got}");
    Ok(())
}

/// Two VMs that request different flags, each for its own half of one file: neither asks for more
/// than the other, so the second is refused, and the file always has the flags of the first.
fn racing_bindings_leave_the_flags_of_the_winner() -> CaseResult {
    let wishes = [RECLAIMABLE, MOVABLE];
    let vms = [protected()?, protected()?];
    choose(&vms[0], wishes[0])?;
    choose(&vms[1], wishes[1])?;
    let fd = memfile(2 * MIB)?;
    let view = crate::vm::small_pages(MIB)?;
    let (barrier, rounds) = (Barrier::new(2), 200);
    // The result of each round for each VM.
    let race = |n: u64| -> Result<Vec<bool>> {
        let vm = &vms[n as usize];
        let wish = wishes[n as usize];
        let half = Some((Private::Memfile, fd.as_fd(), n * MIB));
        let request = crate::vm::region(1, GIB, &view, half);
        let mut won = Vec::new();
        let mut result = Ok(());
        for _ in 0..rounds {
            barrier.wait();
            let bound = vm.raw_set_region(&request);
            barrier.wait();
            // As long as it is not undone.
            let got = flags_of(&fd);
            barrier.wait();
            won.push(bound.is_ok());
            let check = || match bound {
                Ok(()) => {
                    vm.raw_delete(1)?;
                    let got = got?;
                    ensure!(got == format!("{wish:#x}"), "wished {wish:#x}, fdinfo says {got}");
                    Ok(())
                }
                Err(errno) => expect_errno("the loser", Err::<(), _>(errno), &[Errno::EINVAL]),
            };
            // The other thread waits for us at the barrier until the end.
            result = result.and(check());
            barrier.wait();
        }
        result.map(|()| won)
    };
    let (first, second) = thread::scope(|scope| {
        let other = scope.spawn(|| race(1));
        (race(0), other.join())
    });
    let (first, second) = (first?, second.map_err(|_| anyhow!("the other VM panicked"))??);
    ensure!(first.iter().zip(&second).all(|(a, b)| a != b), "both or none were bound");
    let won = first.iter().filter(|&&won| won).count();
    println!("of {rounds} races one VM won {won}");
    let last = wishes[usize::from(!first[rounds - 1])];
    let got = flags_of(&fd)?;
    ensure!(got == format!("{last:#x}"), "unbound, fdinfo says {got}, the last was {last:#x}");
    Ok(())
}

/// Every pair of choices, of the first VM and of the second.
fn choices() -> impl Iterator<Item = (u64, u64)> {
    let all = [PINNED, MOVABLE, RECLAIMABLE, BOTH];
    all.into_iter().flat_map(move |first| all.into_iter().map(move |second| (first, second)))
}

/// Fail unless the file has these flags.
fn expect_flags(fd: impl AsFd, wanted: u64, when: &str) -> CaseResult {
    let got = flags_of(fd)?;
    ensure!(got == format!("{wanted:#x}"), "{when}: fdinfo says {got}, wanted {wanted:#x}");
    Ok(())
}

/// Bind the second MiB of a file in a VM that has chosen these flags: the VM, or the errno.
fn bind_second(fd: impl AsFd, flags: u64) -> Result<SysResult<Vm>> {
    let vm = protected()?;
    choose(&vm, flags)?;
    let view = crate::vm::small_pages(MIB)?;
    let request = crate::vm::region(1, GIB, &view, Some((Private::Memfile, fd.as_fd(), MIB)));
    Ok(vm.raw_set_region(&request).map(|()| vm))
}

fn stronger_flags_join_while_others_are_bound() -> CaseResult {
    for (first, second) in choices() {
        let what = format!("{first:#x}, then {second:#x}");
        let mut s = Setup::with_flags(first, MIB)?;
        s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
        let result = bind_second(&s.fd, second)?;
        if first & !second == 0 {
            let other = result.with_context(|| what.clone())?;
            expect_flags(&s.fd, second, &what)?;
            // The flags belong to the file, also when the VM that asked for them is gone.
            drop(other);
            expect_flags(&s.fd, second, &format!("{what}, and gone"))?;
        } else {
            expect_errno(&what, result.map(drop), &[Errno::EINVAL])?;
            expect_flags(&s.fd, first, &what)?;
        }
        s.vcpu.verify(s.slot.gpa, s.slot.size, GUEST).with_context(|| what.clone())?;
        s.vm.raw_delete(s.slot.id)?;
    }
    Ok(())
}

/// A file with one page, and no binding.
fn weaker_flags_are_refused_while_there_is_a_page() -> CaseResult {
    for (first, second) in choices() {
        let what = format!("{first:#x}, then {second:#x}");
        let fd = memfile(2 * MIB)?;
        let vm = protected()?;
        choose(&vm, first)?;
        let slot = vm.add_private(1, GIB, MIB, Private::Memfile, &fd, 0)?;
        vm.delete(slot)?;
        // A page keeps the promise of the flags at the time of its allocation, whichever task
        // allocates it.
        allocate(&fd, 0, PAGE)?;
        let result = bind_second(&fd, second)?;
        if first & !second == 0 {
            result.with_context(|| what.clone())?;
            expect_flags(&fd, second, &what)?;
        } else {
            expect_errno(&what, result.map(drop), &[Errno::EINVAL])?;
            expect_flags(&fd, first, &what)?;
        }
    }
    Ok(())
}

/// A page that is in swap comes back with its promises.
fn pages_in_swap_keep_their_promise() -> CaseResult {
    let _pages = crate::pressure::base_pages()?;
    lock_own_memory()?;
    let (cgroup, swap) = (Cgroup::enter()?, Swap::on(16 * MIB)?);
    let fd = memfile(2 * MIB)?;
    let vm = protected()?;
    choose(&vm, RECLAIMABLE)?;
    let slot = vm.add_private(1, GIB, MIB, Private::Memfile, &fd, 0)?;
    vm.set_private(GIB, MIB)?;
    vm.vcpu(0)?.fill(GIB, MIB, GUEST)?;
    vm.delete(slot)?;
    for _ in 0..8 {
        cgroup.reclaim(2 * MIB)?;
    }
    swap.expect_used(MIB, "after reclaim")?;
    let pages = mem::fdinfo(&fd, "memfile-pages")?;
    ensure!(pages.as_deref() == Some("0"), "pages are in memory: {pages:?}");
    for weaker in [BOTH, MOVABLE] {
        let result = bind_second(&fd, weaker)?.map(drop);
        expect_errno(&format!("{weaker:#x}"), result, &[Errno::EINVAL])?;
    }
    expect_flags(&fd, RECLAIMABLE, "refused")?;
    punch(&fd, 0, MIB)?;
    drop(bind_second(&fd, MOVABLE)?.context("nothing is in swap any more")?);
    expect_flags(&fd, MOVABLE, "empty")
}

/// No page with the old promise is left.
fn empty_file_may_be_anything_again() -> CaseResult {
    for (first, second) in choices() {
        let what = format!("{first:#x}, then {second:#x}");
        let mut s = Setup::with_flags(first, MIB)?;
        s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
        punch(&s.fd, 0, 2 * MIB)?;
        // A consumer that has bound the file relies on the flags for new pages.
        let result = bind_second(&s.fd, second)?;
        if first & !second == 0 {
            drop(result.with_context(|| what.clone())?);
        } else {
            expect_errno(&format!("bound, {what}"), result.map(drop), &[Errno::EINVAL])?;
        }
        s.vm.raw_delete(s.slot.id)?;
        let result = bind_second(&s.fd, first & second)?;
        drop(result.with_context(|| format!("{what}: as weak as either"))?);
        drop(bind_second(&s.fd, second)?.with_context(|| what.clone())?);
        expect_flags(&s.fd, second, &what)?;
    }
    Ok(())
}
