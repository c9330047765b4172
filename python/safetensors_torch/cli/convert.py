"""Converts a checkpoint: from torch.save's format, one file into several, several into one, to another dtype.

The source is a safetensors file, an index, or a folder with either, or a file of torch.save's (.pt, .pth, .bin, .ckpt),
which is loaded with weights_only=True, so that it cannot run code. A target that ends in .safetensors is a file,
another one a folder, into which save_sharded writes. Of tensors that share memory one is kept, as by save_model.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
from typing import Any, Optional

import torch

from .._errors import call
from .._ops import save_file
from ..sharded import load_sharded, save_sharded
from .listing import Listing, add_quiet, printable, size_text, wants_bar

HELP = "convert from torch.save, shard, unshard, cast"
EXAMPLES = """examples:
  python -m safetensors_torch convert pytorch_model.bin converted.safetensors
  python -m safetensors_torch convert model.safetensors sharded/ --max-shard-size 1MB
  python -m safetensors_torch convert checkpoint/ whole.safetensors --dtype bfloat16
"""

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="a safetensors file, an index (.json), a folder, or a file of torch.save's")
    command.add_argument("target", help="a file that ends in .safetensors, or a folder")
    command.add_argument("--dtype", choices=_DTYPES, help="what floating-point tensors are converted to")
    command.add_argument("--max-shard-size", metavar="SIZE", help="for a folder: 5GB (the default), 500MiB")
    command.add_argument("--key", metavar="NAME", help="the entry of a torch.save file that has the tensors")
    command.add_argument("--force", action="store_true", help="replace a target that is there")
    command.add_argument("--durable", action="store_true", help="return once the target is on the disk")
    add_quiet(command)


def run(options: argparse.Namespace) -> int:
    is_file = options.target.endswith(".safetensors")
    if is_file and options.max_shard_size:
        raise ValueError(f"{options.target} is one file: --max-shard-size is for a folder")
    _refuse_replacing(options)
    progress = wants_bar(options)
    dtype = _DTYPES[options.dtype] if options.dtype else None
    if os.path.splitext(options.source)[1].lower() in _PICKLES:
        tensors, metadata = _load_pickle(options.source, options.key, dtype)
    else:
        if options.key:
            raise ValueError(f"--key is for files of torch.save's: {options.source} is none")
        tensors = load_sharded(options.source, dtype=dtype, prefault=False, progress=progress)
        metadata = Listing(options.source).metadata or {}
    metadata = {"format": "pt", **metadata}
    if is_file:
        save_file(tensors, options.target, metadata, durable=options.durable, progress=progress)
        written = [options.target]
    else:
        size = options.max_shard_size or "5GB"
        names = save_sharded(
            tensors, options.target, metadata, max_shard_size=size, durable=options.durable, progress=progress
        )
        written = [os.path.join(options.target, name) for name in names]
    _report(tensors, written, options.json)
    return 0


def _refuse_replacing(options: argparse.Namespace) -> None:
    if options.force or not os.path.lexists(options.target):
        return
    if not os.path.isdir(options.target) or any(name.endswith(".safetensors") for name in os.listdir(options.target)):
        raise ValueError(f"{options.target} is there already: give another target, or --force to replace it")


def _load_pickle(
    path: str, key: Optional[str], dtype: Optional[torch.dtype]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a file of torch.save's that can be saved, and the metadata that says which were left out."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except (pickle.UnpicklingError, EOFError) as error:
        (reason, *_) = [line for line in str(error).splitlines() if "Unsupported" in line] or [type(error).__name__]
        raise ValueError(
            f"{path} holds more than tensors and plain containers, or is damaged ({reason.strip()}). Loading it may run"
            " code: if you trust it, load it with torch.load(weights_only=False) and save its tensors with save_file"
        ) from None
    if key is not None:
        if not isinstance(loaded, dict) or key not in loaded:
            raise ValueError(f"{path} has no entry {key!r}: {_entries(loaded)}")
        loaded = loaded[key]
    state = _state(path, loaded)
    dropped = call(torch.ops.safetensors_torch._tied.default, state, [])
    kept = {name: tensor for name, tensor in state.items() if name not in dropped}
    return {name: _cast(tensor, dtype).contiguous() for name, tensor in kept.items()}, dict(dropped)


def _is_zip(path: str) -> bool:
    """Whether torch.load can map the file."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _state(path: str, loaded: Any) -> dict[str, torch.Tensor]:
    if isinstance(loaded, torch.Tensor) or not isinstance(loaded, dict):
        raise ValueError(f"{path} holds {type(loaded).__name__}, not tensors by name")
    others = [name for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{path} holds other things than tensors: {_entries(loaded)}. Name the entry with the tensors with --key"
        )
    return {str(name): tensor.detach() for name, tensor in loaded.items()}


def _entries(loaded: Any) -> str:
    if not isinstance(loaded, dict):
        return f"it is {type(loaded).__name__}"
    shown = [f"{name} ({type(value).__name__})" for name, value in list(loaded.items())[:10]]
    return f"it has {', '.join(shown)}{', ...' if len(loaded) > 10 else ''}"


def _cast(tensor: torch.Tensor, dtype: Optional[torch.dtype]) -> torch.Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _report(tensors: dict[str, torch.Tensor], written: list[str], as_json: bool) -> None:
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    if as_json:
        print(json.dumps({"files": written, "count": len(tensors), "nbytes": nbytes}, indent=2))
        return
    for path in written:
        print(f"{size_text(os.path.getsize(path)):>10}  {printable(path)}")
    print(f"{len(tensors)} tensor(s), {size_text(nbytes)}")
