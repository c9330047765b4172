"""The Hugging Face Hub on loopback: what huggingface_hub asks of it for the files of models.

A repository is a directory, OWNER/NAME, with one subdirectory per commit. Weights are redirected to signed URLs of a
second server, as the Hub does.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import urllib.parse
from pathlib import Path

from object_server import Fault, Handler, ObjectServer

# These hashes are in place of git's.
FIRST_COMMIT, SECOND_COMMIT = "1" * 40, "2" * 40


class HubServer(ObjectServer):
    """Serves the repositories in a directory, and their weights by a content delivery network."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, _HubHandler)
        self.network = ObjectServer(directory)
        self.network.signature = "signed-by-the-hub"
        self.network.signed_methods = ["GET", "HEAD"]
        # The commits of branches and tags.
        self.revisions = {"main": FIRST_COMMIT}

    def __exit__(self, *exception: object) -> None:
        self.network.__exit__(*exception)
        super().__exit__(*exception)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _HubHandler(Handler):
    server: HubServer

    def do_GET(self) -> None:  # noqa: N802 - the name of the base class
        fault = self.next_fault()
        if fault.status:
            return self.answer(fault.status, fault.body, fault.headers)
        server, path = self.server, urllib.parse.urlsplit(self.path).path
        calls = "revision|tree|paths-info|preupload|commit"
        api = re.fullmatch(rf"/api/models/([^/]+/[^/]+)(?:/({calls})/([^/]+)(?:/(.+))?)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        # The Hub does not tell strangers which repositories exist.
        is_stranger = server.authorization and self.headers.get("Authorization") != server.authorization
        if match is None or is_stranger or not (server.directory / match[1]).is_dir():
            return self.refuse("RepoNotFound", 401)
        revision = urllib.parse.unquote(match[3] or "main" if api else match[2])
        commit = server.revisions.get(revision, revision)
        root = server.directory / match[1] / commit
        if not root.is_dir():
            return self.refuse("RevisionNotFound", 404)
        if file:
            return self.resolve(root / urllib.parse.unquote(file[3]), commit)
        assert api is not None
        if api[2] == "tree" and not (root / (api[4] or "")).is_dir():
            return self.refuse("EntryNotFound", 404)
        if api[2] == "tree":
            entries = [self.entry(root, found) for found in sorted((root / (api[4] or "")).iterdir())]
        elif api[2] == "paths-info":
            body = urllib.parse.parse_qs(self.body().decode())
            entries = [self.entry(root, root / name) for name in body["paths"] if (root / name).exists()]
        elif api[2] == "preupload":
            files = json.loads(self.body())["files"]
            return self.send_json(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            )
        elif api[2] == "commit":
            return self.commit(root, revision)
        else:
            return self.send_json({"id": api[1], "sha": commit, "siblings": [], "private": False, "tags": []})
        self.send_json(entries)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    def commit(self, root: Path, branch: str) -> None:
        """Makes the next commit of a branch."""
        new = root.with_name(_sha(root.name.encode())[:40])
        shutil.copytree(root, new)
        for operation in map(json.loads, self.body().splitlines()):
            if operation["key"] == "file":
                path = new / operation["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(operation["value"]["content"]))
            elif operation["key"] == "deletedFile":
                (new / operation["value"]["path"]).unlink()
        self.server.revisions[branch] = new.name
        url = f"{self.server.endpoint}/{root.parent.parent.name}/{root.parent.name}/commit/{new.name}"
        self.send_json({"success": True, "commitOid": new.name, "commitUrl": url})

    def resolve(self, path: Path, commit: str) -> None:
        if not path.is_file():
            return self.refuse("EntryNotFound", 404)
        content = path.read_bytes()
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if path.suffix == ".safetensors":
            location = self.server.network.url(str(path.relative_to(self.server.directory)))
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{_sha(content)}"', "Location": location}
            return self.answer(302, b"", headers | linked)
        headers["ETag"] = f'"{_sha(content)[:40]}"'
        self.answer(200, content, headers)

    def entry(self, root: Path, path: Path) -> dict[str, object]:
        name = path.relative_to(root).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
        content = path.read_bytes()
        linked = {"oid": _sha(content), "size": len(content), "pointerSize": 130}
        found = {"type": "file", "path": name, "size": len(content), "oid": _sha(content)[:40]}
        return found | ({"lfs": linked} if path.suffix == ".safetensors" else {})

    def send_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, Fault())

    def refuse(self, code: str, status: int) -> None:
        self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
