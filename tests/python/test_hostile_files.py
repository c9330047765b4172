"""Files made to exhaust their reader: an error, in bounded time and memory, however they are read.

tests/torture/attacks.c has more of them, for the core alone.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from proc import peak_growth
from support import entry, pack

MIB = 2**20
LARGEST_HEADER = 100_000_000

# Every way to read a file must refuse it before it allocates memory for what the file claims.
READ = """
    import time
    from safetensors_torch import SafetensorError, load, load_file, load_model, safe_open
    def refused(read, message):
        begin = time.process_time()
        try:
            read()
        except SafetensorError as error:
            assert message in str(error), error
        else:
            raise AssertionError("it was read")
        assert time.process_time() - begin < 10
    def read_all(path, message):
        for backend in ("mmap", "pread"):
            refused(lambda: load_file(path, backend=backend), message)
            refused(lambda: load_model(torch.nn.Linear(1, 1), path, backend=backend), message)
        refused(lambda: safe_open(path, "pt").__enter__(), message)
"""


def claiming(length: int) -> bytes:
    return struct.pack("<Q", length) + b"{}      "


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        pytest.param(claiming(2**63), "more than the 100000000 allowed", id="a header of 2^63 bytes"),
        pytest.param(claiming(2**64 - 1), "more than the 100000000 allowed", id="one of 2^64 - 1"),
        pytest.param(claiming(LARGEST_HEADER), "only 8 follow its length", id="one of 100 MB in a file of 16 bytes"),
        pytest.param(pack({"t": entry("F32", [2**40], 0, 2**42)}), "need 4398046511104 bytes", id="4 TiB"),
        pytest.param(pack({"t": entry("F32", [2**40], 0, 0)}), "span 0 bytes", id="4 TiB in no bytes"),
        pytest.param(b"\x00" * 8 + b"[" * 5000, "the header length is 0", id="no header"),
        pytest.param(
            struct.pack("<Q", 5000) + b'{"t":{"x":' + b"[" * 4990, "recursion limit", id="5000 arrays in one another"
        ),
    ],
)
def test_a_claim_costs_nothing(blob: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(blob)
    work = f"read_all({str(path)!r}, {message!r}); refused(lambda: load({blob!r}), {message!r})"
    assert peak_growth(READ, work) < 8 * MIB


def test_garbage_costs_its_own_size(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", LARGEST_HEADER) + b"{" + b"\xfe" * (LARGEST_HEADER - 1))
    assert peak_growth(READ, f"read_all({str(path)!r}, 'UTF-8')") < 1.3 * LARGEST_HEADER
