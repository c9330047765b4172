"""distributed.local_ranges: the elements that a rank holds, against torch's own division."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from fresh import run_python
from safetensors_torch.distributed import local_ranges


def taken(tensor: torch.Tensor, ranges: list[list[tuple[int, int]]]) -> torch.Tensor:
    """Returns the elements of a tensor in these ranges."""
    for dim, held in enumerate(ranges):
        index = torch.tensor([i for begin, end in held for i in range(begin, end)], dtype=torch.int64)
        tensor = tensor.index_select(dim, index)
    return tensor


@st.composite
def divisions(draw: st.DrawFn) -> tuple[list[int], list[int], list]:
    """A shape, a mesh, and a placement for each dimension of the mesh."""
    shape = draw(st.lists(st.integers(0, 13), min_size=1, max_size=3))
    mesh = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    dims = st.integers(0, len(shape) - 1)
    placement = st.one_of(
        st.just(Replicate()),
        st.builds(Shard, dims),
        st.builds(lambda dim, factor: _StridedShard(dim, split_factor=factor), dims, st.integers(1, 5)),
    )
    return shape, mesh, draw(st.lists(placement, min_size=len(mesh), max_size=len(mesh)))


@settings(max_examples=300, deadline=None)
@given(divisions())
def test_every_rank_holds_what_torch_gives_it(division: tuple[list[int], list[int], list]) -> None:
    shape, mesh, placements = division
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for coordinate in itertools.product(*map(range, mesh)):
        local = whole
        for ranks, rank, placement in zip(mesh, coordinate, placements, strict=True):
            if not isinstance(placement, Replicate):
                local = placement._split_tensor(local, ranks, with_padding=False)[0][rank]
        ranges = local_ranges(shape, mesh, coordinate, placements)
        assert torch.equal(taken(whole, ranges), local), (coordinate, ranges)
        for held in ranges:
            assert all(begin < end for begin, end in held)
            assert all(left[1] != right[0] for left, right in itertools.pairwise(held))


def test_ranges_are_those_of_dtensors_of_every_rank() -> None:
    done = run_python("""
        import torch, torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor
        from torch.testing._internal.distributed.fake_pg import FakeStore
        from safetensors_torch.distributed import local_ranges

        whole = torch.arange(11 * 5).reshape(11, 5)
        seen = 0
        for rank in range(6):
            dist.init_process_group("fake", rank=rank, world_size=6, store=FakeStore())
            mesh = init_device_mesh("cpu", (2, 3))
            rows, columns, copies = Shard(0), Shard(1), Replicate()
            for placements in ([rows, columns], [rows, rows], [copies, rows], [columns, copies]):
                local = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
                ranges = local_ranges(whole.shape, mesh.shape, mesh.get_coordinate(), placements)
                held = [[i for part in parts for i in range(*part)] for parts in ranges]
                assert torch.equal(whole[held[0]][:, held[1]], local), (rank, placements, ranges)
                seen += local.numel()
            dist.destroy_process_group()
        print(seen)
    """)
    assert done.returncode == 0, done.stderr
    # Two divisions give each element to one rank; the others give it to 2 and to 3.
    assert int(done.stdout) == 11 * 5 * (1 + 1 + 2 + 3)


def test_a_strided_shard_has_several_ranges() -> None:
    # Two tensor-parallel shards of 8 rows; FSDP divides each between two ranks.
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    held = [local_ranges([8, 2], [2, 2], rank, placements)[0] for rank in itertools.product(range(2), range(2))]
    assert held == [[(0, 2)], [(4, 6)], [(2, 4)], [(6, 8)]]
    assert local_ranges([8], [2], [1], [_StridedShard(0, split_factor=2)]) == [[(2, 4), (6, 8)]]


def test_scalars_and_empty_tensors() -> None:
    assert local_ranges([], [4], [3], [Replicate()]) == []
    assert local_ranges([3, 0], [2], [0], [Shard(0)]) == [[(0, 2)], []]
    assert local_ranges([3], [4], [3], [Shard(0)]) == [[]]
    assert local_ranges([4, 6], [2], [1], [Shard(-1)]) == [[(0, 4)], [(3, 6)]]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (([4], [2], None, [Shard(0)]), ValueError, "this rank is not in the mesh"),
        (([4], [2], [0, 0], [Shard(0)]), ValueError, "a mesh of 1 dimensions, a coordinate of 2 and 1 placements"),
        (([4], [2], [2], [Shard(0)]), ValueError, "coordinate (2,) is outside of a mesh of (2,)"),
        (([4], [2], [-1], [Replicate()]), ValueError, "coordinate (-1,) is outside of a mesh of (2,)"),
        (([4], [2], [0], [Shard(1)]), ValueError, "shards dimension 1, and the tensor has 1"),
        (([], [2], [0], [Shard(0)]), ValueError, "shards dimension 0, and the tensor has 0"),
        (([4], [2], [0], [Partial()]), TypeError, "redistribute the tensor to Shard or Replicate first"),
        (([4], [2], [0], ["Shard(0)"]), TypeError, "placement 'Shard(0)' does not divide a tensor"),
    ],
)
def test_bad_arguments_say_what_is_wrong(arguments: tuple, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        local_ranges(*arguments)


def test_the_package_is_imported_on_demand() -> None:
    done = run_python("""
        import sys, safetensors_torch
        print(*(name for name in sys.modules if name.startswith("safetensors_torch.distributed")))
    """)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
