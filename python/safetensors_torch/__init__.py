"""safetensors for torch: the functions of ``safetensors.torch``, over a native library.

Owns the public names. Its import loads the native operators (``torch.ops.safetensors_torch``), and first compiles their
thin libtorch layer if there is none for the installed torch.
"""

from __future__ import annotations

import sys as _sys


def _is_shell_command() -> bool:
    """Returns whether Python imports the package for ``safetensors-torch`` or ``python -m safetensors_torch``."""
    if getattr(_sys.modules.get("_safetensors_torch_start"), "is_shell_command", False):
        return True
    argv = getattr(_sys, "argv", [])
    original = getattr(_sys, "orig_argv", [])[-len(argv) :]  # Python 3.10
    return argv[:1] == ["-m"] and original[:1] in ([__name__], [f"-m{__name__}"])


# The shell command loads torch and the operators itself, if it needs them, and importlib.metadata, which is slow too.
if not _is_shell_command():
    from importlib.metadata import version as _version

    from . import _native_library

    _native_library.ensure_loaded()

    __version__: str = _version("safetensors-torch")

    # The modules below look the operators up when they are imported.
    from . import _fake_kernels  # noqa: F401
    from ._errors import SafetensorError
    from ._incremental_writer import IncrementalWriter
    from ._inspect import CheckpointInfo, TensorInfo, inspect
    from ._iterate import iterate
    from ._load import load, load_file
    from ._metadata import edit_metadata
    from ._model import load_model, save_model
    from ._patch import patch_safetensors, unpatch_safetensors
    from ._prefetch_loader import PrefetchLoader, TensorMeta
    from ._safe_open import safe_open
    from ._safe_slice import PySafeSlice
    from ._save import save, save_file
    from ._sharded import load_sharded, save_sharded
    from ._transfer import (
        TransferOptions,
        release_transfer_memory,
        reserve_transfer_memory,
        set_transfer_options,
        transfer_memory,
        transfer_options,
    )

    # For C++ extensions, see docs/extensions.md.
    extension_link_args = _native_library.extension_link_args
    # For C and C++ programs: the entry of CMAKE_PREFIX_PATH for find_package(SafetensorsTorch), and the headers.
    cmake_prefix_path: str = str(_native_library.NATIVE)
    include_path: str = str(_native_library.NATIVE / "include")

__all__ = [
    "CheckpointInfo",
    "IncrementalWriter",
    "PrefetchLoader",
    "PySafeSlice",
    "SafetensorError",
    "TensorInfo",
    "TensorMeta",
    "TransferOptions",
    "__version__",
    "cmake_prefix_path",
    "edit_metadata",
    "extension_link_args",
    "include_path",
    "inspect",
    "iterate",
    "load",
    "load_file",
    "load_model",
    "load_sharded",
    "patch_safetensors",
    "release_transfer_memory",
    "reserve_transfer_memory",
    "safe_open",
    "save",
    "save_file",
    "save_model",
    "save_sharded",
    "set_transfer_options",
    "transfer_memory",
    "transfer_options",
    "unpatch_safetensors",
]
