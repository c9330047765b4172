"""hf:// URLs: files of the Hugging Face Hub, with branches, private repositories and the local cache."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

import safetensors_torch
from hub_server import FIRST_COMMIT, SECOND_COMMIT, HubServer
from remote_calls import CALLS, TENSORS, check_nothing_is_open, outcome, same

URL = "hf://org/model/model.safetensors"
TOKEN = "hf_secret-token"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub") as hub:
        for commit, tensors in ((FIRST_COMMIT, TENSORS), (SECOND_COMMIT, {"w": torch.ones(2)})):
            path = hub.directory / "org/model" / commit / "model.safetensors"
            path.parent.mkdir(parents=True)
            safetensors.torch.save_file(tensors, path)
        hub.revisions["refs/pr/1"] = hub.revisions["a/b"] = FIRST_COMMIT
        # huggingface_hub has read the environment when it was imported.
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub.authorization = f"Bearer {TOKEN}"
        huggingface_hub.HfFileSystem.clear_instance_cache()
        yield hub
        huggingface_hub.HfFileSystem.clear_instance_cache()


def local(hub: HubServer) -> str:
    return str(hub.directory / "org/model" / FIRST_COMMIT / "model.safetensors")


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("revision", ["", "@main", f"@{FIRST_COMMIT}", "@refs/pr/1", "@a%2Fb"])
def test_each_function_reads_each_revision(revision: str, function: str, hub: HubServer) -> None:
    call = CALLS[function]
    assert same(call(URL.replace("/model.", f"{revision}/model.")), call(local(hub)))
    check_nothing_is_open()


def test_the_hub_is_asked_once(hub: HubServer) -> None:
    with safetensors_torch.safe_open(URL, framework="pt") as file:
        assert [request.method for request in hub.requests] == ["HEAD"]
        assert hub.network.sizes() == [("GET", 1 << 20)]
        file.get_tensor("large")
        file.get_slice("matrix")[1:]
    assert len(hub.requests) == 1
    assert sum(nbytes for _, nbytes in hub.network.sizes()[1:]) == 10_000_000 + 36


def test_the_token_is_for_the_hub_alone(hub: HubServer) -> None:
    assert same(safetensors_torch.load_file(URL), TENSORS)
    assert not [request for request in hub.network.requests if "authorization" in request.headers]


def test_a_branch_that_moves_does_not_change_an_open_file(hub: HubServer) -> None:
    with safetensors_torch.safe_open(URL, framework="pt") as file:
        hub.revisions["main"] = SECOND_COMMIT
        assert torch.equal(file.get_tensor("large"), TENSORS["large"])
    assert safetensors_torch.load_file(URL)["w"].tolist() == [1, 1]


def test_a_signature_that_ends_is_asked_for_again(hub: HubServer) -> None:
    with safetensors_torch.safe_open(URL, framework="pt") as file:
        hub.network.signature = "a-later-one"
        assert torch.equal(file.get_tensor("large"), TENSORS["large"])
    check_nothing_is_open()


def test_passing_faults_pass(hub: HubServer) -> None:
    hub.head_faults = [503]
    hub.network.faults = [503, 500]
    assert same(safetensors_torch.load_file(URL), TENSORS)


@pytest.mark.parametrize(
    "url, what",
    [
        ("hf://org/none/model.safetensors", "org/none"),
        ("hf://org/model/none.safetensors", "none.safetensors"),
        ("hf://org/model@none/model.safetensors", "none"),
    ],
)
def test_what_is_missing_is_named(url: str, what: str, hub: HubServer) -> None:
    result, shown = outcome(safetensors_torch.load_file, url)
    assert result is FileNotFoundError and f"{url}: " in shown and what in shown.rpartition(f"{url}: ")[2]
    assert TOKEN not in shown
    check_nothing_is_open()


@pytest.mark.parametrize("token", ["hf_wrong-secret-token", None])
def test_a_private_repository_needs_the_token(
    token: str | None, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/none")
    result, shown = outcome(safetensors_torch.load_file, URL)
    assert result in (FileNotFoundError, PermissionError) and f"{URL}: " in shown and "token" in shown
    assert "secret-token" not in shown


def test_errors_while_it_is_read_have_no_secrets(hub: HubServer) -> None:
    with safetensors_torch.safe_open(URL, framework="pt") as file:
        hub.lasting_fault = hub.network.lasting_fault = 403
        result, shown = outcome(lambda _: {"large": file.get_tensor("large")}, URL)
    assert result is PermissionError and f"{URL}: " in shown and 'for tensor "large"' in shown
    assert TOKEN not in shown and "signed-by-the-hub" not in shown


def test_a_file_in_the_local_cache_is_not_read_again(hub: HubServer) -> None:
    huggingface_hub.hf_hub_download("org/model", "model.safetensors")
    for requests in (hub.requests, hub.network.requests):
        requests.clear()
    assert same(safetensors_torch.load_file(URL), TENSORS)
    assert [request.method for request in hub.requests] == ["HEAD"] and hub.network.requests == []
    with safetensors_torch.safe_open(URL.replace("/model.", f"@{FIRST_COMMIT}/model."), framework="pt") as file:
        assert torch.equal(file.get_slice("large")[1:], TENSORS["large"][1:])
    assert len(hub.requests) == 1, "a commit does not change"
    hub.revisions["main"] = SECOND_COMMIT
    assert safetensors_torch.load_file(URL)["w"].tolist() == [1, 1], "the branch has moved"


@pytest.mark.parametrize("fault", ["offline", "unreachable", "503"])
def test_without_the_hub_the_local_cache_is_read(fault: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub.hf_hub_download("org/model", "model.safetensors")
    if fault == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif fault == "unreachable":
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
        )
    else:
        hub.head_faults = [503] * 9
    assert same(safetensors_torch.load_file(URL), TENSORS)


def test_files_are_committed(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a file left on the local disk."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    safetensors_torch.save_file(TENSORS, "hf://org/model/new.safetensors", {"key": "value"})
    safetensors.torch.save_file(TENSORS, tmp_path / "local")
    assert same(safetensors_torch.load_file("hf://org/model/new.safetensors"), TENSORS)
    assert torch.equal(safetensors_torch.load_file(URL)["large"], TENSORS["large"]), "the other file stays"
    names = safetensors_torch.save_sharded(TENSORS, "hf://org/model/llm", max_shard_size="5MB")
    assert len(names) == 3 and names[-1] == "model.safetensors.index.json"
    assert same(safetensors_torch.load_sharded("hf://org/model/llm"), TENSORS)
    assert safetensors_torch.save_sharded({"w": torch.ones(2)}, "hf://org/model/llm") == ["model.safetensors"]
    assert list(safetensors_torch.load_sharded("hf://org/model/llm")) == ["w"]
    commit = hub.directory / "org/model" / hub.revisions["main"]
    assert [path.name for path in (commit / "llm").iterdir()] == ["model.safetensors"]

    def fail(done: int, total: int) -> None:
        raise ValueError("enough")

    before = hub.revisions["main"]
    with pytest.raises(ValueError, match="enough"):
        safetensors_torch.save_file(TENSORS, URL, progress=fail)
    hub.authorization = "Bearer another"
    result, shown = outcome(lambda url: safetensors_torch.save_file(TENSORS, url), URL)
    assert isinstance(result, type) and issubclass(result, OSError) and f"{URL}: " in shown and TOKEN not in shown
    assert hub.revisions["main"] == before
    assert list((tmp_path / "tmp").iterdir()) == []
    check_nothing_is_open()
