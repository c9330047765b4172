"""The settings of a process for loads and saves: threads, and pinned host memory for transfers to devices."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from ._arguments import check_int
from ._errors import call

_ops = torch.ops.safetensors_torch

# In the order of their numbers.
_DIRECT: tuple[bool | Literal["auto"], ...] = ("auto", False, True)


class TransferOptions(NamedTuple):
    """The settings of the process."""

    pinned_pool_bytes: int
    """The most pinned host memory that all transfers together keep, in bytes."""
    threads: int
    """The most threads that one load or save uses; 0 means a number that suits the machine."""
    direct: bool | Literal["auto"]
    """Whether large reads into memory bypass the page cache; "auto" means those of files that are not in it."""


def transfer_options() -> TransferOptions:
    """Returns the current settings.

    Their defaults are the environment variables SAFETENSORS_TORCH_PINNED_POOL_BYTES, or 64 MiB,
    SAFETENSORS_TORCH_THREADS, or 0, and SAFETENSORS_TORCH_DIRECT ("auto", "0" or "1"), or "auto".

    Example:
        >>> transfer_options()
        TransferOptions(pinned_pool_bytes=67108864, threads=0, direct='auto')
    """
    pinned_pool_bytes, threads, direct = call(_ops._transfer_options)
    return TransferOptions(pinned_pool_bytes, threads, _DIRECT[direct])


def set_transfer_options(
    *, pinned_pool_bytes: int | None = None, threads: int | None = None, direct: bool | Literal["auto"] | None = None
) -> None:
    """Changes the settings for later loads and saves. None keeps a setting.

    Args:
        pinned_pool_bytes: the most pinned host memory that transfers to and from devices keep, in bytes. It is
            allocated on demand, in slabs of 2 MiB. With 0, copies go through memory that is not pinned.
        threads: the most threads that one load or save uses: the calling thread, those that read and copy, and those
            that prefault in the background. 1 means the calling thread only; 0 a number that suits the machine.
            torch.set_num_threads sets the number of torch's own threads, which convert tensors on the CPU (``dtype``).
        direct: whether large reads into memory bypass the page cache (O_DIRECT): loads with ``backend="pread"`` and
            those to devices. "auto": if the file is not in it, and its storage is fast (1 GiB/s). False: never, so
            that the page cache keeps what was read. True: even if the file is in it, which takes several times as
            long. If a filesystem refuses direct reads, reads are buffered.

    Raises:
        TypeError: a number is not an int, or ``direct`` neither a bool nor "auto".
        ValueError: a number is negative.

    Example:
        >>> set_transfer_options(threads=4)
        >>> transfer_options().threads
        4
        >>> set_transfer_options(threads=0)
    """
    if pinned_pool_bytes is not None:
        pinned_pool_bytes = check_int(pinned_pool_bytes, "pinned_pool_bytes")
    if threads is not None:
        threads = check_int(threads, "threads")
    number = None
    if direct is not None:
        numbers = [i for i, value in enumerate(_DIRECT) if type(value) is type(direct) and value == direct]
        if not numbers:
            raise TypeError(f'direct must be True, False or "auto", not {direct!r}')
        (number,) = numbers
    call(_ops._set_transfer_options, pinned_pool_bytes, threads, number)


def reserve_transfer_memory(nbytes: int) -> int:
    """Pins host memory in advance, so that the first transfer does not have to.

    Pinning takes about a millisecond for each MiB. It belongs to the current device: set that to the target device
    first.

    Args:
        nbytes: how many bytes to have pinned, up to ``pinned_pool_bytes``.

    Returns:
        The number of pinned bytes now, which is 0 without an accelerator that supports pinned memory.

    Raises:
        TypeError: ``nbytes`` is not an int.

    Example:
        >>> reserve_transfer_memory(32 << 20) in (0, 32 << 20)
        True
    """
    return call(_ops._reserve_transfer_memory, check_int(nbytes, "nbytes"))


def release_transfer_memory() -> int:
    """Frees the pinned host memory that no transfer is using.

    Returns:
        The number of bytes freed.

    Example:
        >>> release_transfer_memory() >= 0
        True
    """
    return call(_ops._release_transfer_memory)


def transfer_memory() -> int:
    """Returns the bytes of pinned host memory that are in use by transfers or kept for the next one.

    Example:
        >>> transfer_memory() <= transfer_options().pinned_pool_bytes
        True
    """
    return call(_ops._transfer_memory)
