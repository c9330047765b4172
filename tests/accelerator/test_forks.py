"""A forked process inherits nothing of its parent's transfers."""

from __future__ import annotations

import os

import pytest

import safetensors_torch
from support_accelerator import SLAB, reserve


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_no_pinned_memory() -> None:
    """The child must not use or free the slabs of the parent's pinned pool."""
    reserve(4)
    child = os.fork()
    if child == 0:
        had = safetensors_torch.transfer_memory()
        os._exit(0 if had == 0 and safetensors_torch.release_transfer_memory() == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert safetensors_torch.transfer_memory() == safetensors_torch.release_transfer_memory() == 4 * SLAB
