# SPDX-License-Identifier: GPL-2.0
"""The builds at the beginning of a run of scripts/check."""

from __future__ import annotations

import concurrent.futures

from memfile.check.guest import chosen_suites
from memfile.check.session import Check
from memfile.check.suites import OWN_MACHINE, WITH_QEMU


def build_all(check: Check, with_upstream: bool) -> None:
    def programs() -> None:
        check.build("build-selftests")
        if with_upstream:
            check.build("build-selftests", "--upstream")
        if any(OWN_MACHINE.get(suite) is WITH_QEMU for suite in chosen_suites(check)):
            check.build("build-qemu")
            check.build("build-qemu", "lab")
            check.build("fetch-guest")

    def kernels() -> None:
        check.build("build-kernel", check.flavour)
        if check.flavour != "base":
            check.build("build-module", check.flavour)

    # The kernel's Rust comes first and keeps one core busy.
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for built in [pool.submit(programs), pool.submit(kernels)]:
            built.result()
    if with_upstream:
        check.build("build-kernel", "base")
