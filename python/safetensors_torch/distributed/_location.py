"""Where a storage reader or writer of torch.distributed.checkpoint reads or writes: a local directory, or a store."""

from __future__ import annotations

import os
from typing import Any

from .._arguments import Path, encode_path
from .._locations import RemotePath, is_url, located


class StorageLocation:
    """The location of a storage reader or writer, whose torch class follows in the method resolution order."""

    def _init_location(self, torch_class: Any, path: Path, filesystem: Any, **options: Any) -> None:
        """Initializes the torch class, whose path is always a local one."""
        location = located(path, filesystem)
        is_remote = isinstance(location, RemotePath)
        torch_class.__init__(self, path="." if is_remote else os.fsdecode(encode_path(path)), **options)
        self._filesystem = filesystem
        self._location: RemotePath | None = None
        if is_remote:
            self._set_location(location)

    def _set_location(self, location: RemotePath) -> None:
        self._location = location
        self.path = location.title

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        location = located(checkpoint_id, self._filesystem) if checkpoint_id else None
        if isinstance(location, RemotePath):
            super().reset(None)  # type: ignore[misc]
            self._set_location(location)
        else:
            super().reset(checkpoint_id)  # type: ignore[misc]
            self._location = None if checkpoint_id else self._location

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return is_url(checkpoint_id) or super().validate_checkpoint_id(checkpoint_id)  # type: ignore[misc]
