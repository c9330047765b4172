"""Runs programs in Python processes that have imported torch and nothing else.

The import takes two seconds of processor time, so one process, the server, does it once for all tests of a pytest
process. Each program runs in a fork of the server. Use `subprocess` instead for a program that needs LD_PRELOAD,
options of the interpreter, variables that torch reads when it is imported, or a Python without torch.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings


class Process:
    """A program in a fork of the server.

    Args:
        program: the source.
        arguments: sys.argv[1:].
        variables: changes of the environment; None removes a variable.
    """

    def __init__(self, program: str, *arguments: object, **variables: str | None) -> None:
        self._output, self._errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")
        self._channel, theirs = socket.socketpair()
        with theirs:
            files = [theirs.fileno(), self._output.fileno(), self._errors.fileno()]
            socket.send_fds(_server()[0], [b"."], files)
        request = {
            "program": textwrap.dedent(program),
            "arguments": [*map(str, arguments)],
            "variables": {name: value for name, value in {**os.environ, **variables}.items() if value is not None},
            "directory": os.getcwd(),
        }
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._channel.makefile("r")
        self._id = int(self._answers.readline())
        self.returncode: int | None = None

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Waits until the program ends, and returns its standard output and standard error.

        After the timeout, in seconds, the program and its children are killed.
        """
        timer = threading.Timer(timeout, os.killpg, (self._id, signal.SIGKILL))
        timer.start()
        with self._channel, self._answers, self._output, self._errors:
            try:
                self.returncode = int(self._answers.readline())
            finally:
                timer.cancel()
            self._output.seek(0)
            self._errors.seek(0)
            return self._output.read(), self._errors.read()


def run_python(
    program: str, *arguments: object, seconds: float = 180, **variables: str | None
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end. Its status is -SIGKILL if it takes longer than ``seconds``."""
    process = Process(program, *arguments, **variables)
    output, errors = process.communicate(seconds)
    return subprocess.CompletedProcess(program, process.returncode, output, errors)


@functools.cache
def _server() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Starts the server, which ends when this process closes its end of the socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, __file__, str(theirs.fileno())]
        return ours, subprocess.Popen(command, pass_fds=[theirs.fileno()])


def _serve(requests: socket.socket) -> str:
    """Forks a process for each request, and returns its program in that process only."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
    while True:
        message, files, _, _ = socket.recv_fds(requests, 1, 3)
        if not message:
            os._exit(0)
        if os.fork() == 0:
            requests.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            program = _keep(*files)
            if program is not None:
                return program
            os._exit(0)
        for file in files:
            os.close(file)


def _keep(channel: int, output: int, errors: int) -> str | None:
    """Forks the process of a program and reports its id and its status; returns the program in that process only."""
    with socket.socket(fileno=channel) as connection:
        request = json.loads(connection.makefile("r").readline())
        process_id = os.fork()
        if process_id != 0:
            connection.sendall(f"{process_id}\n".encode())
            status = os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])
            with contextlib.suppress(BrokenPipeError):
                connection.sendall(f"{status}\n".encode())
            return None
    os.setsid()
    for file, number in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (errors, 2)):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["variables"])
    os.chdir(request["directory"])
    sys.argv = ["-c", *request["arguments"]]
    sys.path[0:1] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return request["program"]


if __name__ == "__main__":
    import torch  # noqa: F401

    warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
    exec(compile(_serve(socket.socket(fileno=int(sys.argv[1]))), "<string>", "exec"), {"__name__": "__main__"})
