"""The libraries that are compared, behind one set of names.

Owns how each is called. worker.py decides when. A library lacks the names of what it cannot do:

    load_file, load, load_model, save, save_file    as this library's
    opened(path)       yields the tensors, name by name, of a file that is open
    halves(path)       the same, the first half of each along its first dimension
    iterate(path)      yields the tensors as they arrive
    save_sharded(tensors, directory, max_shard_size)
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Named = Iterator[tuple[str, Any]]


class Missing(Exception):
    """A library that is not installed, or a function that it lacks."""


def find(library: str, version: str, directory: str, is_cached: bool) -> tuple[SimpleNamespace, str]:
    """Returns the functions of a library, and its version.

    Args:
        version: the wanted version, empty for any.
        directory: goes first on sys.path, if it is not empty.
        is_cached: whether the files will be in the page cache.
    """
    if directory:
        sys.path.insert(0, directory)
    if library == "python":
        return SimpleNamespace(dict=dict), sys.version.split()[0]
    if library == "torch":
        return _torch()
    if library == "ours":
        return _ours()
    distribution = {"streamer": "runai-model-streamer", "fastsafetensors": "fastsafetensors"}.get(
        library, "safetensors"
    )
    try:
        found = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise Missing(f"{distribution} is not installed") from None
    if found != version:
        raise ImportError(f"wanted {distribution} {version}, found {found}")
    if library == "streamer":
        return _streamer(), found
    return (_fastsafetensors(is_cached) if library == "fastsafetensors" else _safetensors(directory)), found


def _torch() -> tuple[SimpleNamespace, str]:
    import torch

    def load_model(model: torch.nn.Module, path: str, mmap: bool) -> object:
        return model.load_state_dict(torch.load(path, mmap=mmap))

    def load_file(path: str, mmap: bool) -> dict:
        return torch.load(path, mmap=mmap)

    return SimpleNamespace(load_file=load_file, load_model=load_model, save_file=torch.save), torch.__version__


def _ours() -> tuple[SimpleNamespace, str]:
    module = importlib.import_module("safetensors_torch")
    functions = {name: getattr(module, name) for name in ("load_file", "load", "load_model", "save", "save_file")}
    if hasattr(module, "iterate"):
        functions["iterate"] = module.iterate

    def save_sharded(tensors: dict, directory: str, max_shard_size: int, is_each: bool = False) -> None:
        if is_each:
            _save_each(module.save_file, tensors, directory, max_shard_size)
        else:
            module.save_sharded(tensors, directory, max_shard_size=max_shard_size)

    functions |= _lazily(module.safe_open) | {"save_sharded": save_sharded}
    return SimpleNamespace(**functions), module.__version__


def _safetensors(directory: str) -> SimpleNamespace:
    module = importlib.import_module("safetensors.torch")
    native = Path(str(importlib.import_module("safetensors._safetensors_rust").__file__))
    if directory and not native.resolve().is_relative_to(Path(directory).resolve()):
        raise ImportError(f"wanted safetensors in {directory}, imported {native}")
    functions = {name: getattr(module, name) for name in ("load_file", "load", "load_model", "save", "save_file")}
    lazily = _lazily(importlib.import_module("safetensors").safe_open)
    return SimpleNamespace(
        **functions,
        **lazily,
        iterate=lazily["opened"],
        save_sharded=functools.partial(_save_each, module.save_file),
    )


def _lazily(safe_open: Any) -> dict[str, Callable[[str], Named]]:
    def opened(path: str) -> Named:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)

    def halves(path: str) -> Named:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                tensor = file.get_slice(name)
                yield name, tensor[: tensor.get_shape()[0] // 2]

    return {"opened": opened, "halves": halves}


def _save_each(save_file: Callable, tensors: dict, directory: str, max_shard_size: int) -> None:
    """Saves the shards one after the other, divided as by `save_sharded`."""
    shards: list[dict] = []
    left = 0
    for name, tensor in tensors.items():
        if tensor.nbytes > left or not shards:
            shards.append({})
            left = max_shard_size
        shards[-1][name] = tensor
        left -= tensor.nbytes
    os.makedirs(directory, exist_ok=True)
    for number, shard in enumerate(shards, 1):
        save_file(shard, f"{directory}/model-{number:05}-of-{len(shards):05}.safetensors")


def _fastsafetensors(is_cached: bool) -> SimpleNamespace:
    """Reads by its copier "nogds", which needs no GPU. It reads around the page cache unless told otherwise."""
    if is_cached:
        os.environ["FASTSAFETENSORS_ODIRECT"] = "0"
    module = importlib.import_module("fastsafetensors")

    def load_file(path: str) -> dict:
        return dict(opened(path))

    def opened(path: str) -> Named:
        loader = module.SafeTensorsFileLoader(None, "cpu", nogds=True)
        loader.add_filenames({0: [path]})
        buffers = loader.copy_files_to_device()
        yield from ((name, buffers.get_tensor(name)) for name in loader.get_keys())
        buffers.close()
        loader.close()

    def iterate(path: str) -> Named:
        loader = module.ParallelLoader(None, [path], device="cpu", nogds=True, use_tqdm_on_load=False)
        yield from loader.iterate_weights()
        loader.close()

    return SimpleNamespace(load_file=load_file, opened=opened, iterate=iterate)


def _streamer() -> SimpleNamespace:
    module = importlib.import_module("runai_model_streamer")

    def iterate(path: str) -> Named:
        with module.SafetensorsStreamer() as streamer:
            streamer.stream_file(path)
            yield from streamer.get_tensors()

    def load_file(path: str) -> dict:
        return dict(iterate(path))

    return SimpleNamespace(load_file=load_file, opened=iterate, iterate=iterate)
