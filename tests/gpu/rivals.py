"""The timed subjects: this library in several modes, and other installed loaders of safetensors files.

Owns how each is called. worker.py decides when and how often.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# The tensors by name, and the owner that they must not outlive.
Loaded = tuple[dict[str, torch.Tensor], Any]
Load = Callable[[str], Loaded]
Save = Callable[[dict[str, torch.Tensor], str], None]

OURS = "ours"
PLAIN = "plain"
RESERVED = "reserved"
REFERENCE = "reference"
PRERELEASE = "prerelease"
PREFETCH = "prefetch"
FASTSAFETENSORS = "fastsafetensors"
INSTANTTENSOR = "instanttensor"
STREAMER = "streamer"


@dataclass(frozen=True)
class Subject:
    """A timed library, in one mode."""

    key: str
    title: str
    module: str  # the module it imports
    distribution: str  # its name for pip
    prerelease: bool = False  # whether the directory of the pre-release is first on sys.path


OURS_MODULE = "safetensors_torch"
_OURS = (OURS_MODULE, "safetensors-torch")
_REFERENCE = ("safetensors.torch", "safetensors")

# The keys of this library.
OWN = (OURS, PLAIN, RESERVED)

LOADS = (
    Subject(OURS, "ours", *_OURS),
    Subject(PLAIN, "ours, pinned_pool_bytes=0", *_OURS),
    Subject(RESERVED, "ours, reserved before", *_OURS),
    Subject(REFERENCE, "safetensors", *_REFERENCE),
    Subject(PREFETCH, "safetensors, prefetch", *_REFERENCE, prerelease=True),
    Subject(FASTSAFETENSORS, "fastsafetensors, nogds", "fastsafetensors", "fastsafetensors"),
    Subject(INSTANTTENSOR, "InstantTensor, buffered", "instanttensor", "instanttensor"),
    Subject(STREAMER, "Model Streamer", "runai_model_streamer", "runai-model-streamer"),
)
SAVES = (
    Subject(OURS, "ours", *_OURS),
    Subject(PLAIN, "ours, pinned_pool_bytes=0", *_OURS),
    Subject(REFERENCE, "safetensors", *_REFERENCE),
    Subject(PRERELEASE, "safetensors, pre-release", *_REFERENCE, prerelease=True),
)


class Missing(Exception):
    """A subject that is not installed. The text says what is missing."""


@dataclass(frozen=True)
class Ready:
    """An imported subject, ready to run."""

    version: str
    call: Any  # Load or Save
    setup_seconds: float = 0.0


def _import(subject: Subject) -> tuple[Any, str]:
    if importlib.util.find_spec(subject.module.split(".")[0]) is None:
        raise Missing(f"{subject.distribution} is not installed")
    return importlib.import_module(subject.module), importlib.metadata.version(subject.distribution)


def prepare_load(subject: Subject, device: torch.device) -> Ready:
    """Imports a subject and sets it up to load to a device.

    Raises:
        Missing: it is not installed, or this version of it has not what is needed.
    """
    module, version = _import(subject)
    if subject.module == OURS_MODULE:
        return Ready(version, _ours(module, device), _set_up(module, subject.key))
    make = {
        REFERENCE: _reference,
        PREFETCH: _prefetch,
        FASTSAFETENSORS: _fastsafetensors,
        INSTANTTENSOR: _instanttensor,
        STREAMER: _streamer,
    }[subject.key]
    return Ready(version, make(module, device))


def prepare_save(subject: Subject) -> Ready:
    """Imports a subject and sets it up to save.

    Raises:
        Missing: it is not installed.
    """
    module, version = _import(subject)
    seconds = _set_up(module, subject.key) if subject.module == OURS_MODULE else 0.0
    return Ready(version, module.save_file, seconds)


def _set_up(module: Any, key: str) -> float:
    """Sets the transfer options of a subject, and returns the seconds that took."""
    start = time.perf_counter()
    if key == PLAIN:
        module.set_transfer_options(pinned_pool_bytes=0)
    elif key == RESERVED:
        module.reserve_transfer_memory(module.transfer_options().pinned_pool_bytes)
    return time.perf_counter() - start


def _ours(module: Any, device: torch.device) -> Load:
    return lambda path: (module.load_file(path, device), None)


def _reference(module: Any, device: torch.device) -> Load:
    return lambda path: (module.load_file(path, device=str(device)), None)


def _prefetch(module: Any, device: torch.device) -> Load:
    safe_open = importlib.import_module("safetensors").safe_open
    if not hasattr(safe_open, "prefetch"):
        raise Missing(f"safetensors {importlib.metadata.version('safetensors')} has no prefetch")

    def load(path: str) -> Loaded:
        with safe_open(path, framework="pt", device=str(device)) as file, file.prefetch() as loader:
            return {name: tensor for name, tensor in loader}, None

    return load


def _fastsafetensors(module: Any, device: torch.device) -> Load:
    """Loads through its own buffers: the device does not read the page cache itself."""

    def load(path: str) -> Loaded:
        loader = module.SafeTensorsFileLoader(module.SingleGroup(), str(device), nogds=True)
        loader.add_filenames({0: [path]})
        buffers = loader.copy_files_to_device()
        return {name: buffers.get_tensor(name) for name in loader.get_keys()}, (buffers, loader)

    return load


def _instanttensor(module: Any, device: torch.device) -> Load:
    """Loads through the page cache, if this version has the option."""
    policy = getattr(module, "BackendPolicy", None)
    options = {} if policy is None else {"backend": policy.BUFFERED}

    def load(path: str) -> Loaded:
        with module.safe_open(path, framework="pt", device=str(device), **options) as file:
            return {name: tensor for name, tensor in file.tensors()}, None

    return load


def _streamer(module: Any, device: torch.device) -> Load:
    """Loads to the device directly if this version can, else copies each tensor when it arrives."""
    direct = "device" in inspect.signature(module.SafetensorsStreamer.stream_file).parameters

    def load(path: str) -> Loaded:
        with module.SafetensorsStreamer() as streamer:
            if direct:
                streamer.stream_file(path, device=str(device))
                return {name: tensor for name, tensor in streamer.get_tensors()}, None
            streamer.stream_file(path)
            return {name: tensor.to(device) for name, tensor in streamer.get_tensors()}, None

    return load
