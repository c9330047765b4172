"""Joins the files that the processes of torch.distributed.checkpoint have written into a checkpoint of whole
tensors."""

from __future__ import annotations

import argparse
import json
import os

from .listing import add_quiet, check_directory_target, size_text, wants_bar
from .terminal import printable

HELP = "join the files of many processes"
EXAMPLES = """examples:
  safetensors-torch consolidate step-1000/sharded step-1000
  safetensors-torch consolidate step-1000/sharded whole --max-shard-size 500MB --durable
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="the directory with the files shard-*.safetensors")
    command.add_argument("target", help="the directory for the checkpoint, created if it is missing")
    command.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="the most bytes of a file: 5GB (the default), 500MiB"
    )
    command.add_argument("--force", action="store_true", help="replace an existing checkpoint")
    command.add_argument("--durable", action="store_true", help="return only after the target is on disk")
    add_quiet(command)


def run(options: argparse.Namespace) -> int:
    check_directory_target(options.target, options.force)
    from .._native_library import ensure_loaded

    ensure_loaded()
    from ..distributed._consolidate import consolidate

    names = consolidate(
        options.source,
        options.target,
        max_shard_size=options.max_shard_size,
        durable=options.durable,
        progress=wants_bar(options),
    )
    paths = [os.path.join(options.target, name) for name in names]
    if options.json:
        print(json.dumps({"files": paths}, indent=2))
        return 0
    for path in paths:
        print(f"{size_text(os.path.getsize(path)):>10}  {printable(path)}")
    return 0
