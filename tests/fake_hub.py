"""A small Hub on loopback for the real `huggingface_hub` client: repositories in memory, faults on demand.

What it knows: creating a repository, upload modes, LFS batch and upload, commits, trees, downloads. Written from what
the client (2.4) asks for and how it reads the answers. Left out: Xet, pull requests, branches, datasets and Spaces.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".png", ".jpg")  # what .gitattributes would send to LFS


@dataclass
class Repository:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b"*.safetensors lfs\n"}])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    @property
    def sha(self) -> str:
        return hashlib.sha1(str(len(self.commits)).encode()).hexdigest()


@dataclass
class Request:
    kind: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class FakeHub:
    """Attributes:
    token: the only one that is let in.
    faults: kind of request -> what happens to the next ones: a status, "cut" (the connection breaks before anything is
        done) or "lost" (it is done, but the answer does not arrive).
    """

    token: str
    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    faults: dict[str, list[int | str]] = field(default_factory=dict)

    @property
    def counts(self) -> Counter[str]:
        return Counter(request.kind for request in self.requests)

    # Each answer is (status, headers, body); a dict or list as body is sent as JSON.

    def create(self, body: bytes, *_: str):
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        made = {"url": f"{self.url}/{name}", "id": name}
        if name in self.repositories:
            return 409, {}, made | {"error": "You already created this model repo"}
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.repositories[name] = Repository(private)
        return 200, {}, made

    def validate(self, body: bytes, *_: str):
        text = json.loads(body)["content"]
        if not re.match(r"---\n.*?\n---\n", text, re.DOTALL):
            return 400, {}, {"errors": [{"message": "no front matter"}], "warnings": []}
        return 200, {}, {"errors": [], "warnings": []}

    def info(self, _: bytes, name: str, *__: str):
        repository = self.repositories[name]
        siblings = [{"rfilename": path} for path in repository.files]
        return 200, {}, {"id": name, "sha": repository.sha, "private": repository.private, "siblings": siblings}

    def tree(self, _: bytes, name: str, __: str, below: str | None):
        found = {path: data for path, data in self.repositories[name].files.items() if path.startswith(below or "")}
        if not found:
            return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "no such folder"}
        entries = []
        for path, data in sorted(found.items()):
            entry = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            if path.endswith(LARGE):
                entry |= {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 130}}
            entries.append(entry)
        return 200, {}, entries

    def preupload(self, body: bytes, name: str, *_: str):
        there = self.repositories[name].files
        found = []
        for file in json.loads(body)["files"]:
            path, large = file["path"], file["path"].endswith(LARGE)
            oid = None if path not in there else sha256(there[path]) if large else git_oid(there[path])
            mode = "lfs" if large else "regular"
            found.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {}, {"files": found}

    def batch(self, body: bytes, *_: str):
        objects = []
        for asked in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.url}/lfs/{asked['oid']}"}}
            objects.append(asked | ({} if asked["oid"] in self.objects else {"actions": upload}))
        return 200, {}, {"transfer": "basic", "objects": objects}

    def upload(self, body: bytes, oid: str):
        if sha256(body) != oid:
            return 400, {}, {"error": "not the object that was announced"}
        self.objects[oid] = body
        return 200, {}, {}

    def commit(self, body: bytes, name: str, *_: str):
        repository = self.repositories[name]
        files = dict(repository.files)
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]  # a commit of what was never uploaded fails
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        repository.commits.append(files)
        return 200, {}, {"commitUrl": f"{self.url}/{name}/commit/{repository.sha}", "commitOid": repository.sha}

    def file(self, _: bytes, name: str, __: str, path: str):
        repository = self.repositories[name]
        if path not in repository.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, {"error": "Entry not found"}
        data = repository.files[path]
        etag = sha256(data) if path.endswith(LARGE) else git_oid(data)
        return 200, {"X-Repo-Commit": repository.sha, "ETag": f'"{etag}"'}, data


_NAME = r"([\w.-]+/[\w.-]+)"
# (method, path) -> kind; what is read needs a token only where the repository is private.
_ROUTES = {
    "create": ("POST", r"/api/repos/create()"),
    "validate": ("POST", r"/api/validate-yaml()"),
    "info": ("GET", rf"/api/models/{_NAME}(?:/revision/([^/]+))?"),
    "tree": ("GET", rf"/api/models/{_NAME}/tree/([^/]+)(?:/(.*))?"),
    "preupload": ("POST", rf"/api/models/{_NAME}/preupload/([^/]+)"),
    "batch": ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch"),
    "upload": ("PUT", r"/lfs/(\w{64})"),
    "commit": ("POST", rf"/api/models/{_NAME}/commit/([^/]+)"),
    "file": ("GET", rf"/{_NAME}/resolve/([^/]+)/(.+)"),
}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method = "GET" if self.command == "HEAD" else self.command
        routes = ((kind, re.fullmatch(pattern, path)) for kind, (verb, pattern) in _ROUTES.items() if verb == method)
        kind, match = next(((kind, match) for kind, match in routes if match), ("unknown", None))
        self.hub.requests.append(Request(kind, self.path, dict(self.headers), body))
        faults = self.hub.faults.get(kind, [])
        fault = faults.pop(0) if faults else None
        if fault == "cut":
            self.close_connection = True
            return
        if isinstance(fault, int):
            return self._answer(fault, {}, {"error": "Internal Error" if fault >= 500 else "Invalid credentials"})
        if match is None:
            return self._answer(404, {}, {"error": "no such route"})
        found = self._refused(kind, match) or getattr(self.hub, kind)(body, *match.groups())
        if fault == "lost":
            self.close_connection = True
            return
        self._answer(*found)

    def _refused(self, kind: str, match: re.Match[str]):
        known = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        reads, repository = kind in ("info", "tree", "file"), self.hub.repositories.get(match[1])
        if kind == "upload":
            return None  # the address was given to whoever was let in
        if not known and (not reads or (repository is not None and repository.private)):
            return 401, {}, {"error": "Invalid credentials in Authorization header"}
        if repository is None and kind not in ("create", "validate"):
            return 404, {"X-Error-Code": "RepoNotFound"}, {"error": "Repository not found"}
        return None

    def _answer(self, status: int, headers: dict[str, str], body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def fake_hub(token: str) -> Iterator[FakeHub]:
    """A Hub that runs until the block ends."""
    hub = FakeHub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(hub: FakeHub, home: str) -> dict[str, str]:
    """What a process needs to take it for the Hub."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": home,
        "HF_TOKEN": hub.token,
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
