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
            Self::Only(owner) => owner.is_some() && owner == context,
        }
    }

    /// The claim after a consumer of this context has bound.
    pub(crate) fn taken(self, context: Option<NonZeroU64>) -> Self {
        match self {
            Self::First => Self::Only(context),
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
    fn one_without_a_context_binds_once() {
        let claim = Claim::new(true).taken(None);
        assert!(!claim.admits(None) && !claim.admits(A));
    }
}
