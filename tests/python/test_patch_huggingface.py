"""transformers, accelerate and peft save and load through patch_safetensors without a change to their code.

While patched, every read or write by the reference fails. The tests need no network.
"""

from __future__ import annotations

import collections
import importlib.util
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import safetensors_torch
from patching import FUNCTIONS

READS = ["get_tensor", "get_slice", "get_tensors", "keys", "offset_keys", "metadata"]
Counts = collections.Counter


@pytest.fixture(scope="module")
def users() -> list[types.ModuleType]:
    """They are imported before the patch, which has to replace the names in them."""
    pytest.importorskip("transformers")
    names = ["transformers.modeling_utils", "accelerate.checkpointing", "accelerate.utils.modeling"]
    names += ["peft.peft_model", "peft.utils.save_and_load"]
    return [importlib.import_module(name) for name in names if importlib.util.find_spec(name.partition(".")[0])]


@pytest.fixture
def calls(users: list, monkeypatch: pytest.MonkeyPatch, reference: types.SimpleNamespace) -> Iterator[Counts]:
    """Counts the calls of our functions while patched. The reference must not read or write."""
    counts = Counts()

    def counted(name: str, function: Callable) -> Callable:
        def count(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return count

    def refuse(*args, **kwargs):
        raise AssertionError("the reference was asked")

    for name in FUNCTIONS:
        monkeypatch.setattr(safetensors_torch, name, counted(name, getattr(safetensors_torch, name)))
    for name in READS:
        ours = getattr(safetensors_torch.safe_open, name)
        monkeypatch.setattr(safetensors_torch.safe_open, name, counted(name, ours))
        monkeypatch.setattr(reference.safe_open, name, refuse)
    for name in ("serialize", "serialize_file", "deserialize"):
        monkeypatch.setattr(safetensors.torch, name, refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with safetensors_torch.patch_safetensors():
        yield counts


def small(name: str) -> nn.Module:
    """Returns a model with random weights. GPT-2 and BERT tie two embeddings, T5 three, Llama none."""
    import transformers

    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if name == "gpt2":
        config = transformers.GPT2Config(vocab_size=101, n_positions=32, n_embd=32, n_layer=2, n_head=2, **ids)
        return transformers.GPT2LMHeadModel(config)
    if name == "t5":
        config = transformers.T5Config(vocab_size=101, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=2)
        return transformers.T5ForConditionalGeneration(config)
    sizes = {"vocab_size": 101, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    if name == "bert":
        config = transformers.BertConfig(num_attention_heads=2, max_position_embeddings=32, **sizes)
        return transformers.BertForMaskedLM(config)
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes, **ids)
    return transformers.LlamaForCausalLM(config)


def tied(model: nn.Module) -> set[frozenset[str]]:
    """Returns the groups of tied names."""
    groups = collections.defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}


def expect_same(loaded: nn.Module, saved: nn.Module) -> None:
    ours, theirs = loaded.state_dict(), saved.state_dict()
    assert list(ours) == list(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name
    assert tied(loaded) == tied(saved)


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


@pytest.fixture
def expect_readable(
    calls: Counts, monkeypatch: pytest.MonkeyPatch, reference: types.SimpleNamespace
) -> Callable[[Path, nn.Module], None]:
    def expect(directory: Path, model: nn.Module) -> None:
        """Checks that the reference reads the values of ``model`` from the files; a tied name may be missing."""
        monkeypatch.undo()
        tensors = {}
        for path in shards(directory):
            with reference.safe_open(path, "pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})
        state = model.state_dict()
        assert set(tensors) <= set(state)
        left_out = set(state) - set(tensors)
        assert all(any(name in group and group & set(tensors) for group in tied(model)) for name in left_out), left_out
        for name, tensor in tensors.items():
            assert torch.equal(tensor, state[name]), name

    return expect


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("name", ["gpt2", "t5", "bert", "llama"])
def test_transformers(name: str, size: str, tmp_path: Path, calls: Counts, expect_readable: Callable) -> None:
    model = small(name)
    assert bool(tied(model)) == (name != "llama")
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(shards(tmp_path)) > 1) == (size == "20KB")
    assert calls["save_file"] == len(shards(tmp_path))
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert calls["keys"] >= len(shards(tmp_path))
    assert calls["get_slice"] >= len(model.state_dict()) - sum(map(len, tied(model)))
    expect_same(loaded, model)
    expect_readable(tmp_path, model)


def test_transformers_reads_bytes(tmp_path: Path, calls: Counts) -> None:
    model = small("gpt2")
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, disable_mmap=True)
    assert calls["load"] == 1
    expect_same(loaded, model)


def test_transformers_names_a_broken_file_by_our_error(tmp_path: Path, calls: Counts) -> None:
    model = small("llama")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(safetensors.SafetensorError, match="model.safetensors") as caught:
        type(model).from_pretrained(tmp_path)
    assert type(caught.value) is safetensors_torch.SafetensorError


# With a device map, accelerate's loads do not tie weights.
@pytest.mark.parametrize(("name", "device_map"), [("gpt2", None), ("llama", None), ("llama", {"": "cpu"})])
@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_accelerate(
    name: str, device_map: dict | None, size: str, tmp_path: Path, calls: Counts, expect_readable: Callable
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = small(name)
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path, max_shard_size=size)
    assert (len(shards(tmp_path)) > 1) == (size == "40KB")
    assert calls["save_file"] == len(shards(tmp_path))
    for load in (accelerate.load_checkpoint_in_model, accelerate.load_checkpoint_and_dispatch):
        calls.clear()
        loaded = small(name)
        for parameter in loaded.parameters():
            nn.init.zeros_(parameter)
        load(loaded, str(tmp_path), device_map=device_map)
        assert calls["metadata"] == len(shards(tmp_path))
        assert calls["load_file"] + calls["get_tensors"] + calls["get_tensor"] >= len(shards(tmp_path))
        expect_same(loaded, model)
    expect_readable(tmp_path, model)


def test_accelerate_dispatches_to_an_empty_model(tmp_path: Path, calls: Counts) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = small("llama")
    accelerate.Accelerator(cpu=True).save_model(model, tmp_path, max_shard_size="40KB")
    with accelerate.init_empty_weights():
        loaded = type(model)(model.config)
    loaded = accelerate.load_checkpoint_and_dispatch(loaded, str(tmp_path), device_map={"": "cpu"})
    expect_same(loaded, model)


def test_accelerate_state(tmp_path: Path, calls: Counts) -> None:
    """save_state and load_state, which call save_file and load_model."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(nn.Linear(3, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accelerator.save_state(str(tmp_path))
    nn.init.zeros_(model.weight)
    accelerator.load_state(str(tmp_path))
    assert (calls["save_file"], calls["load_model"]) == (1, 1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_peft(tmp_path: Path, calls: Counts, monkeypatch: pytest.MonkeyPatch, reference: types.SimpleNamespace) -> None:
    peft = pytest.importorskip("peft")
    import transformers

    small("llama").save_pretrained(tmp_path / "base")

    def base() -> nn.Module:
        return transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base(), config)
    calls.clear()
    model.save_pretrained(tmp_path / "adapter")
    assert calls["save_file"] == 1
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert calls["load_file"] == 1
    expect_same(loaded, model)
    monkeypatch.undo()
    with reference.safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == 8  # A and B of two projections in two layers
        adapter = peft.get_peft_model_state_dict(model)
        assert all(torch.equal(file.get_tensor(name), adapter[name]) for name in file.keys())


def test_their_modules_have_the_reference_back(
    users: list[types.ModuleType], calls: Counts, reference: types.SimpleNamespace
) -> None:
    theirs = {id(getattr(reference, name)) for name in (*FUNCTIONS, "safe_open")}

    def held() -> int:
        return sum(id(value) in theirs for module in users for value in vars(module).values())

    assert held() == 0
    safetensors_torch.unpatch_safetensors()
    try:
        assert held() >= len(users)
    finally:
        safetensors_torch.patch_safetensors()  # which the fixture undoes
