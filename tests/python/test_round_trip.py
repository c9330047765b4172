"""Whatever dict of tensors and metadata is saved, loading gives the same back: a property, over generated input."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import safetensors_torch
from random_state import DTYPES, difference, offset_order

# Everything but surrogates, which no UTF-8 can hold.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
names = texts.filter(lambda name: name != "__metadata__")
metadata = st.none() | st.dictionaries(texts, texts, max_size=6)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    # Two F4 values share a byte, so the format has no F4 scalar.
    smallest_rank = 1 if dtype is torch.float4_e2m1fn_x2 else 0
    shape = draw(st.lists(st.integers(0, 5), min_size=smallest_rank, max_size=4))
    count = 1
    for dim in shape:
        count *= dim
    size = count * dtype.itemsize
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).clone().view(dtype).reshape(shape)


states = st.dictionaries(names, tensors(), max_size=6)
generated = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("round_trip") / "model.safetensors"


@generated
@given(states, metadata)
def test_through_bytes(state: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> None:
    data = safetensors_torch.save(state, metadata)
    assert int.from_bytes(data[:8], "little") % 8 == 0
    loaded = safetensors_torch.load(data)
    assert difference(loaded, state) is None
    assert list(loaded) == offset_order(data)
    assert safetensors_torch.save(loaded, metadata) == data


@generated
@given(states, metadata)
def test_through_a_file(path: Path, state: dict[str, torch.Tensor], metadata: dict[str, str] | None) -> None:
    safetensors_torch.save_file(state, path, metadata)
    assert path.read_bytes() == safetensors_torch.save(state, metadata)
    for backend in ("mmap", "pread"):
        assert difference(safetensors_torch.load_file(path, backend=backend), state) is None
        with safetensors_torch.safe_open(path, framework="pt", backend=backend) as file:
            assert file.metadata() == metadata
            assert list(file.keys()) == sorted(state, key=str.encode)
            assert file.offset_keys() == offset_order(path.read_bytes())
            assert difference({name: file.get_tensor(name) for name in state}, state) is None
            assert [list(file.get_slice(name)[...].shape) for name in state] == [list(t.shape) for t in state.values()]


@generated
@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_or_loaded(data: bytes) -> None:
    framed = len(data).to_bytes(8, "little") + data
    for candidate in (data, framed):
        try:
            loaded = safetensors_torch.load(candidate)
        except safetensors_torch.SafetensorError as error:
            assert str(error)
        else:
            assert loaded == {}, "random bytes hold no tensor"
