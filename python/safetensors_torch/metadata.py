"""edit_metadata: changes the text in a file's header, and no tensor.

Owns the argument types. Whether the header can be changed where it stands, and how, is the native library's business.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ._arguments import Path, check_bool, check_text, encode_path
from ._errors import call, short_repr
from ._progress import Progress, check_progress, run
from ._tracing import dynamo_disable


@dynamo_disable
def edit_metadata(
    filename: Path,
    changes: Mapping[str, str | None],
    *,
    in_place: bool | None = None,
    reserve: int = 0,
    durable: bool = False,
    progress: Progress = None,
) -> dict[str, str]:
    """Changes the metadata of a safetensors file; its tensors, and where they lie, stay as they are.

    Args:
        filename: the file, all of whose header is checked first; str, bytes or os.PathLike. A symbolic link
            is replaced by the changed file, and what it leads to stays as it is.
        changes: the new text for each key; None removes the key, if it is there.
        in_place: None writes the header over the old one where there is room, the file is writable, has no other name
            (hard link), and is no symbolic link; otherwise the file is written anew and replaced, as save_file does.
            True never writes it anew, False always. In place is one short write, and safe for files that are open or
            mapped. But who opens the file in that moment, or a loss of power, may meet a header that is changed in
            part: pass False where others may be about to open it.
        reserve: bytes of the header that are to be left for later edits, at least. A file that is written anew has
            them, and then many edits are made in place.
        durable: as for save_file.
        progress: as for save_file.

    Returns:
        The metadata that the file has now. Where nothing changes, nothing is written, except with in_place=False.

    Raises:
        SafetensorError: the file is not valid safetensors; in_place=True without room, or of a symbolic link; a header
            of more than 100 MB; something else is changing the file.
        OSError: the file cannot be read or written. It is as it was then, unless the text says otherwise.
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
        raise TypeError(f"changes must map keys to str or None, not {type(changes).__name__}")
    for key, value in changes.items():
        check_text(key, f"the metadata key {short_repr(key)}")
        if value is not None:
            check_text(value, f"the metadata value of {short_repr(key)}")
    if in_place is not None:
        check_bool(in_place, "in_place")
    if not isinstance(reserve, int) or isinstance(reserve, bool):
        raise TypeError(f"reserve must be an int, not {type(reserve).__name__}")
    check_bool(durable, "durable")
    progress, path = check_progress(progress), encode_path(filename)
    kept = {key: value for key, value in changes.items() if value is not None}
    removed = [key for key, value in changes.items() if value is None]
    # More than a header may have, whatever it is, and still an int of the operators.
    reserve = min(reserve, 1 << 62)
    edit = call(torch.classes.safetensors_torch.PendingEdit, path, kept, removed, in_place, reserve, durable)
    run(edit, edit.size, progress, "edit")
    return call(edit.metadata)
