"""The sources of convert: safetensors and files of torch.save, one or several. A few tensors are read at a time.

Owns the search for files of torch.save and their contents. They are loaded with weights_only=True, so that they cannot
run code, and mapped if their format allows. One file at a time is in memory.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from typing import Any, NamedTuple

import torch

from .._errors import call
from .._load import load_in_steps
from .._locations import is_url, located
from .._sharded import open_checkpoint
from .listing import TORCH_SUFFIXES

_INDEX = re.compile(r"(?P<stem>.+)\.(?:pt|pth|bin|ckpt)\.(?:index|index\..+|.+\.index)\.json")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5,})-of-(?P<count>[0-9]{5,})(?P<rest>\..+)")
_FIRST = ("pytorch_model.bin", "pytorch_model.bin.index.json")


class Options(NamedTuple):
    """The options of the command line for the source."""

    dtype: torch.dtype | None
    """The dtype to convert floating-point tensors to."""
    key: str | None
    """The entry that has the tensors, in each file of torch.save."""
    skip: bool
    """Whether to skip entries that cannot be converted."""


class Source:
    """Tensors by name, in their order in the target."""

    def __init__(self) -> None:
        self.specs: dict[str, torch.Tensor] = {}
        """Meta tensors with the dtype of the target."""
        self.metadata: dict[str, str] = {}
        self.skipped: list[str] = []
        """Descriptions of the entries that were skipped."""
        self.tied: dict[str, str] = {}
        """For each name that shares the values of another, the name that is kept."""

    def read(self, names: list[str]) -> list[torch.Tensor]:
        """Returns the tensors of these names, contiguous, on the CPU."""
        raise NotImplementedError

    def _declare(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> None:
        converted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        self.specs[name] = torch.empty(tensor.shape, dtype=converted, device="meta")


def open_source(path: str, options: Options) -> Source:
    """Opens the source at ``path``.

    Raises:
        ValueError: files of torch.save are missing, do not fit their index, or hold more than tensors; a directory has
            several checkpoints; an option does not fit the source.
        SafetensorError, OSError: as load_sharded.
    """
    found = None if is_url(path) else _find(path)
    if found is not None:
        return _TorchSource(found, options)
    if options.key or options.skip:
        raise ValueError(f"--key and --skip are for files of torch.save, which {path} is not")
    return _Safetensors(path, options.dtype)


class _Safetensors(Source):
    def __init__(self, path: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._file, self._dtype = open_checkpoint(located(path), "mmap"), dtype
        self.metadata = call(self._file.metadata) or {}
        for name in call(self._file.offset_keys):
            self._declare(name, call(self._file.get_tensor, name, torch.device("meta")), dtype)

    def read(self, names: list[str]) -> list[torch.Tensor]:
        tensors = load_in_steps(self._file, torch.device("cpu"), self._dtype, names, None)
        return [tensors[name] for name in names]


class _TorchSource(Source):
    def __init__(self, found: _TorchFiles, options: Options) -> None:
        super().__init__()
        self._found, self._options = found, options
        self._current: tuple[str | None, dict[str, torch.Tensor]] = (None, {})
        self._file_of: dict[str, str] = {}
        for file in found.files:
            os.stat(file)  # raises if one is missing, before any is read
        for file in found.files:
            state = self._load(file, self.skipped)
            if found.index is not None:
                state = self._listed(file, state, found.index)
            dropped = call(torch.ops.safetensors_torch._tied.default, state, [])
            self.metadata.update(dropped)
            self.tied.update(dropped)
            for name, tensor in state.items():
                if name in self._file_of:
                    raise ValueError(f"{file} holds the tensor {name!r}, and so does {self._file_of[name]}")
                self._file_of[name] = file
                if name not in dropped:
                    self._declare(name, tensor, options.dtype)
        if not self.specs:
            raise ValueError(f"{found.path} holds no tensor: name the entry that has the tensors with --key")

    def read(self, names: list[str]) -> list[torch.Tensor]:
        read = {}
        for file in self._found.files:
            here = [name for name in names if self._file_of[name] == file]
            state = self._load(file, []) if here else {}
            for name in here:
                read[name] = state[name].to(self.specs[name].dtype).contiguous()
        return [read[name] for name in names]

    def _load(self, file: str, skipped: list[str]) -> dict[str, torch.Tensor]:
        """Returns the tensors of one file, which stays in memory until the next one is loaded."""
        if self._current[0] != file:
            self._current = (None, {})
            loaded = _entry(file, _load(file), self._options.key)
            self._current = (file, _state(file, loaded, self._options.skip, skipped))
        return self._current[1]

    def _listed(self, file: str, state: dict[str, torch.Tensor], index: dict[str, str]) -> dict[str, torch.Tensor]:
        """Returns the part of ``state`` that the index lists for ``file``."""
        path = self._found.path
        missing = [name for name, where in index.items() if where == file and name not in state]
        if missing:
            raise ValueError(
                f"{path} puts {_abbreviated(missing)} into {file}, which does not hold it: fetch both again"
            )
        others = [name for name in state if index.get(name) != file]
        if others and not self._options.skip:
            raise ValueError(
                f"{file} holds {_abbreviated(others)}, which {path} lists elsewhere: fetch both again, or skip it with"
                " --skip"
            )
        self.skipped += [f"{name} ({file}: not in the index)" for name in others]
        return {name: tensor for name, tensor in state.items() if index.get(name) == file}


class _TorchFiles(NamedTuple):
    """The files of torch.save at a path."""

    path: str
    """The path of the file, the index, or the directory."""
    files: list[str]
    index: dict[str, str] | None = None
    """The file of each tensor, if there is an index."""


def _find(path: str) -> _TorchFiles | None:
    """Returns the files of torch.save at ``path``, or None if there are none."""
    if os.path.isdir(path):
        return _find_in_directory(path)
    if path.endswith(".json"):
        index = _read_index(path)
        return None if index is None else _TorchFiles(path, sorted(set(index.values())), index)
    return _TorchFiles(path, [path]) if path.lower().endswith(TORCH_SUFFIXES) else None


def _find_in_directory(path: str) -> _TorchFiles | None:
    names = sorted(name for name in os.listdir(path) if not name.startswith("."))
    if any(name.endswith(".safetensors") or ".safetensors." in name for name in names):
        return None
    whole, shards = [], {}
    for name in names:
        if _INDEX.fullmatch(name):
            whole.append(name)
        elif name.lower().endswith(TORCH_SUFFIXES):
            match = _SHARD.fullmatch(name)
            if match is None:
                whole.append(name)
            else:
                shards.setdefault((match["stem"] + match["rest"], int(match["count"])), []).append(name)
    (*_, chosen) = (None, *(name for name in reversed(_FIRST) if name in whole))
    if chosen is None and len(whole) == 1:
        (chosen,) = whole
    if chosen is not None:
        return _find(os.path.join(path, chosen))
    if whole or len(shards) > 1:
        candidates = whole or [name for names in shards.values() for name in names]
        raise ValueError(f"{path} holds several checkpoints: name one of {', '.join(candidates)}")
    for (_, count), found in shards.items():
        if len(found) != count:
            raise ValueError(f"{path} holds {len(found)} of {count} files: fetch the others, beside {found[0]}")
        return _TorchFiles(path, [os.path.join(path, name) for name in found])
    return None


def _read_index(path: str) -> dict[str, str] | None:
    """Returns the file of each tensor, or None if it is not an index of files of torch.save."""
    with open(path, encoding="utf-8") as file:
        try:
            weight_map = json.load(file)["weight_map"]
            files = set(weight_map.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return None  # opening it as an index of safetensors files reports the error
    if not files or not all(isinstance(name, str) and name.lower().endswith(TORCH_SUFFIXES) for name in files):
        return None
    for name in files:
        if os.path.isabs(name) or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise ValueError(
                f"{path} names {name!r}, which is not a file in its directory: do not trust this checkpoint"
            )
    return {name: os.path.join(os.path.dirname(path), file) for name, file in weight_map.items()}


def _load(path: str) -> Any:
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (pickle.UnpicklingError, EOFError) as error:
        (reason, *_) = [line for line in str(error).splitlines() if "Unsupported" in line] or [type(error).__name__]
        raise ValueError(
            f"{path} holds more than tensors and plain containers, or is damaged ({reason.strip()}). Loading it may run"
            " code: if you trust it, load it with torch.load(weights_only=False) and save its tensors with save_file"
        ) from None
    except RuntimeError as error:
        (reason, *_) = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{path} is damaged, or not a file of torch.save ({reason}): fetch it again") from None


def _entry(path: str, loaded: Any, key: str | None) -> Any:
    """Returns the entry ``key``: a name, or names joined by dots. A name may itself contain dots."""
    if key is None:
        return loaded
    found = _descend(loaded, key)
    if found is None:
        raise ValueError(f"{path} has no entry {key!r}: {_entries(loaded)}")
    return found[0]


def _descend(loaded: Any, key: str) -> None | tuple[Any]:
    if not isinstance(loaded, dict):
        return None
    if key in loaded:
        return (loaded[key],)
    for dot in (match.start() for match in re.finditer(r"\.", key)):
        if key[:dot] in loaded:
            found = _descend(loaded[key[:dot]], key[dot + 1 :])
            if found is not None:
                return found
    return None


def _state(path: str, loaded: Any, skip: bool, skipped: list[str]) -> dict[str, torch.Tensor]:
    if isinstance(loaded, torch.Tensor) or not isinstance(loaded, dict):
        raise ValueError(f"{path} holds {type(loaded).__name__}, not tensors by name")
    others = {name: value for name, value in loaded.items() if not isinstance(value, torch.Tensor)}
    if others and not skip:
        raise ValueError(
            f"{path} holds other things than tensors: {_entries(others)}. Name the entry that has the tensors with"
            " --key, or skip the others with --skip"
        )
    skipped += [f"{name} ({type(value).__name__})" for name, value in others.items()]
    state = {str(name): tensor.detach() for name, tensor in loaded.items() if name not in others}
    if len(state) + len(others) != len(loaded):
        raise ValueError(f"{path} holds several tensors whose names are equal as text: rename them first")
    return state


def _entries(loaded: Any) -> str:
    if not isinstance(loaded, dict):
        return f"it is {type(loaded).__name__}"
    return f"it has {_abbreviated([f'{name} ({_kind(value)})' for name, value in loaded.items()])}"


def _kind(value: Any) -> str:
    if isinstance(value, dict) and value and all(isinstance(name, str) for name in value):
        return f"{type(value).__name__} of {_abbreviated(list(value), 3)}"
    return type(value).__name__


def _abbreviated(names: list[str], most: int = 10) -> str:
    return f"{', '.join(names[:most])}{', ...' if len(names) > most else ''}"
