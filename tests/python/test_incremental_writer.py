"""IncrementalWriter: the bytes of save_file, tensor by tensor; what it refuses; what remains without a commit."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from proc import ctrl_c_interrupts, peak_growth
from random_state import random_state
from safetensors_torch import IncrementalWriter, SafetensorError, load_file, save, save_file
from support import CODES, DTYPES, encode, entries, mode, sample

MIB = 2**20
ONES = torch.ones(2, 3)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "new.safetensors"


@pytest.fixture
def existing(tmp_path: Path) -> Path:
    path = tmp_path / "old.safetensors"
    path.write_bytes(b"old")
    return path


def write_all(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, **options) -> None:
    with IncrementalWriter(path, tensors, metadata, **options) as writer:
        for name in reversed(list(tensors)):
            writer.write(name, tensors[name])


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "a": ""}])
@pytest.mark.parametrize("durable", [False, True])
def test_the_bytes_of_save_file(metadata: dict | None, durable: bool, tensors: dict, tmp_path: Path) -> None:
    write_all(tmp_path / "streamed", tensors, metadata, durable=durable)
    save_file(tensors, tmp_path / "saved", metadata)
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "saved").read_bytes() == encode(tensors, metadata)
    assert mode(tmp_path / "streamed") == mode(tmp_path / "saved")


def test_any_tensors(target: Path) -> None:
    for seed in range(80):
        state = random_state(seed)
        write_all(target, state.tensors, state.metadata)
        assert target.read_bytes() == save(state.tensors, state.metadata), seed


@pytest.mark.parametrize("code", [code for code in CODES if code in DTYPES])
def test_every_dtype(code: str, target: Path) -> None:
    state = {"a": sample(DTYPES[code], (3, 4)), "b": sample(DTYPES[code], (0, 2))}
    with IncrementalWriter(target, {"a": (DTYPES[code], (3, 4)), "b": (DTYPES[code], [0, 2])}) as writer:
        writer.write("a", state["a"])
        writer.write("b", state["b"])
    assert target.read_bytes() == encode(state)


def test_declarations(target: Path) -> None:
    class Index:
        def __index__(self) -> int:
            return 3

    specs = {
        "pair": (torch.float32, (2, 3)),
        "list": [torch.float32, [2, Index()]],
        "size": (torch.float32, torch.Size([2, 3])),
        "int": (torch.float32, 6),
        "scalar": (torch.float32, ()),
        "tensor": ONES,
        "meta": torch.empty(2, 3, device="meta"),
        "view": torch.ones(3, 2).t(),
        "parameter": torch.nn.Parameter(ONES),
    }
    with FakeTensorMode():
        specs["fake"] = torch.ones(2, 3)
    with IncrementalWriter(target, types.MappingProxyType(specs)) as writer:
        for name in specs:
            writer.write(name, {"int": torch.ones(6), "scalar": torch.ones(())}.get(name, ONES))
    found = load_file(target)
    assert found["int"].shape == (6,) and found["scalar"].shape == ()
    assert all(found[name].equal(ONES) for name in specs if name not in ("int", "scalar"))


@pytest.mark.parametrize(
    "tensors, error, text",
    [
        ([], TypeError, "tensors must map names to dtypes and shapes, not list"),
        ({3: ONES}, TypeError, "the key 3 must be a str"),
        ({"\ud800": ONES}, UnicodeEncodeError, None),
        ({"a": torch.float32}, TypeError, "tensor 'a': declare it as .dtype, shape. or by a tensor"),
        ({"a": (b"F32", (1,))}, TypeError, "tensor 'a': declare it as"),
        ({"a": ("F33", (1,))}, ValueError, "dtype 'F33' is unknown; did you mean 'float32'"),
        ({"a": (torch.float32,)}, TypeError, "tensor 'a': declare it as"),
        ({"a": (torch.float32, "12")}, TypeError, "tensor 'a': a shape consists of ints, not '12'"),
        ({"a": (torch.float32, (1.5,))}, TypeError, "tensor 'a': a shape consists of ints"),
        ({"a": (torch.float32, None)}, TypeError, "tensor 'a': a shape consists of ints"),
        ({"a": (torch.float32, (2, -1))}, ValueError, "tensor 'a': the shape .2, -1. has a negative size"),
        ({"a": (torch.complex128, (2,))}, SafetensorError, "tensor 'a' has dtype complex128"),
        (
            {"__metadata__": ONES},
            SafetensorError,
            'new.safetensors: tensor "__metadata__": the format reserves this name',
        ),
    ],
)
def test_invalid_declarations(tensors: object, error: type, text: str | None, target: Path) -> None:
    with pytest.raises(error, match=text):
        IncrementalWriter(target, tensors)
    assert entries(target.parent) == []


@pytest.mark.parametrize(
    "options, error",
    [({"metadata": []}, TypeError), ({"metadata": {"a": 1}}, TypeError), ({"durable": 1}, TypeError)],
)
def test_other_arguments(options: dict, error: type, target: Path) -> None:
    with pytest.raises(error):
        IncrementalWriter(target, {"a": ONES}, **options)
    with pytest.raises(ValueError, match="null byte"):
        IncrementalWriter("a\0b", {"a": ONES})
    for path, wrong in [
        (target.parent / "absent" / "file", FileNotFoundError),
        (target.parent, IsADirectoryError),
        (Path("/dev/null"), OSError),
    ]:
        with pytest.raises(wrong, match=str(path)):
            IncrementalWriter(path, {"a": ONES})
    assert entries(target.parent) == []


def no_copy(tensor: torch.Tensor) -> torch.Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.ones(tensor.shape)


REFUSED = {
    "unknown": ("absent", lambda tensor: tensor, SafetensorError, 'no tensor "absent" was declared'),
    "dtype": ("a", lambda tensor: tensor.double(), SafetensorError, r"as F32 of shape \[2, 3\], but given as F64"),
    "shape": ("a", lambda tensor: tensor.reshape(3, 2), SafetensorError, r"F32 of shape \[3, 2\]"),
    "strided": ("a", lambda tensor: tensor.t().contiguous().t(), ValueError, "non contiguous tensor: `a`"),
    "sparse": ("a", lambda tensor: tensor.to_sparse(), ValueError, r"sparse tensors: `\['a'\]`"),
    "meta": ("a", lambda tensor: tensor.to("meta"), RuntimeError, "Cannot copy out of meta tensor"),
    "fake": ("a", no_copy, RuntimeError, "Cannot copy out of meta tensor"),
    "no code": ("a", lambda tensor: tensor.to(torch.complex128), SafetensorError, "complex128"),
    "no tensor": ("a", lambda tensor: tensor.tolist(), ValueError, "expected torch.Tensor but received <class 'list'>"),
    "no str": (7, lambda tensor: tensor, TypeError, "the key 7 must be a str"),
    "surrogate": ("\ud800", lambda tensor: tensor, UnicodeEncodeError, None),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_leaves_the_writer_open(what: str, target: Path) -> None:
    name, change, error, text = REFUSED[what]
    with IncrementalWriter(target, {"a": ONES}) as writer:
        with pytest.raises(error, match=text) as caught:
            writer.write(name, change(ONES))
        if error is SafetensorError and what != "no code":
            assert str(caught.value).startswith(f"{target}: ")
        writer.write("a", ONES)
    assert target.read_bytes() == save({"a": ONES})


def test_the_texts_of_save_file(target: Path) -> None:
    """Both refuse the same tensors with the same texts."""
    for what in ("strided", "sparse", "meta", "fake", "no tensor", "no code"):
        _, change, error, _ = REFUSED[what]
        with pytest.raises(error) as theirs:
            save_file({"a": change(ONES)}, target)
        with IncrementalWriter(target, {"a": ONES}) as writer:
            with pytest.raises(error) as ours:
                writer.write("a", change(ONES))
            writer.discard()
        assert str(ours.value) == str(theirs.value)


def test_a_tensor_is_written_once(target: Path) -> None:
    with IncrementalWriter(target, {"a": ONES, "none": torch.zeros(0)}) as writer:
        for name, tensor in (("a", ONES), ("none", torch.zeros(0))):
            writer.write(name, tensor)
            with pytest.raises(SafetensorError, match=f'tensor "{name}" was written already'):
                writer.write(name, tensor)


def test_missing_tensors_discard(existing: Path) -> None:
    with pytest.raises(SafetensorError, match='2 of 3 tensors are missing, or parts of them: "a", "c"; write them'):
        with IncrementalWriter(existing, {"a": ONES, "b": ONES, "c": ONES}) as writer:
            assert writer.missing() == ["a", "b", "c"]
            writer.write("b", ONES)
            assert writer.missing() == ["a", "c"]
    assert repr(writer) == f"<IncrementalWriter {existing!r}, closed>"
    assert existing.read_bytes() == b"old"
    assert entries(existing.parent) == [existing.name]


def test_an_exception_discards(existing: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        with IncrementalWriter(existing, {"a": ONES}) as writer:
            writer.write("a", ONES)
            raise ZeroDivisionError
    assert existing.read_bytes() == b"old"
    assert entries(existing.parent) == [existing.name]


def test_without_a_with(existing: Path) -> None:
    writer = IncrementalWriter(existing, {"a": ONES})
    assert repr(writer) == f"<IncrementalWriter {existing!r}, open>"
    with pytest.raises(SafetensorError, match="1 of 1 tensors are missing"):
        writer.commit()
    writer.write("a", ONES)
    assert existing.read_bytes() == b"old"
    writer.commit()
    assert existing.read_bytes() == save({"a": ONES})
    for method in (writer.commit, writer.missing, lambda: writer.write("a", ONES), writer.__enter__):
        with pytest.raises(SafetensorError, match="File is closed"):
            method()
    writer.discard()


def test_a_writer_that_is_dropped_discards(existing: Path) -> None:
    writer = IncrementalWriter(existing, {"a": ONES})
    writer.write("a", ONES)
    del writer
    gc.collect()
    assert existing.read_bytes() == b"old"
    assert entries(existing.parent) == [existing.name]


def test_committed_or_discarded_inside_of_the_with(target: Path) -> None:
    with IncrementalWriter(target, {"a": ONES}) as writer:
        writer.discard()
    assert not target.exists()
    with IncrementalWriter(target, {"a": ONES}) as writer:
        writer.write("a", ONES)
        writer.commit()
        assert target.exists()
    assert entries(target.parent) == [target.name]


def test_tensors_may_be_mapped_from_the_file_that_is_replaced(target: Path, tensors: dict) -> None:
    save_file(tensors, target)
    write_all(target, load_file(target), {"second": "yes"})
    assert target.read_bytes() == encode(tensors, {"second": "yes"})


@pytest.mark.parametrize("view", [torch.conj, torch._neg_view], ids=["conjugate", "negative"])
def test_lazy_views_are_written_with_their_values(view: object, target: Path) -> None:
    tensor = view(torch.complex(torch.arange(4.0), torch.ones(4)))
    write_all(target, {"a": tensor})
    assert load_file(target)["a"].equal(tensor.resolve_conj().resolve_neg())


def test_under_a_mode_of_torchs(target: Path) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        write_all(target, {"a": ONES})
    assert target.read_bytes() == save({"a": ONES})


def test_threads_write_at_once(target: Path) -> None:
    state = {f"t{i}": torch.full((MIB,), float(i)) for i in range(16)}
    failures: list[BaseException] = []

    def work(writer: IncrementalWriter, numbers: range) -> None:
        try:
            for i in numbers:
                writer.write(f"t{i}", state[f"t{i}"])
        except BaseException as error:
            failures.append(error)

    with IncrementalWriter(target, state) as writer:
        threads = [threading.Thread(target=work, args=(writer, range(i, 16, 4))) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == [] and writer.missing() == []
    assert all(tensor.equal(state[name]) for name, tensor in load_file(target).items())


def test_memory_is_that_of_one_tensor(target: Path) -> None:
    work = f"""
