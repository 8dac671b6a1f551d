// SPDX-License-Identifier: GPL-2.0
//! Conversions that a guest asks for by `KVM_HC_MAP_GPA_RANGE`, from one CPU or from two at once.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};
use vmm_sys_util::ioctl_iow_nr;

use super::CONVERT;
use super::area::Area;
use crate::module;
use crate::pattern::Pattern;
use crate::sys::{self, ioctl_mut};
use crate::uapi::KVM_MAP_GPA_RANGE_ENCRYPTED;

ioctl_iow_nr!(MAP_GPA_RANGE, b'G' as u32, 1, [u64; 3]);

/// The device of the module that makes the hypercall for us.
const DEVICE: &str = "/dev/memfile-guest";

/// Who asks the host for conversions.
pub struct Converter(OwnedFd);

impl Converter {
    /// The module is loaded when it is first needed: a guest may have none.
    pub fn open() -> Result<Converter> {
        if !Path::new(DEVICE).exists() {
            module::load_file(Path::new(CONVERT), "")?;
        }
        sys::open(DEVICE, libc::O_RDWR).context(DEVICE).map(Converter)
    }

    /// Have `pages` pages from that frame on converted.
    pub fn convert(&self, frame: u64, pages: u64, attributes: u64) -> Result<()> {
        let mut arguments = [frame, pages, attributes];
        // SAFETY: The ioctl reads that many numbers.
        unsafe { ioctl_mut(self.0.as_fd(), MAP_GPA_RANGE(), &mut arguments) }
            .map(drop)
            .with_context(|| format!("convert {pages} pages from frame {frame:#x} on"))
    }

    /// Two CPUs convert the pages of a locked area at once, each every second one, there and back
    /// in that many rounds: a page reads as zeros on the side where it comes, and keeps what is
    /// written there. Meanwhile each reads the pages of the other. In the last round, as in the
    /// first, the pages are shared; its number is their content.
    pub fn convert_from_two_cpus(&self, area: &Area, rounds: u64) -> Result<()> {
        let frames = area.frames()?;
        let start = Barrier::new(2);
        let work = |cpu: usize| -> Result<()> {
            sys::run_on_cpu(cpu)?;
            start.wait();
            for round in 0..rounds {
                let attributes = [0, KVM_MAP_GPA_RANGE_ENCRYPTED][round as usize % 2];
                for (n, &frame) in frames.iter().enumerate() {
                    let page = n as u64;
                    if n % 2 != cpu {
                        area.touch(page)?;
                        continue;
                    }
                    self.convert(frame, 1, attributes)?;
                    area.verify(Pattern::ZERO, page, Some(1))
                        .with_context(|| format!("round {round}, page {page}"))?;
                    area.fill_page(Pattern::Generation(round), page)?;
                }
                for page in (cpu as u64..frames.len() as u64).step_by(2) {
                    area.verify(Pattern::Generation(round), page, Some(1))
                        .with_context(|| format!("round {round}, page {page}, later"))?;
                }
            }
            Ok(())
        };
        in_parallel(|| work(1), || work(0))
    }

    /// The first page of a locked area is shared. Another CPU makes it private, and as soon as it is,
    /// this one makes it shared again, and writes it. Returns the thread that uses the other CPU.
    pub fn convert_against(self, area: &Area, pattern: Pattern) -> Result<JoinHandle<Result<()>>> {
        let frame = *area.frames()?.first().context("the area has no pages")?;
        self.convert(frame, 1, 0)?;
        area.fill_page(Pattern::Constant(u64::MAX), 0)?;
        let both = Arc::new(self);
        let against = Arc::clone(&both);
        let other = thread::spawn(move || -> Result<()> {
            sys::run_on_cpu(1)?;
            against.convert(frame, 1, KVM_MAP_GPA_RANGE_ENCRYPTED)
        });
        // The private side reads as zeros.
        while !other.is_finished() && area.verify(Pattern::ZERO, 0, Some(1)).is_err() {
            std::hint::spin_loop();
        }
        both.convert(frame, 1, 0)?;
        area.fill_page(pattern, 0)?;
        Ok(other)
    }
}

fn in_parallel(
    other: impl FnOnce() -> Result<()> + Send,
    this: impl FnOnce() -> Result<()>,
) -> Result<()> {
    thread::scope(|scope| {
        let other = scope.spawn(other);
        let done = this();
        other.join().map_err(|_| anyhow!("a thread panicked"))??;
        done
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_work_and_either_error_is_seen() {
        let fails = |fails: bool| if fails { Err(anyhow!("no")) } else { Ok(()) };
        for (other, this) in [(false, false), (false, true), (true, false), (true, true)] {
            let done = in_parallel(move || fails(other), || fails(this));
            assert_eq!(done.is_err(), other || this);
        }
    }
}
