#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Tests of check-layers: python3 scripts/test_check_layers.py"""

import sys
import tempfile
import unittest
from pathlib import Path

# The checkout stays clean.
sys.dont_write_bytecode = True

from memfile.layers.crates import CRATES, PROGRAMS, Crate, Layer
from memfile.layers.problems import problems
from memfile.paths import ROOT

THREE = (Layer("crate"), Layer("top"), Layer("middle"), Layer("low"))
LIB = "mod top;\nmod middle;\nmod low;\n"


class CheckLayers(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def problems(self, files: dict[str, str], layers: tuple[Layer, ...] = THREE) -> list[str]:
        """The violations of a crate that has these files; those of THREE are there if they are not among them."""
        given = {"lib.rs": LIB, "top.rs": "", "middle.rs": "", "low.rs": ""} if layers is THREE else {}
        for name, text in {**given, **files}.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return problems(self.folder, Crate("lib.rs", layers))[0]

    def expect_one(self, wanted: str, found: list[str]) -> None:
        self.assertEqual(len(found), 1, found)
        self.assertIn(wanted, found[0])

    def test_downward_is_well(self) -> None:
        files = {"top.rs": "use crate::middle::A;\nuse crate::low::{self, B as C};\n", "middle.rs": "use super::low;\n"}
        self.assertEqual(self.problems(files), [])

    def test_upward_is_found_in_every_spelling(self) -> None:
        for text in (
            "use crate::top::A;",
            "pub(crate) use crate::top::A;",
            "use crate::{low::B, top::{A, self}};",
            "use super::top;",
            "use super::top::*;",
            "use crate as all;\nfn f() { all::top::f() }",
            "fn f() { crate::top::f() }",
            "fn f(x: &dyn super::top::Trait) {}",
            "impl crate :: top :: Trait for u8 {}",
            "mod tests { use super::super::top::A; }",
            "mod tests {\n fn f() { let _ = '{'; crate::top::f() } }",
            "macro_rules! m { () => { $crate::top::f() } }",
            "fn f<'a>(x: &'a str) -> char { crate::top::f::<'a>(x); 'a' }",
        ):
            with self.subTest(text):
                found = self.problems({"middle.rs": text})
                self.assertTrue(any("layer middle uses top above it" in line for line in found), found)

    def test_what_is_no_use(self) -> None:
        text = (
            "// use crate::top::A;\n/* /* crate::top::f() */ crate::top::f() */\n//! [`crate::top`]\n"
            'const A: &str = "use crate::top::A; \\" crate::top";\nconst B: &str = r#"" crate::top::A "#;\n'
            "#[doc(alias = crate::top::NAME)]\nfn f(top: u8) -> u8 { top }\nuse std::top::A;\n"
        )
        self.assertEqual(self.problems({"middle.rs": text}), [])

    def test_line_is_named(self) -> None:
        self.expect_one("middle.rs:3: crate::top::A: ", self.problems({"middle.rs": "//\n/*\n*/use crate::top::A;\n"}))

    def test_a_circle_inside_of_a_layer(self) -> None:
        files = {
            "low.rs": "mod a;\nmod b;\nmod c;\n",
            "low/a.rs": "use super::b::B;\n",
            "low/b.rs": "use super::c;\nfn f() { c::f() }\n",
            "low/c.rs": "use crate::low::a::A;\n",
        }
        found = self.problems(files)
        self.expect_one("a circle: low/a.rs:1 uses low/b.rs", found)
        self.assertIn("low/c.rs:1 uses low/a.rs (crate::low::a::A)", found[0])

    def test_a_module_and_what_lies_below_it(self) -> None:
        shared = "pub mod a;\npub struct S;\n"
        # It says that the other is there, and the other uses what both share.
        self.assertEqual(self.problems({"low.rs": shared, "low/a.rs": "use super::S;\n"}), [])
        uses = shared + "fn f() { a::f() }\n"
        self.expect_one("a circle: ", self.problems({"low.rs": uses, "low/a.rs": "use super::S;\n"}))

    def test_names_that_are_handed_on(self) -> None:
        files = {
            "low.rs": "mod a;\nmod b;\npub use a::A;\npub use b::B;\n",
            "low/a.rs": "pub struct A;\n",
            "low/b.rs": "use super::A;\npub struct B;\n",
            "top.rs": "use crate::low::B;\n",
        }
        self.assertEqual(self.problems(files), [])
        # The name stands for what is in the other file.
        files["low/a.rs"] = "use super::B;\npub struct A;\n"
        self.expect_one("a circle: low/a.rs:1 uses low/b.rs", self.problems(files))
        # By way of a module that is none of its own.
        files["low/a.rs"] = "pub struct A;\n"
        files["low.rs"] += "pub use crate::middle::M;\n"
        self.expect_one("layer low uses middle above it", self.problems({**files, "middle.rs": "pub struct M;\n"}))

    def test_macros_of_the_root_are_where_they_are_written(self) -> None:
        macro = "#[macro_export]\nmacro_rules! suite {\n () => {};\n}\n"
        self.assertEqual(self.problems({"low.rs": macro, "middle.rs": "use crate::suite;\n"}), [])
        found = self.problems({"top.rs": macro, "middle.rs": "crate::suite!();\n", "low.rs": ""})
        self.expect_one("layer middle uses top above it", found)

    def test_files_are_found_as_rustc_finds_them(self) -> None:
        files = {
            "lib.rs": '#[path = "elsewhere/t.rs"]\n#[cfg(test)]\nmod top;\nmod middle;\nmod low { pub mod deep; }\n',
            "elsewhere/t.rs": "mod part;\nuse part::P;\n",
            "elsewhere/part.rs": "pub struct P;\n",
            "middle/mod.rs": "mod part;\n",
            "middle/part.rs": "use crate::low::deep::D;\n",
            "low/deep.rs": "use crate::top::A;\n",
        }
        (self.folder / "middle").mkdir()
        layers = (*THREE[:3], Layer("low", unsafe=False))
        self.expect_one("low/deep.rs:1: crate::top::A", self.problems(files, layers))
        (self.folder / "low/deep.rs").unlink()
        del files["low/deep.rs"]
        self.expect_one("there is no ", self.problems(files, layers))

    def test_a_module_without_a_layer(self) -> None:
        found = self.problems({"lib.rs": LIB + "mod more;\n", "more.rs": ""})
        self.expect_one("more.rs: module more is in no layer", found)

    def test_what_a_layer_forbids_itself(self) -> None:
        layers = (Layer("crate"), Layer("safe", unsafe=False, foreign=("bindings", "kernel")), Layer("bindings"))
        lib = {"lib.rs": "mod safe;\nmod bindings;\n", "bindings.rs": ""}
        for text, wanted in (
            ("fn f() { unsafe { g() } }", "safe.rs:1: unsafe in layer safe"),
            ("use kernel::prelude::*;", "safe.rs:1: layer safe uses kernel::prelude"),
            ("use crate::bindings;", "safe.rs:1: layer safe uses crate::bindings"),
            ("fn f() { crate::bindings::g() }", "safe.rs:1: layer safe uses crate::bindings::g"),
        ):
            with self.subTest(text):
                self.expect_one(wanted, self.problems({**lib, "safe.rs": text}, layers))
        well = "// unsafe\n#[kernel::macro_of_attributes]\nfn f() { not_unsafe() }\n"
        self.assertEqual(self.problems({**lib, "safe.rs": well}, layers), [])

    def test_a_module_of_another_crate_that_a_layer_forbids_itself(self) -> None:
        layers = (Layer("crate", foreign=("library::suites",)),)
        for text in (
            "use library::suites::a::A;",
            "use library::{sys, suites};",
            "fn f() { library::suites::all() }",
        ):
            with self.subTest(text):
                self.expect_one("layer crate uses library::suites", self.problems({"lib.rs": text}, layers))
        well = "use library::sys;\nuse library::{suites_of_others, support::suites};\n"
        self.assertEqual(self.problems({"lib.rs": well}, layers), [])

    def test_modules_that_stay_apart(self) -> None:
        files = {
            "lib.rs": "mod suites;\nmod low;\n",
            "suites.rs": "mod a;\nmod b;\nuse a::A;\nuse b::B;\n",
            "suites/a.rs": "mod part;\nuse part::P;\nuse crate::low::L;\n",
            "suites/a/part.rs": "use crate::low;\n",
            "suites/b.rs": "",
            "low.rs": "",
        }
        layers = (Layer("crate"), Layer("suites", apart=True), Layer("low"))
        self.assertEqual(self.problems(files, layers), [])
        for user, text in (("suites/a.rs", "mod part;\nuse super::b;\n"), ("suites/a/part.rs", "use super::super::b::B;\n")):
            found = self.problems({**files, user: text}, layers)
            self.expect_one(f"{user}:{1 + text.startswith('mod')}: ", found)
            self.assertIn("suites do not use each other", found[0])

    def test_the_checkout_is_as_it_says(self) -> None:
        for crate in CRATES:
            with self.subTest(crate.root):
                found, files, uses = problems(ROOT, crate)
                self.assertEqual(found, [])
                # Each file but the root is used; fewer uses would mean that they are not seen.
                self.assertTrue(files > 2 and uses >= files - 1, (files, uses))
        for program in PROGRAMS:
            with self.subTest(program.root):
                self.assertEqual(problems(ROOT, program), ([], 1, 0))

    def test_no_program_and_no_module_is_left_out(self) -> None:
        programs = {str(file.relative_to(ROOT)) for file in (ROOT / "selftests/src/bin").glob("*.rs")}
        self.assertEqual(programs, {program.root for program in PROGRAMS})
        rust = {file: file.read_text() for file in (ROOT / "rust").rglob("*.rs")}
        modules = {str(file.relative_to(ROOT)) for file, text in rust.items() if "\nmodule! {" in text}
        self.assertLessEqual(modules, {crate.root for crate in CRATES})
        self.assertEqual(len(modules), 4)


if __name__ == "__main__":
    unittest.main()
