"""Checks of data: every dtype and size; files, tensors, slices and models; loaded and saved."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

import data
import safetensors_torch
from checking import MIB, POOL, SLAB, Setting, Skip, check, demand, demand_same, numbers, random, same_bits
from safetensors_torch import load, load_file, load_model, safe_open, save, save_file, save_model

_LENGTHS = (0, 1, 2, 3, 7, 255, 256, 1021, 4096, 100_003)


def _sample() -> data.Tensors:
    """Returns tensors of every dtype, at all positions in a slab, with scalars and empty tensors."""
    tensors = {}
    for number, (code, dtype) in enumerate(data.DTYPES.items()):
        itemsize = torch.empty((), dtype=dtype).element_size()
        shapes = [(length,) for length in _LENGTHS]
        shapes += [(3, 0, 2), (33, 5), (SLAB // itemsize,), (SLAB // itemsize - 1,), (SLAB * 3 // 2 // itemsize + 7,)]
        if code != data.PACKED:  # a packed scalar would hold two values
            shapes.append(())
        for index, shape in enumerate(shapes):
            tensors[f"{code}.{index:02}"] = random(shape, dtype, 100 * number + index)
    # In the order of a file: by the size of an element, so that every tensor is aligned.
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def _ways() -> Iterator[str]:
    """Sets up each mode of transfer and yields its name."""
    for way, pool, reserved, threads in (
        ("the pool as it grows", POOL, 0, 0),
        ("a warm pool", POOL, POOL, 0),
        ("two slabs", 2 * SLAB, 2 * SLAB, 0),
        ("one thread", POOL, POOL, 1),
        ("no pool", 0, 0, 0),
    ):
        safetensors_torch.release_transfer_memory()
        safetensors_torch.set_transfer_options(pinned_pool_bytes=pool, threads=threads)
        pinned = safetensors_torch.reserve_transfer_memory(reserved)
        demand(pinned == reserved, f"{reserved} bytes were reserved, and {pinned} pinned")
        yield way


@check("every dtype loads with the bits that the file has")
def loads(setting: Setting) -> None:
    tensors, device = _sample(), setting.device.torch
    path = data.write(setting.path(), tensors)
    content = path.read_bytes()
    demand_same(load_file(path), tensors, torch.device("cpu"), "on the CPU")
    for way in _ways():
        demand_same(load_file(path, device), tensors, device, f"load_file, {way}")
        demand_same(load_file(path, device, backend="pread"), tensors, device, f"load_file with pread, {way}")
        demand_same(load(content, device), tensors, device, f"load, {way}")
        with safe_open(path, "pt", device) as file:
            demand_same(file.get_tensors(), tensors, device, f"get_tensors, {way}")
            each = {name: file.get_tensor(name) for name in file.keys()}
            demand_same(each, tensors, device, f"get_tensor, {way}")


@check("every dtype is saved with the bytes that it has on the CPU")
def saves(setting: Setting) -> None:
    tensors = _sample()
    there = {name: tensor.to(setting.device.torch) for name, tensor in tensors.items()}
    expected = save(tensors)
    for way in _ways():
        demand(save(there) == expected, f"save, {way}: other bytes")
        save_file(there, setting.path())
        demand(setting.path().read_bytes() == expected, f"save_file, {way}: other bytes")
    demand_same(dict(data.read(setting.path())), tensors, torch.device("cpu"), "read back")


@check("views, tensors of both memories and transposed copies are saved as they are")
def odd_saves(setting: Setting) -> None:
    whole = numbers((1 << 20,)).to(setting.device.torch)
    tensors = {
        "view": whole[1001:-77],
        "host": numbers((777, 3), seed=1),
        "packed": numbers((300, 700), seed=2).to(setting.device.torch).t().contiguous(),
        "imaginary": torch.complex(numbers((9,)), numbers((9,), seed=3)).to(setting.device.torch).conj(),
    }
    expected = {name: tensor.cpu().resolve_conj().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, setting.path())
    demand_same(dict(data.read(setting.path())), expected, torch.device("cpu"), "read back")


@check("tensors that other writers did not align are loaded")
def unaligned(setting: Setting) -> None:
    device = setting.device.torch
    tensors = {"a": random((3,), torch.uint8)}
    for index, dtype in enumerate((torch.float64, torch.bfloat16, torch.float32, torch.int16)):
        tensors[f"b{index}"] = random((SLAB // 2 + index,), dtype, index)
        tensors[f"c{index}"] = random((2 * index + 1,), torch.uint8, index)
    path = data.write(setting.path(), tensors)
    for way in _ways():
        demand_same(load_file(path, device), tensors, device, way)


@check("20,000 small tensors are loaded and saved")
def many(setting: Setting) -> None:
    device = setting.device.torch
    tensors = {f"t.{index}": random((1 + index % 97,), torch.uint8, index) for index in range(20_000)}
    path = data.write(setting.path(), tensors)
    loaded = load_file(path, device)
    demand(set(loaded) == set(tensors), "other names came out")
    found, expected = (data.checksum(some[name] for name in tensors) for some in (loaded, tensors))
    demand(found == expected, "other data came out")
    demand(save(loaded) == save(tensors), "other bytes were saved")


@check("slices are read: rows, columns, steps, and what is no slice")
def slices(setting: Setting) -> None:
    device = setting.device.torch
    tensors = {
        "m": random((1501, 1003), torch.float32),
        "n": random((7, 40, 301), torch.int16),
        "s": random((), torch.int64),
    }
    path = data.write(setting.path(), tensors)
    indices = {
        "m": [
            3,
            -1,
            slice(10, 900),
            slice(None, None, 3),
            (slice(None), slice(5, 6)),
            (slice(2, 1400, 7), slice(1, 1000, 13)),
            (..., 17),
            slice(5, 5),
            ([1, 5, 3],),
            (None, slice(0, 4)),
        ],
        "n": [(3, slice(1, 9), slice(None, None, 2)), (..., slice(100, 300)), (slice(None, None, 3), 5)],
        "s": [()],
    }
    for backend in ("mmap", "pread"):
        for way in _ways():
            with safe_open(path, "pt", device, backend=backend) as file:
                for name, chosen in indices.items():
                    part = file.get_slice(name)
                    for index in chosen:
                        found = {"it": part[index]}
                        demand_same(found, {"it": tensors[name][index]}, device, f"{name}[{index}], {backend}, {way}")


@check("names= loads those, and no others")
def names(setting: Setting) -> None:
    device = setting.device.torch
    tensors = {f"layers.{index}": random((1000 + index,), torch.bfloat16, index) for index in range(50)}
    path = data.write(setting.path(), tensors)
    few = ["layers.40", "layers.3"]
    demand_same(load_file(path, device, names=few), {name: tensors[name] for name in few}, device, "a list")
    odd = {name: tensor for name, tensor in tensors.items() if name.endswith(("1", "7"))}
    demand_same(load_file(path, device, names=lambda name: name in odd), odd, device, "a function")
    demand_same(load(path.read_bytes(), device, names=few), {name: tensors[name] for name in few}, device, "load")


@check("dtype= converts as .to(dtype) does")
def conversions(setting: Setting) -> None:
    device = setting.device.torch
    kinds = [
        dtype for dtype in data.DTYPES.values() if dtype.is_floating_point and dtype != data.DTYPES.get(data.PACKED)
    ]
    plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    tensors = {f"{dtype}": numbers((SLAB // 4 + 11,), dtype, 1) for dtype in plain}
    tensors["steps"] = torch.arange(1001)
    path = data.write(setting.path(), dict(sorted(tensors.items(), key=lambda item: -item[1].element_size())))
    for way in _ways():
        for dtype in kinds:
            try:
                expected = {name: tensor.to(device).to(dtype) for name, tensor in tensors.items() if name != "steps"}
            except (RuntimeError, NotImplementedError):
                continue  # this torch does not compute with the dtype on the device
            expected["steps"] = tensors["steps"]
            demand_same(load_file(path, device, dtype=dtype), expected, device, f"{dtype}, {way}")
    demand_same(
        load(path.read_bytes(), device, dtype=torch.bfloat16),
        {name: tensor.to(torch.bfloat16) if name != "steps" else tensor for name, tensor in tensors.items()},
        device,
        "load",
    )


class _Net(nn.Module):
    """A module with a buffer and a tied weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, width, bias=False)
        self.tie()

    def tie(self) -> _Net:
        """Ties the weight again, because moving to another device can untie it."""
        self.head.weight = self.first.weight
        return self


