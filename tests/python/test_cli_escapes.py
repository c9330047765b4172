"""What people read of names, metadata and errors cannot control their terminal, nor pass for something else."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path

import obstore
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import from_url

from safetensors_torch import cli, save_file
from safetensors_torch.cli.listing import command_text
from safetensors_torch.cli.terminal import printable, printable_text

# Colours, a title, a line of its own, an erased character; C1, DEL, directions, joiners, blank letters, tags.
CODES = (
    "\x1b[31m\x1b]0;t\x07\x9b1m\x08\x7f\r\t\nok  fine\n\u202e\u2066\u200b\u200d\ufeff\xad\u2028\u3164\ufe0f\U000e0041\\"
)
NOT_UTF8 = os.fsdecode(b"\xff")
FILE, OTHER, WRONG = f"a{CODES}.safetensors", f"b{NOT_UTF8}\x1b[31m.safetensors", f"bad{CODES}.safetensors"
OTHER_PART = f"c{CODES}.safetensors"
INVISIBLE = {*"\u034f\u115f\u1160\u2800\u3164\uffa0"} | {*map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)])}


def faults(text: str) -> set[str]:
    """Returns the characters of ``text`` that can control a terminal or disguise a name, and the lines of a name."""
    found = {c for c in text if c in INVISIBLE or unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")}
    return found - {"\n"} | {line for line in text.splitlines() if line.startswith("ok  fine")}


def write(path: str, header: dict) -> None:
    text = json.dumps(header, ensure_ascii=False).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file(
        {f"t{CODES}": torch.ones(1), f"u.{CODES}": torch.ones(2)}, FILE, {f"k{CODES}": f"v{CODES}", "format": "pt"}
    )
    save_file({f"t{CODES}": torch.zeros(1), f"u{CODES}": torch.ones(1)}, OTHER, {f"k{CODES}": "w"})
    write(WRONG, {f"t{CODES}": {"dtype": f"X{CODES}", "shape": [1], "data_offsets": [0, 4]}})
    write("offsets.safetensors", {f"t{CODES}": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}})
    write("twice.safetensors", {"__metadata__": {f"k{CODES}": 1}})
    base = torch.ones(1)
    torch.save({f"entry{CODES}": 3, f"t{CODES}": base, f"tied{CODES}": base}, f"old{CODES}.bin")
    torch.save({"\ud800\x1b": base}, "surrogate.bin")
    Path(f"cut{CODES}.bin").write_bytes(b"\x80\x02c__builtin__\neval\n\x1b[31m")
    Path(f"sums{CODES}").write_text("no checksum\n")
    for directory, file in (("index", FILE), ("gone", f"gone{CODES}"), ("outside", f"../{CODES}")):
        directory += CODES
        os.mkdir(directory)
        save_file({f"t{CODES}": torch.ones(1)}, f"{directory}/{FILE}")
        save_file({f"u{CODES}": torch.ones(1)}, f"{directory}/{OTHER_PART}")
        weight_map = {f"t{CODES}": file, f"u{CODES}": OTHER_PART}
        Path(directory, "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    os.mkdir(f"chunks{CODES}")
    positions = json.dumps({f"t{CODES}": {"saved_offsets": [0]}})
    saved = {"DCP_SHARDING_INFO": positions, "DCP_VERSION": "1.0"}
    save_file({f"t{CODES}": torch.ones(1)}, f"chunks{CODES}/shard-00001-model-00001-of-00001.safetensors", saved)
    return tmp_path


# For each command what succeeds, and what fails. A command that is not here lists a file.
LINES: dict[str, list[list[str]]] = {
    "ls": [
        [FILE, OTHER],
        [f"index{CODES}"],
        [f"index{CODES}", "--sort", "size"],
        [FILE, "--tree"],
        [FILE, "--depth", CODES],
        [FILE, "--match", CODES],
        [FILE, f"t{CODES}"],
        [f"gone{CODES}"],
        [f"a{CODES}.safetensor"],
        [f"gone{CODES}/x.safetensors"],
        [f"old{CODES}.bin"],
        ["--sort", CODES, FILE],
        [FILE, f"--guess{CODES}"],
        [f"http://127.0.0.1:1/{CODES}.safetensors"],
        [f"s4{CODES}://{CODES}"],
    ],
    "verify": [
        [FILE, OTHER],
        [FILE, "--write-checksums", f"written{CODES}"],
        [FILE, "--checksums", f"sums{CODES}"],
        [FILE, "--checksums", CODES],
        [f"http://{CODES}/x"],
    ],
    "diff": [[FILE, OTHER], [FILE, FILE], [FILE, "offsets.safetensors"], [FILE, OTHER, "--rtol", CODES]],
    "convert": [
        [FILE, f"new{CODES}.safetensors"],
        [FILE, f"new{CODES}"],
        [FILE, OTHER],
        [FILE, f"new{CODES}.bin"],
        [FILE, "new.safetensors", "--dtype", CODES],
        [f"old{CODES}.bin", f"old{CODES}.safetensors", "--skip"],
        [f"old{CODES}.bin", "new.safetensors"],
        [f"old{CODES}.bin", "new.safetensors", "--key", CODES],
        [f"cut{CODES}.bin", "new.safetensors"],
        ["surrogate.bin", "new.safetensors"],
    ],
    "extract": [
        [FILE, f"part{CODES}.safetensors", "*"],
        [FILE, "part.safetensors", f"gone{CODES}"],
        [FILE, f"part{CODES}", "*"],
        [FILE, f"gone{CODES}/x.safetensors", "*"],
    ],
    "rename": [
        [FILE, f"renamed{CODES}.safetensors", "s/t/x/"],
        [FILE, "renamed.safetensors", "s/.*/x/s"],
        [FILE, "renamed.safetensors", f"t{CODES}"],
        [FILE, "renamed.safetensors", "s/[^\x1b]//g"],
        [FILE, "renamed.safetensors", f"s/{CODES}(//"],
    ],
    "metadata": [
        ["get", FILE],
        ["get", FILE, f"k{CODES}"],
        ["get", FILE, f"gone{CODES}"],
        ["set", FILE, f"k{CODES}=w{CODES}"],
        ["set", FILE, CODES],
        ["remove", FILE],
        ["remove", FILE, f"k{CODES}"],
        [f"act{CODES}", FILE],
    ],
    "explain": [[FILE, OTHER], [f"index{CODES}"]],
    "consolidate": [[f"chunks{CODES}", f"whole{CODES}"], [f"index{CODES}", f"whole{CODES}"]],
}
WRONG_FILES = (
    WRONG,
    "offsets.safetensors",
    "twice.safetensors",
    f"gone{CODES}",
    f"gone{CODES}.safetensors",
    f"outside{CODES}",
)


def lines(command: str) -> list[list[str]]:
    target = {"diff": [FILE], "consolidate": ["x"], "convert": ["x"], "extract": ["x.safetensors", "*"]}
    target["rename"] = ["x.safetensors", "s/a/b/"]
    before = ["get"] if command == "metadata" else []
    wrong = [[*before, file, *target.get(command, [])] for file in WRONG_FILES]
    return LINES.get(command, [[FILE], [OTHER], [f"gone{CODES}"]]) + wrong


def check(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command, and returns its output once that is free of faults."""
    try:
        assert cli.main(arguments) in (0, 1, 2)
    except SystemExit as ended:
        assert ended.code == 2
    captured = capsys.readouterr()
    assert captured.out + captured.err, arguments
    assert not faults(captured.out + captured.err), (arguments, captured)
    return captured.out


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_no_command_prints_what_controls_a_terminal(
    command: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in lines(command):
        check(capsys, command, *arguments)
        out = check(capsys, command, *arguments, "--json")
        if out:
            assert out.isascii()
            json.loads(out)


def test_wrong_commands(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word in (CODES, FILE, f"--{CODES}"):
        check(capsys, word)


def test_urls(here: Path, bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    obstore.put(from_url(bucket), "model.safetensors", Path(FILE))
    check(capsys, "ls", f"{bucket}/model.safetensors")
    check(capsys, "ls", f"{bucket}/{CODES}.safetensors")
    check(capsys, "convert", f"{bucket}/{CODES}.safetensors", "new.safetensors")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_the_tables_on_a_terminal(
    encoding: str, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    for arguments in ([FILE, OTHER], [f"index{CODES}"], [FILE, "--tree"], [f"index{CODES}", "--sort", "size"]):
        stdout = Terminal(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stdout)
            assert cli.main(["ls", *arguments]) == 0
        text = stdout.buffer.getvalue().decode(encoding)
        assert "\x1b[1m" in text
        assert not faults(re.sub("\x1b\\[([0-9;]+)m(.*?)\x1b\\[0m", r"\2", text)), text


# Of every kind that is escaped, and of those that are not.
TEXTS = st.text(st.sampled_from([*CODES, *"ab é日x19u0'\"$", "\udcff", "\u0301"]), max_size=12)


@given(TEXTS, TEXTS)
def test_different_names_are_printed_differently(left: str, right: str) -> None:
    assert not faults(printable(left)) and "\n" not in printable(left)
    assert (printable(left) == printable(right)) == (left == right)
    assert not faults(printable_text(left)) and "\n" not in printable_text(left)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("layer.0.weight é 日本", "layer.0.weight é 日本"),
        ("\x1b[31m\n", r"\x1b[31m\n"),
        (r"\x1b", r"\\x1b"),
        ("\x9b\u202e\U000e0041", r"\u009b\u202e\U000e0041"),
        (NOT_UTF8, r"\xff"),
        (" a b ", r"\x20a b\x20"),
    ],
)
def test_how_a_name_is_shown(name: str, shown: str) -> None:
    assert printable(name) == shown


def test_bash_reads_the_commands_in_errors(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for word in (FILE, OTHER, f"it's{CODES}", "plain", r"two \n words", "it's", NOT_UTF8):
        command = command_text("ls", word)
        assert not faults(command)
        shown = subprocess.run(
            ["bash", "-c", f"printf '%s\\0' {command}"], env={"LC_ALL": "C.UTF-8"}, capture_output=True, check=True
        )
        assert shown.stdout.split(b"\0")[:-1] == [b"safetensors-torch", b"ls", os.fsencode(word)]
    assert cli.main(["ls", f"old{CODES}.bin"]) == 2
    command = capsys.readouterr().err.rpartition("convert it: ")[2].strip()
    assert command.startswith("safetensors-torch convert $'old\\x1b")
