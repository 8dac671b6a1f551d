// SPDX-License-Identifier: GPL-2.0
//! The tests. One file per subject; each case is named after its promise.

use crate::ktap::Suite;

mod access;
mod accounting;
mod aging;
mod binding;
mod border;
mod cap;
mod cap_without;
mod consumer;
mod contiguous;
mod control;
mod convert;
mod corpus;
mod crash_dump;
mod creation;
mod debugfs;
mod directmap;
mod directmap_huge;
mod exits;
mod fault;
mod fdinfo;
mod guest;
mod hardware_error;
mod hibernation;
mod huge;
mod hugetlb;
mod hugetlb_numa;
mod idle;
mod infra;
mod kvmaccess;
mod lockdep;
mod migrate;
mod model;
mod module;
mod motion;
mod nested;
mod ondemand;
mod overcommit;
mod pinned;
mod poison;
mod populate;
mod prefault;
mod pressure_host;
mod property;
mod punch;
mod qemu;
mod reclaim;
mod scenarios;
mod seal;
mod security;
mod sharing;
mod signals;
mod size;
mod starvation;
mod store;
mod stress;
mod swapwait;
mod trace;
mod zero;
mod zswap;

/// Every suite, in the order in which they run: those of one subject, on every backend, together.
static SUBJECTS: &[&[Suite]] = &[
    one(&infra::SUITE),
    one(&creation::SUITE),
    size::SUITES,
    access::SUITES,
    property::SUITES,
    one(&security::SUITE),
    one(&model::SUITE),
    one(&model::SUITE_HUGE),
    one(&model::SUITE_1G),
    binding::SUITES,
    one(&cap::SUITE),
    one(&cap_without::NPT),
    one(&cap_without::TDP_MMU),
    one(&cap_without::PROTECTED),
    guest::SUITES,
    punch::SUITES,
    exits::SUITES,
    convert::SUITES,
    ondemand::SUITES,
    accounting::SUITES,
    zero::SUITES,
    prefault::SUITES,
    one(&populate::SUITE),
    one(&kvmaccess::SUITE),
    nested::SUITES,
    one(&fdinfo::SUITE),
    fault::SUITES,
    sharing::SUITES,
    scenarios::SUITES,
    one(&seal::SUITE),
    one(&trace::SUITE),
    signals::SUITES,
    one(&consumer::SUITE),
    one(&debugfs::SUITE),
    one(&lockdep::SUITE),
    one(&store::SUITE),
    stress::SUITES,
    one(&border::SUITE),
    one(&starvation::SUITE),
    one(&pinned::SUITE),
    one(&migrate::SUITE),
    one(&reclaim::SUITE),
    one(&swapwait::SUITE),
    one(&zswap::SUITE),
    one(&aging::SUITE),
    one(&idle::SUITE),
    one(&motion::SUITE),
    one(&motion::SUITE_HUGE),
    one(&motion::SUITE_1G),
    one(&contiguous::SUITE),
    one(&huge::SUITE),
    one(&hugetlb::SUITE),
    one(&hugetlb::SUITE_1G),
    one(&hugetlb::SUITE_PAIR),
    one(&hugetlb_numa::SUITE),
    one(&directmap::SUITE),
    one(&directmap_huge::SUITE),
    one(&directmap_huge::SUITE_1G),
    one(&crash_dump::SUITE),
    one(&hibernation::SUITE),
    one(&hardware_error::SUITE),
    poison::SUITES,
    one(&overcommit::SUITE),
    one(&qemu::SUITE),
    one(&qemu::LONG),
    one(&module::SUITE),
    one(&corpus::SUITE),
    one(&pressure_host::SUITE),
    one(&control::SUITE),
    one(&control::TOGETHER),
    one(&control::EMPTY),
    one(&control::OOPS),
    one(&control::KNOB),
];

/// A subject of one suite.
const fn one(suite: &'static Suite) -> &'static [Suite] {
    std::slice::from_ref(suite)
}

/// Every suite, in the order in which they run.
pub fn all() -> Vec<&'static Suite> {
    SUBJECTS.iter().copied().flatten().collect()
}
