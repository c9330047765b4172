"""Files on ext4, XFS and Btrfs that are not in the page cache: every load returns the bytes that were saved."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from safetensors_torch import iterate, load_file, safe_open, set_transfer_options
from safetensors_torch._headers import FilePlans, explain_loads

MIB = 2**20
# The least that mkfs.xfs takes is 300 MB. The image has holes where nothing is written.
IMAGE_BYTES = 320 * MIB
# Tensors that begin and end at any byte. Those of a load that is worth direct reads have 4 MiB together.
SIZES = [1, 0, 4097, 2 * MIB + 1, 511, 3 * MIB - 7, 0, 4096, 3 * MIB + 13, 0]

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount"),
    pytest.mark.skipif(not os.path.exists("/dev/loop-control"), reason="no loop devices"),
]


def _run(*command: object) -> str:
    """Runs a program, also one of a system directory that is not on the path. Returns what it prints."""
    variables = {**os.environ, "PATH": os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])}
    return subprocess.run(
        [*map(str, command)], env=variables, capture_output=True, text=True, check=True
    ).stdout.strip()


def _try(*command: object) -> str:
    """As _run; skips the test if the program is missing or fails."""
    try:
        return _run(*command)
    except FileNotFoundError:
        pytest.skip(f"no {command[0]}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"{' '.join(error.cmd)}: {error.stderr.strip()}")


@pytest.fixture(scope="module", params=[("ext4", 512), ("xfs", 4096), ("btrfs", 512)], ids=lambda it: it[0])
def disk(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
    """A filesystem of its own on a device whose blocks have 512 or 4096 bytes: its name and its directory."""
    filesystem, block_bytes = request.param
    with contextlib.ExitStack() as stack:
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=memory)))
        image, mountpoint = directory / "image", directory / "mounted"
        image.touch()
        os.truncate(image, IMAGE_BYTES)
        mountpoint.mkdir()
        device = _try("losetup", "--find", "--show", "--sector-size", block_bytes, image)
        stack.callback(_run, "losetup", "--detach", device)
        _try(f"mkfs.{filesystem}", "-q", device)
        _try("mount", "-t", filesystem, device, mountpoint)
        stack.callback(_run, "umount", mountpoint)
        yield filesystem, mountpoint


@pytest.fixture(params=[True, "auto", False], ids=lambda direct: f"direct={direct}")
def direct(request: pytest.FixtureRequest) -> Iterator[bool | str]:
    set_transfer_options(direct=request.param)
    yield request.param
    set_transfer_options(direct="auto")


def _write(path: Path, data_start: int) -> dict[str, torch.Tensor]:
    """Writes a file whose data begins at an offset, however odd."""
    tensors = {f"t{i}": torch.randint(256, (size,), dtype=torch.uint8) for i, size in enumerate(SIZES)}
    header, end = {}, 0
    for name, tensor in tensors.items():
        offsets = [end, end + len(tensor)]
        header[name] = {"dtype": "U8", "shape": [len(tensor)], "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode().ljust(data_start - 8)
    assert len(text) == data_start - 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(tensor.numpy() for tensor in tensors.values())
        file.flush()
        os.fsync(file.fileno())
    return tensors


def _drop(path: Path) -> FilePlans:
    """Drops a file from the page cache. Returns how it would be read now."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    (plans,) = explain_loads(str(path))
    return plans


def _prefetched(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, backend="pread") as file:
        return dict(file.prefetch())


LOADS: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {
    "load_file": lambda path: load_file(path, backend="pread"),
    "prefetch": _prefetched,
    "iterate": lambda path: dict(iterate(path)),
}


@pytest.mark.parametrize("load", LOADS)
def test_the_bytes_are_right(load: str, disk: tuple[str, Path], direct: bool | str) -> None:
    filesystem, directory = disk
    path = directory / "model"
    # Around the start of a block of 512 and of 4096 bytes, and in the middle.
    for data_start in (1023, 1024, 1025, 4095, 4096, 4097, 7777):
        tensors = _write(path, data_start)
        plans = _drop(path)
        assert plans.filesystem == filesystem
        assert plans.cached is not None and plans.cached < MIB
        # The plans are those of another copy of the core, where the setting is "auto".
        assert [plan.direct for plan in plans.plans] == [False, True, True]
        loaded = LOADS[load](path)
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(loaded[name], tensor), (data_start, name)
        (after,) = explain_loads(str(path))
        # Direct reads leave nothing in the page cache.
        assert after.cached is not None and (after.cached < MIB) == (direct is not False)


def test_the_bytes_of_a_mapping_are_right(disk: tuple[str, Path]) -> None:
    _, directory = disk
    path = directory / "model"
    for prefault in (True, False):
        tensors = _write(path, 4097)
        _drop(path)
        loaded = load_file(path, prefault=prefault)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