def _state(model: nn.Module) -> data.Tensors:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _pointers(model: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}


@check("load_model fills a model in place, without a second copy of it")
def models(setting: Setting) -> dict[str, float]:
    device, width = setting.device, 1001
    source = _Net(width)
    path = setting.path()
    save_model(source, path)
    found = 0
    for way in _ways():
        for dtype in (torch.float32, torch.bfloat16):
            model = _Net(width).to(device.torch, dtype).tie()
            pointers = _pointers(model)
            expected = {name: tensor.to(model.state_dict()[name].dtype) for name, tensor in _state(source).items()}
            device.synchronize()
            before = device.allocated()
            device.reset_peak()
            demand(load_model(model, path) == (set(), []), f"{way}: names were missing or unexpected")
            device.synchronize()
            more = device.peak() - before
            demand(_pointers(model) == pointers, f"{way}, {dtype}: a tensor has other memory now")
            demand(more <= SLAB, f"{way}, {dtype}: {more / MIB:.1f} MiB more on the device")
            demand_same(dict(model.state_dict()), expected, device.torch, f"{way}, {dtype}")
            found = max(found, more)
    return {"load_model_device_bytes": found}


@check("save_model writes what it writes of a model on the CPU")
def saved_models(setting: Setting) -> None:
    model = _Net(1001)
    save_model(model, setting.path("host"), {"made": "by hand"})
    model.to(setting.device.torch).tie()
    for way in _ways():
        save_model(model, setting.path("device"), {"made": "by hand"})
        same = setting.path("device").read_bytes() == setting.path("host").read_bytes()
        demand(same, f"{way}: other bytes")


@check("another device than the current one is loaded to")
def another_device(setting: Setting) -> None:
    if setting.device.count() < 2:
        raise Skip("there is one device only")
    current = setting.device.current()
    other = torch.device(setting.device.torch.type, (current + 1) % setting.device.count())
    tensors = {"a": random((3 * SLAB + 5,), torch.uint8), "b": numbers((1 << 20,), torch.float32)}
    path = Path(data.write(setting.path(), dict(reversed(list(tensors.items())))))
    for way in _ways():
        loaded = load_file(path, other)
        demand_same(loaded, tensors, other, way)
        demand(same_bits(load_file(path, other, dtype=torch.float16)["b"], tensors["b"].half()), f"{way}: dtype=")
        demand(save(loaded) == save(tensors), f"{way}: save")
        demand(setting.device.current() == current, f"{way}: another device is current now")
