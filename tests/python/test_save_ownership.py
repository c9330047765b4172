"""Owner and group of a replaced file, for writers with and without the right to keep them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from safetensors_torch import load_file, save_file

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of other users")

OWNER, WRITER, TEAM = 61001, 61002, 61234


@contextlib.contextmanager
def acting_as(user: int, group: int, groups: list[int]) -> Iterator[None]:
    before = os.getgroups(), os.getegid()
    os.setgroups(groups)
    os.setegid(group)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(before[1])
        os.setgroups(before[0])


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Another user's file in a directory that all can write; its path is relative, because others cannot reach it."""
    tmp_path.chmod(0o777)
    monkeypatch.chdir(tmp_path)
    Path("team.safetensors").write_bytes(b"old")
    os.chown("team.safetensors", OWNER, TEAM)
    return "team.safetensors"


def saved_by(name: str, mode: int, user: int, group: int, groups: list[int]) -> tuple[int, int, int]:
    os.chmod(name, mode)
    with acting_as(user, group, groups):
        save_file({"a": torch.ones(2)}, name)
    assert load_file(name)["a"].tolist() == [1, 1]
    found = os.stat(name)
    return found.st_uid, found.st_gid, found.st_mode & 0o7777


def test_root_keeps_both(name: str) -> None:
    assert saved_by(name, 0o640, 0, 0, []) == (OWNER, TEAM, 0o640)


def test_a_member_keeps_the_group(name: str) -> None:
    assert saved_by(name, 0o660, WRITER, WRITER, [TEAM]) == (WRITER, TEAM, 0o660)


@pytest.mark.parametrize("before, after", [(0o660, 0o600), (0o664, 0o644), (0o666, 0o666), (0o604, 0o600)])
def test_another_group_gets_no_more_than_everybody(before: int, after: int, name: str) -> None:
    assert saved_by(name, before, WRITER, WRITER, []) == (WRITER, WRITER, after)


def test_special_bits_do_not_move_to_another_owner(name: str) -> None:
    assert saved_by(name, 0o6755, WRITER, WRITER, [TEAM]) == (WRITER, TEAM, 0o755)
