// SPDX-License-Identifier: GPL-2.0

//! A module for guests: when it is loaded, it asks the host to convert pages. It is not needed
//! after that. For tests, because userspace may not make hypercalls.
//!
//! The pages belong to the test that loads it; the module does not look at their content.

#[path = "guest/abi.rs"]
mod abi;
#[path = "../abi/base.rs"]
mod base;

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
            base::parameter(module_parameters::frame.value()),
            base::parameter(module_parameters::pages.value()),
            base::parameter(module_parameters::attributes.value()),
        );
        abi::map_gpa_range(frame, pages, attributes)?;
        Ok(Self)
    }
}
