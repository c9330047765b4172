"""Serves objects to benchmarks: ranges over HTTP, and as much of S3 as loads use, with a delay and limited connections.

Owns the simulated network. remote.py starts this program, and measures clients with it.

Run: python benches/object_server.py DIRECTORY [--delay-ms N] [--connection-mb N] [--port N]

Serves DIRECTORY/BUCKET/KEY as http://127.0.0.1:PORT/BUCKET/KEY, which is its address in S3 too (path style). Ignores
signatures. Prints the port, and ends with its standard input. GET /.counts returns what was served so far.
"""

from __future__ import annotations

import argparse
import contextlib
import email.utils
import json
import os
import re
import resource
import socket
import sys
import threading
import time
import urllib.parse
import xml.sax.saxutils
from pathlib import Path

# What a connection sends at a time: 10 ms at 50 MB/s.
PIECE_BYTES = 512 << 10
# How far a connection that was late may catch up. The system wakes threads late if other processes run.
SLACK_SECONDS = 0.02
_MOST_HEAD_BYTES = 64 << 10
_REASONS = {200: "OK", 206: "Partial Content", 404: "Not Found", 405: "Method Not Allowed", 412: "Precondition Failed"}
_REASONS[416] = "Range Not Satisfiable"


class Server:
    """Listens, and has a thread for each connection."""

    def __init__(self, directory: Path, port: int, delay: float, rate: float) -> None:
        self.directory, self.delay, self.rate = directory, delay, rate
        self._listener = socket.create_server(("127.0.0.1", port), backlog=256)
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._counts = {"connections": 0, "requests": 0, "bytes": 0}

    def serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._converse, args=(connection,), daemon=True).start()

    def count(self, **added: int) -> None:
        with self._lock:
            for key, value in added.items():
                self._counts[key] += value

    def counts(self) -> dict[str, float]:
        """Returns the connections, requests and bytes so far, and the seconds of processor time."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        with self._lock:
            return {**self._counts, "cpu_seconds": usage.ru_utime + usage.ru_stime}

    def _converse(self, connection: socket.socket) -> None:
        # A client may go at any time.
        with contextlib.suppress(OSError), connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            Connection(self, connection).serve()


class Connection:
    """Answers the requests of one connection, in order."""

    def __init__(self, server: Server, connection: socket.socket) -> None:
        self._server, self._connection = server, connection
        self._received = b""
        # The time at which the limited rate has carried what was sent so far.
        self._arrived = 0.0

    def serve(self) -> None:
        is_new = 1
        while head := self._read_head():
            line, *fields = head.decode("latin-1").split("\r\n")
            method, target, _ = line.split(" ")
            pairs = (field.partition(":") for field in fields)
            headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
            # The streamer's client sends the whole URL, as HTTP/1.1 allows.
            path, _, query = re.sub("^http://[^/]*", "", target).partition("?")
            if path == "/.counts":
                self._send_text(json.dumps(self._server.counts()), "application/json", is_counted=False)
                continue
            self._server.count(requests=1, connections=is_new)
            is_new = 0
            time.sleep(self._server.delay)
            if method not in ("GET", "HEAD"):
                self._send_head(405, {"Connection": "close"})
                return
            self._answer(method == "HEAD", urllib.parse.unquote(path).strip("/"), query, headers)

    def _read_head(self) -> bytes:
        while b"\r\n\r\n" not in self._received:
            received = self._connection.recv(_MOST_HEAD_BYTES)
            if not received or len(self._received) > _MOST_HEAD_BYTES:
                return b""
            self._received += received
        head, _, self._received = self._received.partition(b"\r\n\r\n")
        return head

    def _answer(self, is_head: bool, path: str, query: str, headers: dict[str, str]) -> None:
        options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        if "list-type" in options and not is_head:
            self._send_text(listing(self._server.directory, path, options), "application/xml")
            return
        file = self._server.directory / path
        if not file.is_file() or ".." in path.split("/"):
            # A HEAD request for a bucket asks whether it exists.
            self._send_head(200 if is_head and "/" not in path and file.is_dir() else 404)
            return
        with file.open("rb", buffering=0) as opened:
            found = os.fstat(opened.fileno())
            start, end, status, fields = 0, found.st_size, 200, {"Accept-Ranges": "bytes"}
            fields["ETag"] = f'"{found.st_mtime_ns:x}-{found.st_size:x}"'
            fields["Last-Modified"] = email.utils.formatdate(found.st_mtime, usegmt=True)
            fields["Content-Type"] = "application/octet-stream"
            if headers.get("if-match", fields["ETag"]) not in (fields["ETag"], "*"):
                self._send_head(412, fields)
                return
            if "range" in headers:
                start, end = range_of(headers["range"], found.st_size)
                if start >= end:
                    self._send_head(416, {"Content-Range": f"bytes */{found.st_size}"})
                    return
                status, fields["Content-Range"] = 206, f"bytes {start}-{end - 1}/{found.st_size}"
            self._send_head(status, fields, end - start)
            if not is_head:
                self._send_file(opened.fileno(), start, end)

    def _send_head(self, status: int, fields: dict[str, str] | None = None, length: int = 0) -> None:
        lines = [f"HTTP/1.1 {status} {_REASONS[status]}", f"Content-Length: {length}"]
        lines += [f"{name}: {value}" for name, value in (fields or {}).items()]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        self._connection.sendall(head)
        self._server.count(bytes=len(head))

    def _send_text(self, text: str, kind: str, is_counted: bool = True) -> None:
        body = text.encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nContent-Type: {kind}\r\n\r\n".encode()
        self._connection.sendall(head + body)
        if is_counted:
            self._server.count(bytes=len(head) + len(body))

    def _send_file(self, file: int, start: int, end: int) -> None:
        """Sends a range from the page cache, each piece once it would have arrived."""
        self._arrived = max(self._arrived, time.monotonic())
        while start < end:
            count = min(PIECE_BYTES, end - start)
            self._arrived = max(self._arrived, time.monotonic() - SLACK_SECONDS) + count / self._server.rate
            if (wait := self._arrived - time.monotonic()) > 0:
                time.sleep(wait)
            stop = start + count
            while start < stop:
                sent = os.sendfile(self._connection.fileno(), file, start, stop - start)
                if sent == 0:
                    raise OSError("the file has become shorter")
                start += sent
            self._server.count(bytes=count)


def range_of(text: str, length: int) -> tuple[int, int]:
    """Returns the start and the end of the bytes that a Range header asks for."""
    first, _, last = text.removeprefix("bytes=").partition("-")
    if not first:
        return max(length - int(last), 0), length
    return int(first), min(int(last) + 1, length) if last else length


def listing(directory: Path, bucket: str, options: dict[str, str]) -> str:
    """Returns the answer of S3 to ListObjectsV2."""
    prefix, delimiter = options.get("prefix", ""), options.get("delimiter")
    objects, directories = [], set()
    for path in sorted((directory / bucket).rglob("*")):
        key = path.relative_to(directory / bucket).as_posix()
        if not path.is_file() or not key.startswith(prefix):
            continue
        if delimiter and delimiter in key[len(prefix) :]:
            directories.add(prefix + key[len(prefix) :].split(delimiter)[0] + delimiter)
            continue
        found = path.stat()
        changed = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(found.st_mtime))
        objects.append(
            f"<Contents><Key>{xml.sax.saxutils.escape(key)}</Key><LastModified>{changed}</LastModified>"
            f"<ETag>&quot;{found.st_mtime_ns:x}-{found.st_size:x}&quot;</ETag><Size>{found.st_size}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )
    prefixes = "".join(
        f"<CommonPrefixes><Prefix>{xml.sax.saxutils.escape(name)}</Prefix></CommonPrefixes>"
        for name in sorted(directories)
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{bucket}</Name><Prefix>{xml.sax.saxutils.escape(prefix)}</Prefix><MaxKeys>1000</MaxKeys>"
        f"<KeyCount>{len(objects) + len(directories)}</KeyCount><IsTruncated>false</IsTruncated>"
        f"{''.join(objects)}{prefixes}</ListBucketResult>"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--delay-ms", type=float, default=20.0, help="before each answer")
    parser.add_argument("--connection-mb", type=float, default=50.0, help="megabytes a second of each connection")
    parser.add_argument("--port", type=int, default=0, help="a free one unless given")
    arguments = parser.parse_args()
    server = Server(arguments.directory, arguments.port, arguments.delay_ms / 1e3, arguments.connection_mb * 1e6)
    print(server.port, flush=True)
    threading.Thread(target=server.serve, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
