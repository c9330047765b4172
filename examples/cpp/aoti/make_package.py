"""Makes what aoti.cpp serves: a small GPT that AOTInductor has compiled, without weights, and two sets of weights.

Run: python examples/cpp/aoti/make_package.py DIRECTORY

DIRECTORY/gpt.pt2                the compiled package
DIRECTORY/first.safetensors      weights, in one file
DIRECTORY/second/                other weights, in several files with an index
DIRECTORY/expected.safetensors   tokens, and their logits with either
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from safetensors_torch import save_file, save_model

LAYERS, WIDTH, HEADS, VOCABULARY, CONTEXT = 2, 32, 2, 64, 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (x.size(0), x.size(1), HEADS, WIDTH // HEADS)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.qkv(self.ln_1(x)).split(WIDTH, dim=2))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(nn.functional.gelu(self.up(self.ln_2(x))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight  # tied: save_model writes one of the two

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.size(1)]
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def build(seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.3)
    return model


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    # The order of a summation may depend on the number of threads; aoti.cpp sets the same number.
    torch.set_num_threads(1)

    first, second = build(1), build(2)
    tokens = torch.randint(VOCABULARY, (1, CONTEXT))
    program = torch.export.export(first, (tokens,))
    package = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(directory / "gpt.pt2"),
        # Otherwise small biases are part of the code, and cannot be replaced.
        inductor_configs={"aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": True},
    )

    save_model(first, directory / "first.safetensors")
    save_model(second, directory / "second", max_shard_size=40_000)
    expected = {"tokens": tokens}
    for name, model in ("first", first), ("second", second):
        compiled = torch._inductor.aoti_load_package(package)
        state = model.state_dict()
        compiled.load_constants({fqn: state[fqn] for fqn in compiled.get_constant_fqns()}, check_full_update=True)
        expected[name] = compiled(tokens)
        torch.testing.assert_close(expected[name], model(tokens), rtol=1e-3, atol=1e-3)
    save_file(expected, directory / "expected.safetensors")


if __name__ == "__main__":
    main()
