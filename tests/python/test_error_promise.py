"""What README.md promises of errors: each names the file, the tensor and the remedy, where it has one.

tests/guesses has the errors for wrong arguments.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import safetensors_torch as st
from support import DTYPES, encode, entry, pack

ONES = torch.ones(2)
AGAIN = ("bad.safetensors", "again")
F6 = pack({"layer.f6": entry("F6_E3M2", [4], 0, 3)}, bytes(3))
TWO = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'


def opened(content: bytes) -> st.safe_open:
    Path("bad.safetensors").write_bytes(content)
    return st.safe_open("bad.safetensors")


def load(content: bytes, **options: Any) -> None:
    Path("bad.safetensors").write_bytes(content)
    st.load_file("bad.safetensors", **options)


def header(**tensors: Any) -> None:
    load(pack(tensors, bytes(8)))


def raw(text: bytes, data: bytes = b"") -> None:
    load(struct.pack("<Q", len(text)) + text + data)


def index(weight_map: Any, **tensors: torch.Tensor) -> None:
    Path("shards").mkdir()
    if tensors:
        st.save_file(tensors, "shards/x.safetensors")
    Path("shards/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    st.load_sharded("shards")


def save(tensor: Any, **others: Any) -> None:
    st.save_file({"layer.a": tensor, **others}, "new.safetensors")


def write(tensor: torch.Tensor, *names: str) -> None:
    with st.IncrementalWriter("new.safetensors", {"layer.a": ONES, "layer.b": ONES}) as writer:
        for name in names:
            writer.write(name, tensor)


def truncated() -> None:
    st.save_file({"layer.a": torch.ones(1000)}, "bad.safetensors")
    file = st.safe_open("bad.safetensors", backend="pread")
    with open("bad.safetensors", "r+b") as shorter:
        shorter.truncate(200)
    file.get_tensor("layer.a")


def shrunk() -> None:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(4)
    save(tensor)


# The call, and what its error must contain: the file, the tensor, the remedy.
ERRORS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    # files that are not valid
    "no bytes": (lambda: load(b""), AGAIN),
    "a huge header": (lambda: load(struct.pack("<Q", 1 << 40) + b"{}"), AGAIN),
    "half a header": (lambda: load(struct.pack("<Q", 100) + b"{}"), AGAIN),
    "no UTF-8": (lambda: raw(b'{"\xff":1}'), AGAIN),
    "no JSON": (lambda: raw(b'{"a":{}'), AGAIN),
    "no object": (lambda: raw(b'{"layer.a":1}'), (*AGAIN, "layer.a")),
    "no field": (lambda: raw(b'{"layer.a":{}}'), (*AGAIN, "layer.a")),
    "a shape": (lambda: header(**{"layer.a": entry("F32", ["x"], 0, 8)}), (*AGAIN, "layer.a")),
    "a dtype": (lambda: header(**{"layer.a": entry("F128", [1], 0, 8)}), (*AGAIN, "layer.a")),
    "a size": (lambda: header(**{"layer.a": entry("F32", [1], 0, 8)}), (*AGAIN, "layer.a")),
    "an overflow": (lambda: header(**{"layer.a": entry("F32", [1 << 62, 1 << 62], 0, 8)}), (*AGAIN, "layer.a")),
    "offsets": (lambda: header(**{"layer.a": entry("F32", [1], 8, 4)}), (*AGAIN, "layer.a")),
    "a hole": (lambda: header(**{"layer.a": entry("F32", [1], 4, 8)}), (*AGAIN, "layer.a")),
    "more bytes": (lambda: header(**{"layer.a": entry("F32", [1], 0, 4)}), (*AGAIN, "layer.a")),
    "fewer bytes": (lambda: header(**{"layer.a": entry("F32", [4], 0, 16)}), (*AGAIN, "layer.a")),
    "a name twice": (lambda: raw(TWO.ljust(112), b"ab"), (*AGAIN, '"a"')),
    "metadata": (lambda: header(__metadata__={"epoch": 1}), (*AGAIN, "epoch")),
    "a pointer": (lambda: load(b"version https://git-lfs.github.com/spec/v1\n"), ("bad.safetensors", "git lfs pull")),
    "a page": (lambda: load(b"<!DOCTYPE html><html></html>"), AGAIN),
    "a pickle": (lambda: (torch.save({}, "bad.pt"), st.load_file("bad.pt")), ("bad.pt", "torch.load")),
    "truncated": (truncated, AGAIN),
    # dtypes
    "F6": (lambda: load(F6), ("bad.safetensors", "layer.f6", "C API")),
    "F6, one tensor": (lambda: opened(F6).get_tensor("layer.f6"), ("bad.safetensors", "layer.f6", "C API")),
    "F6, all": (lambda: opened(F6).get_tensors(), ("bad.safetensors", "layer.f6", "C API")),
    "F6, a dtype": (lambda: opened(F6).get_slice("layer.f6").dtype, ("bad.safetensors", "layer.f6", "C API")),
    "F6, a slice": (lambda: opened(F6).get_slice("layer.f6")[0], ("bad.safetensors", "layer.f6", "C API")),
    "F6, a checkpoint": (
        lambda: (Path("x").mkdir(), Path("x/model.safetensors").write_bytes(F6), st.load_sharded("x")),
        ("x", "layer.f6", "C API"),
    ),
    "complex128": (lambda: save(torch.ones(2, dtype=torch.complex128)), ("layer.a", "convert it")),
    # names
    "absent": (lambda: load(encode({"layer.a": ONES}), names=["layer.b"]), ("bad.safetensors", "layer.b", "'layer.a'")),
    "absent, get_tensor": (
        lambda: opened(encode({"layer.a": ONES})).get_tensor("layer.b"),
        ("bad.safetensors", "layer.b", "'layer.a'"),
    ),
    "reserved": (lambda: st.save_file({"__metadata__": ONES}, "new"), ("new", "__metadata__", "rename")),
    # checkpoints
    "a shard": (lambda: index({"layer.a": "x.safetensors"}), ("shards/x.safetensors", "index.json", "again")),
    "outside": (lambda: index({"layer.a": "../x"}), ("index.json", "layer.a", "../x", "do not trust")),
    "no map": (lambda: index([]), ("index.json", "again")),
    "another shard": (
        lambda: index({"layer.a": "x.safetensors", "b": "x.safetensors"}, b=ONES),
        ("index.json", "layer.a", "again"),
    ),
    "not listed": (lambda: index({"a": "x.safetensors"}, a=ONES, b=ONES + 1), ("index.json", '"b"', "`extra`")),
    "no checkpoint": (lambda: (Path("shards").mkdir(), st.load_sharded("shards")), ("shards", "pass the")),
    "a file for a directory": (lambda: st.load_file("."), (".", "load_sharded")),
    # saves
    "sparse": (lambda: save(torch.eye(2).to_sparse()), ("layer.a", ".to_dense()")),
    "shared": (lambda: save(ONES, b=ONES), ("layer.a", "keep_one")),
    "not contiguous": (lambda: save(torch.ones(2, 3).t()), ("layer.a", ".contiguous()")),
    "meta": (lambda: save(torch.ones(2, device="meta")), ("layer.a", "materialize it")),
    "shrunk": (shrunk, ("layer.a", "gather them")),
    "no tensor": (lambda: save([1.0]), ("layer.a", "torch.as_tensor")),
    "no text": (lambda: st.save_file({3: ONES}, "new"), ("3", "str()")),
    "no text in metadata": (lambda: st.save_file({"a": ONES}, "new", {3: "a"}), ("3", "str()")),
    "no directory": (lambda: st.save_file({"a": ONES}, "no/new"), ("no/new", "create its directory")),
    "a directory": (lambda: st.save_file({"a": ONES}, "."), (".", "name a file in it")),
    "lazy": (lambda: st.save_model(nn.LazyLinear(2), "new"), ("weight", "Run the module")),
    "too long for its place": (
        lambda: (st.save_file({"a": ONES}, "new"), st.edit_metadata("new", {"a": "b" * 999}, in_place=True)),
        ("new", "leave in_place out"),
    ),
    # incremental writers
    "missing": (lambda: write(ONES, "layer.a"), ("new.safetensors", "layer.b", "write them")),
    "twice": (lambda: write(ONES, "layer.a", "layer.a"), ("new.safetensors", "layer.a", "once")),
    "another shape": (lambda: write(torch.ones(3), "layer.a"), ("new.safetensors", "layer.a", "convert it")),
    "not declared": (lambda: write(ONES, "layer.c"), ("new.safetensors", "layer.c", "'layer.a'")),
    # modules
    "a model on meta": (
        lambda: (st.save_file({}, "new"), st.load_model(nn.Linear(3, 2, device="meta"), "new")),
        ("weight", "assign=True"),
    ),
    "a closed file": (
        lambda: (save(ONES), file := st.safe_open("new.safetensors"), file.close(), file.keys()),
        ("new.safetensors", "safe_open again"),
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_it_names_the_file_the_tensor_and_the_remedy(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    function, parts = ERRORS[error]
    with pytest.raises((OSError, ValueError, TypeError, RuntimeError, st.SafetensorError)) as caught:
        function()
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


@pytest.mark.skipif("F4" not in DTYPES, reason="this torch has no such dtype")
def test_a_conversion_that_torch_lacks(tmp_path: Path) -> None:
    path = tmp_path / "four.safetensors"
    path.write_bytes(pack({"layer.four": entry("F4", [2], 0, 1)}, b"\1"))
    with pytest.raises(st.SafetensorError, match=f"^{path}: tensor 'layer.four' of float4.* cannot be converted"):
        st.load_file(path, dtype="float32")
