# SPDX-License-Identifier: GPL-2.0
"""All files of a crate, and what each uses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from memfile.layers.source import MOD, PATH_ATTRIBUTE, Broken, Source, Use, blank, use_tree, without_comments


class Tree:
    """The modules of a crate."""

    def __init__(self, top: Path, root: str) -> None:
        self.top = top
        self.sources: list[Source] = []
        # Every module, also those inside of a file.
        self.modules: dict[tuple[str, ...], Source] = {}
        # Macros that are the root's wherever they are.
        self.macros: dict[str, Source] = {}
        self.load(top / root, (), True)
        for source in self.sources:
            self.read_names(source)

    def load(self, file: Path, module: tuple[str, ...], owns_folder: bool) -> None:
        file = file.resolve()
        if not file.is_file():
            raise Broken(f"there is no {file}")
        text = file.read_text()
        source = Source(file, module, without_comments(text, True))
        self.sources.append(source)
        for macro in re.finditer(r"#\[macro_export\]\s*macro_rules!\s*(\w+)", source.code):
            self.macros[macro[1]] = source
        for inner in dict.fromkeys(module for _, _, module in source.spans):
            if inner in self.modules:
                raise Broken(f"{file}: module {'::'.join(inner)} is there twice")
            self.modules[inner] = source
        readable = without_comments(text, False)
        for found in MOD.finditer(readable):
            if found[3] == "{" or source.code[found.start(2)] == " ":
                continue
            parent = source.module_at(found.start(2))
            folder = file.parent if owns_folder else file.with_suffix("")
            folder = folder.joinpath(*parent[len(module) :])
            if path := PATH_ATTRIBUTE.search(found[1]):
                self.load(file.parent / path[1], (*parent, found[2]), True)
            elif (child := folder / f"{found[2]}.rs").is_file():
                self.load(child, (*parent, found[2]), False)
            else:
                self.load(folder / found[2] / "mod.rs", (*parent, found[2]), True)

    # --- names ---

    def uses(self, source: Source) -> Iterator[tuple[int, tuple[str, ...], tuple[str, ...], str, bool]]:
        """Each name that a `use` takes: where, in which module, the path, its name there, is it `pub`?"""
        for found in re.finditer(r"(\bpub(?:\s*\([^)]*\))?\s+)?\buse\s+([^;]+);", source.code):
            module = source.module_at(found.start())
            for path, name, offset in use_tree(found[2]):
                yield found.start(2) + offset, module, path, name, bool(found[1])

    def read_names(self, source: Source) -> None:
        for _, module, path, name, public in self.uses(source):
            # Where a name is given by two, as under two cfgs, both are looked at as uses anyway.
            source.names.setdefault(module, {})[name] = path
            if public:
                source.public.add((*module, name))

    def resolve(self, source: Source, module: tuple[str, ...], path: tuple[str, ...]) -> Source | None:
        """The file in which the path ends; None if it leaves the crate."""
        found = self.module_of(source, module, path)
        return self.modules[found] if found is not None else None

    def module_of(
        self, source: Source, module: tuple[str, ...], path: tuple[str, ...]
    ) -> tuple[str, ...] | None:
        """The module in which the path ends."""
        for _ in range(32):
            first, rest = path[0], path[1:]
            if first in ("crate", "$crate"):
                at: tuple[str, ...] = ()
            elif first == "self":
                at = module
            elif first == "super":
                at, rest = module[:-1], path[1:]
                while rest and rest[0] == "super":
                    at, rest = at[:-1], rest[1:]
            elif (*module, first) in self.modules:
                at, rest = (*module, first), path[1:]
            elif (given := source.names.get(module, {}).get(first)) and given[0] != first:
                path = (*given, *rest)
                continue
            else:
                return None
            while rest and (*at, rest[0]) in self.modules:
                at, rest = (*at, rest[0]), rest[1:]
            if not at and rest and rest[0] in self.macros:
                return self.macros[rest[0]].module
            there = self.modules[at]
            if rest and (*at, rest[0]) in there.public:
                given = there.names[at][rest[0]]
                # A name of the module itself, or of another crate.
                beyond = self.module_of(there, at, given) if given[:1] != (rest[0],) else None
                return at if beyond is None else self.module_of(there, at, (*given, *rest[1:]))
            return at
        raise Broken(f"{source.file}: {'::'.join(path)} means itself")

    def paths(self, source: Source) -> Iterator[tuple[int, tuple[str, ...], tuple[str, ...]]]:
        """Each path that is named, but for attributes: where, in which module, the path."""
        for at, module, path, _, public in self.uses(source):
            end = self.module_of(source, module, path)
            if not (public and end and end != module and end[: len(module)] == module):
                yield at, module, path
        code = re.sub(r"\buse\s+[^;]+;|#!?\[(?:[^][]|\[[^]]*\])*\]", lambda found: blank(found[0]), source.code)
        for found in re.finditer(r"(?<![\w:.])\$?\w+(?:\s*::\s*\w+)+", code):
            yield found.start(), source.module_at(found.start()), tuple(re.split(r"\s*::\s*", found[0]))

    def all_uses(self) -> list[Use]:
        found = []
        for source in self.sources:
            for at, module, path in self.paths(source):
                used = self.resolve(source, module, path)
                if used and used is not source:
                    line = source.code.count("\n", 0, at) + 1
                    found.append(Use(source.file, used.file, line, "::".join(path)))
        return found
