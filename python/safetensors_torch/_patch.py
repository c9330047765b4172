"""patch_safetensors: makes programs that use the package ``safetensors`` with torch use this library.

Owns the replacements of the reference's functions and classes, and the search through the loaded modules that installs
and removes them. ``_safetensors_torch_start``, beside the package, reads the environment variable.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ._arguments import Device
from ._errors import SafetensorError, truncate
from ._load import load, load_file
from ._model import load_model, save_model
from ._prefetch_loader import PrefetchLoader, TensorMeta
from ._safe_open import _FRAMEWORKS, safe_open
from ._safe_slice import PySafeSlice
from ._save import save, save_file
from ._tracing import dynamo_disable

_package = sys.modules[__package__]

# The other modules of the reference serve other frameworks.
_PATCHED_MODULES = ("safetensors", "safetensors.torch")
# Classes of ``safetensors`` since 0.9, which older versions lack. They are added there, and removed again.
_CLASSES = (PrefetchLoader, PySafeSlice, TensorMeta)
# The functions that replace those of ``safetensors.torch``.
_FUNCTIONS = (load, load_file, load_model, save, save_file, save_model)

_ERROR_BASES = SafetensorError.__bases__

# The reference's texts for errors of a header, by our error numbers in the C header. Programs recognise damaged files
# by them. Most files of other formats begin with bytes that make the header's length too large.
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

# Serialises patching and unpatching. Reentrant, because an import during patching may itself patch.
_lock = threading.RLock()
# A fork waits for it. Otherwise it could stay locked in the child, with half of the names replaced.
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
# For each call of patch_safetensors that is not undone, whether it patches torch.distributed.checkpoint too.
_calls: list[bool] = []
# The reference's objects by name, from the last patch.
_reference: dict[str, Any] = {}
# The namespaces of modules in which a name was replaced. sys.modules may lose some of them before the restore.
_namespaces: list[dict[str, Any]] = []
# The same, for the names of torch.distributed.checkpoint.
_dcp_namespaces: list[dict[str, Any]] = []
# The namespace of the package that names were added to.
_added_to: list[dict[str, Any]] = []


# In the reference's errors about arguments of a save, which have no remedy after a semicolon.
_SAVE_ERROR = "xpected [^;]*torch.Tensor]? but received "


@contextmanager
def _with_reference_wording(is_load: bool = True) -> Iterator[None]:
    """Makes errors about a header begin as the reference's do, and those about arguments of a save equal to its."""
    try:
        yield
    except ValueError as error:
        if re.search(_SAVE_ERROR, str(error)):
            error.args = (str(error).rpartition(";")[0],)
        raise
    except SafetensorError as error:
        phrase = _PHRASES.get(error._code)
        if is_load and phrase is not None:
            error.args = (f"Error while deserializing header: {phrase}: {error}",)
        raise


