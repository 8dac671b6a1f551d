// SPDX-License-Identifier: GPL-2.0
//! Hibernation writes an image of all memory: it is refused while a page is out of the direct map
//! (rule 25), and finds nothing of such pages afterwards.
//!
//! It stops all devices, and the ports to the host do not come back from that: `scripts/check` runs
//! the suite in a machine of its own, which has none meanwhile.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::ktap::{CaseResult, Suite};
use crate::pattern::Pattern;
use crate::pressure::Image;
use crate::support::setup::{GUEST, HIDDEN, PINNED, Setup};
use crate::sys::*;
use crate::{MIB, suite};

pub static SUITE: Suite = suite!(
    "hibernation",
    [
        refused_while_pages_are_hidden,
        begun_before_a_page_was_hidden_is_refused: 120,
        finds_no_secret_and_guests_go_on: 240,
    ]
);

const SIZE: u64 = 4 * MIB;

fn refused_while_pages_are_hidden() -> CaseResult {
    const DISK: &str = "/sys/power/disk";
    drop(Image::open()?);
    let refused = |when: &str, wanted: bool| -> Result<()> {
        let text = fs::read_to_string(DISK)?;
        ensure!(text.contains("[disabled]") == wanted, "{when}: {DISK} has {text}");
        let open = Image::raw_open();
        ensure!(open.is_err() == wanted, "{when}: /dev/snapshot opens: {}", open.is_ok());
        Ok(())
    };
    refused("before", false)?;
    let s = Setup::filled(HIDDEN, MIB)?;
    refused("with hidden pages", true)?;
    drop(s);
    refused("after", false)
}

/// The guest touches its first such page when all others are frozen already.
fn begun_before_a_page_was_hidden_is_refused() -> CaseResult {
    lock_own_memory()?;
    let image = Image::open()?;
    let mut s = Setup::with_flags(HIDDEN, MIB)?;
    image.freeze()?;
    s.vcpu.fill(s.slot.gpa, MIB, GUEST)?;
    let result = image.raw_create();
    drop(image);
    expect_errno("an image with hidden pages", result, &[Errno::EPERM])?;
    s.vcpu.verify(s.slot.gpa, MIB, GUEST)
}

fn finds_no_secret_and_guests_go_on() -> CaseResult {
    lock_own_memory()?;
    // Hidden pages have left nothing behind, and the direct map has all pages that are copied.
    let (first, second) = (Pattern::Generation(7001), Pattern::Generation(7002));
    let mut s = Setup::with_flags(HIDDEN, SIZE)?;
    s.vcpu.fill(s.slot.gpa, SIZE, first)?;
    let gpa = s.slot.gpa;
    drop(s);
    let mut s = Setup::with_flags(PINNED, SIZE)?;
    s.vcpu.fill(gpa, SIZE, second)?;

    let mut image = Image::open()?;
    image.freeze()?;
    image.raw_create().context("make an image")?;
    let (found, pages) = image.search(first, gpa, SIZE)?;
    drop(image);
    s.vcpu.verify(gpa, SIZE, second)?;
    println!("an image of {pages} pages");
    ensure!(found == 0, "what was hidden is in the image {found} times");

    // Without the flag it is found, so that the above can fail.
    let mut image = Image::open()?;
    image.freeze()?;
    image.raw_create().context("make another image")?;
    let (found, _) = image.search(second, gpa, SIZE)?;
    drop(image);
    ensure!(found >= SIZE / 64, "without the flag it is in the image {found} times");
    s.vcpu.verify(gpa, SIZE, second)
}
