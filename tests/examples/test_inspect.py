"""examples/c/inspect against what json.loads says of the same headers, and against its promises of time and memory.

Run: INSPECT=examples/c/inspect/inspect python -m pytest tests/examples/test_inspect.py
"""

from __future__ import annotations

import json
import os
import re
import statistics
import struct
import subprocess
import time
import unicodedata
from pathlib import Path

import pytest

INSPECT = os.path.abspath(os.environ["INSPECT"])
MEBIBYTE = 1 << 20
# What is said of a header of 2.4 MB. Seen: 10 ms and 6.3 MB, of which the program and the C library are 2.
SECONDS, PEAK = 0.1, 12 * MEBIBYTE

ODD_NAMES = (
    "plain.weight",
    "",
    'quote " backslash \\ slash /',
    "nul \0 inside",
    "".join(map(chr, range(0x20))),
    "".join(map(chr, range(0x7E, 0xA2))),
    "é ü 漢字 😀 \u2028 \uffff \U0010ffff",
    "\xad\u061c\u180e\u200b\u200f\u202e\u2060\u206f\ufeff\ufff9\ufffb \U000e0001\U000e007f ends",
)


def encode(tensors: dict[str, tuple[str, list[int], int]], metadata: dict[str, str] | None = None) -> bytes:
    """A header from name -> (dtype, shape, bytes)."""
    header: dict = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, ensure_ascii=False).encode()
    return struct.pack("<Q", len(text)) + text


def write(path: Path, tensors: dict[str, tuple[str, list[int], int]], metadata: dict[str, str] | None = None) -> Path:
    """A file whose data are a hole: it takes no disk, whatever its size."""
    header = encode(tensors, metadata)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(size for _, _, size in tensors.values()))
    return path


