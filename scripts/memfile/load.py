# SPDX-License-Identifier: GPL-2.0
"""Use a program of scripts/ from its tests: its name does not end in .py."""

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

# The checkout stays clean.
sys.dont_write_bytecode = True


def script(name: str) -> ModuleType:
    """The program of that name in scripts/, as a module."""
    loader = SourceFileLoader(name.replace("-", "_"), str(Path(__file__).resolve().parents[1] / name))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module
