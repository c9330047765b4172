"""Downloads what layers are compiled with: the headers of a torch, an old C library, and compilers for other machines.

Nothing is downloaded again.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from pip._internal.models.index import PyPI  # the index that pip uses if none is set

# Its glibc, 2.31, is the oldest that Debian's servers have. wheels.py checks that nothing needs one newer than 2.28.
DEBIAN = "bullseye"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SYSROOT_PACKAGES = ("libc6", "libc6-dev", "linux-libc-dev")
# Reads of a remote wheel are at least this long: the headers are next to each other.
READ_BYTES = 1 << 20


def _get(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=120) as response:
        return response.read()


@cache
def _torch_files() -> list[dict]:
    index = os.environ.get("PIP_INDEX_URL") or PyPI.simple_url
    answer = _get(f"{index.rstrip('/')}/torch/", Accept="application/vnd.pypi.simple.v1+json")
    return [file for file in json.loads(answer)["files"] if not file.get("yanked")]


def torch_releases(oldest: tuple[int, int]) -> dict[str, str]:
    """Returns the newest release of each minor version of torch, such as {"2.12": "2.12.1"}, in order."""
    releases: dict[tuple[int, int], int] = {}
    for file in _torch_files():
        found = re.match(r"torch-(\d+)\.(\d+)\.(\d+)-", file["filename"])
        if found and (int(found[1]), int(found[2])) >= oldest:
            minor = int(found[1]), int(found[2])
            releases[minor] = max(releases.get(minor, 0), int(found[3]))
    return {f"{major}.{minor}": f"{major}.{minor}.{patch}" for (major, minor), patch in sorted(releases.items())}


class _RemoteFile(io.RawIOBase):
    """A file on a server, read in ranges."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._position = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = _get(self._url, Range=f"bytes={self._position}-{end - 1}")
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class TorchHeaders:
    """The headers of a release of torch, and the C++ ABI that it is compiled with."""

    def __init__(self, version: str, machine: str, directory: Path) -> None:
        self.version = version
        self.include = directory / f"torch-{version}-{machine}" / "torch" / "include"
        if not self.include.exists():
            _extract_headers(version, machine, directory, self.include.parents[1])
        config = (self.include.parent / "share" / "cmake" / "Torch" / "TorchConfig.cmake").read_text()
        abi = re.search(r"-D_GLIBCXX_USE_CXX11_ABI=([01])", config)
        self.cxx11_abi = abi is None or abi[1] == "1"
        # torch 2.14 and later.
        needs_cxx20 = "error C++20" in (self.include / "ATen" / "ATen.h").read_text()
        self.standard = "c++20" if needs_cxx20 else "c++17"


def _extract_headers(version: str, machine: str, directory: Path, target: Path) -> None:
    # The headers are the same in the wheels for all Pythons.
    wheels = [
        file
        for file in _torch_files()
        if re.fullmatch(rf"torch-{re.escape(version)}-.*-manylinux\w*_{machine}\.whl", file["filename"])
    ]
    if not wheels:
        raise SystemExit(f"torch {version} has no wheel for Linux on {machine}")
    directory.mkdir(parents=True, exist_ok=True)
    remote = io.BufferedReader(_RemoteFile(wheels[0]["url"], wheels[0]["size"]), READ_BYTES)
    with zipfile.ZipFile(remote) as wheel, tempfile.TemporaryDirectory(dir=directory) as temporary:
        wanted = ("torch/include/", "torch/share/cmake/Torch/TorchConfig.cmake")
        for member in sorted(wheel.infolist(), key=lambda member: member.header_offset):
            if member.filename.startswith(wanted):
                wheel.extract(member, temporary)
        os.rename(temporary, target)
        os.mkdir(temporary)  # for the end of the block


def _debian_server() -> str:
    """Returns the server from which this machine installs Debian's packages."""
    listing = [
        "apt-get",
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE)",
        "Created-By: Packages",
        "Origin: Debian",
    ]
    lines = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.splitlines()
    # Not those of updates: bookworm-security.
    servers = [server for server, _, release in (line.partition(" ") for line in lines) if "-" not in release]
    if not servers:
        raise SystemExit("apt-get knows no server of Debian's packages: the layers are compiled for an old C library")
    return servers[0]


def sysroot(machine: str, directory: Path) -> Path:
    """Returns a directory with the headers and the libraries of Debian's older C library."""
    return debian_packages(machine, DEBIAN, SYSROOT_PACKAGES, directory)


def debian_packages(machine: str, release: str, packages: Iterable[str], directory: Path) -> Path:
    """Returns a directory with the files of Debian packages for a machine. Does not add the packages that they need."""
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}[machine]
    target = directory / f"{release}-{architecture}"
    if target.exists():
        return target
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as temporary:
        state = Path(temporary)
        for part in ("lists/partial", "cache/archives/partial", "root"):
            (state / part).mkdir(parents=True)
        (state / "sources.list").write_text(f"deb [signed-by={KEYRING}] {_debian_server()} {release} main\n")
        options = {
            "Dir::Etc::sourcelist": state / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::State::lists": state / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": state / "cache",
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Sandbox::User": "root",
        }
        apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in options.items())]
        subprocess.run([*apt, "update"], check=True)
        subprocess.run([*apt, "download", *packages], cwd=state / "root", check=True)
        for package in (state / "root").glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", package, state / "root"], check=True)
            package.unlink()
        for link in (state / "root").rglob("*"):
            if link.is_symlink() and os.readlink(link).startswith("/"):  # would lead to this machine's libraries
                to = os.path.relpath(state / "root" / os.readlink(link)[1:], link.parent)
                link.unlink()
                link.symlink_to(to)
        os.rename(state / "root", target)
    return target


def install_compilers(machine: str, compiler: str) -> None:
    """Installs g++ and Rust's standard library for another machine if they are missing, or says how to."""
    install = ["apt-get", "install", "-qq", "-y", f"g++-{machine.replace('_', '-')}-linux-gnu"]
    if shutil.which(compiler) is None:
        if os.geteuid() != 0:
            raise SystemExit(f"{compiler} is missing; as root: {' '.join(install)}")
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL)
    target = f"{machine}-unknown-linux-gnu"
    query = ["rustc", "--print", "target-libdir", "--target", target]
    libraries = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(libraries).exists():
        if shutil.which("rustup") is None:
            raise SystemExit(f"Rust's standard library for {target} is missing; install it into {libraries}")
        subprocess.run(["rustup", "target", "add", target], check=True)
