"""A Hub on this machine that has one model, with the few answers that huggingface_hub needs. Shared."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAME = "owner/name"


class Hub(ThreadingHTTPServer):
    """Has the files of `folder` as the model `NAME`; its branch main moves on whenever somebody has asked where it is.

    asked: (method, revision, file) of the requests for it, in order
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.folder, self.commits = folder, 0
        self.asked: list[tuple[str, str, str]] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        _, _, place = self.path.partition(f"/{NAME}/resolve/")
        revision, _, name = place.partition("/")
        if NAME in self.path:
            self.server.asked.append((self.command, revision, name or self.path))
        if revision == "main" and self.command == "HEAD":
            self.server.commits += 1
        commit = f"{self.server.commits:040x}" if revision == "main" else revision
        if (file := self.server.folder / name).is_file():
            content = file.read_bytes()
            self._send(200, content, ETag=f'"{sha256(content).hexdigest()}"', **{"X-Repo-Commit": commit})
        else:
            self._send(404, b"", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub(folder: Path) -> Iterator[Hub]:
    """It runs inside."""
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
