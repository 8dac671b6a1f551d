#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of the demo's page in a browser: python3 scripts/test_demo.py

Skipped where there is no Chromium, or no memfile-plot yet (scripts/build-selftests builds it).
"""

import html
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Any

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile.paths import PLOT

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MIB = 1 << 20


def report() -> dict[str, object]:
    """As memfile-demo writes it."""
    def figure(mib: int) -> dict[str, int]:
        return {"by_object": mib * MIB, "by_machine": mib * MIB}

    steps = ["created", "written", "reclaimed", "reclaimed", "read", "punched", "compacted", "rewritten", "gone"]
    course = [
        {
            "step": step, "allocated": 64 * MIB, "resident": (64 - 8 * n) * MIB, "swapped": 8 * n * MIB, "refaults": n,
            "migrated": n, "free_2m_blocks": 900 + n, "memfile": None,
        }
        for n, step in enumerate(steps[:8])
    ]
    course.append({**course[0], "step": "gone", "allocated": None})
    row = {
        "name": "memfile, on demand", "size": 256 * MIB, "touched": 64 * MIB, "source": "st_blocks",
        "after_creation": figure(0), "after_write": figure(64), "after_punch": figure(32),
        "after_touch_again": figure(64), "after_end": figure(0), "hole_reads_zeros": True,
        "own_data_elsewhere": True, "kernel_reads_it": True, "kvm_pages_4k": 1, "kvm_pages_2m": 0,
    }
    secret = {
        **row, "name": "memfd_secret", "after_punch": None, "after_touch_again": None, "hole_reads_zeros": None,
        "kernel_reads_it": False,
    }
    return {
        "kernel": "7.3.4", "machine": 1998 * MIB, "rows": [row, {**row, "name": "memfile, fallocate first"}, secret],
        "missing": [],
        "story": {
            "size": 64 * MIB, "working_set": 16 * MIB, "wanted": 8 * MIB, "keep": 4, "missing": [],
            "courses": [{"name": name, "samples": course, "own_data": True} for name in ("one", "two")],
        },
    }


@unittest.skipUnless(BROWSER, "no Chromium here")
@unittest.skipUnless(PLOT.exists(), "memfile-plot is not built")
class Page(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        (self.folder / "demo.json").write_text(json.dumps(report()))
        self.page = self.folder / "demo.html"
        subprocess.run([PLOT, self.folder / "demo.json", "--html", self.page], check=True)

    def browse(self, *options: str) -> subprocess.CompletedProcess[str]:
        """The page from disk, without any network."""
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        command = [
            str(BROWSER), "--headless", *sandbox, "--disable-gpu", "--enable-logging=stderr", "--log-level=0",
            "--proxy-server=127.0.0.1:9", f"--user-data-dir={self.folder}/profile", *options, self.page.as_uri(),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)

    def ask(self, question: str, *options: str) -> Any:
        """The browser's own answer to a question about the page, which must leave its console empty."""
        text = self.page.read_text()
        self.page.write_text(text.replace("</html>", f"<script>document.title = JSON.stringify({question})</script>"))
        run = self.browse("--window-size=1000,1200", *options, "--dump-dom")
        self.page.write_text(text)
        found = re.search(r"<title>(.*?)</title>", run.stdout)
        assert found is not None, run.stdout[:500]
        self.assertNotIn("CONSOLE", run.stderr)
        return json.loads(html.unescape(found[1]))

    def test_parts_are_laid_out_and_the_console_is_empty(self) -> None:
        boxes = self.ask(
            "['#summary', '#bars', '#pressure', 'table'].map(s => {"
            "const box = document.querySelector(s).getBoundingClientRect(); return [box.width, box.height]})")
        for width, height in boxes:
            self.assertGreater(width, 300)
            self.assertGreater(height, 20)

    def test_values_are_shown_on_hover_and_events_are_marked(self) -> None:
        bars, steps, events = self.ask(
            "['#bars g > title', '#pressure .hit > title', '#pressure .event > title']"
            ".map(s => [...document.querySelectorAll(s)].map(title => title.textContent))")
        self.assertIn("memfile, on demand, wrote a quarter: 64 MiB", bars)
        # Two courses of nine steps.
        self.assertEqual(len(steps), 18)
        self.assertIn("one, written: resident 56 MiB, swapped 8 MiB, allocated 64 MiB, 901 free blocks of 2 MiB", steps)
        self.assertEqual(
            events, ["host wants 8 MiB each time", "host wants 8 MiB each time", "guest gives back", "host compacts"])
        # One axis of steps for all courses.
        self.assertEqual(self.ask("new Set([...document.querySelectorAll('#pressure .hit')].map(r => r.x.baseVal.value)).size"), 9)

    def test_page_is_dark_where_the_reader_wants_that(self) -> None:
        colour = "['backgroundColor', 'color'].map(p => getComputedStyle(document.body)[p])"
        light = self.ask(colour, "--blink-settings=preferredColorScheme=1")
        dark = self.ask(colour, "--blink-settings=preferredColorScheme=0")
        self.assertEqual(light, ["rgb(255, 255, 255)", "rgb(27, 31, 36)"])
        self.assertEqual(dark, ["rgb(21, 25, 30)", "rgb(230, 237, 243)"])

    def test_page_can_be_printed(self) -> None:
        paper = self.folder / "page.pdf"
        self.browse("--no-pdf-header-footer", f"--print-to-pdf={paper}")
        data = paper.read_bytes()
        self.assertEqual(data[:5], b"%PDF-")
        # An empty sheet takes less than 1 kB.
        self.assertGreater(len(data), 10000)

    def test_screenshot_is_not_blank(self) -> None:
        picture = self.folder / "page.png"
        self.browse("--window-size=1000,1200", f"--screenshot={picture}")
        data = picture.read_bytes()
        self.assertEqual(struct.unpack(">II", data[16:24]), (1000, 1200))
        # An empty page of this size takes 5 kB.
        self.assertGreater(len(data), 40000)


if __name__ == "__main__":
    unittest.main()
