// SPDX-License-Identifier: GPL-2.0
//! Pages of the pool come from the nodes that the policy of the task and its cpuset name, whether a
//! guest touches them or fallocate() takes them, and go back to where they came from. The same cpuset
//! is the limit for small pages.
//!
//! `scripts/check` boots a machine with two nodes for this suite.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::guest::Command;
use crate::ktap::{CaseResult, Suite, skip};
use crate::pressure::{self, Block, Cgroup, Counts, MovableZone, Setting, frames};
use crate::support::backend;
use crate::support::setup::{BOTH, GUEST, PINNED, Setup};
use crate::sys::*;
use crate::uapi::*;
use crate::vm::Exit;
use crate::{HUGE, MIB, PAGE, suite};

pub static SUITE: Suite = suite!(
    "hugetlb_numa",
    [
        pages_come_from_the_node_that_the_task_names,
        pages_of_other_nodes_are_no_substitute_for_a_strict_policy,
        interleaved_pages_lie_on_all_nodes,
        pages_that_move_for_pinning_stay_on_their_node,
        pages_come_from_the_nodes_of_the_cpuset,
        pages_of_other_nodes_are_no_substitute_in_a_cpuset,
        small_pages_come_from_the_nodes_of_the_cpuset,
    ]
);

const NODES: [usize; 2] = [0, 1];
/// Pages in the pool of each node.
const EACH: u64 = 6;
const MPOL_DEFAULT: i32 = 0;
const MPOL_BIND: i32 = 2;
const MPOL_INTERLEAVE: i32 = 3;

fn node(node: usize) -> PathBuf {
    PathBuf::from(format!("/sys/devices/system/node/node{node}"))
}

/// A file of the pool of a node.
fn figure(of: usize, name: &str) -> Result<u64> {
    pressure::read_number(node(of).join("hugepages/hugepages-2048kB").join(name))
}

/// SKIP on a machine with fewer nodes.
fn require_nodes() -> Result<()> {
    require_root()?;
    drop(memfile_unsized()?);
    if NODES.iter().any(|&n| !node(n).exists()) {
        return skip("the machine has no two nodes");
    }
    Ok(())
}

/// `count` pages in the pool of a node, until this is dropped.
fn pool(n: usize, count: u64) -> Result<Setting> {
    let file = node(n).join("hugepages/hugepages-2048kB/nr_hugepages");
    Setting::set(file, &count.to_string())
}

/// [`EACH`] pages on each node, until this is dropped.
fn pools() -> Result<Vec<Setting>> {
    require_nodes()?;
    NODES.iter().map(|&n| pool(n, EACH)).collect()
}

/// How many pages of each node are in use.
fn used() -> Result<[u64; 2]> {
    let mut used = [0; 2];
    for n in NODES {
        used[n] = figure(n, "nr_hugepages")? - figure(n, "free_hugepages")?;
        ensure!(figure(n, "surplus_hugepages")? == 0, "pages came from elsewhere");
    }
    Ok(used)
}

fn expect_used(wanted: [u64; 2], when: &str) -> CaseResult {
    let used = used()?;
    ensure!(used == wanted, "{when}: {used:?} pages of the nodes are in use, wanted {wanted:?}");
    Ok(())
}

/// The policy of this thread, until it is dropped.
struct Policy;

