"""Saves to stores: native saves write to a pipe, and a thread passes the bytes on to the client.

Owns the order in which files appear, and what a failure leaves. A file is visible once it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Sequence
from typing import Any

from ._errors import call
from ._locations import RemotePath
from ._progress import Progress, ProgressBar, run
from ._remote import named
from ._stores import Store

# As many bytes as a pipe may have by default without privileges.
_PIPE_BYTES = 1 << 20


class _Upload:
    """One file of a store, until it is committed or aborted."""

    def __init__(self, store: Store, title: str, nbytes: int) -> None:
        self._title = title
        self._writer = named(title, lambda: store.create(title, nbytes))

    def write(self, data: bytes) -> None:
        named(self._title, lambda: self._writer.write(data))

    def save(self, save: Any, progress: Progress) -> None:
        """Writes the file of a native PendingSave.

        Raises:
            OSError: the client has failed.
            What save_file raises.
        """
        reading, writing = os.pipe()
        try:
            fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:
            pass  # the user's pipes have the most bytes already
        failures: list[BaseException] = []
        thread = threading.Thread(target=self._pass_on, args=(reading, failures), name="sft-upload")
        thread.start()
        try:
            call(save.set_file, f"/dev/fd/{writing}", False)
            run(save, progress, "save")
        except BaseException:
            if not failures:
                raise
        finally:
            os.close(writing)
            thread.join()
        if failures:
            # The save has only seen that nobody reads the pipe.
            raise failures.pop()

    def _pass_on(self, reading: int, failures: list[BaseException]) -> None:
        try:
            while data := os.read(reading, _PIPE_BYTES):
                self.write(data)
        except BaseException as failure:
            failures.append(failure)
        finally:
            os.close(reading)

    def commit(self) -> None:
        named(self._title, self._writer.commit)

    def abort(self) -> None:
        # The caller raises the failure that has ended the upload, not one that follows from it.
        with contextlib.suppress(Exception):
            self._writer.abort()


def upload_file(path: RemotePath, save: Any, progress: Progress) -> None:
    """Writes the file of a native PendingSave, replacing what the name had.

    Raises:
        OSError: the client has failed; the name has what it had before.
        What save_file raises.
    """
    upload = _Upload(path.store(), path.title, call(save.total))
    try:
        upload.save(save, progress)
        upload.commit()
    except BaseException:
        upload.abort()
        raise


def upload_checkpoint(directory: RemotePath, save: Any, progress: Progress) -> list[str]:
    """Writes the files of a native PendingShardedSave, the index last. Returns their names.

    If files replace others, all are committed only once they are sent, so that the old checkpoint can be read until then.

    Raises:
        OSError: the client has failed. The directory has what it had before, unless the last step has begun.
        What save_sharded raises.
    """
    store, names = directory.store(), call(save.file_names)
    titles = [directory.join(name).title for name in names]
    present = _list(store, directory.title)
    index = call(save.index).encode()
    shards = call(save.shards)
    is_replaced = any(name in present for name in names[: len(shards)])
    open_uploads: list[_Upload] = []
    committed: list[str] = []
    total, done = call(save.total), 0
    with ProgressBar("save", progress is True) as bar:
        report = bar if progress is True else progress or None
        try:
            for shard, title in zip(shards, titles, strict=False):
                upload = _Upload(store, title, call(shard.total))
                open_uploads.append(upload)
                part = None if report is None else _part_of(report, done, total)
                upload.save(shard, part)
                done += call(shard.total)
                if not is_replaced:
                    upload.commit()
                    open_uploads.pop()
                    committed.append(title)
            if index:
                upload = _Upload(store, titles[-1], len(index))
                open_uploads.append(upload)
                upload.write(index)
                if is_replaced and names[-1] in present:
                    # Nobody may read the new files by the old index.
                    named(titles[-1], lambda: store.remove(titles[-1]))
            while open_uploads:
                open_uploads[0].commit()
                open_uploads.pop(0)
        except BaseException:
            for upload in open_uploads:
                upload.abort()
            for title in committed:
                with contextlib.suppress(Exception):
                    store.remove(title)
            raise
    # The old index before its files.
    for name in sorted(call(save.stale, present), key=lambda name: not name.endswith(".json")):
        title = directory.join(name).title
        named(title, lambda title=title: store.remove(title))
    return names


def _part_of(report: Any, before: int, total: int) -> Any:
    return lambda done, _: report(before + done, total)


def _list(store: Store, directory: str) -> Sequence[str]:
    try:
        return named(directory, lambda: store.list(directory)) or []
    except FileNotFoundError:
        return []
