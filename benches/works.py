"""The works, their subjects and the targets.

Owns only these tables. worker.py runs the works, bench.py orders the runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

REFERENCE_VERSION = "0.8.0"
PRERELEASE_VERSION = "0.9.0rc1"

OURS = "ours"
REFERENCE = f"safetensors {REFERENCE_VERSION}"
PRERELEASE = f"safetensors {PRERELEASE_VERSION}"
RAW = "raw limit"


@dataclass(frozen=True)
class Subject:
    """One row of a work: a library and its arguments."""

    title: str
    library: str  # "ours", "reference", "prerelease", "torch", "python" or "raw"
    options: dict[str, object] = field(default_factory=dict)
    mutable: bool = False  # load: from a bytearray instead of bytes


@dataclass(frozen=True)
class Work:
    """One task, the same for all subjects."""

    title: str
    data: str  # the key of a data set
    call: str  # "load_file", "load", "load_model", "save", "save_file" or "dict"
    subjects: tuple[Subject, ...]
    options: dict[str, object] = field(default_factory=dict)
    touch: bool = False  # the timed run reads every page of the result
    cold: bool = False  # each run starts with an empty page cache
    fresh: bool = False  # save_file: the target does not exist yet
    durable: bool = False  # save_file: file and directory are on the disk at the end
    as_found: bool = False  # each run in a new process, without touching memory before
    moves: bool = True  # whether the bytes of the data are copied, so that bytes per second have a meaning
    loop: str = ""  # the loop of raw.c that it is compared with

    @property
    def name(self) -> str:
        return f"{self.data} {self.title}"

    @property
    def reads_file(self) -> bool:
        """Whether the source is read from a file."""
        return self.call in ("load_file", "load_model")


@dataclass(frozen=True)
class Target:
    """A goal for this library in a work."""

    work: str
    kind: str  # "times" the reference's speed, "raw" share of the limit, "copies" of the data, "scale" to a million
    value: float

    @property
    def at_most(self) -> bool:
        """Whether smaller is better."""
        return self.kind in ("copies", "scale")


_OURS = Subject(OURS, "ours")
_BOTH = (_OURS, Subject(REFERENCE, "reference"))
_ALL = (*_BOTH, Subject(PRERELEASE, "prerelease"))
_PREFAULT = tuple(Subject(f"ours, prefault={value}", "ours", {"prefault": value}) for value in (True, False))
_TORCH_LOAD = Subject("torch.load", "torch", {"mmap": False})
_TORCH_MAP = Subject("torch.load mmap=True", "torch", {"mmap": True})
_TORCH_SAVE = Subject("torch.save", "torch")
_TORCH_MODEL = Subject("torch.load + load_state_dict", "torch", {"mmap": False})
_MMAP: dict[str, object] = {"backend": "mmap"}
_PREAD: dict[str, object] = {"backend": "pread"}
_PYTHON = Subject("Python", "python")
_SHARED = (Subject(OURS, "ours", {"copy": False}, mutable=True), *_ALL[1:])


def _raw(*subjects: Subject) -> tuple[Subject, ...]:
    return (*subjects, Subject(RAW, "raw"))


WORKS = (
    Work("load_file mmap", "small", "load_file", (*_ALL, _TORCH_MAP), _MMAP, moves=False),
    Work("load_file pread", "small", "load_file", (*_ALL, _TORCH_LOAD), _PREAD),
    Work("load", "small", "load", _ALL),
    Work("save_file, over a file", "small", "save_file", (*_ALL, _TORCH_SAVE)),
    Work("save", "small", "save", _ALL),
    Work("a dict of the names", "small", "dict", (_PYTHON,), moves=False),
    Work("load_file mmap, untouched", "gpt2", "load_file", (*_ALL, *_PREFAULT, _TORCH_MAP), _MMAP, moves=False),
    Work(
        "load_file mmap, touched",
        "gpt2",
        "load_file",
        _raw(*_ALL, *_PREFAULT, _TORCH_MAP),
        _MMAP,
        touch=True,
        loop="touch",
    ),
    Work("load_file pread", "gpt2", "load_file", _raw(*_ALL, _TORCH_LOAD), _PREAD, loop="read"),
    Work("load", "gpt2", "load", _raw(*_ALL), loop="copy"),
    Work("load copy=False", "gpt2", "load", _SHARED, moves=False),
    Work("load_model", "gpt2", "load_model", _raw(*_ALL, _TORCH_MODEL), loop="read warm"),
    Work("save", "gpt2", "save", _raw(*_ALL), loop="copy"),
    Work("save_file, new file", "gpt2", "save_file", _raw(*_ALL, _TORCH_SAVE), fresh=True, loop="write"),
    Work("save_file, over a file", "gpt2", "save_file", _raw(*_ALL, _TORCH_SAVE), loop="replace"),
    Work(
        "save_file, new file, durable",
        "gpt2",
        "save_file",
        _raw(*_ALL, _TORCH_SAVE),
        fresh=True,
        durable=True,
        loop="write",
    ),
    Work(
        "save_file, over a file, durable",
        "gpt2",
        "save_file",
        _raw(*_ALL, _TORCH_SAVE),
        durable=True,
        loop="replace",
    ),
    Work("load, fresh process", "gpt2", "load", _BOTH, as_found=True),
    Work("save, fresh process", "gpt2", "save", _BOTH, as_found=True),
    Work("load_file mmap, touched", "shard", "load_file", (*_ALL, _TORCH_MAP), _MMAP, touch=True),
    Work("load_file pread", "shard", "load_file", _raw(*_ALL, _TORCH_LOAD), _PREAD, loop="read"),
    Work("load_file pread, fresh process", "shard", "load_file", _BOTH, _PREAD, as_found=True),
    Work(
        "load_file mmap, cold, touched",
        "shard",
        "load_file",
        _raw(*_ALL),
        _MMAP,
        touch=True,
        cold=True,
        loop="sequential",
    ),
    Work(
        "load_file pread, cold, touched",
        "shard",
        "load_file",
        _raw(*_ALL),
        _PREAD,
        touch=True,
        cold=True,
        loop="sequential",
    ),
    Work("load_file mmap", "million", "load_file", _BOTH, _MMAP, moves=False),
    Work("load_file pread", "million", "load_file", (_OURS,), _PREAD),
    Work("load", "million", "load", (_OURS,)),
    Work("save_file, over a file", "million", "save_file", _BOTH),
    Work("save", "million", "save", (_OURS,)),
    Work("a dict of the names", "million", "dict", (_PYTHON,), moves=False),
)

TARGETS = (
    Target("small load_file mmap", "times", 10),
    Target("small load_file pread", "times", 4),
    Target("small save_file, over a file", "times", 10),
    Target("small save", "times", 8),
    Target("gpt2 load_file mmap, untouched", "times", 2),
    Target("gpt2 load_file mmap, touched", "times", 1.3),
    Target("gpt2 load_file pread", "times", 2.5),
    Target("gpt2 load_file pread", "raw", 0.85),
    Target("gpt2 load", "times", 1.2),
    Target("gpt2 load copy=False", "times", 50),
    Target("gpt2 load_model", "times", 1.2),
    Target("gpt2 load_model", "copies", 0.1),
    Target("gpt2 save", "times", 3),
    Target("gpt2 save", "copies", 1.1),
    Target("gpt2 save_file, new file", "times", 1.1),
    Target("gpt2 save_file, over a file", "times", 1.5),
    Target("gpt2 save_file, over a file", "raw", 0.9),
    Target("shard load_file pread", "times", 2.5),
    Target("shard load_file pread", "raw", 0.85),
    Target("gpt2 load, fresh process", "times", 1.0),
    Target("gpt2 save, fresh process", "times", 1.0),
    Target("shard load_file pread, fresh process", "times", 1.0),
    Target("shard load_file mmap, cold, touched", "times", 1.0),
    Target("shard load_file mmap, cold, touched", "raw", 0.9),
    Target("shard load_file pread, cold, touched", "times", 1.0),
    Target("shard load_file pread, cold, touched", "raw", 0.9),
    *(Target(work.name, "scale", 1.3) for work in WORKS if work.data == "million" and _OURS in work.subjects),
)
