"""The stores of obstore: S3, Google Cloud, Azure and HTTP."""

from __future__ import annotations

import base64
import errno
import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from ._locations import split_query, title_of_url
from ._stores import START_BYTES, Changed, Reader, Store, Writer, missing_client, part_bytes

# A connection without a byte for this long is given up. obstore's own limit is 30 seconds for a whole request, which a
# slow connection needs for the ranges of 16 threads.
_STALL_SECONDS = 20.0
_REQUEST_SECONDS = 24 * 3600.0

# obstore repeats requests that are refused or not answered, and goes on with some bodies that break.
_RETRIES = {"max_retries": 5, "retry_timeout": timedelta(minutes=3)}

# Bodies are copied in pieces of about this size, so that a thread needs no memory for a whole request.
_PIECE_BYTES = 64 << 10

# A read is tried again if a body breaks, after 0.1, 0.2, 0.4 and 0.8 seconds.
_ATTEMPTS = 5
# No attempt begins after this time. One takes some minutes if a server is silent.
_MOST_SECONDS = 60.0
_FIRST_DELAY = 0.1

_PARTS_AT_ONCE = 8

# How long a client of one file alone keeps idle connections: a checkpoint may have hundreds of files.
_IDLE = timedelta(seconds=5)

# The options of clients that obstore finds in the environment, behind AWS_ and so on, unless it is given some.
_OPTIONS = (
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "default_content_type",
    "http1_only",
    "http2_only",
    "pool_idle_timeout",
    "pool_max_idle_per_host",
    "proxy_ca_certificate",
    "proxy_excludes",
    "proxy_url",
    "read_timeout",
    "timeout",
    "user_agent",
)
_PREFIXES = {"s3": "AWS", "s3a": "AWS", "gs": "GOOGLE", "az": "AZURE", "abfs": "AZURE", "abfss": "AZURE"}


def store_of_url(url: str) -> ObstoreStore | _HttpStore:
    """Returns the store of a URL.

    Raises:
        ImportError: obstore is missing.
        ValueError: the URL names no file.
    """
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise missing_client(url, "obstore", "safetensors-torch[remote]") from error
    match = re.fullmatch(r"((\w+)://[^/?]+)/.+", url)
    if match is None:
        raise ValueError(f"{title_of_url(url)} has no path; name a file or a directory in it")
    scheme = match[2].lower()
    if scheme in ("http", "https"):
        return _HttpStore(url)
    prefix = _PREFIXES[scheme]
    given = {key: os.environ.get(f"{prefix}_{key.upper()}") for key in _OPTIONS}
    endpoint = os.environ.get(f"{prefix}_ENDPOINT_URL") or os.environ.get(f"{prefix}_ENDPOINT") or ""
    options = {
        **_client_options(is_plain=endpoint.startswith("http:")),
        **{key: value for key, value in given.items() if value},
    }
    store = from_url(match[1], client_options=options, retry_config=_RETRIES)
    return ObstoreStore(store, f"{title_of_url(match[1])}/")


def _client_options(*, is_plain: bool) -> dict[str, Any]:
    return {
        "timeout": timedelta(seconds=_REQUEST_SECONDS),
        "read_timeout": timedelta(seconds=_STALL_SECONDS),
        **({"allow_http": True} if is_plain else {}),
    }


_process: int | None = None


def _client() -> Any:
    """Returns obstore, whose threads a forked process lacks.

    Raises:
        OSError: this process was forked after obstore was used.
    """
    global _process
    import obstore

    if _process is None:
        _process = os.getpid()
    if _process != os.getpid():
        raise OSError(
            errno.ENOTSUP,
            "this process was forked after URLs were used, and the client (obstore) would wait forever; start such"
            " processes by the method spawn or forkserver, or use no URL before the fork",
        )
    return obstore


class ObstoreStore(Store):
    """A store of obstore: a bucket, or what the user has made."""

    def __init__(self, store: Any, root: str = "") -> None:
        """``root`` is the part of the titles that paths in the store lack."""
        self._store, self._root = store, root

    def _path(self, title: str) -> str:
        return title.removeprefix(self._root)

    def open(self, title: str) -> Reader:
        # An index is the same, byte for byte, if a checkpoint has new values.
        return Object(self._store, self._path(title), compares_time=title.endswith(".json"))

    def list(self, directory: str) -> list[str] | None:
        obstore = _client()
        prefix = self._path(directory).rstrip("/")
        found = obstore.list_with_delimiter(self._store, prefix or None)["objects"]
        return [entry["path"].rpartition("/")[2] for entry in found]

    def create(self, title: str, nbytes: int) -> Writer:
        return _Upload(self._store, self._path(title), nbytes)

    def remove(self, title: str) -> None:
        obstore = _client()
        try:
            obstore.delete(self._store, self._path(title))
        except FileNotFoundError:
            pass


