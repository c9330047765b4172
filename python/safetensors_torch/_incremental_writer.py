"""IncrementalWriter: writes a safetensors file tensor by tensor.

Owns the declarations of the tensors; the native class of the same name writes the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from numbers import Integral
from operator import index
from typing import Any, NoReturn

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ._arguments import Path, check_bool, check_metadata, check_name, encode_path, parse_dtype
from ._errors import SafetensorError, call, names_instead, short_repr, with_remedy
from ._keywords import explains_keywords
from ._progress import STEP_SECONDS, run
from ._save_checks import DisableTorchFunction, check_tensors
from ._tracing import is_traced

# The declaration of a tensor: a dtype and a shape, or a tensor that has them.
Spec = torch.Tensor | tuple[torch.dtype | str, Iterable[int]]


def _meta_tensor(name: str, spec: Any) -> torch.Tensor:
    """Returns a meta tensor with the dtype and the shape of ``spec``."""
    dtype, shape = _from_tensor(name, spec) if isinstance(spec, torch.Tensor) else _from_pair(name, spec)
    try:
        sizes = (index(shape),) if isinstance(shape, Integral) else tuple(map(index, shape))
    except (TypeError, AttributeError):  # AttributeError: a nested tensor's shape
        raise TypeError(f"tensor {short_repr(name)}: a shape consists of ints, not {short_repr(shape)}") from None
    if any(size < 0 for size in sizes):
        raise ValueError(f"tensor {short_repr(name)}: the shape {short_repr(shape)} has a negative size")
    return torch.empty(sizes, dtype=dtype, device="meta")


def _from_tensor(name: str, spec: torch.Tensor) -> tuple[torch.dtype, torch.Size]:
    with DisableTorchFunction():
        if spec.is_nested:
            raise ValueError(
                f"tensor {short_repr(name)}: a nested tensor has no single shape; declare it as (dtype, shape)"
            )
        return spec.dtype, spec.shape


def _from_pair(name: str, spec: Any) -> tuple[torch.dtype, Any]:
    if isinstance(spec, (tuple, list)) and len(spec) == 2 and isinstance(spec[0], (torch.dtype, str)):
        return parse_dtype(spec[0]) if isinstance(spec[0], str) else spec[0], spec[1]
    raise TypeError(
        f"tensor {short_repr(name)}: declare it as (dtype, shape) or by a tensor, not by {short_repr(spec)}"
    )


class IncrementalWriter:
    """A writer of a safetensors file, tensor by tensor, so that only one of them has to be in memory.

    It is a context manager. Its end commits: the file appears, complete, under its name. An exception, or a missing
    tensor, discards the file: an older file of that name stays as it was. The bytes are those of save_file for the same
    tensors, in whatever order they are written.

    Several threads may write different tensors at once.

    Args:
        filename: the file, replaced if it exists, as by save_file; str, bytes or os.PathLike.
        tensors: for each name the dtype, or its name ("float16"), and the shape, as a pair or as a tensor, which may be
            on the meta device.
        metadata: as for save_file.
        durable: as for save_file.

    Raises:
        OSError: the file cannot be written, or there is no space for all of it.
        SafetensorError: a dtype that the format lacks, or a tensor called ``__metadata__``.
        ValueError: a negative size.
        TypeError: a name that is not a str, an invalid declaration, or an argument of another type.
        UnicodeEncodeError: a name, or metadata, with a lone surrogate.

    Example:
        >>> with IncrementalWriter(path, {"a": (torch.float32, (2,)), "b": torch.empty(3, device="meta")}) as writer:
        ...     writer.write("b", torch.ones(3))
        ...     writer.missing()
        ...     writer.write("a", torch.zeros(2))
        ['a']
        >>> load_file(path)
        {'a': tensor([0., 0.]), 'b': tensor([1., 1., 1.])}
    """

    @explains_keywords
    def __init__(
        self,
        filename: Path,
        tensors: Mapping[str, Spec],
        metadata: dict[str, str] | None = None,
        *,
        durable: bool = False,
    ) -> None:
        self._filename = filename
        self._open: Any | None = None
        check_bool(durable, "durable")
        if not isinstance(tensors, Mapping):
            raise TypeError(
                f"tensors must map names to dtypes and shapes, not {type(tensors).__name__}; the order of the arguments"
                " is IncrementalWriter(filename, tensors)"
            )
        for name in tensors:
            check_name(name)
        check_metadata(metadata)
        path, self._names = encode_path(filename), list(tensors)
        with _disable_current_modes():
            specs = [_meta_tensor(name, spec) for name, spec in tensors.items()]
            native = torch.classes.safetensors_torch.IncrementalWriter
            self._open = call(native, path, self._names, specs, metadata, durable)

    def __enter__(self) -> IncrementalWriter:
        self._native()
        return self

    def __exit__(self, *error: object) -> None:
        if self._open is None:
            return
        if error[0] is not None:
            self.discard()
            return
        try:
            self.commit()
        finally:
            self.discard()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses to be pickled or copied: the file has one writer."""
        raise TypeError(
            f"cannot pickle or copy {self!r}: threads may share it, but only the process that created the file can"
            " write it; send the tensors to that process"
        )

    def __repr__(self) -> str:
        return f"<IncrementalWriter {short_repr(self._filename)}, {'closed' if self._open is None else 'open'}>"

    def _native(self) -> Any:
        native = self._open
        if native is None:
            raise SafetensorError(
                f"File is closed: {short_repr(self._filename)}; a new IncrementalWriter writes the file again"
            )
        return native

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Writes one tensor, from any device. If this fails, or is interrupted, it can be called again.

        Args:
            name: the declared name.
            tensor: a tensor of the declared dtype and shape.

        Raises:
            SafetensorError: the name was not declared, the dtype or shape is not the declared one, the tensor was
                written before, or the file is closed.
            ValueError, RuntimeError, TypeError: save_file refuses such a tensor. Shared memory is not detected.
            OSError: the file cannot be written.
        """
        native = self._native()
        check_tensors({name: tensor}, None, "write(name, tensor)")
        with _disable_current_modes() if is_traced() else nullcontext():
            try:
                with DisableTorchFunction():
                    pending = call(native.write, name, tensor, STEP_SECONDS)
            except SafetensorError as error:
                if name in self._names:
                    raise
                raise with_remedy(error, names_instead(name, self._names)) from None
            if pending is not None:
                run(pending, None, "save")

    def missing(self) -> list[str]:
        """Returns the names of the tensors not written yet, in the order of their data in the file."""
        return call(self._native().missing)

    def commit(self) -> None:
        """Makes the file appear under its name, and closes the writer.

        Raises:
            SafetensorError: tensors are missing (the text lists them), or another thread is writing one: the writer
                stays open. Or the file is closed.
            OSError: the file cannot be written.
        """
        native = self._native()
        try:
            call(native.commit)
        finally:
            if not native.is_open():
                self._open = None

    def discard(self) -> None:
        """Discards the file, and closes the writer; an older file stays as it was. Does nothing if it is closed."""
        native, self._open = self._open, None
        if native is not None:
            native.discard()
