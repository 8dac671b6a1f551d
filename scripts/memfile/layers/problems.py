# SPDX-License-Identifier: GPL-2.0
"""Layers that are not kept, and files that use each other in a circle."""

from __future__ import annotations

import re
from pathlib import Path

from memfile.layers.crates import Crate
from memfile.layers.source import Broken, Source, Use
from memfile.layers.tree import Tree


def circles(uses: list[Use]) -> list[list[Use]]:
    """Groups of files that use each other, each as the shortest way around."""
    following: dict[Path, dict[Path, Use]] = {}
    for use in uses:
        following.setdefault(use.user, {}).setdefault(use.used, use)

    def way(start: Path) -> list[Use] | None:
        ways: list[list[Use]] = [[use] for use in following.get(start, {}).values()]
        seen: set[Path] = set()
        while ways:
            steps = ways.pop(0)
            at = steps[-1].used
            if at == start:
                return steps
            if at not in seen:
                seen.add(at)
                ways += [[*steps, use] for use in following.get(at, {}).values()]
        return None

    found, done = [], set()
    for start in sorted(following):
        if start not in done and (steps := way(start)):
            found.append(steps)
            done |= {use.user for use in steps}
    return found


def problems(top: Path, crate: Crate) -> tuple[list[str], int, int]:
    """The violations, and the numbers of files and uses that were looked at."""
    try:
        tree = Tree(top, crate.root)
        uses = tree.all_uses()
    except Broken as why:
        return [f"{crate.root}: {why}"], 0, 0

    def name(file: Path) -> str:
        return str(file.relative_to(top.resolve()))

    place: dict[str, int] = {}
    for n, layer in enumerate(crate.layers):
        place |= dict.fromkeys(layer.modules.split(), n)

    def layer_of(source: Source) -> int | None:
        return place.get(source.module[0] if source.module else "crate")

    wrong = []
    by_file = {source.file: source for source in tree.sources}
    if len(by_file) != len(tree.sources):
        wrong.append(f"{crate.root}: a file is two modules")
    for source in tree.sources:
        number = layer_of(source)
        if number is None:
            wrong.append(f"{name(source.file)}: module {source.module[0]} is in no layer")
            continue
        layer = crate.layers[number]
        forbidden = [tuple(begin.split("::")) for begin in layer.foreign]
        if not layer.unsafe and (found := re.search(r"\bunsafe\b", source.code)):
            wrong.append(f"{name(source.file)}:{source.line(found.start())}: unsafe in layer {layer.modules}")
        for at, _, path in tree.paths(source):
            # Also from the root: crate::bindings.
            named = tuple(step for step in path if step not in ("crate", "super", "self"))
            if any(named[: len(begin)] == begin for begin in forbidden):
                wrong.append(f"{name(source.file)}:{source.line(at)}: layer {layer.modules} uses {'::'.join(path)}")
    for use in uses:
        ours, theirs = by_file[use.user].module, by_file[use.used].module
        user, used = layer_of(by_file[use.user]), layer_of(by_file[use.used])
        same = ours[:1] == theirs[:1] and min(len(ours), len(theirs)) > 1
        if user is not None and crate.layers[user].apart and same and ours[1] != theirs[1]:
            wrong.append(f"{name(use.user)}:{use.line}: {use.text}: {ours[0]} do not use each other")
        if user is not None and used is not None and used < user:
            layers = f"layer {crate.layers[user].modules} uses {crate.layers[used].modules} above it"
            wrong.append(f"{name(use.user)}:{use.line}: {use.text}: {layers}")
    for circle in circles(uses):
        steps = [f"{name(use.user)}:{use.line} uses {name(use.used)} ({use.text})" for use in circle]
        wrong.append("a circle: " + ", ".join(steps))
    return list(dict.fromkeys(wrong)), len(tree.sources), len(uses)
