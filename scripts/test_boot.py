#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of boot: python3 scripts/test_boot.py"""

import argparse
import sys
import tempfile
import threading
import unittest
from pathlib import Path
from unittest import mock

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile import paths
from memfile.boot import accelerator
from memfile.boot.kernel import Kernel


class Accelerator(unittest.TestCase):
    ARGS = argparse.Namespace(icount=False, accel="auto")

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.cache = Path(folder.name)
        for patch in (
            mock.patch.object(accelerator, "kvm_answers", lambda: None),
            mock.patch.object(paths, "KVM_PROBE", self.cache / "kvm-probe"),
        ):
            patch.start()
            self.addCleanup(patch.stop)

    def choose(self) -> str:
        return accelerator.choose_accelerator(self.ARGS, Kernel("plain", self.cache))[0]

    def test_boots_at_the_same_time_probe_once(self) -> None:
        first_probes, others_came = threading.Event(), threading.Event()
        probes, answers = [], []

        def probe(*_: object) -> bool:
            probes.append(threading.current_thread())
            first_probes.set()
            others_came.wait(10)
            return True

        with mock.patch.object(accelerator, "probe_kvm", probe):
            threads = [threading.Thread(target=lambda: answers.append(self.choose())) for _ in range(3)]
            threads[0].start()
            self.assertTrue(first_probes.wait(10))
            for thread in threads[1:]:
                thread.start()
            others_came.set()
            for thread in threads:
                thread.join(10)
        self.assertEqual((len(probes), answers), (1, ["kvm"] * 3))

    def test_answer_of_an_earlier_boot_of_the_host_does_not_count(self) -> None:
        (self.cache / "kvm-probe").write_text("another-boot yes\n")
        with mock.patch.object(accelerator, "probe_kvm", lambda *_: False):
            self.assertEqual(self.choose(), "tcg")
        with mock.patch.object(accelerator, "probe_kvm", side_effect=AssertionError):
            self.assertEqual(self.choose(), "tcg")


if __name__ == "__main__":
    unittest.main()
