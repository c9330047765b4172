"""torch.library.opcheck of every public operator: its schema, its fake kernel, and its behaviour in tracers.

All checks apply to all operators, except two for ``load``; a test shows the reason. Another shows what Dynamo refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch as reference
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import safetensors_torch  # noqa: F401 - registers the ops
from support import as_tensor

ops = torch.ops.safetensors_torch
WEIGHT = torch.arange(12.0).reshape(3, 4)
ALL = {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"}


def arguments(name: str, directory: Path) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Calls of an operator."""
    path, out = str(directory / "model.safetensors"), str(directory / "out.safetensors")
    state = {"weight": WEIGHT, "mask": torch.tensor([True])}
    reference.save_file(state, path)
    parameter = torch.nn.Parameter(WEIGHT.clone())
    return {
        "load_file": [((path,), {}), ((path,), {"backend": "pread", "dtype": torch.float16, "names": ["weight"]})],
        "load": [((as_tensor(Path(path).read_bytes()),), {})],
        "save_file": [((state, out), {}), (({"weight": parameter}, out, {"format": "pt"}), {"durable": True})],
        "save": [((state,), {}), (({"weight": parameter}, {"format": "pt"}), {})],
        "get_tensor": [((path, "weight"), {}), ((path, "mask"), {"device": "cpu"})],
        "get_slice": [
            ((path, "weight", [1, 0], [3, 4]), {}),
            ((path, "weight", [0, 1], [3, 4], [2, 2]), {"device": "cpu"}),
            ((path, "mask", [1], [1]), {}),
        ],
        "load_tensors": [((path, ["weight", "mask"]), {}), ((path, ["mask"]), {"backend": "pread"})],
        "save_tensors": [
            ((out, ["weight"], [WEIGHT]), {}),
            ((out, ["weight", "mask"], [parameter, torch.tensor([True])], {"format": "pt"}), {}),
        ],
    }[name]


PUBLIC = ["load_file", "load", "save_file", "save", "get_tensor", "get_slice", "load_tensors", "save_tensors"]


def test_every_public_operator_is_here() -> None:
    registered = {schema.name for schema in torch._C._jit_get_all_schemas()}
    names = {name.split("::")[1] for name in registered if name.startswith("safetensors_torch::")}
    assert {name for name in names if not name.startswith("_")} == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_opcheck(name: str, tmp_path: Path) -> None:
    checks = ALL
    if name == "load":
        # The number and the shapes of its tensors are in the bytes, which a fake tensor lacks.
        checks = ALL - {"test_faketensor", "test_aot_dispatch_dynamic"}
    for positional, named in arguments(name, tmp_path):
        outcome = torch.library.opcheck(getattr(ops, name).default, positional, named, test_utils=sorted(checks))
        assert outcome == dict.fromkeys(checks, "SUCCESS")


def test_load_of_fake_bytes_has_no_result(tmp_path: Path) -> None:
    ((data,), _) = arguments("load", tmp_path)[0]
    with FakeTensorMode() as mode, pytest.raises(DataDependentOutputException):
        ops.load(mode.from_tensor(data))


def test_dynamo_cannot_trace_a_dict_of_tensors(tmp_path: Path) -> None:
    """This is the reason for load_tensors. If it fails with a later torch, compile load_file as a whole in a test."""
    path = str(tmp_path / "model.safetensors")
    reference.save_file({"weight": WEIGHT}, path)
    torch._dynamo.reset()
    run = torch.compile(lambda x: x + ops.load_file(path)["weight"], fullgraph=True, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run(WEIGHT)
    run = torch.compile(lambda x: x + ops.load_tensors(path, ["weight"])[0], fullgraph=True, backend="eager")
    assert torch.equal(run(WEIGHT), 2 * WEIGHT)
    torch._dynamo.reset()
