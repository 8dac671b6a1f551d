// SPDX-License-Identifier: GPL-2.0

//! `MEMFILE_F_*`: the promises for the pages of a file (rule 8).

use super::Refusal;

/// A set of `MEMFILE_F_*` bits that is legal for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flags(u32);

impl Flags {
    /// Out of reach of userspace. Every file has it from its creation to its end.
    pub(crate) const USER_INACCESSIBLE: u32 = 1 << 0;
    /// Pages never migrate.
    pub(crate) const UNMOVABLE: u32 = 1 << 1;
    /// Pages never go to swap.
    pub(crate) const UNRECLAIMABLE: u32 = 1 << 2;
    /// All flags; KVM registers with these by default.
    pub(crate) const ALL: u32 = Self::USER_INACCESSIBLE | Self::UNMOVABLE | Self::UNRECLAIMABLE;

    /// The flags of a file from its creation to its first binding.
    pub(crate) const CREATION: Self = Self(Self::USER_INACCESSIBLE);

    /// The flags that a consumer asks for: known bits, and not weaker than [`Self::CREATION`].
    pub(crate) fn from_consumer(bits: u64) -> Result<Self, Refusal> {
        let bits = u32::try_from(bits).map_err(|_| Refusal::Invalid)?;
        if bits & !Self::ALL != 0 || bits & Self::USER_INACCESSIBLE == 0 {
            return Err(Refusal::Invalid);
        }
        Ok(Self(bits))
    }

    /// These, and no swap-out.
    pub(crate) fn and_unreclaimable(self) -> Self {
        Self(self.0 | Self::UNRECLAIMABLE)
    }

    /// These and `other`.
    pub(crate) fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// The `MEMFILE_F_*` bits.
    pub(crate) fn bits(self) -> u32 {
        self.0
    }

    /// No migration?
    pub(crate) fn unmovable(self) -> bool {
        self.0 & Self::UNMOVABLE != 0
    }

    /// No swap-out?
    pub(crate) fn unreclaimable(self) -> bool {
        self.0 & Self::UNRECLAIMABLE != 0
    }

    /// The flags of the file after a binding with `wish` joins `bound` others.
    ///
    /// A binding may ask for more than the file has. It may ask for less only while the file has no
    /// binding, and no page for which the promise holds.
    pub(crate) fn joined(self, bound: usize, has_pages: bool, wish: Self) -> Result<Self, Refusal> {
        let weaker = self.0 & !wish.0 != 0;
        if weaker && (bound != 0 || has_pages) {
            Err(Refusal::Invalid)
        } else {
            Ok(wish)
        }
    }
}

#[cfg_attr(CONFIG_KUNIT = "y", kernel::macros::kunit_tests(memfile_flags))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    const PINNED: Flags = Flags(Flags::ALL);

    #[test]
    fn unknown_bits_are_refused() {
        for bit in 3..64 {
            assert_eq!(Flags::from_consumer(1 << bit | 7), Err(Refusal::Invalid));
        }
    }

    #[test]
    fn never_weaker_than_creation() {
        assert_eq!(Flags::from_consumer(0), Err(Refusal::Invalid));
        assert_eq!(Flags::from_consumer(6), Err(Refusal::Invalid));
        assert!(Flags::from_consumer(1).is_ok());
    }

    #[test]
    fn a_binding_may_ask_for_more() {
        for has_pages in [false, true] {
            assert_eq!(Flags::CREATION.joined(0, has_pages, PINNED), Ok(PINNED));
            assert_eq!(Flags::CREATION.joined(1, has_pages, PINNED), Ok(PINNED));
            assert_eq!(PINNED.joined(1, has_pages, PINNED), Ok(PINNED));
        }
    }

    #[test]
    fn what_pages_were_promised_holds_without_a_binding() {
        assert_eq!(PINNED.joined(0, true, PINNED), Ok(PINNED));
        for wish in [1, 3, 5] {
            let wish = Flags(wish);
            assert_eq!(PINNED.joined(0, true, wish), Err(Refusal::Invalid));
            assert_eq!(PINNED.joined(1, false, wish), Err(Refusal::Invalid));
            assert_eq!(PINNED.joined(0, false, wish), Ok(wish));
        }
    }

    #[test]
    fn what_a_store_always_gives_is_neither_asked_for_nor_taken_away() {
        let inherent = Flags::CREATION.and_unreclaimable();
        assert_eq!(inherent, Flags(5));
        for (asked, wish) in [(1, 5), (3, 7), (5, 5), (7, 7)] {
            let wanted = Flags(asked).and(inherent);
            assert_eq!(wanted, Flags(wish));
            assert_eq!(inherent.joined(0, true, wanted), Ok(Flags(wish)));
        }
    }

    #[test]
    fn more_of_one_does_not_make_up_for_less_of_the_other() {
        let (unmovable, unreclaimable) = (Flags(3), Flags(5));
        assert_eq!(
            unmovable.joined(0, true, unreclaimable),
            Err(Refusal::Invalid)
        );
        assert_eq!(
            unreclaimable.joined(0, true, unmovable),
            Err(Refusal::Invalid)
        );
    }
}
