"""patch_safetensors: has programs that use the package ``safetensors`` with torch use this library.

Owns the objects that stand in for those of the reference, and the search through the loaded modules that puts them in
its place and takes them out again. What they do, the rest of the package does; the environment variable is the business
of ``_safetensors_torch_start``, beside the package.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

from ._arguments import Device
from ._errors import SafetensorError
from ._tracing import dynamo_disable
from .safe_open import _FRAMEWORKS, safe_open

_package = sys.modules[__package__]

# Of the reference's modules those alone: the others serve other frameworks.
_PATCHED_MODULES = ("safetensors", "safetensors.torch")
# The names in ``safetensors.torch`` that are replaced, beside safe_open.
_FUNCTIONS = ("load", "load_file", "load_model", "save", "save_file", "save_model")

_ERROR_BASES = SafetensorError.__bases__

# What the reference says of a header, by the numbers of our errors in the C header: programs that fetch a damaged file
# again look for it. Most files of other formats have a first byte that makes their length too large.
_PHRASES = {
    3: "header too small",
    4: "header too large",
    5: "invalid header length",
    6: "header too large",
    7: "invalid UTF-8 in header",
    8: "invalid JSON in header",
    9: "invalid JSON in header",
    10: "invalid JSON in header",
    11: "overflow computing buffer size from shape and/or element type",
    12: "invalid shape, data type, or offset for tensor",
    13: "invalid offset for tensor",
    14: "incomplete metadata, file not fully covered",
}

# Serialises patching and unpatching. Reentrant, as what patching imports may itself patch.
_lock = threading.RLock()
# A fork waits for it: in the child, a thread that is not there could hold it for ever, with half of the names replaced.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
_depth = 0
# The reference's objects by name, as they were when they were last replaced.
_reference: dict[str, Any] = {}
# The namespaces of modules in which something was replaced: sys.modules may lose some of them meanwhile.
_namespaces: list[dict[str, Any]] = []


@contextmanager
def _with_reference_wording() -> Iterator[None]:
    """Has errors about a header begin as the reference's do."""
    try:
        yield
    except SafetensorError as error:
        phrase = _PHRASES.get(error._code)
        if phrase is not None:
            error.args = (f"Error while deserializing header: {phrase}: {error}",)
        raise


def _replacement(name: str) -> Callable[..., Any]:
    """A function that does what ours called ``name`` does.

    Not ours itself: unpatching has to tell a module that took a name from safetensors from one that took it from here.
    It gives the reference's module as its own, so that another process, patched or not, can unpickle it.
    """

    @dynamo_disable
    @functools.wraps(getattr(_package, name))
    def function(*args: Any, **kwargs: Any) -> Any:
        if not name.startswith("load"):
            return getattr(_package, name)(*args, **kwargs)
        with _with_reference_wording():
            return getattr(_package, name)(*args, **kwargs)

    function.__module__ = "safetensors.torch"
    return function


