"""The works, their subjects and the targets.

Owns only these tables. worker.py runs the works, bench.py orders the runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

VERSIONS = {
    "reference": "0.8.0",
    "prerelease": "0.9.0rc1",
    "fastsafetensors": "0.5.0",
    "streamer": "0.17.0",
}

OURS = "ours"
REFERENCE = f"safetensors {VERSIONS['reference']}"
PRERELEASE = f"safetensors {VERSIONS['prerelease']}"
FASTSAFETENSORS = f"fastsafetensors {VERSIONS['fastsafetensors']}"
STREAMER = f"Run:ai Model Streamer {VERSIONS['streamer']}"
RAW = "raw limit"

# What the libraries cannot do without a GPU, or at all, so that works lack them.
LIMITS = {
    "prerelease": f"{PRERELEASE}: `prefetch` needs CUDA, so the rows use `load_file` and `safe_open`",
    "fastsafetensors": f"{FASTSAFETENSORS}: copies whole tensors; reads cold files around the page cache, and others"
    " through it (`FASTSAFETENSORS_ODIRECT=0`)",
    "streamer": f"{STREAMER}: copies whole tensors, and does not save",
}


@dataclass(frozen=True)
class Subject:
    """One row of a work: a library and its arguments."""

    title: str
    library: str  # "ours", "torch", "python", "raw", or a key of VERSIONS
    options: dict[str, object] = field(default_factory=dict)
    mutable: bool = False  # load: from a bytearray instead of bytes
    loop: str = ""  # raw: the loop of raw.c, unless it is that of the work


# The functions that return tensors one by one.
ITERATIONS = ("opened", "halves", "iterate")


@dataclass(frozen=True)
class Work:
    """One task, the same for all subjects."""

    title: str
    data: str  # the key of a data set
    call: str  # a function of libraries.py
    subjects: tuple[Subject, ...]
    options: dict[str, object] = field(default_factory=dict)
    touch: bool = False  # the timed run reads every page of the result
    cold: bool = False  # each run starts with an empty page cache
    fresh: bool = False  # saves: the target does not exist yet
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
        return self.call in ("load_file", "load_model", *ITERATIONS)


@dataclass(frozen=True)
class Target:
    """A goal for this library in a work."""

    work: str
    # "times" the speed of the reference, of the best "rival", or of "each" file alone; "raw" share of the best limit;
    # "copies" of the data; "scale" to a million; "served" bytes, in needed ones
    kind: str
    value: float
    subject: str = OURS

    @property
    def at_most(self) -> bool:
        """Whether smaller is better."""
        return self.kind in ("copies", "scale", "served")


_OURS = Subject(OURS, "ours")
_BOTH = (_OURS, Subject(REFERENCE, "reference"))
_ALL = (*_BOTH, Subject(PRERELEASE, "prerelease"))
_RIVALS = (Subject(FASTSAFETENSORS, "fastsafetensors"), Subject(STREAMER, "streamer"))
_PREFAULT = tuple(Subject(f"ours, prefault={value}", "ours", {"prefault": value}) for value in (True, False))
_TORCH_LOAD = Subject("torch.load", "torch", {"mmap": False})
_TORCH_MAP = Subject("torch.load mmap=True", "torch", {"mmap": True})
_TORCH_SAVE = Subject("torch.save", "torch")
_TORCH_MODEL = Subject("torch.load + load_state_dict", "torch", {"mmap": False})
_MMAP: dict[str, object] = {"backend": "mmap"}
_PREAD: dict[str, object] = {"backend": "pread"}
_PYTHON = Subject("Python", "python")
_SHARED = (Subject(OURS, "ours", {"copy": False}, mutable=True), *_ALL[1:])


# Of the bytes that wait for their turn.
_BUFFER_BYTES = 256_000_000
BUFFERED = "ours, buffer_bytes=256 MB"
_ITERATIONS = (_OURS, Subject(BUFFERED, "ours", {"buffer_bytes": _BUFFER_BYTES}), *_ALL[1:], *_RIVALS)
EACH = "ours, one file after the other"


def _raw(*subjects: Subject) -> tuple[Subject, ...]:
    return (*subjects, Subject(RAW, "raw"))


def _cold(*subjects: Subject) -> tuple[Subject, ...]:
    """Adds the limits through the page cache, and around it by several threads with reads of several MiB."""
    direct = ((threads, mib) for threads in (4, 16) for mib in (1, 8))
    return (
        *_raw(*subjects),
        Subject(f"{RAW}, two threads", "raw", loop="read"),
        *(Subject(f"{RAW}, direct, {n} x {m} MiB", "raw", loop=f"direct {n} x {m}") for n, m in direct),
    )


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
    Work("load_file pread", "gpt2", "load_file", _raw(*_ALL, *_RIVALS, _TORCH_LOAD), _PREAD, loop="read"),
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
    Work("load_file pread", "shard", "load_file", _raw(*_ALL, *_RIVALS, _TORCH_LOAD), _PREAD, loop="read"),
    Work("load_file pread, fresh process", "shard", "load_file", _BOTH, _PREAD, as_found=True),
    Work(
        "load_file mmap, cold, touched, fresh process",
        "shard",
        "load_file",
        _raw(*_ALL, *_PREFAULT[1:], *_RIVALS),
        _MMAP,
        touch=True,
        cold=True,
        as_found=True,
        loop="sequential",
    ),
    Work(
        "load_file pread, cold, fresh process",
        "shard",
        "load_file",
        _cold(*_ALL, *_RIVALS),
        _PREAD,
        cold=True,
        as_found=True,
        loop="sequential",
    ),
    Work("iterate, touched", "shard", "iterate", _ITERATIONS, touch=True),
    Work("iterate, cold, touched", "shard", "iterate", _ITERATIONS, touch=True, cold=True),
    Work(
        "save_sharded, 8 new files, fresh process",
        "shard",
        "save_sharded",
        (
            _OURS,
            Subject(EACH, "ours", {"is_each": True}),
            _ALL[1],
            *(Subject(f"{RAW}, threads: {n}", "raw", loop=f"files 8 x {n}") for n in (1, 2, 8)),
        ),
        {"max_shard_size": 530_000_000},
        as_found=True,
    ),
    Work("load_file mmap", "million", "load_file", _BOTH, _MMAP, moves=False),
    Work("load_file pread", "million", "load_file", (_OURS,), _PREAD),
    Work("load", "million", "load", (_OURS,)),
    Work("save_file, over a file", "million", "save_file", _BOTH),
    Work("save", "million", "save", (_OURS,)),
    Work("a dict of the names", "million", "dict", (_PYTHON,), moves=False),
    Work(
        "load_file mmap, touched",
        "network",
        "load_file",
        (*_ALL, *_RIVALS),
        _MMAP,
        touch=True,
        cold=True,
    ),
    Work("safe_open, every tensor touched", "network", "opened", (*_ALL, *_RIVALS), touch=True, cold=True),
    Work("get_slice, half of every tensor touched", "network", "halves", _ALL, touch=True, cold=True),
    Work(
        "load_file pread, cold",
        "loop",
        "load_file",
        _cold(*_ALL, *_RIVALS),
        _PREAD,
        cold=True,
        loop="sequential",
    ),
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
    Target("shard load_file mmap, cold, touched, fresh process", "rival", 1.0),
    Target("shard load_file mmap, cold, touched, fresh process", "raw", 0.95),
    Target("shard load_file pread, cold, fresh process", "rival", 1.0),
    Target("shard load_file pread, cold, fresh process", "raw", 0.95),
    # A tensor of the shard is larger than the buffer.
    Target("shard iterate, cold, touched", "copies", 0.22, BUFFERED),
    Target("shard save_sharded, 8 new files, fresh process", "each", 1.3),
    Target("network load_file mmap, touched", "times", 8),
    Target("network load_file mmap, touched", "rival", 1.0),
    Target("network load_file mmap, touched", "served", 1.1),
    Target("network safe_open, every tensor touched", "times", 8),
    Target("network safe_open, every tensor touched", "rival", 1.0),
    Target("network safe_open, every tensor touched", "served", 1.1),
    Target("network get_slice, half of every tensor touched", "times", 8),
    Target("network get_slice, half of every tensor touched", "rival", 1.0),
    Target("network get_slice, half of every tensor touched", "served", 1.1),
    Target("loop load_file pread, cold", "rival", 1.0),
    Target("loop load_file pread, cold", "raw", 0.95),
    *(Target(work.name, "scale", 1.3) for work in WORKS if work.data == "million" and _OURS in work.subjects),
)
