"""Contents in memory and open files: load and safe_open accept them; functions that take a path say so."""

from __future__ import annotations

import array
import gzip
import io
import mmap
import os
import socket
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from safetensors_torch import (
    IncrementalWriter,
    SafetensorError,
    edit_metadata,
    load,
    load_file,
    load_model,
    load_sharded,
    safe_open,
    save_file,
    save_model,
    save_sharded,
)
from support import aliases, encode

WEIGHT = torch.arange(24.0).reshape(4, 6)
TENSORS = {"weight": WEIGHT, "steps": torch.arange(5), "empty": torch.zeros(0, 3)}
DATA = encode(TENSORS, {"format": "pt"})


def is_whole(loaded: dict[str, torch.Tensor]) -> bool:
    return loaded.keys() == TENSORS.keys() and all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)


@contextmanager
def of_file(**options: Any) -> Iterator[Any]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(DATA)
        file.flush()
        with open(file.name, "rb", **options) as opened:
            yield opened


@contextmanager
def of_zip(method: int) -> Iterator[Any]:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", method) as archive:
        archive.writestr("model.safetensors", DATA)
        with archive.open("model.safetensors") as member:
            yield member


@contextmanager
def of_gzip() -> Iterator[Any]:
    with gzip.open(io.BytesIO(gzip.compress(DATA))) as file:
        yield file


@contextmanager
def of_socket() -> Iterator[Any]:
    left, right = socket.socketpair()

    def send() -> None:
        with left:
            for start in range(0, len(DATA), 50):
                left.sendall(DATA[start : start + 50])

    thread = threading.Thread(target=send)
    thread.start()
    with right, right.makefile("rb") as file:
        yield file
    thread.join()


def _mapped() -> mmap.mmap:
    memory = mmap.mmap(-1, len(DATA))
    memory[:] = DATA
    return memory


@contextmanager
def given(value: Any) -> Iterator[Any]:
    yield value


class OnlyReadinto:
    """A file that has only ``readinto``, and returns its data in small pieces."""

    def __init__(self) -> None:
        self._file = io.BytesIO(DATA)

    def readinto(self, buffer: memoryview) -> int:
        return self._file.readinto(buffer[:7])


SOURCES: dict[str, Callable[[], Any]] = {
    "bytes": lambda: given(DATA),
    "bytearray": lambda: given(bytearray(DATA)),
    "memoryview": lambda: given(memoryview(DATA)),
    "scattered": lambda: given(_scattered()),
    "array": lambda: given(array.array("B", DATA)),
    "mmap": lambda: given(_mapped()),
    "BytesIO": lambda: given(io.BytesIO(DATA)),
    "file": of_file,
    "unbuffered file": lambda: of_file(buffering=0),
    "stored member": lambda: of_zip(zipfile.ZIP_STORED),
    "deflated member": lambda: of_zip(zipfile.ZIP_DEFLATED),
    "gzip": of_gzip,
    "socket": of_socket,
    "readinto": lambda: given(OnlyReadinto()),
}


def _scattered() -> memoryview:
    wide = bytearray(2 * len(DATA))
    wide[::2] = DATA
    return memoryview(wide)[::2]


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> Iterator[Any]:
    with SOURCES[request.param]() as value:
        yield value


def test_load(source: Any) -> None:
    assert is_whole(load(source))


def test_safe_open(source: Any) -> None:
    with safe_open(source) as file:
        assert file.keys() == ["empty", "steps", "weight"]
        assert file.metadata() == {"format": "pt"}
        assert len(file) == 3
        assert "weight" in file
        assert torch.equal(file.get_tensor("weight"), WEIGHT)
        assert is_whole(file.get_tensors())
        part = file.get_slice("weight")
        assert (part.get_shape(), part.get_dtype()) == ([4, 6], "F32")
        assert torch.equal(part[1:3, ::2], WEIGHT[1:3, ::2])
        assert torch.equal(part[[3, 0], 1:], WEIGHT[[3, 0], 1:])
        with pytest.raises(SafetensorError, match="File does not contain tensor absent"):
            file.get_tensor("absent")
        assert repr(file) == f"<safe_open {type(source).__name__} on cpu, open>"
    with pytest.raises(SafetensorError, match="File is closed"):
        file.keys()
    assert torch.equal(part[-1], WEIGHT[-1]), "a slice goes on working"


def test_a_file_is_read_from_its_position() -> None:
    file = io.BytesIO(b"before" + DATA)
    file.seek(6)
    assert is_whole(load(file))
    assert file.tell() == 6 + len(DATA)
    with pytest.raises(SafetensorError, match="8 bytes"):
        load(file)


