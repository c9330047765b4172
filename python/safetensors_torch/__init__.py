"""safetensors for torch: the functions of ``safetensors.torch``, over a native library.

Owns the public names. Importing it loads the native operators (``torch.ops.safetensors_torch``), and compiles their
thin libtorch layer first where the installed torch has not been met before.
"""

from __future__ import annotations

from importlib.metadata import version as _version

from . import _loader

_loader.ensure_loaded()

# The modules below look the operators up when they are imported.
from . import _fake  # noqa: E402, F401
from ._errors import SafetensorError  # noqa: E402
from ._ops import load, load_file, save, save_file  # noqa: E402
from .metadata import edit_metadata  # noqa: E402
from .model import load_model, save_model  # noqa: E402
from .patch import patch_safetensors, unpatch_safetensors  # noqa: E402
from .safe_open import safe_open  # noqa: E402
from .safe_writer import SafeWriter  # noqa: E402
from .sharded import load_sharded, save_sharded  # noqa: E402
from .transfer import (  # noqa: E402
    TransferOptions,
    release_transfer_memory,
    reserve_transfer_memory,
    set_transfer_options,
    transfer_memory,
    transfer_options,
)

__version__: str = _version("safetensors-torch")

# For C and C++ programs: what CMAKE_PREFIX_PATH needs for find_package(SafetensorsTorch), and where the headers are.
cmake_prefix_path: str = str(_loader.NATIVE)
include_path: str = str(_loader.NATIVE / "include")

__all__ = [
    "SafeWriter",
    "SafetensorError",
    "TransferOptions",
    "__version__",
    "cmake_prefix_path",
    "edit_metadata",
    "include_path",
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
