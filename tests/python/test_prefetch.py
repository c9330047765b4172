"""safe_open.prefetch and PrefetchLoader: each tensor once it has landed, on the CPU; and get_tensor_meta."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import safetensors_torch
from fresh import run_python
from proc import eventually, peak_growth
from random_state import difference
from safetensors_torch import PrefetchLoader, SafetensorError, safe_open, save_file, save_sharded
from support import DTYPES, entry, pack, sample

MIB = 1 << 20


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file that is worth threads, with tensors of many sizes."""
    sizes = [3 * MIB, 5, 0, 100_000, 2 * MIB, *[1000] * 50, 2 * MIB + 1]
    state = {f"t{i:02}": torch.arange(i, i + size, dtype=torch.int32) for i, size in enumerate(sizes)}
    path = tmp_path / "large.safetensors"
    save_file(state, path)
    return path, state


def test_every_dtype(tmp_path: Path, backend: str) -> None:
    state = {name: sample(dtype) for name, dtype in DTYPES.items()}
    save_file(state, tmp_path / "model")
    with safe_open(tmp_path / "model", backend=backend) as file, file.prefetch() as loader:
        assert difference(dict(loader), state) is None


@pytest.mark.parametrize("threads", [1, 2, 10**30])
@pytest.mark.parametrize("buffer_bytes", [None, 1, "100KB", 30 * MIB])
def test_tensors_own_their_memory(large: tuple, backend: str, threads: int, buffer_bytes: Any) -> None:
    path, state = large
    with safe_open(path, backend=backend) as file:
        loader = file.prefetch(threads=threads, buffer_bytes=buffer_bytes)
        assert loader.names() == file.offset_keys() and len(loader) == len(state)
        found = dict(loader)
        assert difference(found, state) is None
        for name, tensor in found.items():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes and not tensor.requires_grad
            tensor.fill_(7)
            assert torch.equal(file.get_tensor(name), state[name]), "the mapping is not written to"
        assert dict(loader) == {}, "a second pass finds nothing"


def test_take(large: tuple, backend: str) -> None:
    path, state = large
    with safe_open(path, backend=backend) as file, file.prefetch(buffer_bytes=1) as loader:
        for name in ("t55", "t02", "t00"):
            assert torch.equal(loader.take(name), state[name])
            with pytest.raises(SafetensorError, match=f"tensor '{name}': already delivered"):
                loader.take(name)
        rest = dict(loader)
        assert difference(rest, {name: state[name] for name in state if name not in ("t55", "t02", "t00")}) is None
        with pytest.raises(SafetensorError, match="'t01': already delivered"):
            loader.take("t01")
        for name in ("nope", "\ud800"):
            with pytest.raises(SafetensorError, match="is not in the prefetch plan"):
                loader.take(name)
        with pytest.raises(TypeError, match="must be a str, not int"):
            loader.take(0)  # type: ignore[arg-type]


def test_a_closed_loader(large: tuple) -> None:
    path, state = large
    with safe_open(path) as file:
        loader = file.prefetch()
    first = loader.take("t00")
    loader.close()
    loader.close()
    assert torch.equal(first, state["t00"]) and len(loader.names()) == len(state)
    for use in (lambda: loader.take("t00"), lambda: loader.take("t01"), lambda: next(iter(loader))):
        with pytest.raises(SafetensorError, match="PrefetchLoader is closed"):
            use()