impl Policy {
    fn set(mode: i32, nodes: u64) -> Result<Policy> {
        match set_mempolicy(mode, nodes) {
            Ok(()) => Ok(Policy),
            Err(Errno::ENOSYS) => skip("the kernel has no memory policies"),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        if let Err(errno) = set_mempolicy(MPOL_DEFAULT, 0) {
            println!("the policy stays: {errno}");
        }
    }
}

/// A cpuset with the memory of these nodes. This process is in it until it is dropped.
fn cpuset(nodes: &str) -> Result<Cgroup> {
    let cgroup = Cgroup::with("cpuset")?;
    pressure::write(cgroup.path().join("cpuset.mems"), nodes)?;
    cgroup.join()?;
    Ok(cgroup)
}

/// So many pages of one node.
fn only(n: usize, count: u64) -> [u64; 2] {
    if n == 0 { [count, 0] } else { [0, count] }
}

fn pages_come_from_the_node_that_the_task_names() -> CaseResult {
    let _pools = pools()?;
    for (flags, n) in [(PINNED, 0), (PINNED, 1), (BOTH, 1), (BOTH, 0)] {
        let mut s = Setup::with_flags_on(&backend::HUGE, flags, 4 * HUGE)?;
        let share = |count| only(n, count);
        expect_used([0, 0], "nothing is touched")?;
        {
            let _policy = Policy::set(MPOL_BIND, 1 << n)?;
            allocate(&s.fd, 0, 2 * HUGE)?;
            expect_used(share(2), "after fallocate")?;
            s.vcpu.fill_pages(s.slot.gpa, 4 * HUGE, GUEST)?;
        }
        expect_used(share(4), "after the guest's touch")?;
        punch(&s.fd, HUGE, 2 * HUGE)?;
        expect_used(share(2), "after a hole")?;
        // Others take them from where they like.
        {
            let _policy = Policy::set(MPOL_BIND, 2 >> n)?;
            s.vcpu.fill_pages(s.slot.gpa + HUGE, HUGE, GUEST)?;
        }
        expect_used(if n == 0 { [2, 1] } else { [1, 2] }, "of the other node")?;
        drop(s);
        expect_used([0, 0], "the guest is gone")?;
    }
    Ok(())
}

fn pages_of_other_nodes_are_no_substitute_for_a_strict_policy() -> CaseResult {
    let _pools = pools()?;
    let mut s = Setup::with_flags_on(&backend::HUGE, PINNED, 8 * HUGE)?;
    let policy = Policy::set(MPOL_BIND, 2)?;
    allocate(&s.fd, 0, EACH * HUGE)?;
    expect_used([0, EACH], "all of the node")?;
    let gpa = s.slot.gpa + EACH * HUGE;
    expect_errno("fallocate", allocate(&s.fd, EACH * HUGE, HUGE), &[Errno::ENOSPC])?;
    let exit = s.vcpu.start(Command::Store, &[gpa, 7])?;
    let empty =
        matches!(exit, Exit::MemoryFault { errno: Errno::ENOSPC, gpa: at, .. } if at == gpa);
    ensure!(empty, "the node is empty: {exit:x?}");
    expect_used([0, EACH], "after refusals")?;
    drop(policy);
    ensure!(s.vcpu.run()? == Exit::Done, "another node has pages");
    expect_used([1, EACH], "without the policy")?;
    drop(s);
    expect_used([0, 0], "the guest is gone")
}

fn interleaved_pages_lie_on_all_nodes() -> CaseResult {
    let _pools = pools()?;
    let mut s = Setup::with_flags_on(&backend::HUGE, PINNED, 8 * HUGE)?;
    {
        let _policy = Policy::set(MPOL_INTERLEAVE, 3)?;
        allocate(&s.fd, 0, 4 * HUGE)?;
        expect_used([2, 2], "after fallocate")?;
        s.vcpu.fill_pages(s.slot.gpa, 8 * HUGE, GUEST)?;
    }
    expect_used([4, 4], "after the guest's touch")?;
    drop(s);
    expect_used([0, 0], "the guest is gone")
}

/// A binding that pins the file, by a task without a policy, takes no page away from its node, as
/// long as the node's pool has other pages. (If all that are free there are in movable memory, the
/// kernel takes what other nodes have free before it makes a page.)
fn pages_that_move_for_pinning_stay_on_their_node() -> CaseResult {
    const MOVED: u64 = 4;
    let pools = pools()?;
    // The blocks are the last ones, those of the last node. Its next pages come from there, and are
    // the first that a guest gets.
    let zone = MovableZone::make(2)?;
    let left = figure(1, "nr_hugepages")?;
    if left < MOVED {
        return skip(format!("only {left} pages of the pool lie elsewhere than in the blocks"));
    }
    let more = pool(1, EACH + MOVED)?;
    let mut s = Setup::with_flags_on(&backend::HUGE, BOTH, MOVED * HUGE)?;
    {
        let _policy = Policy::set(MPOL_BIND, 2)?;
        s.vcpu.fill_pages(s.slot.gpa, MOVED * HUGE, GUEST)?;
    }
    expect_used([0, MOVED], "after the guest's touch")?;
    let movable = |s: &Setup| -> Result<u64> {
        let mut small = 0;
        for frame in frames(&s.vcpu, &s.slot, &s.fd)?.values() {
            small += u64::from(zone.holds(frame.pfn)?);
        }
        Ok(small / (HUGE / PAGE))
    };
    let there = movable(&s)?;
    println!("{there} of {MOVED} pages are in movable memory");
    ensure!(there != 0, "no page of the guest lies in movable memory, so none has to move");
    let counts = Counts::now()?;
    let mut s = s.pass_on(PINNED)?;
    counts.expect_grown(&["memfile.migrate"], there)?;
    expect_used([0, MOVED], "pinned")?;
    ensure!(movable(&s)? == 0, "a pinned page is in movable memory");
    s.vcpu.verify_pages(s.slot.gpa, MOVED * HUGE, GUEST)?;
    ensure!(frames(&s.vcpu, &s.slot, &s.fd)?.len() as u64 == MOVED * HUGE / PAGE);
    drop(s);
    // No page of the pools is in the blocks when they become ordinary memory again.
    drop((more, pools));
    Ok(())
}

fn pages_come_from_the_nodes_of_the_cpuset() -> CaseResult {
    let _pools = pools()?;
    for (flags, n) in [(PINNED, 0), (PINNED, 1), (BOTH, 1), (BOTH, 0)] {
        let mut s = Setup::with_flags_on(&backend::HUGE, flags, 4 * HUGE)?;
        {
            let _cpuset = cpuset(&n.to_string())?;
            allocate(&s.fd, 0, 2 * HUGE)?;
            expect_used(only(n, 2), "after fallocate")?;
            s.vcpu.fill_pages(s.slot.gpa, 4 * HUGE, GUEST)?;
        }
        expect_used(only(n, 4), "after the guest's touch")?;
        s.vcpu.verify_pages(s.slot.gpa, 4 * HUGE, GUEST)?;
        drop(s);
        expect_used([0, 0], "the guest is gone")?;
    }
    Ok(())
}

/// A memfile gives the same result as an ordinary file of hugetlbfs of the same task.
fn pages_of_other_nodes_are_no_substitute_in_a_cpuset() -> CaseResult {
    let _pools = pools()?;
    let mut s = Setup::with_flags_on(&backend::HUGE, PINNED, 8 * HUGE)?;
    let cpuset = cpuset("1")?;
    allocate(&s.fd, 0, EACH * HUGE)?;
    expect_used([0, EACH], "all of the node")?;
    let ordinary = memfd_create(MFD_CLOEXEC | backend::HUGE.flags as u32)?;
    ftruncate(&ordinary, HUGE)?;
    let told = allocate(&ordinary, 0, HUGE).err().context("an ordinary file got a page")?;
    println!("an ordinary file: {told}");
    expect_errno("fallocate", allocate(&s.fd, EACH * HUGE, HUGE), &[told])?;
    let gpa = s.slot.gpa + EACH * HUGE;
    let exit = s.vcpu.start(Command::Store, &[gpa, 7])?;
    let flags = KVM_MEMORY_EXIT_FLAG_PRIVATE;
    let empty = Exit::MemoryFault { errno: told, gpa, size: PAGE, flags };
    ensure!(exit == empty, "the node is empty: {exit:x?}, not {empty:x?}");
    expect_used([0, EACH], "after refusals")?;
    drop(cpuset);
    ensure!(s.vcpu.run()? == Exit::Done, "another node has pages");
    expect_used([1, EACH], "outside of the cpuset")?;
    drop((s, ordinary));
    expect_used([0, 0], "the guest is gone")
}

fn small_pages_come_from_the_nodes_of_the_cpuset() -> CaseResult {
    let _pages = pressure::base_pages()?;
    require_nodes()?;
    let block = Block::size()?;
    let size = 2 * MIB;
    for (flags, n) in [(PINNED, 0), (PINNED, 1), (BOTH, 1), (BOTH, 0)] {
        let mut s = Setup::with_flags(flags, size)?;
        {
            let _cpuset = cpuset(&n.to_string())?;
            allocate(&s.fd, 0, size / 2)?;
            s.vcpu.fill_pages(s.slot.gpa, size, GUEST)?;
        }
        let frames = frames(&s.vcpu, &s.slot, &s.fd)?;
        ensure!(frames.len() as u64 == size / PAGE, "only {} pages have a frame", frames.len());
        let elsewhere = |pfn: u64| !node(n).join(format!("memory{}", pfn * PAGE / block)).exists();
        let strays = frames.values().filter(|frame| elsewhere(frame.pfn)).count();
        ensure!(strays == 0, "{strays} pages are not on node {n}");
    }
    Ok(())
}
