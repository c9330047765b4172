"""Checks and measures loads and saves with a GPU, beside what else loads safetensors files.

    python tests/gpu/run.py                          # everything, on the first GPU
    python tests/gpu/run.py --check                  # whether it is right, in some minutes
    python tests/gpu/run.py --bench --sizes 1,5      # how fast it is
    python tests/gpu/run.py --device testaccel       # without a GPU: that this suite runs, and no more

Needs torch and the package safetensors-torch. Others are measured as far as they are installed. The report goes to
stdout, in Markdown, and what is under way to stderr. The exit status is 1 if a check failed, or if a load or save of
this library could not be measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench
import checks
import devices
import machine
import processes
import report

_SIZES, _SIMULATED_SIZES = "1,5,15", "0.1"
_ROUNDS = 3
_PROBE_SECONDS = 600.0  # the simulated device is compiled first


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or testaccel, a simulation; cuda unless given")
    parser.add_argument("--check", action="store_true", help="the checks alone")
    parser.add_argument("--bench", action="store_true", help="the benchmark alone")
    parser.add_argument("--only", metavar="REGEX", default="", help="the checks whose name matches")
    parser.add_argument("--sizes", metavar="GB,GB", help=f"of the large files; {_SIZES} unless given")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help=f"processes a subject; {_ROUNDS} unless given")
    parser.add_argument("--directory", type=Path, help="where files go, twice as much as the largest; a temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the raw figures go")
    parser.add_argument("--prerelease", metavar="DIR", default="", help="where pip put a pre-release of safetensors")
    arguments = parser.parse_args()
    try:
        kind, _ = devices.parse_name(arguments.device)
        sizes = arguments.sizes or (_SIMULATED_SIZES if kind == devices.SIMULATED else _SIZES)
        arguments.sizes = tuple(float(size) for size in sizes.split(","))
    except (devices.DeviceError, ValueError) as error:
        parser.error(str(error))
    if any(size <= 0 for size in arguments.sizes) or arguments.rounds < 1:
        parser.error("sizes must be above zero, and --rounds 1 or more")
    if not arguments.check and not arguments.bench:
        arguments.check = arguments.bench = True
    return arguments


def _shown_command() -> str:
    """The command, without the options that name places on this machine."""
    hidden = ("--directory", "--json", "--prerelease")
    words = []
    skip = False
    for word in sys.argv[1:]:
        if not skip and not word.startswith(hidden):
            words.append(word)
        skip = word in hidden
    return " ".join(["python tests/gpu/run.py", *words])


def _run(arguments: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], bool]:
    """Does what was asked for; gives the results, and whether this library did its part."""
    # Here, as it compiles the library's layer where it must.
    try:
        import safetensors_torch  # noqa: F401
    except ImportError as error:
        sys.exit(f"run.py: {error}")
    device = processes.ask("probe.py", {"device": arguments.device}, _PROBE_SECONDS)
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "command": _shown_command(),
        "simulated": device["simulated"],
        "device": device["described"],
        "machine": machine.describe(directory),
        "packages": machine.packages(),
        "rounds": arguments.rounds,
        "notes": [],
    }
    right = True
    if arguments.check:
        results["checks"] = checks.run_all(arguments.device, directory, arguments.only)
        right = all(one["result"] != "FAILED" for one in results["checks"])
    if arguments.bench:
        prerelease = str(Path(arguments.prerelease).resolve()) if arguments.prerelease else ""
        plan = bench.Plan(
            arguments.device, device["free_bytes"], directory, arguments.sizes, arguments.rounds, prerelease
        )
        run = bench.Bench(plan)
        results["bench"] = run.run()
        results["notes"] += run.notes
        right = right and not run.failures
    return results, right


def main() -> None:
    arguments = _parse()
    # As an exit like others, so that the files, which are large, do not stay behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if arguments.directory:
        arguments.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=arguments.directory) as directory:
        try:
            results, right = _run(arguments, Path(directory))
        except processes.ChildError as error:
            sys.exit(f"run.py: {error}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{report.markdown(results)}")
    if not right:
        sys.exit("run.py: not everything was right: see the lines with FAILED, and the notes")


if __name__ == "__main__":
    main()
