"""Fixtures of the Python tests; the modules beside it have the other helpers."""

from __future__ import annotations

import os
import types
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from support import encode

# Bound once, so that patches of the reference's modules do not affect it.
_REFERENCE = types.SimpleNamespace(
    load=safetensors.torch.load,
    load_file=safetensors.torch.load_file,
    load_model=safetensors.torch.load_model,
    save=safetensors.torch.save,
    save_file=safetensors.torch.save_file,
    save_model=safetensors.torch.save_model,
    safe_open=safetensors.safe_open,
)

# The modules that take longest.
_LONG = ("test_native_library", "test_ops_compile", "test_fork", "test_types", "test_patch_huggingface")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Moves long modules to the front, so that processes that share the modules end at about the same time."""
    items.sort(key=lambda item: item.path.stem not in _LONG)


@pytest.fixture
def reference() -> types.SimpleNamespace:
    """The functions of the PyPI package, to compare with."""
    return _REFERENCE


@pytest.fixture(params=["mmap", "pread"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Tensors of a few dtypes and shapes, with a scalar and a zero-size one."""
    return {
        "weight": torch.linspace(-1, 1, 24).reshape(4, 6),
        "bias": torch.linspace(0, 1, 6, dtype=torch.float64),
        "half": torch.linspace(-3, 3, 15).to(torch.bfloat16).reshape(3, 5),
        "steps": torch.arange(5),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
    }


@pytest.fixture
def path(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A file that holds `tensors` and the metadata {"format": "pt"}, alone in its directory."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode(tensors, {"format": "pt"}))
    return path


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes bytes, or tensors and metadata, to a new file and returns its path."""

    def write(content: bytes | dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
        target = tmp_path / "given.safetensors"
        target.write_bytes(content if isinstance(content, bytes) else encode(content, metadata))
        return target

    return write


@pytest.fixture(scope="session")
def _s3_port() -> Iterator[int]:
    """The port of an S3 server on loopback."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def bucket(_s3_port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new, empty bucket; the environment has the endpoint and the credentials."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    endpoint = f"http://127.0.0.1:{_s3_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    name = f"bucket-{uuid.uuid4().hex}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{name}", method="PUT")).close()
    return f"s3://{name}"


@pytest.fixture
def fresh_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reuses no earlier compilation, of this process or another.

    Inductor compiles without vector instructions: to find out which ones work takes it 18 seconds.
    """
    import torch._inductor.config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    with torch._inductor.config.patch("cpp.vec_isa_ok", False):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Starts a browser."""
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    from browser import CHROMIUM, browser

    if CHROMIUM is None:
        pytest.skip("chromium is not installed: make chromium")
    with browser() as found:
        yield found


@pytest.fixture(scope="session")
def view_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes pages of the shell command's view."""
    from view_pages import write_pages

    directory = tmp_path_factory.mktemp("pages")
    write_pages(directory)
    return directory


@pytest.fixture
def open_page(chromium: Any, view_pages: Path) -> Iterator[Any]:
    """Returns a function that opens one of these pages. Nothing fails in them, or is requested."""
    from browser import OpenPage

    opened: list[OpenPage] = []

    def open_one(name: str, **options: Any) -> OpenPage:
        opened.append(OpenPage(chromium, view_pages / f"{name}.html", **options))
        return opened[-1]

    yield open_one
    for one in opened:
        assert one.faults == []
        one.close()
