"""Compares the values of two tensors for diff. Needs torch and the operators, unlike the rest of diff."""

from __future__ import annotations

import math
from typing import Any

import torch

from .._errors import call

# The elements to compare at a time, which needs a few hundred MiB of memory.
_PIECE = 1 << 23

_FLOAT4 = getattr(torch, "float4_e2m1fn_x2", None)


def flat(side: Any, name: str) -> torch.Tensor:
    """Returns a tensor of a native File, in one dimension."""
    return call(side.get_tensor, name, torch.device("cpu")).reshape(-1)


def compare(left: torch.Tensor, right: torch.Tensor, rtol: float, atol: float) -> dict[str, Any] | None:
    """Compares two flat tensors. Returns None if they are equal.

    Otherwise returns how many elements differ, in how many of them a side is NaN, and by how much the others differ at
    most: None if that is not finite, or if there are no others.
    """
    differing = nan = 0
    distances: list[float | None] = []
    for start in range(0, left.numel(), _PIECE):
        ours, theirs = (tensor[start : start + _PIECE] for tensor in (left, right))
        if torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
            continue
        unequal, with_nan, distance = _compare_piece(ours, theirs, rtol, atol)
        differing += unequal
        nan += with_nan
        if unequal > with_nan:
            distances.append(distance)
    if not differing:
        return None
    finite = [distance for distance in distances if distance is not None]
    most = max(finite) if finite and len(finite) == len(distances) else None
    return {"differing": differing, "elements": left.numel(), "nan": nan, "max_difference": most}


def relative_difference(left: torch.Tensor, right: torch.Tensor) -> float | None:
    """Returns the norm of the difference of two flat tensors, divided by that of ``right``.

    None if that is not finite, or if torch cannot convert the dtype.
    """
    if left.dtype == _FLOAT4:
        return None
    wide = torch.complex128 if left.is_complex() else torch.float64
    difference = norm = 0.0
    for start in range(0, left.numel(), _PIECE):
        ours, theirs = (tensor[start : start + _PIECE].to(wide) for tensor in (left, right))
        difference = math.hypot(difference, torch.linalg.vector_norm(ours - theirs).item())
        norm = math.hypot(norm, torch.linalg.vector_norm(theirs).item())
    relative = difference / norm if norm else math.inf
    return relative if math.isfinite(relative) else None


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the bytes of a flat tensor, a row for each element."""
    return tensor.view(torch.uint8).reshape(tensor.numel(), -1)


def _compare_piece(left: torch.Tensor, right: torch.Tensor, rtol: float, atol: float) -> tuple[int, int, float | None]:
    """Returns how many elements differ, in how many of them a side is NaN, and by how much the others differ."""
    # By bits: a double cannot hold every value.
    different = (_bytes(left) != _bytes(right)).any(dim=1)
    if left.dtype == _FLOAT4:
        return int(different.sum()), 0, None  # each holds two values, which torch cannot convert
    wide = torch.complex128 if left.is_complex() else torch.float64
    ours, theirs = left[different].to(wide), right[different].to(wide)
    if rtol or atol:
        outside = ~torch.isclose(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
        ours, theirs = ours[outside], theirs[outside]
    nan = ours.isnan() | theirs.isnan()
    distances = (ours[~nan] - theirs[~nan]).abs()
    most = distances.max().item() if distances.numel() else None
    return ours.numel(), int(nan.sum()), most if most is not None and math.isfinite(most) else None
