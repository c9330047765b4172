"""Makes the pictures of the guide from pages of a made-up checkpoint.

Run: python tests/python/view_pictures.py [DIRECTORY]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from browser import OpenPage, browser
from safetensors_torch import cli, save_file

ROOT = Path(__file__).resolve().parents[2]
WIDTH, LAYERS, WORDS = 256, 12, 8192


def state() -> dict[str, torch.Tensor]:
    """Returns tensors with the names of a small language model, in several dtypes."""
    torch.manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * 0.02).to(torch.bfloat16)

    tensors = {"transformer.wte.weight": random(WORDS, WIDTH), "transformer.wpe.weight": random(1024, WIDTH)}
    for layer in range(LAYERS):
        block = f"transformer.h.{layer}"
        for norm in ("ln_1", "ln_2"):
            tensors[f"{block}.{norm}.weight"] = torch.ones(WIDTH)
            tensors[f"{block}.{norm}.bias"] = torch.zeros(WIDTH)
        for name, inputs, outputs in (
            ("attn.c_attn", 1, 3),
            ("attn.c_proj", 1, 1),
            ("mlp.c_fc", 1, 4),
            ("mlp.c_proj", 4, 1),
        ):
            weight = random(inputs * WIDTH, outputs * WIDTH)
            is_quantized = name.startswith("mlp") and layer < LAYERS - 2
            tensors[f"{block}.{name}.weight"] = weight.to(torch.float8_e4m3fn) if is_quantized else weight
            tensors[f"{block}.{name}.bias"] = torch.zeros(outputs * WIDTH)
    tensors["transformer.ln_f.weight"] = torch.ones(WIDTH)
    tensors["transformer.ln_f.bias"] = torch.zeros(WIDTH)
    tensors["lm_head.weight"] = random(WORDS, WIDTH).float()
    return tensors


def tuned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns another version: some layers trained, one tensor cast, one added, one left out."""
    other = dict(tensors)
    for layer, scale in ((8, 1e-4), (9, 1e-2), (10, 0.5), (11, 0.5)):
        for name in ("attn.c_attn.weight", "attn.c_proj.weight"):
            weight = tensors[f"transformer.h.{layer}.{name}"].float()
            other[f"transformer.h.{layer}.{name}"] = (weight + scale * 0.02 * torch.randn_like(weight)).to(
                torch.bfloat16
            )
    other["lm_head.weight"] = tensors["lm_head.weight"].to(torch.bfloat16)
    del other["transformer.wpe.weight"]
    other["score.weight"] = torch.ones(2048, WIDTH, dtype=torch.bfloat16)
    return other


def main() -> None:
    target = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "docs"
    tensors = state()
    with tempfile.TemporaryDirectory() as name:
        # The pages show the paths as they are given.
        os.chdir(name)
        save_file(
            tensors, "model.safetensors", {"format": "pt", "config": json.dumps({"n_layer": LAYERS, "n_embd": WIDTH})}
        )
        save_file(tuned(tensors), "tuned.safetensors", {"format": "pt"})
        cli.main(["view", "model.safetensors", "-o", "view.html"])
        cli.main(["diff", "model.safetensors", "tuned.safetensors", "--view", "-o", "diff.html"])
        tensors["transformer.h.3.attn.c_attn.weight"][0, 0] = torch.nan
        save_file(tensors, "model.safetensors", {"format": "pt"})
        cli.main(["view", "model.safetensors", "--stats", "-o", "stats.html"])
        with browser() as chromium:
            for picture, page, scheme, width, height in (
                ("view-light", "view", "light", 1280, 900),
                ("view-dark", "stats", "dark", 1280, 980),
                ("view-diff", "diff", "light", 1280, 980),
                ("view-narrow", "view", "light", 390, 844),
            ):
                one = OpenPage(chromium, Path(f"{page}.html"), width, height, color_scheme=scheme)
                if page == "stats":
                    one.page.click(".groups button >> text=NaN")
                    one.page.click("#table-body .row")
                    one.page.click("#found >> text=Clear")
                if page == "diff":
                    one.page.click("#table-head >> text=Relative")
                    one.page.click("#table-body .row >> nth=0")
                one.page.evaluate("scrollTo(0, 0)")
                one.page.mouse.move(0, 0)
                one.page.evaluate("document.activeElement.blur()")
                one.page.screenshot(path=target / f"{picture}.png")
                if one.faults:
                    raise SystemExit(f"{page}: {one.faults}")
                one.close()


if __name__ == "__main__":
    main()
