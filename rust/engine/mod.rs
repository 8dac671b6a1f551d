// SPDX-License-Identifier: GPL-2.0

//! What a memfile does, by the rules of [`crate::policy`], in whichever [`crate::store`] its pages
//! are.

pub(crate) mod node;
pub(crate) mod pages;
pub(crate) mod stats;