INDICES = [
    slice(1, 3),
    slice(None),
    slice(-4, None),
    slice(2, 2),
    (slice(None, None, 2),),
    (slice(0, 100),),
    (slice(None), slice(1, 5, 3)),
    (1,),
    (1, 2),
    (..., slice(2, 4)),
    (None, ..., 0),
    (-1, slice(1, None)),
    ([0, 2], slice(1, 3)),
    (),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_parts(index: Any, path: Path, tensors: dict, backend: str) -> None:
    expected = tensors["weight"][index]
    with safe_open(path, backend=backend) as file:
        assert torch.equal(file.prefetch({"weight": index}).take("weight"), expected)
        loader = file.prefetch({"weight": index, "bias": None, "half": (slice(0, 1),)})
        assert loader.names() == [name for name in file.offset_keys() if name in ("weight", "bias", "half")]
        found = dict(loader)
    assert difference(found, {"weight": expected, "bias": tensors["bias"], "half": tensors["half"][:1]}) is None
    if not isinstance(index, tuple) or not any(isinstance(item, list) for item in index):
        assert found["weight"].untyped_storage().nbytes() <= max(expected.nbytes, 1)


@pytest.mark.parametrize(
    ("plan", "kind", "text"),
    [
        ({"nope": None}, SafetensorError, "does not contain tensor nope"),
        ({"bias": None, "\ud800": None}, SafetensorError, "does not contain tensor"),
        ({1: None}, TypeError, "must be a str, not int"),
        ({"weight": slice(0, 3, 2)}, SafetensorError, r"must have step 1, not 2; for other steps pass a tuple"),
        ({"weight": slice(0, 3, -1)}, SafetensorError, "must have step 1, not -1"),
        ({"weight": slice(0, 3, 0)}, SafetensorError, "invalid prefetch plan slice of 'weight': its step is 0"),
        ({"weight": slice(0, 5)}, SafetensorError, "5 is out of range for 4 rows"),
        ({"weight": slice(-5, 4)}, SafetensorError, "-5 is out of range for 4 rows"),
        ({"weight": slice(0.5, 4)}, SafetensorError, "its bounds must be ints or None"),
        ({"scalar": slice(0, 1)}, SafetensorError, "the tensor is 0-d"),
        ({"weight": 3}, TypeError, "must be None or a slice of its rows, or an index as a tuple, not int"),
        ({"weight": (4,)}, IndexError, "out of bounds for dimension 0 with size 4"),
        ({"weight": (0, 0, 0)}, IndexError, "too many indices"),
        ({"weight": ([[0]],)}, TypeError, "index of an unknown kind"),
        ({}, SafetensorError, "selects no tensors"),
        (["weight"], TypeError, "plan must be a dict of names to None, slices or tuples, not list"),
    ],
)
def test_refused_plans(plan: Any, kind: type, text: str, path: Path) -> None:
    with safe_open(path) as file, pytest.raises(kind, match=text):
        file.prefetch(plan)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"threads": 0}, ValueError, "threads must be 1 or more, not 0"),
        ({"threads": 1.5}, TypeError, "threads must be an int"),
        ({"buffer_bytes": 0}, ValueError, "out of range"),
        ({"buffer_bytes": "much"}, ValueError, "is not a size"),
        ({"buffer_bytes": 1.5}, TypeError, "a size is a number of bytes"),
        ({"device": "nope"}, RuntimeError, "nope"),
        ({"device": -1}, ValueError, "not negative"),
    ],
)
def test_refused_options(options: dict, kind: type, text: str, path: Path) -> None:
    with safe_open(path) as file, pytest.raises(kind, match=text):
        file.prefetch(**options)


def test_a_closed_file(path: Path) -> None:
    file = safe_open(path)
    file.close()
    with pytest.raises(SafetensorError, match="File is closed"):
        file.prefetch()
    with pytest.raises(SafetensorError, match="File is closed"):
        file.get_tensor_meta("weight")


def test_a_dtype_that_torch_lacks(write: Callable[..., Path]) -> None:
    path = write(pack({"ok": entry("U8", [1], 0, 1), "x": entry("F6_E2M3", [4], 1, 4)}, bytes(4)))
    with safe_open(path) as file:
        with pytest.raises(SafetensorError, match=r"given.safetensors'?: .*'x'.*F6_E2M3"):
            file.prefetch()
        assert file.prefetch({"ok": None}).take("ok").tolist() == [0]


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="torch 2.8")
def test_rows_of_a_packed_dtype(write: Callable[..., Path]) -> None:
    data = bytes(range(16))
    path = write(pack({"x": entry("F4", [4, 8], 0, 16)}, data))
    with safe_open(path) as file:
        rows = file.prefetch({"x": slice(1, 3)}).take("x")
        assert rows.shape == (2, 4) and bytes(rows.view(torch.uint8).flatten().tolist()) == data[4:12]
        part = file.prefetch({"x": (slice(None), slice(1, 3))}).take("x")
        assert part.view(torch.uint8).tolist() == [[1, 2], [5, 6], [9, 10], [13, 14]]


