"""safetensors_torch.distributed without a process group: one process, and what it imports."""

from __future__ import annotations

import json
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import safetensors_torch
from fresh import run_python
from safetensors_torch import distributed as std
from safetensors_torch.cli import main


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The files of two processes: halves of a matrix, the one of rows, the other of columns, and a scalar."""
    path = tmp_path / "shards"
    path.mkdir()
    matrix = torch.arange(12.0).reshape(4, 3)
    for rank, (rows, columns) in enumerate(((slice(0, 2), slice(0, 2)), (slice(2, 4), slice(2, 3)))):
        tensors = {"rows": matrix[rows].clone(), "columns": matrix[:, columns].contiguous()}
        positions = {"rows": {"saved_offsets": [rows.start, 0]}, "columns": {"saved_offsets": [0, columns.start]}}
        if rank == 0:
            tensors["scalar"] = torch.tensor(7)
            positions["scalar"] = {"saved_offsets": []}
        name = f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        metadata = {"DCP_SHARDING_INFO": json.dumps(positions), "DCP_VERSION": "1.0", "format": "pt"}
        safetensors_torch.save_file(tensors, path / name, metadata)
    return path


WHOLE = {
    "columns": torch.arange(12.0).reshape(4, 3),
    "rows": torch.arange(12.0).reshape(4, 3),
    "scalar": torch.tensor(7),
}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_import_of_the_package_does_not_import_torch_distributed() -> None:
    done = run_python("""
        import sys
        before = set(sys.modules)
        import safetensors_torch
        new = set(sys.modules) - before
        print([name for name in new if name.startswith(("torch.distributed", "safetensors_torch.distributed"))])
    """)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_one_process_saves_and_loads(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    seen = []
    names = std.save(model.state_dict(), tmp_path / "a", {"k": "v"}, progress=lambda *done: seen.append(done))
    assert names == ["model.safetensors"]
    assert seen[-1] == (32, 32)
    other = torch.nn.Linear(3, 2)
    assert std.load_into(other, tmp_path / "a") == ([], [])
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    with pytest.raises(RuntimeError, match="missing in the checkpoint: 'more'"):
        std.load_into({**model.state_dict(), "more": torch.zeros(1)}, tmp_path / "a")
    assert std.load_into({"bias": torch.zeros(2)}, tmp_path / "a", strict=False) == ([], ["weight"])
    half = {"weight": torch.zeros(2, 3, dtype=torch.float16), "bias": torch.zeros(4)[::2]}
    std.load_into(half, tmp_path / "a")
    assert torch.equal(half["weight"], model.weight.half()) and torch.equal(half["bias"], model.bias)


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:The PyTorch API of nested tensors")
def test_tensors_that_have_no_place_for_elements_are_refused(tmp_path: Path) -> None:
    std.save({"a": torch.ones(3), "w": torch.ones(4, 4)}, tmp_path)
    target = {"a": torch.zeros(3)}
    freed = torch.zeros(4, 4)
    freed.untyped_storage().resize_(0)
    for tensor, kind, text in (
        (torch.zeros(4, 4).to_sparse(), ValueError, "is of the layout torch.sparse_coo"),
        (torch.zeros(4, 4).to_sparse_csr(), ValueError, "is of the layout torch.sparse_csr"),
        (torch.nested.nested_tensor([torch.zeros(2)]), ValueError, "is nested"),
        (torch.zeros(4, 1).expand(4, 4), ValueError, "is expanded"),
        (freed, RuntimeError, "its memory was freed"),
        (torch.empty(4, 4, device="meta"), RuntimeError, "on the meta device"),
    ):
        with pytest.raises(kind, match=f"'w'.*{text}"):
            std.load_into(target | {"w": tensor}, tmp_path)
        if text != "is expanded":
            with pytest.raises((ValueError, RuntimeError), match="['`]w['`]"):
                std.save({"w": tensor}, tmp_path / "other")
    assert target["a"].tolist() == [0, 0, 0]


def test_tied_parameters_of_a_module_are_not_missing(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    safetensors_torch.save_model(model, tmp_path / "model.safetensors")
    before = model[0].weight.detach().clone()
    torch.nn.init.zeros_(model[0].weight)
    assert std.load_into(model, tmp_path) == ([], [])
    assert torch.equal(model[0].weight, before)


def test_consolidate(shards: Path, tmp_path: Path) -> None:
    seen = []
    names = std.consolidate(shards, tmp_path / "one", progress=lambda *done: seen.append(done))
    assert names == ["model.safetensors"]
    assert seen[-1] == (104, 104)
    assert same(safetensors_torch.load_file(tmp_path / "one" / "model.safetensors"), WHOLE)
    mapping = {"rows": 2, "columns": 1, "scalar": 2, "absent": 9}
    names = std.consolidate(os.fsencode(shards), tmp_path / "two", fqn_to_index_mapping=mapping, durable=True)
    assert names == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert same(safetensors_torch.load_sharded(tmp_path / "two"), WHOLE)
    names = std.consolidate(shards, tmp_path / "two", fqn_to_index_mapping=dict.fromkeys(WHOLE, 1))
    assert names == ["model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    assert sorted(os.listdir(tmp_path / "two")) == sorted(names)


def test_numbers_without_a_tensor_are_left_out(shards: Path, tmp_path: Path) -> None:
    # Of the index of a larger model.
    mapping = {"rows": 2, "columns": 5, "scalar": 2, "other": 3}
    expected = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    index = "model.safetensors.index.json"
    assert std.consolidate(shards, tmp_path / "joined", fqn_to_index_mapping=mapping) == [*expected, index]
    writer = std.HuggingFaceStorageWriter(tmp_path / "saved", mapping)
    dcp.save(dict(WHOLE), storage_writer=writer, no_dist=True)
    for path in (tmp_path / "joined", tmp_path / "saved"):
        assert sorted(os.listdir(path)) == [*expected, index]
        assert sorted(safetensors_torch.load_file(path / expected[0])) == ["rows", "scalar"]
        assert same(safetensors_torch.load_sharded(path), WHOLE)


@pytest.mark.parametrize("mapping", [{}, {"rows": 1, "scalar": 1}])
def test_a_tensor_without_a_file_is_refused(shards: Path, tmp_path: Path, mapping: dict[str, int]) -> None:
    with pytest.raises((ValueError, safetensors_torch.SafetensorError), match="columns|mapping is empty"):
        std.consolidate(shards, tmp_path / "joined", fqn_to_index_mapping=mapping)
    for layout in ("final", "shards"):
        writer = std.HuggingFaceStorageWriter(tmp_path / layout, mapping, layout=layout)
        with pytest.raises(CheckpointException, match="no file for tensor 'columns': give each tensor"):
            dcp.save(dict(WHOLE), storage_writer=writer, no_dist=True)


def test_only_names_of_the_writer_are_those_of_chunks(tmp_path: Path) -> None:
    safetensors_torch.save_file({"w": torch.ones(2)}, tmp_path / "shard-00001-of-00001.safetensors")
    target = {"w": torch.zeros(2)}
    std.load_into(target, tmp_path)
    assert target["w"].tolist() == [1, 1]
    # torch pads to five digits, so there may be more.
    (tmp_path / "shard-00001-of-00001.safetensors").unlink()
    metadata = {"DCP_SHARDING_INFO": json.dumps({"w": {"saved_offsets": [0]}}), "DCP_VERSION": "1.0"}
    name = "shard-100000-model-00001-of-00001.safetensors"
    safetensors_torch.save_file({"w": torch.full((2,), 2.0)}, tmp_path / name, metadata)
    std.load_into(target, tmp_path)
    assert target["w"].tolist() == [2, 2]


def test_consolidate_into_the_directory_of_the_shards(shards: Path) -> None:
    # transformers does it.
    metadata = std.HuggingFaceStorageReader(str(shards)).read_metadata()
    std.consolidate(shards, shards, fqn_to_index_mapping=dict.fromkeys(metadata.state_dict_metadata, 1))
    assert len(list(shards.glob("shard-*"))) == 2
    assert same(safetensors_torch.load_sharded(shards), WHOLE)
    target = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}
    dcp.load(target, storage_reader=std.HuggingFaceStorageReader(shards), no_dist=True)
    assert same(target, WHOLE)


def test_consolidate_refuses(shards: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], text: str, **options: object) -> None:
        with pytest.raises(error, match=text):
            std.consolidate(shards, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused(safetensors_torch.SafetensorError, '"columns": it has no file', fqn_to_index_mapping={"rows": 1})
    refused(ValueError, "file number 0", fqn_to_index_mapping=dict.fromkeys(WHOLE, 0))
    refused(ValueError, "is not a size", max_shard_size="much")
    next(shards.glob("shard-00002*")).unlink()
    with pytest.raises(safetensors_torch.SafetensorError, match="no file shard-"):
        std.consolidate(tmp_path, tmp_path / "out")


def test_consolidate_is_interrupted(shards: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    large = torch.zeros(30_000_000)
    metadata = {"DCP_SHARDING_INFO": json.dumps({"large": {"saved_offsets": [0]}})}
    for number in range(2):
        metadata["DCP_SHARDING_INFO"] = json.dumps({"large": {"saved_offsets": [number * large.numel()]}})
        name = f"shard-0000{number + 3}-model-00001-of-00001.safetensors"
        safetensors_torch.save_file({"large": large}, shards / name, metadata)
    with pytest.raises(KeyboardInterrupt):
        std.consolidate(shards, tmp_path / "out", progress=interrupt)


def test_the_command_consolidates(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "out")
    assert main(["consolidate", str(shards), target]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    assert same(safetensors_torch.load_file(f"{target}/model.safetensors"), WHOLE)
    assert main(["consolidate", str(shards), target]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["consolidate", str(shards), target, "--force", "--json", "--max-shard-size", "50B"]) == 0
    assert len(json.loads(capsys.readouterr().out)["files"]) == 4


def test_shards_are_loaded(shards: Path) -> None:
    target = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}
    assert std.load_into(target, shards) == ([], [])
    assert same(target, WHOLE)
    metadata = std.HuggingFaceStorageReader(shards).read_metadata()
    assert metadata.state_dict_metadata["columns"].size == torch.Size([4, 3])
    assert len(metadata.state_dict_metadata["columns"].chunks) == 2


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"DCP_SHARDING_INFO": "{}"}, "does not have its position"),
        ({"DCP_SHARDING_INFO": "["}, "no valid DCP_SHARDING_INFO"),
        ({"format": "pt"}, "no valid DCP_SHARDING_INFO"),
        ({"DCP_SHARDING_INFO": json.dumps({"rows": {"saved_offsets": [0, 0]}})}, "chunks of it overlap"),
        ({"DCP_SHARDING_INFO": json.dumps({"rows": {"saved_offsets": [3, 0]}})}, "of its 15 elements"),
    ],
)
def test_shards_that_do_not_fit_are_refused(shards: Path, change: dict[str, str], text: str) -> None:
    for path in shards.glob("shard-00002*"):
        safetensors_torch.save_file({"rows": torch.zeros(2, 3)}, path, change)
    with pytest.raises(safetensors_torch.SafetensorError, match=text):
        std.load_into({"rows": torch.zeros(4, 3)}, shards, strict=False)


def test_files_without_an_index_are_read(tmp_path: Path) -> None:
    parts = {name: {name: torch.full((2,), float(number))} for number, name in enumerate(("a", "b"), 1)}
    for number, tensors in enumerate(parts.values(), 1):
        safetensors_torch.save_file(tensors, tmp_path / f"model-{number:05d}-of-00002.safetensors")
    target = {"a": torch.zeros(2), "b": torch.zeros(2)}
    dcp.load(target, storage_reader=std.HuggingFaceStorageReader(tmp_path))
    assert same(target, {**parts["a"], **parts["b"]})
    safetensors_torch.save_file(parts["a"], tmp_path / "other.safetensors")
    with pytest.raises(safetensors_torch.SafetensorError, match="'a' is also in another file"):
        std.load_into(target, tmp_path)
    (tmp_path / "other.safetensors").unlink()
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(safetensors_torch.SafetensorError, match="model-00001-of-00002.safetensors is missing"):
        std.load_into(target, tmp_path, strict=False)


def test_long_paths_and_names_that_are_not_utf8(shards: Path, tmp_path: Path) -> None:
    directory = tmp_path / ("L" * 120) / ("L" * 120) / os.fsdecode(b"\xff")
    directory.parent.mkdir(parents=True)
    os.rename(shards, directory)
    target = {name: torch.zeros_like(tensor) for name, tensor in WHOLE.items()}
    std.load_into(target, directory)
    assert same(target, WHOLE)
    std.consolidate(directory, directory / "whole")
    std.save(WHOLE, directory)
    dcp.load(target, storage_reader=std.HuggingFaceStorageReader(directory))
    assert same(target, WHOLE)


def test_names_without_utf8_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        std.save({"\ud800": torch.zeros(1)}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_quantized_weights_are_those_of_torch(tmp_path: Path) -> None:
    weight = torch.randn(256, 300).to(torch.float8_e4m3fn)
    tensors = {"a.weight": weight, "a.weight_scale_inv": torch.rand(2, 3) + 0.5, "b": torch.randn(256, 300)}
    safetensors_torch.save_sharded(tensors, tmp_path, max_shard_size=100_000)
    loaded = []
    for reader in (dcp.QuantizedHuggingFaceStorageReader, std.QuantizedHuggingFaceStorageReader):
        target = {"a.weight": torch.zeros(256, 300), "b": torch.zeros(256, 300)}
        dcp.load(target, storage_reader=reader(str(tmp_path)))
        loaded.append(target)
    assert same(loaded[0], loaded[1])
    assert not torch.equal(loaded[1]["a.weight"], weight.float())
    with pytest.raises(BaseException, match="nowhere"):
        dcp.load(target, storage_reader=std.QuantizedHuggingFaceStorageReader(tmp_path / "nowhere"))


def test_a_plan_that_a_writer_did_not_prepare_is_written(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    tensors = {"a": torch.rand(4), "b": torch.rand(10)}
    planner = DefaultSavePlanner()
    planner.set_up_planner(state_dict=tensors)
    writer = std.HuggingFaceStorageWriter(tmp_path, {"a": 1, "b": 2})
    results = writer.write_data(planner.create_local_plan(), planner).value()
    assert [result.storage_data.relative_path for result in results] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    writer.finish(None, [results])
    assert same(safetensors_torch.load_sharded(tmp_path), tensors)


def test_patch_is_off_by_default_and_nests() -> None:
    import torch.distributed.checkpoint.hf_storage as module

    originals = module.HuggingFaceStorageWriter, module.consolidate_safetensors_files, dcp.HuggingFaceStorageReader
    with safetensors_torch.patch_safetensors():
        assert module.HuggingFaceStorageWriter is originals[0]
        with safetensors_torch.patch_safetensors(dcp=True):
            outer = safetensors_torch.patch_safetensors(dcp=True)
            assert issubclass(module.HuggingFaceStorageWriter, std.HuggingFaceStorageWriter)
            assert issubclass(dcp.QuantizedHuggingFaceStorageReader, std.QuantizedHuggingFaceStorageReader)
        assert module.consolidate_safetensors_files is not originals[1]
        with outer:
            pass
        assert (
            module.HuggingFaceStorageWriter,
            module.consolidate_safetensors_files,
            dcp.HuggingFaceStorageReader,
        ) == originals
    with safetensors_torch.patch_safetensors(dcp=True):
        writer = dcp.HuggingFaceStorageWriter(path="somewhere", save_distributed=True)
    # A process that is not patched gets one of ours.
    assert type(pickle.loads(pickle.dumps(writer))) is std.HuggingFaceStorageWriter


def test_a_writer_checks_its_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout is 'best'"):
        std.HuggingFaceStorageWriter(tmp_path, layout="best")
    with pytest.raises(ValueError, match="not both"):
        std.HuggingFaceStorageWriter(tmp_path, {"a": 1}, max_shard_size=1)
    with pytest.raises(TypeError, match="durable"):
        std.HuggingFaceStorageWriter(tmp_path, durable=1)


def test_weights_iterator_checks_its_arguments(shards: Path) -> None:
    path = next(shards.glob("*.safetensors"))
    with pytest.raises(ValueError, match="read_once is 'twice'"):
        std.weights_iterator(path, read_once="twice")
    with pytest.raises(ValueError, match="needs a process_group"):
        std.weights_iterator(path, read_once="world")
    with pytest.raises(safetensors_torch.SafetensorError, match="slices has 'row'.*did you mean"):
        std.weights_iterator(path, slices={"row": slice(0, 1)})


class _LoadConfig:
    load_format = "safetensors_torch"
    use_tqdm_on_load = False


class _DefaultModelLoader:
    """What the plugin meets of vLLM's class."""

    def __init__(self, load_config: _LoadConfig) -> None:
        if load_config.load_format != "safetensors":
            raise ValueError(f"Unknown load_format: {load_config.load_format}")
        self.load_config = load_config

    def _prepare_weights(self, path: str, *rest: object) -> tuple[str, list[str], bool, str]:
        files = [str(file) for file in Path(path).glob("*.safetensors")]
        return path, files, bool(files), "index"

    def _get_weights_iterator(self, source: types.SimpleNamespace) -> object:
        _, files, _, _ = self._prepare_weights(source.model_or_path, None)
        return (("theirs", file) for file in files or ["pickled"])


def test_vllm_plugin(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = {}

    def register_model_loader(name: str) -> object:
        return lambda loader: registered.setdefault(name, loader)

    loader_module = types.ModuleType("vllm.model_executor.model_loader")
    loader_module.register_model_loader = register_model_loader
    default = types.ModuleType("vllm.model_executor.model_loader.default_loader")
    default.DefaultModelLoader = _DefaultModelLoader
    for name in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, loader_module.__name__, loader_module)
    monkeypatch.setitem(sys.modules, default.__name__, default)
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="vllm.general_plugins", name="safetensors_torch")
    entry.load()()
    config = _LoadConfig()
    loader = registered["safetensors_torch"](config)
    assert config.load_format == "safetensors_torch"
    source = types.SimpleNamespace(model_or_path=str(shards), prefix="p.")
    found = dict(loader._get_weights_iterator(source))
    assert sorted(found) == ["p.columns", "p.rows", "p.scalar"]
    source.model_or_path = str(tmp_path)
    assert list(loader._get_weights_iterator(source)) == [("theirs", "pickled")]
