"""Builds the Debian packages, and uses them in a fresh Debian: a C program with pkg-config, a CMake project, removal.

Owns the new root directory (500 MB), whose packages mmdebstrap downloads from the mirrors of apt. The packages of this
machine stay as they are. Needs root, mmdebstrap and dpkg-dev, and uses lintian if it is installed.

Run: python tests/packaging/debian_packages.py
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from pathlib import Path

from commands import ROOT, run, timed

MAINTAINER = {"DEBFULLNAME": "Packaging Test", "DEBEMAIL": "packaging@debian.org"}
NAMES = ("libsafetensors-torch-c0", "libsafetensors-torch-c-dev")
# The libraries are in /usr/lib, because the CMake package does not find them in the directory of an architecture.
SUPPRESSED = "pkg-config-unavailable-for-cross-compilation"
LINTIAN = ("lintian", "--allow-root", "--fail-on=error,warning", f"--suppress-tags={SUPPRESSED}")


def make_root(root: Path) -> None:
    """Creates a Debian of this machine's release, with a compiler."""
    format = "deb $(REPO_URI) $(RELEASE) $(COMPONENT)"
    sources = root.parent / "sources.list"
    sources.write_text(run("apt-get", "indextargets", "--format", format, "Created-By: Packages"))
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    packages = "gcc,libc6-dev,pkgconf,cmake,make"
    run("mmdebstrap", "--quiet", "--variant=apt", f"--include={packages}", release, root, sources)


def main() -> None:
    if os.getuid() != 0 or not shutil.which("mmdebstrap"):
        raise SystemExit("the test needs root and mmdebstrap: run it as root after apt-get install mmdebstrap")
    database = Path("/var/lib/dpkg/status")
    before = database.read_bytes()
    with timed("make deb"):
        run("make", "deb", environment={**os.environ, **MAINTAINER})
    packages = [next((ROOT / "out/deb").glob(f"{name}_*.deb")) for name in NAMES]
    if shutil.which("lintian"):
        with timed("lintian finds neither errors nor warnings"):
            run(*LINTIAN, *packages)

    with tempfile.TemporaryDirectory(prefix="safetensors-torch-debian-") as name:
        root = Path(name) / "root"
        with timed("mmdebstrap"):
            make_root(root)
        home = root / "root"
        for package in packages:
            shutil.copy(package, home)
        shutil.copytree(ROOT / "tests/install/consumer", home / "consumer")

        def inside(command: str) -> str:
            return run("chroot", root, "sh", "-euc", f"cd /root; {command}", environment={"PATH": "/usr/sbin:/usr/bin"})

        with timed("apt-get install of both packages"):
            inside("apt-get install --yes ./*.deb")
        with timed("a C program with pkg-config, linked with the shared and with the static library"):
            inside("cc consumer/use_c.c $(pkg-config --cflags --libs safetensors_torch-c) -o shared && ./shared")
            inside(
                "cc consumer/use_c.c -Wl,-Bstatic -lsafetensors_torch_c -Wl,-Bdynamic "
                "-lgcc_s -lutil -lrt -lpthread -lm -ldl -o static && ./static"
            )
            loaded = {program: inside(f"ldd {program}") for program in ("shared", "static")}
            assert "libsafetensors_torch_c.so.0 => /lib/" in loaded["shared"], loaded
            assert "safetensors" not in loaded["static"], loaded
        with timed("a CMake project"):
            inside("cmake -S consumer -B build -DCONSUMER_COMPONENTS=c && cmake --build build && build/use_c")
        with timed("the removal, which leaves nothing and breaks the program"):
            files = [root / line[1:] for line in inside(f"dpkg -L {' '.join(NAMES)}").split() if "torch" in line]
            assert len(files) > 10, files
            assert all(os.path.lexists(path) for path in files)
            inside(f"apt-get purge --yes {' '.join(NAMES)}")
            left = [path for path in files if os.path.lexists(path)]
            assert not left, left
            inside("! ./shared 2>/dev/null")
    assert database.read_bytes() == before, "the packages of this machine have changed"


if __name__ == "__main__":
    main()
