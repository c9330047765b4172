"""torch.ops.safetensors_torch and its TorchBind class, called directly: schemas, and results in eager mode.

TorchScript, compilers and error messages have files of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as reference
import torch

import safetensors_torch  # noqa: F401 - registers the ops
from random_state import DTYPES, difference, flat_bytes, offset_order, random_state
from support import as_bytes, as_tensor

ops = torch.ops.safetensors_torch
CPU = torch.device("cpu")

# dtypes are numbers in a schema
SELECTION = [("dtype", "Optional[int]", True, (None,)), ("names", "Optional[List[str]]", True, (None,))]
# name -> arguments as (name, type, keyword only, (default,) if there is one), and the types returned
SCHEMAS = {
    "load_file": (
        [
            ("filename", "str", False, ()),
            ("device", "Device", True, (CPU,)),
            ("backend", "str", True, ("mmap",)),
            ("prefault", "Optional[bool]", True, (None,)),
            *SELECTION,
        ],
        ["Dict[str, Tensor]"],
    ),
    "load": (
        [("data", "Tensor", False, ()), ("device", "Device", True, (CPU,)), *SELECTION],
        ["Dict[str, Tensor]"],
    ),
    "save_file": (
        [
            ("tensors", "Dict[str, Tensor]", False, ()),
            ("filename", "str", False, ()),
            ("metadata", "Optional[Dict[str, str]]", False, (None,)),
            ("durable", "bool", True, (False,)),
        ],
        [],
    ),
    "save": (
        [
            ("tensors", "Dict[str, Tensor]", False, ()),
            ("metadata", "Optional[Dict[str, str]]", False, (None,)),
        ],
        ["Tensor"],
    ),
    "get_tensor": (
        [("filename", "str", False, ()), ("name", "str", False, ()), ("device", "Device", True, (CPU,))],
        ["Tensor"],
    ),
    "get_slice": (
        [
            ("filename", "str", False, ()),
            ("name", "str", False, ()),
            ("starts", "List[int]", False, ()),
            ("stops", "List[int]", False, ()),
            ("steps", "Optional[List[int]]", False, (None,)),
            ("device", "Device", True, (CPU,)),
        ],
        ["Tensor"],
    ),
    "load_tensors": (
        [
            ("filename", "str", False, ()),
            ("names", "List[str]", False, ()),
            ("device", "Device", True, (CPU,)),
            ("backend", "str", True, ("mmap",)),
        ],
        ["List[Tensor]"],
    ),
    "save_tensors": (
        [
            ("filename", "str", False, ()),
            ("names", "List[str]", False, ()),
            ("tensors", "List[Tensor]", False, ()),
            ("metadata", "Optional[Dict[str, str]]", False, (None,)),
            ("durable", "bool", True, (False,)),
        ],
        [],
    ),
}


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.tensor([True, False]), "step": torch.tensor(7)}


@pytest.fixture
def path(tmp_path: Path, state: dict[str, torch.Tensor]) -> str:
    reference.save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    return str(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas(name: str) -> None:
    arguments, returns = SCHEMAS[name]
    assert getattr(ops, name).overloads() == ["default"]
    schema = getattr(ops, name).default._schema
    found = []
    for argument in schema.arguments:
        default = (argument.default_value,) if argument.has_default_value() else ()
        found.append((argument.name, str(argument.type), argument.kwarg_only, default))
        assert argument.alias_info is None
    assert found == arguments
    assert [str(result.type) for result in schema.returns] == returns
    assert not schema.is_mutable


def test_load_file(path: str, state: dict[str, torch.Tensor]) -> None:
    for loaded in (
        ops.load_file(path),
        ops.load_file(path, device="cpu"),
        ops.load_file(path, device=CPU, backend="pread"),
        ops.load_file(path, prefault=True),
    ):
        assert isinstance(loaded, dict)
        assert difference(loaded, state) is None
        assert list(loaded) == ["step", "weight", "bias"]


def test_load(path: str, state: dict[str, torch.Tensor]) -> None:
    data = as_tensor(Path(path).read_bytes())
    loaded = ops.load(data)
    data.zero_()
    assert difference(loaded, state) is None
    names, tensors = ops._load_shared_lists(as_tensor(Path(path).read_bytes()))
    assert difference(dict(zip(names, tensors, strict=True)), state) is None


def test_load_requires_plain_bytes(path: str) -> None:
    data = as_tensor(Path(path).read_bytes())
    wrong = {
        "int8": data.view(torch.int8),
        "2-D": data.reshape(1, -1),
        "strided": torch.stack([data, data], dim=1)[:, 0],
        "meta": data.to("meta"),
    }
    for what, tensor in wrong.items():
        with pytest.raises((RuntimeError, NotImplementedError)) as refusal:
            ops.load(tensor)
        assert "frame #" not in str(refusal.value), what


def test_get_tensor(path: str, state: dict[str, torch.Tensor]) -> None:
    for name, tensor in state.items():
        assert difference({name: ops.get_tensor(path, name, device="cpu")}, {name: tensor}) is None


def pending_save(state: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Any:
    tensors = list(state.values())
    return torch.classes.safetensors_torch.PendingSave(list(state), tensors, metadata, "", False, "error")


def test_save(path: str, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for metadata in (None, {"format": "pt"}, {}):
        expected = reference.save(state, metadata)
        data = ops.save(state, metadata)
        assert (data.dtype, data.dim(), data.device) == (torch.uint8, 1, CPU)
        assert as_bytes(data) == expected
        out = torch.zeros(len(expected), dtype=torch.uint8)
        plan = pending_save(state, metadata)
        assert plan.total() == len(expected)
        plan.set_memory(out)
        assert plan.advance(60.0) and plan.done() == len(expected)
        assert as_bytes(out) == expected
        plan.set_file(str(tmp_path / "planned"), False)
        assert plan.advance(60.0)
        assert (tmp_path / "planned").read_bytes() == expected
        assert ops.save_file(state, str(tmp_path / "saved"), metadata) is None
        assert (tmp_path / "saved").read_bytes() == expected


@pytest.mark.parametrize("change", [-1, 1])
def test_a_save_requires_memory_of_the_exact_size(change: int, state: dict[str, torch.Tensor]) -> None:
    plan = pending_save(state)
    out = torch.full((plan.total() + change,), 7, dtype=torch.uint8)
    with pytest.raises(RuntimeError):
        plan.set_memory(out)
    assert bool((out == 7).all()), "the buffer was written to"


def test_a_cancelled_save_leaves_the_file_alone(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    plan = pending_save(state)
    with pytest.raises(RuntimeError, match="the save has no target"):
        plan.advance(60.0)
    large = {f"{i}": torch.zeros(16 << 20) for i in range(3)}  # more than one step writes
    plan = pending_save(large)
    plan.set_file(str(target), False)
    assert not plan.advance(0.0)
    plan.cancel()
    assert target.read_bytes() == b"old"
    with pytest.raises(RuntimeError, match="the save has no target"):
        plan.advance(60.0)


def test_a_cancelled_load_ends(path: str, state: dict[str, torch.Tensor]) -> None:
    file = torch.classes.safetensors_torch.File(path, "pread")
    load = file.start_load(None, CPU, None, None)
    assert load.total() == sum(tensor.nbytes for tensor in state.values()) and load.done() == 0
    assert load.advance(60.0) and load.done() == load.total()
    names, tensors = load.result()
    assert difference(dict(zip(names, tensors, strict=True)), state) is None
    load.cancel()
    for method in (lambda: load.advance(1.0), load.total, load.done, load.result):
        with pytest.raises(RuntimeError, match="has failed, or was cancelled"):
            method()


def test_a_save_requires_as_many_names_as_tensors() -> None:
    with pytest.raises(RuntimeError, match="as many names as tensors"):
        torch.classes.safetensors_torch.PendingSave(["a", "b"], [torch.zeros(1)], None, "", False, "error")


def test_random_states_through_the_ops(tmp_path: Path) -> None:
    path = str(tmp_path / "random.safetensors")
    for seed in range(2000, 2050):
        case = random_state(seed)
        expected = reference.save(case.tensors, case.metadata)
        ops.save_file(case.tensors, path, case.metadata)
        assert as_bytes(ops.save(case.tensors, case.metadata)) == expected, seed
        assert Path(path).read_bytes() == expected, seed
        assert difference(ops.load(as_tensor(expected)), case.tensors) is None, seed
        assert difference(ops.load_file(path), case.tensors) is None, seed
        for name, tensor in case.tensors.items():
            assert difference({name: ops.get_tensor(path, name)}, {name: tensor}) is None, seed


def test_tied(state: dict[str, torch.Tensor]) -> None:
    shared = torch.ones(4)
    tied = {"b": shared, "a": shared, "part": shared[:2], "alone": torch.ones(1)}
    assert ops._tied(tied, []) == {"b": "a", "part": "a"}
    assert ops._tied(tied, ["b"]) == {"a": "b", "part": "b"}
    assert ops._tied(state, []) == {}
    with pytest.raises(RuntimeError):
        ops._tied({"left": shared[:3], "right": shared[1:]}, [])


# The TorchBind class


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_file(backend: str, path: str, state: dict[str, torch.Tensor]) -> None:
    file = torch.classes.safetensors_torch.File(path, backend)
    assert file.is_open()
    assert file.keys() == ["bias", "step", "weight"]
    assert file.offset_keys() == offset_order(Path(path).read_bytes())
    assert file.metadata() == {"format": "pt"}
    assert file.size() == 3
    assert file.contains("step")
    assert not file.contains("stop")
    assert (file.shape("weight"), file.tensor_shape("weight"), file.dtype("weight")) == ([3, 4], [3, 4], "F32")
    assert (file.shape("step"), file.dtype("step"), file.dtype("bias")) == ([], "I64", "BOOL")
    several = dict(zip(["step", "bias", "weight"], file.get_tensors(["step", "bias", "weight"], CPU), strict=True))
    assert difference(several, state) is None
    part = file.get_slice("weight", [0, 1], [3, 3], [2, 1], CPU)
    assert torch.equal(part, state["weight"][::2, 1:3])
    assert file.get_slice("weight", [2, 0], [2, 4], [1, 1], CPU).shape == (0, 4)
    first, second = file.get_tensor("weight", CPU), file.get_tensor("weight", CPU)
    assert (first.data_ptr() == second.data_ptr()) == (backend == "mmap")
    file.close()
    assert not file.is_open()
    assert torch.equal(first, state["weight"]), "a tensor outlives its file"
    for call in (
        file.keys,
        file.metadata,
        file.size,
        lambda: file.shape("weight"),
        lambda: file.get_tensor("weight", CPU),
    ):
        with pytest.raises(RuntimeError, match="File is closed"):
            call()
    assert (ops._last_error()[0], ops._last_error()[3]) == ("SafetensorError", "File is closed")


def test_packed_values_have_two_shapes(tmp_path: Path) -> None:
    tensor = torch.arange(6, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(2, 3)
    reference.save_file({"packed": tensor}, tmp_path / "f4")
    file = torch.classes.safetensors_torch.File(str(tmp_path / "f4"), "mmap")
    assert (file.shape("packed"), file.tensor_shape("packed"), file.dtype("packed")) == ([2, 6], [2, 3], "F4")
    part = file.get_slice("packed", [1, 1], [2, 3], [1, 1], CPU)
    assert flat_bytes(part).tolist() == [4, 5]
    assert part.dtype == torch.float4_e2m1fn_x2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_file_reads_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.ones(16, dtype=torch.uint8).view(dtype)
    reference.save_file({"t": tensor}, tmp_path / "one")
    for backend in ("mmap", "pread"):
        file = torch.classes.safetensors_torch.File(str(tmp_path / "one"), backend)
        assert difference({"t": file.get_tensor("t", CPU)}, {"t": tensor}) is None
        half = file.get_slice("t", [len(tensor) // 2], [len(tensor)], [1], CPU)
        assert flat_bytes(half).tolist() == [1] * 8
