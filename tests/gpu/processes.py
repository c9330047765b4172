"""Separate processes for checks and timed runs, so that a hang, crash or leak affects nothing else.

Owns both sides of the request and the answer, which are JSON, and the end of the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_HERE = Path(__file__).resolve().parent


class ChildError(Exception):
    """A process that did not answer. The text says why."""


def ask(script: str, request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Runs a script of this directory, which calls `answer`, and returns its answer.

    If the process fails after its answer, ``"ended"`` in the answer says how.

    Raises:
        ChildError: it failed, crashed, or took longer than ``seconds``.
    """
    command = [sys.executable, str(_HERE / script), json.dumps(request)]
    with tempfile.TemporaryFile() as errors:
        # A new session, so that its children end with it and Ctrl-C reaches only this process.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )
        try:
            output, _ = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise ChildError(f"no answer for {seconds:.0f} seconds") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        errors.seek(0)
        printed = errors.read().decode(errors="replace")
    try:
        found = json.loads(output)
    except ValueError:
        raise ChildError(f"the process ended with {_ending(child.returncode)}: {_tail(printed)}") from None
    if "error" in found:
        raise ChildError(found["error"])
    if child.returncode != 0:
        found["ended"] = f"{_ending(child.returncode)}: {_tail(printed)}"
    return found


def _ending(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def _tail(text: str, lines: int = 12) -> str:
    kept = [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]
    return "\n".join(kept) or "it printed nothing"


def answer(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Runs ``work`` with the request in the child, and answers with its result or error."""
    # The answer has its own descriptor; output of libraries goes to stderr.
    with os.fdopen(os.dup(1), "w") as channel:
        os.dup2(2, 1)
        try:
            found = work(json.loads(sys.argv[1]))
        except Exception as error:
            text = "".join(traceback.format_exception_only(type(error), error)).strip()
            traceback.print_exc()
            found = {"error": text}
        json.dump(found, channel)
    if "error" in found:
        sys.exit(1)
