"""Errors that the system or a program causes, not the file: each text has the cause and the remedy."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import safetensors_torch
from fresh import run_python
from safetensors_torch import load_file, safe_open, save, save_file
from support import entry, pack


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file({"a": torch.arange(6.0)}, tmp_path / "f")
    return tmp_path / "f"


def output_of(program: str, *args: object, **variables: str) -> str:
    if variables:  # LD_PRELOAD needs a fresh Python
        command = [sys.executable, "-c", program, *map(str, args)]
        environment = {**os.environ, **variables}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, check=False)
    else:
        done = run_python(program, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


SAYS = """
def says(path, **options):
    try:
        return str(sorted(safetensors_torch.load_file(path, **options)))
    except (OSError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
"""

FILLS_THE_MAP_COUNT = (
    """
import mmap, sys
import torch, safetensors_torch
"""
    + SAYS
    + """
says(sys.argv[1]), says(sys.argv[1], backend="pread")  # the first calls allocate once
spare = [bytes(100) for _ in range(100_000)]
maps = []
del spare
try:
    while True:
        maps.append(mmap.mmap(-1, 1, prot=mmap.PROT_READ))
except OSError:
    pass
mapped, read = says(sys.argv[1]), says(sys.argv[1], backend="pread")
maps.clear()
print(mapped)
print(read)
"""
)


def test_a_full_map_count(path: Path) -> None:
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    if most > 1 << 17:
        pytest.skip(f"vm.max_map_count is {most}: it would take long to make so many mappings")
    mapped, read = output_of(FILLS_THE_MAP_COUNT, path).splitlines()
    assert f"MemoryError: cannot map {path}" in mapped and f"vm.max_map_count is {most}" in mapped, mapped
    assert 'the backend "pread"' in mapped and "sysctl" in mapped, mapped
    assert read == "['a']", "the remedy works"


def test_too_little_address_space(tmp_path: Path) -> None:
    size = 8 << 30
    with (tmp_path / "f").open("wb") as file:
        file.write(pack({"a": entry("U8", [size], 0, size)}, b""))
        file.truncate(file.tell() + size)
    said = output_of(
        "import resource, sys\nimport torch, safetensors_torch\n"
        + SAYS
        + "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)\n"
        "print(says(sys.argv[1]))\n",
        tmp_path / "f",
    )
    assert said.startswith(f"MemoryError: cannot map {tmp_path / 'f'}") and "ulimit -v" in said, said


# Makes a filesystem appear to have no mappings.
NO_MAPPINGS = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
void* mmap64(void* at, size_t length, int protection, int flags, int descriptor, off_t offset) {
    if (descriptor >= 0 && length == strtoul(getenv("NO_MAPPINGS_OF"), NULL, 10)) {
        errno = ENODEV;
        return MAP_FAILED;
    }
    void* (*next)(void*, size_t, int, int, int, off_t) = dlsym(RTLD_NEXT, "mmap64");
    return next(at, length, protection, flags, descriptor, offset);
}
"""


def test_a_filesystem_without_mappings(path: Path, tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "shim.c").write_text(NO_MAPPINGS)
    shim = tmp_path / "shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", shim, tmp_path / "shim.c", "-ldl"], check=True)
    said = output_of(
        "import sys\nimport torch, safetensors_torch\n"
        + SAYS
        + "print(says(sys.argv[1]))\nprint(says(sys.argv[1], backend='pread'))\n",
        path,
        LD_PRELOAD=str(shim),
        NO_MAPPINGS_OF=str(path.stat().st_size),
    )
    mapped, read = said.splitlines()
    assert mapped.startswith(f"OSError: cannot map {path}") and "its filesystem does not support mappings" in mapped, (
        mapped
    )
    assert 'the backend "pread"' in mapped and read == "['a']"


def test_pipes_and_sockets(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a pipe: read it to its end and pass the bytes to load"):
        load_file(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a device or a socket"):
        load_file("/dev/null")
    reading, writing = os.pipe()
    try:
        os.write(writing, save({"a": torch.ones(1)}))
        os.close(writing)
        with pytest.raises(OSError, match="it is a pipe"):
            safe_open(f"/dev/fd/{reading}")
        # The remedy of the text works.
        with open(reading, "rb", closefd=False) as pipe:
            assert safetensors_torch.load(pipe.read())["a"] == 1
    finally:
        os.close(reading)


def test_socket_files(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(OSError, match=r"cannot open .*s"):
            load_file(tmp_path / "s")
