"""The device that is checked and measured: CUDA, or a simulation without a GPU.

Owns what has no common interface in torch: the memory of a device, a limit on it, and busy streams.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import machine

SIMULATED = "testaccel"

# The longest time of one kernel in seconds: some systems kill longer ones.
_KERNEL_SECONDS = 0.05
# Twice the streams of torch's pool, which reuses them in turn.
_LENT = 64


class DeviceError(Exception):
    """A device that does not exist."""


class Device:
    """A device of torch, initialized and current.

    Attributes:
        torch: the device, with its index.
        simulated: whether it is a simulation, whose times have no meaning.
    """

    simulated = False

    def __init__(self, device: torch.device) -> None:
        self.torch = device
        self.synchronize()

    def describe(self) -> dict[str, str]:
        """Returns what the figures depend on."""
        raise NotImplementedError

    def count(self) -> int:
        """Returns the number of devices of this kind."""
        raise NotImplementedError

    def current(self) -> int:
        """Returns the index of the current device."""
        raise NotImplementedError

    def synchronize(self) -> None:
        """Waits for all queued work."""
        raise NotImplementedError

    def current_stream(self) -> Any:
        raise NotImplementedError

    def new_stream(self) -> Any:
        raise NotImplementedError

    def on(self, stream: Any) -> contextlib.AbstractContextManager:
        """Makes a stream the current one."""
        raise NotImplementedError

    def keep_busy(self, stream: Any, seconds: float) -> None:
        """Queues work of that length on a stream and returns at once."""
        raise NotImplementedError

    def keep_others_busy(self, seconds: float) -> None:
        """Keeps every stream of torch's pool busy, except the current one."""
        streams = {stream.stream_id: stream for stream in (self.new_stream() for _ in range(_LENT))}
        streams.pop(self.current_stream().stream_id, None)
        for stream in streams.values():
            self.keep_busy(stream, seconds)

    def is_busy(self, stream: Any) -> bool:
        return not stream.query()

    def allocated(self) -> int:
        """Returns the bytes of the tensors on the device, rounded by the allocator."""
        raise NotImplementedError

    def peak(self) -> int:
        """Returns the peak of `allocated` since `reset_peak`."""
        raise NotImplementedError

    def reset_peak(self) -> None:
        raise NotImplementedError

    def empty_cache(self) -> None:
        """Frees cached memory that no tensor uses."""
        raise NotImplementedError

    def free_bytes(self) -> int:
        """Returns how much memory tensors could use."""
        raise NotImplementedError

    def limit_memory(self, more: int | None) -> None:
        """Limits tensors to ``more`` bytes above the present ones. None removes the limit."""
        raise NotImplementedError

    def host_bytes(self) -> int:
        """Returns the bytes of host memory that simulate device memory."""
        return 0


class Cuda(Device):
    """A GPU."""

    def __init__(self, index: int | None) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(f"torch {torch.__version__} finds no CUDA device here")
        chosen = torch.cuda.current_device() if index is None else index
        if chosen >= torch.cuda.device_count():
            raise DeviceError(f"there is no device cuda:{chosen}, only {torch.cuda.device_count()} in all")
        torch.cuda.set_device(chosen)
        self._cycles = 0.0  # of _sleep per second
        super().__init__(torch.device("cuda", chosen))
        torch.zeros(1, device=self.torch).item()

    def describe(self) -> dict[str, str]:
        properties = torch.cuda.get_device_properties(self.torch)
        link = self._ask_driver("pcie.link.gen.max,pcie.link.width.max").split(", ")
        return {
            "device": properties.name,
            "device memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "bus": f"PCIe generation {link[0]}, {link[1]} lanes, at most" if len(link) == 2 else "unknown",
            "driver": self._ask_driver("driver_version") or "unknown",
            "CUDA of torch": torch.version.cuda or f"ROCm {torch.version.hip}",
        }

    def _ask_driver(self, what: str) -> str:
        """Returns what nvidia-smi reports for this device, or an empty string."""
        command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
        uuid = getattr(torch.cuda.get_device_properties(self.torch), "uuid", None)
        if uuid is not None:
            command += ["-i", f"GPU-{uuid}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""

    def count(self) -> int:
        return torch.cuda.device_count()

    def current(self) -> int:
        return torch.cuda.current_device()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch)

    def current_stream(self) -> Any:
        return torch.cuda.current_stream(self.torch)

    def new_stream(self) -> Any:
        return torch.cuda.Stream(self.torch)

    def on(self, stream: Any) -> contextlib.AbstractContextManager:
        return torch.cuda.stream(stream)

    def keep_busy(self, stream: Any, seconds: float) -> None:
        if self._cycles == 0:
            self._cycles = self._measure_sleep()
        with torch.cuda.stream(stream):
            for _ in range(round(seconds / _KERNEL_SECONDS)):
                torch.cuda._sleep(int(self._cycles * _KERNEL_SECONDS))

    def _measure_sleep(self) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cycles = 50_000_000
        torch.cuda._sleep(cycles)  # raises the clock rate
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
        return cycles * 1000 / start.elapsed_time(end)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.torch)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.torch)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.torch)

    def empty_cache(self) -> None:
        torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.torch)[0]

    def limit_memory(self, more: int | None) -> None:
        self.empty_cache()
        fraction = 1.0
        if more is not None:
            total = torch.cuda.get_device_properties(self.torch).total_memory
            fraction = (torch.cuda.memory_reserved(self.torch) + more) / total
        torch.cuda.set_per_process_memory_fraction(fraction, self.torch)


