"""Computes statistics of tensors through the core's C library, without importing torch, in bounded memory."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from ctypes import c_void_p, pointer
from typing import Any, NamedTuple

from ._c_library import (
    PREAD,
    CHistogram,
    CStatistics,
    CStatisticsRequest,
    CTensorInfo,
    c_library,
    open_files,
    tensor_infos,
)
from ._exceptions import SafetensorError
from ._locations import RemotePath

_UNDEFINED = ("F6_E2M3", "F6_E3M2")
"""The dtypes whose elements the format does not locate: it does not say which bits are an element."""

# The library divides tensors into parts of this size: results do not depend on pieces that consist of whole ones.
_PART_BYTES = 1 << 20

# Ctrl-C waits for one call, so its bytes follow its time. With fewer than the least, a network filesystem has too few
# requests; more than the most save no time.
_FIRST_BYTES, _LEAST_BYTES, _MOST_BYTES = 32 << 20, 16 << 20, 256 << 20
_SHORT_SECONDS, _LONG_SECONDS = 0.05, 0.3

# A source answers as many requests of 2 MiB at once, and Ctrl-C waits for one of them.
_REMOTE_BYTES = 64 << 20

_MOST_REQUESTS = 1000
"""The most tensors of one call, because each may have a histogram."""


class Histogram(NamedTuple):
    """How many finite values lie in each of several intervals of one width, exactly."""

    begin: float
    """The beginning of the first interval, a multiple of the width."""
    width: float
    """A power of two: bin i has the values from begin + i * width up to, but without, begin + (i + 1) * width."""
    counts: list[int]
    """From the interval with the least value to the one with the greatest: at most 128."""


class Statistics(NamedTuple):
    """Statistics of a tensor's values: its elements, or the real and the imaginary parts of them."""

    count: int
    """All values."""
    zeros: int
    nans: int
    infs: int
    minimum: float | None
    """Of the finite values, as the others below; None if there are none."""
    maximum: float | None
    mean: float | None
    std: float | None
    """With Bessel's correction; None for fewer than two values, infinite if the squares exceed a double."""
    histogram: Histogram | None
    """Of the finite values; None if there are none, or if it was not asked for."""


