"""torch.ops.safetensors_torch, and the package's functions, under torch.export, torch.compile and fake tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch as reference
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import safetensors_torch
from random_state import DTYPES
from support import bytes_read

ops = torch.ops.safetensors_torch
BACKENDS = ["eager", "aot_eager", "inductor"]

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def path(tmp_path: Path) -> str:
    write(tmp_path / "model.safetensors", 1.0)
    return str(tmp_path / "model.safetensors")


def write(path: str | Path, value: float) -> None:
    reference.save_file({"weight": torch.full((2, 3), value), "bias": torch.full((3,), -value)}, path)


class AddsWeight(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 + ops.get_tensor(self.path, "weight")


class Checkpoints(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ops.save_file({"hidden": x + 1}, self.path, {"step": "1"})
        return x * 2


def expect_reads(run, path: str) -> None:
    """Each call reads the current file: the tensor is not a constant of the program."""
    x = torch.ones(2, 3)
    for value in (1.0, 5.0, -3.0):
        write(path, value)
        assert torch.equal(run(x), torch.full((2, 3), 2 + value))


def expect_writes(run, path: str) -> None:
    """Each call writes the file, although no result depends on it."""
    for value in (1.0, 5.0):
        Path(path).unlink(missing_ok=True)
        assert torch.equal(run(torch.full((3,), value)), torch.full((3,), 2 * value))
        assert torch.equal(reference.load_file(path)["hidden"], torch.full((3,), value + 1))
        with reference.safe_open(path, "pt") as file:
            assert file.metadata() == {"step": "1"}


def test_export_get_tensor(path: str, tmp_path: Path) -> None:
    program = torch.export.export(AddsWeight(path), (torch.ones(2, 3),))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert ops.get_tensor.default in targets
    assert not program.constants
    expect_reads(program.module(), path)
    expect_reads(program.run_decompositions().module(), path)
    torch.export.save(program, tmp_path / "program.pt2")
    expect_reads(torch.export.load(tmp_path / "program.pt2").module(), path)


def test_export_load_file(path: str) -> None:
    class LoadsAll(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 + ops.load_file(path)["weight"]

    program = torch.export.export(LoadsAll(), (torch.ones(2, 3),))
    expect_reads(program.module(), path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_get_tensor(backend: str, path: str) -> None:
    expect_reads(torch.compile(AddsWeight(path), fullgraph=True, backend=backend), path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_keeps_a_gradient_around_it(backend: str, path: str) -> None:
    x = torch.ones(2, 3, requires_grad=True)
    run = torch.compile(lambda x: (x * ops.get_tensor(path, "weight")).sum(), fullgraph=True, backend=backend)
    write(path, 3.0)
    run(x).backward()
    assert torch.equal(x.grad, torch.full((2, 3), 3.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_load_file_between_graphs(backend: str, path: str) -> None:
    """A graph cannot contain a dict of tensors, so the call breaks it. The result must still be right."""

    def run(x: torch.Tensor) -> torch.Tensor:
        return x * 2 + ops.load_file(path)["weight"]

    expect_reads(torch.compile(run, backend=backend), path)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_around_the_functions_of_the_package(backend: str, path: str, tmp_path: Path) -> None:
    def through_files(x: torch.Tensor) -> torch.Tensor:
        safetensors_torch.save_file({"doubled": x * 2}, tmp_path / "doubled")
        with safetensors_torch.safe_open(path, framework="pt") as file:
            weight = file.get_tensor("weight")
        return safetensors_torch.load_file(tmp_path / "doubled")["doubled"] + weight

    def through_bytes(x: torch.Tensor) -> torch.Tensor:
        data = safetensors_torch.save({"doubled": x * 2})
        return safetensors_torch.load(data)["doubled"] + safetensors_torch.load_file(path)["weight"]

    for run in (through_files, through_bytes):
        expect_reads(torch.compile(run, backend=backend), path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_does_not_drop_save_file(backend: str, tmp_path: Path) -> None:
    path = str(tmp_path / "hidden.safetensors")
    expect_writes(torch.compile(Checkpoints(path), fullgraph=True, backend=backend), path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_keeps_reads_and_writes_in_order(backend: str, path: str) -> None:
    """Two reads of one name are not merged: a write may be between them."""

    def turns(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ops.save_file({"weight": x}, path)
        first = ops.get_tensor(path, "weight")
        ops.save_file({"weight": x + 1}, path)
        return first + 0, ops.get_tensor(path, "weight") + 0

    write(path, 9.0)
    first, second = torch.compile(turns, fullgraph=True, backend=backend)(torch.zeros(2, 3))
    assert torch.equal(first, torch.zeros(2, 3))
    assert torch.equal(second, torch.ones(2, 3))


def test_export_does_not_drop_save_file(tmp_path: Path) -> None:
    path = str(tmp_path / "hidden.safetensors")
    program = torch.export.export(Checkpoints(path), (torch.ones(3),))
    assert not Path(path).exists(), "tracing wrote the file"
    expect_writes(program.module(), path)


def test_opcheck_get_tensor(path: str) -> None:
    outcome = torch.library.opcheck(ops.get_tensor.default, (path, "weight"), {"device": "cpu"})
    assert set(outcome.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_tensors_are_shaped_as_the_real_ones(dtype: torch.dtype, tmp_path: Path) -> None:
    shapes = [(2, 3), (0,), (4, 0, 1), (1, 1, 5)] + [()] * (dtype is not torch.float4_e2m1fn_x2)
    for shape in shapes:
        tensor = torch.empty(shape, dtype=dtype)
        path = str(tmp_path / "one")
        reference.save_file({"t": tensor}, path)
        real = ops.get_tensor(path, "t")
        with FakeTensorMode():
            fake = ops.get_tensor(path, "t")
        assert isinstance(fake, FakeTensor)
        assert (fake.shape, fake.dtype, fake.device) == (real.shape, dtype, torch.device("cpu"))
        assert fake.stride() == real.stride()


def test_fake_tensors_read_no_data(tmp_path: Path) -> None:
    """The file is sparse and has 1 TiB: a fake kernel that read it or allocated memory for it would not return."""
    path = tmp_path / "huge"
    size = 2**40
    header = b'{"huge":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (size, size)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    before = bytes_read()
    with FakeTensorMode():
        fake = ops.get_tensor(str(path), "huge")
    assert (list(fake.shape), fake.dtype) == ([size], torch.uint8)
    assert bytes_read() - before < 2**20


def test_fake_tensors_name_the_device(path: str) -> None:
    with FakeTensorMode():
        assert ops.get_tensor(path, "weight", device="meta").device.type == "meta"
        assert ops.get_tensor(path, "weight", device=torch.device("cuda:0")).device == torch.device("cuda:0")


def test_fake_mode_refuses_what_the_real_op_refuses(path: str, tmp_path: Path) -> None:
    with FakeTensorMode():
        with pytest.raises(Exception, match="File does not contain tensor wait"):
            ops.get_tensor(path, "wait")
        with pytest.raises(Exception, match="No such file or directory"):
            ops.get_tensor(str(tmp_path / "absent"), "weight")


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_runs_load_outside_of_the_graph(backend: str) -> None:
    """The result of load depends on the bytes, so no graph can contain it."""

    def run(data: torch.Tensor) -> torch.Tensor:
        return ops.load(data)["weight"] + 1

    data = ops.save({"weight": torch.arange(3.0)})
    assert torch.compile(run, backend=backend)(data).tolist() == [1, 2, 3]


@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_holds_save(backend: str) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return ops.save({"weight": x})

    data = torch.compile(run, fullgraph=True, backend=backend)(torch.arange(3.0))
    assert ops.load(data)["weight"].tolist() == [0, 1, 2]
