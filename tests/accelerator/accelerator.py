"""A torch backend for tests, "testaccel": two devices whose streams run everything late, like those of a GPU.

A program that forgets to wait for a stream, or that reuses memory too early, gets wrong data from it. Memory of the
devices cannot be read by the host. `load` compiles and registers it, for the whole process; the other functions set how
it behaves and read what it counted. Torch's own interface does the rest:

    stream = torch.Stream(device="testaccel:0")
    with stream:
        tensor = torch.ones(3, device="testaccel:0")
    event = stream.record_event()
    event.synchronize()
"""

from __future__ import annotations

import fcntl
import os
import shutil
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

NAME = "testaccel"
DEVICES = 2
DEFAULT_DELAY_US = 200
DEFAULT_PATIENCE_S = 30.0

# c10::DeviceType::PrivateUse1
_DEVICE_TYPE = 20
_SOURCES = Path(__file__).resolve().parent / "device"
_BUILD = Path(__file__).resolve().parents[2] / "out" / "accelerator"


def load() -> None:
    """Compiles the backend if necessary and registers it with this process. A second call does nothing."""
    if hasattr(torch.ops.testaccel, "start"):
        return
    # Torch uses pinned memory of CUDA if CUDA exists.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _compile()
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module())
    torch.ops.testaccel.start()


def _compile() -> None:
    from torch.utils import cpp_extension

    _BUILD.mkdir(parents=True, exist_ok=True)
    with open(_BUILD / "build.lock", "w") as lock, _ninja_on_path():
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Torch's own lock remains if a compilation is killed, and the next one would wait forever.
        (_BUILD / "lock").unlink(missing_ok=True)
        cpp_extension.load(
            name=NAME,
            sources=[str(path) for path in sorted(_SOURCES.glob("*.cpp"))],
            extra_cflags=["-O1", "-g1", "-Wall", "-Wextra", "-DAT_PER_OPERATOR_HEADERS"],
            build_directory=str(_BUILD),
            is_python_module=False,
        )


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Puts the ninja of the Python package on PATH, in case the environment is not activated."""
    before = os.environ.get("PATH", "")
    if shutil.which("ninja") is None:
        import ninja

        os.environ["PATH"] = os.pathsep.join(filter(None, [before, ninja.BIN_DIR]))
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _device_module() -> types.ModuleType:
    """Returns the module that torch expects at ``torch.testaccel``."""
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.device_count = lambda: DEVICES
    # The names of these in torch.accelerator changed with torch 2.8.
    module.current_device = torch._C._accelerator_getDeviceIndex
    module.set_device = torch._C._accelerator_setDeviceIndex
    module.device = _current
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module._lazy_init = lambda: None
    return module


@contextmanager
def _current(device: int | str | torch.device) -> Iterator[None]:
    """Makes a device current, as ``torch.cuda.device`` does."""
    before = torch._C._accelerator_getDeviceIndex()
    index = device if isinstance(device, int) else torch.device(device).index
    torch._C._accelerator_setDeviceIndex(before if index is None else index)
    try:
        yield
    finally:
        torch._C._accelerator_setDeviceIndex(before)


def device(index: int = 0) -> torch.device:
    return torch.device(NAME, index)


def reset() -> None:
    """Removes every fault, hold and limit, waits for all work, and resets the counts."""
    torch.ops.testaccel.release_all()
    fail_copy_after(None)
    fail_pinning(False)
    no_streams(False)
    pinning_cost(0)
    set_delay(DEFAULT_DELAY_US)
    set_patience(DEFAULT_PATIENCE_S)
    for index in range(DEVICES):
        set_memory_limit(index, None)
    empty_cache()
    reset_statistics()


def set_delay(max_us: int, seed: int = 0) -> None:
    """Sets the longest delay of a stream before each copy, fill or computation. 0 removes it."""
    torch.ops.testaccel.set_delay(max_us, seed)


def set_patience(seconds: float) -> None:
    """Sets how long the host waits for a stream before it raises RuntimeError, as for a held stream."""
    torch.ops.testaccel.set_patience(seconds)


def set_memory_limit(device_index: int, limit: int | None) -> None:
    """Sets the bytes of a device, for used and cached memory together. None removes the limit."""
    torch.ops.testaccel.set_memory_limit(device_index, -1 if limit is None else limit)


def statistics() -> dict[str, Any]:
    """Returns counts since `reset_statistics`, and bytes in use.

    - ``{to_device,to_host,on_device}_{copies,bytes}``; what the host computes for a device needs copies too
    - ``{stream,device,event}_waits``, ``blocking_copies``: when the host waited
    - ``live_events``; ``threads`` that made a device current
    - ``pinned_{in_use,peak,total,allocations}``, in bytes of rounded sizes; the total has what is cached
    - ``devices``: of each ``allocated``, ``peak``, ``reserved`` (with what is cached), all in bytes of sizes rounded up
      to 512, and ``allocations``
    """
    return {
        **torch.ops.testaccel.counters(),
        "devices": [dict(torch.ops.testaccel.memory(index)) for index in range(DEVICES)],
    }


def reset_statistics() -> None:
    torch.ops.testaccel.reset_statistics()


def hold(device_index: int) -> None:
    """Stops the default stream of a device until `release`."""
    torch.ops.testaccel.hold_stream(device_index, 0, True)


def release(device_index: int) -> None:
    torch.ops.testaccel.hold_stream(device_index, 0, False)


def hold_stream(stream: torch.Stream) -> None:
    torch.ops.testaccel.hold_stream(stream.device_index, stream.stream_id, True)


def release_stream(stream: torch.Stream) -> None:
    torch.ops.testaccel.hold_stream(stream.device_index, stream.stream_id, False)


def fail_copy_after(count: int | None) -> None:
    """Makes the count-th copy between host and device raise RuntimeError at its launch. None removes the fault."""
    torch.ops.testaccel.fail_copy_after(count or 0)


def fail_pinning(fails: bool) -> None:
    """Sets whether allocating pinned memory raises RuntimeError."""
    torch.ops.testaccel.fail_pinning(fails)


def no_streams(lacks: bool) -> None:
    """Sets whether getting a stream and recording an event raise RuntimeError, as on backends without them."""
    torch.ops.testaccel.no_streams(lacks)


def pinning_cost(us_per_mib: int) -> None:
    """Sets how long it takes to pin memory that is not cached."""
    torch.ops.testaccel.pinning_cost(us_per_mib)


def empty_cache() -> None:
    """Waits for all queued work, then frees cached device and pinned memory."""
    torch.ops.testaccel.empty_cache()


def synchronize(device_index: int | None = None) -> None:
    """Waits for all streams of a device, or of all devices."""
    for index in range(DEVICES) if device_index is None else [device_index]:
        torch.accelerator.synchronize(index)


def default_stream(device_index: int = 0) -> torch.Stream:
    return torch.Stream(stream_id=0, device_index=device_index, device_type=_DEVICE_TYPE)


@contextmanager
def on_stream(stream: torch.Stream) -> Iterator[torch.Stream]:
    """Makes a stream and its device current. ``with stream`` does the same since torch 2.7."""
    index = torch._C._accelerator_getDeviceIndex()
    before = torch.accelerator.current_stream(stream.device_index)
    torch.accelerator.set_stream(stream)
    try:
        yield stream
    finally:
        torch.accelerator.set_stream(before)
        torch._C._accelerator_setDeviceIndex(index)
