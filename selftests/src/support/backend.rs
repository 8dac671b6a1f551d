// SPDX-License-Identifier: GPL-2.0
//! The kinds of memory that one suite runs on, and what a case says about each of them.
//!
//! A suite that is declared with [`crate::conformance!`] runs on every [`Backend`], by the same
//! code: `punch` on a memfile, `punch_gmem` on a guest_memfd, and so on. A case gets the backend
//! and asks it for files and VMs.
//!
//! A case has two ways to judge a result. It checks results that must be the same on every kind of
//! memory, such as the content that a guest reads, as any other test does. It passes results that
//! may differ from kind to kind, such as an errno, to [`Backend::errno`] or [`Backend::expect`]. On
//! a memfile these fail if the result is not as promised. On every backend they write it as a
//! diagnostic,
//!
//! ```text
//! # does: mmap -> EPERM
//! ```
//!
//! and `scripts/differences` compares: each difference of a backend from a memfile must be in
//! `scripts/differences.toml`, with the reason.

use std::fmt;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};

use crate::ktap::CaseResult;
use crate::pressure::{Pool, Setting, Usage};
use crate::skip::{missing_memfile, skip};
use crate::sys::{self, Errno, SysResult};
use crate::uapi::*;
use crate::vm::{Private, Slot, Vm, VmType, small_pages, small_pages_aligned};
use crate::{MIB, PAGE, mem};

/// A kind of memory for guests. To add one: a constant below, and a line in
/// [`crate::conformance!`] and in `scripts/differences.toml`.
#[derive(Debug)]
pub struct Backend {
    /// How a slot binds the file.
    pub kind: Private,
    /// More flags for the call that makes the file: `memfd_create`, or `KVM_CREATE_GUEST_MEMFD`.
    pub flags: u64,
    /// The `MEMFILE_F_*` that the VM chooses, if it chooses.
    pub choice: Option<u64>,
    /// The type of VM that can have such memory. In one of [`VmType::Default`] nothing can be
    /// converted: all of the guest's memory is the file's.
    pub vm: VmType,
    /// Bytes of the pages that the file is made of, if shmem makes no huge ones. A hole frees whole
    /// ones.
    pub page: u64,
    /// Whether the kernel says how much the file holds, in st_blocks.
    pub counted: bool,
}

/// The reference: what it promises is in `Documentation/rules.rst`.
pub static MEMFILE: Backend = Backend {
    kind: Private::Memfile,
    flags: 0,
    choice: None,
    vm: VmType::Protected,
    page: PAGE,
    counted: true,
};

/// The same out of the kernel's direct map.
pub static HIDDEN: Backend =
    Backend { choice: Some(MEMFILE_F_ALL | MEMFILE_F_KERNEL_INACCESSIBLE), ..MEMFILE };

/// The same with pages of 2 MiB from the pool of hugetlbfs.
pub static HUGE: Backend = Backend {
    kind: Private::Memfile,
    flags: (MFD_HUGETLB | 21 << MFD_HUGE_SHIFT) as u64,
    choice: None,
    vm: VmType::Protected,
    page: crate::HUGE,
    counted: true,
};

/// The same with pages of 1 GiB, of which the machine has one.
pub static GIGANTIC: Backend =
    Backend { flags: (MFD_HUGETLB | 30 << MFD_HUGE_SHIFT) as u64, page: crate::GIB, ..HUGE };

/// The kernel's own private memory.
pub static GMEM: Backend = Backend {
    kind: Private::GuestMemfd,
    flags: 0,
    choice: None,
    vm: VmType::Protected,
    page: PAGE,
    counted: false,
};

/// A guest_memfd that the host can map: not private at all, and only in VMs without private memory.
pub static GMEM_MMAP: Backend = Backend {
    kind: Private::GuestMemfd,
    flags: GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED,
    choice: None,
    vm: VmType::Default,
    page: PAGE,
    counted: false,
};

impl PartialEq for Backend {
    fn eq(&self, other: &Backend) -> bool {
        std::ptr::eq(self, other)
    }
}

/// The backend of helpers that know only how the slot binds the file.
impl From<Private> for &'static Backend {
    fn from(kind: Private) -> &'static Backend {
        match kind {
            Private::Memfile => &MEMFILE,
            Private::GuestMemfd => &GMEM,
        }
    }
}

