"""Makes a model of the size of GPT-2 small, and its logits for one sequence of tokens.

Run:  python make_model.py DIRECTORY

Writes DIRECTORY/model.safetensors (save_model; the two names of the tied weight are one tensor in the file) and
DIRECTORY/reference.safetensors (the tokens and their logits). Needs torch and safetensors_torch. The weights are
random, from a fixed seed: the demo shows that every bit arrives, not that the model is good.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from torch import nn

import safetensors_torch

LAYERS, WIDTH, HEADS, VOCABULARY, CONTEXT = 12, 768, 12, 50257, 1024
SEED, TOKENS = 2019, 64
# Not derivable from the shapes. save_model adds the other entries of the metadata, for tied names.
METADATA = {"n_head": str(HEADS)}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (x.size(0), x.size(1), HEADS, WIDTH // HEADS)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.c_attn(x).split(WIDTH, dim=2))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc = nn.Linear(WIDTH, 4 * WIDTH)
        self.c_proj = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(nn.functional.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.mlp = MLP()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.wpe = nn.Embedding(CONTEXT, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1)))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def empty_model() -> GPT2:
    """Returns the model on the meta device, which skips an initialization that would be discarded."""
    with torch.device("meta"):
        return GPT2().requires_grad_(False).eval()


def build() -> GPT2:
    """Returns the model with the weights of the seed."""
    model = empty_model().to_empty(device="cpu")
    model.lm_head.weight = model.wte.weight
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        parameter.normal_(0.0, 0.02, generator=generator)
        if ".ln_" in f".{name}" and name.endswith(".weight"):
            parameter.add_(1.0)
    return model


def tied_names(path: Path) -> dict[str, str]:
    """Returns the tied names in the metadata of save_model: dropped name -> kept name."""
    with safetensors_torch.safe_open(path, framework="pt") as file:
        return {name: kept for name, kept in (file.metadata() or {}).items() if name not in METADATA}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compares memory: == calls 0.0 and -0.0 equal, and NaN and NaN different."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def different_tensors(state: dict[str, torch.Tensor], model: GPT2) -> list[str]:
    """Returns the names that are in only one of both, or whose tensors differ in bits."""
    expected = model.state_dict()
    common = state.keys() & expected.keys()
    return sorted(
        (state.keys() ^ expected.keys()) | {name for name in common if not same_bits(state[name], expected[name])}
    )


def megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.{1 if seconds < 0.1 else 0}f} ms"


def report(call: str, what: str, size: float, seconds: float) -> None:
    """Prints one line for a step, in the columns of forward.cpp."""
    print(f"{'Python':<8}{call:<14}{what:<62}{megabytes(size):>9}{duration(seconds):>9}", flush=True)


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    model_path, reference_path = directory / "model.safetensors", directory / "reference.safetensors"
    # The order of a summation may depend on the number of threads; forward.cpp sets the same number.
    torch.set_num_threads(1)

    start = time.perf_counter()
    model = build()
    parameters = list(model.parameters())
    size = sum(parameter.nbytes for parameter in parameters)
    report(
        "build",
        f"{LAYERS} layers, {sum(map(torch.numel, parameters)) / 1e6:.1f} M parameters in {len(parameters)} tensors, "
        f"seed {SEED}",
        size,
        time.perf_counter() - start,
    )

    start = time.perf_counter()
    safetensors_torch.save_model(model, model_path, metadata=METADATA)
    elapsed = time.perf_counter() - start
    ties = tied_names(model_path)
    note = ", ".join(f"{dropped} kept as {kept}" for dropped, kept in ties.items())
    report("save_model", f"{model_path.name}; tied: {note}", model_path.stat().st_size, elapsed)

    start = time.perf_counter()
    state = safetensors_torch.load_file(model_path)
    elapsed = time.perf_counter() - start
    count = len(state)
    state.update({dropped: state[kept] for dropped, kept in ties.items()})
    if different := different_tensors(state, model):
        sys.exit(f"{model_path}: differs from what was saved: {', '.join(different)}")
    report("load_file", f"{count} tensors, each with the bits of its parameter", size, elapsed)

    # Compute with the mapped tensors, as C++ does: BLAS may choose its algorithm, and with it the last bit, by the
    # alignment of its operands.
    model = empty_model()
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)
    tokens = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(SEED))
    start = time.perf_counter()
    with torch.inference_mode():
        logits = model(tokens)
    elapsed = time.perf_counter() - start
    if not logits.isfinite().all():
        sys.exit("the logits are not finite, so they prove nothing")
    shape = " x ".join(map(str, logits.shape))
    report("forward", f"{tokens.numel()} tokens -> logits {shape}", logits.nbytes, elapsed)

    start = time.perf_counter()
    safetensors_torch.save_file({"tokens": tokens, "logits": logits}, reference_path)
    elapsed = time.perf_counter() - start
    report("save_file", f"{reference_path.name}: the tokens and the logits", reference_path.stat().st_size, elapsed)


if __name__ == "__main__":
    main()