def test_the_meta_device(path: Path, tensors: dict) -> None:
    with safe_open(path, device="meta") as file, file.prefetch({"weight": slice(1, 3), "half": None}) as loader:
        taken = loader.take("half")
        assert taken.is_meta and taken.shape == (3, 5)
        (name, tensor), *rest = loader
        assert (name, tensor.device.type, tensor.shape, rest) == ("weight", "meta", (2, 6), [])
        with pytest.raises(SafetensorError, match="already delivered"):
            loader.take("weight")
    with safe_open(path) as file:
        assert {t.device.type for _, t in file.prefetch(device="meta")} == {"meta"}


def test_contents_stay_alive(path: Path, tensors: dict) -> None:
    contents = bytearray(path.read_bytes())
    with safe_open(contents) as file:
        loader = file.prefetch()
    with pytest.raises(BufferError):
        contents.clear()
    assert difference(dict(loader), tensors) is None
    del loader
    gc.collect()
    contents.clear()


def test_reading_ends_before_contents_are_released() -> None:
    class Native:
        def __init__(self, view: memoryview) -> None:
            self.view = view

        def names(self) -> list[str]:
            return []

        def close(self) -> None:
            ended.append(self.view.nbytes)  # fails for a view that is released

    ended: list[int] = []
    view = memoryview(b"contents")
    cycle = [view, PrefetchLoader(Native(view), "contents", {}, view)]
    cycle.append(cycle)  # the garbage collector frees it, in any order
    del cycle, view
    gc.collect()
    assert ended == [8]


