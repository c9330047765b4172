"""``ls``: its trees, its orders, and its tables on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from safetensors_torch import cli, save_file
from safetensors_torch.cli.terminal import Column, display_width, print_table, shortened, styled

MODEL = {
    "model.embed_tokens.weight": torch.zeros(8, 2),
    **{f"model.layers.{i}.mlp.{name}.weight": torch.zeros(2, 2) for i in range(3, 12) for name in ("up", "down")},
    **{f"model.layers.{i}.mlp.weight": torch.zeros(4) for i in (0, 1, 2, 13)},
    "model.layers.00.mlp.weight": torch.zeros(4),
    "model.norm.weight": torch.zeros(2, dtype=torch.bfloat16),
    "lm_head": torch.zeros(8),
    "lm_head.bias": torch.zeros(1, dtype=torch.int64),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file(MODEL, "model.safetensors")
    os.mkdir("checkpoint")
    files = ({"a.1": torch.zeros(1), "a.10": torch.zeros(9)}, {"a.2": torch.zeros(4), "b": torch.zeros(0)})
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file(tensors, f"checkpoint/{name}")
        weight_map.update(dict.fromkeys(tensors, name))
    Path("checkpoint/model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def ls(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert cli.main(["ls", *arguments]) == 0
    return capsys.readouterr().out.splitlines()


def json_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert cli.main(["ls", *arguments, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    return result


def test_the_tree_has_modules_of_one_structure_once(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ls(capsys, "model.safetensors", "--tree")[1:-5] == [
        "name                     tensors  parameters   size  dtype, shape",
        "lm_head                        2           9   40 B  F32 [8]",
        "  bias                         1           1    8 B  I64 [1]",
        "model                         25         110  436 B",
        "  embed_tokens.weight          1          16   64 B  F32 [8, 2]",
        "  layers                      23          92  368 B",
        "    [0-2,13].mlp.weight        4          16   64 B  F32 [4]",
        "    00.mlp.weight              1           4   16 B  F32 [4]",
        "    [3-11].mlp                18          72  288 B",
        "      down.weight              9          36  144 B  F32 [2, 2]",
        "      up.weight                9          36  144 B  F32 [2, 2]",
        "  norm.weight                  1           2    4 B  BF16 [2]",
    ]
    assert ls(capsys, "model.safetensors", "--depth", "1")[1:-5] == [
        "name     tensors  parameters   size  dtype, shape",
        "lm_head        2           9   40 B  F32 [8]",
        "model         25         110  436 B",
    ]
    by_size = ls(capsys, "model.safetensors", "--depth", "2", "--sort", "size")[2:-5]
    names = [line.split()[0] for line in by_size]
    assert names == ["model", "layers", "embed_tokens.weight", "norm.weight", "lm_head", "bias"]
    # Together the numbered ones are larger.
    save_file({"x": torch.zeros(10), **{f"{i}": torch.zeros(4) for i in range(5)}}, "group.safetensors")
    by_size = ls(capsys, "group.safetensors", "--tree", "--sort", "size")
    assert [line.split()[0] for line in by_size[2:4]] == ["[0-4]", "x"]
    assert ls(capsys, "model.safetensors", "--tree", "--match", "*.norm.*")[2].startswith("model.norm.weight  ")


def test_the_tree_as_json_has_every_module(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json_of(capsys, "model.safetensors", "--tree")
    assert "tensors" not in result
    head = result["tree"]["children"]["lm_head"]
    assert head["tensor"]["shape"] == [8] and head["children"]["bias"]["tensor"]["name"] == "lm_head.bias"

    def leaves(node: dict[str, Any]) -> list[dict[str, Any]]:
        below = [leaf for child in node.get("children", {}).values() for leaf in leaves(child)]
        found = [node["tensor"], *below] if "tensor" in node else below
        assert node["count"] == len(found) and node["nbytes"] == sum(leaf["nbytes"] for leaf in found)
        return found

    flat = json_of(capsys, "model.safetensors")
    assert sorted(leaves(result["tree"]), key=str) == sorted(flat["tensors"], key=str)
    assert {"count", "parameters", "nbytes", "dtypes"} <= result.keys() & flat.keys()
    assert flat["dtypes"] == {
        "F32": {"count": 25, "parameters": 116, "nbytes": 464},
        "I64": {"count": 1, "parameters": 1, "nbytes": 8},
        "BF16": {"count": 1, "parameters": 2, "nbytes": 4},
    }
    assert all(entry["end"] - entry["begin"] == entry["nbytes"] for entry in flat["tensors"])
    (name, child), *_ = json_of(capsys, "model.safetensors", "--depth", "1")["tree"]["children"].items()
    assert name == "lm_head" and "children" not in child


PARTS = st.sampled_from(["0", "1", "2", "01", "a", "b", "", "[0-1]", "[0-2]"])


@example({"a.0", "a.1", "a.[0-1]"})
@example({"0.a", "1.a", "[0-1].a", "[0-1].b"})
@given(st.sets(st.lists(PARTS, min_size=1, max_size=4).map(".".join), max_size=30))
def test_a_tree_counts_each_tensor_once(names: set[str]) -> None:
    from safetensors_torch._headers import TensorInfo
    from safetensors_torch.cli import tree

    entries = [TensorInfo(name, "F32", [len(name) % 2], 4, "", 0) for name in sorted(names)]
    root = tree.build(entries)
    for folded in (root, tree.folded(root)):
        count = 0
        for line in tree.lines(folded, None):
            children = sum(child.count for child in line.node.children.values())
            own = line.node.count - children
            assert own >= 0 and (own == 0) == (line.node.entry is None)
            count += own
        assert count == len(names)


def test_a_tree_of_hostile_depth(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [".".join("a" * depth) for depth in range(1, 2000, 7)]
    save_file({name: torch.zeros(1) for name in names}, "deep.safetensors")
    assert f"total: {len(names)} tensors" in ls(capsys, "deep.safetensors", "--tree")[-3]
    assert json_of(capsys, "deep.safetensors", "--tree")["count"] == len(names)


@pytest.mark.parametrize(
    ("order", "names"),
    [("name", ["a.1", "a.10", "a.2", "b"]), ("size", ["a.10", "a.2", "a.1", "b"]), ("offset", None)],
)
def test_the_orders_of_several_files(
    order: str, names: list[str] | None, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = json_of(capsys, "checkpoint", "--sort", order)["tensors"]
    if names is None:
        places = [(entry["file"], entry["begin"]) for entry in tensors]
        assert places == sorted(places) and len(places) == 4
    else:
        assert [entry["name"] for entry in tensors] == names
    lines = ls(capsys, "checkpoint", "--sort", order)
    files = [line for line in lines if line.endswith(".safetensors:")]
    assert len(files) == (0 if order == "size" else 2)
    tree = ls(capsys, "checkpoint", "--tree", "--sort", order)
    assert any(line.startswith("a ") for line in tree), tree


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Terminal]:
    """Returns a function that makes the standard output a terminal of some columns."""

    def start(columns: int) -> Terminal:
        stream = Terminal()
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys, "stdout", stream)
        return stream

    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return start


def test_tables_fit_a_terminal(terminal: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    columns = [Column("name", shrink=True), Column("size", ">")]
    rows = [["model.layers.31.mlp.weight", "4 B"], "a line that is longer than the table", ["層の重み", "16 B"]]
    wide = terminal(80)
    print_table(columns, rows)
    assert wide.getvalue().splitlines() == [
        "name                        size",
        "model.layers.31.mlp.weight   4 B",
        "a line that is longer than the table",
        "層の重み                    16 B",
    ]
    narrow = terminal(24)
    print_table(columns, rows)
    assert narrow.getvalue().splitlines()[1] == "model.lay…p.weight   4 B"
    assert narrow.getvalue().splitlines()[3] == "層の重み            16 B"
    # Below the least width the terminal breaks lines.
    terminal(5)
    print_table(columns, rows)
    assert "model.…eight   4 B" in sys.stdout.getvalue()


def test_a_pipe_gets_whole_names_without_styles(here: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    for arguments in ([], ["--tree"], ["--sort", "size"]):
        text = "\n".join(ls(capsys, "checkpoint", "model.safetensors", *arguments))
        assert "\x1b" not in text and "…" not in text
    assert "F32   [8, 2]  64 B  model.embed_tokens.weight" in ls(capsys, "model.safetensors")


@pytest.mark.parametrize(
    ("environment", "on_terminal", "in_pipe"),
    [
        ({}, True, False),
        ({"NO_COLOR": "1"}, False, False),
        ({"NO_COLOR": ""}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"FORCE_COLOR": "1"}, True, True),
        ({"FORCE_COLOR": "0"}, True, False),
        ({"CLICOLOR_FORCE": "1", "TERM": "dumb"}, True, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, False),
    ],
)
def test_colours(
    environment: dict[str, str], on_terminal: bool, in_pipe: bool, terminal: Callable, monkeypatch, here: Path
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for stream, wanted in ((terminal(80), on_terminal), (io.StringIO(), in_pipe)):
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(["ls", "checkpoint"]) == 0
        assert ("\x1b[36mF32\x1b[0m" in stream.getvalue()) == wanted
        stream.truncate(0)
        assert cli.main(["ls", "checkpoint", "--json"]) == 0
        assert "\x1b" not in stream.getvalue()


@given(st.text(st.sampled_from("ab日é\u0301"), max_size=20), st.integers(1, 20), st.sampled_from(["", "red"]))
def test_shortened_texts_fit(text: str, width: int, style: str) -> None:
    os.environ["FORCE_COLOR"] = "1"
    try:
        whole = styled(text, style) if style else text
    finally:
        del os.environ["FORCE_COLOR"]
    short = shortened(whole, width)
    assert display_width(short) <= width
    assert (short == whole) == (display_width(text) <= width)
    if short != whole:
        begin, _, end = short.partition("…")
        assert whole.startswith(begin) and whole.endswith(end)
        # At most one cell is left at each side, if the next character takes two.
        assert display_width(short) >= width - 2


def test_on_a_real_terminal(here: Path) -> None:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "46", "TERM": "xterm", "LC_ALL": "C.UTF-8"}
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "safetensors_torch", "ls", "model.safetensors", "--match", "*layers.3.mlp.up*"]
    done = subprocess.run(command, stdout=theirs, stdin=subprocess.DEVNULL, env=environment, check=False)
    os.close(theirs)
    lines = os.read(ours, 1 << 16).decode().splitlines()
    os.close(ours)
    assert done.returncode == 0
    assert lines[1:3] == [
        "\x1b[1mdtype\x1b[0m  \x1b[1mshape\x1b[0m   \x1b[1msize\x1b[0m  \x1b[1mname\x1b[0m",
        "\x1b[36mF32\x1b[0m    [2, 2]  16 B  model.layers…lp.up.weight",
    ]
