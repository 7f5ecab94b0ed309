"""A stand-in for the Hugging Face Hub: one process, no disk, what the client says to it kept in lists."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OWNER, TOKEN = "somebody", "hf_stand_in"


@dataclass
class Hub:
    """What the stand-in holds: repositories by id, each file name -> bytes."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    refuse: int | None = None  # answer every upload with this status


@contextmanager
def stand_in() -> Iterator[Hub]:
    """A running stand-in on a free port of this machine."""
    hub = Hub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub

    def log_message(self, *arguments: object) -> None:
        """Nothing is printed."""

    def _answer(self, status: int, document: object = None, **headers: str) -> None:
        body = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _known(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._answer(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
        return False

    def do_GET(self) -> None:
        if not self._known():
            return
        path = self.path.split("?")[0]
        if path == "/api/whoami-v2":
            self._answer(200, {"name": OWNER, "type": "user", "orgs": [{"name": "a-company"}]})
            return
        repository = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        files = self.state.repositories.get(repository)
        if files is None:
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif "/tree/" in path:
            listed = [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files.items()]
            self._answer(200, listed)
        else:
            siblings = [{"rfilename": name} for name in files]
            self._answer(200, {"id": repository, "sha": "0" * 40, "siblings": siblings, "private": True})

    def do_POST(self) -> None:
        body = self._body()
        if not self._known():
            return
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repository = f"{wanted.get('organization') or OWNER}/{wanted['name']}"
            exists = repository in self.state.repositories
            self.state.repositories.setdefault(repository, {".gitattributes": b""})
            self.state.private[repository] = "private" in (
                wanted.get("visibility"),
                wanted.get("private") and "private",
            )
            self._answer(409 if exists else 200, {"url": f"{self.state.url}/{repository}", "id": repository})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.state.refuse is not None:
            self._answer(self.state.refuse, {"error": "no"}, X_Error_Message="The stand-in refuses")
        elif "/preupload/" in path:
            files = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith((".safetensors", ".gguf")) else "regular",
                    "shouldIgnore": False,
                }
                for each in json.loads(body)["files"]
            ]
            self._answer(200, {"files": files})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.state.url}/objects/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        else:
            repository = "/".join(path.removeprefix("/api/models/").split("/")[:2])
            self._commit(repository, body)

    def _commit(self, repository: str, body: bytes) -> None:
        files = self.state.repositories[repository]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
        url = f"{self.state.url}/{repository}/commit/{1:040d}"
        self._answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})

    def do_PUT(self) -> None:
        self.state.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer(200)
