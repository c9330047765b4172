"""The pages of the shell command's view, without a browser: data, escapes, files, options, errors."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from obstore.store import from_url

from object_server import ObjectServer
from safetensors_torch import cli, save_file, save_sharded
from safetensors_torch.cli import view
from safetensors_torch.cli.listing import Listing
from view_pages import HOSTILE, Elements, data_of, page_data, small_state


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file(small_state(), "model.safetensors", {"format": "pt", "config": '{"a": 1}'})
    return tmp_path


def run(*arguments: str) -> int:
    return cli.main(arguments)


def columns(side: dict[str, Any], data: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Returns dtype, shape, parameters, bytes, file and offset of each tensor of a side."""
    rows = zip(side["dtype"], side["shape"], side["nbytes"], side["file"], side["begin"], strict=True)
    return [
        (data["dtypes"][dtype], *data["shapes"][shape], nbytes, side["files"][file][0], begin)
        for dtype, shape, nbytes, file, begin in rows
    ]


def test_the_page_has_what_the_headers_have(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("view", "model.safetensors") == 0
    assert capsys.readouterr().out.startswith("model.html: ")
    data = page_data("model.html")
    assert data["title"] == "model.safetensors"
    assert data["names"] == ["layers.2.bias", "layers.2.weight", "layers.10.weight", "steps"]
    (side,) = data["sides"]
    assert side["path"] == "model.safetensors"
    assert side["files"] == [["model.safetensors", os.path.getsize("model.safetensors")]]
    assert side["metadata"] == [["config", '{"a": 1}'], ["format", "pt"]]
    begins = {name: entry.begin for name, entry in Listing("model.safetensors").entries.items()}
    file = "model.safetensors"
    assert columns(side, data) == [
        ("F32", "[0, 5]", 0, 0, file, begins["layers.2.bias"]),
        ("BF16", "[3]", 3, 6, file, begins["layers.2.weight"]),
        ("F32", "[3, 4]", 12, 48, file, begins["layers.10.weight"]),
        ("I64", "[]", 1, 8, file, begins["steps"]),
    ]
    assert data["statistics"] is None and data["changes"] is None


def test_a_checkpoint_of_several_files(here: Path) -> None:
    save_sharded(small_state(), "checkpoint", max_shard_size=50)
    for path in ("checkpoint", "checkpoint/", "checkpoint/model.safetensors.index.json"):
        assert run("view", path, "-o", "page.html", "--force") == 0
        data = page_data("page.html")
        (side,) = data["sides"]
        assert [name for name, _ in side["files"]] == sorted(os.path.basename(f) for f in Listing(path).paths())
        assert [size for _, size in side["files"]] == [
            os.path.getsize(f"checkpoint/{name}") for name, _ in side["files"]
        ]
        for name, row in zip(data["names"], columns(side, data), strict=True):
            assert row[4] == Listing(path).entries[name].file


def test_no_tensors_and_no_metadata(here: Path) -> None:
    save_file({}, "none.safetensors")
    assert run("view", "none.safetensors") == 0
    data = page_data("none.html")
    assert data["names"] == [] and data["sides"][0]["metadata"] is None


def test_the_policy_allows_only_the_style_and_the_script_of_the_page(here: Path) -> None:
    assert run("view", "model.safetensors") == 0
    page = Path("model.html").read_text(encoding="utf-8")
    elements = Elements(page)
    style, _, script = elements.texts
    style_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)
    )
    assert elements.policy == (
        f"default-src 'none'; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'; base-uri 'none';"
        " form-action 'none'; require-trusted-types-for 'script'"
    )
    # The namespace of SVG is a name.
    assert re.findall(r"https?://[^\s\"']+", page) == ["http://www.w3.org/2000/svg"]
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval(", "Function(", "@import"):
        assert forbidden not in page, forbidden
    parts = {path.name for path in view.PARTS.iterdir()}
    assert parts == {*view.SCRIPTS, "page.html", "page.css"}


def content(names: list[str], metadata: list[tuple[str, str]]) -> dict[str, Any]:
    """Returns the data of a page, with names where pages have them."""
    count = len(names)
    numbers = dict.fromkeys(("dtype", "shape", "nbytes", "file", "begin"), [0] * count)
    side = {"path": "".join(names), "files": [[name, 1] for name in names or [""]], "metadata": metadata, **numbers}
    rest = {"dtypes": ["F32"], "shapes": [["[1]", 1]], "statistics": None, "changes": None}
    return {"title": "".join(names), "names": names, "sides": [side], **rest}


def check_round_trip(data: dict[str, Any]) -> None:
    page = view.build(data)
    plain = Elements(view.build(content([], [])))
    elements = Elements(page)
    assert elements.tags == plain.tags
    assert (elements.texts[0], elements.texts[2]) == (plain.texts[0], plain.texts[2])
    assert data_of(page) == json.loads(json.dumps(data))
    assert not set("<>&") & set(elements.texts[1]) and elements.texts[1].isascii()
    page.encode()


# Lone surrogates too: names of files may have bytes that are not UTF-8.
TEXTS = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(), max_size=20),
    st.lists(st.sampled_from(["</", "script", ">", "<!--", "]]>", "&", "{{", "}}", "data"])).map("".join),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(TEXTS, max_size=5), st.lists(st.tuples(TEXTS, TEXTS), max_size=3))
