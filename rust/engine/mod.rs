// SPDX-License-Identifier: GPL-2.0

//! What a memfile does, in terms of [`crate::abi`] and by the rules of [`crate::policy`].

pub(crate) mod node;
pub(crate) mod shmem;
pub(crate) mod stats;
pub(crate) mod store;
