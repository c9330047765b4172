"""The pages of the shell command's diff --view, without a browser."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from safetensors_torch import cli, save_file
from safetensors_torch.cli import values, view
from view_pages import page_data, small_state


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file(small_state(), "model.safetensors", {"format": "pt", "config": '{"a": 1}'})
    return tmp_path


def run(*arguments: str) -> int:
    return cli.main(arguments)


def changes_of(data: Any) -> dict[str, list[Any]]:
    return dict(zip(data["names"], data["changes"], strict=True))


def test_a_comparison(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = small_state()["layers.10.weight"]
    other = {
        **small_state(),
        "layers.10.weight": weight.clone(),
        "layers.2.weight": torch.ones(3),
        "new": torch.ones(2),
    }
    other["layers.10.weight"][0] += 0.5
    del other["steps"]
    save_file(other, "other.safetensors", {"format": "pt", "epoch": "4"})
    assert run("diff", "model.safetensors", "other.safetensors", "--view") == 1
    assert capsys.readouterr().out.startswith("diff.html: ")
    data = page_data("diff.html")
    assert data["title"] == "model.safetensors ↔ other.safetensors"
    assert data["names"] == ["layers.2.bias", "layers.2.weight", "layers.10.weight", "new", "steps"]
    changes = changes_of(data)
    assert changes["layers.2.bias"] == [view.EQUAL] and changes["layers.2.weight"] == [view.KIND]
    assert changes["new"] == [view.RIGHT_ONLY] and changes["steps"] == [view.LEFT_ONLY]
    status, differing, nans, most, relative = changes["layers.10.weight"]
    assert (status, differing, nans, most) == (view.VALUES, 4, 0, 0.5)
    right = other["layers.10.weight"].double()
    assert relative == pytest.approx(((weight.double() - right).norm() / right.norm()).item(), rel=1e-6)
    left_side, right_side = data["sides"]
    at = data["names"].index("new")
    assert left_side["dtype"][at] == -1 and data["dtypes"][right_side["dtype"][at]] == "F32"
    assert [dict(side["metadata"]) for side in data["sides"]] == [
        {"format": "pt", "config": '{"a": 1}'},
        {"format": "pt", "epoch": "4"},
    ]


def test_a_comparison_without_values_and_as_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({**small_state(), "steps": torch.tensor(8)}, "other.safetensors", {"format": "pt", "config": '{"a": 1}'})
    assert run("diff", "model.safetensors", "other.safetensors", "--view", "--no-values", "-o", "a.html") == 0
    assert set(map(tuple, page_data("a.html")["changes"])) == {(view.NOT_COMPARED,)}
    capsys.readouterr()
    assert run("diff", "model.safetensors", "other.safetensors", "--view", "--json") == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["path"], result["equal"], result["compared"]) == ("diff.html", False, 4)
    assert result["values"][0]["relative_difference"] == 1 / 8
    # Without --view, the text is as before.
    assert run("diff", "model.safetensors", "other.safetensors", "--json") == 1
    assert "relative_difference" not in capsys.readouterr().out


def test_relative_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "_PIECE", 3)
    left, right = torch.zeros(10), torch.full((10,), 2.0)
    left[:5] = 2.0
    assert values.relative_difference(left, right) == pytest.approx(math.sqrt(5 / 10))
    for dtype in (torch.complex64, torch.float8_e4m3fn, torch.uint8, torch.int64, torch.bfloat16):
        assert values.relative_difference(left.to(dtype), right.to(dtype)) == pytest.approx(math.sqrt(0.5)), dtype
    assert values.relative_difference(right, torch.zeros(10)) is None
    assert values.relative_difference(left, torch.full((10,), math.nan)) is None
