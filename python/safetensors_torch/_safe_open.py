"""safe_open: reads a file, a checkpoint of several files, or bytes in memory, tensor by tensor or slice by slice."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, ItemsView, Iterator, ValuesView
from typing import Any

import torch

from . import _buffer
from ._arguments import Device, check_int, has_utf8, to_device
from ._errors import NamedFile, SafetensorError, call, names_instead, short_repr, truncate
from ._keywords import explains_keywords
from ._load import open_bytes, open_file
from ._locations import RemotePath, located
from ._prefetch_loader import Plan, PrefetchLoader, TensorMeta, parse_plan, start
from ._progress import run
from ._safe_slice import PySafeSlice, get_tensor
from ._sharded import open_checkpoint, parse_size

_FRAMEWORKS = ("pt", "torch", "pytorch")


def _is_contents(filename: Any) -> bool:
    """Returns whether this is the contents of a file, or an open file, instead of a file name."""
    if isinstance(filename, bytes):
        # Both may be bytes: every file has a null byte among its first eight, and no file name has one.
        return b"\0" in filename[:8]
    if isinstance(filename, (str, os.PathLike, RemotePath)):
        return False
    try:
        memoryview(filename).release()
    except TypeError:
        return hasattr(filename, "readinto")
    return True


def open_path(filename: Any, backend: str, variant: str | None = None, extra: str = "error") -> Any:
    """Opens the native File: of a file whatever its name, else of an index or a directory."""
    if isinstance(filename, RemotePath):
        return open_checkpoint(filename, backend, variant, extra)
    if variant is None and extra == "error":
        try:
            return open_file(filename, backend)
        except IsADirectoryError:
            pass
        except SafetensorError:
            if not os.fsencode(filename).endswith(b".json"):
                raise
    return open_checkpoint(filename, backend, variant, extra)


def _text(filename: Any) -> Any:
    """Returns a path as text for messages; anything else, which is refused later, as it is."""
    if isinstance(filename, RemotePath):
        return filename.title
    return os.fsdecode(filename) if isinstance(filename, (bytes, os.PathLike)) else filename


def _absolute(filename: Any) -> Any:
    """Returns the path, absolute if the working directory has a name that the process may see."""
    if isinstance(filename, RemotePath):
        return filename
    path = os.fspath(filename)
    if os.path.isabs(path):
        return path
    try:
        return os.path.join(os.getcwdb() if isinstance(path, bytes) else os.getcwd(), path)
    except OSError:
        return path


class safe_open:  # noqa: N801 - the name that users of safetensors know
    """A safetensors file, or a checkpoint of several files, open for reading.

    It is a context manager, whose end closes the file. Tensors and slices remain valid after that. ``file[name]``,
    ``name in file``, ``len(file)``, ``file.items()`` and iteration work as for a dict. Threads and forked processes may
    share it. A copy of it, or a pickle as for the worker of a DataLoader, opens the path again; contents cannot be
    pickled.

    Args:
        filename: the file, or an index or a directory as for load_sharded; str, bytes or os.PathLike, or a URL as for
            load_file. Or contents, as for load: bytes, another object with the buffer protocol, which stays exported as
            long as this is open or a slice of it exists, or an open file, which is read to its end. Tensors are then
            copies.
        framework: "pt", "torch" or "pytorch", which all mean torch.
        device: the device of the tensors, as for load_file.
        backend: "mmap" or "pread", as for load_file. Two reads of one tensor share memory with "mmap", and do not with
            "pread". Ignored for contents.
        variant: the variant to open in a directory, as for load_sharded.
        extra: the treatment of tensors that an index does not list, as for load_sharded.
        filesystem: what ``filename`` is in, as for load_file.

    Raises:
        SafetensorError: the file is not valid safetensors, ``framework`` is not torch, or another backend; and what
            load_sharded raises for an index or a directory.
        OSError: the file cannot be read.

    Example:
        >>> save_file({"weight": torch.arange(6.0).reshape(2, 3)}, path)
        >>> with safe_open(path) as file:
        ...     print(file.keys(), file.get_slice("weight")[1, ::2])
        ['weight'] tensor([3., 5.])
    """

    @explains_keywords
    def __init__(
        self,
        filename: Any,
        framework: str = "pt",
        device: Device = "cpu",
        *,
        backend: str = "mmap",
        variant: str | None = None,
        extra: str = "error",
        filesystem: Any = None,
    ) -> None:
        if framework not in _FRAMEWORKS:
            raise SafetensorError(
                f"framework {short_repr(framework)} is invalid: this library is for torch (one of"
                f" {', '.join(map(repr, _FRAMEWORKS))}); .numpy() of a tensor returns an array, and the package"
                " safetensors serves the others"
            )
        self._device = to_device(device)
        filename = located(filename, filesystem)
        is_contents = _is_contents(filename)
        self._title = type(filename).__name__ if is_contents else short_repr(_text(filename))
        # Whether tensors are views of a mapping.
        is_file = not is_contents and not isinstance(filename, RemotePath)
        self._is_mapped = is_file and backend == "mmap" and self._device.type == "cpu"
        # Keeps the memory of contents alive.
        self._view: memoryview | None = None
        self._open: Any | None = None
        self._path: str | bytes | RemotePath | None = None
        if is_contents:
            data, view = _buffer.exported(filename)
            try:
                self._open, self._view = open_bytes(data), view
            except BaseException:
                view.release()  # the traceback would keep it
                raise
        else:
            self._open = open_path(filename, backend, variant, extra)
            self._path = _absolute(filename)
            self._options = {"backend": backend, "variant": variant, "extra": extra}

    def __enter__(self) -> safe_open:
        self._file()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; tensors and slices remain valid. Does nothing if it is closed."""
        # Not File.close(): slices share the File, and the last of them closes it.
        self._open = self._view = None

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[[], safe_open], tuple[()]]:
        """Returns how to open the path again, with the same options.

        Raises:
            TypeError: it was opened over contents.
            SafetensorError: the file is closed.
        """
        self._file()
        if self._path is None:
            raise TypeError(
                f"cannot pickle or copy {self!r}: threads and forked processes may share it; for other processes, save"
                " the bytes to a file and open that, or send the bytes"
            )
        # Without the defaults of what only checkpoints have: the reference, which may unpickle it, lacks those options.
        options = {name: value for name, value in self._options.items() if value not in (None, "error")}
        return functools.partial(type(self), self._path, "pt", str(self._device), **options), ()

    def __repr__(self) -> str:
        state = "closed" if self._open is None else "open"
        return f"<safe_open {self._title} on {self._device}, {state}>"

    def _file(self) -> Any:
        file = self._open
        if file is None:
            raise SafetensorError(f"File is closed: {self._title}; call safe_open again")
        return file

    def _get(self, name: Any, get: Callable[[Any, str], Any]) -> Any:
        """Returns ``get(file, name)``; the error about an absent tensor names the file and the nearest names."""
        file = self._file()
        if not isinstance(name, str):
            raise TypeError(f"the name of a tensor must be a str, not {type(name).__name__}")
        if not has_utf8(name):
            raise self._missing(name.encode("utf-8", "backslashreplace").decode())
        try:
            with NamedFile(self._title):
                return get(file, name)
        except SafetensorError:
            if not call(file.contains, name):
                raise self._missing(name) from None
            raise

    def _missing(self, name: str) -> SafetensorError:
        # It begins with the reference's text, which programs look for.
        remedy = names_instead(name, self.keys())
        return SafetensorError(f"File does not contain tensor {truncate(name)} ({self._title}); {remedy}")

    def keys(self) -> list[str]:
        """Returns the names of the tensors, sorted."""
        return call(self._file().keys)

    def offset_keys(self) -> list[str]:
        """Returns the names of the tensors in the order of their data in the file."""
        return call(self._file().offset_keys)

    def metadata(self) -> dict[str, str] | None:
        """Returns the metadata in the header, or None if it has none."""
        return call(self._file().metadata)

    def get_tensor(self, name: str) -> torch.Tensor:
        """Returns the tensor called ``name``, on the device of this handle, with the dtype and shape in the header.

        Raises:
            SafetensorError: there is no such tensor, the file is closed, or torch lacks the dtype.
        """
        return self._get(name, lambda file, name: get_tensor(file, name, self._device))

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """Returns all tensors by name, in the order of their data in the file, on the device of this handle.

        Raises:
            SafetensorError: the file is closed, or torch lacks a dtype.
        """
        with NamedFile(self._title):
            pending = call(self._file().start_load, None, self._device, None, False)
            run(pending, None, "load")
            names, tensors = call(pending.result)
        return dict(zip(names, tensors, strict=True))

    def get_slice(self, name: str) -> PySafeSlice:
        """Returns the tensor called ``name``, unread: index the result to read a part of it.

        Raises:
            SafetensorError: there is no such tensor, or the file is closed.
        """
        return self._get(name, self._slice)

    def get_shape(self, name: str) -> list[int]:
        """Returns the shape of the tensor in the header, as a slice's get_shape does.

        Raises:
            SafetensorError: there is no such tensor, or the file is closed.
        """
        return self._get(name, lambda file, name: call(file.shape, name))

    def get_dtype(self, name: str) -> str:
        """Returns the code of the tensor's dtype in the header, such as "F32", as a slice's get_dtype does.

        Raises:
            SafetensorError: there is no such tensor, or the file is closed.
        """
        return self._get(name, lambda file, name: call(file.dtype, name))

    def get_tensor_meta(self, name: str) -> TensorMeta:
        """Returns the dtype and shape of the tensor in the header, and the place of its bytes.

        Raises:
            SafetensorError: there is no such tensor, or the file is closed.
        """
        return TensorMeta(*self._get(name, lambda file, name: call(file.meta, name)))

    def prefetch(
        self,
        plan: Plan = None,
        *,
        device: Device = None,
        threads: int = 8,
        buffer_bytes: int | str | None = None,
    ) -> PrefetchLoader:
        """Starts to read tensors in the background, and returns a loader that hands out each once it has landed.

        The tensors have memory of their own, with either backend. They are read in the order of their data in the file.

        Args:
            plan: the tensors to read, as a dict. The value of a name is None for the whole tensor, a slice of step 1
                for some of its rows, or an index of ints, slices, ``...`` and None as a tuple, of which only the
                selected bytes are read. The bounds of a bare slice must be within the tensor; those in a tuple are
                clipped. None reads all tensors.
            device: the device of the tensors, as for load_file; None means that of this handle.
            threads: the most threads that read; set_transfer_options(threads=...) limits them, too.
            buffer_bytes: the most bytes of tensors that are read ahead, as a number or text ("256MiB"), including the
                tensor that was handed out last. If none waits to be taken, the next one is read even if it does not
                fit. None reads everything ahead.

        Raises:
            SafetensorError: the plan has a name that the file lacks, a slice that does not fit, or no tensor at all;
                torch lacks a dtype; the file is closed.
            TypeError, ValueError, IndexError: an argument of another type, a size or a number of threads that is not
                positive, an index that torch refuses.
            RuntimeError: a device that torch does not know or cannot use.

        Example:
            >>> save_file({"weight": torch.arange(6.0).reshape(3, 2), "bias": torch.zeros(2)}, path)
            >>> with safe_open(path) as file, file.prefetch({"weight": slice(1, 3)}) as loader:
            ...     for name, tensor in loader:
            ...         print(name, tensor.tolist())
            weight [[2.0, 3.0], [4.0, 5.0]]
        """
        file = self._file()
        target = self._device if device is None else to_device(device)
        most_bytes = None if buffer_bytes is None else parse_size(buffer_bytes)
        threads = check_int(threads, "threads")
        if threads < 1:
            raise ValueError(f"threads must be 1 or more, not {threads}")
        with NamedFile(self._title):
            names, slices, indices = parse_plan(file, plan, self._require)
            native = start([file], [names], [slices], target, None, most_bytes, threads)
        return PrefetchLoader(native, self._title, indices, self._view)

    def _require(self, name: Any) -> None:
        """Raises the error about a tensor that the file lacks."""
        self._get(name, lambda file, name: call(file.shape, name))

    def items(self) -> ItemsView[str, torch.Tensor]:
        """Returns a view of the names, sorted, with their tensors: each is read when the iteration reaches it."""
        return ItemsView(self)  # type: ignore[arg-type]

    def values(self) -> ValuesView[torch.Tensor]:
        """Returns a view of the tensors, in the order of keys(): each is read when the iteration reaches it."""
        return ValuesView(self)  # type: ignore[arg-type]

    def __getitem__(self, name: str) -> torch.Tensor:
        """Returns get_tensor(name)."""
        return self.get_tensor(name)

    def _slice(self, file: Any, name: str) -> PySafeSlice:
        return PySafeSlice(file, name, self._title, self._device, self._is_mapped, self._view)

    def __contains__(self, name: object) -> bool:
        file = self._file()
        return isinstance(name, str) and has_utf8(name) and call(file.contains, name)

    def __len__(self) -> int:
        return call(self._file().size)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())
