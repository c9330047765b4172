"""dtype, names and progress of the functions that have them, on the CPU; and what transfers to devices may use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import safetensors_torch
from fresh import run_python
from proc import ctrl_c_interrupts
from random_state import difference
from safetensors_torch import SafetensorError, load, load_file, load_model, save, save_file, save_model
from support import entries, entry, pack

MIB = 1 << 20


def from_bytes(path: Path, **options: object) -> dict[str, torch.Tensor]:
    return load(path.read_bytes(), **options)


READERS: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "mmap": lambda path, **options: load_file(path, **options),
    "pread": lambda path, **options: load_file(path, backend="pread", **options),
    "bytes": from_bytes,
    "prefault": lambda path, **options: load_file(path, prefault=True, **options),
}
every_reader = pytest.mark.parametrize("read", READERS.values(), ids=READERS)


@every_reader
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32, torch.float8_e5m2])
def test_conversion(read: Callable, path: Path, tensors: dict, dtype: torch.dtype) -> None:
    expected = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    loaded = read(path, dtype=dtype)
    assert list(loaded) == list(load_file(path))
    assert difference(loaded, expected) is None
    for tensor in loaded.values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes and not tensor.requires_grad


@every_reader
def test_conversion_of_large_tensors(read: Callable, write: Callable[..., Path]) -> None:
    state = {"a": torch.randn(3 * MIB + 1), "b": torch.randn(777).half(), "c": torch.arange(3 * MIB)}
    expected = {"a": state["a"].bfloat16(), "b": state["b"].bfloat16(), "c": state["c"]}
    assert difference(read(write(state), dtype=torch.bfloat16), expected) is None


@every_reader
def test_conversion_of_data_that_is_not_aligned(read: Callable, write: Callable[..., Path]) -> None:
    values = torch.randn(1001)
    header = {"b": entry("U8", [3], 0, 3), "x": entry("F32", [1001], 3, 4007)}
    path = write(pack(header, b"abc" + values.numpy().tobytes()))
    assert torch.equal(read(path, dtype=torch.float64)["x"], values.double())


@every_reader
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_dtypes_that_are_not_floating_point(read: Callable, path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=f"dtype must be a floating-point one, not {dtype}"):
        read(path, dtype=dtype)


@every_reader
@pytest.mark.parametrize("dtype", [b"float16", 1, float])
def test_values_that_are_not_dtypes(read: Callable, path: Path, dtype: object) -> None:
    with pytest.raises(TypeError, match="dtype must be a torch.dtype or None"):
        read(path, dtype=dtype)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no such dtype")
@every_reader
def test_a_conversion_that_torch_lacks(read: Callable, write: Callable[..., Path]) -> None:
    path = write(pack({"four": entry("F4", [4], 0, 2)}, b"ab"))
    with pytest.raises(SafetensorError, match="tensor 'four' of float4_e2m1fn_x2 cannot be converted to float32"):
        read(path, dtype=torch.float32)
    assert read(path)["four"].shape == (2,)


@every_reader
def test_names(read: Callable, path: Path, tensors: dict) -> None:
    for names in (["mask", "weight"], ("weight", "mask", "weight"), {"mask", "weight"}, iter(["mask", "weight"])):
        loaded = read(path, names=names)
        assert list(loaded) == ["weight", "mask"], "in file order, each once"
        assert difference(loaded, {name: tensors[name] for name in ("mask", "weight")}) is None
    assert set(read(path, names=lambda name: "s" in name)) == {name for name in tensors if "s" in name}
    assert read(path, names=[]) == {}
    assert set(read(path, names=["bias", "steps"], dtype=torch.float16)) == {"bias", "steps"}


@every_reader
def test_names_that_do_not_exist(read: Callable, path: Path) -> None:
    with pytest.raises(SafetensorError, match="File does not contain tensor absent"):
        read(path, names=["bias", "absent"])
    for names in ("bias", b"bias"):
        with pytest.raises(TypeError, match="names must be a list of names"):
            read(path, names=names)
    with pytest.raises(TypeError, match="must be a str"):
        read(path, names=["bias", 3])
    with pytest.raises(UnicodeEncodeError):
        read(path, names=["\ud800"])
    with pytest.raises(ZeroDivisionError):
        read(path, names=lambda name: 1 // 0)


def test_only_named_tensors_are_read(write: Callable[..., Path]) -> None:
    from support import bytes_read

    path = write({f"{i}": torch.zeros(MIB // 4) for i in range(8)})
    before = bytes_read()
    load_file(path, backend="pread", names=["3"])
    assert bytes_read() - before < MIB + 65536


def test_sharing_memory_refuses_dtype_and_names(path: Path) -> None:
    for options in ({"dtype": torch.float16}, {"names": ["bias"]}):
        with pytest.raises(ValueError, match="copy=False returns all tensors of the buffer as they are"):
            load(bytearray(path.read_bytes()), copy=False, **options)


@every_reader
def test_progress_of_a_load(read: Callable, path: Path, tensors: dict) -> None:
    told: list[tuple[int, int]] = []
    assert difference(read(path, progress=lambda done, total: told.append((done, total))), tensors) is None
    done, total = told[-1]
    assert done == total and told == sorted(told)


def test_progress_of_a_save_and_of_models(tmp_path: Path, tensors: dict) -> None:
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    save_file(tensors, tmp_path / "a", progress=tell)
    size = (tmp_path / "a").stat().st_size
    assert told[-1] == (size, size)
    assert save(tensors, progress=tell) == (tmp_path / "a").read_bytes() and told[-1] == (size, size)
    model = nn.Linear(300, 300)
    save_model(model, tmp_path / "b", progress=tell)
    assert told[-1] == ((tmp_path / "b").stat().st_size,) * 2
    load_model(model, tmp_path / "b", progress=tell)
    assert told[-1] == (4 * 300 * 301,) * 2


def test_progress_that_raises_leaves_no_file(tmp_path: Path) -> None:
    state = {f"{i}": torch.ones(16 * MIB) for i in range(8)}  # half a GiB, more than can be written in a step

    def tell(done: int, total: int) -> None:
        assert done < total
        raise KeyError

    (tmp_path / "a").write_bytes(b"old")
    for durable in (False, True):
        with pytest.raises((KeyError, AssertionError)):
            save_file(state, tmp_path / "a", durable=durable, progress=tell)
    assert entries(tmp_path) == ["a"]


@pytest.mark.parametrize("progress", [0, "yes", []], ids=repr)
def test_values_that_are_not_progress(progress: object, path: Path, tensors: dict) -> None:
    for attempt in (
        lambda: load_file(path, progress=progress),
        lambda: load(path.read_bytes(), progress=progress),
        lambda: save(tensors, progress=progress),
        lambda: save_file(tensors, path, progress=progress),
    ):
        with pytest.raises(TypeError, match="progress must be a bool or a function"):
            attempt()


def test_a_bar(path: Path, tensors: dict, capfd: pytest.CaptureFixture) -> None:
    pytest.importorskip("tqdm")
    assert difference(load_file(path, backend="pread", progress=True), tensors) is None
    assert "load: 100%" in capfd.readouterr().err
    save(tensors, progress=True)
    assert "save: 100%" in capfd.readouterr().err
    load_file(path, progress=False)
    assert capfd.readouterr().err == ""
    capfd.readouterr()
    load_file(path, progress=True)
    assert capfd.readouterr().err == "", "a mapped load has nothing to show"


def test_a_bar_without_tqdm(path: Path, tensors: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="pip install tqdm"):
        load_file(path, progress=True)
    with pytest.raises(ImportError, match="pip install tqdm"):
        save_file(tensors, tmp_path / "a", progress=True)
    assert not (tmp_path / "a").exists()


def test_an_interrupt_ends_a_long_save(tmp_path: Path) -> None:
    state = {f"{i}": torch.ones(16 * MIB) for i in range(8)}
    (tmp_path / "a").write_bytes(b"old")
    done = threading.Event()

    def interrupt() -> None:
        while not done.wait(0.02):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with ctrl_c_interrupts():
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            try:
                while True:
                    save_file(state, tmp_path / "a")
                    (tmp_path / "a").write_bytes(b"old")
            finally:
                done.set()
                # One more signal may come until it has ended.
                thread.join()
    assert entries(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() in (b"old", b"", save(state))


def test_transfer_options() -> None:
    before = safetensors_torch.transfer_options()
    try:
        safetensors_torch.set_transfer_options(pinned_pool_bytes=8 * MIB)
        assert safetensors_torch.transfer_options() == (8 * MIB, before.threads, before.direct)
        safetensors_torch.set_transfer_options(threads=3)
        assert safetensors_torch.transfer_options() == safetensors_torch.TransferOptions(8 * MIB, 3, before.direct)
        for options in ({"pinned_pool_bytes": -1}, {"threads": -(10**30)}):
            with pytest.raises(ValueError, match="must not be negative"):
                safetensors_torch.set_transfer_options(**options)
        for options in ({"pinned_pool_bytes": 1.5}, {"threads": "3"}, {"threads": True}):
            with pytest.raises(TypeError, match="must be an int"):
                safetensors_torch.set_transfer_options(**options)
        safetensors_torch.set_transfer_options(pinned_pool_bytes=10**30)
        assert safetensors_torch.transfer_options().threads == 3
        for direct in (False, True, "auto"):
            safetensors_torch.set_transfer_options(direct=direct)
            assert safetensors_torch.transfer_options().direct is direct
        for wrong in (0, 1, "yes", 2.0):
            with pytest.raises(TypeError, match='direct must be True, False or "auto", not '):
                safetensors_torch.set_transfer_options(direct=wrong)
    finally:
        safetensors_torch.set_transfer_options(**before._asdict())


def test_transfer_options_of_the_environment() -> None:
    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        program = "import safetensors_torch as s; print(*s.transfer_options())"
        return run_python(program, **{f"SAFETENSORS_TORCH_{name}": value for name, value in variables.items()})

    assert run().stdout.split() == [str(64 * MIB), "0", "auto"]
    assert run(PINNED_POOL_BYTES="1048576", THREADS="5", DIRECT="0").stdout.split() == ["1048576", "5", "False"]
    for name, value in (("PINNED_POOL_BYTES", "64MB"), ("THREADS", "-1")):
        said = run(**{name: value}).stderr
        assert (
            f'SafetensorError: environment variable SAFETENSORS_TORCH_{name}: "{value}" is not a number; set it' in said
        ), said
    said = run(DIRECT="yes").stderr
    assert 'environment variable SAFETENSORS_TORCH_DIRECT: unknown value "yes"; set it to auto, 0 or 1' in said


def test_without_an_accelerator_there_is_no_transfer_memory() -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    assert safetensors_torch.reserve_transfer_memory(8 * MIB) == 0
    assert safetensors_torch.transfer_memory() == safetensors_torch.release_transfer_memory() == 0
    with pytest.raises(TypeError, match="nbytes must be an int"):
        safetensors_torch.reserve_transfer_memory(1.5)


def test_fake_tensors_match_the_real_ones(path: Path, tensors: dict) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    for options in ({}, {"dtype": torch.float16}, {"names": ["bias", "steps"], "dtype": torch.bfloat16}):
        real = load_file(path, **options)
        with FakeTensorMode():
            fake = load_file(path, **options)
            assert list(fake) == list(real) and all(isinstance(tensor, FakeTensor) for tensor in fake.values())
            with pytest.raises(SafetensorError, match="does not contain tensor absent"):
                load_file(path, names=["absent"])
        for name, tensor in real.items():
            assert (fake[name].dtype, fake[name].shape) == (tensor.dtype, tensor.shape)


def test_the_operators_select_and_convert_too(path: Path, tensors: dict) -> None:
    ops = torch.ops.safetensors_torch
    expected = {"bias": tensors["bias"].half(), "steps": tensors["steps"]}
    options = {"dtype": torch.float16, "names": ["steps", "bias"]}
    assert difference(ops.load_file(str(path), **options), expected) is None
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    assert difference(ops.load(data, **options), expected) is None
    torch.library.opcheck(ops.load_file.default, (str(path),), options, test_utils=["test_schema", "test_faketensor"])
