"""The repositories of the Hugging Face Hub: files of its local cache, or read in ranges.

huggingface_hub has the endpoint, the token and the cache; obstore reads. huggingface_hub's own filesystem reads 5 MiB
more than each range, and asks the Hub for each.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

from ._exceptions import os_error
from ._locations import title_of_url
from ._store_fsspec import FsspecStore
from ._store_obstore import Object, object_at_url
from ._stores import Reader, Store, Writer, is_denied, missing_client, text_of

# The revision is a branch, a tag, a commit, or refs/pr/N and refs/convert/NAME.
_URL = re.compile(
    r"(hf://(?:(datasets|models|spaces)/)?([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?)(?:/(.*))?",
    re.IGNORECASE,
)
_COMMIT = re.compile("[0-9a-f]{40}")

# Seconds between the attempts to reach the Hub.
_DELAYS = (0.5, 2.0, None)


def is_in_repository(url: str) -> bool:
    """Returns whether this is a URL in a repository; those of buckets are not."""
    return _URL.fullmatch(url) is not None and not url.lower().startswith("hf://buckets/")


class HubStore(Store):
    """The files of one revision of a repository. A branch is resolved once: one that moves changes nothing."""

    def __init__(self, url: str) -> None:
        match = _URL.fullmatch(url)
        assert match is not None  # is_in_repository
        self._url, self._root = url, title_of_url(match[1]) + "/"
        kind, self._repository = match[2], match[3]
        self._where: dict[str, Any] = {
            "repo_id": self._repository,
            "repo_type": kind and kind.lower().removesuffix("s"),
        }
        self._revision = unquote(match[4] or "main")
        # What cached() has found, for open().
        self._found: dict[str, str | _HubFile] = {}

    def open(self, title: str) -> Reader:
        found = self._found.pop(title, None) or self._find(title)
        return _CachedFile(found) if isinstance(found, str) else found

    def cached(self, title: str) -> str | None:
        """Returns the path of a file in the local cache of the Hub, if it is there."""
        found = self._found[title] = self._find(title)
        return found if isinstance(found, str) else None

    def _find(self, title: str) -> str | _HubFile:
        """Returns the path of a file in the local cache of the Hub, or what reads it.

        If the Hub cannot be reached, the cached file of the branch is taken, as huggingface_hub does.

        Raises:
            ImportError: huggingface_hub is missing.
            OSError: there is no such file, or it is private.
        """
        try:
            from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
            from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled
            from huggingface_hub.utils import build_hf_headers
        except ImportError as error:
            raise missing_client(self._url, "huggingface_hub", "safetensors-torch[hf]") from error
        path = title.removeprefix(self._root)
        if f"{title}/" == self._root or not path:
            raise IsADirectoryError(errno.EISDIR, "is a repository")
        where = {**self._where, "filename": path}
        cached = try_to_load_from_cache(**where, revision=self._revision)
        if _COMMIT.fullmatch(self._revision) and isinstance(cached, str):
            return cached
        for delay in _DELAYS:
            try:
                metadata = get_hf_file_metadata(hf_hub_url(**where, revision=self._revision))
                break
            except Exception as error:
                status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
                if status is not None and status < 500 and status != 429:
                    is_gated = isinstance(error, GatedRepoError)
                    raise self._refusal(title, path, 403 if is_gated else status, error) from None
                # Offline, or no connection.
                if isinstance(cached, str):
                    return cached
                if delay is None or isinstance(error, OfflineModeIsEnabled):
                    raise os_error(errno.EIO, text_of(error)) from None
                time.sleep(delay)
        self._revision = metadata.commit_hash or self._revision
        cached = try_to_load_from_cache(**where, revision=self._revision)
        if isinstance(cached, str):
            return cached
        try:
            return _HubFile(hf_hub_url(**where, revision=self._revision), build_hf_headers(), metadata.location)
        except ImportError as error:
            raise missing_client(self._url, "obstore", "safetensors-torch[hf]") from error

    def _refusal(self, title: str, path: str, status: int, error: Any) -> OSError:
        """Returns the error for an answer of the Hub, to which private repositories do not exist for strangers."""
        if status == 403:
            return os_error(errno.EACCES, f"ask for access to {self._repository}, and pass a token (HF_TOKEN)")
        if status not in (401, 404):
            return os_error(errno.EIO, text_of(error))
        missing = {"RevisionNotFound": f"revision {self._revision}", "EntryNotFound": f"file {path}"}
        what = missing.get(error.response.headers.get("X-Error-Code", ""), f"repository {self._repository}")
        return os_error(errno.ENOENT, f"the Hub has no {what}; a private repository needs a token (HF_TOKEN)")

    def list(self, directory: str) -> list[str] | None:
        path = directory.removeprefix(self._root.rstrip("/")).strip("/")
        return FsspecStore.of_url(self._at_revision(path)).list(self._at_revision(path))

    def create(self, title: str, nbytes: int) -> Writer:
        return FsspecStore.of_url(title).create(title, nbytes)

    def remove(self, title: str) -> None:
        FsspecStore.of_url(title).remove(title)

    def _at_revision(self, path: str) -> str:
        kind = f"{self._where['repo_type']}s/" if self._where["repo_type"] else ""
        return f"hf://{kind}{self._repository}@{self._revision}/{path}"


class _HubFile:
    """A file of a commit."""

    max_requests = 0

    def __init__(self, url: str, headers: dict[str, str], location: str) -> None:
        """Prepares to read.

        Args:
            url: the URL of the file at the Hub.
            headers: for the Hub, with the token.
            location: where the Hub redirects to: a URL that is signed for about an hour. Then the Hub is asked again.
        """
        self._hub = object_at_url(url, headers)
        is_elsewhere = urlsplit(location).netloc != urlsplit(url).netloc
        self._signed: Object | None = object_at_url(location) if is_elsewhere else None

    def length(self) -> int:
        if self._signed is not None:
            try:
                return self._length_of(self._signed)
            except Exception as error:
                if not is_denied(error):
                    raise
                self._signed = None
        return self._length_of(self._hub)

    def _length_of(self, file: Object) -> int:
        length = file.length()
        self.max_requests = file.max_requests
        return length

    def identity(self) -> str | None:
        return None  # a commit does not change

    def read(self, offset: int, nbytes: int) -> Iterator[Any]:
        done, signed = 0, self._signed
        if signed is not None:
            try:
                for piece in signed.read(offset, nbytes):
                    yield piece
                    done += len(piece)
            except Exception as error:
                if not is_denied(error):
                    raise
                self._signed = None
        yield from self._hub.read(offset + done, nbytes - done)


class _CachedFile:
    """A file of the local cache, which huggingface_hub never changes."""

    max_requests = 0

    def __init__(self, path: str) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed with the object

    def length(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def identity(self) -> str | None:
        return None

    def read(self, offset: int, nbytes: int) -> Iterator[Any]:
        data = os.pread(self._file.fileno(), nbytes, offset)
        if len(data) != nbytes:
            raise OSError(errno.EIO, f"the cached file ends after {offset + len(data)} bytes; delete it")
        yield data
