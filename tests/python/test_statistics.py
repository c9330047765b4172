"""Statistics of tensors: the values of every dtype beside Python's exact fractions, large tensors beside torch."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from safetensors_torch import SafetensorError, save_file, save_sharded
from safetensors_torch._statistics import Statistics, iterate_statistics
from support import CODES, DTYPES, entry, pack

F4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
DEFINED = [code for code in CODES if not code.startswith("F6")]
SIZES = {"F4": 1, "BOOL": 1, "C64": 8, **{code: int(code[1:]) // 8 for code in INTEGERS}}


def decode(code: str, data: bytes) -> list[float | int]:
    """Returns the values of elements, by Python and torch."""
    if code == "F4":
        return [(-1) ** (n >> 3) * F4[n & 7] for byte in data for n in (byte & 15, byte >> 4)]
    if code == "BOOL":
        return [int(byte != 0) for byte in data]
    if code in INTEGERS:
        size, is_signed = int(code[1:]) // 8, code[0] == "I"
        return [int.from_bytes(data[at : at + size], "little", signed=is_signed) for at in range(0, len(data), size)]
    if code in ("F64", "F32", "F16", "C64"):
        kind = {"F64": "d", "F32": "f", "F16": "e", "C64": "f"}[code]
        return [value for (value,) in struct.iter_unpack(f"<{kind}", data)]
    raw = torch.tensor(list(data), dtype=torch.uint8)
    return raw.view(DTYPES[code]).to(torch.float64).tolist() if data else []


def statistics(path: Path, code: str, data: bytes, histogram: bool = False) -> Statistics | None:
    elements = len(data) * 2 if code == "F4" else len(data) // (SIZES.get(code) or DTYPES[code].itemsize)
    path.write_bytes(pack({"a": entry(code, [elements], 0, len(data))}, data))
    ((name, found),) = iterate_statistics(str(path), histogram=histogram)
    assert name == "a"
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("statistics") / "model.safetensors"


@pytest.mark.parametrize("code", DEFINED)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(words=st.lists(st.binary(min_size=8, max_size=8), max_size=40))
@example(words=[bytes(range(8 * at, 8 * at + 8)) for at in range(32)])
@example(words=[b"\x00\x00\x80\x3f\x01\x00\x80\x3f"] * 300)
def test_values_of_every_dtype(path: Path, code: str, words: list[bytes]) -> None:
    if code not in SIZES and code not in DTYPES:
        pytest.skip("this torch lacks the dtype")
    data = b"".join(words)
    values = decode(code, data)
    found = statistics(path, code, data, histogram=True)
    assert found is not None
    finite = [value for value in values if math.isfinite(value)]
    assert found.count == len(values)
    assert found.zeros == sum(value == 0 for value in values)
    assert found.nans == sum(math.isnan(value) for value in values)
    assert found.infs == sum(math.isinf(value) for value in values)
    if not finite:
        assert found[4:] == (None, None, None, None, None)
        return
    assert (found.minimum, found.maximum) == (float(min(finite)), float(max(finite)))
    exact = [Fraction(value) for value in finite]
    mean = sum(exact) / len(exact)
    largest = max(map(abs, exact))
    assert found.mean is not None and abs(Fraction(found.mean) - mean) <= largest / 10**14
    if len(exact) == 1:
        assert found.std is None
    else:
        variance = sum((value - mean) ** 2 for value in exact) / (len(exact) - 1)
        # Squares of doubles may be too large or too small for a double, and deviations too small for the mean.
        if variance == 0 or (Fraction(10) ** -280 < variance < Fraction(10) ** 280):
            rounding = largest / 10**14
            low, high = (
                math.sqrt(max(0, variance * (1 - Fraction(1, 10**9)))),
                math.sqrt(variance * (1 + Fraction(1, 10**9))),
            )
            assert found.std is not None
            assert low - rounding <= found.std <= high + rounding
    bins = found.histogram
    assert bins is not None and 0 < len(bins.counts) <= 128
    assert bins.counts[0] and bins.counts[-1]
    begin, width = Fraction(bins.begin), Fraction(bins.width)
    places = [math.floor((Fraction(float(value)) - begin) / width) for value in finite]
    assert bins.counts == [places.count(place) for place in range(len(bins.counts))]


@pytest.mark.parametrize("code", ["F6_E2M3", "F6_E3M2"])
def test_a_dtype_without_defined_elements_has_no_statistics(path: Path, code: str) -> None:
    path.write_bytes(pack({"a": entry(code, [4], 0, 3), "b": entry("U8", [1], 3, 4)}, b"\0\1\2\3"))
    found = dict(iterate_statistics(str(path), histogram=True))
    assert found["a"] is None
    assert found["b"] is not None and found["b"].mean == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32])
@pytest.mark.parametrize("offset", [0, 1000])
def test_large_tensors_beside_torch(path: Path, dtype: torch.dtype, offset: int) -> None:
    torch.manual_seed(1)
    # Several parts of 1 MiB, and a block that is not full.
    tensor = (torch.randn(1_500_007, dtype=torch.float64) * 50 + offset).to(dtype)
    tensor[::1000] = 0
    save_file({"a": tensor}, path)
    ((_, found),) = iterate_statistics(str(path), histogram=True)
    assert found is not None
    wide = tensor.double()
    assert (found.count, found.zeros) == (tensor.numel(), int((tensor == 0).sum()))
    assert (found.minimum, found.maximum) == (wide.min().item(), wide.max().item())
    assert found.mean == pytest.approx(wide.mean().item(), rel=1e-12, abs=1e-12)
    assert found.std == pytest.approx(wide.std().item(), rel=1e-10)
    assert found.histogram is not None
    begin, width, counts = found.histogram
    assert len(counts) > 64
    places = ((wide - begin) / width).floor().long()
    assert torch.bincount(places, minlength=len(counts)).tolist() == counts


def test_results_do_not_depend_on_the_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors_torch import _statistics

    state = {name: torch.randn(900_000 + number) for number, name in enumerate("abc")}
    save_file(state, path)
    whole = dict(iterate_statistics(str(path), histogram=True))
    for name, value in {"_FIRST_BYTES": 1 << 20, "_LEAST_BYTES": 1 << 20, "_MOST_BYTES": 1 << 20}.items():
        monkeypatch.setattr(_statistics, name, value)
    assert dict(iterate_statistics(str(path), histogram=True)) == whole
    monkeypatch.setattr(_statistics, "_MOST_REQUESTS", 1)
    assert dict(iterate_statistics(str(path), histogram=True)) == whole


def test_selection_order_and_progress(tmp_path: Path) -> None:
    state = {f"layer.{index}": torch.full((100,), float(index)) for index in range(12)}
    save_sharded(state, tmp_path, max_shard_size=1500)
    reports: list[tuple[int, int]] = []
    names = ["layer.11", "layer.0", "layer.5"]
    found = list(iterate_statistics(str(tmp_path), names, report_progress=lambda *report: reports.append(report)))
    assert sorted(name for name, _ in found) == sorted(names)
    for name, statistics in found:
        assert statistics is not None and statistics.mean == float(name.partition(".")[2])
        assert statistics.std == 0 and statistics.histogram is None
    assert reports[-1] == (1200, 1200)
    assert reports == sorted(reports)
    with pytest.raises(SafetensorError, match="lacks 1 of the tensors"):
        list(iterate_statistics(str(tmp_path), ["layer.1", "gone"]))


def test_empty_tensors_and_scalars(path: Path) -> None:
    save_file({"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "i": torch.tensor([7, 7])}, path)
    found = dict(iterate_statistics(str(path), histogram=True))
    assert found["empty"] == Statistics(0, 0, 0, 0, None, None, None, None, None)
    assert found["scalar"] is not None and found["scalar"][:8] == (1, 0, 0, 0, 2.5, 2.5, 2.5, None)
    assert found["i"] is not None and (found["i"].std, found["i"].histogram.counts) == (0, [2])
