// SPDX-License-Identifier: GPL-2.0

//! Tests the policy layer against slow and simple models.

use crate::policy::flags::Flags;
use crate::policy::range::{Range, Span};
use proptest::prelude::*;
use std::collections::BTreeMap;

/// Pages and frames small enough that ranges often meet.
const SMALL: u64 = 64;

prop_compose! {
    fn small_range()(start in 0..SMALL, len in 1..SMALL) -> (u64, u64) {
        (start, start + len)
    }
}

prop_compose! {
    /// A binding, and the same as a map from page to frame.
    fn small_binding()(pgoff in 0..SMALL, pages in 1..SMALL, frame in 0..SMALL)
        -> (Span, BTreeMap<u64, u64>) {
        let span = Span::new(pgoff, pages, frame, 4 * SMALL).unwrap();
        (span, (0..pages).map(|i| (pgoff + i, frame + i)).collect())
    }
}

proptest! {
    #[test]
    fn frames_of_is_the_image_of_the_bound_pages((span, model) in small_binding(),
                                                 (start, end) in small_range()) {
        let image: Vec<u64> = model.range(start..end).map(|(_, &frame)| frame).collect();
        let frames = span.frames_of(Range::new(start, end).unwrap());
        let got: Vec<u64> = frames.map_or(vec![], |r| (r.start()..r.end()).collect());
        prop_assert_eq!(got, image);
    }

    #[test]
    fn page_of_inverts_the_map((span, model) in small_binding(), frame in 0..4 * SMALL) {
        let page = model.iter().find(|&(_, &f)| f == frame).map(|(&p, _)| p);
        prop_assert_eq!(span.page_of(frame), page);
    }

    #[test]
    fn order_at_is_the_largest_aligned_block_that_is_bound((span, model) in small_binding(),
                                                           frame in 0..4 * SMALL,
                                                           folio_order in 0u32..7) {
        let fits = |order: u32| {
            let size = 1 << order;
            let first = frame / size * size;
            (first..first + size).all(|f| {
                let offset = f - first;
                model.iter().any(|(&p, &bound)| bound == f && p % size == offset)
            })
        };
        let want = if model.values().any(|&f| f == frame) {
            (0..=folio_order).rev().find(|&order| fits(order)).unwrap_or(0)
        } else {
            0
        };
        prop_assert_eq!(span.order_at(frame, folio_order), want);
    }

    #[test]
    fn overlap_is_symmetric_and_agrees_with_intersection((a, b) in small_range(),
                                                         (c, d) in small_range()) {
        let (x, y) = (Range::new(a, b).unwrap(), Range::new(c, d).unwrap());
        prop_assert_eq!(x.overlaps(y), y.overlaps(x));
        prop_assert_eq!(x.overlaps(y), x.intersect(y).is_some());
        prop_assert_eq!(x.overlaps(y), (a..b).any(|page| (c..d).contains(&page)));
    }

    #[test]
    fn nothing_panics_at_the_edges_of_u64(pgoff: u64, pages: u64, frame: u64, size: u64,
                                          at: u64, order in 0u32..64) {
        if let Ok(span) = Span::new(pgoff, pages, frame, size) {
            prop_assert_eq!(Span::accepted(pgoff, pages, frame), span);
            prop_assert!(span.order_at(at, order) <= order);
            if let Some(page) = span.page_of(at) {
                prop_assert!(page - pgoff < pages);
            }
        }
    }

    #[test]
    fn flags_are_what_was_promised(steps in prop::collection::vec(
            (prop_oneof![3 => (0u64..18).prop_map(Some), 2 => Just(None)], any::<bool>()), 1..40)) {
        let mut flags = Flags::CREATION;
        let (mut bound, mut promised) = (0, 1);
        for (step, has_pages) in steps {
            match step {
                Some(wish) => {
                    let keeps = (0..4).all(|bit| promised >> bit & 1 <= wish >> bit & 1);
                    let known = wish < 16 && wish & 1 == 1 && (wish < 8 || wish & 7 == 7);
                    let hides = wish & 8 > promised & 8;
                    let legal = known
                        && (keeps || bound == 0 && !has_pages)
                        && (!hides || bound == 0);
                    let joined = Flags::from_consumer(wish)
                        .and_then(|wish| flags.joined(bound, has_pages, wish));
                    prop_assert_eq!(joined.is_ok(), legal);
                    if let Ok(joined) = joined {
                        flags = joined;
                        promised = wish;
                        bound += 1;
                    }
                }
                None => bound = bound.saturating_sub(1),
            }
            prop_assert_eq!(u64::from(flags.bits()), promised);
        }
    }
}
