"""edit_metadata: changes the metadata in a file's header.

Checks the argument types; the native library does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ._arguments import Path, check_bool, check_int, check_metadata_entry, encode_input_path
from ._errors import call
from ._keywords import explains_keywords
from ._progress import Progress, check_progress, run
from ._tracing import dynamo_disable


@dynamo_disable
@explains_keywords
def edit_metadata(
    filename: Path,
    changes: Mapping[str, str | None],
    *,
    in_place: bool = False,
    reserve: int = 0,
    durable: bool = False,
    progress: Progress = None,
) -> dict[str, str]:
    """Changes the metadata of a safetensors file. The tensors do not change.

    Args:
        filename: the file, whose header is validated first; str, bytes or os.PathLike. A symbolic link is replaced by
            the changed file; the file it leads to stays as it is.
        changes: the new text for each key; None removes the key, if it exists.
        in_place: overwrites the header with one short write. By default the file is rewritten and replaced, as by
            save_file. Files that are open or mapped are not affected by an edit in place, but a power cut, or a
            program that opens the file during the write, can meet a torn header. An error if the new header does not
            fit, the file has another name (hard link), or ``filename`` is a symbolic link.
        reserve: free bytes to leave in the header for later edits, at least, so that those can be made in place.
        durable: as for save_file.
        progress: as for save_file.

    Returns:
        The new metadata. Nothing is written if nothing changes and the header already has ``reserve`` free bytes.

    Raises:
        SafetensorError: the file is not valid safetensors; the edit is impossible in place; a header of more than
            100 MB; something else changes the file during the edit.
        OSError: the file cannot be read or written. It is then as it was, unless the text says otherwise.
        ValueError: a negative ``reserve``, or a null byte in the file name.
        TypeError: an argument of another type.
        UnicodeEncodeError: a text with a lone surrogate.
        ImportError: progress=True without tqdm.

    Example:
        >>> save_file({"x": torch.zeros(1)}, path, {"epoch": "1", "note": "first"})
        >>> edit_metadata(path, {"epoch": "2", "note": None})
        {'epoch': '2'}
    """
    if not isinstance(changes, Mapping):
        raise TypeError(
            f"changes must map keys to str or None, not {type(changes).__name__}; the order of the arguments is"
            " edit_metadata(filename, changes)"
        )
    for key, value in changes.items():
        check_metadata_entry(key, "" if value is None else value)
    check_bool(in_place, "in_place")
    reserve = check_int(reserve, "reserve")
    check_bool(durable, "durable")
    progress, path = check_progress(progress), encode_input_path(filename)
    kept = {key: value for key, value in changes.items() if value is not None}
    removed = [key for key, value in changes.items() if value is None]
    edit = call(torch.classes.safetensors_torch.PendingEdit, path, kept, removed, in_place, reserve, durable)
    run(edit, progress, "edit")
    return call(edit.result)
