"""Checks and measures loads and saves with a GPU, beside other loaders of safetensors files.

    python tests/gpu/run.py                          # everything, on the first GPU
    python tests/gpu/run.py --check                  # the checks, in some minutes
    python tests/gpu/run.py --bench --sizes 1,5      # the benchmark
    python tests/gpu/run.py --device testaccel       # a test of this suite without a GPU

Needs torch and the package safetensors-torch. Measures other loaders if they are installed. Writes the report in
Markdown to stdout, and progress to stderr. The exit status is 1 if a check failed, or if a load or save of this library
could not be measured.
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
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N, or testaccel, a simulation")
    parser.add_argument("--check", action="store_true", help="runs only the checks")
    parser.add_argument("--bench", action="store_true", help="runs only the benchmark")
    parser.add_argument("--only", metavar="REGEX", default="", help="runs only the checks whose name matches")
    parser.add_argument("--sizes", metavar="GB,GB", help=f"sizes of the large files (default: {_SIZES})")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help=f"processes for each subject (default: {_ROUNDS})")
    parser.add_argument("--directory", type=Path, help="for files, twice the largest size (default: temporary)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the raw figures to FILE")
    parser.add_argument("--prerelease", metavar="DIR", default="", help="directory with a pre-release of safetensors")
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
    """Returns the command without the options that name paths of this machine."""
    hidden = ("--directory", "--json", "--prerelease")
    words = []
    skip = False
    for word in sys.argv[1:]:
        if not skip and not word.startswith(hidden):
            words.append(word)
        skip = word in hidden
    return " ".join(["python tests/gpu/run.py", *words])


def _run(arguments: argparse.Namespace, directory: Path) -> tuple[dict[str, Any], bool]:
    """Runs checks and benchmark. Returns the results, and whether this library passed."""
    # Imported here first, because the import may have to compile the libtorch layer.
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
    # SIGTERM must run the cleanup too: the files are large.
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
        sys.exit("run.py: checks or measurements failed; see the lines with FAILED and the notes")


if __name__ == "__main__":
    main()
