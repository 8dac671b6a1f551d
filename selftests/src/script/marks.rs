// SPDX-License-Identifier: GPL-2.0
//! The words that guests may find in memory.
//!
//! Every file has a place in every VM, and guests write there words that only fit this place and
//! this run. A word that is read is zero or such a word: of just this address, unless the file was
//! ever bound elsewhere as well. And it is not zero if a guest has written it and no later
//! operation has removed content.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Result, ensure};

use super::op::{FILES, PAGES};
use crate::pattern::{Pattern, mix};
use crate::{GIB, PAGE};

/// The known facts about the place of a file.
#[derive(Default)]
struct Place {
    /// The file was bound at other places as well.
    elsewhere: AtomicBool,
    /// How often something that takes content away has begun, and has ended.
    begun: AtomicU64,
    ended: AtomicU64,
    /// Pages that were written: how often it had begun at the time, by VM and address.
    written: Mutex<HashMap<(usize, u64), u64>>,
}

/// The known facts about all places, in this run.
pub struct Marks {
    generation: u64,
    places: [Place; FILES],
}

/// Where file number `file` is in every VM.
pub fn place(file: usize) -> u64 {
    GIB * (1 + file as u64)
}

impl Marks {
    pub fn new(generation: u64) -> Marks {
        Marks { generation, places: Default::default() }
    }

    /// The words of this run.
    pub fn pattern(&self) -> Pattern {
        Pattern::Generation(self.generation)
    }

    /// From now on the file has other places as well.
    pub fn moved(&self, file: usize) {
        self.places[file].elsewhere.store(true, Ordering::SeqCst);
    }

    /// Do what takes content of a file away.
    pub fn taking<R>(&self, file: usize, work: impl FnOnce() -> R) -> R {
        self.places[file].begun.fetch_add(1, Ordering::SeqCst);
        let result = work();
        self.places[file].ended.fetch_add(1, Ordering::SeqCst);
        result
    }

    /// Do what takes content of any file away.
    pub fn taking_any<R>(&self, work: impl FnOnce() -> R) -> R {
        for place in &self.places {
            place.begun.fetch_add(1, Ordering::SeqCst);
        }
        let result = work();
        for place in &self.places {
            place.ended.fetch_add(1, Ordering::SeqCst);
        }
        result
    }

    /// To be remembered before a guest writes; nothing while something takes content away.
    pub fn before(&self, file: usize) -> Option<u64> {
        let ended = self.places[file].ended.load(Ordering::SeqCst);
        let begun = self.places[file].begun.load(Ordering::SeqCst);
        (begun == ended).then_some(begun)
    }

    /// A guest has written the first words of these pages; `before` is of before that.
    pub fn wrote(
        &self,
        vm: usize,
        file: usize,
        gpas: impl Iterator<Item = u64>,
        before: Option<u64>,
    ) {
        let Some(before) = before else { return };
        let mut written = self.places[file].written.lock().unwrap();
        written.extend(gpas.map(|gpa| ((vm, gpa), before)));
    }

    /// Since when the first word at this address must be there, if it must.
    pub fn since(&self, vm: usize, file: usize, gpa: u64) -> Option<u64> {
        self.places[file].written.lock().unwrap().get(&(vm, gpa)).copied()
    }

    /// Judge a word that a guest has read; `since` is of before that.
    pub fn judge(&self, file: usize, addr: u64, value: u64, since: Option<u64>) -> Result<()> {
        let place = &self.places[file];
        if value == 0 {
            let begun = place.begun.load(Ordering::SeqCst);
            ensure!(
                since != Some(begun) || place.elsewhere.load(Ordering::SeqCst),
                "content is lost at {addr:#x}"
            );
            return Ok(());
        }
        let right = self.pattern().word(addr);
        // Read after the value: a thread sets it before it binds the file elsewhere.
        let other = || place.elsewhere.load(Ordering::SeqCst) && self.is_of(file, addr, value);
        ensure!(value == right || other(), "{value:#x} at {addr:#x}, wanted {right:#x} or zero");
        Ok(())
    }

    /// Whether a word is of another page at the place of the file.
    fn is_of(&self, file: usize, addr: u64, value: u64) -> bool {
        // Modulo 2^64 the factor of the address has an inverse: this is Newton's method.
        let step = self.pattern().step(1);
        let inverse =
            (0..6).fold(step, |x, _| x.wrapping_mul(2u64.wrapping_sub(step.wrapping_mul(x))));
        let from = value.wrapping_sub(mix(self.generation)).wrapping_mul(inverse);
        let window = (1 << 16) * PAGE + PAGES * PAGE;
        from % PAGE == addr % PAGE && from.abs_diff(place(file)) < window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn word_of_this_place_or_zero() {
        let marks = Marks::new(7);
        let addr = place(1) + 3 * PAGE;
        assert!(marks.judge(1, addr, 0, None).is_ok());
        assert!(marks.judge(1, addr, marks.pattern().word(addr), None).is_ok());
        assert!(marks.judge(1, addr, marks.pattern().word(addr + PAGE), None).is_err());
        assert!(marks.judge(1, addr, Marks::new(8).pattern().word(addr), None).is_err());
        assert!(marks.judge(1, addr, 1, None).is_err());
    }

    #[test]
    fn word_of_another_page_once_the_file_is_elsewhere() {
        let marks = Marks::new(7);
        let addr = place(1) + 3 * PAGE + 8;
        marks.moved(1);
        assert!(marks.judge(1, addr, marks.pattern().word(addr + PAGE), None).is_ok());
        assert!(marks.judge(1, addr, marks.pattern().word(addr + 8), None).is_err());
        assert!(marks.judge(1, addr, marks.pattern().word(addr + GIB), None).is_err());
        assert!(marks.judge(1, addr, 1, None).is_err());
    }

    #[test]
    fn written_word_stays_until_something_takes_it() {
        let marks = Marks::new(7);
        let addr = place(0);
        let before = marks.before(0);
        marks.wrote(1, 0, [addr].into_iter(), before);
        assert_eq!(marks.since(0, 0, addr), None);
        let since = marks.since(1, 0, addr);
        assert!(marks.judge(0, addr, 0, since).is_err());
        marks.taking(0, || {
            assert!(marks.judge(0, addr, 0, since).is_ok());
            assert_eq!(marks.before(0), None);
        });
        assert!(marks.judge(0, addr, 0, since).is_ok());
        assert_eq!(marks.before(1), Some(0));
    }
}