class _SafeOpenType(type):
    """isinstance(file, safe_open), as programs ask it, is true of both libraries' files."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if cls is not _SafeOpen:  # a class derived from it
            return super().__instancecheck__(instance)
        return isinstance(instance, (safe_open, _reference["safe_open"]))


class _SafeOpen(safe_open, metaclass=_SafeOpenType):
    """An open safetensors file: for torch one of this library, for other frameworks the reference's.

    See safetensors_torch.safe_open.
    """

    def __new__(cls, filename: Any, framework: str = "pt", device: Device = "cpu", *, backend: str = "mmap") -> Any:
        if framework in _FRAMEWORKS:
            return super().__new__(cls)
        # Which refuses what is no framework in its own words. Older ones know no backend.
        options = {} if backend == "mmap" else {"backend": backend}
        return _reference["safe_open"](filename, framework, device, **options)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _with_reference_wording():
            super().__init__(*args, **kwargs)

    def __bool__(self) -> bool:
        return True  # as the reference's, which has no length


_SafeOpen.__module__, _SafeOpen.__name__, _SafeOpen.__qualname__ = "safetensors", "safe_open", "safe_open"

_replacements: dict[str, Any] = {**{name: _replacement(name) for name in _FUNCTIONS}, "safe_open": _SafeOpen}


class _Patch(AbstractContextManager):
    """One call of patch_safetensors, which the end of a with block takes back."""

    def __init__(self) -> None:
        self._is_active = True

    def __enter__(self) -> None:
        if not self._is_active:
            raise RuntimeError("this patch was taken back already. Call patch_safetensors() again")

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_active:
            self._is_active = False
            unpatch_safetensors()


def patch_safetensors() -> AbstractContextManager[None]:
    """Has ``safetensors`` and ``safetensors.torch`` use this library, also where their names were imported before.

    Replaced are safe_open, for torch, and the six functions of safetensors.torch, as attributes of those two modules
    and as globals of every other loaded module, under whatever name. SafetensorError stays the reference's, and that
    of this library derives from it meanwhile. Modules for other frameworks are left alone.

    Patches nest: each call wants an unpatch_safetensors(), or the end of a with block, and the last one restores what
    was there. Calls from several threads come one after the other; a module that another thread is importing meanwhile
    may keep what it had.

    Returns:
        A context manager that takes this call back. Without a with block the patch stays.

    Raises:
        ImportError: safetensors is not installed.

    Example:
        >>> import safetensors.torch
        >>> with patch_safetensors():
        ...     safetensors.torch.save_file({"x": torch.zeros(1)}, path)
        ...     isinstance(safetensors.safe_open(path, "pt"), safe_open)
        True
        >>> issubclass(safetensors.safe_open, safe_open)
        False
    """
    global _depth
    try:
        # Before the lock, which a thread that waits for the lock of this import may hold.
        for name in _PATCHED_MODULES:
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise ImportError(
            "patch_safetensors() patches the package safetensors, which is not installed: pip install safetensors"
        ) from error
    with _lock:
        if _depth == 0:
            _apply()
        _depth += 1
    return _Patch()


def unpatch_safetensors() -> None:
    """Takes one call of patch_safetensors() back. With the last, every module has what it had before.

    So have modules that were imported in between, and took names from safetensors. Does nothing where nothing is
    patched.

    Example:
        >>> import safetensors
        >>> before = safetensors.safe_open
        >>> patch = patch_safetensors()
        >>> unpatch_safetensors()
        >>> safetensors.safe_open is before
        True
    """
    global _depth
    with _lock:
        if _depth == 0:
            return
        _depth -= 1
        if _depth == 0:
            _restore()


def _apply() -> None:
    package, functions = (sys.modules[name] for name in _PATCHED_MODULES)
    found = []  # kept, so that no other object gets the id of one
    for name, stand_in in _replacements.items():
        current = getattr(package if name == "safe_open" else functions, name)
        if current is not stand_in:  # which somebody may have put back there
            # Or that of _safetensors_torch_start, which waits for torch.
            _reference[name] = getattr(current, "_safetensors_torch_waits_for", current)
            found.append((current, stand_in))
        found.append((_reference[name], stand_in))
    # First, because it alone can fail: where a class derives from both errors, and names the reference's first.
    SafetensorError.__bases__ = (*_ERROR_BASES, package.SafetensorError)
    _namespaces[:] = _replace(_loaded_namespaces(), {id(current): stand_in for current, stand_in in found})


def _restore() -> None:
    _replace([*_namespaces, *_loaded_namespaces()], {id(new): _reference[name] for name, new in _replacements.items()})
    _namespaces.clear()
    SafetensorError.__bases__ = _ERROR_BASES


def _loaded_namespaces() -> list[dict[str, Any]]:
    """The globals of every loaded module but for ours, and the reference's for other frameworks."""
    result = []
    for name, module in sys.modules.copy().items():
        package = name.partition(".")[0]
        if package == __package__ or (package == "safetensors" and name not in _PATCHED_MODULES):
            continue
        try:
            # Past whatever the class of a module makes of attributes: lazy ones would be imported.
            namespace = object.__getattribute__(module, "__dict__")
        except AttributeError:
            continue
        if isinstance(namespace, dict):  # not that of a class
            result.append(namespace)
    return result


def _replace(namespaces: list[dict[str, Any]], by_id: dict[int, Any]) -> list[dict[str, Any]]:
    """Puts a value of ``by_id`` wherever an object with its key as id has a name; gives the namespaces with such names.

    The objects themselves must be alive, so that no other has their id.
    """
    changed = []
    for namespace in namespaces:
        found = [name for name, value in namespace.copy().items() if id(value) in by_id]
        for name in found:
            namespace[name] = by_id[id(namespace[name])]
        if found:
            changed.append(namespace)
    return changed
