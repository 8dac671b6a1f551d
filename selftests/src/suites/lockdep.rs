// SPDX-License-Identifier: GPL-2.0
//! The documented order of locks is the one that lockdep has seen. Needs a kernel with lockdep:
//! `make check KERNEL=debug`.
//!
//! An inversion shows twice: lockdep reports it when it happens, and here the classes reach each
//! other in both directions.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context, Result, ensure};

use crate::ktap::{CaseResult, Suite, skip};
use crate::pressure::{self, Cgroup, Swap};
use crate::support::setup::{BOTH, GUEST, SLOT, Setup};
use crate::sys::{lock_own_memory, punch};
use crate::vm::Private;
use crate::{GIB, MIB, PAGE, suite};

pub static SUITE: Suite = suite!("lockdep", [locks_are_taken_in_the_documented_order]);

/// From the outermost to the innermost; by how the names of the classes end.
/// `Documentation/design.rst` has them, but for folio locks, which lockdep does not know.
const ORDER: [&str; 4] = ["kvm->slots_lock", "kvm->slots_arch_lock", "mmu_lock", "memfile_node"];
/// Between the second and the third. The inode locks of each type of file system are a class.
const INODE: &str = "i_mutex_key";
/// Held by a task that reclaims.
const RECLAIM: &str = "fs_reclaim";

/// The direct dependencies: which class was taken under which.
struct Classes(BTreeMap<String, BTreeSet<String>>);

impl Classes {
    fn read() -> Result<Classes> {
        let text = match fs::read_to_string("/proc/lockdep") {
            Ok(text) => text,
            Err(_) => return skip("the kernel has no lockdep"),
        };
        Ok(Classes::parse(&text))
    }

    /// From the text of `/proc/lockdep`.
    fn parse(text: &str) -> Classes {
        let mut classes = BTreeMap::<String, BTreeSet<String>>::new();
        let mut last = String::new();
        for line in text.lines() {
            // ` -> [ffffffff82a0b2c0] name`, or an address, usage and `: name`.
            if let Some((_, name)) = line.strip_prefix(" -> [").and_then(|l| l.split_once("] ")) {
                classes.entry(last.clone()).or_default().insert(name.trim().to_owned());
            } else if let Some((_, name)) = line.split_once(": ").filter(|_| !line.starts_with(' '))
            {
                last = name.rsplit(": ").next().unwrap_or(name).trim().to_owned();
                classes.entry(last.clone()).or_default();
            }
        }
        Classes(classes)
    }

    fn named<'a>(&'a self, end: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        let base = |name: &str| name.split('#').next().unwrap_or(name).to_owned();
        self.0.keys().filter(move |name| base(name).ends_with(end)).map(String::as_str)
    }

    /// Was a lock of `inner` ever taken while one of `outer` was held?
    fn reaches(&self, outer: &str, inner: &str) -> bool {
        let inner: BTreeSet<&str> = self.named(inner).collect();
        let mut seen = BTreeSet::new();
        let mut next: Vec<&str> = self.named(outer).collect();
        while let Some(name) = next.pop() {
            for below in self.0.get(name).into_iter().flatten() {
                if inner.contains(below.as_str()) {
                    return true;
                }
                if seen.insert(below.as_str()) {
                    next.push(below);
                }
            }
        }
        false
    }

    /// Fail unless the locks were taken in the documented order, and in no other.
    fn expect_order(&self) -> Result<()> {
        for name in ORDER.iter().chain([&INODE, &RECLAIM]) {
            ensure!(self.named(name).next().is_some(), "lockdep does not know {name}");
        }
        let pairs = (0..ORDER.len()).flat_map(|n| (n + 1..ORDER.len()).map(move |m| (n, m)));
        let mut pairs: Vec<(&str, &str)> = pairs.map(|(n, m)| (ORDER[n], ORDER[m])).collect();
        pairs.extend([(ORDER[1], INODE), (INODE, ORDER[2]), (RECLAIM, ORDER[2])]);
        for (outer, inner) in pairs {
            ensure!(self.reaches(outer, inner), "{inner} was never taken under {outer}");
            // Some file systems take locks of other file systems under their own; only memfile's
            // count.
            if outer != INODE && inner != INODE {
                ensure!(!self.reaches(inner, outer), "{outer} was taken under {inner}");
            }
        }
        Ok(())
    }
}

