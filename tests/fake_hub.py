"""A Hugging Face hub on this machine: as much of its interface as fetching and publishing need.

It answers `with running_hub(cache) as hub`, to processes that have `hub.environment`.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

Repositories = dict[str, dict[str, bytes]]
"""OWNER/NAME -> path in it -> content."""


class FakeHub(ThreadingHTTPServer):
    """Holds repositories, large files by their digest until they are committed, and the requests so far."""

    def __init__(self, cache: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: Repositories = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HOME": str(cache),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_of_a_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    def fetched(self, owner: str = "") -> list[str]:
        """The files that were downloaded, of all owners or of one, in order, each once."""
        gets = (
            request.split("/resolve/")[1].split("/", 1)[1]
            for request in self.requests
            if request.startswith(f"GET /{owner}") and "/resolve/" in request
        )
        return list(dict.fromkeys(gets))


@contextmanager
def running_hub(cache: Path) -> Iterator[FakeHub]:
    """A hub that answers as long as the context lasts."""
    hub = FakeHub(cache)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Handler(BaseHTTPRequestHandler):
    """The requests of huggingface_hub."""

    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer_get()

    def do_HEAD(self) -> None:
        self._answer_get()

    def _answer_get(self) -> None:
        parts = self._parts()
        if parts[:2] == ["api", "models"]:
            return self._describe("/".join(parts[2:4]), tree="tree" in parts)
        repository, path = "/".join(parts[:2]), "/".join(parts[4:])
        files = self.server.repositories.get(repository)
        if files is None:
            return self._refuse("RepoNotFound")
        if path not in files:
            return self._refuse("EntryNotFound")
        content = files[path]
        headers = {"X-Repo-Commit": commit(files), "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        self._send(200, content, headers)

    def _describe(self, repository: str, tree: bool) -> None:
        files = self.server.repositories.get(repository)
        if files is None:
            return self._refuse("RepoNotFound")
        if tree:
            listed = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in files.items()
            ]
            return self._json(listed)
        self._json({"id": repository, "sha": commit(files), "siblings": [{"rfilename": path} for path in files]})

    def do_POST(self) -> None:
        parts, body = self._parts(), self._body()
        if self.headers.get("Authorization") != "Bearer hf_of_a_test":
            return self._send(401, b"{}", {"X-Error-Message": "Invalid username or password."})
        if parts == ["api", "validate-yaml"]:
            return self._json({"errors": [], "warnings": []})
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repositories.setdefault(name, {})
            self.server.private |= {name} if asked.get("visibility") == "private" else set()
            return self._json({"url": f"{self.server.environment['HF_ENDPOINT']}/{name}", "name": name, "id": name})
        if "preupload" in parts:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": modes})
        if "batch" in parts:
            return self._json(
                {
                    "transfer": "basic",
                    "objects": [
                        one
                        | {
                            "actions": {
                                "upload": {"href": f"{self.server.environment['HF_ENDPOINT']}/large/{one['oid']}"}
                            }
                        }
                        for one in json.loads(body)["objects"]
                    ],
                }
            )
        if "commit" in parts:
            files = self.server.repositories["/".join(parts[2:4])]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            address = f"{self.server.environment['HF_ENDPOINT']}/{'/'.join(parts[2:4])}/commit/{commit(files)}"
            return self._json({"commitUrl": address, "commitOid": commit(files), "success": True})
        self._send(501, b"{}")

    def do_PUT(self) -> None:
        self.server.large[self._parts()[1]] = self._body()
        self._send(200, b"")

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _parts(self) -> list[str]:
        self.server.requests.append(f"{self.command} {self.path}")
        return unquote(urlsplit(self.path).path).strip("/").split("/")

    def _refuse(self, code: str) -> None:
        self._send(404, b"{}", {"X-Error-Code": code})

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def commit(files: dict[str, bytes]) -> str:
    """What names a state of a repository."""
    digest = hashlib.sha1()
    for path, content in sorted(files.items()):
        digest.update(path.encode() + content)
    return digest.hexdigest()
