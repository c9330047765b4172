"""``extract``, ``rename`` and ``metadata``, which work without torch: what they write, and what stays as it was."""

from __future__ import annotations

import json
import os
import signal
import struct
from pathlib import Path

import pytest
import torch

from safetensors_torch import (
    SafetensorError,
    cli,
    edit_metadata,
    load_file,
    load_model,
    safe_open,
    save,
    save_file,
    save_model,
    save_sharded,
)
from safetensors_torch._dtype_names import dtype_name
from safetensors_torch._headers import copy_tensors, read_headers


def state() -> dict[str, torch.Tensor]:
    return {
        "layer.weight": torch.linspace(-1, 1, 12).reshape(3, 4),
        "layer.bias": torch.ones(3, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
        "steps": torch.tensor(7),
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file(state(), "model.safetensors", {"format": "pt"})
    return tmp_path


def run(*arguments: str) -> int:
    return cli.main(arguments)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "\u00e9": ""}])
@pytest.mark.parametrize("source", ["model.safetensors", "checkpoint"])
def test_extract_writes_what_save_file_does(here: Path, source: str, metadata: dict[str, str] | None) -> None:
    save_file(state(), "model.safetensors", metadata)
    save_sharded(state(), "checkpoint", metadata=metadata, max_shard_size=50)
    assert run("extract", source, "part.safetensors", "layer.*", "empty") == 0
    part = {name: tensor for name, tensor in state().items() if name != "steps"}
    save_file(part, "expected.safetensors", read_headers(source).metadata)
    assert Path("part.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()


def test_dtypes_that_torch_lacks_are_copied(here: Path) -> None:
    header = json.dumps(
        {
            "f6": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]},
            "f8": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [3, 5]},
        }
    ).encode()
    Path("odd.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"abcde")
    assert run("rename", "odd.safetensors", "renamed.safetensors", "s/^/x./") == 0
    whole = Path("renamed.safetensors").read_bytes()
    found = {tensor.name: tensor for tensor in read_headers("renamed.safetensors").tensors}
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == {
        "x.f6": ("F6_E2M3", [4]),
        "x.f8": ("F8_E8M0", [2]),
    }
    data = {name: whole[tensor.begin : tensor.begin + tensor.nbytes] for name, tensor in found.items()}
    assert data == {"x.f6": b"abc", "x.f8": b"de"}


def test_rules_apply_in_turn(here: Path) -> None:
    def renamed(*rules: str) -> list[str]:
        assert run("rename", "model.safetensors", "out.safetensors", *rules, "--force") == 0
        found = load_file("out.safetensors")
        assert sorted(map(bytes, (t.view(torch.uint8).numpy() for t in found.values() if t.dim()))) == sorted(
            map(bytes, (t.view(torch.uint8).numpy() for t in state().values() if t.dim()))
        )
        return sorted(found)

    assert renamed("s/e/E/") == ["Empty", "layEr.bias", "layEr.weight", "stEps"]
    assert renamed("s/e/E/g") == ["Empty", "layEr.bias", "layEr.wEight", "stEps"]
    assert renamed("s/^layer\\./h./", "s/^h/block.0/") == ["block.0.bias", "block.0.weight", "empty", "steps"]
    assert renamed("s|(.*)\\.(.*)|\\2/\\1|") == ["bias/layer", "empty", "steps", "weight/layer"]
    assert renamed("s/\\./\\//") == ["empty", "layer/bias", "layer/weight", "steps"]


@pytest.mark.parametrize(
    "rule", ["s/a", "s/a/b", "s/a/b/x", "sab", "s", "", "y/a/b/", "sxaxbx", "s/(/b/", "s/layer/\\1/"]
)
def test_a_wrong_rule(rule: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("rename", "model.safetensors", "out.safetensors", rule) == 2
    assert capsys.readouterr().err.startswith(f"rename: {rule}: not a ")
    assert os.listdir() == ["model.safetensors"]


def test_a_failure_leaves_the_target(here: Path) -> None:
    before = Path("model.safetensors").read_bytes()
    assert run("rename", "model.safetensors", "model.safetensors", "s/steps/__metadata__/", "--force") == 2

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy_tensors("model.safetensors", {"steps": "s"}, None, "model.safetensors", interrupt)
    assert os.listdir() == ["model.safetensors"] and Path("model.safetensors").read_bytes() == before
    # The source is the target.
    assert run("rename", "model.safetensors", "model.safetensors", "s/steps/s/", "--force") == 0
    assert load_file("model.safetensors")["s"] == 7


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
        self.head.weight = self.embed.weight


def test_tied_names_are_renamed_in_the_metadata(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(Tied(), "tied.safetensors")
    assert run("rename", "tied.safetensors", "prefixed.safetensors", "s/^/model./") == 0
    with safe_open("prefixed.safetensors") as file:
        assert file.metadata() == {"model.head.weight": "model.embed.weight"}
    assert load_model(Tied(), "prefixed.safetensors", prefix="model.") == (set(), [])
    assert run("extract", "tied.safetensors", "x.safetensors", "head.weight") == 1
    assert "the metadata says that embed.weight has its values" in capsys.readouterr().err


@pytest.mark.parametrize("in_place", [False, True])
def test_metadata_is_edited_as_by_edit_metadata(in_place: bool, here: Path) -> None:
    edit_metadata("model.safetensors", {}, reserve=500)
    Path("expected.safetensors").write_bytes(Path("model.safetensors").read_bytes())
    option, handler = ["--in-place"] if in_place else [], signal.getsignal(signal.SIGINT)
    with open("model.safetensors", "rb") as before:
        assert run("metadata", "set", "model.safetensors", "k=", "\u00e9=a=b", *option) == 0
        assert run("metadata", "remove", "model.safetensors", "format", *option) == 0
        assert os.path.samestat(os.fstat(before.fileno()), os.stat("model.safetensors")) == in_place
    edit_metadata("expected.safetensors", {"k": "", "\u00e9": "a=b"}, in_place=in_place)
    assert edit_metadata("expected.safetensors", {"format": None}, in_place=in_place) == {"k": "", "\u00e9": "a=b"}
    assert Path("model.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()
    assert signal.getsignal(signal.SIGINT) is handler


def test_metadata_of_a_checkpoint_is_that_of_each_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_sharded(state(), "checkpoint", metadata={"format": "pt"}, max_shard_size=50)
    assert run("metadata", "set", "checkpoint/model.safetensors.index.json", "epoch=3", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"format": "pt", "epoch": "3"}
    files = list(Path("checkpoint").glob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        assert read_headers(str(file)).metadata == {"format": "pt", "epoch": "3"}
    assert run("verify", "checkpoint") == 0


def test_names_of_dtypes() -> None:
    known = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    codes = 0
    for dtype in known:
        assert getattr(torch, dtype_name(str(dtype))) is dtype
        try:
            header = save({"x": torch.zeros(2, dtype=torch.uint8).repeat(8).view(dtype)})
        except (SafetensorError, RuntimeError, TypeError):
            continue  # the format lacks it
        code = header.partition(b'"dtype":"')[2].partition(b'"')[0].decode()
        assert getattr(torch, dtype_name(code)) is dtype, code
        codes += 1
    assert codes >= 18
    for name, dtype in {"half": torch.float16, "fp16": torch.float16, "Float": torch.float32, "guess": None}.items():
        assert getattr(torch, dtype_name(name), None) is dtype