class Simulated(Device):
    """The accelerator of the tests: its streams are threads, its memory is host memory."""

    simulated = True

    def __init__(self, index: int | None) -> None:
        directory = Path(__file__).resolve().parent.parent / "accelerator"
        if not (directory / "accelerator.py").exists():
            raise DeviceError(f"{directory}: the simulated device is missing; copy tests/accelerator there")
        sys.path.insert(0, str(directory))
        import accelerator

        accelerator.load()
        self._accelerator = accelerator
        super().__init__(accelerator.device(index or 0))

    def describe(self) -> dict[str, str]:
        return {"device": f"none: {SIMULATED}, a simulation"}

    def hurry(self) -> None:
        """Removes the delay of the streams."""
        self._accelerator.set_delay(0)

    def count(self) -> int:
        return self._accelerator.DEVICES

    def current(self) -> int:
        return torch._C._accelerator_getDeviceIndex()

    def synchronize(self) -> None:
        self._accelerator.synchronize(self.torch.index)

    def current_stream(self) -> Any:
        return torch.accelerator.current_stream(self.torch.index)

    def new_stream(self) -> Any:
        return torch.Stream(device=self.torch)

    def on(self, stream: Any) -> contextlib.AbstractContextManager:
        return self._accelerator.on_stream(stream)

    def keep_busy(self, stream: Any, seconds: float) -> None:
        self._accelerator.hold_stream(stream)
        # Without queued work a held stream is idle and has passed every event.
        with self.on(stream):
            torch.empty(1, device=self.torch).fill_(0)
        release = threading.Timer(seconds, self._accelerator.release_stream, [stream])
        release.daemon = True
        release.start()

    def _memory(self) -> dict[str, int]:
        return self._accelerator.statistics()["devices"][self.torch.index]

    def allocated(self) -> int:
        return self._memory()["allocated"]

    def peak(self) -> int:
        return self._memory()["peak"]

    def reset_peak(self) -> None:
        self._accelerator.reset_statistics()

    def empty_cache(self) -> None:
        self._accelerator.empty_cache()

    def free_bytes(self) -> int:
        return machine.available_memory() // 2

    def limit_memory(self, more: int | None) -> None:
        self.empty_cache()
        limit = None if more is None else self._memory()["reserved"] + more
        self._accelerator.set_memory_limit(self.torch.index, limit)

    def host_bytes(self) -> int:
        statistics = self._accelerator.statistics()
        return statistics["pinned_total"] + sum(device["reserved"] for device in statistics["devices"])


def open_device(name: str) -> Device:
    """Opens the device ``name``, such as "cuda", "cuda:1" or "testaccel".

    Raises:
        DeviceError: it does not exist.
    """
    kind, index = parse_name(name)
    return Simulated(index) if kind == SIMULATED else Cuda(index)


def parse_name(name: str) -> tuple[str, int | None]:
    """Returns the kind and index in the name of a device.

    Raises:
        DeviceError: the kind is unknown.
    """
    match = re.fullmatch(rf"(cuda|{SIMULATED})(?::(\d+))?", name)
    if match is None:
        raise DeviceError(f"{name!r} is not a device that can be tested: cuda, cuda:N or {SIMULATED}")
    return match[1], None if match[2] is None else int(match[2])


@contextlib.contextmanager
def limited_memory(device: Device, more: int) -> Iterator[None]:
    """Limits tensors to ``more`` bytes above the present ones inside the block."""
    device.limit_memory(more)
    try:
        yield
    finally:
        device.limit_memory(None)
