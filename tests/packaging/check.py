"""A small check of an installed safetensors_torch, without a test framework or the checkout.

Checks the minimum of a working package: the import, round trips of all dtypes, bytes equal to those of the reference,
a slice, a model, the operators. tests/python has the rest. Run it with the Python to check. It prints one line of JSON
with the times of the imports of torch and of the package, and the processor time of the compiler.

Run: python tests/packaging/check.py [--import-only]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

DTYPES = (
    "float64 float32 float16 bfloat16 complex64 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
    " float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
).split()


def check(directory: Path) -> int:
    """Raises if something is wrong. Returns the number of dtypes that were saved and loaded."""
    import safetensors.torch as reference
    import torch

    import safetensors_torch as ours

    known = [getattr(torch, name) for name in DTYPES if hasattr(torch, name)]
    assert len(known) >= len(DTYPES) - 1, "only float8_e8m0fnu is newer than torch 2.6"
    data = torch.arange(96, dtype=torch.uint8)  # small values, so that none is a NaN
    tensors = {str(dtype): data.clone().view(dtype) for dtype in known if dtype != torch.bool}
    tensors["torch.bool"] = data % 2 == 1
    tensors["matrix"] = torch.linspace(-1, 1, 24).reshape(4, 6)
    tensors["scalar"], tensors["empty"] = torch.tensor(2.5), torch.zeros(0, 3)

    path, expected = directory / "ours.safetensors", directory / "reference.safetensors"
    ours.save_file(tensors, path, {"format": "pt"})
    reference.save_file(tensors, expected, {"format": "pt"})
    assert path.read_bytes() == expected.read_bytes(), "the file differs from the reference's"
    assert ours.save(tensors, {"format": "pt"}) == path.read_bytes()

    def same(loaded: dict) -> None:
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            other = loaded[name]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
            assert bytes(other.flatten().view(torch.uint8)) == bytes(tensor.flatten().view(torch.uint8)), name

    same(reference.load_file(path))
    same(ours.load(path.read_bytes()))
    for backend in ("mmap", "pread"):
        same(ours.load_file(path, backend=backend))
        with ours.safe_open(path, backend=backend) as file:
            assert file.metadata() == {"format": "pt"}
            assert torch.equal(file.get_slice("matrix")[1:3, ::2], tensors["matrix"][1:3, ::2])

    model, copy = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)
    ours.save_model(model, directory / "model.safetensors")
    assert ours.load_model(copy, directory / "model.safetensors") == (set(), [])
    assert torch.equal(model.weight, copy.weight)

    assert torch.equal(torch.ops.safetensors_torch.get_tensor(str(path), "matrix"), tensors["matrix"])
    try:
        ours.load(b"no file")
    except ours.SafetensorError:
        return len(known)
    raise AssertionError("seven bytes of text were loaded")


def main(arguments: list[str]) -> None:
    start = time.perf_counter()
    import torch

    between, before = time.perf_counter(), os.times()
    import safetensors_torch

    end, after = time.perf_counter(), os.times()
    said = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cxx11_abi": torch.compiled_with_cxx11_abi(),
        "package": safetensors_torch.__file__,
        "native": safetensors_torch.cmake_prefix_path,
        "version": safetensors_torch.__version__,
        "torch_s": between - start,
        "package_s": end - between,
        "compiler_s": sum(after[2:4]) - sum(before[2:4]),
    }
    if "--import-only" not in arguments:
        with tempfile.TemporaryDirectory() as directory:
            said["dtypes"] = check(Path(directory))
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1:])
