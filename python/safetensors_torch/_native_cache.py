"""The cache of libtorch layers that were compiled at import, and the checks that make them safe to load.

Owns the cache directory: its path, the names in it, its permissions and its lock. A loaded library runs with the rights
of this process, so no other user may be able to put one there.
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


def cache_directory() -> Path:
    """Returns the cache directory, which has a directory for each build of the package and each system."""
    named = os.environ.get(CACHE_VARIABLE)
    try:
        if named:
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "safetensors_torch"
    except RuntimeError:
        raise ImportError(
            "safetensors_torch finds no cache directory: this user has no home directory; name a directory in"
            f" the environment variable {CACHE_VARIABLE}"
        ) from None


def library() -> Path:
    """Returns the real path of the layer for this build of the package, this system and the installed torch.

    The layer may be missing. If it exists, no other user can replace it before it is loaded.

    Raises:
        ImportError: another user could put a library there; the text names the path, its owner and the remedy.
    """
    fingerprint = (NATIVE / FINGERPRINT).read_text(encoding="ascii").strip()
    path = Path(os.path.realpath(cache_directory())) / f"{fingerprint}-{_system()}" / library_name()
    _check_directories(path.parent, create=False)
    with suppress(FileNotFoundError):
        _check(path, os.lstat(path))
    return path


@contextmanager
def lock(library: Path) -> Iterator[bool]:
    """Creates the directory of ``library`` with its parents, and locks it against other processes.

    The kernel releases the lock when the process ends, even if it is killed.

    Yields:
        Whether the lock is held. If the filesystem has no locks, two processes may compile at once, each in a directory
        of its own.
    """
    _check_directories(library.parent, create=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(library.with_suffix(".lock"), flags, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_locked = True
        except BlockingIOError:
            print("safetensors_torch: waiting for another process that compiles it ...", file=sys.stderr, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            is_locked = True
        except OSError:
            is_locked = False
        yield is_locked
    finally:
        os.close(descriptor)


def install(built: Path, library: Path) -> None:
    """Moves a new layer to its path, where it appears complete or not at all, even if the power fails."""
    os.chmod(built, 0o755)  # regardless of the umask: the next import would refuse a library that others can write
    with open(built, "rb") as file:
        os.fsync(file.fileno())
    os.replace(built, library)


def _system() -> str:
    """Returns what a layer depends on besides torch: the machine, the C library and the C++ library of this process.

    So machines that share a home directory, and containers with different systems, do not share a layer.
    """
    parts = [os.uname().machine]
    with suppress(ValueError, OSError):  # the C library is not glibc
        parts.append((os.confstr("CS_GNU_LIBC_VERSION") or "").replace(" ", ""))
    with suppress(OSError), open("/proc/self/maps", errors="surrogateescape") as maps:
        # torch has loaded the library. Its file name ends in the version: libstdc++.so.6.0.30.
        found = (line.rstrip("\n").rpartition("/")[2] for line in maps if "/libstdc++.so" in line)
        parts.append(next(found, "").replace(".so", ""))
    return "-".join(filter(None, parts))


def _check_directories(directory: Path, *, create: bool) -> None:
    """Checks ``directory``, a real path, and its parents; with ``create``, creates the missing ones.

    It begins at the root, so that no other user can replace a directory after its check.
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
    """Raises ImportError if a user other than root and this one could change the file or directory at ``path``.

    With ``sticky``, others may write to a sticky directory, such as /tmp: they cannot replace this user's files there.
    """
    remedy = ""
    if not (stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode)):
        fault, remedy = "is neither a directory nor a plain file", "remove it, or "
    elif not _is_trusted(status.st_uid):
        fault = "belongs to another user, who could put any library there"
    elif not (sticky and status.st_mode & stat.S_ISVTX) and _others_can_write(path, status):
        fault = "can be written by other users, who could put any library there"
        remedy = f"remove that permission (chmod go-w {shlex.quote(str(path))}), or "
    else:
        return
    raise ImportError(
        f"safetensors_torch does not use its cache directory {cache_directory()}: {path} {fault} (owner"
        f" {_name(status.st_uid)}, mode {stat.S_IMODE(status.st_mode):04o}); {remedy}name a directory of your own in"
        f" the environment variable {CACHE_VARIABLE}"
    )


def _is_trusted(uid: int) -> bool:
    """Returns whether ``uid`` is root or the user of this process."""
    if uid in (0, os.geteuid()):
        return True
    try:
        mapped = [line.split()[0] for line in Path("/proc/self/uid_map").read_text().splitlines()]
        # In a user namespace without root, as in sandboxes, the owner of root's files shows as nobody.
        return "0" not in mapped and uid == int(Path("/proc/sys/kernel/overflowuid").read_text())
    except OSError:
        return False


def _others_can_write(path: Path, status: os.stat_result) -> bool:
    rights = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return rights != 0 and not (rights == stat.S_IWGRP and _is_private_group(path, status.st_gid))


def _is_private_group(path: Path, gid: int) -> bool:
    """Returns whether this user is the group's only member: many systems create a group for each user."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    with suppress(OSError):  # a filesystem without ACLs
        # With an ACL, the group bits are the mask: the most that any entry of the ACL grants.
        if "system.posix_acl_access" in os.listxattr(path, follow_symlinks=False):
            return False
    is_own = (group.gr_gid, group.gr_name) == (user.pw_gid, user.pw_name)
    return is_own and not set(group.gr_mem) - {user.pw_name}


def _name(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name}, uid {uid}"
    except KeyError:
        return f"uid {uid}"
