"""examples/cpp/s3: what it prints and signs, and which faults it repeats or reports. moto has the bucket.

Run: S3=BUILD/s3 python -m pytest tests/examples/test_s3.py
"""

from __future__ import annotations

import datetime
import http.client
import http.server
import json
import os
import subprocess
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pytest
import torch
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from moto.server import ThreadedMotoServer
from safetensors.torch import save

S3 = os.environ["S3"]
REGION = "eu-north-1"
CREDENTIALS = Credentials("AKIAEXAMPLE", "secret/with+signs", "session/token==")
SIGNED = {
    "AWS_REGION": REGION,
    "AWS_ACCESS_KEY_ID": CREDENTIALS.access_key,
    "AWS_SECRET_ACCESS_KEY": CREDENTIALS.secret_key,
    "AWS_SESSION_TOKEN": CREDENTIALS.token,
}
KEY = "models/v1/model.safetensors"
TENSORS = {
    "large": torch.arange(10_000_000, dtype=torch.int32).view(10, 1_000_000),
    "matrix": torch.arange(24.0).view(4, 6).half(),
    "empty": torch.zeros(0, 3),
}


class Request(NamedTuple):
    """What the example asked for, and the status that it was answered."""

    path: str
    headers: http.client.HTTPMessage
    status: int

    def nbytes(self) -> int:
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        return last - first + 1


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to moto if their signatures are right, which moto does not check."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend = port
        self.credentials: Credentials | None = CREDENTIALS
        self.requests: list[Request] = []
        # What is wrong with the next answers: their status, or a name that _Handler.pass_on knows.
        self.faults: list[int | str] = []
        # Called once, after the request with this number.
        self.after: tuple[int, Callable[[], object]] | None = None
        self.lock = threading.Lock()
        self.closed = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.closed.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        pass  # a client that has gone


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:  # noqa: N802 - the name of the base class
        server = self.server
        with server.lock:
            fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):
            return self.answer(fault, error("Code", "What is wrong."))
        if server.credentials and (wrong := self.signature_error(server.credentials)):
            return self.answer(403, error("SignatureDoesNotMatch", wrong))
        self.pass_on(fault)

    def do_CONNECT(self) -> None:  # noqa: N802
        self.answer(403)

    def signature_error(self, credentials: Credentials) -> str | None:
        """Returns what is wrong with the signature; the other side computes it from the request as S3 does."""
        scheme, _, fields = self.headers.get("Authorization", "").partition(" ")
        given = dict(field.split("=", 1) for field in fields.split(", ")) if fields else {}
        names = given.get("SignedHeaders", "").split(";")
        required = {"host", "x-amz-content-sha256", "x-amz-date"}
        if credentials.token:
            required.add("x-amz-security-token")
        if scheme != "AWS4-HMAC-SHA256" or not required <= set(names) or self.headers["Content-Length"]:
            return f"not signed: {sorted(required - set(names))}"
        if self.headers["X-Amz-Security-Token"] != credentials.token:
            return "another token"
        # As every server does, from the decoded path.
        path = urllib.parse.quote(urllib.parse.unquote(urllib.parse.urlsplit(self.path).path), safe="/~")
        request = AWSRequest(self.command, f"http://{self.headers['Host']}{path}")
        for name in names:
            request.headers[name] = self.headers[name]
        now = datetime.datetime.now(datetime.timezone.utc)
        signed = datetime.datetime.strptime(self.headers["X-Amz-Date"] + "+0000", "%Y%m%dT%H%M%SZ%z")
        if abs(now - signed) > datetime.timedelta(minutes=15):
            return "another time"
        request.context["timestamp"] = self.headers["X-Amz-Date"]
        auth = S3SigV4Auth(credentials, "s3", REGION)
        signature = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
        if (given["Credential"], given["Signature"]) != (auth.scope(request), signature):
            return f"another signature than {signature}"
        return None

    def pass_on(self, fault: str | None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.backend)
        # moto takes the name of the bucket from the host, too.
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        if fault == "no range":
            del headers["Range"]
        connection.request("GET", urllib.parse.urlsplit(self.path).path, headers=headers)
        answer = connection.getresponse()
        body, status = answer.read(), answer.status
        connection.close()
        headers = {name: answer.headers[name] for name in ("ETag", "Content-Range") if answer.headers[name]}
        if fault == "no ETag":
            del headers["ETag"]
        elif fault == "short":
            body = body[:-1]
        elif fault == "another range":
            headers["Content-Range"] = "bytes 1-9/10"
        self.answer(status, body, headers, fault)

    def answer(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, fault: str | None = None
    ) -> None:
        server = self.server
        with server.lock:
            server.requests.append(Request(self.path, self.headers, status))
            call = server.after[1] if server.after and len(server.requests) == server.after[0] else lambda: None
        call()
        if fault == "cut before":
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if fault in ("cut", "stall"):
            self.close_connection = True
            self.wfile.write(body[: len(body) // 2])
            if fault == "stall":
                server.closed.wait()
        else:
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def error(code: str, message: str) -> bytes:
    """An error as S3 writes it, with what must not be printed."""
    hidden = f"<AWSAccessKeyId>{CREDENTIALS.access_key}</AWSAccessKeyId><Token-0>{CREDENTIALS.token}</Token-0>"
    return f"<Error><Code>{code}</Code><Message>{message}</Message>{hidden}</Error>".encode()


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """moto's bucket, which boto3 has made; its port is in the metadata of the client."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    s3 = boto3.resource(
        "s3",
        region_name=REGION,
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id="anyone",
        aws_secret_access_key="anything",
        config=Config(s3={"addressing_style": "path"}),
    )
    bucket = s3.create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": REGION})
    bucket.put_object(Key=KEY, Body=save(TENSORS), ACL="public-read")
    yield bucket
    server.stop()


@pytest.fixture
def proxy(bucket: Any) -> Iterator[Proxy]:
    proxy = Proxy(urllib.parse.urlsplit(bucket.meta.client.meta.endpoint_url).port)
    yield proxy
    proxy.close()


def run(proxy: Proxy, *arguments: str, key: str = KEY, **environment: str) -> subprocess.CompletedProcess:
    variables = {**SIGNED, "AWS_ENDPOINT_URL": proxy.url, **environment}
    return subprocess.run(
        [S3, f"s3://bucket/{key}", *arguments], env=variables, capture_output=True, text=True, check=False, timeout=120
    )


def load(proxy: Proxy, *arguments: str, **options: str) -> str:
    result = run(proxy, *arguments, **options)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def failure(proxy: Proxy, *arguments: str, key: str = KEY, **environment: str) -> str:
    result = run(proxy, *arguments, key=key, **environment)
    assert (result.returncode, result.stdout) == (1, "")
    prefix = f"s3: s3://bucket/{key}: "
    assert result.stderr.startswith(prefix), result.stderr
    for secret in (CREDENTIALS.access_key, CREDENTIALS.secret_key, CREDENTIALS.token):
        assert secret not in result.stderr
    return result.stderr.removeprefix(prefix).rstrip("\n")


def line(name: str, tensor: torch.Tensor) -> str:
    dtype = {torch.int32: "Int", torch.float16: "Half", torch.float32: "Float"}[tensor.dtype]
    return f"{name} {dtype} {list(tensor.shape)} on cpu, sum {tensor.double().sum().item():.17g}\n"


def test_all_tensors_are_those_of_python(proxy: Proxy) -> None:
    printed = load(proxy)
    assert sorted(printed.splitlines(True)) == sorted(line(*item) for item in TENSORS.items())
    assert {request.status for request in proxy.requests} == {206}
    assert max(request.nbytes() for request in proxy.requests) <= 8 << 20
    etag = proxy.requests[1].headers["If-Match"]
    assert all(request.headers["If-Match"] == etag for request in proxy.requests[1:]) and etag.startswith('"')


def test_a_slice_reads_its_rows_and_no_others(proxy: Proxy) -> None:
    assert load(proxy, "matrix") == line("matrix", TENSORS["matrix"])
    # The length, and the first mebibyte with the header.
    assert [request.nbytes() for request in proxy.requests] == [1, 1 << 20, 48]
    assert load(proxy, "large", "7:9") == line("large", TENSORS["large"][7:9])
    assert sum(request.nbytes() for request in proxy.requests[5:]) == 8_000_000


def test_a_checkpoint_of_several_files(proxy: Proxy, bucket: Any) -> None:
    files = {name: f"model-0000{number}-of-00003.safetensors" for number, name in enumerate(TENSORS, 1)}
    for name, file in files.items():
        bucket.put_object(Key=f"llm/{file}", Body=save({name: TENSORS[name]}))
    index = "llm/model.safetensors.index.json"
    bucket.put_object(Key=index, Body=json.dumps({"weight_map": files}))
    for key in ("llm", "llm/", index):
        assert sorted(load(proxy, key=key).splitlines(True)) == sorted(line(*item) for item in TENSORS.items())
        assert load(proxy, "large", "7:9", key=key) == line("large", TENSORS["large"][7:9])
    bucket.Object(f"llm/{files['matrix']}").delete()
    result = run(proxy, key=index)
    assert result.returncode == 1
    assert result.stderr.startswith(f"s3: s3://bucket/llm/{files['matrix']}: HTTP status 404: NoSuchKey")


@pytest.mark.parametrize("key", ["a b/ü+&=?#%41/../~x'(1)*!@:,;$[]", "a//b", "."])
def test_every_key_is_signed(proxy: Proxy, bucket: Any, key: str) -> None:
    bucket.put_object(Key=key, Body=save({"matrix": TENSORS["matrix"]}))
    assert load(proxy, key=key) == line("matrix", TENSORS["matrix"])


def test_a_wrong_secret_is_refused(proxy: Proxy) -> None:
    text = failure(proxy, AWS_SECRET_ACCESS_KEY="another")
    assert (
        text.startswith("HTTP status 403: SignatureDoesNotMatch: another signature than ")
        and "check AWS_ACCESS_KEY_ID" in text
    )
    assert failure(proxy, AWS_SESSION_TOKEN="").startswith(
        "HTTP status 403: SignatureDoesNotMatch: not signed: ['x-amz-security-token']"
    )
    assert failure(proxy, AWS_REGION="us-east-1").startswith(
        "HTTP status 403: SignatureDoesNotMatch: another signature than "
    )
    assert failure(proxy, AWS_ACCESS_KEY_ID="").startswith("HTTP status 403: SignatureDoesNotMatch: not signed: ")
    assert len(proxy.requests) == 4


def test_a_token_is_optional_and_so_are_keys(proxy: Proxy) -> None:
    proxy.credentials = Credentials(CREDENTIALS.access_key, CREDENTIALS.secret_key)
    assert load(proxy, "matrix", AWS_SESSION_TOKEN="") == line("matrix", TENSORS["matrix"])
    proxy.credentials = None
    assert load(proxy, "matrix", AWS_ACCESS_KEY_ID="") == line("matrix", TENSORS["matrix"])
    assert not {"Authorization", "X-Amz-Security-Token"} & set(proxy.requests[-1].headers)


def test_a_host_without_a_port_is_signed(proxy: Proxy) -> None:
    environment = {"AWS_ENDPOINT_URL": "http://storage.example/", "http_proxy": proxy.url}
    assert load(proxy, "matrix", **environment) == line("matrix", TENSORS["matrix"])
    assert proxy.requests[0].path == f"http://storage.example/bucket/{KEY}"


def test_without_an_endpoint_the_bucket_is_amazons(proxy: Proxy) -> None:
    failure(proxy, AWS_ENDPOINT_URL="", https_proxy=proxy.url)
    assert {request.path for request in proxy.requests} == {f"bucket.s3.{REGION}.amazonaws.com:443"}


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "cut before", "short", "another range"])
def test_passing_faults_pass(proxy: Proxy, fault: int | str) -> None:
    proxy.faults = [fault, fault]
    assert load(proxy, "large") == line("large", TENSORS["large"])
    # While the threads read.
    proxy.requests.clear()
    proxy.after = (2, lambda: proxy.faults.extend([fault] * 3))
    assert load(proxy, "large") == line("large", TENSORS["large"])
    assert proxy.faults == []


def test_a_connection_that_stalls_is_given_up(proxy: Proxy) -> None:
    proxy.after = (2, lambda: proxy.faults.append("stall"))
    begin = time.monotonic()
    assert load(proxy, "large", "0:1") == line("large", TENSORS["large"][0:1])
    assert 9 < time.monotonic() - begin < 60


def test_faults_that_stay_are_errors(proxy: Proxy) -> None:
    proxy.faults = [503] * 6
    assert failure(proxy) == "HTTP status 503: Code: What is wrong"
    assert failure(proxy, key="none").startswith("HTTP status 404: NoSuchKey: The specified key does not exist")
    proxy.faults = [403]
    assert (
        failure(proxy) == "HTTP status 403: Code: What is wrong; check AWS_ACCESS_KEY_ID and the policy of the bucket"
    )
    proxy.faults = [301]
    assert failure(proxy) == "HTTP status 301: Code: What is wrong; check AWS_REGION and AWS_ENDPOINT_URL"
    proxy.faults = ["no range"]
    assert failure(proxy) == "the server ignores Range; download the object, then load the file"
    proxy.faults = ["no ETag"]
    assert "the server sent no ETag" in failure(proxy)
    proxy.after = (len(proxy.requests) + 2, lambda: proxy.faults.append(403))
    assert 'for tensor "large"' in failure(proxy, "large", "0:1")


def test_a_server_that_is_not_there_is_an_error(proxy: Proxy) -> None:
    proxy.close()
    assert "Failed to connect to 127.0.0.1" in failure(proxy)


def test_a_replaced_object_is_an_error(proxy: Proxy, bucket: Any) -> None:
    bucket.put_object(Key="replaced", Body=save(TENSORS))
    other = save({**TENSORS, "large": TENSORS["large"] + 1})
    # After the length and the header.
    proxy.after = (2, lambda: bucket.put_object(Key="replaced", Body=other))
    assert failure(proxy, key="replaced").startswith("the object was replaced while it was read; open it again")
    assert proxy.requests[-1].status == 412
    proxy.requests.clear()
    proxy.after = (2, lambda: bucket.Object("replaced").delete())
    assert failure(proxy, key="replaced").startswith("HTTP status 404: NoSuchKey")


def test_other_objects_are_errors_of_the_format(proxy: Proxy, bucket: Any) -> None:
    bucket.put_object(Key="empty", Body=b"")
    bucket.put_object(Key="text", Body=b"<html>not found</html>")
    assert "0 byte(s)" in failure(proxy, key="empty")
    failure(proxy, key="text")
    assert {request.status for request in proxy.requests} == {206, 416}


@pytest.mark.parametrize("url", ["model.safetensors", "s3://bucket", "s3:///key", "https://bucket/key"])
def test_other_urls_are_errors(url: str) -> None:
    result = subprocess.run([S3, url], env={}, capture_output=True, text=True, check=False)
    expected = f"s3: {url}: not an object in a bucket; write s3://BUCKET/KEY\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", expected)


@pytest.mark.parametrize("arguments", [[], ["a", "b", "1"], ["a", "b", "1:"], ["a", "b", "1:2", "c"], ["a", "--wrong"]])
def test_wrong_arguments_give_the_usage(arguments: list[str], tmp_path: Path) -> None:
    result = subprocess.run([S3, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "usage: s3 s3://BUCKET/KEY" in result.stderr
