"""Builds the Debian packages of the C library into out/deb: the shared library, and what programs are compiled with.

Run: make deb

Stages what `make install TORCH=0` installs, then uses the programs of dpkg-dev. DEBFULLNAME and DEBEMAIL name the
maintainer, as for dch.
"""

from __future__ import annotations

import email.utils
import gzip
import hashlib
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "out" / "deb"
RUNTIME, DEVELOPMENT = "libsafetensors-torch-c0", "libsafetensors-torch-c-dev"
LIBRARY = "libsafetensors_torch_c"


def run(*command: object) -> str:
    """Runs a program beside the directory debian, where those of dpkg-dev look for it. Returns its output."""
    return subprocess.run(
        [str(part) for part in command], check=True, cwd=OUT, stdout=subprocess.PIPE, text=True
    ).stdout


def maintainer() -> str:
    user = pwd.getpwuid(os.getuid()).pw_name
    name = os.environ.get("DEBFULLNAME", user)
    return f"{name} <{os.environ.get('DEBEMAIL', f'{user}@{socket.getfqdn()}')}>"


def write_changelog() -> None:
    found = re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)
    assert found is not None
    date = email.utils.formatdate(int(os.environ["SOURCE_DATE_EPOCH"]))
    (OUT / "debian" / "changelog").write_text(
        f"safetensors-torch ({found[1]}) unstable; urgency=medium\n\n  * See CHANGELOG.md of the sources.\n\n"
        f" -- {maintainer()}  {date}\n"
    )


def write_documentation(tree: Path) -> None:
    directory = tree / "usr/share/doc" / RUNTIME
    directory.mkdir(parents=True)
    licences = run(sys.executable, ROOT / "packaging" / "licenses.py")
    # A stanza of the copyright file has no empty lines.
    lines = (f" {line}" if line.strip() else " ." for line in licences.rstrip().splitlines())
    text = (ROOT / "packaging/debian/copyright").read_text()
    (directory / "copyright").write_text(text.replace("@CRATES@", "\n".join(lines)))
    changelog = (OUT / "debian" / "changelog").read_bytes()
    (directory / "changelog.gz").write_bytes(gzip.compress(changelog, mtime=0))


def build(tree: Path, package: str) -> None:
    control = tree / "DEBIAN"
    control.mkdir(exist_ok=True)
    files = sorted(
        path for path in tree.rglob("*") if path.is_file() and not path.is_symlink() and control not in path.parents
    )
    sums = (f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(tree)}\n" for path in files)
    (control / "md5sums").write_text("".join(sums))
    run("dpkg-gencontrol", f"-p{package}", f"-P{tree}", f"-Tdebian/{package}.substvars")
    run("dpkg-deb", "--root-owner-group", "--build", tree, OUT)


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "debian").mkdir(parents=True)
    control = (ROOT / "packaging/debian/control").read_text()
    (OUT / "debian" / "control").write_text(control.replace("@MAINTAINER@", maintainer()))
    # The time in the archives: the same sources make the same packages.
    os.environ.setdefault("SOURCE_DATE_EPOCH", str(int((ROOT / "Cargo.toml").stat().st_mtime)))
    write_changelog()
    development, runtime = OUT / DEVELOPMENT, OUT / RUNTIME
    run("make", "-C", ROOT, "install", "TORCH=0", f"DESTDIR={development}", "PREFIX=/usr")

    (runtime / "usr/lib").mkdir(parents=True)
    for path in (development / "usr/lib").glob(f"{LIBRARY}.so.*"):
        shutil.move(path, runtime / "usr/lib")
    (library,) = (path for path in (runtime / "usr/lib").iterdir() if not path.is_symlink())
    library.chmod(0o644)
    run("strip", "--strip-unneeded", "--remove-section=.comment", "--remove-section=.note", library)
    write_documentation(runtime)
    (development / "usr/share/doc").mkdir(parents=True)
    (development / "usr/share/doc" / DEVELOPMENT).symlink_to(RUNTIME)

    (runtime / "DEBIAN").mkdir()
    soversion = RUNTIME.removeprefix("libsafetensors-torch-c")
    (runtime / "DEBIAN/shlibs").write_text(f"{LIBRARY} {soversion} {RUNTIME}\n")
    (runtime / "DEBIAN/triggers").write_text("activate-noawait ldconfig\n")
    run("dpkg-shlibdeps", f"-Tdebian/{RUNTIME}.substvars", library)
    build(runtime, RUNTIME)
    build(development, DEVELOPMENT)
    for package in sorted(OUT.glob("*.deb")):
        print(package.relative_to(ROOT))


if __name__ == "__main__":
    main()
