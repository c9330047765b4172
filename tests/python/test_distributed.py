"""safetensors_torch.distributed in four processes: distributed_cases collects what they do."""

from __future__ import annotations

from pathlib import Path

import pytest

import distributed_cases
import ranks


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return ranks.run("distributed_cases", 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["", *distributed_cases.CASES])
def test_case(name: str, errors: dict[str, str]) -> None:
    assert name not in errors, errors[name]


def test_a_killed_process_is_an_error_in_the_others(tmp_path: Path) -> None:
    ranks.run("killed_cases", 3, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("passed-*")) == ["passed-0", "passed-2"]