def test_a_checkpoint_of_several_files(tmp_path: Path, backend: str) -> None:
    state = {f"t{i}": torch.full((MIB // 4,), float(i)) for i in range(9)}
    save_sharded(state, tmp_path, max_shard_size="2MiB")
    with safe_open(tmp_path, backend=backend) as file:
        assert len(list(tmp_path.iterdir())) == 6
        loader = file.prefetch({**dict.fromkeys(state), "t7": slice(5, 10)}, buffer_bytes=MIB)
        assert torch.equal(loader.take("t5"), state["t5"])
        rest = dict(loader)
    expected = {name: t for name, t in state.items() if name != "t5"}
    assert difference(rest, {**expected, "t7": state["t7"][5:10]}) is None


def test_changes_to_the_mapping_are_seen(large: tuple) -> None:
    path, state = large
    with safe_open(path) as file:
        file.get_tensor("t00").fill_(3)
        assert bool((file.prefetch().take("t00") == 3).all())
    with safe_open(path) as file:
        assert torch.equal(file.prefetch().take("t00"), state["t00"])


def test_threads_may_share_a_loader(large: tuple) -> None:
    path, state = large
    for buffer_bytes in (1, None):
        with safe_open(path) as file:
            loader = file.prefetch(buffer_bytes=buffer_bytes)
        found: list[tuple[str, torch.Tensor]] = []
        threads = [threading.Thread(target=found.extend, args=(loader,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == len(state) and difference(dict(found), state) is None


def test_a_loader_that_is_closed_while_threads_wait(large: tuple) -> None:
    path, _ = large
    errors: list[str] = []

    def use(loader: PrefetchLoader) -> None:
        try:
            list(loader)
        except SafetensorError as error:
            errors.append(str(error))

    for _ in range(20):
        with safe_open(path) as file:
            loader = file.prefetch(buffer_bytes=1)
        threads = [threading.Thread(target=use, args=(loader,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        loader.close()
        for thread in threads:
            thread.join()
    assert errors and all("PrefetchLoader is closed" in error for error in errors)


def reader_threads() -> int:
    tasks = os.listdir("/proc/self/task")
    return sum(Path(f"/proc/self/task/{task}/comm").read_text() == "safetensors\n" for task in tasks)


@pytest.mark.parametrize("end", ["drop", "close", "break"])
def test_a_loader_that_ends_early_leaves_no_thread(large: tuple, end: str) -> None:
    path, _ = large
    with safe_open(path) as file:
        loader = file.prefetch(buffer_bytes=1)
    assert eventually(lambda: reader_threads() > 0)
    if end == "close":
        loader.close()
    elif end == "break":
        for _ in loader:
            break
    loader = None
    assert eventually(lambda: reader_threads() == 0)


def test_a_file_that_is_truncated(large: tuple, backend: str) -> None:
    path, _ = large
    with safe_open(path, backend=backend) as file:
        begin = file.get_tensor_meta("t00").data_offsets[0]
        os.truncate(path, begin + 2 * MIB)
        loader = file.prefetch()
    with pytest.raises(SafetensorError, match=r"large.safetensors.*became shorter.*for tensor \"t\d\d\""):
        dict(loader)
    with pytest.raises(SafetensorError, match="closed"):
        loader.take("t00")
    assert eventually(lambda: reader_threads() == 0)


def test_pickles_and_copies_are_refused(path: Path) -> None:
    with safe_open(path) as file:
        loader = file.prefetch()
    assert repr(loader) == f"<PrefetchLoader of 7 tensors in '{path}'>"
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot pickle or copy <PrefetchLoader"):
            attempt(loader)


def test_a_forked_child_cannot_use_it() -> None:
    program = """
    import os, pathlib, tempfile, torch
    from safetensors_torch import SafetensorError, safe_open, save_file

    path = pathlib.Path(tempfile.mkdtemp()) / "model"
    state = {f"t{i}": torch.full((1 << 20,), float(i)) for i in range(8)}
    save_file(state, path)
    file = safe_open(path)
    for buffer_bytes in (1, None):
        loader = file.prefetch(buffer_bytes=buffer_bytes)
        child = os.fork()
        if child == 0:
            try:
                loader.take("t3")
            except SafetensorError as error:
                assert "this prefetch was begun by process" in str(error), error
                own = file.prefetch(buffer_bytes=1)
                assert sum(1 for _ in own) == 8
                del loader, own
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert all((tensor == float(name[1:])).all() for name, tensor in loader)
    """
    done = run_python(program)
    assert done.returncode == 0, done.stderr


def test_the_limit_of_threads_holds(large: tuple) -> None:
    path, state = large
    before = safetensors_torch.transfer_options()
    try:
        # The thread that takes the tensors counts, too.
        safetensors_torch.set_transfer_options(threads=1)
        with safe_open(path) as file:
            loader = file.prefetch()
        assert reader_threads() == 0
        assert difference(dict(loader), state) is None
    finally:
        safetensors_torch.set_transfer_options(threads=before.threads)


def test_the_budget_bounds_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "model"
    save_file({f"t{i:03}": torch.full((MIB,), float(i)) for i in range(64)}, path)
    setup = f"""
    import collections
    file = safetensors_torch.safe_open({str(path)!r}, backend="pread")
    """
    growth = peak_growth(setup, "collections.deque(file.prefetch(buffer_bytes='32MiB'), maxlen=0)")
    assert growth < 48 * MIB
    growth = peak_growth(setup, "kept = dict(file.prefetch())")
    assert 256 * MIB <= growth < 1.1 * 256 * MIB


def test_meta(path: Path, backend: str) -> None:
    contents = path.read_bytes()
    header = json.loads(contents[8 : 8 + int.from_bytes(contents[:8], "little")])
    with safe_open(path, backend=backend) as file:
        for name in file.keys():
            meta = file.get_tensor_meta(name)
            assert meta == (header[name]["dtype"], header[name]["shape"], tuple(header[name]["data_offsets"]))
            assert (meta.dtype, meta.shape, meta.data_offsets) == meta
        with pytest.raises(SafetensorError, match="does not contain tensor nope"):
            file.get_tensor_meta("nope")