def run(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run([INSPECT, *arguments], capture_output=True, check=False, **options)


def read_header(path: Path) -> tuple[dict, int]:
    """The header, and where the data begin."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def expected(path: Path, shards: list[Path] | None = None) -> dict:
    """What --json has to say of a file, or of a checkpoint of several, from the headers."""
    total = {"tensor_count": 0, "nbytes": 0}
    dtypes: dict[str, dict[str, int]] = {}
    listed = []
    for shard in shards or [path]:
        header, data = read_header(shard)
        metadata = header.pop("__metadata__", None)
        tensors = []
        for name, item in sorted(header.items(), key=lambda item: item[0].encode()):
            begin, end = item.pop("data_offsets")
            tensors.append({"name": name, **item, "nbytes": end - begin, "begin": data + begin})
            for sums in (total, dtypes.setdefault(item["dtype"], {"tensor_count": 0, "nbytes": 0})):
                sums["tensor_count"] += 1
                sums["nbytes"] += end - begin
        listed.append({"name": shard.name, "metadata": metadata, "tensors": tensors})
    return {"path": str(path), "shards": listed, **total, "dtypes": dtypes}


def escaped(text: str) -> str:
    """As in a JSON string, with all control and format characters and line ends escaped."""

    def escape(c: str) -> str:
        if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp"):
            return re.sub("(....)", r"\\u\1", c.encode("utf-16-be").hex())
        return f"\\{c}" if c in '"\\' else c

    return "".join(map(escape, text))


@pytest.fixture(
    params=[
        pytest.param(({}, None), id="nothing"),
        pytest.param(({}, {}), id="empty metadata"),
        pytest.param(({"scalar": ("BF16", [], 2)}, None), id="scalar"),
        pytest.param(({"none": ("F32", [0, 7], 0), "last": ("U8", [3], 3)}, None), id="no bytes"),
        pytest.param(({"f4": ("F4", [2, 4], 4), "f6": ("F6_E2M3", [4], 3)}, None), id="packed"),
        pytest.param(({"rank 9": ("I8", [1, 2, 1, 2, 1, 2, 1, 1, 1], 8)}, None), id="many dimensions"),
        pytest.param(({name: ("I64", [1], 8) for name in ODD_NAMES}, None), id="odd names"),
        pytest.param(({}, {name: name[::-1] for name in ODD_NAMES}), id="odd metadata"),
        pytest.param(({"big": ("F64", [1 << 20, 1 << 9], 1 << 32)}, {"format": "pt"}), id="4 GiB"),
    ]
)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / "file.safetensors", *request.param)


def test_json_says_what_the_header_says(path: Path) -> None:
    result = run("--json", path)
    assert (result.returncode, result.stderr) == (0, b"")
    assert json.loads(result.stdout) == expected(path)
    assert result.stdout.count(b"\n") == 1


def text_lines(content: dict) -> list[str]:
    """What the program has to say, in words, of what expected() gives, up to the totals."""
    lines = [f"{content['path']}:"]
    for shard in content["shards"]:
        lines += [f"{shard['name']}:"] if len(content["shards"]) > 1 else []
        entries = sorted((shard["metadata"] or {}).items(), key=lambda item: item[0].encode())
        lines += [f"  # {escaped(key)} = {escaped(value)}" for key, value in entries]
        lines += [
            f"  {item['dtype']:11} {item['nbytes']:14}  {escaped(item['name'])} {item['shape']}"
            for item in shard["tensors"]
        ]
    return lines


def total_lines(content: dict) -> list[str]:
    return [
        f"  {what:11} {sums['nbytes']:14}  in {sums['tensor_count']} tensor{'' if sums['tensor_count'] == 1 else 's'}"
        for what, sums in [*content["dtypes"].items(), ("total", content)]
    ]


def test_text_says_what_the_header_says(path: Path) -> None:
    result = run(path)
    assert (result.returncode, result.stderr) == (0, b"")
    lines = result.stdout.decode().split("\n")
    assert lines.pop() == ""
    content = expected(path)
    want = text_lines(content)
    assert lines[: len(want)] == want
    assert sorted(lines[len(want) :]) == sorted(total_lines(content))
    assert lines[-1] == total_lines(content)[-1]


@pytest.fixture
def sharded(tmp_path: Path) -> list[Path]:
    """The directory of a checkpoint of two files, its index, and the files."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    contents = [{"b": ("F32", [2], 8), "d": ("I8", [3], 3)}, {"a": ("F32", [1], 4), "c": ("BF16", [0], 0)}]
    index = directory / "model.safetensors.index.json"
    files = [directory / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for file, content, metadata in zip(files, contents, ({"format": "pt"}, None), strict=True):
        write(file, content, metadata)
    weight_map = {name: file.name for file, content in zip(files, contents, strict=True) for name in content}
    index.write_text(json.dumps({"metadata": {"total_size": 15}, "weight_map": weight_map}))
    return [directory, index, *files]


@pytest.mark.parametrize("which", [0, 1], ids=["directory", "index"])
def test_a_checkpoint_is_listed_by_its_shards(sharded: list[Path], which: int) -> None:
    path, files = sharded[which], sharded[2:]
    content = expected(path, files)
    result = run("--json", path)
    assert (result.returncode, result.stderr) == (0, b"")
    assert json.loads(result.stdout) == content
    result = run(path)
    assert (result.returncode, result.stderr) == (0, b"")
    lines = result.stdout.decode().splitlines()
    want = text_lines(content)
    assert lines[: len(want)] == want
    assert sorted(lines[len(want) :]) == sorted(total_lines(content))


def test_a_checkpoint_that_misses_a_shard_is_an_error(sharded: list[Path]) -> None:
    sharded[3].unlink()
    result = run("--json", sharded[0])
    assert (result.returncode, result.stdout) == (1, b"")
    assert sharded[3].name.encode() in result.stderr


def test_several_files_give_a_json_object_each(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, {name: ("U8", [1], 1)}) for name in ("b", "a", "-c")]
    result = run("--json", "--", *(path.name for path in paths), cwd=tmp_path)
    assert result.returncode == 0
    assert [json.loads(line)["path"] for line in result.stdout.splitlines()] == ["b", "a", "-c"]


def test_a_path_that_is_not_utf8_gives_valid_json(tmp_path: Path) -> None:
    write(tmp_path / "plain", {"a": ("U8", [1], 1)})
    # A byte that begins nothing, an overlong slash, a surrogate, beyond the last character, and a character cut short.
    name = b"\xff-\xc0\xaf-\xed\xa0\x80-\xf4\x90\x80\x80-\xe2\x82"
    os.rename(tmp_path / "plain", os.path.join(os.fsencode(tmp_path), name))
    result = subprocess.run([INSPECT, "--json", name], cwd=tmp_path, capture_output=True, check=True)
    # As many as there are bytes: each is replaced on its own.
    assert json.loads(result.stdout)["path"] == "-".join("\ufffd" * len(part) for part in name.split(b"-"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(None, "No such file or directory", id="missing"),
        pytest.param("directory", "directory", id="a directory"),
        pytest.param(encode({"a": ("F32", [4], 16)}) + bytes(15), "15", id="cut short"),
        pytest.param(encode({"a": ("F32", [4], 16)})[:30], "header", id="header cut short"),
        pytest.param(b"", "0 byte", id="empty"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull", id="LFS"),
    ],
)
def test_a_bad_file_is_told_and_the_others_listed(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    good = [write(tmp_path / name, {name: ("U8", [1], 1)}) for name in ("first", "last")]
    bad = tmp_path / "bad.safetensors"
    if content == "directory":
        bad.mkdir()
    elif content is not None:
        bad.write_bytes(content)
    result = run("--json", good[0], bad, good[1])
    assert result.returncode == 1
    assert [json.loads(line)["path"] for line in result.stdout.splitlines()] == [str(path) for path in good]
    error = result.stderr.decode()
    assert error.startswith("inspect: ") and str(bad) in error and message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--wrong", "file"], ["-x"], ["--json=1", "file"]])
def test_wrong_arguments_give_the_usage(arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"usage: inspect [--json] FILE_OR_DIRECTORY...\n" in result.stderr


def test_help_is_no_error() -> None:
    result = run("--help")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == b"usage: inspect [--json] FILE_OR_DIRECTORY...\n"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 tensors, 4 GiB of data, a header of 2.4 MB."""
    names = (f"model.layers.{i // 10}.self_attn.q_proj.{i}.weight" for i in range(20_000))
    tensors = {name: ("F32", [4, 13422], 16 * 13422) for name in names}
    return write(tmp_path_factory.mktemp("many") / "many.safetensors", tensors)


@pytest.mark.parametrize("arguments", [[], ["--json"]])
@pytest.mark.parametrize("size", ["few", "many"])
def test_output_that_cannot_be_written_is_an_error(tmp_path: Path, many: Path, size: str, arguments: list[str]) -> None:
    # Found when the program ends, and when its buffer is full.
    path = many if size == "many" else write(tmp_path / "few", {"a": ("U8", [1], 1)})
    with open("/dev/full", "wb") as full:
        result = subprocess.run([INSPECT, *arguments, path], stdout=full, stderr=subprocess.PIPE, check=False)
    assert result.returncode == 1
    assert result.stderr == b"inspect: standard output: No space left on device\n"


def test_a_pipe_without_a_reader_is_an_error(many: Path) -> None:
    # restore_signals=False leaves SIGPIPE ignored, as Python has it, so that the write fails.
    with subprocess.Popen(
        [INSPECT, many], stdout=subprocess.PIPE, stderr=subprocess.PIPE, restore_signals=False
    ) as process:
        process.stdout.close()
        assert process.wait() == 1
        assert process.stderr.read() == b"inspect: standard output: Broken pipe\n"


def test_many_tensors_take_milliseconds(many: Path) -> None:
    times = []
    for _ in range(9):
        start = time.perf_counter()
        result = run("--json", many)
        times.append(time.perf_counter() - start)
        assert result.returncode == 0
    assert json.loads(result.stdout) == expected(many)
    print(f"median {statistics.median(times) * 1e3:.1f} ms")
    assert statistics.median(times) < SECONDS


def test_memory_follows_the_header_and_not_the_data(many: Path) -> None:
    peak = 0
    with subprocess.Popen([INSPECT, "--json", many], stdout=subprocess.PIPE) as process:
        # The program waits at a full pipe while its peak is looked at. That of the finished process would not do: it
        # counts what this one had in memory when it started the other.
        while os.read(process.stdout.fileno(), 16 * 1024):
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    peak = max(peak, int(line.split()[1]) * 1024)
    assert process.returncode == 0
    print(f"peak {peak / MEBIBYTE:.1f} MiB")
    assert 0 < peak < PEAK
