// SPDX-License-Identifier: GPL-2.0
//! Random operations on a file and on a model of it must agree, call by call.
//!
//! Ordinary files of shmem prove that the patches change nothing for them; with
//! F_SEAL_AUTO_ALLOCATE they test the promises of the seal, and a memfile tests rule 2, one of huge
//! pages rule 24 as well. After each operation size and st_blocks are compared, at times all content
//! and every hole. A failure prints the last operations, and the seed to repeat them.

mod dice;
mod file;
mod huge;
mod memfile;
mod operation;
mod shmem;

pub use self::huge::{SUITE as SUITE_HUGE, SUITE_1G};
use self::memfile::*;
use self::shmem::*;
use crate::ktap::Suite;
use crate::suite;

pub static SUITE: Suite = suite!(
    "model",
    [
        ordinary_memfd_is_as_ever,
        tmpfs_file_is_as_ever,
        sealed_memfd_gets_memory_by_fallocate_only,
        memfile_has_the_pages_it_was_told_to_have,
        memfile_of_a_guest_has_what_both_made_of_it,
    ]
);
