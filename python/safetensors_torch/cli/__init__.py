"""The command line: ``python -m safetensors_torch ls``, ``verify``, ``diff`` and ``convert``.

Owns the parser, the exit status and the output of errors; each command has a module of its own. The status is 0 for
success, 1 if a file is damaged or differs, and 2 if the command failed.

torch, which takes seconds to import, and the libtorch layer are loaded only for convert and for the values in diff. The
core's C library reads headers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .._exceptions import SafetensorError
from . import convert, diff, ls, verify
from .listing import printable

_COMMANDS = (ls, verify, diff, convert)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def parser() -> argparse.ArgumentParser:
    """Returns the parser, with a subparser for each command."""
    root = _Parser(
        prog="python -m safetensors_torch",
        description="Lists, verifies, compares and converts safetensors files and checkpoints of several files.",
    )
    commands = root.add_subparsers(metavar="COMMAND", required=True)
    for module in _COMMANDS:
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=module.HELP,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.set_defaults(run=module.run)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command in ``arguments``, by default those of the process, and returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        status = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has closed it. Discard the rest of the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, MemoryError, ImportError) as error:
        # Names of files and tensors may contain escape sequences for the terminal.
        lines = [printable(line) for line in str(error).split("\n")]
        print(f"{options.run.__module__.rpartition('.')[2]}:", "\n".join(lines), file=sys.stderr)
        return 2
    return status
