"""The operators without a dict of tensors: get_slice, load_tensors, save_tensors.

In eager mode, in TorchScript, and in whole graphs of torch.export and torch.compile. The tests of the
other operators include their schemas and torch.library.opcheck.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as reference
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import safetensors_torch
from random_state import difference
from support import bytes_read, entry, pack

ops = torch.ops.safetensors_torch
BACKENDS = ["eager", "aot_eager", "inductor"]
WEIGHT = torch.arange(24.0).reshape(2, 3, 4)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {"weight": WEIGHT.clone(), "mask": torch.tensor([True, False]), "step": torch.tensor(7)}


@pytest.fixture
def path(tmp_path: Path, state: dict[str, torch.Tensor]) -> str:
    reference.save_file(state, tmp_path / "model.safetensors")
    return str(tmp_path / "model.safetensors")


# In eager mode


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_get_slice(device: str, path: str, state: dict[str, torch.Tensor]) -> None:
    found = {
        "row": ops.get_slice(path, "weight", [1, 2, 0], [2, 3, 4], device=device),
        "steps": ops.get_slice(path, "weight", [0, 0, 1], [2, 3, 4], [1, 2, 2], device=device),
        "nothing": ops.get_slice(path, "weight", [0, 1, 1], [2, 1, 4], device=device),
        "scalar": ops.get_slice(path, "step", [], [], device=device),
        "mask": ops.get_slice(path, "mask", [1], [2], [5], device=device),
    }
    expected = {
        "row": WEIGHT[1:, 2:],
        "steps": WEIGHT[:, ::2, 1::2].contiguous(),
        "nothing": WEIGHT[:, 1:1, 1:].contiguous(),
        "scalar": state["step"],
        "mask": state["mask"][1:],
    }
    if device == "cpu":
        assert difference(found, expected) is None
    for name, part in found.items():
        assert (part.device.type, part.dtype, part.shape) == (device, expected[name].dtype, expected[name].shape)


@pytest.mark.parametrize(
    "name, starts, stops, steps, message",
    [
        ("wait", [0], [1], None, "File does not contain tensor wait"),
        ("weight", [0], [1], None, "1 ranges for 3 dimension"),
        ("weight", [0, 0, 0], [1, 1, 5], None, "0..5 is not within dimension 2 of size 4"),
        ("weight", [0, 2, 0], [1, 1, 1], None, "2..1 is not within dimension 1"),
        ("weight", [-1, 0, 0], [2, 3, 4], None, "not negative"),
        ("weight", [0, 0, 0], [2, 3, 4], [1, 0, 1], "step of dimension 1 must be 1 or more"),
        ("weight", [0, 0, 0], [2, 3, 4], [1, 1], "one start, one stop and one step a dimension"),
        ("weight", [0, 0, 0], [2, 3], None, "one start, one stop and one step a dimension"),
    ],
)
@pytest.mark.parametrize("mode", [None, FakeTensorMode], ids=["real", "fake"])
def test_get_slice_refuses(
    mode: Any, name: str, starts: list[int], stops: list[int], steps: list[int] | None, message: str, path: str
) -> None:
    with pytest.raises(Exception, match=message) as refusal:
        if mode is None:
            ops.get_slice(path, name, starts, stops, steps)
        else:
            with mode():
                ops.get_slice(path, name, starts, stops, steps)
    assert "frame #" not in str(refusal.value)


@pytest.mark.alone
def test_get_slice_reads_only_what_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(pack({"a": entry("F32", [4096, 4096], 0, 64 << 20)}))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (64 << 20))
    before = bytes_read()
    assert ops.get_slice(str(path), "a", [7, 0], [9, 4096]).shape == (2, 4096)
    assert 32 << 10 <= bytes_read() - before <= 36 << 10


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_load_tensors(backend: str, path: str, state: dict[str, torch.Tensor]) -> None:
    for names in (["step", "weight", "mask"], ["weight"], []):
        loaded = ops.load_tensors(path, names, backend=backend)
        assert type(loaded) is list and len(loaded) == len(names)
        assert difference(dict(zip(names, loaded, strict=True)), {name: state[name] for name in names}) is None
    first, second = ops.load_tensors(path, ["weight", "weight"], backend=backend)
    first.zero_()
    assert torch.equal(second, first) == (backend == "mmap")
    meta = ops.load_tensors(path, ["mask", "weight"], device="meta", backend=backend)
    assert [(tensor.device.type, tensor.shape) for tensor in meta] == [("meta", (2,)), ("meta", (2, 3, 4))]
    with pytest.raises(RuntimeError, match="File does not contain tensor wait"):
        ops.load_tensors(path, ["weight", "wait"], backend=backend)
    with pytest.raises(RuntimeError, match="(?s)mmap.*pread"):
        ops.load_tensors(path, ["weight"], backend="io")


@pytest.mark.parametrize("metadata", [None, {}, {"b": "2", "a": "é"}], ids=str)
def test_save_tensors(metadata: dict[str, str] | None, state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = tmp_path / "saved"
    for durable in (False, True):
        saved = ops.save_tensors(str(path), list(state), list(state.values()), metadata, durable=durable)
        assert saved is None
        assert path.read_bytes() == safetensors_torch.save(state, metadata)


@pytest.mark.parametrize(
    "names, tensors, message",
    [
        (["a"], [WEIGHT, torch.ones(1)], "as many names as tensors, not 1 and 2"),
        (["a", "a"], [WEIGHT, torch.ones(1)], 'tensor "a": two tensors have this name'),
        (["a", "b"], [WEIGHT, WEIGHT], "share memory"),
        (["a"], [WEIGHT.transpose(0, 1)], "non contiguous tensor: `a`"),
        (["a"], [WEIGHT.to("meta")], "Cannot copy out of meta tensor"),
        (["a", "b"], [WEIGHT, torch.ones(2, device="meta")], "Cannot copy out of meta tensor"),
    ],
)
def test_save_tensors_refuses(names: list[str], tensors: list[torch.Tensor], message: str, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match=message):
        ops.save_tensors(str(path), names, tensors)
    assert path.read_bytes() == b"old"


# In TorchScript


@torch.jit.script
def scripted_lists(path: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    torch.ops.safetensors_torch.save_tensors(path, ["x", "more"], [x, x + 1], {"turn": "1"})
    first = torch.ops.safetensors_torch.get_slice(path, "x", [1], [3])
    torch.ops.safetensors_torch.save_tensors(path, ["x", "more"], [x + 10, x + 11])
    second = torch.ops.safetensors_torch.get_slice(path, "x", [1], [3])
    return first, second, torch.ops.safetensors_torch.load_tensors(path, ["more", "x"], backend="pread")


def test_scripts_keep_the_order_of_reads_and_writes(tmp_path: Path) -> None:
    for _ in range(3):  # optimised from the second call on
        first, second, (more, x) = scripted_lists(str(tmp_path / "turns"), torch.arange(4.0))
        assert (first.tolist(), second.tolist()) == ([1, 2], [11, 12])
        assert (more.tolist(), x.tolist()) == ([11, 12, 13, 14], [10, 11, 12, 13])


# In graphs


class Reads(torch.nn.Module):
    """Adds parts of a file to its input."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, second = ops.load_tensors(self.path, ["step", "weight"])
        return x + ops.get_slice(self.path, "weight", [0, 1, 0], [2, 2, 4], [1, 1, 2]), x[0, 0, 0] + second + first