def test_names_cannot_leave_the_data(names: list[str], metadata: list[tuple[str, str]]) -> None:
    check_round_trip(content(names, metadata))


def test_hostile_names_in_a_file(here: Path) -> None:
    metadata = {f"{name}k": name for name in HOSTILE}
    save_file({name: torch.ones(1) for name in HOSTILE}, "hostile.safetensors", metadata)
    assert run("view", "hostile.safetensors") == 0
    data = page_data("hostile.html")
    assert set(data["names"]) == set(HOSTILE) and dict(data["sides"][0]["metadata"]) == metadata
    odd = "a<script>\udcff\n.safetensors"
    os.link("hostile.safetensors", odd)
    assert run("view", odd, "-o", "odd.html") == 0
    data = page_data("odd.html")
    assert data["title"] == data["sides"][0]["path"] == odd


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model.safetensors", "model.html"),
        ("some/where/model.safetensors", "model.html"),
        ("checkpoint/", "checkpoint.html"),
        ("checkpoint/model.safetensors.index.json", "model.html"),
        ("checkpoint/model.safetensors.index.fp16.json", "model.safetensors.index.fp16.html"),
        ("weights.bin", "weights.bin.html"),
        ("s3://bucket/dir/model.safetensors", "model.html"),
        ("https://host/model.safetensors?token=secret", "model.html"),
        ("s3://bucket/dir/", "dir.html"),
    ],
)
def test_the_name_of_the_page(path: str, name: str) -> None:
    assert view.default_name(path) == name


def test_the_page_of_the_current_directory(here: Path) -> None:
    Path("checkpoint").mkdir()
    os.rename("model.safetensors", "checkpoint/model.safetensors")
    os.chdir("checkpoint")
    assert run("view", ".") == 0
    assert page_data("checkpoint.html")["title"] == "checkpoint"


def test_an_existing_page_is_replaced_only_with_force(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.html").write_text("mine")
    for arguments in (
        ["view", "model.safetensors"],
        ["diff", "model.safetensors", "model.safetensors", "--view", "-o"],
    ):
        target = [] if arguments[0] == "view" else ["model.html"]
        assert run(*arguments, *target) == 2
        assert "model.html exists already" in capsys.readouterr().err
        assert Path("model.html").read_text() == "mine"
    os.chmod("model.html", 0o600)
    os.symlink("model.html", "link.html")
    assert run("view", "model.safetensors", "-o", "link.html", "--force", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "path": "link.html",
        "nbytes": os.path.getsize("model.html"),
        "count": 4,
    }
    assert os.path.islink("link.html") and page_data("model.html")["names"]
    assert sorted(os.listdir()) == ["link.html", "model.html", "model.safetensors"]


def test_the_page_has_the_permissions_of_a_new_file(here: Path) -> None:
    mask = os.umask(0o027)
    try:
        assert run("view", "model.safetensors") == 0
    finally:
        os.umask(mask)
    assert os.stat("model.html").st_mode & 0o777 == 0o640


def test_a_failed_write_leaves_the_old_page(here: Path) -> None:
    Path("model.html").write_text("mine")
    # No file may have more than 50 KiB.
    command = 'ulimit -f 50; exec "$0" -m safetensors_torch view model.safetensors --force'
    done = subprocess.run(["bash", "-c", command, sys.executable], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "view: model.html: cannot write the page: File too large; give another target\n"
    assert Path("model.html").read_text() == "mine"
    assert sorted(os.listdir()) == ["model.html", "model.safetensors"]


def test_the_page_does_not_replace_what_it_shows(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.rename("model.safetensors", "weights")
    os.symlink("weights", "link.html")
    before = Path("weights").read_bytes()
    for target in ("weights", "link.html"):
        for command in (["view"], ["diff", "--view", "weights"]):
            assert run(*command, "weights", "-o", target, "--force") == 2
            assert f"{target}: a file of the checkpoint, not a page" in capsys.readouterr().err
    assert Path("weights").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["view", "gone.safetensors"], "No such file or directory: gone.safetensors; did you mean model.safetensors?"),
        (["view", "model.safetensors", "-o", "."], ".: a directory; write ./model.html for a page in it"),
        (["view", "model.safetensors", "-o", "a/b.html"], "a: no such directory; create it: mkdir -p a"),
        (
            ["view", "model.safetensors", "-o", "p.safetensors"],
            "p.safetensors: the name of a checkpoint's file",
        ),
        (["view", "model.safetensors", "-o", "/dev/null"], "/dev/null: not a regular file"),
        (["view", "model.safetensors", "--force", "-o", "/dev/null"], "/dev/null: not a regular file"),
        (["view", "model.safetensors", "--force", "-o", "model.safetensors"], "write model.html"),
        (
            ["diff", "model.safetensors", "model.safetensors", "-o", "x.html"],
            "--output and --force: only a page needs them; add --view",
        ),
    ],
)
def test_errors(here: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""
    assert os.listdir() == ["model.safetensors"]


def test_a_url(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({**small_state(), "large": torch.zeros(1_000_000)}, "model.safetensors", {"format": "pt"})
    with ObjectServer(here) as server:
        server.signature = "secret-signature"
        assert run("view", server.url()) == 0
        assert server.sizes() == [("GET", 1 << 20)]
    page = Path("model.html").read_text(encoding="utf-8")
    assert "secret" not in page + capsys.readouterr().out
    data = data_of(page)
    assert data["sides"][0]["files"] == [["model.safetensors", os.path.getsize("model.safetensors")]]
    assert data["title"] == "model.safetensors" and data["names"][0] == "large"


def test_no_torch_is_imported(here: Path) -> None:
    Path("site", "torch").mkdir(parents=True)
    Path("site", "torch", "__init__.py").write_text("raise RuntimeError('torch is imported')\n")
    for line in (
        ["view", "model.safetensors", "-o", "a.html"],
        ["view", "model.safetensors", "-o", "b.html", "--stats"],
        ["diff", "model.safetensors", "model.safetensors", "--no-values", "--view"],
    ):
        command = [sys.executable, "-m", "safetensors_torch", *line]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "site"}, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), line


