// SPDX-License-Identifier: GPL-2.0

//! The behaviour of a memfile, by the rules of [`crate::policy`], with its pages in any
//! [`crate::store`].

pub(crate) mod node;
pub(crate) mod pages;
pub(crate) mod stats;