class Writes(torch.nn.Module):
    """Saves an intermediate tensor, and returns another one."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x + 1
        ops.save_tensors(self.path, ["hidden", "x"], [hidden, x], {"step": "1"})
        return x * 2


def expect_reads(run: Any, path: str) -> None:
    """Each call reads the current file."""
    x = torch.ones(2, 1, 2)
    for value in (0, 5):
        reference.save_file({"weight": WEIGHT + value, "step": torch.tensor(value)}, path)
        part, whole = run(x)
        assert torch.equal(part, x + WEIGHT[:, 1:2, ::2] + value)
        assert torch.equal(whole, 1 + WEIGHT + 2 * value)


def expect_writes(run: Any, path: str) -> None:
    """Each call writes the file, although no result depends on it."""
    for value in (1.0, 5.0):
        Path(path).unlink(missing_ok=True)
        x = torch.full((3,), value)
        assert torch.equal(run(x), 2 * x)
        assert difference(reference.load_file(path), {"hidden": x + 1, "x": x}) is None
        with reference.safe_open(path, "pt") as file:
            assert file.metadata() == {"step": "1"}


def test_export_reads(path: str, tmp_path: Path) -> None:
    program = torch.export.export(Reads(path), (torch.ones(2, 1, 2),))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert ops.get_slice.default in targets and ops.load_tensors.default in targets
    assert not program.constants
    expect_reads(program.module(), path)
    expect_reads(program.run_decompositions().module(), path)
    torch.export.save(program, tmp_path / "program.pt2")
    expect_reads(torch.export.load(tmp_path / "program.pt2").module(), path)


def test_export_writes(tmp_path: Path) -> None:
    path = str(tmp_path / "hidden")
    program = torch.export.export(Writes(path), (torch.ones(3),))
    assert not Path(path).exists(), "tracing wrote the file"
    expect_writes(program.module(), path)
    expect_writes(program.run_decompositions().module(), path)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_reads(backend: str, path: str) -> None:
    expect_reads(torch.compile(Reads(path), fullgraph=True, backend=backend), path)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_does_not_drop_a_save(backend: str, tmp_path: Path) -> None:
    path = str(tmp_path / "hidden")
    expect_writes(torch.compile(Writes(path), fullgraph=True, backend=backend), path)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_keeps_reads_and_writes_in_order(backend: str, tmp_path: Path) -> None:
    path = str(tmp_path / "turns")

    def turns(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ops.save_tensors(path, ["x"], [x])
        (first,) = ops.load_tensors(path, ["x"], backend="pread")
        ops.save_tensors(path, ["x"], [x + 1])
        second = ops.get_slice(path, "x", [0], [2])
        ops.save_tensors(path, ["x"], [x + 2])
        (third,) = ops.load_tensors(path, ["x"])
        return first + 0, second + 0, third + 0

    reference.save_file({"x": torch.full((3,), 9.0)}, path)
    results = torch.compile(turns, fullgraph=True, backend=backend)(torch.zeros(3))
    assert [tensor.tolist() for tensor in results] == [[0, 0, 0], [1, 1], [2, 2, 2]]


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_follows_ranges_that_change(path: str) -> None:
    """The result is right whether each length gets a program of its own or all share one."""
    run = torch.compile(lambda i: ops.get_slice(path, "weight", [0, 0, i], [2, 3, i + 1]) + 1, backend="aot_eager")
    for i in range(4):
        assert torch.equal(run(i), WEIGHT[:, :, i : i + 1] + 1)


def test_fake_tensors_name_the_device_and_the_shape(path: str) -> None:
    with FakeTensorMode():
        part = ops.get_slice(path, "weight", [0, 0, 0], [2, 3, 3], [1, 1, 2], device="cuda:0")
        step, mask = ops.load_tensors(path, ["step", "mask"], device=torch.device("cuda:0"))
    for fake, shape, dtype in ((part, (2, 3, 2), torch.float32), (step, (), torch.int64), (mask, (2,), torch.bool)):
        assert isinstance(fake, FakeTensor)
        assert (fake.device, fake.shape, fake.dtype) == (torch.device("cuda:0"), shape, dtype)
