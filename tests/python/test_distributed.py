"""safetensors_torch.distributed in four processes: distributed_cases has what they do."""

from __future__ import annotations

import pytest

import distributed_cases
import ranks


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return ranks.run("distributed_cases", 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["", *distributed_cases.CASES])
def test_case(name: str, errors: dict[str, str]) -> None:
    assert name not in errors, errors[name]
