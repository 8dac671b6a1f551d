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
import zlib
from pathlib import Path
from typing import Any

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile.paths import PLOT

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MIB = 1 << 20
# Colours of scripts/page.css for light pages.
WHITE, TEXT, BLUE, ORANGE = (255, 255, 255), (27, 31, 36), (0, 85, 170), (194, 87, 12)
GREEN, GREY, BAND = (34, 119, 51), (182, 190, 199), (240, 243, 246)


def pixels(file: Path) -> list[list[tuple[int, ...]]]:
    """The rows of a PNG file of 8 bits for each of red, green, blue, and possibly alpha."""
    data, packed, at = file.read_bytes(), b"", 8
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at:at + 8])
        body = data[at + 8:at + 8 + length]
        if kind == b"IHDR":
            width, height, depth, colours, interlaced = struct.unpack(">IIBB2xB", body)
            assert depth == 8 and colours in (2, 6) and not interlaced
            size = 3 if colours == 2 else 4
        elif kind == b"IDAT":
            packed += body
        at += 12 + length
    raw, rows, above = zlib.decompress(packed), [], bytes(width * size)
    for y in range(height):
        start = y * (width * size + 1)
        filtered, row = raw[start], bytearray(raw[start + 1:start + 1 + width * size])
        for x, byte in enumerate(row):
            left, up, corner = (row[x - size], above[x], above[x - size]) if x >= size else (0, above[x], 0)
            middle = left + up - corner
            nearest = min((left, up, corner), key=lambda value: abs(middle - value))
            row[x] = byte + (0, left, up, (left + up) // 2, nearest)[filtered] & 255
        rows.append([tuple(row[x:x + 3]) for x in range(0, len(row), size)])
        above = bytes(row)
    return rows


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

    def test_screenshot_has_every_part_in_its_colours(self) -> None:
        parts = {
            "#summary": {TEXT}, "#bars": {TEXT, BLUE}, "#pressure": {TEXT, BLUE, ORANGE, GREEN, GREY, BAND}, "table": {TEXT},
        }
        boxes = self.ask(
            f"{list(parts)}.map(s => {{const box = document.querySelector(s).getBoundingClientRect();"
            "return [box.left, box.top, box.right, box.bottom].map(Math.round)})", "--window-size=1000,1600")
        file = self.folder / "page.png"
        self.browse("--window-size=1000,1600", "--hide-scrollbars", "--blink-settings=preferredColorScheme=1",
                    f"--screenshot={file}")
        rows = pixels(file)
        self.assertEqual((len(rows[0]), len(rows)), (1000, 1600))
        for (part, colours), (left, top, right, bottom) in zip(parts.items(), boxes):
            seen = {colour for row in rows[top:bottom] for colour in row[left:right]}
            self.assertEqual((colours | {WHITE}) - seen, set(), part)


if __name__ == "__main__":
    unittest.main()
