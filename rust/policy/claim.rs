// SPDX-License-Identifier: GPL-2.0

//! The VM that may bind a file whose creator allows only one (`MFD_ONE_VM`).

use core::num::NonZeroU64;

/// The consumers that may bind. The context identifies a consumer; one without a context cannot be
/// distinguished from others.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Claim {
    /// Every consumer may bind.
    Anybody,
    /// The first consumer may bind.
    First,
    /// The first consumer is about to bind, and may fail. Until then it is as with [`Self::Only`].
    Trying(Option<NonZeroU64>),
    /// Only the consumer of this context may bind.
    Only(Option<NonZeroU64>),
}

impl Claim {
    /// The claim on a new file.
    pub(crate) fn new(one_vm: bool) -> Self {
        if one_vm {
            Self::First
        } else {
            Self::Anybody
        }
    }

    /// May a consumer of this context bind?
    pub(crate) fn admits(self, context: Option<NonZeroU64>) -> bool {
        match self {
            Self::Anybody | Self::First => true,
            Self::Trying(owner) | Self::Only(owner) => owner.is_some() && owner == context,
        }
    }

    /// The claim after a consumer of this context has begun to bind.
    pub(crate) fn taken(self, context: Option<NonZeroU64>) -> Self {
        match self {
            Self::First => Self::Trying(context),
            other => other.confirmed(),
        }
    }

    /// The claim after one has bound.
    pub(crate) fn confirmed(self) -> Self {
        match self {
            Self::Trying(owner) => Self::Only(owner),
            other => other,
        }
    }

    /// The claim after one has failed to bind: nobody has had the file, if it was the first.
    pub(crate) fn given_back(self) -> Self {
        match self {
            Self::Trying(_) => Self::First,
            other => other,
        }
    }
}

#[cfg_attr(CONFIG_KUNIT = "y", kernel::macros::kunit_tests(memfile_claim))]
#[cfg(any(test, CONFIG_KUNIT = "y"))]
mod tests {
    use super::*;

    const A: Option<NonZeroU64> = NonZeroU64::new(1);
    const B: Option<NonZeroU64> = NonZeroU64::new(2);

    #[test]
    fn anybody_may_bind_an_ordinary_memfile() {
        let claim = Claim::new(false).taken(A);
        assert!(claim.admits(A) && claim.admits(B) && claim.admits(None));
    }

    #[test]
    fn the_first_who_binds_is_the_only_one() {
        let claim = Claim::new(true);
        assert!(claim.admits(A) && claim.admits(B));
        let claim = claim.taken(A);
        assert!(claim.admits(A));
        assert!(!claim.admits(B) && !claim.admits(None));
        assert!(!claim.taken(B).admits(B));
    }

    #[test]
    fn the_first_who_fails_leaves_it_to_anybody() {
        let claim = Claim::new(true).taken(A);
        assert!(!claim.admits(B) && !claim.admits(None));
        assert!(claim.given_back().admits(B));
        // Not if it has been bound, now or ever.
        assert!(!claim.confirmed().given_back().admits(B));
        assert!(!claim.taken(A).given_back().admits(B));
        assert!(!claim.confirmed().taken(A).given_back().admits(B));
        assert!(Claim::new(false).taken(A).given_back().admits(B));
    }

    #[test]
    fn one_without_a_context_binds_once() {
        let claim = Claim::new(true).taken(None);
        assert!(!claim.admits(None) && !claim.admits(A));
    }
}
