"""Forks after and during loads and saves: the child loads, saves and ends; the parent continues.

Each scenario is a process of its own with a time limit, because a bug would show as a child that waits forever.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from fresh import run_python
from safetensors_torch import _load

SECONDS = 180

# The beginning of every scenario.
SHARED = """
import os, sys, threading, time
from pathlib import Path
import numpy as np
import torch
from safetensors_torch import IncrementalWriter, _progress, load, load_file, load_model, safe_open, save, save_file

directory = Path(sys.argv[1])
tensors = {"large": torch.arange(6 << 20, dtype=torch.int32), "small": torch.arange(5.0)}  # worth threads
path = directory / "model"
save_file(tensors, path)

def same(loaded, expected=tensors):
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        # torch's own operators on large tensors would wait for threads that the child lacks.
        assert np.array_equal(loaded[name].numpy(), tensor.numpy()), name

def all_works(name):
    "Loads, saves and slices, in a file of its own"
    own = directory / name
    for backend in ("mmap", "pread"):
        same(load_file(path, backend=backend))
        with safe_open(path, backend=backend) as file:
            same(file.get_tensors())
            assert file.get_slice("large")[1 << 20 : 3 << 20 : 1 << 19].tolist() == [k << 19 for k in range(2, 6)]
    save_file(tensors, own)
    same(load_file(own, prefault=True))
    same(load(own.read_bytes()))
    assert save(tensors) == own.read_bytes()
    own.unlink()

def fork(work, *args, end=os._exit):
    "Returns the child's pid. The child runs ``work`` and ends as those of multiprocessing do, or with ``end``"
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        work(*args)
        end(0)
    return child

def wait(child):
    assert os.waitpid(child, 0)[1] == 0, "the child failed"
"""

AFTER_A_LOAD = """
same(load_file(path, backend="pread"))
kept = load_file(path)
child = fork(lambda: (all_works("child"), same(kept), kept["large"].zero_()), end=sys.exit)
all_works("parent")
wait(child)
same(kept)
"""

A_HANDLE_OF_THE_PARENT = """
for backend in ("mmap", "pread"):
    file = safe_open(path, backend=backend)
    part = file.get_slice("large")
    def reads():
        same(file.get_tensors())
        assert part[-1:].tolist() == [(6 << 20) - 1] and part[[3, 1]].tolist() == [3, 1]
        file.__exit__(None, None, None)
    children = [fork(reads) for _ in range(3)]
    same(file.get_tensors())
    for child in children:
        wait(child)
    reads()
"""

WHILE_PREFAULT_THREADS_RUN = """
big = directory / "big"
header = b'{"big":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (1 << 28, 1 << 28)
with big.open("wb") as file:
    file.write(len(header).to_bytes(8, "little") + header)
    file.truncate(8 + len(header) + (1 << 28))

def names():
    for task in os.listdir("/proc/self/task"):
        try:
            yield Path(f"/proc/self/task/{task}/comm").read_text()
        except OSError:
            pass  # finished already

def touches(loaded):
    assert loaded["big"].numpy()[:: 1 << 12].sum() == 0
    same(load_file(path))
    assert load_file(big)["big"][-1] == 0

forked = 0
for turn in range(60):
    loaded = load_file(big)
    if any(name.startswith("sft-prefault") for name in names()):
        forked += 1
        child = fork(touches, loaded)
        del loaded
        wait(child)
        if forked == 5:
            break
assert forked, "no thread was seen at work"
all_works("parent")
"""

WHILE_OTHER_THREADS_LOAD_AND_SAVE = """
done, failures = threading.Event(), []

def busy(work):
    try:
        while not done.is_set():
            work()
    except BaseException as error:
        failures.append(error)

model = torch.nn.Linear(300, 300)
save_file(model.state_dict(), directory / "linear")
options = torch.ops.safetensors_torch
works = [
    lambda: load_file(path, backend="pread"),
    lambda: load_file(path, dtype=torch.float16),
    lambda: save_file(tensors, directory / "other"),
    lambda: load_model(model, directory / "linear"),
    lambda: options._set_transfer_options(64 << 20, 0),
    lambda: options._transfer_memory(),
]
threads = [threading.Thread(target=busy, args=(work,)) for work in works]
for thread in threads:
    thread.start()