impl Backend {
    /// Sets the machine up for the time of a case: hugetlbfs an allowance to take pages
    /// from free memory, or a page that was put aside at boot.
    pub fn prepare(&self) -> Result<Option<Setting>> {
        if *self == HUGE {
            return Pool::of(self.page)?.overcommit(512).map(Some);
        }
        if *self == GIGANTIC && Pool::of(self.page)?.usage()?.free == 0 {
            return skip("no page of 1 GiB is free");
        }
        Ok(None)
    }

    /// Run a case. It leaves the pool of huge pages as it was.
    pub fn run(&'static self, case: fn(&'static Backend) -> CaseResult) -> CaseResult {
        let _prepared = self.prepare()?;
        let before = self.pool()?;
        case(self)?;
        before.map_or(Ok(()), |before| Pool::of(self.page)?.expect_same(before))
    }

    /// The figures of the pool of huge pages that the pages come from, if they do.
    pub fn pool(&self) -> Result<Option<Usage>> {
        if self.page == PAGE { Ok(None) } else { Pool::of(self.page)?.usage().map(Some) }
    }

    /// Whether memfile's promises are its own.
    fn promises(&self) -> bool {
        self.kind == Private::Memfile
    }

    /// Whether parts of a guest's memory can be converted, so that it has a shared side.
    pub fn converts(&self) -> bool {
        self.vm == VmType::Protected
    }

    /// A VM that can have such memory; SKIP if this kernel has none.
    pub fn vm(&self) -> Result<Vm> {
        let vm = Vm::new(self.vm)?;
        if self.kind == Private::GuestMemfd {
            let has = vm.check_extension(KVM_CAP_GUEST_MEMFD) > 0;
            let flags = vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS).max(0) as u64;
            if !has || self.flags & !flags != 0 {
                return skip(format!("KVM has no guest_memfd with flags {:#x}", self.flags));
            }
        }
        if let Some(flags) = self.choice {
            drop(self.new_file()?);
            vm.raw_enable_cap(KVM_CAP_MEMFILE, flags)
                .with_context(|| format!("choose {flags:#x}"))?;
        }
        Ok(vm)
    }

    /// A file of exactly `size` bytes for `vm`.
    pub fn raw_create(&self, vm: &Vm, size: u64) -> SysResult<OwnedFd> {
        match self.kind {
            Private::Memfile => {
                let fd = self.raw_unsized()?;
                sys::ftruncate(&fd, size)?;
                Ok(fd)
            }
            Private::GuestMemfd => vm.raw_guest_memfd(size, self.flags),
        }
    }

    /// A memfile without a size.
    pub fn raw_unsized(&self) -> SysResult<OwnedFd> {
        sys::memfd_create(MFD_CLOEXEC | MFD_INACCESSIBLE | self.flags as u32)
    }

    /// A file for `vm` of at least `size` bytes, in whole pages; SKIP where the kernel has none.
    pub fn create(&self, vm: &Vm, size: u64) -> Result<OwnedFd> {
        if self.kind == Private::Memfile {
            drop(self.new_file()?);
        }
        let size = size.next_multiple_of(self.page);
        self.raw_create(vm, size).with_context(|| format!("a file of {} KiB", size >> 10))
    }

    /// A memfile without a size; SKIP where the kernel has none.
    pub fn new_file(&self) -> Result<OwnedFd> {
        match self.raw_unsized() {
            Ok(fd) => Ok(fd),
            Err(Errno::EINVAL) => missing_memfile("the kernel does not know MFD_INACCESSIBLE"),
            Err(Errno::EOPNOTSUPP) => missing_memfile("memfile.ko is not loaded"),
            Err(errno) => bail!("memfd_create(MFD_INACCESSIBLE): {errno}"),
        }
    }

    /// A file that is in no slot; see [`Backend::create`].
    pub fn file(&self, size: u64) -> Result<OwnedFd> {
        self.create(&self.vm()?, size)
    }

    /// Bytes of a slot that has one of the pages as a whole, if it begins where the page does, and a MiB
    /// at least. Of gigantic ones, [`Backend::add_slot`] makes it that large.
    pub fn whole(&self) -> u64 {
        if *self == GIGANTIC { MIB } else { MIB.max(self.page) }
    }

    /// Whether KVM can map huge pages of hugetlbfs as wholes where a slot begins.
    fn agrees(&self, gpa: u64, offset: u64) -> bool {
        self.page != PAGE && gpa % self.page == 0 && offset % self.page == 0
    }

    /// A private slot of at least `size` bytes from byte `offset` of the file on: of a gigantic page
    /// all, if the slot begins where the page does, for KVM maps the page as one only then. The size
    /// that the slot is said to have is what the case uses.
    pub fn add_slot(
        &self,
        vm: &Vm,
        id: u32,
        (gpa, offset): (u64, u64),
        size: u64,
        fd: impl AsFd,
    ) -> Result<Slot> {
        let view = if self.agrees(gpa, offset) {
            let bytes = if *self == GIGANTIC { size.next_multiple_of(self.page) } else { size };
            small_pages_aligned(bytes, self.page)?
        } else {
            small_pages(size)?
        };
        let slot = vm.add(id, gpa, view, Some((self.kind, fd.as_fd(), offset)))?;
        self.set_private(vm, slot.gpa, slot.size)?;
        Ok(Slot { size, ..slot })
    }

    /// Fail unless KVM has mapped each huge page of hugetlbfs that the slot has all of as one. The
    /// slot begins at byte `offset` of the file.
    pub fn expect_whole(&self, vm: &Vm, slot: &Slot, offset: u64) -> Result<()> {
        if self.agrees(slot.gpa, offset) {
            let level = if *self == GIGANTIC { "pages_1g" } else { "pages_2m" };
            let (mapped, wanted) = (vm.stats()?.get(level)?, slot.view.len() / self.page);
            ensure!(mapped == wanted, "{level} is {mapped}, not {wanted}");
        }
        Ok(())
    }

    /// Make a part of a guest's memory private, where there is anything else.
    pub fn set_private(&self, vm: &Vm, gpa: u64, size: u64) -> Result<()> {
        if self.converts() { vm.set_private(gpa, size) } else { Ok(()) }
    }

    /// Write down what it does; fail if `got` is not what a memfile promises.
    pub fn expect<T: PartialEq + fmt::Display>(
        &self,
        what: &str,
        got: T,
        promised: T,
    ) -> Result<()> {
        note(what, &got.to_string());
        ensure!(!self.promises() || got == promised, "{what}: {got}, wanted {promised}");
        Ok(())
    }

    /// Write down how a call ends; fail if a memfile does not refuse it with one of
    /// `promised`.
    pub fn errno<T: fmt::Debug>(
        &self,
        what: &str,
        result: SysResult<T>,
        promised: &[Errno],
    ) -> Result<()> {
        note(what, &ending(&result));
        if self.promises() { sys::expect_errno(what, result, promised) } else { Ok(()) }
    }

    /// Write down how a call ends that must succeed on a memfile. Returns its result, if it does.
    pub fn works<T>(&self, what: &str, result: SysResult<T>) -> Result<Option<T>> {
        note(what, &ending(&result));
        match result {
            Ok(value) => Ok(Some(value)),
            Err(errno) if self.promises() => Err(errno).with_context(|| what.to_owned()),
            Err(_) => Ok(None),
        }
    }

    /// Write down how much the file holds by st_blocks, in its pages; fail if a memfile holds other
    /// than `bytes`.
    pub fn expect_allocated(&self, fd: impl AsFd, bytes: u64, when: &str) -> Result<()> {
        let got = sys::allocated(fd)?;
        self.expect(&format!("st_blocks, {when}"), self.pages(got), self.pages(bytes))
    }

    /// Fail if the file does not hold exactly `bytes`, where the kernel says how much it holds.
    pub fn check_allocated(&self, fd: impl AsFd, bytes: u64, when: &str) -> Result<()> {
        if self.counted { sys::expect_allocated(fd, bytes, when) } else { Ok(()) }
    }

    /// A size for people.
    fn pages(&self, bytes: u64) -> String {
        match (bytes / self.page, bytes % self.page) {
            (0, 0) => "nothing".into(),
            (1, 0) => "1 page".into(),
            (pages, 0) => format!("{pages} pages"),
            _ => format!("{bytes} bytes"),
        }
    }

    /// Pages of a memfile that are in memory; none where the kernel does not say.
    pub fn resident(&self, fd: impl AsFd) -> Result<Option<u64>> {
        if self.kind == Private::Memfile { mem::resident_pages(fd).map(Some) } else { Ok(None) }
    }
}

