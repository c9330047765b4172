"""Converts a checkpoint: from the format of torch.save, one file into several, several into one, to another dtype.

The source is a safetensors file, an index, or a directory with either; or a file of torch.save (.pt, .pth, .bin,
.ckpt), an index of several (pytorch_model.bin.index.json), or a directory with either. Those are loaded with
weights_only=True, so that they cannot run code. A target that ends in .safetensors is a file; any other target is a
directory, written as by save_sharded. One of several tied tensors is kept, as by save_model. Only a few tensors at a
time are in memory.
"""

from __future__ import annotations

import argparse
import json
import os

from .listing import add_quiet, printable, size_text, wants_bar

HELP = "convert from torch.save, shard, unshard, cast"
EXAMPLES = """examples:
  python -m safetensors_torch convert pytorch_model.bin converted.safetensors
  python -m safetensors_torch convert trained.ckpt weights.safetensors --key model.state_dict --skip
  python -m safetensors_torch convert model.safetensors sharded/ --max-shard-size 1MB
  python -m safetensors_torch convert checkpoint/ whole.safetensors --dtype bfloat16
"""

_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="a safetensors file, a file of torch.save, an index (.json), or a directory")
    command.add_argument("target", help="a file that ends in .safetensors, or a directory")
    command.add_argument("--dtype", choices=_DTYPES, help="the dtype to convert floating-point tensors to")
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
    is_file = options.target.endswith(".safetensors")
    if is_file and options.max_shard_size:
        raise ValueError(f"{options.target} is one file: --max-shard-size needs a directory")
    _refuse_replacing(options)
    from .._native_library import ensure_loaded

    ensure_loaded()
    import torch

    from . import sources, targets

    dtype = getattr(torch, options.dtype) if options.dtype else None
    source = sources.open_source(options.source, sources.Options(dtype, options.key, options.skip))
    how = targets.Options({"format": "pt", **source.metadata}, options.durable, wants_bar(options))
    if is_file:
        written = targets.write_file(source.specs, source.read, options.target, how)
    else:
        size = options.max_shard_size or "5GB"
        written = targets.write_directory(source.specs, source.read, options.target, size, how)
    nbytes = sum(spec.nbytes for spec in source.specs.values())
    _report(len(source.specs), nbytes, source.skipped, written, options.json)
    return 0


def _refuse_replacing(options: argparse.Namespace) -> None:
    if options.force or not os.path.lexists(options.target):
        return
    if not os.path.isdir(options.target) or any(name.endswith(".safetensors") for name in os.listdir(options.target)):
        raise ValueError(f"{options.target} exists already: give another target, or --force to replace it")


def _report(count: int, nbytes: int, skipped: list[str], written: list[str], as_json: bool) -> None:
    if as_json:
        result = {"files": written, "count": count, "nbytes": nbytes, "skipped": skipped}
        print(json.dumps(result, indent=2))
        return
    for what in skipped:
        print(f"skipped   {printable(what)}")
    for path in written:
        print(f"{size_text(os.path.getsize(path)):>10}  {printable(path)}")
    print(f"{count} tensor(s), {size_text(nbytes)}")
