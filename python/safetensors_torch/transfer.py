"""What loads and saves may use: threads, and pinned host memory for devices.

Owns the Python names of these settings, which are the process's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ._errors import call

_ops = torch.ops.safetensors_torch


class TransferOptions(NamedTuple):
    """The settings of the process."""

    pinned_pool_bytes: int
    """Pinned host memory for all transfers together, in bytes."""
    threads: int
    """The most threads that one load or save uses; 0 means as many as suit the machine."""


def transfer_options() -> TransferOptions:
    """The settings as they are.

    Until they are set, they are those of the environment variables SAFETENSORS_TORCH_PINNED_POOL_BYTES (64
    MiB if unset) and SAFETENSORS_TORCH_THREADS (otherwise 0).

    Example:
        >>> transfer_options()
        TransferOptions(pinned_pool_bytes=67108864, threads=0)
    """
    return TransferOptions(*call(_ops._transfer_options))


def set_transfer_options(*, pinned_pool_bytes: int | None = None, threads: int | None = None) -> None:
    """Changes the settings, from the next load or save on.

    Args:
        pinned_pool_bytes: the most pinned host memory that transfers to and from devices keep, in bytes; it is taken
            in slabs of 2 MiB, as it is needed. 0 means none: copies then go through memory that is not pinned.
        threads: the most threads that one load or save uses, to the CPU or a device: the calling one, those that read
            and copy, and those that go on in the background (``prefault``). 1 means the calling one alone; 0 as many
            as suit the machine and the work. torch's own threads, which convert tensors on the CPU (``dtype``), are
            those of torch.set_num_threads.

    What is None stays as it is.

    Raises:
        TypeError: what is not an int.
        ValueError: a negative number.

    Example:
        >>> set_transfer_options(threads=4)
        >>> transfer_options().threads
        4
        >>> set_transfer_options(threads=0)
    """
    for name, value in (("pinned_pool_bytes", pinned_pool_bytes), ("threads", threads)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    call(_ops._set_transfer_options, _fitting(pinned_pool_bytes), _fitting(threads))


def _fitting(value: Any) -> Any:
    """What an operator's int can hold; more than this is without end anyway."""
    return None if value is None else max(min(value, 2**62), -1)


def reserve_transfer_memory(nbytes: int) -> int:
    """Pins host memory for the transfers to come, so that the first of them need not. It takes about a millisecond for
    each MiB, and is done by the current device: make that the one to be loaded to first.

    Args:
        nbytes: how much there shall be. No more than ``pinned_pool_bytes`` is pinned.

    Returns:
        How many bytes there are now: 0 where there is no accelerator that has such memory.

    Raises:
        TypeError: ``nbytes`` is no int.

    Example:
        >>> reserve_transfer_memory(32 << 20) in (0, 32 << 20)
        True
    """
    if not isinstance(nbytes, int) or isinstance(nbytes, bool):
        raise TypeError(f"nbytes must be an int, not {type(nbytes).__name__}")
    return call(_ops._reserve_transfer_memory, _fitting(nbytes))


def release_transfer_memory() -> int:
    """Frees the pinned host memory that waits for the next transfer. What one uses at this moment stays.

    Returns:
        How many bytes that was.

    Example:
        >>> release_transfer_memory() >= 0
        True
    """
    return call(_ops._release_transfer_memory)


def transfer_memory() -> int:
    """How many bytes of pinned host memory transfers have now, in use or waiting for the next one.

    Example:
        >>> transfer_memory() <= transfer_options().pinned_pool_bytes
        True
    """
    return call(_ops._transfer_memory)
