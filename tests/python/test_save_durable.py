"""durable=True: the file is on disk when save_file or save_model returns."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from safetensors_torch import save_file, save_model

_CACHESTAT = 451  # the number of the system call on every architecture, Linux 6.5 and later

TENSORS = {"weight": torch.arange(3_000_000)}

# Logs the relevant calls in order.
SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void note(const char* what, const char* name) {
    FILE* log = fopen(getenv("SHIM_LOG"), "a");
    fprintf(log, "%s %s\\n", what, name);
    fclose(log);
}

int fsync(int file) {
    char link[64], name[PATH_MAX] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if (readlink(link, name, sizeof name - 1) < 0) abort();
    note("fsync", name);
    return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(file);
}

static void note_entry(const char* what, int directory, const char* entry) {
    char link[64], name[2 * PATH_MAX] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
    const ssize_t length = readlink(link, name, PATH_MAX);
    if (length < 0) abort();
    snprintf(name + length, sizeof name - length, "/%s", entry);
    note(what, name);
}

int renameat(int a, const char* from, int b, const char* to) {
    note_entry("renameat", b, to);
    return ((int (*)(int, const char*, int, const char*))dlsym(RTLD_NEXT, "renameat"))(a, from, b, to);
}

int linkat(int a, const char* from, int b, const char* to, int flags) {
    note_entry("linkat", b, to);
    return ((int (*)(int, const char*, int, const char*, int))dlsym(RTLD_NEXT, "linkat"))(a, from, b, to, flags);
}
"""


def dirty_pages(path: Path) -> int:
    """Returns the number of dirty pages of the file, and of those in writeback."""
    libc = ctypes.CDLL(None, use_errno=True)
    whole, told = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    with path.open("rb") as file:
        status = libc.syscall(_CACHESTAT, file.fileno(), whole, told, 0)
    if status != 0:
        pytest.skip(f"this kernel does not tell: {os.strerror(ctypes.get_errno())}")
    return told[1] + told[2]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A path on a filesystem for which the kernel reports dirty pages."""
    probe = tmp_path / "probe"
    save_file(TENSORS, probe)
    if dirty_pages(probe) == 0:
        pytest.skip("this filesystem keeps nothing back, or does not tell")
    probe.unlink()
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("replaced", [False, True])
def test_save_file(replaced: bool, target: Path) -> None:
    if replaced:
        save_file({"old": torch.zeros(5_000_000)}, target)
    save_file(TENSORS, target)
    plain = target.read_bytes()
    save_file(TENSORS, target, durable=True)
    assert dirty_pages(target) == 0
    assert target.read_bytes() == plain
    assert os.listdir(target.parent) == [target.name]


def test_save_model(target: Path) -> None:
    save_model(torch.nn.Linear(1000, 1000), target, durable=True)
    assert dirty_pages(target) == 0


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shim")
    (directory / "shim.c").write_text(SHIM)
    command = ["cc", "-shared", "-fPIC", "-o", str(directory / "shim.so"), str(directory / "shim.c"), "-ldl"]
    subprocess.run(command, check=True)
    return directory / "shim.so"


@pytest.mark.parametrize("durable", [False, True])
def test_file_then_name_then_directory(durable: bool, shim: Path, tmp_path: Path) -> None:
    log, directory = tmp_path / "log", tmp_path / "directory"
    directory.mkdir()
    program = f"""
import torch, safetensors_torch
for value in (1.0, 2.0):
    safetensors_torch.save_file({{"a": torch.full((3,), value)}}, {str(directory / "saved")!r}, durable={durable})
"""
    environment = {**os.environ, "LD_PRELOAD": str(shim), "SHIM_LOG": str(log)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    calls = [line.split(" ", 1) for line in log.read_text().splitlines() if str(directory) in line]
    names = [Path(name.removesuffix(" (deleted)")) for _, name in calls]
    saved = [
        what for (what, _), name in zip(calls, names, strict=True) if what != "fsync" and name == directory / "saved"
    ]
    # The second save finds that the name exists, and renames over it.
    assert saved == ["linkat", "linkat", "renameat"]
    synced = [
        (index, name) for index, ((what, _), name) in enumerate(zip(calls, names, strict=True)) if what == "fsync"
    ]
    if not durable:
        assert synced == []
        return
    assert [name == directory for _, name in synced] == [False, True, False, True]
    first, second = (
        calls.index(["linkat", str(directory / "saved")]),
        calls.index(["renameat", str(directory / "saved")]),
    )
    assert synced[0][0] < first < synced[1][0] < synced[2][0] < second < synced[3][0]


@pytest.mark.parametrize("durable", [1, None, "yes"])
def test_it_is_a_bool(durable: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="durable must be a bool"):
        save_file(TENSORS, tmp_path / "new", durable=durable)
    assert not (tmp_path / "new").exists()
