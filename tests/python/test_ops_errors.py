"""Errors of torch.ops.safetensors_torch: what they say, what `_last_error` keeps of them, and no C++ backtrace."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import safetensors.torch as reference
import torch

from malformed_files import entry, one
from safetensors_torch import _errors

ops = torch.ops.safetensors_torch
CPU = torch.device("cpu")
ONES = torch.ones(2, 2)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a valid file, `good`, and a malformed one, `bad`."""
    reference.save_file({"weight": torch.arange(12.0).reshape(3, 4)}, tmp_path / "good")
    (tmp_path / "bad").write_bytes(one(entry('"F128"')))
    return tmp_path


def raw(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


# A call, and the kind, number, errno and part of the message of its error. The number is 0 if the error is found before
# the core is called.
FAILURES = {
    "no-file": (lambda f: ops.load_file(f"{f}/absent"), "OSError", 2, errno.ENOENT, "No such file or directory: "),
    "directory": (lambda f: ops.load_file(f"{f}"), "OSError", 2, errno.EISDIR, "directory"),
    "no-directory": (lambda f: ops.save_file({"a": ONES}, f"{f}/absent/out"), "OSError", 2, errno.ENOENT, "absent"),
    "malformed-file": (lambda f: ops.load_file(f"{f}/bad"), "SafetensorError", 10, 0, "F128"),
    "malformed-bytes": (lambda f: ops.load(raw(b"123")), "SafetensorError", 3, 0, "8 bytes"),
    "no-tensor": (
        lambda f: ops.get_tensor(f"{f}/good", "wait"),
        "SafetensorError",
        15,
        0,
        "File does not contain tensor wait",
    ),
    "sparse": (lambda f: ops.save({"a": ONES.to_sparse()}), "ValueError", 0, 0, "sparse tensors: `['a']`"),
    "shared": (lambda f: ops.save({"a": ONES, "b": ONES}), "RuntimeError", 0, 0, "save_model"),
    "strided": (lambda f: ops.save({"a": torch.ones(2, 3).t()}), "ValueError", 0, 0, ".contiguous()"),
    "meta": (lambda f: ops.save({"a": ONES.to("meta")}), "RuntimeError", 0, 0, "Cannot copy out of meta tensor"),
    "no-code": (lambda f: ops.save({"a": ONES.to(torch.complex128)}), "SafetensorError", 17, 0, "complex128"),
    "reserved": (lambda f: ops.save_file({"__metadata__": ONES}, f"{f}/out"), "SafetensorError", 16, 0, "__metadata__"),
}


@pytest.mark.parametrize("what", FAILURES)
def test_last_error(what: str, directory: Path) -> None:
    call, kind, code, os_error, text = FAILURES[what]
    with pytest.raises(RuntimeError) as refusal:
        call(directory)
    message = str(refusal.value)
    assert ops._last_error() == (kind, code, os_error, message)
    assert text in message
    if kind == "OSError" or what == "malformed-file":
        assert str(directory) in message
    expect_clean(message)
    assert sorted(path.name for path in directory.iterdir()) == ["bad", "good"]


def expect_clean(message: str) -> None:
    for leak in ("frame #", "Exception raised from", "terminate called", ".cpp", ".rs"):
        assert leak not in message


def test_last_error_belongs_to_its_thread(directory: Path) -> None:
    with pytest.raises(RuntimeError):
        ops.get_tensor(f"{directory}/good", "mine")
    seen = []

    def fail_elsewhere() -> None:
        with pytest.raises(RuntimeError):
            ops.get_tensor(f"{directory}/good", "theirs")
        seen.append(ops._last_error()[3])

    thread = threading.Thread(target=fail_elsewhere)
    thread.start()
    thread.join()
    assert "theirs" in seen[0]
    assert "mine" in ops._last_error()[3]


def test_an_older_error_that_is_not_utf8_does_not_hide_others() -> None:
    with pytest.raises(UnicodeDecodeError):
        ops.save({b"\xff": torch.ones(2, 3).t()})

    def fail() -> None:
        raise RuntimeError("of somebody else")

    with pytest.raises(RuntimeError, match="of somebody else"):
        _errors.call(fail)


def test_methods_of_a_file_keep_their_error_too(directory: Path) -> None:
    file = torch.classes.safetensors_torch.File(f"{directory}/good", "pread")
    with pytest.raises(RuntimeError, match="File does not contain tensor wait") as refusal:
        file.get_tensor("wait", CPU)
    assert ops._last_error() == ("SafetensorError", 15, 0, str(refusal.value))
    with pytest.raises(RuntimeError, match="No such file or directory"):
        torch.classes.safetensors_torch.File(f"{directory}/absent", "mmap")
    assert ops._last_error()[:3] == ("OSError", 2, errno.ENOENT)


def test_an_unknown_backend_lists_both(directory: Path) -> None:
    good = f"{directory}/good"
    for call in (lambda: ops.load_file(good, backend="io"), lambda: torch.classes.safetensors_torch.File(good, "io")):
        with pytest.raises(RuntimeError, match="(?s)mmap.*pread") as refusal:
            call()
        expect_clean(str(refusal.value))


def test_get_slice_checks_its_bounds(directory: Path) -> None:
    file = torch.classes.safetensors_torch.File(f"{directory}/good", "pread")
    for starts, stops, steps in (
        ([0], [3], [1]),
        ([0, 0, 0], [3, 4, 1], [1, 1, 1]),
        ([0, 0], [4, 4], [1, 1]),
        ([-1, 0], [3, 4], [1, 1]),
        ([2, 0], [1, 4], [1, 1]),
        ([0, 0], [3, 4], [0, 1]),
        ([0, 0], [3, 4], [-1, 1]),
        ([0, 0], [2**62, 4], [2**62, 1]),
        ([0, 0], [3, 4], [1]),
    ):
        with pytest.raises(RuntimeError) as refusal:
            file.get_slice("weight", starts, stops, steps, CPU)
        expect_clean(str(refusal.value))
