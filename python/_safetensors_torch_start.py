"""Has SAFETENSORS_TORCH_PATCH=1 patch safetensors when a program first imports it.

Owns the reading of the variable and the import hook. safetensors_torch_patch.pth calls it when an interpreter starts in
which the variable is set. It stands beside the package, not in it, because importing the package brings torch in, for
which programs that never use safetensors shall not wait. What is patched, and how, safetensors_torch/patch.py knows.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "SAFETENSORS_TORCH_PATCH"
_REFERENCE = "safetensors"


def install() -> None:
    """Patches safetensors if it is imported, else has its first import do so. Whatever is wrong, it does not raise."""
    value = os.environ.get(VARIABLE, "")
    if value in ("", "0"):
        return
    if value != "1":
        _say(f"{VARIABLE}={value!r} is neither 0 nor 1; {_REFERENCE} stays as it is")
    elif _REFERENCE in sys.modules:
        _patch()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _patch() -> None:
    try:
        from safetensors_torch import patch_safetensors

        patch_safetensors()
    except Exception as error:
        # The program did not ask for the package by itself, and can do without.
        reason = str(error).strip().partition("\n")[0]
        _say(
            f"{VARIABLE}=1, but {_REFERENCE} stays as it is: {type(error).__name__}: {reason}"
            " (python -c 'import safetensors_torch' shows all of it)"
        )


def _say(text: str) -> None:
    if sys.stderr is not None:  # print would take the standard output in its place
        print(f"safetensors_torch: {text}", file=sys.stderr, flush=True)


class _Finder:
    """Finds safetensors as the other finders do, and has it patched once it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != _REFERENCE:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if find is None or isinstance(finder, _Finder) else find(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader:
    """The loader of safetensors, with the patch after it. The module itself gets to see the loader alone."""

    def __init__(self, loader, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
            _patch()