def child_works(number):
    assert options._transfer_memory() == 0 and options._transfer_options() == (64 << 20, 0, 0)
    options._set_transfer_options(32 << 20, 0)
    same(load_file(path))
    same(load_file(path, backend="pread"))
    assert load_file(path, dtype=torch.float16)["small"].dtype == torch.float16
    save_file({"a": torch.ones(3)}, directory / f"child{number}")

for number in range(8):
    wait(fork(child_works, number))
    time.sleep(0.01)
done.set()
for thread in threads:
    thread.join()
assert not failures, failures
all_works("parent")
"""

WHILE_A_LOCK_IS_TAKEN = """
# If a fork did not take the lock first, about one child in sixty would wait forever.
lock = torch.ops.safetensors_torch._transfer_memory.default
over = False
sys.setswitchinterval(1e-4)  # the forks need not wait for the threads

def hammers():
    while not over:
        lock()

threads = [threading.Thread(target=hammers) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(200):
    wait(fork(lock))
over = True
for thread in threads:
    thread.join()
"""

WHILE_A_THREAD_PATCHES = """
import signal
try:
    import safetensors.torch
except ImportError:
    sys.exit()
from safetensors_torch import patch_safetensors

over = False
reference = safetensors.torch.load_file

def patches():
    while not over:
        with patch_safetensors():
            pass

def child_patches():
    signal.alarm(20)  # ends a child that waits
    with patch_safetensors():
        same(safetensors.torch.load_file(path))
    while safetensors.torch.load_file is not reference:  # the parent's patch was forked too
        safetensors_torch.unpatch_safetensors()

import safetensors_torch
sys.setswitchinterval(1e-5)
thread = threading.Thread(target=patches, daemon=True)
thread.start()
for _ in range(40):
    wait(fork(child_patches))
over = True
thread.join()
"""

AFTER_A_SAVE_OVER_A_LARGE_FILE = """
for turn in range(4):
    save_file(tensors, path)  # a thread closes the old file
    child = fork(lambda: (save_file(tensors, path), same(load_file(path))))
    save_file(tensors, directory / "other")
    wait(child)
    same(load_file(path))
"""

FROM_INSIDE_OF_A_LOAD = """
_progress.STEP_SECONDS = 0.0  # so that the load takes several steps
large = {"large": torch.zeros(32 << 20)}
save_file(large, directory / "float")
children = []

def forks(done, total):
    if not children and done < total:
        children.append(os.fork())

try:
    loaded = load_file(directory / "float", dtype=torch.float64, progress=forks)
except Exception as error:
    # The child lacks the threads of the load.
    assert children == [0] and "before a fork" in str(error), error
    torch.set_num_threads(1)
    same(load_file(path))
    assert load_file(directory / "float", dtype=torch.float64)["large"].shape == (32 << 20,)
    os._exit(0)
assert children and children[0] > 0
wait(children[0])
assert loaded["large"].shape == (32 << 20,) and not loaded["large"].numpy()[::4096].any()
"""

FROM_INSIDE_OF_A_SAVE = """
_progress.STEP_SECONDS = 0.0  # so that the save takes several steps
large = {f"t{i}": torch.full((20 << 20,), float(i)) for i in range(4)}
children = []

def forks(done, total):
    if not children and done < total:
        children.append(os.fork())
        if children[0]:
            wait(children[0])

try:
    save_file(large, directory / "saved", progress=forks)
except Exception as error:
    # The child would write into the parent's file.
    assert children == [0] and "before a fork" in str(error), error
    assert not (directory / "saved").exists()
    save_file(tensors, directory / "own")
    same(load_file(directory / "own"))
    os._exit(0)
assert children and children[0] > 0
same(load_file(directory / "saved"), large)
"""

A_WRITER_OF_THE_PARENT = """
def refused(work, *args):
    try:
        work(*args)
    except Exception as error:
        assert "before a fork" in str(error), error
    else:
        raise AssertionError("the child was not refused")

for order in ("child first", "parent first"):
    writer = IncrementalWriter(directory / "streamed", tensors)
    gate, go = os.pipe()
    def child_goes_on():
        os.read(gate, 1)
        for name, tensor in tensors.items():
            refused(writer.write, name, torch.zeros_like(tensor))
        refused(writer.missing)
        refused(writer.commit)
        writer.discard()
        save_file(tensors, directory / "own")
        same(load_file(directory / "own"))
    child = fork(child_goes_on)
    if order == "child first":
        os.write(go, b"!")
        wait(child)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.commit()
    if order == "parent first":
        os.write(go, b"!")
        wait(child)
    same(load_file(directory / "streamed"))
"""

DATA_LOADER = """
from torch.utils.data import DataLoader, Dataset

rows = {"rows": torch.arange(64 * 1000, dtype=torch.float32).reshape(64, 1000)}
save_file(rows, directory / "rows")

class Rows(Dataset):
    def __init__(self, backend):
        self.backend = backend
        self.open = safe_open(directory / "rows", backend=backend)
        self.part = self.open.get_slice("rows")
    def __len__(self):
        return 64
    def __getitem__(self, index):
        by_slice, by_tensor = self.part[index], self.open.get_tensor("rows")[index]
        by_load = load_file(directory / "rows", backend=self.backend)["rows"][index]
        return torch.stack([by_slice, by_tensor, by_load])

for backend in ("mmap", "pread"):
    dataset = Rows(backend)
    same(load_file(path, backend=backend))
    dataset[0]
    for epoch in range(2):
        loader = DataLoader(dataset, batch_size=8, num_workers=2, multiprocessing_context="fork", timeout=60)
        batches = list(loader)
        for way in range(3):
            found = torch.cat([batch[:, way] for batch in batches])
            assert torch.equal(found, rows["rows"]), (backend, way)
    assert torch.equal(dataset[5][0], rows["rows"][5])
"""

SCENARIOS = {
    "after a large load": AFTER_A_LOAD,
    "a handle of the parent": A_HANDLE_OF_THE_PARENT,
    "while prefault threads run": WHILE_PREFAULT_THREADS_RUN,
    "while other threads load and save": WHILE_OTHER_THREADS_LOAD_AND_SAVE,
    "while a lock is taken": WHILE_A_LOCK_IS_TAKEN,
    "while a thread patches": WHILE_A_THREAD_PATCHES,
    "after a save over a large file": AFTER_A_SAVE_OVER_A_LARGE_FILE,
    "from inside of a load": FROM_INSIDE_OF_A_LOAD,
    "from inside of a save": FROM_INSIDE_OF_A_SAVE,
    "a writer of the parent": A_WRITER_OF_THE_PARENT,
    "DataLoader": DATA_LOADER,
}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_fork(scenario: str, tmp_path: Path) -> None:
    done = run_python(SHARED + scenario, tmp_path, seconds=SECONDS)
    output = done.stdout + done.stderr
    assert done.returncode != -signal.SIGKILL, f"not finished after {SECONDS} s: a process waits forever. {output}"
    assert done.returncode == 0, output
    assert "Traceback" not in output and "Error" not in output, output


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="from Python 3.12 on loads need not pause the collector")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_load_of_another_thread_leaves_the_childs_collector_on() -> None:
    inside, over = threading.Event(), threading.Event()

    def loads() -> None:
        with _load._gc_paused():
            inside.set()
            over.wait()

    thread = threading.Thread(target=loads)
    thread.start()
    try:
        assert inside.wait(60) and not gc.isenabled()
        child = os.fork()
        if child == 0:
            os._exit(0 if gc.isenabled() else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert not gc.isenabled(), "the parent's is paused still"
    finally:
        over.set()
        thread.join()
    assert gc.isenabled()