fn ending<T>(result: &SysResult<T>) -> String {
    match result {
        Ok(_) => "works".into(),
        Err(errno) => errno.to_string(),
    }
}

/// A line that `scripts/memfile/ktap.py` reads.
fn note(what: &str, does: &str) {
    println!("does: {what} -> {does}");
}

/// Declare `SUITES`: the same cases on every backend.
///
/// The cases of the first list run on all of them; those that convert memory between private and
/// shared, on all that have both; those of the third list on a memfile only. Those of the last list
/// run on a memfile of huge pages as well, which must do exactly as it does on small ones: not those
/// that count small pages, for which there is the suite `hugetlb`. With `huge: all` it is those of the
/// first three lists; `small` are then further ones for all kinds but huge pages, and `shmem` further
/// ones for a memfile of small pages only. `hidden` is the same as `huge` for a memfile that is not in
/// the kernel's direct map, and `gigantic` for one of pages of 1 GiB: the machine has one page, and to
/// clear it takes seconds, so these are the cases in which a page of that size makes a difference.
#[macro_export]
macro_rules! conformance {
    (
        $name:literal,
        [$($all:ident $(: $all_limit:literal)?),* $(,)?]
        $(, converting: [$($both:ident $(: $both_limit:literal)?),* $(,)?])?
        $(, memfile: [$($own:ident $(: $own_limit:literal)?),* $(,)?])?
        , huge: all $(, small: [$($small:ident $(: $small_limit:literal)?),* $(,)?])?
        $(, shmem: [$($shmem:ident $(: $shmem_limit:literal)?),* $(,)?])?
        $(, hidden: [$($out:ident $(: $out_limit:literal)?),* $(,)?])?
        $(, gigantic: [$($one:ident $(: $one_limit:literal)?),* $(,)?])? $(,)?
    ) => {
        $crate::conformance!(
            $name,
            [
                $($all $(: $all_limit)?,)*
                $($($small $(: $small_limit)?,)*)?
            ]
            $(, converting: [$($both $(: $both_limit)?,)*])?
            , memfile: [
                $($($own $(: $own_limit)?,)*)?
                $($($shmem $(: $shmem_limit)?,)*)?
            ]
            , huge: [
                $($all $(: $all_limit)?,)*
                $($($both $(: $both_limit)?,)*)?
                $($($own $(: $own_limit)?,)*)?
            ]
            $(, hidden: [$($out $(: $out_limit)?,)*])?
            $(, gigantic: [$($one $(: $one_limit)?,)*])?
        );
    };
    (
        $name:literal,
        [$($all:ident $(: $all_limit:literal)?),* $(,)?]
        $(, converting: [$($both:ident $(: $both_limit:literal)?),* $(,)?])?
        , huge: all, hidden: all
        $(, small: [$($small:ident $(: $small_limit:literal)?),* $(,)?])?
        $(, gigantic: [$($one:ident $(: $one_limit:literal)?),* $(,)?])? $(,)?
    ) => {
        $crate::conformance!(
            $name,
            [$($all $(: $all_limit)?,)*]
            $(, converting: [$($both $(: $both_limit)?,)*])?
            , huge: all
            $(, small: [$($small $(: $small_limit)?,)*])?
            , hidden: [
                $($all $(: $all_limit)?,)*
                $($($both $(: $both_limit)?,)*)?
            ]
            $(, gigantic: [$($one $(: $one_limit)?,)*])?
        );
    };
    (
        $name:literal,
        []
        , converting: [$($both:ident $(: $both_limit:literal)?),* $(,)?]
        $(, memfile: [$($own:ident $(: $own_limit:literal)?),* $(,)?])?
        $(, huge: [$($huge:ident $(: $huge_limit:literal)?),* $(,)?])?
        $(, hidden: [$($out:ident $(: $out_limit:literal)?),* $(,)?])?
        $(, gigantic: [$($one:ident $(: $one_limit:literal)?),* $(,)?])? $(,)?
    ) => {
        pub static SUITES: &[$crate::ktap::Suite] = &[
            $crate::conformance!(@suite MEMFILE, $name, [
                $($both $($both_limit)?,)*
                $($($own $($own_limit)?,)*)?
            ]),
            $($crate::conformance!(@suite HUGE, concat!($name, "_huge"), [
                $($huge $($huge_limit)?,)*
            ]),)?
            $($crate::conformance!(@suite HIDDEN, concat!($name, "_hidden"), [
                $($out $($out_limit)?,)*
            ]),)?
            $($crate::conformance!(@suite GIGANTIC, concat!($name, "_1g"), [
                $($one $($one_limit)?,)*
            ]),)?
            $crate::conformance!(@suite GMEM, concat!($name, "_gmem"), [
                $($both $($both_limit)?,)*
            ]),
        ];
    };
    (
        $name:literal,
        [$($all:ident $(: $all_limit:literal)?),* $(,)?]
        $(, converting: [$($both:ident $(: $both_limit:literal)?),* $(,)?])?
        $(, memfile: [$($own:ident $(: $own_limit:literal)?),* $(,)?])?
        $(, huge: [$($huge:ident $(: $huge_limit:literal)?),* $(,)?])?
        $(, hidden: [$($out:ident $(: $out_limit:literal)?),* $(,)?])?
        $(, gigantic: [$($one:ident $(: $one_limit:literal)?),* $(,)?])? $(,)?
    ) => {
        pub static SUITES: &[$crate::ktap::Suite] = &[
            $crate::conformance!(@suite MEMFILE, $name, [
                $($all $($all_limit)?,)*
                $($($both $($both_limit)?,)*)?
                $($($own $($own_limit)?,)*)?
            ]),
            $($crate::conformance!(@suite HUGE, concat!($name, "_huge"), [
                $($huge $($huge_limit)?,)*
            ]),)?
            $($crate::conformance!(@suite HIDDEN, concat!($name, "_hidden"), [
                $($out $($out_limit)?,)*
            ]),)?
            $($crate::conformance!(@suite GIGANTIC, concat!($name, "_1g"), [
                $($one $($one_limit)?,)*
            ]),)?
            $crate::conformance!(@suite GMEM, concat!($name, "_gmem"), [
                $($all $($all_limit)?,)*
                $($($both $($both_limit)?,)*)?
            ]),
            $crate::conformance!(@suite GMEM_MMAP, concat!($name, "_gmem_mmap"), [
                $($all $($all_limit)?,)*
            ]),
        ];
    };
    (@suite $backend:ident, $name:expr, [$($case:ident $($limit:literal)?,)*]) => {
        $crate::ktap::Suite {
            name: $name,
            cases: &[$($crate::ktap::Case {
                name: stringify!($case),
                func: || $crate::support::backend::$backend.run($case),
                limit: [$($limit,)? $crate::ktap::TIME_LIMIT][0],
            }),*],
            hidden: false,
            together: false,
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_memfile_must_be_as_promised() {
        for (backend, fails) in [(&MEMFILE, true), (&GMEM, false), (&GMEM_MMAP, false)] {
            let refused: SysResult = Err(Errno::EINVAL);
            assert_eq!(backend.errno("a", refused, &[Errno::EPERM]).is_err(), fails);
            assert!(backend.errno("a", refused, &[Errno::EINVAL]).is_ok());
            assert_eq!(backend.errno("a", Ok(1), &[Errno::EPERM]).is_err(), fails);
            assert_eq!(backend.works("a", refused).is_err(), fails);
            assert_eq!(backend.works("a", Ok(1)).ok(), Some(Some(1)));
            assert_eq!(backend.expect("a", 1, 2).is_err(), fails);
            assert!(backend.expect("a", 2, 2).is_ok());
        }
    }

    #[test]
    fn sizes_are_told_in_pages() {
        let told = [0, PAGE, 2 * PAGE, PAGE / 2].map(|bytes| MEMFILE.pages(bytes));
        assert_eq!(told, ["nothing", "1 page", "2 pages", "2048 bytes"]);
    }
}
