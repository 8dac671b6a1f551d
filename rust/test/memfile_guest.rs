// SPDX-License-Identifier: GPL-2.0

//! In a guest: asks the host to convert pages, when it is loaded, and is not needed after that. For
//! tests, whose user space may not make hypercalls.
//!
//! The pages belong to whoever loads it; it has no idea of what lies in them.

#[path = "guest/abi.rs"]
mod abi;

use kernel::prelude::*;

module! {
    type: Module,
    name: "memfile_guest",
    authors: ["The memfile authors"],
    description: "Asks the host to convert pages, for tests",
    license: "GPL",
    params: {
        frame: u64 {
            default: 0,
            description: "The first page frame",
        },
        pages: u64 {
            default: 0,
            description: "How many",
        },
        attributes: u64 {
            default: 0,
            description: "Those of KVM_HC_MAP_GPA_RANGE",
        },
    },
}

struct Module;

impl kernel::Module for Module {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let (frame, pages, attributes) = (
            module_parameters::frame.value(),
            module_parameters::pages.value(),
            module_parameters::attributes.value(),
        );
        abi::map_gpa_range(frame, pages, attributes)?;
        Ok(Self)
    }
}
