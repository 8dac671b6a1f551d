// SPDX-License-Identifier: GPL-2.0
//! Guest vCPUs access memory while the host converts, punches, allocates and pre-faults it.
//!
//! [`crate::support::stress`] describes how a wrong word is found.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};

use crate::guest::{Command, STRESS_ENTRY};
use crate::ktap::CaseResult;
use crate::support::backend::Backend;
use crate::support::setup::LAYOUTS;
use crate::support::stress::{Action, Bench, EVERYTHING, PAGES, TABLE};
use crate::sys::punch;
use crate::{PAGE, conformance};

conformance!(
    "stress",
    [
        access_against_punch,
        access_against_slot_replacement,
    ],
    converting: [
        access_against_conversion_one_vcpu,
        access_against_conversion_several_vcpus,
        access_against_everything,
        access_against_everything_unaligned,
    ],
    memfile: [access_while_consumers_and_vms_come_and_go],
    huge: all,
    // These test the test.
    small: [wrong_word_is_noticed, lost_own_word_is_noticed],
    hidden: [
        access_against_punch,
        access_against_slot_replacement,
        access_against_conversion_one_vcpu,
        access_against_conversion_several_vcpus,
        access_against_everything,
        access_against_everything_unaligned,
        access_while_consumers_and_vms_come_and_go,
    ],
    // These include the work of the others, except that conversions alone leave no time for a hole.
    gigantic: [
        access_against_everything,
        access_against_slot_replacement,
        access_while_consumers_and_vms_come_and_go,
    ],
);

/// A table with one wrong entry must end the stress.
fn wrong_word_is_noticed(on: &'static Backend) -> CaseResult {
    let bench = Bench::new(on, LAYOUTS[0])?;
    let mut vcpu = bench.s.vm.vcpu(1)?;
    bench.s.vm.system().store(TABLE + 100 * STRESS_ENTRY + 8, 12345);
    match vcpu.stress(&bench.arguments(1)) {
        Err(e) if e.to_string().contains("wrong word") => Ok(()),
        other => bail!("wanted a wrong word, got {other:?}"),
    }
}

/// A hole that the table does not show takes the vCPU's own words away, or the content: either is
/// noticed.
fn lost_own_word_is_noticed(on: &'static Backend) -> CaseResult {
    let bench = Bench::new(on, LAYOUTS[0])?;
    let mut vcpu = bench.s.vm.vcpu(1)?;
    let arguments = bench.arguments(1);
    // Zeros everywhere, so that only the vCPUs' own words can show an error.
    punch(&bench.s.fd, 0, PAGES * PAGE)?;
    for page in 0..PAGES {
        bench.s.vm.system().store(TABLE + page * STRESS_ENTRY + 8, 0);
        bench.s.vm.system().store(TABLE + page * STRESS_ENTRY + 16, 0);
    }
    vcpu.post(Command::Stress, &arguments)?;
    let stopper = vcpu.stopper();
    thread::scope(|scope| {
        let running = scope.spawn(|| vcpu.finish_stress());
        while stopper.rounds() < 20 * PAGES && !running.is_finished() {
            thread::sleep(Duration::from_millis(1));
        }
        punch(&bench.s.fd, 0, PAGES * PAGE)?;
        let limit = Instant::now() + Duration::from_secs(20);
        while !running.is_finished() && Instant::now() < limit {
            thread::sleep(Duration::from_millis(1));
        }
        stopper.stop();
        match running.join().map_err(|_| anyhow!("the vCPU thread panicked"))? {
            Err(e) if e.to_string().contains("own word lost") => Ok(()),
            other => bail!("wanted a lost word, got {other:?}"),
        }
    })
}

fn access_against_conversion_one_vcpu(on: &'static Backend) -> CaseResult {
    Bench::new(on, LAYOUTS[0])?.run(1, &[Action::Share, Action::Privatise])
}

fn access_against_conversion_several_vcpus(on: &'static Backend) -> CaseResult {
    Bench::new(on, LAYOUTS[0])?.run(3, &[Action::Share, Action::Privatise, Action::Refill])
}

fn access_against_punch(on: &'static Backend) -> CaseResult {
    Bench::new(on, LAYOUTS[0])?.run(2, &[Action::Punch, Action::Refill, Action::Allocate])
}

/// All pages stay private: a shared one without a slot would be emulated I/O.
fn access_against_slot_replacement(on: &'static Backend) -> CaseResult {
    let actions = [Action::ReplaceSlot, Action::Punch, Action::Refill, Action::PreFault];
    Bench::new(on, LAYOUTS[0])?.run(3, &actions)
}

fn access_against_everything(on: &'static Backend) -> CaseResult {
    Bench::new(on, LAYOUTS[0])?.run(3, &EVERYTHING)
}

fn access_against_everything_unaligned(on: &'static Backend) -> CaseResult {
    Bench::new(on, LAYOUTS[4])?.run(3, &EVERYTHING)
}

/// Bindings, a module and VMs begin and end on a file whose pages are in use and go away.
fn access_while_consumers_and_vms_come_and_go(on: &'static Backend) -> CaseResult {
    let mut bench = Bench::new(on, LAYOUTS[1])?;
    let others = vec![bench.consumers()?, bench.another_vm()?];
    bench.run_beside(2, &EVERYTHING, others)
}
