"""The shell command ``safetensors-torch``, which is also ``python -m safetensors_torch``.

Owns the parser, the exit status and the output of errors; each command has a module of its own. An error is one line.

torch, which takes seconds to import, and the libtorch layer are loaded only for convert and for the values in diff. The
core's C library does the rest.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from .._exceptions import SafetensorError
from . import consolidate, convert, diff, explain, extract, ls, metadata, rename, stats, verify, view
from .listing import NoMatchError, command_text, near
from .terminal import printable_text

PROGRAM = "safetensors-torch"
_COMMANDS = {
    module.__name__.rpartition(".")[2]: module
    for module in (ls, view, stats, verify, diff, convert, extract, rename, metadata, explain, consolidate)
}
_OTHER_NAMES = {
    **dict.fromkeys(("info", "inspect", "show", "header", "keys", "dump", "cat"), "ls"),
    **dict.fromkeys(("check", "validate", "test"), "verify"),
    **dict.fromkeys(("html", "draw", "plot", "page", "open", "browse"), "view"),
    **dict.fromkeys(("statistics", "stat", "summary", "nan"), "stats"),
    **dict.fromkeys(("compare", "cmp"), "diff"),
    **dict.fromkeys(("cast", "shard", "unshard", "split", "merge", "join", "save", "cp", "copy"), "convert"),
    **dict.fromkeys(("filter", "select", "get"), "extract"),
    **dict.fromkeys(("mv", "map", "prefix"), "rename"),
    **dict.fromkeys(("edit", "set"), "metadata"),
    **dict.fromkeys(("plan", "why"), "explain"),
    "help": "--help",
    "version": "--version",
}
_STATUS = """exit status:
  0  success
  1  a file is damaged or differs, or nothing matches
  2  the command is wrong or failed; the last line on stderr says why
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        see = " See" if message.endswith("?") else "; see"
        self.exit(2, f"{printable_text(message)}{see} {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """Returns the parser, with a subparser for each command."""
    root = _Parser(
        prog=PROGRAM,
        description="Lists, verifies, compares, converts and edits safetensors files and checkpoints of several files.",
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subparsers(metavar="COMMAND")
    for name, module in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.set_defaults(run=module.run, command=command)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command in ``arguments``, by default those of the process, and returns the exit status."""
    arguments = _complete(list(sys.argv[1:] if arguments is None else arguments))
    root = parser()
    _check_command(root, next((word for word in arguments if not word.startswith("-")), None))
    options, others = root.parse_known_args(arguments)
    if options.version:
        from importlib.metadata import version

        print(f"{PROGRAM} {version(PROGRAM)}")
        return 0
    if not hasattr(options, "run"):
        *most, last = _COMMANDS
        root.error(f"name a command: {', '.join(most)} or {last}")
    if others and isinstance(getattr(options, "name", None), list) and not others[0].startswith("-"):
        # argparse takes no words after an option for those that may be missing.
        options.name += [word for word in others if not word.startswith("-")]
        others = [word for word in others if word.startswith("-")]
    if others:
        meant = near(others[0], re.findall("--[a-z-]+", options.command.format_usage()))
        options.command.error(
            f"unrecognized arguments: {' '.join(others)}" + (f"; did you mean {meant}?" if meant else "")
        )
    try:
        status = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has closed it. Discard the rest of the buffer.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except NoMatchError as error:
        _print_error(options, error)
        return 1
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError, MemoryError, ImportError) as error:
        _print_error(options, error)
        return 2
    return status


def _complete(arguments: list[str]) -> list[str]:
    """Returns ``arguments`` with ``ls`` for ``list``, and ``metadata get PATH`` for ``metadata PATH``."""
    words = [index for index, word in enumerate(arguments) if not word.startswith("-")]
    if words and arguments[words[0]] == "list":
        arguments[words[0]] = "ls"
    if len(words) > 1 and arguments[words[0]] == "metadata":
        action = arguments[words[1]]
        if action not in metadata.ACTIONS and os.path.exists(action):
            arguments.insert(words[1], "get")
    return arguments


def _check_command(root: argparse.ArgumentParser, word: str | None) -> None:
    """Ends the process if ``word`` is not a command. argparse would not name the one that is meant."""
    if word is None or word in _COMMANDS:
        return
    if os.path.exists(word):
        root.error(f"{word}: not a command; to list it: {command_text('ls', word)}")
    meant = _OTHER_NAMES.get(word) or near(word, _COMMANDS)
    root.error(
        f"{word}: unknown command; " + (f"did you mean {meant}?" if meant else f"choose from {', '.join(_COMMANDS)}")
    )


def _print_error(options: argparse.Namespace, error: BaseException) -> None:
    # Names of files and tensors may contain anything. Only errors of the build and of torch have several lines.
    lines = str(error).split("\n") if isinstance(error, (ImportError, RuntimeError)) else [str(error)]
    lines = [printable_text(line) for line in lines]
    print(f"{options.run.__module__.rpartition('.')[2]}:", "\n".join(lines), file=sys.stderr)
