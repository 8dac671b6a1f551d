// SPDX-License-Identifier: GPL-2.0

//! `MEMFILE_F_*`: what a file is while it is bound (rule 8).

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
    /// All that there are; what KVM registers with unless told otherwise.
    pub(crate) const ALL: u32 = Self::USER_INACCESSIBLE | Self::UNMOVABLE | Self::UNRECLAIMABLE;

    /// What a file has from its creation on, and again after its last binding.
    pub(crate) const CREATION: Self = Self(Self::USER_INACCESSIBLE);

    /// What a consumer asks for: known bits, and not weaker than [`Self::CREATION`].
    pub(crate) fn from_consumer(bits: u64) -> Result<Self, Refusal> {
        let bits = u32::try_from(bits).map_err(|_| Refusal::Invalid)?;
        if bits & !Self::ALL != 0 || bits & Self::USER_INACCESSIBLE == 0 {
            return Err(Refusal::Invalid);
        }
        Ok(Self(bits))
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

    /// What the file is after `wish` joins `bound` bindings: the first one decides, the others
    /// must want the same.
    pub(crate) fn joined(self, bound: usize, wish: Self) -> Result<Self, Refusal> {
        if bound == 0 || self == wish {
            Ok(wish)
        } else {
            Err(Refusal::Invalid)
        }
    }

    /// What the file is when `bound` bindings are left.
    pub(crate) fn left(self, bound: usize) -> Self {
        if bound == 0 {
            Self::CREATION
        } else {
            self
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
    fn the_first_binding_decides_and_a_different_wish_is_refused() {
        assert_eq!(Flags::CREATION.joined(0, PINNED), Ok(PINNED));
        assert_eq!(PINNED.joined(1, PINNED), Ok(PINNED));
        assert_eq!(PINNED.joined(1, Flags::CREATION), Err(Refusal::Invalid));
        assert_eq!(Flags::CREATION.joined(1, PINNED), Err(Refusal::Invalid));
    }

    #[test]
    fn flags_fall_back_to_creation_with_the_last_binding() {
        assert_eq!(PINNED.left(1), PINNED);
        assert_eq!(PINNED.left(0), Flags::CREATION);
    }
}
