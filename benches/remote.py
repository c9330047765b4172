"""Times loads over the network beside downloads with fsspec and the Run:ai Model Streamer, and counts what is sent.

Run: .venv/bin/python benches/remote.py [--rounds N] [--only REGEX] [--subjects REGEX] [--directory DIRECTORY]

The network is object_server.py on this machine: 20 ms before each answer, and 50 MB/s for each connection. The subjects
take turns. Each run has a fresh process, which imports its library, loads the file twice, and checks the values. The
first load also sets up the client.

Rivals that are not installed are left out. Install them without a second torch, and set PYTHONPATH=out/rivals:

    pip install --target out/rivals s3fs aiohttp boto3 humanize
    pip install --target out/rivals --no-deps runai-model-streamer==0.17.0 runai-model-streamer-s3==0.17.0

fsspec downloads with one connection, s3fs with ten. Both then load the file with the reference.

ratio: the time of the first load, divided by ours over the same protocol.
spare: the peak of resident memory above the imports and the tensors. It is negative if a mapped file is not resident.
extra: the bytes that the server sent in addition to those of the tensors.
CPU: the processor time of the first load, in the client and in the server. They share the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import data
import machine
import works

DELAY_MS, CONNECTION_MB = 20, 50
MB, MIB = 1e6, 1 << 20
BUCKET, MODEL, LARGE = "bucket", "network.safetensors", "large.safetensors"

# The large object: as many tensors of as many float32. Its file is sparse, except for the tensor that is read.
TENSORS, ELEMENTS, WANTED = 20, 25_000_000, "9"

HTTP, S3 = f"{works.OURS}, http", f"{works.OURS}, s3"
FSSPEC, S3FS = f"fsspec, {works.REFERENCE}", f"s3fs, {works.REFERENCE}"
LOAD, ONE = "load_file, 498 MB", "one tensor of 100 MB from 2 GB"

# What a load may take above its tensors, and a tensor above its bytes.
MOST_SPARE_MB, MOST_EXTRA_MIB = 64, 2
LEAST_RATIO = 6.0

# The subjects of each work, and the rows whose time the ratios are of.
WORKS = {LOAD: (HTTP, S3, FSSPEC, S3FS, works.STREAMER), ONE: (HTTP, S3, works.STREAMER)}
BASES = {HTTP: HTTP, S3: S3, FSSPEC: HTTP, S3FS: S3, works.STREAMER: S3}


class Run(NamedTuple):
    """One process: the times of its loads, its memory, and what the server has counted."""

    first: float
    again: float
    spare_bytes: int
    cpu_seconds: float
    server_seconds: float
    connections: int
    requests: int
    extra_bytes: float


class Missing(Exception):
    """A rival that is not installed."""


# --- the process that loads


def find(subject: str, work: str, bucket: str, directory: str) -> Callable[[], dict[str, Any]]:
    """Imports the library of a subject. Returns its load."""
    url = f"{bucket}/{MODEL if work == LOAD else LARGE}"
    if subject in (HTTP, S3):
        import obstore.store  # noqa: F401 - the client, which a load imports

        ours = importlib.import_module("safetensors_torch")
        return lambda: ours.load_file(url, names=None if work == LOAD else [WANTED])
    if subject == works.STREAMER:
        importlib.import_module("runai_model_streamer_s3.files.files")
        module = importlib.import_module("runai_model_streamer")
        if (found := importlib.metadata.version("runai-model-streamer")) != works.VERSIONS["streamer"]:
            raise ImportError(f"wanted runai-model-streamer {works.VERSIONS['streamer']}, found {found}")

        def stream() -> dict[str, Any]:
            with module.SafetensorsStreamer() as streamer:
                streamer.stream_file(url, tensor_names=None if work == LOAD else [WANTED])
                return dict(streamer.get_tensors())

        return stream
    import fsspec

    reference = importlib.import_module("safetensors.torch")
    filesystem = fsspec.filesystem("http" if subject == FSSPEC else "s3")

    def download() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=directory) as name:
            filesystem.get(url, f"{name}/{MODEL}")
            return reference.load_file(f"{name}/{MODEL}")

    return download


def load(subject: str, work: str, bucket: str, directory: str) -> None:
    """Loads twice, checks the values, and prints the figures."""
    import torch

    try:
        function = find(subject, work, bucket, directory)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
        return
    pid, seconds = os.getpid(), []
    before, used = machine.reset_peak(pid), cpu_seconds()
    spare = cpu = 0.0
    for number in range(2):
        start = time.perf_counter()
        tensors = function()
        seconds.append(time.perf_counter() - start)
        if number == 0:
            cpu = cpu_seconds() - used
            spare = machine.peak(pid) - before - sum(tensor.nbytes for tensor in tensors.values())
            report_half(seconds[0])
            del tensors
    path = Path(directory) / BUCKET / (MODEL if work == LOAD else LARGE)
    expected = data.read_tensors(path, None if work == LOAD else {WANTED})
    if tensors.keys() != expected.keys():
        raise ValueError(f"{subject}: loaded {sorted(tensors)}")
    for name, tensor in tensors.items():
        if tensor.dtype != expected[name].dtype or not torch.equal(tensor, expected[name]):
            raise ValueError(f"{subject}: {name} has other values")
    print(json.dumps({"again": seconds[1], "spare": spare, "cpu": cpu}), flush=True)


def report_half(seconds: float) -> None:
    """Prints the time of the first load, and waits until the parent has read the counts of the server."""
    print(json.dumps({"first": seconds}), flush=True)
    sys.stdin.readline()


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# --- the process that measures


class Bench:
    """The server, its objects, and the runs."""

    def __init__(self, directory: Path, port: int) -> None:
        self._directory, self._address = directory, f"http://127.0.0.1:{port}"
        self._environment = {
            **os.environ,
            "AWS_ENDPOINT_URL": self._address,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_EC2_METADATA_DISABLED": "true",
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        }

    def counts(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self._address}/.counts") as answer:
            return json.load(answer)

    def run(self, subject: str, work: str) -> Run:
        """Runs a fresh process of a subject."""
        bucket = f"{self._address}/{BUCKET}" if subject in (HTTP, FSSPEC) else f"s3://{BUCKET}"
        command = [sys.executable, __file__, "--load", json.dumps([subject, work, bucket, str(self._directory)])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        before = self.counts()
        with subprocess.Popen(command, env=self._environment, text=True, **pipes) as process:
            half = json.loads(process.stdout.readline() or "{}")
            if "missing" in half:
                raise Missing(half["missing"])
            after = self.counts()
            rest, _ = process.communicate("\n")
        if process.returncode != 0:
            raise SystemExit(f"remote: {work}, {subject}: the process has failed with {process.returncode}")
        whole = half | json.loads(rest)
        counted = {key: after[key] - before[key] for key in before}
        nbytes = data.DATA_SETS["network"].nbytes() if work == LOAD else 4 * ELEMENTS
        return Run(
            whole["first"],
            whole["again"],
            whole["spare"],
            whole["cpu"],
            counted["cpu_seconds"],
            int(counted["connections"]),
            int(counted["requests"]),
            counted["bytes"] - nbytes,
        )

    def measure(self, work: str, subjects: list[str], rounds: int) -> dict[str, list[Run]]:
        """Runs the subjects in turns."""
        runs: dict[str, list[Run]] = {subject: [] for subject in subjects}
        for number in range(rounds):
            for index in range(len(subjects)):
                subject = subjects[(index + number) % len(subjects)]
                if subject not in runs:
                    continue
                try:
                    runs[subject].append(self.run(subject, work))
                except Missing as missing:
                    print(f"note: {work}: {subject} left out: {missing}", flush=True)
                    del runs[subject]
        return runs


def make(directory: Path) -> None:
    """Writes the objects."""
    import torch

    (directory / BUCKET).mkdir()
    program = Path(__file__).with_name("data.py")
    subprocess.run([sys.executable, str(program), "network", str(directory / BUCKET)], check=True)
    entries = {
        str(number): {
            "dtype": "F32",
            "shape": [ELEMENTS],
            "data_offsets": [4 * ELEMENTS * number, 4 * ELEMENTS * (number + 1)],
        }
        for number in range(TENSORS)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with (directory / BUCKET / LARGE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * ELEMENTS * TENSORS)
        file.seek(8 + len(header) + entries[WANTED]["data_offsets"][0])
        file.write(torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0)).numpy().data)


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[int]:
    """Runs the server as a process. Yields its port."""
    program = Path(__file__).with_name("object_server.py")
    limits = ["--delay-ms", str(DELAY_MS), "--connection-mb", str(CONNECTION_MB)]
    command = [sys.executable, str(program), str(directory), *limits]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield int(process.stdout.readline())
        process.stdin.close()


def median(runs: list[Run], key: str) -> float:
    return statistics.median(getattr(run, key) for run in runs)


def show(work: str, runs: dict[str, list[Run]]) -> None:
    """Prints the table of a work, with the times of all runs below."""
    columns = "".join(
        f"{name:>12}" for name in ("first", "again", "ratio", "spare", "extra", "CPU", "connections", "requests")
    )
    print(f"\n{work:<36}{columns}")
    for subject, mine in runs.items():
        base = runs.get(BASES[subject])
        ratio = f"{median(mine, 'first') / median(base, 'first'):.2f}" if base else "-"
        cells = [
            f"{median(mine, 'first'):.3f} s",
            f"{median(mine, 'again'):.3f} s",
            ratio,
            f"{max(run.spare_bytes for run in mine) / MB:.1f} MB",
            f"{max(run.extra_bytes for run in mine) / MIB:.2f} MiB",
            f"{median(mine, 'cpu_seconds'):.2f}+{median(mine, 'server_seconds'):.2f}",
            f"{median(mine, 'connections'):.0f}",
            f"{median(mine, 'requests'):.0f}",
        ]
        print(f"  {subject:<34}" + "".join(f"{cell:>12}" for cell in cells))
    for subject, mine in runs.items():
        first, again = (" ".join(f"{getattr(run, key):.3f}" for run in mine) for key in ("first", "again"))
        print(f"    {subject}: first {first}; again {again}")
    sys.stdout.flush()


def show_targets(results: dict[str, dict[str, list[Run]]]) -> None:
    """Prints which targets are met."""
    loads, ones = results.get(LOAD, {}), results.get(ONE, {})
    print()
    for mine, theirs, least in ((HTTP, FSSPEC, LEAST_RATIO), (S3, works.STREAMER, 1.0)):
        if mine in loads and theirs in loads:
            ratios = [median(loads[theirs], key) / median(loads[mine], key) for key in ("first", "again")]
            word = "met" if min(ratios) >= least else "missed"
            said = f"{ratios[0]:.2f} times as fast at first, {ratios[1]:.2f} times again"
            print(f"{word}: {mine}: at least {least:g} times as fast as {theirs}: {said}")
    for mine in (HTTP, S3):
        if mine in loads:
            most = max(run.spare_bytes for run in loads[mine]) / MB
            word = "met" if most <= MOST_SPARE_MB else "missed"
            print(f"{word}: {mine}: at most {MOST_SPARE_MB} MB above the tensors: {most:.1f} MB")
        if mine in ones:
            most = max(run.extra_bytes for run in ones[mine]) / MIB
            word = "met" if most <= MOST_EXTRA_MIB else "missed"
            print(f"{word}: {mine}: one tensor transfers at most {MOST_EXTRA_MIB} MiB more: {most:.2f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes of each")
    parser.add_argument("--only", default="", metavar="REGEX", help="the works whose name matches")
    parser.add_argument("--subjects", default="", metavar="REGEX", help="the subjects whose name matches")
    parser.add_argument("--directory", type=Path, help="where the files go; a temporary directory otherwise")
    parser.add_argument("--load", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load is not None:
        load(*arguments.load)
        return
    results = {}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.directory) as name:
        make(Path(name))
        with serving(Path(name)) as port:
            for work, subjects in WORKS.items():
                chosen = [subject for subject in subjects if re.search(arguments.subjects, subject)]
                if re.search(arguments.only, work) and chosen:
                    results[work] = Bench(Path(name), port).measure(work, chosen, arguments.rounds)
                    show(work, results[work])
    show_targets(results)


if __name__ == "__main__":
    main()
