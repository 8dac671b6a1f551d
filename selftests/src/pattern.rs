// SPDX-License-Identifier: GPL-2.0
//! Memory content that depends on the place and the generation of the write.
//!
//! The word at byte address `a` in generation `g` is `mix(g) + a * STEP` modulo 2^64. Neighbouring
//! words differ by a constant, so the guest's loop needs one addition per word, and a word of
//! another place or another generation never looks right.

/// Factor of the address; odd, so distinct addresses give distinct words.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// An arithmetic sequence of words over a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Every word has this value.
    Constant(u64),
    /// Position-dependent words of one generation.
    Generation(u64),
}

impl Pattern {
    /// All words zero.
    pub const ZERO: Pattern = Pattern::Constant(0);

    /// The word at byte address `addr`.
    pub fn word(self, addr: u64) -> u64 {
        match self {
            Pattern::Constant(value) => value,
            Pattern::Generation(g) => mix(g).wrapping_add(addr.wrapping_mul(STEP)),
        }
    }

    /// The difference between two words that are `stride` bytes apart.
    pub fn step(self, stride: u64) -> u64 {
        match self {
            Pattern::Constant(_) => 0,
            Pattern::Generation(_) => stride.wrapping_mul(STEP),
        }
    }
}

/// Spread a small number over 64 bits (the finaliser of SplitMix64).
pub fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A small generator of random numbers, for stress tests only.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// Any 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0)
    }

    /// A number in `0..bound`; `bound` is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }
}

/// The seed of a stress test: `MEMFILE_SEED` or the clock. Printed, so a run can be repeated.
pub fn seed() -> u64 {
    let seed =
        std::env::var("MEMFILE_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.map_or(1, |d| d.as_nanos() as u64)
        });
    println!("seed: MEMFILE_SEED={seed}");
    seed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn step_agrees_with_word() {
        for p in [Pattern::Generation(7), Pattern::Constant(5), Pattern::ZERO] {
            for (a, stride) in [(0, 8), (0x1_0000_0000, 4096), (u64::MAX - 7, 8)] {
                let next: u64 = u64::wrapping_add(a, stride);
                assert_eq!(p.word(a).wrapping_add(p.step(stride)), p.word(next));
            }
        }
    }

    #[test]
    fn words_depend_on_place_and_generation() {
        let mut seen = std::collections::HashSet::new();
        for g in 0..64 {
            for a in (0..1u64 << 20).step_by(4096) {
                let word = Pattern::Generation(g).word(a);
                assert_ne!(word, 0);
                assert!(seen.insert(word), "generation {g} address {a:#x} repeats a word");
            }
        }
    }

    #[test]
    fn below_stays_below() {
        let mut rng = Rng::new(1);
        for bound in [1, 2, 3, 1000, u64::MAX] {
            assert!((0..100).all(|_| rng.below(bound) < bound));
        }
    }
}