/// Operations that take these locks.
fn work() -> Result<()> {
    lock_own_memory()?;
    let (cgroup, _swap) = (Cgroup::enter()?, Swap::on(16 * MIB)?);
    let mut s = Setup::with_flags(BOTH, MIB)?;
    s.vcpu.fill(s.slot.gpa, s.slot.size, GUEST)?;
    // A hole in two slots: only then KVM asks the core for more ranges under the VM's lock.
    let more = s.vm.add_private(SLOT + 1, s.slot.gpa + GIB, MIB, Private::Memfile, &s.fd, MIB)?;
    punch(&s.fd, MIB - 8 * PAGE, 16 * PAGE)?;
    for _ in 0..4 {
        pressure::drop_caches()?;
        cgroup.reclaim(MIB)?;
    }
    pressure::compact()?;
    s.vcpu.verify_pages(s.slot.gpa + 16 * PAGE, PAGE, GUEST)?;
    s.vm.raw_delete(more.id)?;
    s.vm.raw_delete(s.slot.id).context("delete the slot")
}

fn locks_are_taken_in_the_documented_order() -> CaseResult {
    drop(Classes::read()?);
    work()?;
    Classes::read()?.expect_order()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a kernel prints it whose tasks have taken all locks in the documented order.
    const GOOD: &str = "\
all lock classes:
ffffffff82a0b2c0 FD:   90 BD:    1 +.+.: &kvm->slots_lock
 -> [ffffffff82a0b2c8] &kvm->slots_arch_lock

ffffffff82a0b2c8 FD:   80 BD:    2 +.+.: &kvm->slots_arch_lock
 -> [ffffffff82b00010] &sb->s_type->i_mutex_key#7
 -> [ffffffff82c00020] fs_reclaim

ffffffff82b00010 FD:   70 BD:    3 ++++: &sb->s_type->i_mutex_key#7
 -> [ffffffff82a0b2d0] &(kvm)->mmu_lock

ffffffff82c00020 FD:   60 BD:    4 +.+.: fs_reclaim
 -> [ffffffff82a0b2d0] &(kvm)->mmu_lock

ffffffff82a0b2d0 FD:    2 BD:    5 ++++: &(kvm)->mmu_lock
 -> [ffffffffc0001000] memfile_node

ffffffffc0001000 FD:    1 BD:    6 +.+.: memfile_node
";

    #[test]
    fn documented_order_is_accepted() {
        Classes::parse(GOOD).expect_order().unwrap();
    }

    /// Directly, and by way of another lock.
    #[test]
    fn inverted_order_is_refused() {
        for (last, under) in [
            (" -> [ffffffff82a0b2d0] &(kvm)->mmu_lock", "mmu_lock was taken under memfile_node"),
            (" -> [ffffffff82c00020] fs_reclaim", "mmu_lock was taken under memfile_node"),
            (" -> [ffffffff82a0b2c0] &kvm->slots_lock", "slots_lock was taken under"),
        ] {
            let error = Classes::parse(&format!("{GOOD}{last}\n")).expect_order().unwrap_err();
            assert!(error.to_string().contains(under), "{last}: {error}");
        }
    }

    /// A lock that nobody took shows nothing.
    #[test]
    fn order_that_was_not_seen_is_refused() {
        let text = GOOD.replace(" -> [ffffffffc0001000] memfile_node\n", "");
        let error = Classes::parse(&text).expect_order().unwrap_err();
        assert!(error.to_string().contains("memfile_node was never taken"), "{error}");
    }
}