def _replacement(ours: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls ``ours``, or what the package has under its name now.

    It is not ours itself, because unpatching must distinguish modules that imported the name from safetensors from
    those that imported it from here. Its ``__module__`` is the reference's, so that any process can unpickle it.
    """

    name = ours.__name__

    @dynamo_disable
    @functools.wraps(ours)
    def function(*args: Any, **kwargs: Any) -> Any:
        with _with_reference_wording(is_load=name.startswith("load")):
            return getattr(_package, name)(*args, **kwargs)

    function.__module__ = "safetensors.torch"
    return function


class _ReplacementType(type):
    """Makes isinstance() with a class that replaces one of the reference true for the objects of both libraries."""

    def __instancecheck__(cls, instance: Any) -> bool:
        if cls is not _replacements.get(cls.__name__):  # a derived class
            return super().__instancecheck__(instance)
        return isinstance(instance, (cls.__base__, _reference.get(cls.__name__, cls.__base__)))

    def __subclasscheck__(cls, subclass: Any) -> bool:
        if cls is not _replacements.get(cls.__name__):
            return super().__subclasscheck__(subclass)
        return issubclass(subclass, (cls.__base__, _reference.get(cls.__name__, cls.__base__)))


class _SafeOpen(safe_open, metaclass=_ReplacementType):
    """An open safetensors file: this library's for torch, the reference's for other frameworks.

    See safetensors_torch.safe_open.
    """

    def __new__(cls, filename: Any, framework: str = "pt", device: Device = "cpu", *, backend: str = "mmap") -> Any:
        if framework in _FRAMEWORKS:
            return super().__new__(cls)
        # The reference refuses unknown frameworks itself. Its older versions have no backend.
        options = {} if backend == "mmap" else {"backend": backend}
        return _reference["safe_open"](filename, framework, device, **options)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with _with_reference_wording():
            super().__init__(*args, **kwargs)

    def prefetch(self, *args: Any, **kwargs: Any) -> PrefetchLoader:
        loader = super().prefetch(*args, **kwargs)
        loader._is_for_every_stream = True  # as the reference promises
        return loader

    def _missing(self, name: str) -> SafetensorError:
        return SafetensorError(f"File does not contain tensor {truncate(name)}")  # programs may compare the text

    def __bool__(self) -> bool:
        return True  # like the reference's, which has no length


_SafeOpen.__module__, _SafeOpen.__name__, _SafeOpen.__qualname__ = "safetensors", "safe_open", "safe_open"


def _class_replacement(ours: type) -> type:
    """Returns a class that stands for ``ours``, and is not it, for the same reason as in _replacement."""
    members = {"__module__": "safetensors", "__doc__": ours.__doc__, "__slots__": ()}
    return _ReplacementType(ours.__name__, (ours,), members)


_replacements: dict[str, Any] = {
    **{ours.__name__: _replacement(ours) for ours in _FUNCTIONS},
    **{ours.__name__: _class_replacement(ours) for ours in _CLASSES},
    "safe_open": _SafeOpen,
}


class _Patch(AbstractContextManager):
    """One call of patch_safetensors, which the end of a with block undoes."""

    def __init__(self, dcp: bool) -> None:
        self._is_active = True
        self._dcp = dcp

    def __enter__(self) -> None:
        if not self._is_active:
            raise RuntimeError("this patch was undone already: call patch_safetensors() again")

    def __exit__(self, *error: object) -> None:
        if self._is_active:
            self._is_active = False
            _undo(self._dcp)


def patch_safetensors(*, dcp: bool = False) -> AbstractContextManager[None]:
    """Makes ``safetensors`` and ``safetensors.torch`` use this library, even in modules that imported them before.

    It replaces safe_open, for torch, and the six functions of safetensors.torch, as attributes of those two modules and
    as globals of every other loaded module, under any name. PrefetchLoader, PySafeSlice and TensorMeta replace those of
    safetensors, or are added to it. SafetensorError stays the reference's; this library's derives from it while
    patched. Modules for other frameworks are unchanged.

    Patches nest: each call needs an unpatch_safetensors(), or the end of a with block, and the last one restores the
    original objects. Threads may call it at any time, but a module that another thread is importing at that time may
    keep the originals.

    Args:
        dcp: whether to replace HuggingFaceStorageWriter, HuggingFaceStorageReader, QuantizedHuggingFaceStorageReader,
            consolidate_safetensors_files and consolidate_safetensors_files_on_every_rank of
            torch.distributed.checkpoint too, by those of safetensors_torch.distributed. Needs torch 2.9 or later.

    Returns:
        A context manager that undoes this call. Without a with block the patch stays.

    Raises:
        ImportError: safetensors is not installed; ``dcp`` is true, and this torch does not have them.

    Example:
        >>> import safetensors.torch
        >>> with patch_safetensors():
        ...     safetensors.torch.save_file({"x": torch.zeros(1)}, path)
        ...     isinstance(safetensors.safe_open(path, "pt"), safe_open)
        True
        >>> issubclass(safetensors.safe_open, safe_open)
        False
    """
    try:
        # Before the lock: a thread that holds it may wait for the lock of this import.
        for name in _PATCHED_MODULES:
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "safetensors":
            raise
        raise ImportError(
            "patch_safetensors() patches the package safetensors, which is not installed: pip install safetensors"
        ) from error
    if dcp:
        from .distributed import _patch as dcp_patch
    with _lock:
        if not _calls:
            _apply()
        if dcp and True not in _calls:
            _dcp_namespaces[:] = _replace(_loaded_namespaces(), dcp_patch.replacements_by_id())
        _calls.append(dcp)
    return _Patch(dcp)


def unpatch_safetensors() -> None:
    """Undoes one call of patch_safetensors(). Undoing the last one restores the original objects in every module.

    Modules that were imported while patched get the originals too. Does nothing if nothing is patched.

    Example:
        >>> import safetensors
        >>> before = safetensors.safe_open
        >>> patch = patch_safetensors()
        >>> unpatch_safetensors()
        >>> safetensors.safe_open is before
        True
    """
    with _lock:
        if _calls:
            _undo(_calls[-1])


def _undo(dcp: bool) -> None:
    """Undoes the last call of patch_safetensors with this ``dcp``, if there is one."""
    with _lock:
        if dcp not in _calls:
            return
        del _calls[len(_calls) - 1 - _calls[::-1].index(dcp)]
        if dcp and True not in _calls:
            from .distributed import _patch as dcp_patch

            _replace([*_dcp_namespaces, *_loaded_namespaces()], dcp_patch.originals_by_id())
            _dcp_namespaces.clear()
        if not _calls:
            _restore()


def _apply() -> None:
    package, functions = (sys.modules[name] for name in _PATCHED_MODULES)
    found = []  # kept alive, so that no other object gets one of their ids
    for name, replacement in _replacements.items():
        module = package if isinstance(replacement, type) else functions
        current = getattr(module, name, None)
        if current is None or (current is replacement and name not in _reference):
            _reference.pop(name, None)
            continue
        if current is not replacement:  # a program may have assigned ours again
            # The class of _safetensors_torch_start, which waits for torch, knows the original.
            _reference[name] = getattr(current, "_safetensors_torch_waits_for", current)
            found.append((current, replacement))
        found.append((_reference[name], replacement))
    # First, because only this can fail: if a class derives from both errors and names the reference's first.
    SafetensorError.__bases__ = (*_ERROR_BASES, package.SafetensorError)
    for name in _replacements.keys() - _reference.keys():
        setattr(package, name, _replacements[name])
    _added_to.append(vars(package))
    _namespaces[:] = _replace(_loaded_namespaces(), {id(current): replacement for current, replacement in found})


def _restore() -> None:
    by_id = {id(new): _reference[name] for name, new in _replacements.items() if name in _reference}
    _replace([*_namespaces, *_loaded_namespaces()], by_id)
    for name in _replacements.keys() - _reference.keys():
        for namespace in _added_to:
            namespace.pop(name, None)
    _added_to.clear()
    _namespaces.clear()
    SafetensorError.__bases__ = _ERROR_BASES


def _loaded_namespaces() -> list[dict[str, Any]]:
    """Returns the globals of every loaded module except ours and the reference's for other frameworks."""
    result = []
    for name, module in sys.modules.copy().items():
        package = name.partition(".")[0]
        if package == __package__ or (package == "safetensors" and name not in _PATCHED_MODULES):
            continue
        try:
            # Past __getattr__ and properties of lazy modules, which would import them.
            namespace = object.__getattribute__(module, "__dict__")
        except AttributeError:
            continue
        if isinstance(namespace, dict):  # not a class's mappingproxy
            result.append(namespace)
    return result


def _replace(namespaces: list[dict[str, Any]], by_id: dict[int, Any]) -> list[dict[str, Any]]:
    """Replaces objects by the values for their ids in ``by_id``. Returns the namespaces that changed.

    The replaced objects must be alive, so that no other object has their id.
    """
    changed = []
    for namespace in namespaces:
        found = [name for name, value in namespace.copy().items() if id(value) in by_id]
        for name in found:
            namespace[name] = by_id[id(namespace[name])]
        if found:
            changed.append(namespace)
    return changed
