// SPDX-License-Identifier: GPL-2.0

//! The protocol between bindings and invalidations of one file: which invalidation calls which
//! binding, and which event waits for which (rules 9, 14).
//!
//! Every event of a file, be it the beginning of an invalidation or the birth or death of a
//! binding, takes the next tick of the file's clock, under the file's lock. Then
//!
//! * an invalidation calls exactly those bindings that were born before its tick and die after it
//!   ([`Life::called_at`]). Ticks do not change, so its end calls the same bindings as its start.
//! * a birth is complete when the overlapping invalidations of earlier ticks have ended: they do
//!   not call the new binding, so it must not map their pages before ([`Scope::holds_up_birth`]).
//! * a death is complete when the overlapping invalidations that call the binding have ended: no
//!   callback runs after that ([`Scope::holds_up_death`]). Younger ones do not call it, so a stream
//!   of invalidations cannot delay a death without end.
//!
//! No event waits for a younger one, hence there is no cycle among these waits.

use super::range::Range;

/// A moment in the life of a file.
pub(crate) type Tick = u64;

/// Counts the events of one file.
#[derive(Debug, Default)]
pub(crate) struct Clock(Tick);

impl Clock {
    /// The next tick. At a billion ticks a second the counter lasts 584 years.
    pub(crate) fn tick(&mut self) -> Tick {
        self.0 = self.0.saturating_add(1);
        self.0
    }
}

/// When a binding was born and when it dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Life {
    /// Tick of registration.
    pub(crate) birth: Tick,
    /// Tick of unregistration, [`Life::NEVER`] until then.
    pub(crate) death: Tick,
}

impl Life {
    /// The death of a binding that is not unregistered.
    pub(crate) const NEVER: Tick = Tick::MAX;

    /// Does an invalidation that began at `seq` call the binding?
    pub(crate) fn called_at(self, seq: Tick) -> bool {
        self.birth < seq && seq < self.death
    }
}

/// The tick and the pages of an invalidation: they decide which bindings take part in it, and which
/// wait for its end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scope {
    /// Tick of its beginning.
    pub(crate) seq: Tick,
    /// Its pages.
    pub(crate) pages: Range,
}

impl Scope {
    /// Must a binding of `pages`, born at `birth`, wait for this invalidation before it maps a
    /// page?
    pub(crate) fn holds_up_birth(self, birth: Tick, pages: Range) -> bool {
        self.seq < birth && self.pages.overlaps(pages)
    }

    /// Must a binding of `pages` with this `life` wait for this invalidation before it is gone?
    pub(crate) fn holds_up_death(self, life: Life, pages: Range) -> bool {
        life.called_at(self.seq) && self.pages.overlaps(pages)
    }
}

#[cfg_attr(CONFIG_KUNIT = "y", kernel::macros::kunit_tests(memfile_clock))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    const EIGHT: Range = Range::of(0, 8);

    #[test]
    fn ticks_rise() {
        let mut clock = Clock::default();
        let first = clock.tick();
        assert!(first < clock.tick());
    }

    #[test]
    fn an_invalidation_calls_those_alive_when_it_began() {
        let life = Life { birth: 5, death: 9 };
        assert!(!life.called_at(4));
        assert!(life.called_at(6));
        assert!(life.called_at(8));
        assert!(!life.called_at(10));
    }

    #[test]
    fn a_birth_waits_for_older_invalidations_of_its_pages_only() {
        let scope = Scope {
            seq: 5,
            pages: EIGHT,
        };
        assert!(scope.holds_up_birth(6, Range::of(7, 9)));
        assert!(!scope.holds_up_birth(6, Range::of(8, 9)));
        assert!(!scope.holds_up_birth(4, Range::of(7, 9)));
    }

    #[test]
    fn a_death_waits_for_those_that_call_it_only() {
        let scope = Scope {
            seq: 5,
            pages: EIGHT,
        };
        let first = Range::of(0, 1);
        assert!(scope.holds_up_death(Life { birth: 4, death: 6 }, first));
        assert!(!scope.holds_up_death(Life { birth: 4, death: 6 }, Range::of(8, 9)));
        assert!(!scope.holds_up_death(Life { birth: 6, death: 7 }, first));
        assert!(!scope.holds_up_death(Life { birth: 1, death: 4 }, first));
    }

    #[test]
    fn nobody_waits_for_the_younger() {
        for seq in 1..6 {
            let scope = Scope { seq, pages: EIGHT };
            for other in 1..6 {
                let life = Life {
                    birth: 0,
                    death: other,
                };
                if scope.holds_up_birth(other, EIGHT) || scope.holds_up_death(life, EIGHT) {
                    assert!(seq < other);
                }
            }
        }
    }
}
