// SPDX-License-Identifier: GPL-2.0
//! The registration point with pages that are not of shmem (rule 21): `rust/test/memfile_store.rs`
//! in place of memfile.ko, under the same KVM and the same consumer.

use anyhow::{Context, Result, ensure};

use super::setup::{GUEST, LAYOUTS, SLOT, Setup};
use crate::consumer::{Consumer, Event, MAPPER, Span};
use crate::ktap::{CaseResult, Suite};
use crate::module::Module;
use crate::pattern::Pattern;
use crate::sys::*;
use crate::uapi::*;
use crate::vm::{Private, Vm};
use crate::{GIB, MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "store",
    [
        second_one_is_ebusy,
        guest_runs_on_its_pages,
        consumer_hears_it,
        stays_while_it_has_users,
        one_follows_the_other,
    ]
);

/// memfile_store.ko in place of memfile.ko, until it is dropped.
struct Swapped {
    // Dropped first: only one of the two can be there.
    store: Module,
    core: Module,
}

impl Swapped {
    fn new() -> Result<Swapped> {
        let swapped = Swapped { store: Module::store()?, core: Module::memfile()? };
        swapped.core.unload()?;
        swapped.store.load().context("load memfile_store.ko")?;
        Ok(swapped)
    }
}

fn second_one_is_ebusy() -> CaseResult {
    let (store, core) = (Module::store()?, Module::memfile()?);
    expect_errno("a store beside memfile.ko", store.load(), &[Errno::EBUSY])?;
    drop(memfile(MIB)?);
    core.unload()?;
    store.load().context("the store alone")?;
    expect_errno("memfile.ko beside a store", core.load(), &[Errno::EBUSY])?;
    drop(memfile(MIB)?);
    store.unload()
}

fn guest_runs_on_its_pages() -> CaseResult {
    let _swapped = Swapped::new()?;
    for layout in [LAYOUTS[0], LAYOUTS[4]] {
        let mut s = Setup::at(Private::Memfile, MIB, layout)?;
        s.fill_both()?;
        expect_allocated(&s.fd, 0, "shmem has none of the pages")?;
        punch(&s.fd, layout.offset + 8 * PAGE, 8 * PAGE)?;
        let gpa = s.slot.gpa;
        let check = |s: &mut Setup| -> Result<()> {
            s.vcpu.verify(gpa, 8 * PAGE, GUEST)?;
            s.vcpu.verify(gpa + 8 * PAGE, 8 * PAGE, Pattern::ZERO)?;
            s.vcpu.verify(gpa + 16 * PAGE, MIB - 16 * PAGE, GUEST)
        };
        check(&mut s).with_context(|| format!("{layout:x?}"))?;
        // They are the file's, not the slot's.
        s.vm.raw_delete(SLOT)?;
        s.bind_again()?;
        check(&mut s).with_context(|| format!("{layout:x?}, again"))?;
    }
    Ok(())
}

fn consumer_hears_it() -> CaseResult {
    let _swapped = Swapped::new()?;
    let fd = memfile(MIB)?;
    let mapper = Consumer::bound(&fd, MAPPER, Span { pgoff: 8, pages: 8, frame: 100 })?;
    let page = mapper.get(102)?;
    ensure!(mapper.get(102)? == page, "another page");
    expect_errno("outside", mapper.get(108), &[Errno::EINVAL])?;
    punch(&fd, 10 * PAGE, MIB)?;
    let heard = mapper.heard()?.events;
    ensure!(heard == [Event::Start(102, 108), Event::Flush, Event::End(102, 108)], "{heard:?}");
    mapper.get(102).map(drop).context("again")
}

fn stays_while_it_has_users() -> CaseResult {
    let swapped = Swapped::new()?;
    let fd = memfile(MIB)?;
    swapped.store.expect_in_use("a file")?;
    let mapper = Consumer::bound(&fd, MAPPER, Span::same(0, 8))?;
    drop(fd);
    swapped.store.expect_in_use("a binding")?;
    mapper.get(3).context("from a file that is closed")?;
    mapper.unbind()?;
    swapped.store.unload()?;
    let result = memfd_create(MFD_CLOEXEC | MFD_INACCESSIBLE);
    expect_errno("without any core", result, &[Errno::EOPNOTSUPP])
}

/// One VM sees both, one after the other.
fn one_follows_the_other() -> CaseResult {
    let (store, core) = (Module::store()?, Module::memfile()?);
    let vm = Vm::protected()?;
    let mut vcpu = vm.vcpu(0)?;
    vm.set_private(GIB, MIB)?;
    core.unload()?;
    for _ in 0..2 {
        for (module, in_shmem) in [(&core, MIB), (&store, 0)] {
            module.load()?;
            let fd = memfile(MIB)?;
            let slot = vm.add_private(1, GIB, MIB, Private::Memfile, &fd, 0)?;
            vcpu.verify(GIB, MIB, Pattern::ZERO)?;
            vcpu.fill(GIB, MIB, GUEST)?;
            expect_allocated(&fd, in_shmem, "filled by the guest")?;
            vcpu.verify(GIB, MIB, GUEST)?;
            vm.delete(slot)?;
            drop(fd);
            module.unload()?;
        }
    }
    Ok(())
}
