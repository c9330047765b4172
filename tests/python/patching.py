"""Checks for the tests of patch_safetensors whether the modules are unpatched.

Import it while nothing is patched.
"""

from __future__ import annotations

import safetensors
import safetensors.numpy
import safetensors.torch

import safetensors_torch

FUNCTIONS = ["load", "load_file", "load_model", "save", "save_file", "save_model"]
# The modules of the reference without a patch. In a container, because a patch replaces globals.
MODULES = [safetensors, safetensors.torch, safetensors.numpy, safetensors._safetensors_rust]
BEFORE = [dict(vars(module)) for module in MODULES]
ERROR_MRO = safetensors_torch.SafetensorError.__mro__


def is_unpatched() -> bool:
    return safetensors_torch.SafetensorError.__mro__ == ERROR_MRO and all(
        list(vars(module)) == list(before) and all(vars(module)[name] is before[name] for name in before)
        for module, before in zip(MODULES, BEFORE, strict=True)
    )