# URLs whose paths are the same whether they are encoded or not.
_PLAIN_URL = re.compile(r"(\w+://[^/?#]+)/((?:[\w.~-]+/)*[\w.~-]+)", re.ASCII)


class _HttpStore(Store):
    """The files beside one URL of a server. A query, such as a signature, is a part of each request."""

    def __init__(self, url: str) -> None:
        self._title = title_of_url(url).rstrip("/")
        path, self._query = split_query(url)
        self._path = path.rstrip("/")
        self._client: Any = None
        self._lock = threading.Lock()

    def _url_of(self, title: str) -> str:
        """Returns the URL of this file, or of one in or beside it. The names of these are not encoded yet."""
        if title.rstrip("/") == self._title:
            return self._path + self._query
        if title.startswith(f"{self._title}/"):
            return f"{self._path}{quote(title.removeprefix(self._title))}{self._query}"
        directory = self._title.rpartition("/")[0]
        return f"{self._path.rpartition('/')[0]}{quote(title.removeprefix(directory))}{self._query}"

    def open(self, title: str) -> Reader:
        url = self._url_of(title)
        match = _PLAIN_URL.fullmatch(url)
        if match is None:
            return object_at_url(url)
        # One client for all files of a checkpoint: each keeps connections.
        with self._lock:
            if self._client is None:
                self._client = _http_store(match[1])
        return Object(self._client, match[2])

    def list(self, directory: str) -> list[str] | None:
        return None

    def create(self, title: str, nbytes: int) -> Writer:
        raise OSError(errno.ENOTSUP, "files of a server of HTTP are only read; save to a bucket, or to a local file")


def object_at_url(url: str, headers: Mapping[str, str] | None = None) -> Object:
    """Returns the file at the URL of a server; ``headers`` are not sent to servers that it redirects to."""
    return Object(_http_store(url, headers, pool_idle_timeout=_IDLE), "")


def _http_store(url: str, headers: Mapping[str, str] | None = None, **more_options: Any) -> Any:
    from obstore.store import HTTPStore

    parts, sent = urlsplit(url), dict(headers or {})
    user, _, host = parts.netloc.rpartition("@")
    if user:
        secret = base64.b64encode(unquote(user).encode()).decode()
        sent.setdefault("Authorization", f"Basic {secret}")
    options = {**_client_options(is_plain=parts.scheme.lower() == "http"), "default_headers": sent, **more_options}
    # The whole URL is the store's, and the path is empty: a path would be encoded again, and lose its query.
    whole = parts._replace(netloc=host, fragment="").geturl()
    return HTTPStore.from_url(whole, client_options=options, retry_config=_RETRIES)


class Object:
    """An object of a store of obstore."""

    def __init__(self, store: Any, path: str, *, compares_time: bool = False) -> None:
        """``compares_time``: the object has changed if it was written again, even with the same bytes."""
        self._obstore, self._store, self._path = _client(), store, path
        self._compares_time = compares_time
        self._condition: dict[str, Any] = {}
        self._identity: tuple[Any, ...] | None = None
        # The first bytes, until they are read.
        self._start: memoryview | None = None
        # Of a server without ranges.
        self._stream: _Stream | None = None
        self.max_requests = 0

    def length(self) -> int:
        # Not HEAD, which a URL signed for GET refuses.
        try:
            return self._retried(self._open)
        except self._obstore.exceptions.NotSupportedError:
            stream = self._stream = _Stream()
            self.max_requests = 1
            return self._retried(lambda: stream.open(self._get))
        except self._obstore.exceptions.GenericError as error:
            if not _is_out_of_range(error):
                raise
            return self._obstore.head(self._store, self._path)["size"]  # an empty object has no ranges

    def _open(self) -> int:
        result = self._get((0, START_BYTES))
        meta = result.meta
        self._start = memoryview(result.bytes())
        tag = meta.get("e_tag")
        # A weak tag matches no If-Match.
        if tag and not tag.startswith("W/"):
            self._condition = {"if_match": tag}
        self._identity = self._identity_of(meta)
        return meta["size"]

    def _identity_of(self, meta: Any) -> tuple[Any, ...]:
        return (*_identity_of(meta), meta["last_modified"] if self._compares_time else None)

    def identity(self) -> str | None:
        return None  # reads compare it

    def read(self, offset: int, nbytes: int) -> Iterator[Any]:
        start, self._start = self._start, None
        if start is not None and offset == 0 and nbytes <= len(start):
            yield start[:nbytes]
            return
        done, attempts, since = 0, 0, time.monotonic()
        while done < nbytes:
            try:
                for piece in self._pieces(offset + done, nbytes - done):
                    yield piece
                    done += len(piece)
            except (ConnectionError, self._obstore.exceptions.GenericError) as failure:
                attempts += 1
                if not _may_pass(failure, attempts, since):
                    raise

    def _pieces(self, offset: int, nbytes: int) -> Iterator[Any]:
        if self._stream is not None:
            yield from self._stream.read(offset, nbytes, self._get)
            return
        result = self._get((offset, offset + nbytes))
        if self._identity is not None and self._identity_of(result.meta) != self._identity:
            raise Changed
        done = 0
        for piece in result.stream(min_chunk_size=_PIECE_BYTES):
            done += len(piece)
            if done > nbytes:
                raise ConnectionError(f"more than {nbytes} bytes arrived")
            yield piece
        if done < nbytes:
            raise ConnectionError(f"{done} of {nbytes} bytes arrived")

    def _get(self, span: tuple[int, int] | None) -> Any:
        options = {**self._condition, **({} if span is None else {"range": span})}
        _client()
        try:
            return self._obstore.get(self._store, self._path, options=options)
        except self._obstore.exceptions.PreconditionError as error:
            raise Changed from error

    def _retried(self, function: Callable[[], int]) -> int:
        """Calls a function, again if a body breaks."""
        since = time.monotonic()
        for attempt in itertools.count(1):
            try:
                return function()
            except (ConnectionError, self._obstore.exceptions.GenericError) as failure:
                if not _may_pass(failure, attempt, since):
                    raise
        raise AssertionError("it returns or raises")


