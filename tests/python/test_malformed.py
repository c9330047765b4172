"""Every reader refuses malformed files with a helpful message, and loads unusual valid ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import safetensors
import safetensors.torch as reference
import torch

import safetensors_torch
from fresh import run_python
from malformed_files import MALFORMED, VALID, Malformed, entry, one
from odd_files import ODDITIES, Oddity
from random_state import difference, flat_bytes, random_state
from safetensors_torch import SafetensorError

DTYPE_OF_CODE = {"F32": torch.float32, "BOOL": torch.bool}
FILE_WAYS = ("load_file mmap", "load_file pread", "safe_open mmap", "safe_open pread", "op get_tensor")


def read(way: str, path: Path) -> None:
    """Opens and reads the file at `path`, which must fail for a malformed file."""
    function, argument = way.split()
    if function == "load_file":
        safetensors_torch.load_file(path, backend=argument)
    elif function == "safe_open":
        with safetensors_torch.safe_open(path, framework="pt", backend=argument) as file:
            file.keys()
    else:
        torch.ops.safetensors_torch.get_tensor(str(path), "weight")


def expect_message(message: str, case: Malformed) -> None:
    assert re.search(case.says, message, re.DOTALL), f"{message!r} says nothing of {case.says!r}"
    for leak in ("frame #", "Exception raised from", "panicked", "refused\n", "src/"):
        assert leak not in message
    assert "\n" not in message.strip(), f"{message!r} takes several lines"
    assert len(message) < 2000


def test_the_table_is_large_and_its_names_differ() -> None:
    assert len({case.id for case in MALFORMED}) == len(MALFORMED) >= 70
    assert len({case.data for case in MALFORMED}) == len(MALFORMED)


VECTORS = Path(__file__).resolve().parents[1] / "vectors"
STATUS = dict(line.split("\t") for line in (VECTORS / "malformed.tsv").read_text().splitlines())


def test_the_shared_vectors_are_this_table() -> None:
    files = {path.stem: path.read_bytes() for path in (VECTORS / "malformed").iterdir()}
    table = {case.id: case.data for case in MALFORMED}
    assert files.keys() == table.keys() == STATUS.keys()
    for name, data in files.items():
        # Other versions of the library compress differently, with the same beginning.
        compared = 8 if name in ("foreign-zip", "foreign-gzip", "foreign-npy") else None
        assert data[:compared] == table[name][:compared], name


@pytest.mark.parametrize("name", STATUS)
def test_the_shared_vectors_are_refused_for_the_right_reason(name: str) -> None:
    header = (VECTORS.parents[1] / "include" / "safetensors_torch.h").read_text()
    numbers = dict(re.findall(r"(SFT_ERROR_\w+) = (\d+)", header))
    with pytest.raises(SafetensorError):
        safetensors_torch.load_file(VECTORS / "malformed" / f"{name}.safetensors")
    _, code, _, _ = torch.ops.safetensors_torch._last_error()
    assert code == int(numbers[STATUS[name]])


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.id)
def test_bytes_are_refused(case: Malformed) -> None:
    for data, copy in ((case.data, True), (bytearray(case.data), False)):
        with pytest.raises(SafetensorError) as refusal:
            safetensors_torch.load(data, copy=copy)
        expect_message(str(refusal.value), case)


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: case.id)
def test_files_are_refused(case: Malformed, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-7.safetensors"
    path.write_bytes(case.data)
    for way in FILE_WAYS:
        error = RuntimeError if way.startswith("op ") else SafetensorError
        with pytest.raises(error) as refusal:
            read(way, path)
        message = str(refusal.value)
        assert str(path) in message, f"{way} names no file: {message}"
        # The path contains the name of the case, which may match the pattern.
        expect_message(message.replace(str(path), ""), case)


@pytest.mark.parametrize("case", [case for case in MALFORMED if not case.stricter], ids=lambda case: case.id)
def test_the_reference_refuses_it_too(case: Malformed) -> None:
    with pytest.raises(safetensors.SafetensorError):
        reference.load(case.data)


def test_no_malformed_file_ends_the_process(tmp_path: Path) -> None:
    """A process of its own reads them all: an abort, a stack overflow or a signal would show in its exit status."""
    for case in MALFORMED:
        (tmp_path / f"{case.id}.safetensors").write_bytes(case.data)
    program = """
        import os, sys
        import safetensors_torch
        refused = 0
        for name in sorted(os.listdir(sys.argv[1])):
            path = os.path.join(sys.argv[1], name)
            with open(path, "rb") as file:
                data = file.read()
            ways = [lambda: safetensors_torch.load(data), lambda: safetensors_torch.load(bytearray(data), copy=False)]
            for kind in ("mmap", "pread"):
                ways.append(lambda kind=kind: safetensors_torch.load_file(path, backend=kind))
                ways.append(lambda kind=kind: safetensors_torch.safe_open(path, "pt", backend=kind).__enter__())
            for way in ways:
                try:
                    way()
                except safetensors_torch.SafetensorError:
                    refused += 1
        print(refused)
    """
    done = run_python(program, tmp_path, seconds=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 6 * len(MALFORMED)


@pytest.mark.parametrize("case", ODDITIES, ids=lambda case: case.id)
def test_odd_files_load(case: Oddity, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    path.write_bytes(case.data)
    results = [safetensors_torch.load(case.data), safetensors_torch.load(bytearray(case.data), copy=False)]
    results += [safetensors_torch.load_file(path, backend=backend) for backend in ("mmap", "pread")]
    for loaded in results:
        assert list(loaded) == list(case.expected)
        for name, (code, shape, raw) in case.expected.items():
            tensor = loaded[name]
            assert tensor.dtype == DTYPE_OF_CODE[code]
            assert list(tensor.shape) == shape
            assert bytes(flat_bytes(tensor).tolist()) == raw
    with safetensors_torch.safe_open(path, framework="pt") as file:
        assert file.metadata() == case.metadata
    assert difference(results[0], reference.load(case.data)) is None, "the reference reads it otherwise"


def test_every_proper_prefix_is_refused(tmp_path: Path) -> None:
    data = reference.save({"weight": torch.arange(6.0), "bias": torch.ones(2, dtype=torch.bool)}, {"format": "pt"})
    path = tmp_path / "cut.safetensors"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(SafetensorError):
            safetensors_torch.load(data[:length])
        for backend in ("mmap", "pread"):
            with pytest.raises(SafetensorError, match=re.escape(str(path))):
                safetensors_torch.load_file(path, backend=backend)


def test_a_changed_byte_has_the_result_of_the_reference() -> None:
    """Each byte of a header is replaced by many others: both libraries refuse it, or read the same tensors."""
    data = reference.save({"w": torch.arange(3.0), "bias": torch.ones(2, dtype=torch.bool)}, {"format": "pt"})
    header_end = 8 + int.from_bytes(data[:8], "little")
    refused = 0
    for place in range(header_end):
        for byte in b'\0\x01\x7f\xff 0139-+."\\{}[]:,aesEUF8_':
            changed = data[:place] + bytes([byte]) + data[place + 1 :]
            try:
                expected = reference.load(changed)
            except safetensors.SafetensorError:
                refused += 1
                with pytest.raises(SafetensorError):
                    safetensors_torch.load(changed)
                continue
            assert difference(safetensors_torch.load(changed), expected) is None, f"byte {place} as {byte:#x}"
    assert refused > header_end


def test_random_damage_ends_in_tensors_or_an_error() -> None:
    """After several changes, cuts and insertions, the result is tensors or an error."""
    outcomes = {True: 0, False: 0}
    for seed in range(400):
        state = random_state(seed)
        data = bytearray(reference.save(state.tensors, state.metadata))
        for step in range(1 + seed % 4):
            place = (seed * 7919 + step * 104729) % max(1, min(len(data), 400))
            if seed % 3 == 0:
                del data[place : place + 1 + step]
            elif seed % 3 == 1:
                data[place:place] = bytes([(seed * 31 + step) % 256])
            else:
                data[place : place + 1] = bytes([(seed * 17 + step) % 256])
        try:
            loaded = safetensors_torch.load(bytes(data))
        except SafetensorError:
            outcomes[False] += 1
        else:
            outcomes[True] += 1
            assert all(tensor.numel() <= len(data) for tensor in loaded.values())
    assert outcomes[False] > 100


@pytest.mark.parametrize("code", ["F6_E2M3", "F6_E3M2"])
def test_a_dtype_that_torch_lacks_is_named(code: str, tmp_path: Path) -> None:
    """A valid file opens, and only the tensor itself is refused."""
    data = one(entry(f'"{code}"', "[4]", "[0,3]"), bytes(3))
    path = tmp_path / "six_bits.safetensors"
    path.write_bytes(data)
    for call in (lambda: safetensors_torch.load(data), lambda: safetensors_torch.load_file(path)):
        with pytest.raises(SafetensorError, match=code) as refusal:
            call()
        assert "weight" in str(refusal.value)
    with safetensors_torch.safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["weight"]
        assert file.get_slice("weight").get_dtype() == code
        assert file.get_slice("weight").get_shape() == [4]
        with pytest.raises(SafetensorError, match=code):
            file.get_tensor("weight")


def test_the_undamaged_file_loads() -> None:
    """VALID, from which the cases above are made, loads: so each case fails for its own fault."""
    assert difference(safetensors_torch.load(VALID), {"weight": torch.zeros(1)}) is None
