"""Patches safetensors once a program has imported it and torch, if SAFETENSORS_TORCH_PATCH=1; starts the shell command.

Owns the reading of the variable and the import hook; safetensors_torch/_patch.py does the patching.
safetensors_torch_patch.pth calls it when an interpreter starts with the variable set. It is outside the package,
because importing the package imports torch, which takes seconds and which the program may never need.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "SAFETENSORS_TORCH_PATCH"
_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")
# The reference's names for torch.
_FRAMEWORKS = ("pt", "torch", "pytorch")
_REFERENCE = "safetensors"
# The patch waits until the first two are imported, and no import of the others is in progress.
_WATCHED = ("torch", _REFERENCE, "safetensors.torch", "safetensors_torch")

_finder = None

# Whether the process is the script safetensors-torch: then the package does not import torch.
is_shell_command = False


def shell_command() -> int:
    """Runs the script safetensors-torch."""
    global is_shell_command
    is_shell_command = True
    from safetensors_torch.cli import main

    return main()


def install() -> None:
    """Patches safetensors if it and torch are imported; otherwise installs a hook that does so after their imports.

    It never raises. A second call, such as a second .pth file's, does nothing.
    """
    global _finder
    if _finder is None and _value() not in _OFF:
        _finder = _Finder()
        sys.meta_path.insert(0, _finder)
        if _REFERENCE in sys.modules:
            _finder.imported(_REFERENCE)


def _value() -> str:
    return os.environ.get(VARIABLE, "").strip().lower()


def _patch() -> None:
    try:
        from safetensors_torch import patch_safetensors

        patch_safetensors()
    except Exception as error:
        # The program did not import the package itself, and works without it.
        reason = str(error).strip().partition("\n")[0]
        _report(
            f"{VARIABLE}={os.environ.get(VARIABLE)}, but {_REFERENCE} stays as it is: {type(error).__name__}: {reason}"
            " (python -c 'import safetensors_torch' shows all of it)"
        )


def _report(text: str) -> None:
    if sys.stderr is not None:  # print(file=None) would write to the standard output
        print(f"safetensors_torch: {text}", file=sys.stderr, flush=True)


class _Finder:
    """Finds the watched modules through the other finders, and patches safetensors after their imports."""

    def __init__(self) -> None:
        self._complete = {name for name in _WATCHED if name in sys.modules}

    def find_spec(self, name, path=None, target=None):
        if name not in _WATCHED:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if find is None or isinstance(finder, _Finder) else find(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def imported(self, name: str) -> None:
        """Records the import of ``name``, and patches safetensors if it was the last one to wait for."""
        self._complete.add(name)
        if name == _REFERENCE and _value() not in _ON:
            if self.remove():
                _report(f"{VARIABLE}={os.environ.get(VARIABLE)!r} is neither 1 nor 0; {_REFERENCE} stays as it is")
        elif {"torch", _REFERENCE} <= self._complete:
            if all(other in self._complete for other in _WATCHED if other in sys.modules) and self.remove():
                _patch()
        elif name == _REFERENCE:
            _wait_for_torch(sys.modules[_REFERENCE], self)

    def remove(self) -> bool:
        """Uninstalls this, and returns whether it was installed: only one of two threads may patch."""
        try:
            sys.meta_path.remove(self)
        except ValueError:
            return False
        return True


class _Loader:
    """Wraps the loader of a module and calls ``imported`` after it. The module's ``__loader__`` is the original one."""

    def __init__(self, loader, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._finder.imported(module.__name__)


def _wait_for_torch(package, finder: _Finder) -> None:
    """Replaces the reference's safe_open with a class that patches first if a caller wants torch's tensors.

    The reference's own would import torch while it opens the file, too late to be patched for that file.
    """
    reference = getattr(package, "safe_open", None)
    if reference is None:
        return

    def latest():
        current = package.safe_open
        return reference if current is safe_open else current

    class Type(type):
        def __instancecheck__(cls, instance) -> bool:
            return isinstance(instance, (reference, latest()))

    class safe_open(metaclass=Type):  # noqa: N801 - the reference's name
        __doc__ = reference.__doc__
        # patch_safetensors takes this object for the reference's.
        _safetensors_torch_waits_for = reference

        def __new__(cls, filename, framework, *args, **kwargs):
            if framework in _FRAMEWORKS and finder.remove():
                _patch()
            return latest()(filename, framework, *args, **kwargs)

    safe_open.__module__, safe_open.__qualname__ = _REFERENCE, "safe_open"
    package.safe_open = safe_open