shape = (10 * 2**18,)
specs = {{f"t{{i}}": (torch.float32, shape) for i in range(32)}}
with safetensors_torch.IncrementalWriter({str(target)!r}, specs) as writer:
    for i in range(32):
        writer.write(f"t{{i}}", torch.full(shape, float(i)))
"""
    # All tensors together have 320 MiB. On a busy machine, memory of several tensors is freed a little late.
    assert 10 * MIB <= peak_growth("", work) < 100 * MIB
    assert target.stat().st_size > 320 * MIB


def test_an_interrupted_write_can_be_repeated(target: Path) -> None:
    tensor = torch.ones(128 * MIB)
    done = threading.Event()

    def interrupt() -> None:
        while not done.wait(0.02):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with IncrementalWriter(target, {"a": tensor}) as writer:
        with ctrl_c_interrupts():
            with pytest.raises(KeyboardInterrupt):
                try:
                    thread.start()
                    writer.write("a", tensor)
                finally:
                    done.set()
                    thread.join()
        assert writer.missing() == ["a"]
        writer.write("a", tensor)
        assert not target.exists()
    assert target.stat().st_size > tensor.nbytes


@pytest.fixture
def limited() -> Iterator[None]:
    """A limit on file sizes fails the write, although the space was reserved."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def test_a_write_that_fails(existing: Path, limited: None) -> None:
    tensor = torch.ones(MIB)
    with pytest.raises(OSError, match=f"cannot write {existing}: File too large"):
        with IncrementalWriter(existing, {"a": tensor, "b": tensor}) as writer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, resource.RLIM_INFINITY))
            writer.write("b", tensor)
    assert existing.read_bytes() == b"old"
    assert entries(existing.parent) == [existing.name]


KILLED = """
import sys, torch, safetensors_torch
spec = (torch.float32, (1000,))
with safetensors_torch.IncrementalWriter(sys.argv[1], {"a": spec, "b": spec}) as writer:
    writer.write("b", torch.ones(1000))
    print("begun", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("replaced", [False, True])
def test_a_killed_process_leaves_the_old_file(replaced: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    if replaced:
        path.write_bytes(b"old")
    before = entries(tmp_path)
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"begun\n"
        process.kill()
    unnamed = True
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_WRONLY))
    except OSError:
        unnamed = False  # the hidden file remains there, as docs/saving.md says
    left = [name for name in entries(tmp_path) if unnamed or not name.startswith(".safetensors-")]
    assert left == before
    assert not replaced or path.read_bytes() == b"old"
