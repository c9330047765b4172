"""HTTP servers on loopback that fail as buckets, servers and networks do.

ObjectServer serves the files of a directory. CuttingProxy breaks or stalls the connections to any server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import os
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

_PIECE = 64 << 10


@dataclasses.dataclass(frozen=True)
class Fault:
    """How one answer differs from the right one."""

    # Answers with this status and this body, and without the object.
    status: int = 0
    body: bytes = b""
    # In place of those of the object; with an ETag, If-Match is ignored.
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # The share of the body that is sent. Then the connection is closed, or stalls until the server is closed.
    share: float = 1.0
    stalls: bool = False
    # Seconds between pieces of 64 KiB.
    pause: float = 0.0


CUT = Fault(share=0.5)
STALLED = Fault(share=0.5, stalls=True)
SLOW = Fault(pause=0.002)
# What S3 answers after the end of a session.
EXPIRED = Fault(
    400,
    b'<?xml version="1.0"?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message>'
    b"<Token-0>secret-session</Token-0></Error>",
    {"Content-Type": "application/xml"},
)


# Another object is there by now.
REPLACED = Fault(headers={"ETag": '"two"', "Last-Modified": "Mon, 30 Nov 2026 09:00:00 GMT"})


def redirect(url: str, status: int = 302) -> Fault:
    return Fault(status, headers={"Location": url})


class Request(NamedTuple):
    """What a client asked for, and the answer.

    nbytes is the length of the body, even if it is cut. The names of the headers are in lower case.
    """

    method: str
    target: str
    status: int
    nbytes: int
    headers: Mapping[str, str]


class ObjectServer(http.server.ThreadingHTTPServer):
    """Serves the files of a directory with ranges and conditions. All attributes may change at any time."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, directory: Path, handler: type[Handler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.directory = directory
        self.requests: list[Request] = []
        # Of the next answers to GET, and to HEAD. A number is a status.
        self.faults: list[Fault | int] = []
        self.head_faults: list[Fault | int] = []
        # Of all other answers to GET.
        self.lasting_fault: Fault | int | None = None
        # Ranges that begin before this have no faults.
        self.faulty_from = 0
        self.etag: str | None = '"one"'
        self.modified: str | None = "Mon, 30 Nov 2026 08:00:00 GMT"
        self.has_ranges = True
        # Requests need this X-Amz-Signature in the query, and one of these methods: S3 signs the method too.
        self.signature: str | None = None
        self.signed_methods = ["GET"]
        # Requests need this header.
        self.authorization: str | None = None
        # Seconds before each answer.
        self.delay = 0.0
        # By path: the URL of a redirect.
        self.redirects: dict[str, str] = {}
        self.closed = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.shutdown()
        self.server_close()

    def url(self, name: str = "model.safetensors") -> str:
        """Returns the URL of a file, with the signature if one is needed."""
        query = f"?X-Amz-Signature={self.signature}" if self.signature else ""
        return f"http://127.0.0.1:{self.server_port}/{urllib.parse.quote(name)}{query}"

    def sizes(self) -> list[tuple[str, int]]:
        """Returns the methods and the lengths of the answers."""
        return [(request.method, request.nbytes) for request in self.requests]

    def handle_error(self, *_: object) -> None:
        pass  # a client that has gone


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: ObjectServer

    def do_GET(self) -> None:  # noqa: N802 - the name of the base class
        server, target = self.server, urllib.parse.urlsplit(self.path)
        server.closed.wait(server.delay)
        fault = self.next_fault()
        if fault.status:
            return self.answer(fault.status, fault.body, fault.headers, fault)
        if server.authorization and self.headers.get("Authorization") != server.authorization:
            return self.answer(401)
        if server.signature:
            query = urllib.parse.parse_qs(target.query)
            if query.get("X-Amz-Signature") != [server.signature] or self.command not in server.signed_methods:
                return self.answer(403)
        if target.path in server.redirects:
            return self.answer(302, headers={"Location": server.redirects[target.path]})
        path = server.directory / urllib.parse.unquote(target.path).strip("/")
        if not path.is_file():
            return self.answer(404)
        self.send_file(path, fault)

    do_HEAD = do_GET  # noqa: N815

    def next_fault(self) -> Fault:
        server = self.server
        if self.command == "HEAD":
            fault = _taken(server.head_faults)
        elif int(self.headers.get("Range", "bytes=0-")[6:].partition("-")[0]) < server.faulty_from:
            fault = None
        else:
            fault = _taken(server.faults) or server.lasting_fault
        return Fault(fault) if isinstance(fault, int) else fault or Fault()

    def send_file(self, path: Path, fault: Fault) -> None:
        """Answers with the bytes of a file, or those of the range."""
        server, size = self.server, path.stat().st_size
        # A weak tag never matches, says RFC 9110.
        condition = self.headers.get("If-Match")
        is_met = condition is None or (condition == server.etag and not condition.startswith("W/"))
        if not is_met and "ETag" not in fault.headers:
            return self.answer(412)
        headers = {"ETag": server.etag, "Last-Modified": server.modified, **fault.headers}
        first, end, status = 0, size, 200
        if server.has_ranges and "Range" in self.headers:
            start, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            first, end, status = int(start), min(int(last or size) + 1, size), 206
            if first >= size:
                return self.answer(416, headers={"Content-Range": f"bytes */{size}"})
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        if server.has_ranges:
            headers["Accept-Ranges"] = "bytes"
        body = b""
        if self.command == "GET":
            with open(path, "rb") as file:
                body = os.pread(file.fileno(), end - first, first)
        present = {name: value for name, value in headers.items() if value is not None}
        self.answer(status, body, present, fault, end - first)

    def answer(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        fault: Fault | None = None,
        length: int | None = None,
    ) -> None:
        fault = fault or Fault()
        length = len(body) if length is None else length
        sent = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append(Request(self.command, self.path, status, length, sent))
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        end = int(len(body) * fault.share)
        piece = _PIECE if fault.pause else end + 1
        for start in range(0, end, piece):
            self.wfile.write(body[start : min(start + piece, end)])
            if fault.pause:
                self.wfile.flush()
                self.server.closed.wait(fault.pause)
        if end < len(body):
            self.wfile.flush()
            if fault.stalls:
                self.server.closed.wait()
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def _taken(faults: list[Fault | int]) -> Fault | int | None:
    """Removes and returns the first fault; several threads do so."""
    with contextlib.suppress(IndexError):
        return faults.pop(0)
    return None