def test_statistics(here: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(100, 50)
    weight[0, 0], weight[1, 1], weight[2, :7] = math.nan, -math.inf, 0.0
    tensors = {
        "weight": weight,
        "empty": torch.zeros(0),
        "flags": torch.tensor([True, False, True]),
        "one": torch.ones(1),
    }
    save_file(tensors, "values.safetensors")
    assert run("view", "values.safetensors", "--stats", "--quiet") == 0
    data = page_data("values.html")
    rows = dict(zip(data["names"], data["statistics"], strict=True))
    zeros, nans, infs, minimum, maximum, mean, std, (begin, width, counts) = rows["weight"]
    finite = weight[weight.isfinite()].double()
    assert (zeros, nans, infs) == (7, 1, 1)
    expected = [finite.min(), finite.max(), finite.mean(), finite.std()]
    assert [minimum, maximum, mean, std] == pytest.approx([value.item() for value in expected], rel=1e-6)
    assert sum(counts) == finite.numel() and len(counts) <= 64
    inside = (finite >= begin) & (finite < begin + width)
    assert counts[0] == int(inside.sum()) and begin + width * len(counts) > maximum
    assert rows["empty"] == [0, 0, 0, None, None, None, None, None]
    assert rows["flags"][:5] == [1, 0, 0, 0.0, 1.0]
    assert rows["one"][3:7] == [1.0, 1.0, 1.0, None]


def test_many_histograms_are_coarser(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "_MANY", 1)
    save_file({"a": torch.linspace(0, 1, 1000), "b": torch.zeros(1)}, "values.safetensors")
    assert run("view", "values.safetensors", "--stats") == 0
    begin, width, counts = page_data("values.html")["statistics"][0][7]
    assert len(counts) <= 32 and sum(counts) == 1000 and begin + width * len(counts) >= 1


def test_statistics_of_the_largest_values(here: Path) -> None:
    large = torch.finfo(torch.float64).max
    save_file({"w": torch.tensor([-large, large], dtype=torch.float64)}, "large.safetensors")
    assert run("view", "large.safetensors", "--stats") == 0
    row = page_data("large.html")["statistics"][0]
    assert row[3:5] == pytest.approx([-large, large], rel=1e-6) and row[6] == "Infinity"
    assert sum(row[7][2]) == 2


@pytest.mark.parametrize("number", range(3))
def test_the_examples_in_the_help_work(
    here: Path, number: int, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_sharded(small_state(), "checkpoint", max_shard_size=50)
    obstore.put(from_url(bucket), "model.safetensors", Path("model.safetensors"))
    (example,) = [line for line in view.EXAMPLES.splitlines() if line.startswith("  ")][number:][:1]
    words = shlex.split(example.replace("s3://bucket/", f"{bucket}/"))
    assert words[:2] == ["safetensors-torch", "view"]
    assert run(*words[1:]) == 0
    captured = capsys.readouterr()
    assert captured.out and not captured.err


@pytest.mark.alone
def test_statistics_hold_little_memory(here: Path) -> None:
    """A sparse file of 4 GiB: only its header takes space on the disk."""
    nbytes = 4 << 30
    header = json.dumps({"w": {"dtype": "U8", "shape": [nbytes], "data_offsets": [0, nbytes]}}).encode()
    header += b" " * (-len(header) % 8)
    with open("large.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(header)) + header)
        out.truncate(8 + len(header) + nbytes)
    program = (
        "import re, sys; from _safetensors_torch_start import shell_command; status = shell_command();"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1]); sys.exit(status)"
    )
    command = [sys.executable, "-c", program, "view", "large.safetensors", "--stats"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) * 1024 < 200_000_000
