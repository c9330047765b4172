"""Guesses that cannot work: the error names what does."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import safetensors_torch as st
from safetensors_torch import edit_metadata, load, load_file, load_model, load_sharded, save, save_file, save_model

FILE = "model.safetensors"
ONES = {"weight": torch.ones(2)}


def closed() -> Any:
    with st.safe_open(FILE) as file:
        return file


def of_bytes() -> Any:
    return st.safe_open(Path(FILE).read_bytes())


# The guess, the class of its error, and what the error must contain.
GUESSES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # keywords of torch.load, torch.save, transformers, huggingface_hub and the reference's other modules
    "map_location": (lambda: load_file(FILE, map_location="cpu"), TypeError, "'map_location'; call it device"),
    "map_location of safe_open": (lambda: st.safe_open(FILE, map_location="cpu"), TypeError, "call it device"),
    "mmap": (lambda: load_file(FILE, mmap=False), TypeError, 'backend="pread"'),
    "weights_only": (lambda: load_file(FILE, weights_only=True), TypeError, "leave it out: a safetensors file"),
    "framework": (lambda: load_file(FILE, framework="np"), TypeError, ".numpy()"),
    "framework of safe_open": (lambda: st.safe_open(FILE, "np"), st.SafetensorError, ".numpy()"),
    "torch_dtype": (lambda: load_sharded("checkpoint", torch_dtype="auto"), TypeError, "call it dtype"),
    "dtype auto": (lambda: load_file(FILE, dtype="auto"), ValueError, "leave it out"),
    "dtype int8": (lambda: load_file(FILE, dtype="int8"), ValueError, "floating-point"),
    "dtype floot16": (lambda: load_file(FILE, dtype="floot16"), ValueError, "did you mean 'float16'"),
    "dtype of safe_open": (lambda: st.safe_open(FILE, dtype="bf16"), TypeError, ".to(dtype)"),
    "path": (lambda: load_file(path=FILE), TypeError, "call it filename"),
    "state_dict": (lambda: save_file(state_dict=ONES, filename=FILE), TypeError, "call it tensors"),
    "path of a directory": (lambda: save_sharded_at(path="out"), TypeError, "call it directory"),
    "fsync": (lambda: save_file(ONES, "out", fsync=True), TypeError, "call it durable"),
    "filename_pattern": (lambda: save_sharded_at("out", filename_pattern="x"), TypeError, "call it stem"),
    "max_shard_sizes": (lambda: save_sharded_at("out", max_shard_sizes="1GB"), TypeError, "'max_shard_size'"),
    "unlike any": (lambda: load_file(FILE, zzz=1), TypeError, "filename, device, backend"),
    # names
    "a wrong name": (lambda: load_file(FILE, names=["wieght"]), st.SafetensorError, "did you mean 'weight'"),
    "a wrong name in shards": (
        lambda: load_sharded("checkpoint", names=["layers.1.wieght"]),
        st.SafetensorError,
        "did you mean 'layers.1.weight'",
    ),
    "a wrong name in bytes": (lambda: load(save(ONES), names=["wieght"]), st.SafetensorError, "did you mean 'weight'"),
    "no such name": (lambda: load_file(FILE, names=["zzz"]), st.SafetensorError, "3 names: 'bias', 'steps', 'weight'"),
    "a glob without a match": (
        lambda: load_file(FILE, names=["wieg*"]),
        st.SafetensorError,
        "'bias', 'steps', 'weight'",
    ),
    "one name": (lambda: load_file(FILE, names="weight"), TypeError, "names=['weight']"),
    "get_tensor": (lambda: st.safe_open(FILE).get_tensor("wieght"), st.SafetensorError, "did you mean 'weight'"),
    "get_tensor, the file": (lambda: st.safe_open(FILE).get_tensor("wieght"), st.SafetensorError, FILE),
    "get_slice": (lambda: st.safe_open(FILE).get_slice("wieght"), st.SafetensorError, "did you mean 'weight'"),
    "index": (lambda: st.safe_open(FILE)["wieght"], st.SafetensorError, "did you mean 'weight'"),
    "get_shape": (lambda: st.safe_open("checkpoint").get_shape("x"), st.SafetensorError, "'layers.0.weight'"),
    "get_dtype": (lambda: st.safe_open(FILE).get_dtype("x"), st.SafetensorError, FILE),
    "declared name": (lambda: write("wieght"), st.SafetensorError, "did you mean 'weight'"),
    # metadata
    "a number in metadata": (lambda: save_file(ONES, "out", {"epoch": 3}), TypeError, "str() or json.dumps()"),
    "a dict in metadata": (lambda: save(ONES, {"config": {}}), TypeError, "str() or json.dumps()"),
    "a number as an edit": (lambda: edit_metadata(FILE, {"epoch": 3}), TypeError, "str() or json.dumps()"),
    # arguments in another order, or of another function
    "load_model": (lambda: load_model(FILE, torch.nn.Linear(3, 2)), TypeError, "load_model(model, filename)"),
    "save_model": (lambda: save_model(FILE, torch.nn.Linear(3, 2)), TypeError, "save_model(model, filename)"),
    "save_file": (lambda: save_file(Path("out"), ONES), ValueError, "save_file(tensors, filename)"),
    "save_sharded": (lambda: st.save_sharded("out", ONES), ValueError, "save_sharded(tensors, directory)"),
    "IncrementalWriter": (lambda: st.IncrementalWriter(ONES, "out"), TypeError, "IncrementalWriter(filename, tensors)"),
    "edit_metadata": (lambda: edit_metadata({"a": "b"}, FILE), TypeError, "edit_metadata(filename, changes)"),
    "a state for a model": (lambda: load_model(ONES, FILE), TypeError, "load_state_dict"),
    "a class for a model": (lambda: load_model(torch.nn.Linear, FILE), TypeError, "torch.nn.Module"),
    "a model for a state": (lambda: save_file(torch.nn.Linear(3, 2), "out"), ValueError, "save_model"),
    "a tensor for a state": (lambda: save_file(torch.ones(2), "out"), ValueError, '{"name": tensor}'),
    "save to a path": (lambda: save(ONES, "out"), TypeError, "save_file(tensors, filename)"),
    "load from a path": (lambda: load(FILE), TypeError, "load_file(filename)"),
    "load from a Path": (lambda: load(Path(FILE)), TypeError, "load_file(filename)"),
    # paths of remote files
    "an open file": (lambda: load_file(open(FILE, "rb")), TypeError, "load()"),
    "an open file to save to": (lambda: save_file(ONES, io.BytesIO()), TypeError, "save()"),
    "a repository": (lambda: load_file("org/model"), FileNotFoundError, 'load_sharded("hf://org/model")'),
    "a repository's shards": (lambda: load_sharded("org/model"), FileNotFoundError, "hf://org/model"),
    "a repository to inspect": (lambda: st.inspect("org/model"), FileNotFoundError, "hf://org/model"),
    "a repository to open": (lambda: st.safe_open("org/model"), FileNotFoundError, "hf://org/model"),
    "a repository for a model": (
        lambda: load_model(torch.nn.Linear(3, 2), "org/model"),
        FileNotFoundError,
        "hf://org/model",
    ),
    "a URL as a Path": (lambda: load_file(Path("s3://bucket/x")), FileNotFoundError, "pass a URL as a str"),
    "a URL as bytes": (lambda: save_file(ONES, b"s3://bucket/x"), FileNotFoundError, "pass a URL as a str"),
    "a URL to edit": (lambda: edit_metadata("s3://bucket/x", {}), FileNotFoundError, "takes local paths"),
    "a URL of no client": (lambda: load_file("s4://bucket/x"), ValueError, "no client reads such URLs"),
    "a bucket alone": (lambda: load_file("s3://bucket"), ValueError, "name a file"),
    "a filesystem by name": (lambda: load_file("x", filesystem="s3"), TypeError, "a store of obstore"),
    "file://": (lambda: load_file("file:///tmp/x"), FileNotFoundError, "pass the path"),
    "a directory": (lambda: load_file("checkpoint"), IsADirectoryError, "load_sharded"),
    "an index": (lambda: load_file("checkpoint/model.safetensors.index.json"), st.SafetensorError, "load_sharded"),
    # handles
    "closed": (lambda: closed().keys(), st.SafetensorError, f"File is closed: '{FILE}'"),
    "closed, the remedy": (lambda: closed().get_tensor("weight"), st.SafetensorError, "safe_open"),
    "pickle of bytes": (lambda: pickle.dumps(of_bytes()), TypeError, "save the bytes to a file"),
    "pickle of a closed file": (lambda: pickle.dumps(closed()), st.SafetensorError, "File is closed"),
    "backend": (lambda: load_file(FILE, backend="read"), st.SafetensorError, '"pread"'),
}


def save_sharded_at(*args: Any, **kwargs: Any) -> Any:
    return st.save_sharded(ONES, *args, **kwargs)


def write(name: str) -> None:
    with st.IncrementalWriter("out", ONES) as writer:
        writer.write(name, ONES["weight"])


@pytest.mark.parametrize("guess", GUESSES)
def test_the_error_names_what_works(guess: str, directory: Path) -> None:
    function, kind, remedy = GUESSES[guess]
    before = sorted(directory.iterdir())
    with pytest.raises(kind) as caught:
        function()
    assert remedy in str(caught.value)
    assert caught.type is kind or issubclass(kind, (st.SafetensorError, OSError))
    assert sorted(directory.iterdir()) == before, "nothing was written"
