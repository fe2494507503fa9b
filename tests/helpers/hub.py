"""A Hub on this machine, for the real client: what huggingface_hub asks is answered as the Hub answers it. Shared."""

import base64
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import pytest

NAME = "owner/name"
TOKEN = "hf_stand0in0secret0of0the0tests"
_LARGE = (".safetensors", ".png")  # what goes by the protocol of large files


@dataclass
class Repository:
    """Its commits by their names, each with its files, and where its branches and tags are."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {f"{0:040x}": {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": f"{0:040x}"})
    tags: dict[str, str] = field(default_factory=dict)

    def commit_of(self, revision: str) -> str | None:
        found = self.branches.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        name = f"{len(self.commits):040x}"
        self.commits[name] = files
        self.branches[branch] = name
        return name

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class Hub(ThreadingHTTPServer):
    """Has models by their ids, and the large files that were uploaded, by SHA-256.

    asked  (method, revision, file) of the requests for the files of `NAME`, in order
    lines  every request, as "PUT /large/..."
    moves  the branch main of a model moves on whenever somebody has asked where it is
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.models: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.lines: list[str] = []
        self.moves = False
        self._failures: list[tuple[str, int, str, list[int]]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, folder: Path) -> Self:
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.models.setdefault(name, Repository()).commit("main", files)
        return self

    def fail(self, pattern: str, status: int, times: int = 1000, message: str = "") -> None:
        """Refuse the next requests whose line, as `PUT /large/...`, has this pattern; 0: cut the line in the middle."""
        self._failures.append((pattern, status, message, [times]))

    def heal(self) -> None:
        self._failures.clear()

    def refusal(self, line: str) -> tuple[int, str] | None:
        for pattern, status, message, left in self._failures:
            if left[0] > 0 and re.search(pattern, line):
                left[0] -= 1
                return status, message
        return None

    def handle_error(self, *_: object) -> None:
        pass  # a line that was cut


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def _answer(self) -> None:
        path, line = self.path.partition("?")[0], f"{self.command} {self.path}"
        self.server.lines.append(line)
        if (refusal := self.server.refusal(line)) is not None:
            status, message = refusal
            if status == 0:
                self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
                self.close_connection = True
                self.connection.close()
                return
            self._body()
            codes = {404: "RepoNotFound"} if not message else {}
            self._send(status, {"error": message or "refused"}, **{"X-Error-Code": codes.get(status, "Refused")})
            return
        body = self._body()
        for method, pattern, answer in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                answer(self, body, **match.groupdict())
                return
        self._send(404, {"error": "no such page"})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _model(self, repo: str, *, writes: bool = False) -> Repository | None:
        """The model, for who may see it; None once somebody was sent away."""
        knows, model = self.headers.get("Authorization") == f"Bearer {TOKEN}", self.server.models.get(repo)
        if writes and not knows:
            self._send(401, {"error": "Invalid username or password."})
            return None
        if model is None or (model.private and not knows):
            status = 404 if knows else 401
            self._send(status, {"error": "Repository not found"}, **{"X-Error-Code": "RepoNotFound"})
            return None
        return model

    def create(self, body: bytes) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
            return
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = {"url": f"{self.server.address}/{name}"}
        if name in self.server.models:
            self._send(409, url | {"error": "You already created this model repo"})
        else:
            self.server.models[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
            self._send(200, url)

    def validate(self, body: bytes) -> None:
        wrong = "license: nonsense" in json.loads(body)["content"]
        errors = [{"message": '"license" must be one of [apache-2.0, mit, ...]'}] if wrong else []
        self._send(400 if wrong else 200, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        if (model := self._model(repo, writes=True)) is not None:
            files = model.commits[model.branches[revision]]
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(_LARGE) else "regular" for path in paths}
            there = {path: _oid(path, files[path]) for path in paths if path in files}
            found = [{"path": p, "uploadMode": m, "shouldIgnore": False, "oid": there.get(p)} for p, m in modes.items()]
            self._send(200, {"files": found})

    def batch(self, body: bytes, repo: str) -> None:
        if self._model(repo, writes=True) is not None:
            found = []
            for one in json.loads(body)["objects"]:
                upload = {"upload": {"href": f"{self.server.address}/large/{one['oid']}"}}
                found.append(one | ({} if one["oid"] in self.server.large else {"actions": upload}))
            self._send(200, {"objects": found})

    def store(self, body: bytes, oid: str) -> None:
        assert sha256(body).hexdigest() == oid
        self.server.large[oid] = body
        self._send(200, {})

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        if (model := self._model(repo, writes=True)) is not None:
            files = dict(model.commits[model.branches[revision]])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            name = model.commit(revision, files)
            self._send(200, {"commitUrl": f"{self.server.address}/{repo}/commit/{name}", "commitOid": name})

    def tag(self, body: bytes, repo: str, revision: str) -> None:
        if (model := self._model(repo, writes=True)) is not None:
            tag, commit = json.loads(body)["tag"], model.commit_of(revision)
            assert commit is not None
            status = 409 if tag in model.tags else 200
            model.tags.setdefault(tag, commit)
            self._send(status, {"error": "Tag reference exists already"} if status == 409 else {})

    def branch(self, body: bytes, repo: str, revision: str) -> None:
        if (model := self._model(repo, writes=True)) is not None:
            status = 409 if revision in model.branches else 200
            model.branches.setdefault(revision, model.branches["main"])
            self._send(status, {"error": "Reference already exists"} if status == 409 else {})

    def refs(self, body: bytes, repo: str) -> None:
        if (model := self._model(repo)) is not None:
            found = {
                kind: [{"name": name, "ref": f"refs/{ref}/{name}", "targetCommit": oid} for name, oid in where.items()]
                for kind, ref, where in (("branches", "heads", model.branches), ("tags", "tags", model.tags))
            }
            self._send(200, {**found, "converts": []})

    def info(self, body: bytes, repo: str, revision: str = "main") -> None:
        if (found := self._found(repo, revision)) is not None:
            model, commit = found
            siblings = [{"rfilename": path} for path in model.commits[commit]]
            self._send(200, {"id": repo, "sha": commit, "private": model.private, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        if (found := self._found(repo, revision)) is not None:
            files = found[0].commits[found[1]].items()
            entries = [{"type": "file", "path": p, "size": len(c), "oid": sha1(c).hexdigest()} for p, c in files]
            for entry, (path, content) in zip(entries, files, strict=True):
                if path.endswith(_LARGE):
                    entry["lfs"] = {"oid": _oid(path, content), "size": len(content), "pointerSize": 130}
                else:
                    entry["oid"] = _oid(path, content)
            self._send(200, entries)

    def file(self, body: bytes, repo: str, revision: str, name: str) -> None:
        if repo == NAME:
            self.server.asked.append((self.command, revision, name))
        if (found := self._found(repo, revision)) is not None:
            model, commit = found
            if self.server.moves and revision == "main" and self.command == "HEAD":
                model.commit("main", model.files)
            if (content := model.commits[commit].get(name)) is None:
                self._send(404, b"", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            else:
                self._send(200, content, ETag=f'"{_oid(name, content)}"', **{"X-Repo-Commit": commit})

    def _found(self, repo: str, revision: str) -> tuple[Repository, str] | None:
        if (model := self._model(repo)) is None:
            return None
        if (commit := model.commit_of(revision)) is None:
            self._send(404, {"error": "Invalid rev id"}, **{"X-Error-Code": "RevisionNotFound"})
            return None
        return model, commit

    def log_message(self, *_: object) -> None:
        pass


_REPO, _REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[\w.-]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", _Request.create),
    ("POST", "/api/validate-yaml", _Request.validate),
    ("POST", f"/api/models/{_REPO}/preupload/{_REVISION}", _Request.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Request.batch),
    ("PUT", r"/large/(?P<oid>\w+)", _Request.store),
    ("POST", f"/api/models/{_REPO}/commit/{_REVISION}", _Request.commit),
    ("POST", f"/api/models/{_REPO}/tag/{_REVISION}", _Request.tag),
    ("POST", f"/api/models/{_REPO}/branch/{_REVISION}", _Request.branch),
    ("GET", f"/api/models/{_REPO}/refs", _Request.refs),
    ("GET", f"/api/models/{_REPO}", _Request.info),
    ("GET", f"/api/models/{_REPO}/revision/{_REVISION}", _Request.info),
    ("GET", f"/api/models/{_REPO}/tree/{_REVISION}", _Request.tree),
    *((method, f"/{_REPO}/resolve/{_REVISION}/(?P<name>.+)", _Request.file) for method in ("GET", "HEAD")),
]


def _oid(path: str, content: bytes) -> str:
    """As the Hub names a file's content: a large one by SHA-256, another one as git does."""
    return (
        sha256(content).hexdigest()
        if path.endswith(_LARGE)
        else sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
    )


@contextmanager
def hub() -> Iterator[Hub]:
    """It runs inside."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def reachable(cache: Path, *, token: str | None = TOKEN) -> Iterator[Hub]:
    """One that this process's huggingface_hub asks, with a cache and a token of its own, and waits for no retry.

    What the variables HF_ENDPOINT, HF_TOKEN, HF_HUB_CACHE, HF_HUB_OFFLINE=0 and HF_HUB_DISABLE_XET=1 do in a new one.
    """
    from huggingface_hub import constants, hf_api
    from huggingface_hub.utils import close_session

    with hub() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.address)
        patch.setattr(hf_api.api, "endpoint", server.address)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
        patch.setattr("time.sleep", lambda seconds: None)
        if token is None:
            patch.delenv("HF_TOKEN", raising=False)
        else:
            patch.setenv("HF_TOKEN", token)
        if transformers := sys.modules.get("transformers.utils.hub"):  # keeps the address that it met first
            patch.setattr(transformers, "_hf_api", None, raising=False)
        close_session()
        yield server
        close_session()
