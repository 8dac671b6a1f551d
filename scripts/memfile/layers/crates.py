# SPDX-License-Identifier: GPL-2.0
"""The crates of the project, and the layers of each."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Layer:
    """Modules of the crate's root that may use each other, and all below."""

    modules: str
    # None of it in these modules.
    unsafe: bool = True
    # Beginnings of a path that these modules may not use: "kernel", or "a_crate::module".
    foreign: tuple[str, ...] = ()
    # The modules below these do not use each other.
    apart: bool = False


@dataclasses.dataclass(frozen=True)
class Crate:
    root: str
    # Top to bottom; the root's own items belong where "crate" is.
    layers: tuple[Layer, ...]


# Only the layer that wraps C may use it.
NO_C = ("bindings",)

CRATES = (
    Crate("rust/memfile_main.rs", (
        Layer("crate"),
        Layer("kunit"),
        Layer("entry"),
        Layer("engine", unsafe=False, foreign=NO_C),
        Layer("store", unsafe=False, foreign=NO_C),
        Layer("abi"),
        Layer("policy", unsafe=False, foreign=(*NO_C, "kernel")),
        Layer("bindings"),
    )),
    Crate("rust/test/memfile_test.rs", (
        Layer("crate", unsafe=False, foreign=NO_C),
        Layer("example recorder", unsafe=False, foreign=NO_C),
        Layer("memfile"),
        Layer("base bindings"),
    )),
    Crate("rust/test/memfile_store.rs", (
        Layer("crate", unsafe=False, foreign=NO_C),
        Layer("abi"),
        Layer("memory", unsafe=False, foreign=NO_C),
        Layer("base bindings"),
    )),
    Crate("rust/test/memfile_guest.rs", (
        Layer("crate", unsafe=False, foreign=NO_C),
        Layer("abi", foreign=NO_C),
        Layer("base"),
    )),
    # The engine and the policy on the host; what is below the engine is stood in for.
    Crate("rust/host/src/lib.rs", (
        Layer("allocation cost lifetime properties protocol sequence"),
        Layer("engine"),
        Layer("store", unsafe=False),
        Layer("abi", unsafe=False),
        Layer("policy", unsafe=False, foreign=(*NO_C, "kernel")),
        Layer("crate"),
        Layer("stand_in"),
    )),
    Crate("selftests/src/lib.rs", (
        Layer("suites", apart=True),
        Layer("script"),
        Layer("support"),
        Layer("bench demo trace"),
        Layer("qemu"),
        Layer("agent"),
        Layer("pressure"),
        Layer("consumer store vm"),
        Layer("module"),
        Layer("ktap"),
        Layer("knobs"),
        Layer("guest mem"),
        Layer("sys"),
        Layer("pattern skip uapi"),
        Layer("crate"),
    )),
)

# Programs of one file each, of what the library has: the suites are memfile-tests' only.
PROGRAMS = tuple(
    Crate(f"selftests/src/bin/{name}.rs", (Layer("crate", foreign=() if suites else ("memfile_selftests::suites",)),))
    for name, suites in (
        ("memfile-bench", False),
        ("memfile-crash", False),
        ("memfile-demo", False),
        ("memfile-guest", False),
        ("memfile-plot", False),
        ("memfile-replay", False),
        ("memfile-tests", True),
        ("memfile-trace", False),
        ("memfile-vm", False),
    )
)
