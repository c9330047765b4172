"""examples/cpp/inference against transformers: the logits of a GPT-2 to the last bit, and the tokens that follow.

Run: INFERENCE=BUILD/inference python -m pytest tests/examples/test_inference.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from safetensors_torch import load_file, save_file

INFERENCE = os.environ["INFERENCE"]
PROMPT, NEW = [3, 141, 59, 26, 53, 58, 97], 12


def make(n_embd: int, n_head: int) -> GPT2LMHeadModel:
    """A small GPT-2, drawn wide enough that its tokens are not all the same."""
    torch.manual_seed(2019)
    sizes = {"n_layer": 3, "n_embd": n_embd, "n_head": n_head, "vocab_size": 211, "n_positions": 64}
    config = GPT2Config(
        **sizes, attn_implementation="eager", initializer_range=0.3, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).eval()
    # Biases and norms that are all 0 and 1 would not tell whether they arrived.
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float(".ln_" in name and name.endswith("weight")), std=0.1)
    return model


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return make(n_embd=96, n_head=4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, model: GPT2LMHeadModel) -> Path:
    directory = tmp_path_factory.mktemp("models")
    model.save_pretrained(directory / "whole")
    model.save_pretrained(directory / "sharded", max_shard_size="200KB")
    model.transformer.save_pretrained(directory / "base")
    assert len(list((directory / "sharded").glob("*.safetensors"))) > 2
    return directory


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([INFERENCE, *map(str, arguments)], capture_output=True, text=True, check=False)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


def check(model: GPT2LMHeadModel, out: Path, *arguments: object) -> None:
    """Runs the program, and compares all that it says with what transformers computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        prompt = torch.tensor([PROMPT])
        with torch.inference_mode():
            prompt_logits = model(prompt).logits[0]
            generated = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=NEW,
                output_logits=True,
                return_dict_in_generate=True,
            )
    finally:
        torch.set_num_threads(threads)
    tokens = generated.sequences[0, len(PROMPT) :]
    assert tokens.unique().numel() > 3

    result = run(*arguments, ",".join(map(str, PROMPT)), "--new", NEW, "--logits", out)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == ",".join(map(str, tokens.tolist())) + "\n"
    written = load_file(out)
    assert torch.equal(written["tokens"], tokens)
    assert same_bits(written["prompt_logits"], prompt_logits)
    assert same_bits(written["logits"], torch.cat(generated.logits))


@pytest.mark.parametrize(
    "where",
    ["whole", "whole/model.safetensors", "sharded", "sharded/model.safetensors.index.json", "base"],
)
def test_logits_and_tokens_are_those_of_transformers(
    model: GPT2LMHeadModel, directory: Path, tmp_path: Path, where: str
) -> None:
    check(model, tmp_path / "out.safetensors", directory / where, "--heads", 4)


def test_heads_are_64_wide_unless_told(tmp_path: Path) -> None:
    model = make(n_embd=128, n_head=2)
    model.save_pretrained(tmp_path / "model")
    check(model, tmp_path / "out.safetensors", tmp_path / "model")


def test_a_missing_weight_is_told(directory: Path, tmp_path: Path) -> None:
    tensors = load_file(directory / "whole/model.safetensors")
    del tensors["transformer.h.1.mlp.c_proj.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    result = run(tmp_path, "1,2", "--heads", 4)
    assert (result.returncode, result.stdout) == (1, "")
    assert "no tensor transformer.h.1.mlp.c_proj.bias" in result.stderr


def test_a_head_of_its_own_is_told(directory: Path, tmp_path: Path) -> None:
    tensors = load_file(directory / "whole/model.safetensors")
    same = {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()}
    save_file(same, tmp_path / "model.safetensors")
    assert run(tmp_path, "1,2", "--heads", 4).returncode == 0
    save_file({**same, "lm_head.weight": same["lm_head.weight"] + 1}, tmp_path / "model.safetensors")
    result = run(tmp_path, "1,2", "--heads", 4)
    assert (result.returncode, result.stdout) == (1, "")
    assert "lm_head.weight is not wte.weight" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "usage"),
        (["1,2", "--new"], 2, "usage"),
        (["1,2", "--new", "0"], 2, "usage"),
        (["1,,2"], 2, "usage"),
        (["1,2,"], 2, "usage"),
        (["1,-2"], 2, "usage"),
        (["1,2", "--heads", "4"], 0, ""),
        (["1,2", "--heads", "5"], 1, "5 heads"),
        (["1,2", "--heads", "4", "--new", "62"], 0, ""),
        (["1,2", "--heads", "4", "--new", "63"], 1, "64 tokens"),
        (["1,211", "--heads", "4"], 1, "index out of range"),
    ],
)
def test_arguments_are_checked(directory: Path, arguments: list[str], status: int, message: str) -> None:
    result = run(directory / "whole", *arguments)
    assert result.returncode == status, result.stderr
    assert message in result.stderr
