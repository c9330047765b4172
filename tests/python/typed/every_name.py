"""Uses every public name of safetensors_torch, with the types of the results.

It is for type checkers and never runs. tests/python/test_types.py checks it with mypy, and that no name is missing.

There is one function for each name, in alphabetical order. ``assert_type`` refuses Any too. Deliberate errors are
marked ``type: ignore``, which mypy --strict refuses if there is no error.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from typing_extensions import assert_type

import safetensors_torch

Tensors = dict[str, torch.Tensor]


def use_SafeWriter(path: Path, tensor: torch.Tensor) -> None:
    with safetensors_torch.IncrementalWriter(
        path, {"a": (torch.float32, [2, 3]), "b": tensor}, {"format": "pt"}, durable=True
    ) as writer:
        assert_type(writer, safetensors_torch.IncrementalWriter)
        writer.write("a", tensor)
        assert_type(writer.missing(), list[str])
        writer.write("a", [1.0])  # type: ignore[arg-type]


def use_PrefetchLoader(path: Path) -> None:
    with safetensors_torch.safe_open(path) as file:
        loader = file.prefetch({"a": None, "b": slice(1, 3), "c": (..., 1, slice(None, None, 2), None)})
        assert_type(loader, safetensors_torch.PrefetchLoader)
        file.prefetch(device="cuda", threads=4, buffer_bytes="1GB")
        file.prefetch({"a": 3})  # type: ignore[dict-item]
    with loader:
        assert_type(loader.names(), list[str])
        assert_type(len(loader), int)
        assert_type(loader.take("a"), torch.Tensor)
        for name, tensor in loader:
            assert_type(name, str)
            assert_type(tensor, torch.Tensor)
    loader.close()


def use_PySafeSlice(file: safetensors_torch.safe_open) -> None:
    assert_type(file.get_slice("a"), safetensors_torch.PySafeSlice)


def use_SafetensorError() -> None:
    try:
        safetensors_torch.load(b"")
    except safetensors_torch.SafetensorError as error:
        assert_type(error, safetensors_torch.SafetensorError)
        raise RuntimeError(str(error)) from error


def use_TensorMeta(file: safetensors_torch.safe_open) -> None:
    meta = file.get_tensor_meta("a")
    assert_type(meta, safetensors_torch.TensorMeta)
    assert_type(meta.dtype, str)
    assert_type(meta.shape, list[int])
    assert_type(meta.data_offsets, tuple[int, int])


def use_TransferOptions(options: safetensors_torch.TransferOptions) -> None:
    assert_type(options.pinned_pool_bytes, int)
    assert_type(options.threads, int)
    assert_type(options.direct, bool | Literal["auto"])
    pinned_pool_bytes, threads, _ = options
    assert_type(threads, int)


def use_version() -> None:
    assert_type(safetensors_torch.__version__, str)


def use_cmake_prefix_path() -> None:
    assert_type(safetensors_torch.cmake_prefix_path, str)


def use_edit_metadata(path: Path) -> None:
    changed = safetensors_torch.edit_metadata(path, {"format": "pt", "step": None}, in_place=True, reserve=4096)
    assert_type(changed, dict[str, str])
    safetensors_torch.edit_metadata(path, {"step": 1})  # type: ignore[dict-item]


def use_extension_link_args() -> None:
    assert_type(safetensors_torch.extension_link_args(), list[str])


def use_include_path() -> None:
    assert_type(safetensors_torch.include_path, str)


def use_inspect(path: Path) -> None:
    info = safetensors_torch.inspect(path)
    assert_type(info, safetensors_torch.CheckpointInfo)
    assert_type(info.files, list[str])
    assert_type(info.metadata, dict[str, str] | None)
    assert_type(info.tensors["a"], safetensors_torch.TensorInfo)
    assert_type(info.tensors["a"].shape, list[int])
    assert_type(info.tensors["a"].dtype, str)
    safetensors_torch.inspect("s3://bucket/model", filesystem=object())


def use_iterate(paths: list[Path]) -> None:
    for name, tensor in safetensors_torch.iterate(paths, "cuda", dtype="float16", names=["a*"], buffer_bytes="1GB"):
        assert_type(name, str)
        assert_type(tensor, torch.Tensor)
    safetensors_torch.iterate(paths[0], backend="pread", buffer_bytes=None, progress=True)
    safetensors_torch.iterate(paths, buffer_bytes=1.5)  # type: ignore[arg-type]
    safetensors_torch.iterate(["s3://bucket/a", "s3://bucket/b"], filesystem=object())


def use_load(data: bytes, view: memoryview) -> None:
    assert_type(safetensors_torch.load(data), Tensors)
    safetensors_torch.load(bytearray(data), torch.device("cuda"), copy=False, names=["a"])
    safetensors_torch.load(io.BytesIO(data))
    safetensors_torch.load(view, dtype=torch.float16, progress=True)
    safetensors_torch.load(data, copy="no")  # type: ignore[arg-type]


def use_load_file(path: Path) -> None:
    assert_type(safetensors_torch.load_file(path), Tensors)
    safetensors_torch.load_file(str(path), "cuda:0", backend="pread", prefault=True)
    safetensors_torch.load_file(bytes(path), 0, dtype=torch.bfloat16, names=lambda name: name.startswith("a"))
    safetensors_torch.load_file(path, device=None, progress=lambda done, total: print(done / total))
    safetensors_torch.load_file(3.5)  # type: ignore[arg-type]
    safetensors_torch.load_file(path, dtype="float16", names=re.compile("a"))
    safetensors_torch.load_file(path, map_location="cpu")  # type: ignore[call-arg]
    safetensors_torch.load_file("s3://bucket/model.safetensors", filesystem=None)
    safetensors_torch.load_file("model.safetensors", filesystem=object())


def use_load_model(model: torch.nn.Module, path: Path) -> None:
    missing, unexpected = safetensors_torch.load_model(model, path, strict=False, device="cpu", backend="mmap")
    assert_type(missing, set[str])
    assert_type(unexpected, list[str])
    safetensors_torch.load_model(model, path, prefix="a.", rename=str.lower, assign=True, backup=False)
    safetensors_torch.load_model(model, path, variant="fp16", extra="ignore", progress=True)
    safetensors_torch.load_model(model, "s3://bucket/model.safetensors", filesystem=object())
    safetensors_torch.load_model(model.state_dict(), path)  # type: ignore[arg-type]
    safetensors_torch.load_model(model, path, rename={"a": "b"})  # type: ignore[arg-type]


def use_load_sharded(directory: Path) -> None:
    assert_type(safetensors_torch.load_sharded(directory), Tensors)
    safetensors_torch.load_sharded(directory, "cuda", backend="pread", dtype=torch.float16, names=["a"], progress=False)
    safetensors_torch.load_sharded(directory, variant="fp16", extra="ignore")
    safetensors_torch.load_sharded("s3://bucket/model", filesystem=object())
    safetensors_torch.load_sharded(directory, prefault="no")  # type: ignore[arg-type]


def use_patch_safetensors() -> None:
    with safetensors_torch.patch_safetensors() as nothing:
        assert_type(nothing, None)
    safetensors_torch.patch_safetensors(True)  # type: ignore[call-arg]


def use_release_transfer_memory() -> None:
    assert_type(safetensors_torch.release_transfer_memory(), int)


def use_reserve_transfer_memory() -> None:
    assert_type(safetensors_torch.reserve_transfer_memory(64 << 20), int)
    safetensors_torch.reserve_transfer_memory("64MB")  # type: ignore[arg-type]


def use_safe_open(path: Path, data: bytes) -> None:
    safetensors_torch.safe_open(memoryview(data))
    safetensors_torch.safe_open(io.BytesIO(data), device=0)
    with safetensors_torch.safe_open(path, "pt", "cpu", backend="mmap") as file:
        assert_type(file, safetensors_torch.safe_open)
        assert_type(file.keys(), list[str])
        assert_type(file.offset_keys(), list[str])
        assert_type(file.metadata(), dict[str, str] | None)
        assert_type(file.get_tensor("a"), torch.Tensor)
        assert_type(file.get_tensors(), Tensors)
        assert_type(file["a"], torch.Tensor)
        assert_type(file.get_shape("a"), list[int])
        assert_type(file.get_dtype("a"), str)
        assert_type(dict(file.items()), Tensors)
        assert_type(list(file.values()), list[torch.Tensor])
        part = file.get_slice("a")
        assert_type(part.get_shape(), list[int])
        assert_type(part.get_dtype(), str)
        assert_type(part.shape, torch.Size)
        assert_type(part.dtype, torch.dtype)
        assert_type(part.ndim, int)
        assert_type(len(part), int)
        assert_type(part[0, :, ..., ::2], torch.Tensor)
        assert_type(iter(file), Iterator[str])
        assert_type(len(file), int)
        assert_type("a" in file, bool)
        file.get_tensor(0)  # type: ignore[arg-type]
    file.close()
    safetensors_torch.safe_open(path, variant="fp16", extra="ignore")
    safetensors_torch.safe_open("s3://bucket/model.safetensors", filesystem=object())


def use_save(tensors: Tensors) -> None:
    assert_type(safetensors_torch.save(tensors), bytes)
    safetensors_torch.save(tensors, {"format": "pt"}, force_contiguous=True, shared="keep_one", progress=True)
    safetensors_torch.save(tensors, {"step": 1})  # type: ignore[dict-item]


def use_save_file(tensors: Tensors, path: Path) -> None:
    safetensors_torch.save_file(tensors, path, {"format": "pt"}, durable=True, progress=lambda done, total: None)
    safetensors_torch.save_file(tensors, path, metadata=None, force_contiguous=True, shared="keep_one")
    safetensors_torch.save_file(tensors, "s3://bucket/model.safetensors", filesystem=object())
    safetensors_torch.save_file([*tensors.values()], path)  # type: ignore[arg-type]


def use_save_model(model: torch.nn.Module, path: Path) -> None:
    safetensors_torch.save_model(model, path, {"format": "pt"}, force_contiguous=False, durable=True)
    safetensors_torch.save_model(model, path.parent, max_shard_size="5GB", progress=True)
    safetensors_torch.save_model(model, path, prefix="a.", rename=lambda name: name.lower())
    safetensors_torch.save_model(model, "s3://bucket/model.safetensors", filesystem=object())
    safetensors_torch.save_model(model, path, max_shard_size=1.5)  # type: ignore[arg-type]


def use_save_sharded(tensors: Tensors, directory: Path) -> None:
    assert_type(safetensors_torch.save_sharded(tensors, directory), list[str])
    safetensors_torch.save_sharded(
        tensors, directory, {"format": "pt"}, max_shard_size=10**9, stem="model", durable=True
    )
    safetensors_torch.save_sharded(tensors, directory, force_contiguous=True, shared="keep_one")
    safetensors_torch.save_sharded(tensors, "s3://bucket/model", filesystem=object())
    safetensors_torch.save_sharded(tensors, directory, stem=None)  # type: ignore[arg-type]


def use_set_transfer_options() -> None:
    safetensors_torch.set_transfer_options(pinned_pool_bytes=128 << 20, threads=4, direct="auto")
    safetensors_torch.set_transfer_options(128 << 20)  # type: ignore[call-arg]


def use_transfer_memory() -> None:
    assert_type(safetensors_torch.transfer_memory(), int)


def use_transfer_options() -> None:
    assert_type(safetensors_torch.transfer_options(), safetensors_torch.TransferOptions)


def use_unpatch_safetensors() -> None:
    safetensors_torch.unpatch_safetensors()
