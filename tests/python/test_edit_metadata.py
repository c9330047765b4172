"""edit_metadata: what the header says afterwards, that the tensors stay, where it is written, and what is refused."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proc import ctrl_c_interrupts
from safetensors_torch import SafetensorError, edit_metadata, load_file, safe_open, save_file
from support import bits, encode, entries, mode, unpack, unprivileged

MIB = 2**20
ROOM = {"room": "x" * 300}


@pytest.fixture
def roomy(path: Path) -> Path:
    """The file with a few hundred bytes of padding in its header."""
    edit_metadata(path, {}, reserve=500)
    return path


def metadata_of(path: Path) -> dict[str, str] | None:
    with safe_open(path) as file:
        return file.metadata()


def assert_holds(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    found = load_file(path, backend="pread")
    assert found.keys() == tensors.keys()
    assert all(
        found[name].shape == tensor.shape and bits(found[name]) == bits(tensor) for name, tensor in tensors.items()
    )


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("durable", [False, True])
def test_changes(in_place: bool, durable: bool, roomy: Path, tensors: dict) -> None:
    before = roomy.stat().st_ino
    changes = {"format": None, "epoch": "3", "": '\0\n"\\é\U0001f600', "absent": None}
    result = edit_metadata(roomy, types.MappingProxyType(changes), in_place=in_place, durable=durable)
    assert result == metadata_of(roomy) == {"epoch": "3", "": changes[""]}
    assert_holds(roomy, tensors)
    assert (roomy.stat().st_ino == before) == in_place
    assert edit_metadata(roomy, {"epoch": "4"}) == {"epoch": "4", "": changes[""]}
    assert entries(roomy.parent) == [roomy.name]


def test_the_bytes_are_those_of_a_save(path: Path, tensors: dict, tmp_path: Path) -> None:
    """Only the padding may differ: an edit in place keeps the length, a rewrite keeps the data aligned."""
    metadata = {"format": "pt", **ROOM}
    edit_metadata(path, ROOM)
    header, data = unpack(path.read_bytes())
    expected_header, expected_data = unpack(encode(tensors, metadata))
    assert header.rstrip(b" ") == expected_header.rstrip(b" ") and data == expected_data
    edit_metadata(path, {"room": None}, in_place=True)
    shorter, data = unpack(path.read_bytes())
    assert len(shorter) == len(header) and data == expected_data
    assert shorter.rstrip(b" ") == unpack(encode(tensors, {"format": "pt"}))[0].rstrip(b" ")


text = st.text(max_size=60)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.none() | st.dictionaries(text, text, max_size=4),
    st.lists(st.tuples(st.dictionaries(text, st.none() | text, max_size=3), st.integers(0, 200)), max_size=6),
)
def test_any_edits(tmp_path_factory: pytest.TempPathFactory, metadata: dict | None, edits: list) -> None:
    path = tmp_path_factory.getbasetemp() / "edited.safetensors"
    tensors = {"b": torch.arange(7), "a": torch.ones(3, dtype=torch.bfloat16), "none": torch.zeros(0)}
    save_file(tensors, path, metadata)
    expected = dict(metadata or {})
    for changes, reserve in edits:
        for key, value in [*changes.items(), *[(key, None) for key in list(expected)[:1] if key not in changes]]:
            changes[key] = value
            expected.pop(key, None) if value is None else expected.__setitem__(key, value)
        assert edit_metadata(path, changes, reserve=reserve) == expected == (metadata_of(path) or {})
        header, data = unpack(path.read_bytes())
        assert len(header) % 8 == 0 and len(header) - len(header.rstrip(b" ")) >= reserve
        assert data == unpack(encode(tensors))[1]


def test_without_room(path: Path, tensors: dict) -> None:
    content = path.read_bytes()
    with pytest.raises(SafetensorError, match=f"^{path}: the new header takes .* leave in_place out"):
        edit_metadata(path, ROOM, in_place=True)
    with pytest.raises(SafetensorError, match="and reserve is 100"):
        edit_metadata(path, {}, in_place=True, reserve=100)
    assert path.read_bytes() == content
    path.chmod(0o640)
    assert edit_metadata(path, ROOM, reserve=50) == {"format": "pt", **ROOM}
    assert mode(path) == 0o640
    edit_metadata(path, {"more": "y"}, in_place=True)
    assert_holds(path, tensors)


def test_nothing_is_written_where_nothing_changes(path: Path) -> None:
    before = path.stat()
    for changes in ({}, {"format": "pt"}, {"absent": None}):
        assert edit_metadata(path, changes) == edit_metadata(path, changes, in_place=True) == {"format": "pt"}
    after = path.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_metadata_comes_and_goes(write: Callable[..., Path]) -> None:
    path = write({"a": torch.ones(2)})
    assert edit_metadata(path, {"absent": None}) == {} and metadata_of(path) is None
    assert edit_metadata(path, {"k": "v"}) == {"k": "v"}
    assert edit_metadata(path, {"k": None}) == {} and metadata_of(path) == {}


def test_open_files_and_tensors_do_not_change(roomy: Path, tensors: dict) -> None:
    loaded = load_file(roomy)
    with safe_open(roomy) as file:
        for in_place in (True, False):
            edit_metadata(roomy, {"k": str(in_place)}, in_place=in_place)
            assert file.metadata() == {"format": "pt"}
            assert all(file.get_tensor(name).equal(tensor) for name, tensor in tensors.items())
    assert all(loaded[name].equal(tensor) for name, tensor in tensors.items())
    assert_holds(roomy, tensors)


def test_links(roomy: Path) -> None:
    soft, hard = roomy.with_name("soft"), roomy.with_name("hard")
    soft.symlink_to(roomy.name)
    with pytest.raises(SafetensorError, match="a symbolic link cannot be edited in place"):
        edit_metadata(soft, {"k": "1"}, in_place=True)
    assert soft.is_symlink()
    edit_metadata(soft, {"k": "1"})
    assert not soft.is_symlink() and metadata_of(soft) == {"format": "pt", "k": "1"}
    assert metadata_of(roomy) == {"format": "pt"}
    hard.hardlink_to(roomy)
    with pytest.raises(SafetensorError, match="2 names .hard links."):
        edit_metadata(roomy, {"k": "2"}, in_place=True)
    assert metadata_of(roomy) == {"format": "pt"}
    edit_metadata(roomy, {"k": "2"})
    assert metadata_of(roomy) == {"format": "pt", "k": "2"}
    assert metadata_of(hard) == {"format": "pt"}


def test_a_read_only_file(roomy: Path) -> None:
    # Not below pytest's own directory, which other users cannot read.
    with tempfile.TemporaryDirectory() as directory:
        path = Path(shutil.copy(roomy, directory))
        Path(directory).chmod(0o777)
        path.chmod(0o444)
        before = path.stat().st_ino
        with unprivileged():
            with pytest.raises(PermissionError, match=f"cannot write {path}: Permission denied"):
                edit_metadata(path, {"k": "v"}, in_place=True)
            assert metadata_of(path) == {"format": "pt"}
            assert edit_metadata(path, {"k": "v"}) == {"format": "pt", "k": "v"}
        assert path.stat().st_ino != before
        assert mode(path) == 0o444


@pytest.mark.parametrize("in_place", [False, True])
def test_an_invalid_file_stays_as_it_is(in_place: bool, roomy: Path) -> None:
    whole = roomy.read_bytes()
    for content in (b"", b"PK\x03\x04 a zip", whole[:40], whole[:-1], whole + b"\0", whole.replace(b"F32", b"F99")):
        roomy.write_bytes(content)
        with pytest.raises(SafetensorError, match=str(roomy)):
            edit_metadata(roomy, {"k": "v"}, in_place=in_place)
        assert roomy.read_bytes() == content
    with pytest.raises(FileNotFoundError, match="absent"):
        edit_metadata(roomy.with_name("absent"), {}, in_place=in_place)
    with pytest.raises(IsADirectoryError):
        edit_metadata(roomy.parent, {}, in_place=in_place)
    assert entries(roomy.parent) == [roomy.name]


@pytest.mark.parametrize(
    "changes, options, error, match",
    [
        ([("a", "b")], {}, TypeError, "changes must map keys to str or None, not list"),
        ({1: "b"}, {}, TypeError, "the metadata key 1 must be a str"),
        ({"a": 1}, {}, TypeError, "the metadata value of 'a' must be a str"),
        ({"\ud800": "b"}, {}, UnicodeEncodeError, None),
        ({"a": "\ud800"}, {}, UnicodeEncodeError, None),
        ({"a": "b"}, {"in_place": 1}, TypeError, "in_place must be a bool"),
        ({"a": "b"}, {"durable": None}, TypeError, "durable must be a bool"),
        ({"a": "b"}, {"reserve": 1.0}, TypeError, "reserve must be an int"),
        ({"a": "b"}, {"reserve": True}, TypeError, "reserve must be an int"),
        ({"a": "b"}, {"reserve": -1}, ValueError, "reserve is -1: give the bytes"),
        ({"a": "b"}, {"reserve": 100_000_000}, SafetensorError, "model.safetensors: the header would take"),
        ({"a": "b"}, {"reserve": 2**70}, SafetensorError, "model.safetensors: the header would take"),
        ({"a": "b" * 100_000_000}, {}, SafetensorError, "model.safetensors: the header would take"),
        ({"a": "b"}, {"progress": 3}, TypeError, "progress must be a bool or a function"),
    ],
)
def test_arguments(changes: object, options: dict, error: type, match: str | None, path: Path) -> None:
    content = path.read_bytes()
    with pytest.raises(error, match=match):
        edit_metadata(path, changes, **options)
    with pytest.raises(ValueError, match="null byte"):
        edit_metadata("a\0b", {})
    assert path.read_bytes() == content


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.safetensors"
    save_file({"a": torch.ones(75 * MIB)}, path)
    return path


def test_progress_and_interrupts(large: Path) -> None:
    told: list[tuple[int, int]] = []
    edit_metadata(large, ROOM, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (large.stat().st_size, large.stat().st_size) and told == sorted(told)

    def refuse(done: int, total: int) -> None:
        if done < total:
            raise ZeroDivisionError

    # Progress before the end is reported only if the copy takes long enough.
    try:
        edit_metadata(large, {"room": None, "k": "v"}, progress=refuse)
    except ZeroDivisionError:
        assert metadata_of(large) == ROOM
    done = threading.Event()

    def interrupt() -> None:
        while not done.wait(0.02):
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with ctrl_c_interrupts():
        with pytest.raises(KeyboardInterrupt):
            try:
                thread.start()
                for number in range(100):
                    edit_metadata(large, {"number": str(number)})
                pytest.fail("a hundred edits were not interrupted")
            finally:
                done.set()
                thread.join()
    assert load_file(large)["a"].equal(torch.ones(75 * MIB))
    assert entries(large.parent) == [large.name]


def test_a_copy_that_fails_leaves_the_file(path: Path) -> None:
    save_file({"a": torch.ones(MIB)}, path)
    content = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, limits[1]))
    try:
        with pytest.raises(OSError, match=str(path)):
            edit_metadata(path, ROOM)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == content
    assert entries(path.parent) == [path.name]
