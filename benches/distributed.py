"""Times distributed saves and loads beside those of torch.distributed.checkpoint, in turns, in one gloo group.

Run: .venv/bin/python benches/distributed.py [--ranks N] [--rounds N] [--only REGEX] [--directory DIRECTORY]

The wall time is that of the slowest process, from a barrier to a barrier. Memory is the growth of the resident set of
the process that grew most; bytes written are those of all processes. Cold loads drop the page cache, which only root
can do: of the disk, a loop device over memory, and a network filesystem with a latency.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import places

MB = 1e6
LARGE_BYTES = 256 << 20
SHARDS = "shard-{:05d}-model-00001-of-00001.safetensors"


class Run(NamedTuple):
    """One timed run: seconds, bytes by which the resident set grew, and bytes written."""

    seconds: float
    grown: float
    written: float


class Bench:
    """One process of the group."""

    def __init__(
        self, rank: int, size: int, directory: Path, rounds: int, only: str, cold: dict[str, tuple[str, str]]
    ) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh

        torch.set_num_threads(1)
        self.dist = dist
        self.rank, self.size, self.directory, self.rounds, self.only = rank, size, directory, rounds, only
        # The kinds of storage, each with the directory to write to and the one to read from.
        self.cold = cold
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=size)
        self.mesh = DeviceMesh("cpu", torch.arange(size))

    def divided(self, count: int, rows: int, columns: int) -> dict[str, Any]:
        """Returns DTensors whose rows the processes share."""
        import torch
        from torch.distributed.tensor import DTensor, Shard

        def one() -> Any:
            return DTensor.from_local(torch.randn(rows // self.size, columns), self.mesh, [Shard(0)], run_check=False)

        return {f"layers.{number}.weight": one() for number in range(count)}

    def fresh(self, name: str) -> str:
        """Returns an empty directory, once all earlier writes are on the disk."""
        path = self.directory / name
        self.dist.barrier()
        if self.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            os.sync()
        self.dist.barrier()
        return str(path)

    def drop_caches(self) -> None:
        self.dist.barrier()
        if self.rank == 0:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3")
        self.dist.barrier()

    def run(self, work: Callable[[], Any]) -> Run:
        self.dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before, resident = _counter("io", "wchar:"), _counter("status", "VmRSS:") * 1024
        start = time.perf_counter()
        work()
        self.dist.barrier()
        seconds = time.perf_counter() - start
        grown = _counter("status", "VmHWM:") * 1024 - resident
        every: list[Any] = [None] * self.size
        self.dist.all_gather_object(every, (seconds, grown, _counter("io", "wchar:") - before))
        return Run(max(run[0] for run in every), max(run[1] for run in every), sum(run[2] for run in every))

    def compare(
        self,
        title: str,
        ours: Callable[[Any], Any],
        theirs: Callable[[Any], Any],
        prepare: Callable[[str], Any] = lambda who: None,
        rounds: int | None = None,
    ) -> None:
        """Runs both in turns and prints a row."""
        if not re.search(self.only, title):
            return
        runs: dict[str, list[Run]] = {"ours": [], "torch": []}
        for number in range(rounds or self.rounds):
            for who, work in sorted({"ours": ours, "torch": theirs}.items(), reverse=number % 2 == 1):
                prepared = prepare(who)
                runs[who].append(self.run(lambda work=work, prepared=prepared: work(prepared)))
        if self.rank == 0:
            seconds = {who: statistics.median(run.seconds for run in mine) for who, mine in runs.items()}
            for who, mine in runs.items():
                print(
                    f"{title if who == 'ours' else '':<44}{who:<7}{seconds[who] * 1e3:>9.1f} ms"
                    f"{max(run.grown for run in mine) / MB:>8.0f} MB grown{mine[-1].written / MB:>8.0f} MB written"
                    f"{seconds['torch'] / seconds[who]:>8.2f}x",
                    flush=True,
                )

    def measure(self) -> None:
        import torch.distributed.checkpoint as dcp

        from safetensors_torch import distributed as std

        final = {"save_distributed": True, "enable_consolidation": True}

        def save(tensors: dict[str, Any], writer: Any) -> Callable[[str], None]:
            return lambda path: dcp.save(tensors, storage_writer=writer(path, **final))

        def load(tensors: dict[str, Any], reader: Any, path: str) -> Callable[[Any], None]:
            return lambda _: dcp.load(tensors, storage_reader=reader(path))

        large = self.divided(16, LARGE_BYTES // 16 // 4 // 4096, 4096)
        theirs = save(large, dcp.HuggingFaceStorageWriter)
        self.compare("dcp.save, 256 MiB", save(large, std.HuggingFaceStorageWriter), theirs, self.fresh)
        self.compare("save, 256 MiB", lambda path: std.save(large, path), theirs, self.fresh)
        path = self.fresh("saved")
        std.save(large, path)
        readers = [load(large, reader, path) for reader in (std.HuggingFaceStorageReader, dcp.HuggingFaceStorageReader)]
        self.compare("dcp.load, 256 MiB, cached", *readers)
        self.compare("load_into, 256 MiB, cached", lambda _: std.load_into(large, path), readers[1])
        for kind, (files, sources) in self.cold.items():
            [name] = std.save(large, files)
            linked = self.fresh(f"linked-{kind}")
            if self.rank == 0:
                # The network filesystem has no list of its files.
                os.symlink(f"{sources}/{name}", f"{linked}/{name}")
            readers = [
                load(large, reader, linked) for reader in (std.HuggingFaceStorageReader, dcp.HuggingFaceStorageReader)
            ]
            self.compare(f"dcp.load, 256 MiB, cold, {kind}", *readers, lambda _: self.drop_caches())
            self.compare(
                f"load_into, 256 MiB, cold, {kind}",
                lambda _, path=linked: std.load_into(large, path),
                readers[1],
                lambda _: self.drop_caches(),
            )
        small = self.divided(2000, 128, 1)
        self.compare(
            "dcp.save, 2000 tensors of 512 B",
            save(small, std.HuggingFaceStorageWriter),
            save(small, dcp.HuggingFaceStorageWriter),
            self.fresh,
            rounds=1,
        )
        path = self.fresh("small")
        std.save(small, path)
        times: dict[str, list[float]] = {"ours": [], "torch": []}
        readers = [
            load(small, _timed(reader, times[who]), path)
            for who, reader in (("ours", std.HuggingFaceStorageReader), ("torch", dcp.HuggingFaceStorageReader))
        ]
        self.compare("dcp.load, 2000 tensors of 512 B", *readers)
        if self.rank == 0 and times["ours"]:
            medians = {who: statistics.median(mine) for who, mine in times.items()}
            print(f"    its read_data: {json.dumps(medians)} s, {medians['torch'] / medians['ours']:.2f}x")
        if self.rank == 0:
            self.consolidate()
        self.dist.barrier()

    def consolidate(self) -> None:
        """Times the consolidation of two files in one process."""
        import torch
        from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

        from safetensors_torch import distributed as std
        from safetensors_torch import save_file

        if not re.search(self.only, "consolidate"):
            return
        medians: dict[tuple[str, int], float] = {}
        for count in (2000, 20_000):
            source, target = self.directory / f"in{count}", self.directory / "out"
            source.mkdir()
            tensors = {f"layers.{number}.weight": torch.randn(64) for number in range(count)}
            for rank in range(2):
                positions = {name: {"saved_offsets": [64 * rank]} for name in tensors}
                metadata = {"DCP_SHARDING_INFO": json.dumps(positions), "DCP_VERSION": "1.0", "format": "pt"}
                save_file(tensors, source / SHARDS.format(rank + 1), metadata)
            works = {"ours": lambda source=source, target=target: std.consolidate(source, target)}
            if count == 2000:
                files = dict.fromkeys(tensors, 1)
                works["torch"] = lambda source=source, target=target, files=files: consolidate_safetensors_files(
                    str(source), str(target), files
                )
            for who, work in works.items():
                seconds = []
                for _ in range(self.rounds if who == "ours" else 1):
                    shutil.rmtree(target, ignore_errors=True)
                    target.mkdir()
                    start = time.perf_counter()
                    work()
                    seconds.append(time.perf_counter() - start)
                medians[who, count] = statistics.median(seconds)
                print(f"{f'consolidate, {count} tensors':<44}{who:<7}{medians[who, count] * 1e3:>9.1f} ms", flush=True)
        print(f"    torch / ours {medians['torch', 2000] / medians['ours', 2000]:.0f}x,", end=" ")
        print(f"20,000 / 2,000 tensors {medians['ours', 20_000] / medians['ours', 2000]:.1f}", flush=True)


def _timed(reader: type, times: list[float]) -> type:
    """Returns a reader that notes how long its read_data takes."""

    class Timed(reader):
        def read_data(self, plan: Any, planner: Any) -> Any:
            start = time.perf_counter()
            result = super().read_data(plan, planner)
            times.append(time.perf_counter() - start)
            return result

    return Timed


def _counter(file: str, key: str) -> int:
    """Returns a number of this process in a file of /proc."""
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise KeyError(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each")
    parser.add_argument("--only", default="", metavar="REGEX", help="the works whose name matches")
    parser.add_argument("--directory", type=Path, help="where the files go; a temporary directory otherwise")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cold", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        Bench(
            arguments.rank, arguments.ranks, arguments.directory, arguments.rounds, arguments.only, arguments.cold
        ).measure()
        sys.stdout.flush()
        os._exit(0)  # without waiting for the threads of the group
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=arguments.directory) as directory,
        contextlib.ExitStack() as stack,
    ):
        cold: dict[str, tuple[str, str]] = {}
        for kind in ("disk", "loop", "network") if os.geteuid() == 0 else ():
            try:
                place = stack.enter_context(places.at(kind, Path(directory) / kind, LARGE_BYTES))
            except places.Unavailable as missing:
                print(f"no cold loads of {kind}: {missing}")
                continue
            cold[kind] = str(place.files), str(place.sources)
        command = [sys.executable, __file__, *sys.argv[1:], "--directory", directory, "--cold", json.dumps(cold)]
        processes = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(arguments.ranks)]
        worst = max(process.wait() for process in processes)
    sys.exit(worst)


if __name__ == "__main__":
    main()
