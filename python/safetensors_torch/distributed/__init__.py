"""Checkpoints of many processes, over ``torch.distributed``.

``import safetensors_torch`` does not import this package, nor ``torch.distributed``: import it where it is used.
"""

from __future__ import annotations

from ._local_ranges import local_ranges

__all__ = ["local_ranges"]