def test_tensors_of_a_file_can_share_what_was_read() -> None:
    file = io.BytesIO(DATA)
    loaded = load(file, copy=False)
    assert is_whole(loaded)
    loaded["weight"].zero_()
    assert file.getvalue() == DATA


def test_a_large_stream_of_unknown_length() -> None:
    """The data exceeds the first buffer, and the second."""
    tensors = {"x": torch.arange(700_000)}

    class Stream(io.RawIOBase):
        def __init__(self) -> None:
            self._file = io.BytesIO(encode(tensors))

        def readinto(self, buffer: Any) -> int:
            return self._file.readinto(buffer)

    assert torch.equal(load(Stream())["x"], tensors["x"])


def test_tensors_are_copies() -> None:
    data = bytearray(DATA)
    with safe_open(data) as file:
        first, second, part = file.get_tensor("weight"), file.get_tensor("weight"), file.get_slice("weight")[:]
    assert not aliases(first, second)
    first.zero_()
    part.zero_()
    assert data == DATA
    assert torch.equal(second, WEIGHT)


def test_the_buffer_is_held_while_it_is_used() -> None:
    data = bytearray(DATA)
    file = safe_open(data)
    with pytest.raises(BufferError):
        data.clear()
    part = file.get_slice("weight")
    with file:
        pass
    del file
    with pytest.raises(BufferError):
        data.clear()
    assert torch.equal(part[0], WEIGHT[0])
    del part
    data.clear()
    with pytest.raises(SafetensorError):
        safe_open(data)
    data.append(1)


def test_contents_that_are_not_valid(tmp_path: Path) -> None:
    for data in (b"\0" * 9, memoryview(b"12"), io.BytesIO(b""), io.BytesIO(DATA[:-1])):
        with pytest.raises(SafetensorError):
            safe_open(data)
    for bytes_path in (b"", b"absent", bytes(tmp_path / "absent")):
        with pytest.raises(FileNotFoundError):
            safe_open(bytes_path)
    (tmp_path / "there").write_bytes(DATA)
    assert len(safe_open(bytes(tmp_path / "there"))) == 3


class _Faulty:
    def __init__(self, count: Any) -> None:
        self._count = count

    def readinto(self, buffer: memoryview) -> Any:
        if isinstance(self._count, BaseException):
            raise self._count
        return self._count


@pytest.mark.parametrize(
    "count, error",
    [(None, BlockingIOError), (-1, OSError), (1 << 40, OSError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_errors_of_a_file_are_raised(count: Any, error: type[BaseException]) -> None:
    for function in (load, safe_open):
        with pytest.raises(error):
            function(_Faulty(count))


def test_memory_that_a_file_kept_is_not_freed() -> None:
    kept = []

    class Keeps(io.RawIOBase):
        def readinto(self, buffer: Any) -> int:
            kept.append(memoryview(buffer)[:4])
            return 0

    with pytest.raises((BufferError, SafetensorError)):
        load(Keeps())
    assert bytes(kept[0]) == bytes(len(kept[0]))


WITH_PATHS: dict[str, Callable[[Any], Any]] = {
    "load_file": load_file,
    "load_sharded": load_sharded,
    "load_model": lambda path: load_model(torch.nn.Linear(1, 1), path),
    "save_file": lambda path: save_file(TENSORS, path),
    "save_sharded": lambda path: save_sharded(TENSORS, path),
    "save_model": lambda path: save_model(torch.nn.Linear(1, 1), path),
    "IncrementalWriter": lambda path: IncrementalWriter(path, TENSORS),
    "edit_metadata": lambda path: edit_metadata(path, {}),
}


@pytest.mark.parametrize("function", WITH_PATHS)
@pytest.mark.parametrize("value", [io.BytesIO(DATA), bytearray(DATA), 3, None], ids=lambda value: type(value).__name__)
def test_contents_where_a_path_is_expected(function: str, value: Any) -> None:
    with pytest.raises(TypeError) as caught:
        WITH_PATHS[function](value)
    text = str(caught.value)
    assert type(value).__name__ in text
    assert "load()" in text
    assert "save()" in text


@pytest.mark.parametrize("value", [3, None, [1], io.StringIO("x")], ids=lambda value: type(value).__name__)
def test_neither_contents_nor_a_path(value: Any) -> None:
    with pytest.raises(TypeError, match="readinto.*rb"):
        load(value)
    with pytest.raises(TypeError, match="str, bytes or os.PathLike.*load"):
        safe_open(value)


def test_no_descriptor_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA)
    before = len(os.listdir("/proc/self/fd"))
    with open(tmp_path / "file", "rb") as opened:
        file = safe_open(opened)
    assert len(os.listdir("/proc/self/fd")) == before
    assert is_whole(file.get_tensors())
