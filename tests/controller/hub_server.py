"""A stand-in for the Hugging Face hub: as much of its HTTP API as uploads and downloads of small files ask for.

A commit is taken whole or not at all, as there. Every request is kept, with its headers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


class Hub(BaseHTTPRequestHandler):
    """Answers for repositories that live in `repos`: name -> commits, each of them path -> content."""

    protocol_version = "HTTP/1.1"
    repos: ClassVar[dict[str, list[dict[str, bytes]]]] = {}
    requests: ClassVar[list[tuple[str, str, dict[str, str]]]] = []
    refuses: ClassVar[int] = 0  # a status that every request gets

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:
            return  # whoever asked has died
        self._keep()
        if self.path == "/api/repos/create":
            about = json.loads(body)
            name = f"{about['organization']}/{about['name']}" if about.get("organization") else about["name"]
            there = name in self.repos
            self.repos.setdefault(name, [])
            self._answer(409 if there else 200, {"url": f"{self._url}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/\w+", self.path):
            last = (self.repos.get(match[1]) or [{}])[-1]
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                | ({"oid": _oid(last[f["path"]])} if f["path"] in last else {})
                for f in json.loads(body)["files"]
            ]
            self._answer(200 if match[1] in self.repos else 404, {"files": files})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/\w+", self.path):
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            commits = self.repos[match[1]]
            commits.append({**(commits[-1] if commits else {}), **files})
            url = f"{self._url}/{match[1]}/commit/{self._sha(match[1])}"
            self._answer(200, {"success": True, "commitUrl": url, "commitOid": self._sha(match[1]), "hookOutput": ""})
        else:
            self._answer(404, {"error": self.path})

    def do_GET(self) -> None:
        self._keep()
        if match := re.match(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/[^/?]+)?(?:\?|$)", self.path):
            if not self.repos.get(match[1]):
                self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                return
            files = self.repos[match[1]][-1]
            tree = [{"type": "file", "path": p, "size": len(c), "oid": _etag(c)} for p, c in files.items()]
            about = {"id": match[1], "sha": self._sha(match[1]), "siblings": [{"rfilename": p} for p in files]}
            about["commits"] = len(self.repos[match[1]])
            self._answer(200, tree if match[2] == "tree" else about)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
            content = self.repos.get(match[1], [{}])[-1].get(match[2])
            if content is None:
                self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
                return
            self._answer(200, content, {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": self._sha(match[1])})
        else:
            self._answer(404, {"error": self.path})

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def _sha(self, name: str) -> str:
        return hashlib.sha1(f"{name} {len(self.repos[name])}".encode()).hexdigest()

    def _keep(self) -> None:
        self.requests.append((self.command, self.path, dict(self.headers)))

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(self.refuses or status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class Server(ThreadingHTTPServer):
    """Says nothing of clients that died in a request."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _oid(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def serving() -> Iterator[tuple[str, type[Hub]]]:
    """A hub of its own for the length of the block: its address, and the class with what it has seen."""
    hub = type("OwnHub", (Hub,), {"repos": {}, "requests": [], "refuses": 0})
    server = Server(("127.0.0.1", 0), hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", hub
    finally:
        server.shutdown()
        server.server_close()