class CuttingProxy:
    """Passes connections on to a port of this computer, and breaks each after some bytes of the answers.

    Args:
        port: the port of the server.
        limits: for each connection in turn, how many bytes of answers pass; None passes all. So do the connections
            after the last of the limits.
        stalls: connections stop at their limit, and stay open until the proxy is closed.
    """

    def __init__(self, port: int, limits: Iterable[int | None], *, stalls: bool = False) -> None:
        self._server, self._limits, self._stalls = port, iter(limits), stalls
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        # The connections that were accepted, and those that were broken.
        self.accepted = self.broken = 0
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        for open_socket in (self._listener, *self._sockets):
            _close(open_socket)

    def url(self, url: str) -> str:
        """Returns a URL of the server with the port of the proxy."""
        return url.replace(f":{self._server}/", f":{self.port}/", 1)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self.accepted += 1
                server = socket.create_connection(("127.0.0.1", self._server))
                self._sockets += (client, server)
                threading.Thread(target=self._copy, args=(client, server, None), daemon=True).start()
                limit = next(self._limits, None)
                threading.Thread(target=self._copy, args=(server, client, limit), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, limit: int | None) -> None:
        left = limit
        with contextlib.suppress(OSError):  # one of the two has gone
            while data := source.recv(_PIECE):
                target.sendall(data[:left])
                if left is not None:
                    left -= len(data)
                    if left <= 0:
                        self.broken += 1
                        if self._stalls:
                            return
                        # Closing resets the connection.
                        target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        break
        _close(source)
        _close(target)


def _close(open_socket: socket.socket) -> None:
    with contextlib.suppress(OSError):
        open_socket.shutdown(socket.SHUT_RDWR)
    open_socket.close()
