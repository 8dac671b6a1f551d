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
    /// Pages are not in the kernel's direct map (rule 25). Only together with the others.
    pub(crate) const KERNEL_INACCESSIBLE: u32 = 1 << 3;
    /// The flags with which KVM registers by default.
    pub(crate) const PINNED: u32 = Self::USER_INACCESSIBLE | Self::UNMOVABLE | Self::UNRECLAIMABLE;
    /// All flags.
    pub(crate) const ALL: u32 = Self::PINNED | Self::KERNEL_INACCESSIBLE;

    /// The flags of a file from its creation to its first binding.
    pub(crate) const CREATION: Self = Self(Self::USER_INACCESSIBLE);

    /// The flags that a consumer asks for: known bits, and not weaker than [`Self::CREATION`].
    pub(crate) fn from_consumer(bits: u64) -> Result<Self, Refusal> {
        let bits = u32::try_from(bits).map_err(|_| Refusal::Invalid)?;
        if bits & !Self::ALL != 0 || bits & Self::USER_INACCESSIBLE == 0 {
            return Err(Refusal::Invalid);
        }
        // To migrate a page or write it to swap, the kernel has to read it.
        let flags = Self(bits);
        if flags.kernel_inaccessible() && bits & Self::PINNED != Self::PINNED {
            return Err(Refusal::Invalid);
        }
        Ok(flags)
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

    /// Out of the direct map?
    pub(crate) fn kernel_inaccessible(self) -> bool {
        self.0 & Self::KERNEL_INACCESSIBLE != 0
    }

    /// The flags of the file after a binding with `wish` joins `bound` others.
    ///
    /// A binding may ask for more than the file has. It may ask for less only while the file has no
    /// binding, and no page for which the promise holds. It may take pages out of the direct map only
    /// while the file has no binding: other consumers may let the kernel use the pages.
    pub(crate) fn joined(self, bound: usize, has_pages: bool, wish: Self) -> Result<Self, Refusal> {
        let weaker = self.0 & !wish.0 != 0;
        let hides = wish.kernel_inaccessible() && !self.kernel_inaccessible();
        let taken = weaker && (bound != 0 || has_pages);
        let hidden = hides && bound != 0;
        if taken || hidden {
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

    const PINNED: Flags = Flags(Flags::PINNED);
    const HIDDEN: Flags = Flags(Flags::ALL);

    #[test]
    fn unknown_bits_are_refused() {
        for bit in 4..64 {
            assert_eq!(Flags::from_consumer(1 << bit | 7), Err(Refusal::Invalid));
        }
    }

    #[test]
    fn only_pinned_pages_leave_the_direct_map() {
        for bits in 8..15 {
            assert_eq!(Flags::from_consumer(bits), Err(Refusal::Invalid));
        }
        assert_eq!(Flags::from_consumer(15), Ok(HIDDEN));
    }

    #[test]
    fn pages_leave_the_direct_map_while_nobody_is_bound() {
        for has_pages in [false, true] {
            for flags in [Flags::CREATION, PINNED] {
                assert_eq!(flags.joined(0, has_pages, HIDDEN), Ok(HIDDEN));
                assert_eq!(flags.joined(1, has_pages, HIDDEN), Err(Refusal::Invalid));
            }
            assert_eq!(HIDDEN.joined(1, has_pages, HIDDEN), Ok(HIDDEN));
            assert_eq!(HIDDEN.joined(1, has_pages, PINNED), Err(Refusal::Invalid));
        }
        assert_eq!(HIDDEN.joined(0, true, PINNED), Err(Refusal::Invalid));
        assert_eq!(HIDDEN.joined(0, false, PINNED), Ok(PINNED));
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
