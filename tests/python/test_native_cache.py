"""The cache of compiled layers: whose libraries it loads, and for which system."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

import safetensors_torch
from fresh import run_python
from safetensors_torch import _native_cache, _native_library

PACKAGE = Path(safetensors_torch.__file__).parent
SHIPPED = PACKAGE / "native" / "lib" / _native_library.library_name()
needs_shipped = pytest.mark.skipif(not SHIPPED.exists(), reason="installed without an ahead-of-time library")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")
STRANGER = 54321


@pytest.fixture
def layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file at the path of the cached layer, three directories below a safe one."""
    monkeypatch.setenv(_native_library.CACHE_VARIABLE, str(tmp_path / "shared" / "cache"))
    path = _native_cache.library()
    path.parent.mkdir(parents=True)
    path.write_bytes(b"planted")
    for directory in (path.parent, path.parent.parent, path.parent.parent.parent):
        directory.chmod(0o755)
    path.chmod(0o644)
    return path


def replace_by_link(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def give_away(path: Path) -> None:
    os.chown(path, STRANGER, -1)


FAULTS = {
    "a library of another user": pytest.param(0, give_away, "belongs to another user", marks=needs_root),
    "a directory of another user": pytest.param(1, give_away, "belongs to another user", marks=needs_root),
    "a parent of another user": pytest.param(3, give_away, "belongs to another user", marks=needs_root),
    "a library that all may write": pytest.param(0, lambda path: path.chmod(0o646), "can be written by other users"),
    "a directory that all may write": pytest.param(1, lambda path: path.chmod(0o757), "can be written by other users"),
    "a parent that all may write": pytest.param(3, lambda path: path.chmod(0o757), "can be written by other users"),
    "a sticky directory": pytest.param(1, lambda path: path.chmod(0o1777), "can be written by other users"),
    "a link to a library": pytest.param(0, replace_by_link, "is neither a directory nor a plain file"),
    "a link to a directory": pytest.param(1, replace_by_link, "is neither a directory nor a plain file"),
}


@pytest.mark.parametrize(("level", "spoil", "fault"), FAULTS.values(), ids=FAULTS)
def test_files_that_others_could_write_are_refused(
    level: int, spoil: Callable[[Path], None], fault: str, layer: Path
) -> None:
    path = [layer, *layer.parents][level]
    spoil(path)
    with pytest.raises(ImportError) as caught:
        _native_cache.library()
    text = str(caught.value)
    status = path.lstat()
    assert f"{path} {fault}" in text
    assert f"uid {status.st_uid}, mode {stat.S_IMODE(status.st_mode):04o}" in text
    assert f"environment variable {_native_library.CACHE_VARIABLE}" in text
    assert path.lstat() == status, "what is refused stays as it was"


@needs_root
@needs_shipped
@pytest.mark.parametrize("what", ["library", "home"])
def test_a_planted_library_is_not_loaded(what: str, layer: Path, tmp_path: Path) -> None:
    """The home directory of another user, which sudo may keep, is not trusted."""
    home = tmp_path / "home"
    target = layer if what == "library" else home / ".cache" / layer.relative_to(tmp_path / "shared" / "cache")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(SHIPPED, target)
    give_away(layer if what == "library" else home)
    shutil.copytree(PACKAGE, tmp_path / "site" / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    variables = {"PYTHONPATH": str(tmp_path / "site"), "CXX": "/nonexistent/c++", "HOME": str(home)}
    if what == "home":
        variables |= {_native_library.CACHE_VARIABLE: None, "XDG_CACHE_HOME": None}
    result = run_python("import safetensors_torch", **variables)
    assert result.returncode == 1
    spoiled = target if what == "library" else home
    assert f"{spoiled} belongs to another user" in result.stderr and result.stderr.count("Traceback") == 1


def test_a_safe_file_is_accepted(layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _native_cache.library() == layer
    # Others may add files to a sticky directory, but not replace any.
    (tmp_path / "shared").chmod(0o1777)
    assert _native_cache.library() == layer
    # The real path of the directory counts, not the symbolic links to it.
    (tmp_path / "link").symlink_to(tmp_path / "shared" / "cache")
    monkeypatch.setenv(_native_library.CACHE_VARIABLE, str(tmp_path / "link"))
    assert _native_cache.library() == layer


def test_a_group_that_is_the_users_own(layer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a umask of 002, new files are writable by the group, which is private to the user on many systems."""
    user = pwd.getpwuid(os.geteuid())

    def members(names: list[str], group: str = user.pw_name) -> None:
        entry = grp.struct_group((group, "x", user.pw_gid, names))
        monkeypatch.setattr(grp, "getgrgid", {user.pw_gid: entry}.__getitem__)

    os.chown(layer.parent, -1, user.pw_gid)
    layer.parent.chmod(0o775)
    members([])
    assert _native_cache.library() == layer
    members([user.pw_name])
    assert _native_cache.library() == layer
    members([user.pw_name, "somebody"])
    with pytest.raises(ImportError, match="can be written by other users"):
        _native_cache.library()
    members([], group="staff")
    with pytest.raises(ImportError, match="can be written by other users"):
        _native_cache.library()


def test_root_that_is_not_in_the_namespace(layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In sandboxes, root's files, including the root directory, appear to belong to nobody."""
    if os.geteuid() == 0:
        give_away(tmp_path)
        stranger = STRANGER
    else:
        stranger = 0
    read = Path.read_text
    texts = {"/proc/self/uid_map": "1000 1000 1\n", "/proc/sys/kernel/overflowuid": f"{stranger}\n"}
    monkeypatch.setattr(Path, "read_text", lambda path, **options: texts.get(str(path)) or read(path, **options))
    assert _native_cache.library() == layer
    texts["/proc/self/uid_map"] = "0 0 4294967295\n"
    if os.geteuid() == 0:
        with pytest.raises(ImportError, match="belongs to another user"):
            _native_cache.library()


def test_a_user_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (_native_library.CACHE_VARIABLE, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    with pytest.raises(ImportError, match=f"no home directory; .*{_native_library.CACHE_VARIABLE}"):
        _native_cache.library()


def test_directories_are_private_and_the_lock_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_native_library.CACHE_VARIABLE, str(tmp_path / "a" / "b"))
    library = _native_cache.library()
    before = os.umask(0)
    try:
        with _native_cache.lock(library) as is_locked:
            assert is_locked
    finally:
        os.umask(before)
    made = [library.parent, *library.parents[1:3]]
    assert [stat.S_IMODE(path.stat().st_mode) for path in made] == [0o700] * 3
    lock = library.with_suffix(".lock")
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    lock.write_text("something")
    with _native_cache.lock(library):
        pass
    assert lock.read_text() == "something"
    lock.rename(tmp_path / "victim")
    lock.symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), _native_cache.lock(library):
        pass
    assert (tmp_path / "victim").read_text() == "something"


def test_a_new_library_can_be_written_by_its_owner_alone(tmp_path: Path) -> None:
    (tmp_path / "built").write_bytes(b"library")
    (tmp_path / "built").chmod(0o777)
    _native_cache.install(tmp_path / "built", tmp_path / "library")
    assert stat.S_IMODE((tmp_path / "library").stat().st_mode) == 0o755


@needs_shipped
def test_a_truncated_library_is_detected(tmp_path: Path) -> None:
    """The check comes before the load, because the dynamic loader crashes on some of these."""
    content = SHIPPED.read_bytes()
    assert _native_library._is_complete(SHIPPED)
    for size in (0, 3, 63, 64, 4096, len(content) // 2, len(content) - 1):
        (tmp_path / "library").write_bytes(content[:size])
        assert not _native_library._is_complete(tmp_path / "library"), size
    (tmp_path / "library").write_bytes(bytes(len(content)))
    assert not _native_library._is_complete(tmp_path / "library"), "zeros"


def test_each_system_has_a_layer_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_native_library.CACHE_VARIABLE, str(tmp_path))
    name = _native_cache.library().parent.name
    libc = os.confstr("CS_GNU_LIBC_VERSION").replace(" ", "")
    assert f"-{os.uname().machine}-{libc}-libstdc++.6" in name
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.17")
    assert _native_cache.library().parent.name == name.replace(libc, "glibc2.17")
