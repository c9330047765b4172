"""The shell command as a newcomer types it: tests/guesses/shell/commands.txt."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest
import torch

from safetensors_torch import cli, save_file, save_sharded

TABLE = Path(__file__).resolve().parents[1] / "guesses" / "shell" / "commands.txt"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Creates the files that the table names."""
    monkeypatch.chdir(tmp_path)
    state = {f"layers.{i}.weight": torch.full((4, 4), float(i)) for i in range(12)}
    state.update({"lm_head.bias": torch.ones(3, dtype=torch.bfloat16), "steps": torch.tensor(7)})
    metadata = {"format": "pt", "author": "me"}
    save_file(state, "model.safetensors", metadata)
    save_sharded(state, "checkpoint", metadata=metadata, max_shard_size=300)
    Path("checkpoint/config.json").write_text("{}")
    base = torch.ones(2)
    tied = {"embed.weight": base, "lm_head.weight": base, "w": torch.zeros(1)}
    torch.save(tied, "pytorch_model.bin")
    torch.save(tied, "old.pt", _use_new_zipfile_serialization=False)
    torch.save(tied, "my model.bin")
    os.mkdir("old")
    torch.save(tied, "old/pytorch_model.bin")
    os.mkdir("sub")
    save_file(state, "sub/other.safetensors")
    os.mkdir("two")
    save_file(state, "two/a.safetensors")
    save_file(state, "two/b.safetensors")
    save_file({"w": torch.tensor([1.0, float("nan"), 3.0])}, "nan.safetensors")
    save_file({"w": torch.tensor([1.0, 2.0, 2.0])}, "zeros.safetensors")
    Path("text.txt").write_text("some text, no tensors\n")
    return tmp_path


def rows() -> list[list[str]]:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    return [[cell.strip() for cell in re.split(r" \|(?= )", line, maxsplit=2)] for line in lines]


def run(command: str) -> int:
    try:
        return cli.main(shlex.split(command.replace("\\", "\\\\")))
    except SystemExit as ended:
        return ended.code


def test_each_guess_works_or_is_told_what_does(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = rows()
    assert len(table) > 50
    faults = []
    for status, command, words in table:
        found = run(command)
        printed = capsys.readouterr()
        text, position = printed.out + printed.err, 0
        for word in words.split(" ... "):
            position = text.find(word, position)
            if position < 0:
                break
        if found != int(status) or position < 0:
            faults.append(f"$ {command}\n-> {found}, not {status} with {words}\n{text}")
        # An error is one line, and leaves standard output to results.
        if found and (printed.err.count("\n") > 1 or "usage:" in text):
            faults.append(f"$ {command}\n-> more than one line\n{text}")
    assert not faults, "\n".join(faults)
