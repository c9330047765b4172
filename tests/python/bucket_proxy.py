"""An HTTP proxy before a server that speaks S3: it records the requests, and answers some of them with errors."""

from __future__ import annotations

import http.client
import http.server
import re
import threading
import urllib.parse
from collections.abc import Callable
from typing import NamedTuple

from object_server import Fault


class Call(NamedTuple):
    """A request: what it does, such as put, or begin, part, complete and abort of an upload in parts; and with what."""

    step: str
    key: str

    @property
    def is_change(self) -> bool:
        """Whether it changes what a reader sees."""
        return self.step in ("put", "complete", "delete")


_STEPS = {"PUT": "put", "GET": "get", "DELETE": "delete", "HEAD": "head", "POST": "post"}


class BucketProxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a port of this computer. All attributes may change at any time.

    Attributes:
        calls: the requests that were answered, in the order of the answers.
        fault: returns the error to answer a request with, or None; it may wait, or end the process.
        seconds: how long each answer takes at least.
    """

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = port
        self.calls: list[Call] = []
        self.fault: Callable[[Call], Fault | None] = lambda call: None
        self.seconds = 0.0
        self.closed = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        pass  # a client that has gone

    def steps(self) -> list[str]:
        return [call.step for call in self.calls]


def _call_of(method: str, target: str, body: bytes) -> Call:
    path, _, query = target.partition("?")
    key = urllib.parse.unquote(path).partition("/")[2].partition("/")[2]
    step = _STEPS[method]
    if re.search(r"(^|&)uploads(=|&|$)", query):
        step = "begin"
    elif "uploadId=" in query:
        step = {"PUT": "part", "POST": "complete", "DELETE": "abort"}[method]
    elif "list-type=" in query:
        step = "list"
    elif re.search(r"(^|&)delete(=|&|$)", query):
        step, key = "delete", " ".join(re.findall("<Key>(.*?)</Key>", body.decode()))
    return Call(step, key)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: BucketProxy

    def do_GET(self) -> None:  # noqa: N802 - the name of the base class
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        call = _call_of(self.command, self.path, body)
        server.closed.wait(server.seconds)
        fault = server.fault(call)
        if fault is not None:
            status, answer, headers = fault.status, fault.body, list(fault.headers.items())
        else:
            upstream = http.client.HTTPConnection("127.0.0.1", server.upstream)
            upstream.request(self.command, self.path, body, dict(self.headers.items()))
            response = upstream.getresponse()
            status, answer, headers = response.status, response.read(), response.getheaders()
            upstream.close()
        server.calls.append(call)
        self.send_response_only(status)
        length = str(len(answer))
        for name, value in headers:
            if name.lower() == "content-length":
                length = value if self.command == "HEAD" else length
            elif name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(answer)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass
