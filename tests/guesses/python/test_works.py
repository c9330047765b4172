"""Programs that people write from memory, who know torch and safetensors, and have not read the guides: they work."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path

import pytest
import torch


def test_open_a_directory() -> None:
    from safetensors_torch import safe_open

    with safe_open("checkpoint", framework="pt", device="cpu") as f:
        assert f.keys() == ["layers.0.weight", "layers.1.weight", "layers.2.weight"]
        assert f.metadata() == {"format": "pt"}
        for key in f.keys():
            assert f.get_tensor(key).shape == (2, 3)
        assert f.get_slice("layers.2.weight")[0, 1:].tolist() == [2.0, 2.0]
        assert list(f.get_tensors()) == f.offset_keys()


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_open_an_index(backend: str) -> None:
    import safetensors_torch as st

    with st.safe_open(Path("checkpoint") / "model.safetensors.index.json", backend=backend) as f:
        assert {name: tensor.sum().item() for name, tensor in f.items()} == {
            "layers.0.weight": 0.0,
            "layers.1.weight": 6.0,
            "layers.2.weight": 12.0,
        }


def test_open_a_variant() -> None:
    from safetensors_torch import safe_open, save_sharded

    save_sharded({"w": torch.ones(1)}, "checkpoint", stem="model.fp16")
    with safe_open("checkpoint", variant="fp16") as f:
        assert f.keys() == ["w"]


def test_use_a_file_like_a_dict() -> None:
    from safetensors_torch import safe_open

    f = safe_open("model.safetensors")
    assert "weight" in f and "wieght" not in f and len(f) == 3
    assert torch.equal(f["weight"], f.get_tensor("weight"))
    assert [name for name, _ in f.items()] == list(f) == f.keys()
    assert [tuple(tensor.shape) for tensor in f.values()] == [(2,), (), (2, 3)]
    assert len(f.items()) == len(f.values()) == 3
    assert dict(f).keys() == dict(f.items()).keys() == {"weight", "bias", "steps"}
    assert f.get_shape("weight") == [2, 3] and f.get_dtype("weight") == "F32"
    f.close()
    f.close()
    with pytest.raises(Exception, match="closed"):
        f.keys()


def test_ask_a_slice_what_one_asks_a_tensor() -> None:
    from safetensors_torch import safe_open

    with safe_open("model.safetensors") as f:
        rows = f.get_slice("weight")
        assert rows.shape == torch.Size([2, 3]) and rows.shape[0] == len(rows) == 2
        assert rows.dtype == torch.float32 and rows.ndim == 2
        assert [row.tolist() for row in rows] == f["weight"].tolist()
        for start in range(0, len(rows), 1):
            assert torch.equal(rows[start : start + 1], f["weight"][start : start + 1])
        scalar = f.get_slice("steps")
        with pytest.raises(TypeError, match="0-d tensor"):
            len(scalar)
        assert rows and scalar  # they exist


def test_look_into_a_file() -> None:
    from safetensors_torch import inspect

    info = inspect("model.safetensors")
    assert info.metadata == {"format": "pt"}
    assert {name: (t.dtype, t.shape) for name, t in info.tensors.items()} == {
        "bias": ("F32", [2]),
        "weight": ("F32", [2, 3]),
        "steps": ("I64", []),
    }
    assert sum(t.nbytes for t in info.tensors.values()) == 40
    for path in ("checkpoint", b"checkpoint", Path("checkpoint/model.safetensors.index.json")):
        info = inspect(path)
        assert len(info.files) == 3 and info.tensors["layers.1.weight"].file == info.files[1]


def test_import_as_from_safetensors() -> None:
    import safetensors_torch as st
    import safetensors_torch.torch
    from safetensors_torch import SafetensorError, safe_open
    from safetensors_torch.torch import load, load_file, load_model, save, save_file, save_model

    for function in (load, load_file, load_model, save, save_file, save_model):
        assert function is getattr(st, function.__name__) is getattr(safetensors_torch.torch, function.__name__)
    assert st.torch.load_file is load_file
    assert issubclass(safe_open, object) and issubclass(SafetensorError, Exception)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float16", torch.float16),
        ("torch.float16", torch.float16),
        ("fp16", torch.float16),
        ("half", torch.float16),
        ("bf16", torch.bfloat16),
        ("BF16", torch.bfloat16),
        ("fp32", torch.float32),
        ("float", torch.float32),
        ("F64", torch.float64),
        ("F8_E4M3", torch.float8_e4m3fn),
        (torch.float64, torch.float64),
    ],
)
def test_name_a_dtype(dtype: str | torch.dtype, expected: torch.dtype) -> None:
    import safetensors_torch as st

    assert st.load_file("model.safetensors", dtype=dtype)["weight"].dtype == expected
    assert st.load_sharded("checkpoint", dtype=dtype)["layers.0.weight"].dtype == expected
    with st.IncrementalWriter("new.safetensors", {"w": (dtype, (2,))}) as writer:
        writer.write("w", torch.ones(2, dtype=expected))
    assert st.load_file("new.safetensors")["w"].dtype == expected


@pytest.mark.parametrize(
    "names",
    [
        re.compile(r"layers\.[12]\."),
        ["layers.[12].*"],
        ["layers.1.weight", "*.2.*"],
        lambda name: name > "layers.1",
        {"layers.1.weight": 1, "layers.2.weight": 2}.keys(),
    ],
    ids=["pattern", "glob", "name and glob", "function", "keys"],
)
def test_choose_names(names: object) -> None:
    from safetensors_torch import load_sharded

    assert sorted(load_sharded("checkpoint", names=names)) == ["layers.1.weight", "layers.2.weight"]


def test_a_name_that_looks_like_a_glob() -> None:
    from safetensors_torch import load_file, save_file

    save_file({"a*": torch.zeros(1), "ab": torch.ones(1)}, "odd.safetensors")
    assert list(load_file("odd.safetensors", names=["a*"])) == ["a*"]


class Dataset(torch.utils.data.Dataset):
    """The rows of a tensor, which is opened once, in the process that makes the dataset."""

    def __init__(self, path: str) -> None:
        from safetensors_torch import safe_open

        self.file = safe_open(path, framework="pt", device="cpu")

    def __len__(self) -> int:
        return len(self.file.get_slice("weight"))

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.file.get_slice("weight")[index]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_a_dataset_in_workers(method: str) -> None:
    from safetensors_torch import load_file

    context = multiprocessing.get_context(method)
    loader = torch.utils.data.DataLoader(Dataset("model.safetensors"), num_workers=1, multiprocessing_context=context)
    assert torch.equal(torch.cat(list(loader)), load_file("model.safetensors")["weight"])
