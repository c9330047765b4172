"""Converts a checkpoint: from the format of torch.save, one file into several, several into one, to another dtype.

The source is a safetensors file, an index, or a directory with either; or a file of torch.save (.pt, .pth, .bin,
.ckpt), an index of several (pytorch_model.bin.index.json), or a directory with either. Those are loaded with
weights_only=True, so that they cannot run code. A target that ends in .safetensors is a file; another target is a
directory, written as by save_sharded. One of several tied tensors is kept, as by save_model; the others are listed.
Only a few tensors at a time are in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from typing import TYPE_CHECKING

from .._dtype_names import dtype_name
from .listing import (
    add_quiet,
    check_directory_target,
    check_file_target,
    counted,
    file_name,
    remedies,
    size_text,
    wants_bar,
)
from .terminal import printable

if TYPE_CHECKING:
    from .sources import Source

HELP = "convert from torch.save, shard, unshard, cast"
EXAMPLES = """examples:
  safetensors-torch convert pytorch_model.bin converted.safetensors
  safetensors-torch convert trained.ckpt weights.safetensors --key model.state_dict --skip
  safetensors-torch convert model.safetensors sharded/ --max-shard-size 1MB
  safetensors-torch convert checkpoint/ whole.safetensors --dtype bfloat16
"""

_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="a safetensors file, a file of torch.save, an index (.json), or a directory")
    command.add_argument("target", help="a file that ends in .safetensors, or a directory")
    command.add_argument(
        "--dtype", type=_dtype, help="the dtype to convert floating-point tensors to: float16, fp16, bf16, ..."
    )
    command.add_argument(
        "--max-shard-size", metavar="SIZE", help="the most bytes of a file in a directory: 5GB (the default), 500MiB"
    )
    command.add_argument(
        "--key", metavar="NAME", help="the entry of a torch.save file that has the tensors: model, a.b"
    )
    command.add_argument(
        "--skip", action="store_true", help="skip entries that are not tensors, and tensors that are not in the index"
    )
    command.add_argument("--force", action="store_true", help="replace an existing target")
    command.add_argument("--durable", action="store_true", help="return only after the target is on disk")
    add_quiet(command)


def run(options: argparse.Namespace) -> int:
    is_file = options.target.endswith(".safetensors") and not os.path.isdir(options.target)
    if is_file and options.max_shard_size:
        raise ValueError(f"{options.target} is one file: --max-shard-size needs a directory")
    _check_target(options.target, is_file, options.force)
    from .._native_library import ensure_loaded

    ensure_loaded()
    import torch

    from . import sources, targets

    dtype = getattr(torch, options.dtype) if options.dtype else None
    with remedies(options.source):
        source = sources.open_source(options.source, sources.Options(dtype, options.key, options.skip))
    how = targets.Options({"format": "pt", **source.metadata}, options.durable, wants_bar(options))
    if is_file:
        written = targets.write_file(source.specs, source.read, options.target, how)
    else:
        size = options.max_shard_size or "5GB"
        written = targets.write_directory(source.specs, source.read, options.target, size, how)
    _report(source, written, options.json)
    return 0


def _dtype(text: str) -> str:
    name = dtype_name(text)
    if name not in _DTYPES:
        raise argparse.ArgumentTypeError(f"{text}: not a floating-point dtype; choose from {', '.join(_DTYPES)}")
    return name


def _check_target(target: str, is_file: bool, force: bool) -> None:
    if is_file:
        check_file_target(target, force)
    elif os.path.isdir(target):
        check_directory_target(target, force)
    elif target.endswith(".index.json"):
        raise ValueError(f"{target}: the name of an index; write {os.path.dirname(target) or '.'} for its directory")
    elif re.search(r"\.[A-Za-z]+[0-9]?$", target):
        raise ValueError(
            f"{target}: not a name of a safetensors file; write {file_name(target)}, or {target}/ for a directory"
        )
    else:
        check_directory_target(target, force)


def _report(source: Source, written: list[str], as_json: bool) -> None:
    count, nbytes = len(source.specs), sum(spec.nbytes for spec in source.specs.values())
    if as_json:
        result = {"files": written, "count": count, "nbytes": nbytes, "skipped": source.skipped, "tied": source.tied}
        print(json.dumps(result, indent=2))
        return
    for what in source.skipped:
        print(f"skipped   {printable(what)}")
    for dropped, kept in source.tied.items():
        print(f"tied      {printable(dropped)} = {printable(kept)}: only {printable(kept)} is in the target")
    for path in written:
        print(f"{size_text(os.path.getsize(path)):>10}  {printable(path)}")
    print(f"{counted(count, 'tensor')}, {size_text(nbytes)}")
