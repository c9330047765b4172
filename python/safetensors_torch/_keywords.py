"""Errors for keywords of similar functions elsewhere: each names the keyword here.

Owns the table of those keywords. Python's own error names only the wrong one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from ._errors import near_names

Function = TypeVar("Function", bound=Callable[..., Any])

# Keywords of torch.load, torch.save, transformers and huggingface_hub, by the name here.
_SYNONYMS = {
    "device": ("map_location", "device_map"),
    "dtype": ("torch_dtype",),
    "names": ("keys", "key", "filter", "include", "tensor_names"),
    "tensors": ("state_dict", "obj", "tensor_dict"),
    "durable": ("fsync", "sync"),
    "max_shard_size": ("max_shard_bytes", "shard_size"),
    "stem": ("filename_pattern",),
    "files": ("filenames", "paths", "filename", "path", "directory"),
    "buffer_bytes": ("max_memory", "buffer_size", "memory_limit"),
    "filename": ("path", "file", "f", "fp", "file_path", "filepath", "save_path", "directory"),
    "path": ("directory", "filename", "file", "f", "save_directory"),
    "directory": ("path", "filename", "f", "save_directory"),
}
_REMEDIES = {
    "mmap": 'pass backend="mmap", or backend="pread" for mmap=False',
    "weights_only": "leave it out: a safetensors file contains no code",
    "framework": "leave it out: tensors are torch's, and their .numpy() returns arrays",
    "dtype": "call .to(dtype) on the tensors; load_file, load_sharded and iterate convert during the load",
    "names": "load_file, load_sharded and iterate have it",
    "pickle_module": "leave it out: the format does not use pickle",
    "pickle_protocol": "leave it out: the format does not use pickle",
    "safe_serialization": "leave it out: every file is safetensors",
    "shared_tensors_to_discard": "leave these names out of the dict",
    "is_main_process": "leave it out, and let one process save",
}


def explains_keywords(function: Function) -> Function:
    """Wraps ``function`` so that the TypeError about an unknown keyword names the remedy."""
    known = list(inspect.signature(function).parameters)
    accepted = frozenset(known)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not accepted.issuperset(kwargs):
            wrong = next(key for key in kwargs if key not in accepted)
            raise TypeError(
                f"{function.__qualname__}() got an unexpected keyword argument {wrong!r}; {_remedy(wrong, known)}"
            )
        return function(*args, **kwargs)

    return checked  # type: ignore[return-value]


def _remedy(wrong: str, known: list[str]) -> str:
    for name in known:
        if wrong in _SYNONYMS.get(name, ()):
            return f"call it {name}"
    if wrong in _REMEDIES and (wrong != "mmap" or "backend" in known):
        return _REMEDIES[wrong]
    near = near_names(wrong, known)
    return f"did you mean {near}?" if near else f"it takes {', '.join(name for name in known if name != 'self')}"
