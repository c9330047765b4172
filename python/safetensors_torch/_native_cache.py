"""Where a libtorch layer that was compiled at import is kept, and whether what is found there may be loaded.

Owns the cache directory: its place, the names in it, its permissions and its lock. A library that is loaded runs with
the rights of this process, so nobody else may be able to put one there.
"""

from __future__ import annotations

import fcntl
import grp
import os
import pwd
import shlex
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ._native_library import CACHE_VARIABLE, FINGERPRINT, NATIVE, library_name


def root() -> Path:
    """The cache directory, which holds one directory for each build of the package and each system."""
    named = os.environ.get(CACHE_VARIABLE)
    try:
        if named:
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "safetensors_torch"
    except RuntimeError:
        raise ImportError(
            "safetensors_torch does not find its cache directory: this user has no home directory; name a directory in"
            f" the environment variable {CACHE_VARIABLE}"
        ) from None


def library() -> Path:
    """The real path of the layer for this build of the package, this system and the installed torch.

    The layer may be missing. If it is there, it is safe from other users until it is loaded.

    Raises:
        ImportError: another user could put a library there; the text names the path, its owner and the remedy.
    """
    fingerprint = (NATIVE / FINGERPRINT).read_text(encoding="ascii").strip()
    path = Path(os.path.realpath(root())) / f"{fingerprint}-{_system()}" / library_name()
    _walk(path.parent, create=False)
    with suppress(FileNotFoundError):
        _check(path, os.lstat(path))
    return path


@contextmanager
def lock(library: Path) -> Iterator[bool]:
    """One process at a time, for the directory of ``library``, which is created, and its parents, if it is missing.

    The kernel drops the lock with the process, so none is left behind by a kill.

    Yields False if the filesystem has no locks: two processes may compile then, each in a directory of its own.
    """
    _walk(library.parent, create=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(library.with_suffix(".lock"), flags, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = True
        except BlockingIOError:
            print("safetensors_torch: waiting for another process that compiles it ...", file=sys.stderr, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)


def put(built: Path, library: Path) -> None:
    """Moves a new layer to its place, where it appears complete or not at all, also if the power fails."""
    os.chmod(built, 0o755)  # whatever the umask: one that others can write would be refused at the next import
    with open(built, "rb") as file:
        os.fsync(file.fileno())
    os.replace(built, library)


def _system() -> str:
    """What a layer depends on beside torch: the machine, the C library and the C++ library of this process.

    Machines that share a home directory, and containers with different systems, get a layer each.
    """
    parts = [os.uname().machine]
    with suppress(ValueError, OSError):  # of a C library other than glibc
        parts.append((os.confstr("CS_GNU_LIBC_VERSION") or "").replace(" ", ""))
    with suppress(OSError), open("/proc/self/maps", errors="surrogateescape") as maps:
        # torch has brought the library in. The name of its file ends in its version: libstdc++.so.6.0.30.
        found = (line.rstrip("\n").rpartition("/")[2] for line in maps if "/libstdc++.so" in line)
        parts.append(next(found, "").replace(".so", ""))
    return "-".join(filter(None, parts))


def _walk(directory: Path, *, create: bool) -> None:
    """Checks every directory on the way to ``directory``, a real path, and that one; creates those that are missing.

    From the root on, so that what was checked cannot be replaced by others any more.
    """
    for path in [*reversed(directory.parents), directory]:
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            if not create:
                return
            with suppress(FileExistsError):
                os.mkdir(path, 0o700)
            status = os.lstat(path)
        _check(path, status, sticky=path != directory)


def _check(path: Path, status: os.stat_result, *, sticky: bool = False) -> None:
    """Raises ImportError if somebody other than root and this user could change what is at ``path``.

    With ``sticky``, others may add to a sticky directory, such as /tmp: they cannot replace what is not theirs.
    """
    remedy = ""
    if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
        fault, remedy = "is neither a directory nor a plain file", "remove it, or "
    elif not _is_trusted(status.st_uid):
        fault = "belongs to another user, who could put any library there"
    elif not (sticky and status.st_mode & stat.S_ISVTX) and _others_can_write(path, status):
        fault = "can be written by other users, who could put any library there"
        remedy = f"take that right away (chmod go-w {shlex.quote(str(path))}), or "
    else:
        return
    raise ImportError(
        f"safetensors_torch does not use its cache directory {root()}: {path} {fault} (owner {_name(status.st_uid)},"
        f" mode {stat.S_IMODE(status.st_mode):04o}); {remedy}name a directory of your own in the environment variable"
        f" {CACHE_VARIABLE}"
    )


def _is_trusted(uid: int) -> bool:
    """Whether ``uid`` is root or the user of this process."""
    if uid in (0, os.geteuid()):
        return True
    try:
        mapped = [line.split()[0] for line in Path("/proc/self/uid_map").read_text().splitlines()]
        # In a user namespace without root, as sandboxes have, root's files seem to belong to nobody.
        return "0" not in mapped and uid == int(Path("/proc/sys/kernel/overflowuid").read_text())
    except OSError:
        return False


def _others_can_write(path: Path, status: os.stat_result) -> bool:
    rights = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return rights != 0 and not (rights == stat.S_IWGRP and _is_private_group(path, status.st_gid))


def _is_private_group(path: Path, gid: int) -> bool:
    """Whether the group's rights are those of this user alone: many systems make a group for each user."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    with suppress(OSError):  # a filesystem without ACLs
        # In a file with an ACL, what looks like the group's rights is the most that anybody named there has.
        if "system.posix_acl_access" in os.listxattr(path, follow_symlinks=False):
            return False
    is_own = (group.gr_gid, group.gr_name) == (user.pw_gid, user.pw_name)
    return is_own and not set(group.gr_mem) - {user.pw_name}


def _name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name}, uid {uid}"
    except KeyError:
        return f"uid {uid}"
