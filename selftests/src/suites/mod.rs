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
mod creation;
mod debugfs;
mod exits;
mod fault;
mod fdinfo;
mod guest;
mod huge;
mod hugetlb;
mod idle;
mod infra;
mod kvmaccess;
mod lockdep;
mod migrate;
mod model;
mod module;
mod motion;
mod ondemand;
mod overcommit;
mod pinned;
mod poison;
mod populate;
mod prefault;
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

/// Every suite, in the order in which they run.
pub static SUITES: &[&Suite] = &[
    &infra::SUITE,
    &creation::SUITE,
    &size::SUITE,
    &access::SUITE,
    &property::SUITE,
    &security::SUITE,
    &model::SUITE,
    &binding::SUITE,
    &cap::SUITE,
    &cap_without::NPT,
    &cap_without::TDP_MMU,
    &guest::SUITE,
    &guest::GMEM,
    &punch::SUITE,
    &punch::GMEM,
    &exits::SUITE,
    &exits::GMEM,
    &convert::SUITE,
    &ondemand::SUITE,
    &accounting::SUITE,
    &zero::SUITE,
    &zero::GMEM,
    &prefault::SUITE,
    &prefault::GMEM,
    &populate::SUITE,
    &kvmaccess::SUITE,
    &fdinfo::SUITE,
    &fault::SUITE,
    &sharing::SUITE,
    &scenarios::SUITE,
    &scenarios::GMEM,
    &seal::SUITE,
    &trace::SUITE,
    &signals::SUITE,
    &consumer::SUITE,
    &debugfs::SUITE,
    &lockdep::SUITE,
    &store::SUITE,
    &stress::SUITE,
    &stress::GMEM,
    &border::SUITE,
    &starvation::SUITE,
    &pinned::SUITE,
    &migrate::SUITE,
    &reclaim::SUITE,
    &swapwait::SUITE,
    &zswap::SUITE,
    &aging::SUITE,
    &idle::SUITE,
    &motion::SUITE,
    &contiguous::SUITE,
    &huge::SUITE,
    &hugetlb::SUITE,
    &hugetlb::SUITE_1G,
    &poison::SUITE,
    &overcommit::SUITE,
    &qemu::SUITE,
    &qemu::LONG,
    &module::SUITE,
    &control::SUITE,
    &control::TOGETHER,
    &control::EMPTY,
    &control::OOPS,
    &control::KNOB,
];
