"""Saves to stores: native saves write to a pipe, and a thread passes the bytes on to the client.

Owns the order in which files appear, and what a failure leaves. A file is visible once it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import threading
from collections.abc import Sequence
from typing import Any

from ._errors import call
from ._exceptions import os_error
from ._locations import RemotePath
from ._progress import Progress, ProgressBar, run
from ._remote import named
from ._stores import Store

# As many bytes as a pipe may have by default without privileges.
_PIPE_BYTES = 1 << 20

_POLL_MILLISECONDS = 50


class _Stopped(Exception):
    """The upload has failed, so the save need not go on."""


class Upload:
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
        ended = threading.Event()
        thread = threading.Thread(target=self._pass_on, args=(reading, ended, failures), name="sft-upload")
        thread.start()
        try:
            call(save.set_file, f"/dev/fd/{writing}", False)
            with ProgressBar("save", progress is True) as bar:
                report = bar if progress is True else progress

                def check(done: int, total: int) -> None:
                    if failures:
                        raise _Stopped
                    if report:
                        report(done, total)

                run(save, check, "save")
        except _Stopped:
            pass
        finally:
            os.close(writing)
            ended.set()
            thread.join()
        if failures:
            raise failures.pop()

    def _pass_on(self, reading: int, ended: threading.Event, failures: list[BaseException]) -> None:
        """Sends what the pipe has. A process that was forked meanwhile keeps the pipe open: it ends with ``ended``."""
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        try:
            while True:
                is_last = ended.is_set()
                if not poll.poll(0 if is_last else _POLL_MILLISECONDS):
                    if is_last:
                        return
                    continue
                data = os.read(reading, _PIPE_BYTES)
                if not data:
                    return
                if not failures:
                    try:
                        self.write(data)
                    except BaseException as failure:
                        # The save goes on until it sees it; the rest is dropped.
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
    if not path.title or path.title.endswith("/"):
        raise os_error(errno.EISDIR, f"{path.title or repr('')}: this is the name of a directory; name a file in it")
    upload = Upload(path.store(), path.title, call(save.total))
    try:
        upload.save(save, progress)
        upload.commit()
    except BaseException:
        upload.abort()
        raise


def upload_checkpoint(directory: RemotePath, save: Any, progress: Progress) -> list[str]:
    """Writes the files of a native PendingShardedSave, the index last. Returns their names.

    If files replace others, all are committed only once they are sent: the old checkpoint can be read until then.

    Raises:
        OSError: the client has failed. The directory has what it had before, unless the last step has begun.
        What save_sharded raises.
    """
    store, names = directory.store(), call(save.file_names)
    titles = [directory.join(name).title for name in names]
    present = list_names(store, directory.title)
    index = call(save.index).encode()
    shards = call(save.shards)
    is_replaced = any(name in present for name in names[: len(shards)])
    open_uploads: list[Upload] = []
    committed: list[str] = []
    total, done = call(save.total), 0
    with ProgressBar("save", progress is True) as bar:
        report = bar if progress is True else progress or None
        try:
            for shard, title in zip(shards, titles, strict=False):
                upload = Upload(store, title, call(shard.total))
                open_uploads.append(upload)
                part = None if report is None else _part_of(report, done, total)
                upload.save(shard, part)
                done += call(shard.total)
                if not is_replaced:
                    upload.commit()
                    open_uploads.pop()
                    committed.append(title)
            if index:
                upload = Upload(store, titles[-1], len(index))
                open_uploads.append(upload)
                upload.write(index)
            if index and is_replaced and names[-1] in present:
                # Nobody may read the new files by the old index.
                named(titles[-1], lambda: store.remove(titles[-1]))
            # A client may fail after the server has put the index in place.
            committed.clear()
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


def list_names(store: Store, directory: str) -> Sequence[str]:
    try:
        return named(directory, lambda: store.list(directory)) or []
    except FileNotFoundError:
        return []
