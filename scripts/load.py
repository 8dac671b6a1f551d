# SPDX-License-Identifier: GPL-2.0
"""Use one of the scripts from another: their names do not end in .py."""

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

# The checkout stays clean.
sys.dont_write_bytecode = True


def script(name: str) -> ModuleType:
    """The script of that name in this folder, as a module."""
    loader = SourceFileLoader(name.replace("-", "_"), str(Path(__file__).resolve().parent / name))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module
