"""Pages of the shell command's view and of diff --view, for its tests: their data, and checkpoints with odd names."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch

from safetensors_torch import cli, save_file, save_sharded

HOSTILE = [
    "</script><script>document.title = 'hacked'</script>",
    "<img src=x onerror=\"document.title = 'hacked'\">",
    "<style>body { display: none }</style>",
    "<base href='https://example.com/'>",
    "javascript:alert(1)",
    "{{script}}",
    "__proto__",
    "__proto__.polluted",
    "constructor",
    "constructor.prototype.x",
    "hasOwnProperty",
    "toString",
    "a\u202egnp.exe",
    "nul\0name",
    "line\u2028separator\n",
    "",
    "..",
    ".lead",
    "a..b",
    "a",
    "a.b",
    "a.b.c",
    "back\\slash",
    " lead",
    "x" * 10_000,
    "." * 3_000,
]


def small_state() -> dict[str, torch.Tensor]:
    """The tensors of a small model."""
    return {
        "layers.10.weight": torch.linspace(-1, 1, 12).reshape(3, 4),
        "layers.2.weight": torch.ones(3, dtype=torch.bfloat16),
        "layers.2.bias": torch.zeros(0, 5),
        "steps": torch.tensor(7),
    }


class Elements(HTMLParser):
    """The elements of a page, as a browser finds them, and the texts of its style and its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.policy = ""
        self.is_text = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attributes)
        if named.get("http-equiv") == "Content-Security-Policy":
            self.policy = named["content"] or ""
        if tag in ("script", "style"):
            self.texts.append("")
            self.is_text = True

    def handle_endtag(self, tag: str) -> None:
        self.is_text = False

    def handle_data(self, data: str) -> None:
        if self.is_text:
            self.texts[-1] += data


def data_of(page: str) -> Any:
    """Returns the data of a page."""
    _, data, _ = Elements(page).texts
    return json.loads(data)


def page_data(name: str) -> Any:
    return data_of(Path(name).read_text(encoding="utf-8"))


def state(layers: int = 4) -> dict[str, torch.Tensor]:
    tensors = {"model.embed_tokens.weight": torch.zeros(300, 32), "steps": torch.tensor(7)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.self_attn.q_proj.weight"] = torch.ones(32, 64, dtype=torch.bfloat16)
        tensors[f"{prefix}.self_attn.q_proj.bias"] = torch.ones(64, dtype=torch.bfloat16)
        tensors[f"{prefix}.mlp.down_proj.weight"] = torch.ones(64, 128, dtype=torch.float16)
    return tensors


def write_pages(directory: Path) -> None:
    """Writes the pages model, hostile, shards, stats and diff."""
    tensors = state()
    metadata = {"format": "pt", "config": '{"layers": 4, "big": 12345678901234567890, "ids": [1, {}]}', "empty": ""}
    save_file(tensors, directory / "model.safetensors", metadata)
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.randn(64, 128)
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    tensors["model.layers.2.self_attn.q_proj.weight"] = torch.full((32, 64), 1.0078125, dtype=torch.bfloat16)
    tensors["new.weight"] = torch.ones(64, 64)
    del tensors["steps"]
    save_file(tensors, directory / "other.safetensors", {"format": "pt", "epoch": "4"})
    save_sharded(tensors, directory / "shards", max_shard_size=40_000)
    save_file(
        {name: torch.ones(index % 5 + 1, 16) for index, name in enumerate(HOSTILE)},
        directory / "hostile.safetensors",
        {f"{name}k": name for name in HOSTILE},
    )
    for source in ("model", "hostile", "shards"):
        path = directory / (source if source == "shards" else f"{source}.safetensors")
        assert cli.main(["view", str(path), "-o", str(directory / f"{source}.html")]) == 0
    other = str(directory / "other.safetensors")
    assert cli.main(["view", other, "--stats", "-o", str(directory / "stats.html")]) == 0
    both = ["diff", str(directory / "model.safetensors"), other]
    assert cli.main([*both, "--view", "-o", str(directory / "diff.html")]) == 1