def _may_pass(failure: Exception, attempt: int, since: float) -> bool:
    """Returns whether to try again, after a pause: obstore has repeated requests, but not all bodies."""
    if time.monotonic() - since > _MOST_SECONDS:
        return False
    is_body = isinstance(failure, ConnectionError) or "Error performing" not in str(failure)
    if attempt == _ATTEMPTS or not is_body or _is_out_of_range(failure):
        return False
    time.sleep(_FIRST_DELAY * 2 ** (attempt - 1))
    return True


def _is_out_of_range(failure: Exception) -> bool:
    # Of servers, of memory, and of local files.
    return any(text in str(failure) for text in ("status code: 416", "Invalid range", "range was invalid"))


def _identity_of(meta: Any) -> tuple[Any, ...]:
    """Returns what changes with the bytes of an object: with a tag, servers of one name may differ in the time."""
    return (meta["size"], meta["e_tag"] if meta.get("e_tag") else meta["last_modified"])


# Asks for a range, or for everything.
Get = Callable[[tuple[int, int] | None], Any]


class _Stream:
    """The body of an answer without ranges. Its bytes are read in their order; only the first of them again."""

    def __init__(self) -> None:
        self._identity: tuple[Any, ...] | None = None
        self._lock = threading.Lock()
        self._restart()

    def _restart(self) -> None:
        self._chunks: Any = None
        self._rest = memoryview(b"")
        self._position = 0

    def open(self, get: Get) -> int:
        self._begin(get)
        self._start = b"".join(self._take(min(self._length, START_BYTES)))
        return self._length

    def _begin(self, get: Get) -> None:
        self._restart()
        result = get(None)
        identity = _identity_of(result.meta)
        if self._identity not in (None, identity):
            raise Changed
        self._identity, self._length = identity, result.meta["size"]
        self._chunks = iter(result.stream(min_chunk_size=START_BYTES))

    def read(self, offset: int, nbytes: int, get: Get) -> Iterator[Any]:
        with self._lock:
            start = self._start[offset : offset + nbytes]
            if start:
                yield start
            if len(start) == nbytes:
                return
            if self._chunks is None:
                self._begin(get)  # after a connection that broke
            first = offset + len(start)
            if first < self._position:
                raise OSError(
                    errno.ENOTSUP,
                    "the server has no ranges, so a file is read once, from its start to its end; load it with"
                    " load_file, or download it",
                )
            try:
                for _ in self._take(first - self._position):
                    pass
                yield from self._take(nbytes - len(start))
            except Exception:
                self._restart()
                raise

    def _take(self, nbytes: int) -> Iterator[memoryview]:
        """Yields the next bytes."""
        left = nbytes
        while left > 0:
            if not self._rest:
                chunk = next(self._chunks, None)
                if chunk is None:
                    raise ConnectionError(f"the body ended after {self._position} of {self._length} bytes")
                self._rest = memoryview(chunk)
            part = self._rest[:left]
            self._rest = self._rest[len(part) :]
            self._position += len(part)
            left -= len(part)
            yield part


class _Upload:
    """An upload in parts, which become an object when they are complete."""

    def __init__(self, store: Any, path: str, nbytes: int) -> None:
        part = part_bytes(nbytes)
        self._writer = _client().open_writer(store, path, buffer_size=part, max_concurrency=_PARTS_AT_ONCE)

    def write(self, data: Any) -> Any:
        _client()
        return self._writer.write(data)

    def commit(self) -> None:
        _client()
        self._writer.close()

    def abort(self) -> None:
        self._writer.__exit__(OSError, None, None)  # with an exception, it ends the upload
