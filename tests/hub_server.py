"""A server that speaks the Hugging Face Hub's protocol: models, revisions, redirects, ranges, errors."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISIONS = ("main", "v1")
LARGE = 10_000  # bytes from which a file is behind a redirect, as large ones are


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a dict of files; `asked` has the paths of all files that were sent.

    All revisions are at `commit`.
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]], gated: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.gated = repositories, gated
        self.asked: list[str] = []
        self.commit = COMMIT
        self.cut = 0  # the next large file ends after so many bytes
        self.ranges: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def cdn(self) -> str:
        """The same server under another name, where redirects lead."""
        return f"http://localhost:{self.server_address[1]}"


@contextmanager
def serving(repositories: dict[str, dict[str, bytes]], gated: tuple[str, ...] = ()) -> Iterator[Hub]:
    with Hub(repositories, gated) as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._about(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
            self._tree(found[1], found[2])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._send(self.server.repositories[found[1]][found[2]], found[2])
        else:
            self._answer(404, b"{}")

    def _about(self, repo: str, revision: str) -> None:
        if not self._known(repo, revision, file=False):
            return
        names = [{"rfilename": name} for name in self.server.repositories[repo]]
        self._answer(
            200,
            json.dumps({"id": repo, "modelId": repo, "sha": self.server.commit, "siblings": names}).encode(),
        )

    def _tree(self, repo: str, revision: str) -> None:
        if not self._known(repo, revision, file=False):
            return
        entries = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in self.server.repositories[repo].items()
        ]
        self._answer(200, json.dumps(entries).encode())

    def _file(self, repo: str, revision: str, name: str) -> None:
        if not self._known(repo, revision, file=True):
            return
        content = self.server.repositories[repo].get(name)
        if content is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        about = {"X-Repo-Commit": self.server.commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if len(content) < LARGE:
            self._send(content, name, about)
            return
        about["X-Linked-Size"], about["X-Linked-ETag"] = str(len(content)), about["ETag"]
        self._answer(302, b"", {**about, "Location": f"{self.server.cdn}/cdn/{repo}/{name}"})

    def _known(self, repo: str, revision: str, *, file: bool) -> bool:
        if repo not in self.server.repositories:
            self._answer(
                401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            )
        elif repo in self.server.gated and file:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif revision not in (*REVISIONS, self.server.commit):
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _send(self, content: bytes, name: str, headers: dict[str, str] | None = None) -> None:
        if self.command == "GET":
            self.server.asked.append(name)
        start = 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
            self.server.ranges.append(f"{name}: {start}")
        body, status = content[start:], 206 if start else 200
        more = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        more |= {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
            **(headers or {}),
        }
        if self.command == "GET" and self.server.cut and len(content) >= LARGE:
            self._answer(status, body, more, cut=self.server.cut)
        else:
            self._answer(status, body, more)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int = 0) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: cut or None])
        if cut:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass
