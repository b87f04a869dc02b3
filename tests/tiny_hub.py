"""A hub on loopback that answers what huggingface_hub asks, for test_hub.py."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
Headers = dict[str, str]
Fault = Callable[["_Handler", bytes, Headers], object]  # answers in place of the hub: takes what that would have sent
NAME = "someone/small-inpainting"
FIRST, SECOND = "a1" * 20, "b2" * 20  # commits


@dataclass
class Repository:
    """Files by commit, and the commits that branches and tags name."""

    commits: dict[str, Files]
    branches: dict[str, str] = field(default_factory=lambda: {"main": FIRST})

    def commit(self, revision: str) -> str | None:
        found = self.branches.get(revision, revision)
        return found if found in self.commits else None


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    token: str | None


class TinyHub:
    """Answers what huggingface_hub asks, as the real hub does, and remembers the questions.

    Weights lie in another place ("localhost"), to which the hub ("127.0.0.1") redirects.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.refusals: dict[str, tuple[int, str]] = {}  # beginning of a path: status, error code
        self.faults: dict[str, Fault] = {}  # beginning of a path: what happens to a GET of it
        self.closed = threading.Event()
        self.breaks: set[str] = set()  # names of files that come by half, and then no more
        self.broken: set[str] = set()
        self.blobs: dict[str, tuple[str, bytes]] = {}

        class Handler(_Handler):
            tiny_hub = self

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def publish(self, files: Files, name: str = NAME, commit: str = FIRST) -> None:
        """Make `commit` the newest of a repository."""
        repository = self.repositories.setdefault(name, Repository({}))
        repository.commits[commit] = files
        repository.branches["main"] = commit

    def fetched(self) -> list[str]:
        """Names of the files whose contents were asked for, in order."""
        contents = [request.path for request in self.requests if request.method == "GET"]
        names = [path.split("/", 5)[5] for path in contents if path.split("/")[3:4] == ["resolve"]]
        return [*names, *(self.blobs[path[5:]][0] for path in contents if path.startswith("/cdn/"))]

    def close(self) -> None:
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    tiny_hub: TinyHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        token = self.headers.get("Authorization")
        self.tiny_hub.requests.append(Request(self.command, path, token))
        for beginning, (status, code) in self.tiny_hub.refusals.items():
            if path.startswith(beginning):
                return self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": "no"})
        if path.startswith("/cdn/"):
            return self.send_file(*self.tiny_hub.blobs[path[5:]])
        asked = re.fullmatch(
            r"(?P<api>/api/models)?/(?P<name>[^/]+/[^/]+)"
            r"(/(?P<what>revision|tree|resolve)/(?P<revision>[^/]+)(/(?P<file>.+))?)?",
            path,
        )
        repository = self.tiny_hub.repositories.get(asked["name"]) if asked else None
        if asked is None or repository is None:
            return self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        commit = repository.commit(unquote(asked["revision"] or "main"))
        if commit is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[commit]
        if asked["what"] == "resolve":
            return self.resolve(commit, files, unquote(asked["file"]))
        if asked["what"] == "tree":
            tree = [{"type": "file", "path": n, "size": len(b), "oid": sha256(b)} for n, b in files.items()]
            return self.answer(200, json.dumps(tree).encode())
        siblings = [{"rfilename": name} for name in files]
        info = {"id": asked["name"], "modelId": asked["name"], "sha": commit, "siblings": siblings}
        return self.answer(200, json.dumps(info | {"tags": [], "private": False, "downloads": 0}).encode())

    def resolve(self, commit: str, files: Files, name: str) -> None:
        if name not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        if not name.endswith(".safetensors"):
            return self.send_file(name, files[name], commit)
        digest = sha256(files[name])
        self.tiny_hub.blobs[digest] = (name, files[name])
        return self.answer(
            302,
            b"",
            {
                "Location": f"http://localhost:{self.server.server_port}/cdn/{digest}",  # type: ignore[attr-defined]
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(files[name])),
                "X-Repo-Commit": commit,
            },
        )

    def send_file(self, name: str, content: bytes, commit: str | None = None) -> None:
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        headers = {"ETag": f'"{sha256(content)}"'} | ({"X-Repo-Commit": commit} if commit else {})
        if name in self.tiny_hub.breaks and self.command == "GET":
            if name in self.tiny_hub.broken:
                return self.answer(500, b"")
            self.tiny_hub.broken.add(name)
            return self.answer(200, content, headers, sent=len(content) // 2)
        if not start:
            return self.answer(200, content, headers)
        first = int(start[1])
        return self.answer(
            206, content[first:], headers | {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
        )

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, sent: int | None = None) -> None:
        """Send an answer, or its first `sent` bytes before the line breaks; or what a fault makes of it."""
        for beginning, fault in self.tiny_hub.faults.items():
            if self.path.startswith(beginning) and self.command == "GET":
                self.close_connection = True
                fault(self, body, headers or {})
                return
        self.send(status, body, headers or {}, sent)

    def send(self, status: int, body: bytes, headers: Headers, sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:sent])
        self.close_connection = self.close_connection or sent is not None

    def log_message(self, *_: object) -> None:
        pass


# ---- faults ----


def stall(handler: _Handler, body: bytes, headers: Headers) -> None:
    """Nothing comes, and the line stays open."""
    handler.tiny_hub.closed.wait(120)


def stall_halfway(handler: _Handler, body: bytes, headers: Headers) -> None:
    handler.send(200, body, headers, len(body) // 2)
    handler.wfile.flush()
    handler.tiny_hub.closed.wait(120)


def reset(handler: _Handler, body: bytes, headers: Headers) -> None:
    """Half of it comes, then the connection is reset."""
    handler.send(200, body, headers, len(body) // 2)
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def too_little(handler: _Handler, body: bytes, headers: Headers) -> None:
    """A whole answer, but of half the file."""
    handler.send(200, body[: len(body) // 2], headers)


def too_much(handler: _Handler, body: bytes, headers: Headers) -> None:
    handler.send(200, body + b"more", headers)


def web_page(handler: _Handler, body: bytes, headers: Headers) -> None:
    """What a network sends that wants somebody to log in first."""
    handler.send(200, b"<!DOCTYPE html><title>Log in</title>", {"Content-Type": "text/html"})


def other_content(handler: _Handler, body: bytes, headers: Headers) -> None:
    """As many bytes as there should be, but others."""
    handler.send(200, bytes(byte ^ 1 for byte in body), headers)


def redirect(place: str) -> Fault:
    return lambda handler, body, headers: handler.send(302, b"", {"Location": place})


def status(code: int, **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, body, _: handler.send(code, b"", named)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