class _Tensor:
    """A tensor whose values are being added."""

    def __init__(self, index: int, info: CTensorInfo, bits: int, histogram: bool) -> None:
        self.name, self.index, self.bits = info.name.text(), index, bits
        self.left = info.nbytes * 8 // bits
        """The elements that are not added yet."""
        self._first = 0
        self._has_histogram = histogram
        self._statistics = CStatistics(struct_size=ctypes.sizeof(CStatistics))
        self._histogram: CHistogram | None = None
        """Only from the first request to the result: it is large."""

    def request(self, most: int) -> tuple[CStatisticsRequest, int]:
        """Returns the request for the next elements, about ``most`` bytes of them, and how many bytes they are."""
        part = _PART_BYTES * 8 // self.bits
        count = min(self.left, max(1, most // _PART_BYTES) * part)
        if self._has_histogram and self._histogram is None:
            self._histogram = CHistogram(struct_size=ctypes.sizeof(CHistogram))
        histogram = None if self._histogram is None else pointer(self._histogram)
        request = CStatisticsRequest(self.index, self._first, count, pointer(self._statistics), histogram)
        self._first += count
        self.left -= count
        return request, count * self.bits // 8

    def result(self) -> Statistics:
        """Returns the statistics; called once."""
        found, bins, self._histogram = self._statistics, self._histogram, None
        counts = found.count, found.zeros, found.nans, found.infinities
        finite = found.count - found.nans - found.infinities
        if not finite:
            return Statistics(*counts, None, None, None, None, None)
        std = math.sqrt(found.squared_deviations / (finite - 1)) if finite > 1 else None
        histogram = None
        if bins is not None:
            histogram = Histogram(bins.first * bins.width, bins.width, bins.counts[: bins.bin_count])
        return Statistics(*counts, found.minimum, found.maximum, found.mean, std, histogram)


def iterate_statistics(
    location: str | bytes | RemotePath,
    names: Collection[str] | None = None,
    *,
    histogram: bool = False,
    report_progress: Callable[[int, int], Any] | None = None,
) -> Iterator[tuple[str, Statistics | None]]:
    """Computes the statistics of tensors, one after the other, in the order of their data.

    Args:
        location: a file, an index, or a directory with either.
        names: the tensors; None for all.
        histogram: whether to count the values in intervals too, which takes up to twice as long.
        report_progress: called with the bytes done and the total, several times a second.

    Yields:
        The name of a tensor and its statistics, or None if the format does not define its elements.

    Raises:
        SafetensorError: a file is not valid safetensors, does not fit the index, or has changed; a tensor is missing.
        OSError: a file cannot be read, or the package lacks the C library.
    """
    library = c_library()
    with open_files(library, location, PREAD) as files:
        selected = [(file, list(_select(library, file, names, histogram))) for _, file in files]
        missing = 0 if names is None else len(set(names)) - sum(len(tensors) for _, tensors in selected)
        if missing:
            title = location.title if isinstance(location, RemotePath) else os.fsdecode(location)
            raise SafetensorError(f"{title}: lacks {missing} of the tensors; list it")
        total = sum(tensor.left * tensor.bits // 8 for _, tensors in selected for _, tensor in tensors if tensor)
        is_remote = isinstance(location, RemotePath)
        done, most = 0, _REMOTE_BYTES if is_remote else _FIRST_BYTES
        for file, tensors in selected:
            start = 0
            while start < len(tensors):
                requests, nbytes, end = _next_requests(tensors, start, most)
                began = time.monotonic()
                _compute(library, file, requests)
                if not is_remote and nbytes >= most:
                    most = _next_bytes(most, time.monotonic() - began)
                done += nbytes
                if report_progress is not None:
                    report_progress(done, total)
                for name, tensor in tensors[start:end]:
                    yield name, None if tensor is None else tensor.result()
                start = end


def _next_requests(
    tensors: list[tuple[str, _Tensor | None]], start: int, most: int
) -> tuple[list[CStatisticsRequest], int, int]:
    """Returns requests for about ``most`` bytes from the tensor ``start`` on, their bytes, and the first tensor that is
    not complete with them.
    """
    requests, nbytes = [], 0
    for number, (_, tensor) in enumerate(itertools.islice(tensors, start, None), start):
        if nbytes >= most or len(requests) == _MOST_REQUESTS:
            return requests, nbytes, number
        if tensor is None or not tensor.left:
            continue
        request, size = tensor.request(most - nbytes)
        requests.append(request)
        nbytes += size
        if tensor.left:
            return requests, nbytes, number
    return requests, nbytes, len(tensors)


def _next_bytes(nbytes: int, seconds: float) -> int:
    """Returns the bytes of the next call, given those of the last one and its time."""
    if seconds < _SHORT_SECONDS:
        return min(2 * nbytes, _MOST_BYTES)
    return max(nbytes // 2, _LEAST_BYTES) if seconds > _LONG_SECONDS else nbytes


def _select(
    library: Any, file: c_void_p, names: Collection[str] | None, histogram: bool
) -> Iterator[tuple[str, _Tensor | None]]:
    """Returns the selected tensors of a file; None for those whose elements are not defined."""
    wanted = None if names is None else set(names)
    for index, info in enumerate(tensor_infos(library, file)):
        name = info.name.text()
        if wanted is None or name in wanted:
            is_defined = library.sft_dtype_get_code(info.dtype).decode() not in _UNDEFINED
            bits = library.sft_dtype_get_bits(info.dtype)
            yield name, _Tensor(index, info, bits, histogram) if is_defined else None


def _compute(library: Any, file: c_void_p, requests: list[CStatisticsRequest]) -> None:
    if requests:
        library.sft_file_compute_statistics(file, (CStatisticsRequest * len(requests))(*requests), len(requests))
