"""A small hub on loopback: it answers what `huggingface_hub` asks, and fails as it is told."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

LARGE = 4096
"""Bytes from which a file lies elsewhere, as a file of git-lfs does."""
HOLD = threading.Event()


@dataclass
class Repo:
    """A repository: its files, and who may read it."""

    files: dict[str, bytes]
    token: str = ""  # who has it may read a private repository
    gated: bool = False
    revisions: tuple[str, ...] = ("main",)
    listed: dict = field(default_factory=dict)  # what the listing says of each file instead

    @property
    def commit(self) -> str:
        names = b"".join(name.encode() + data for name, data in sorted(self.files.items()))
        return hashlib.sha1(names).hexdigest()


def git_digest(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


Fault = Callable[["Handler"], bool]
"""What happens in place of an answer; returns whether it was one."""


@dataclass
class Hub:
    """The server's state.

    Attributes:
      repos: by name.
      faults: asked before each answer, first to last.
      asked: of each request, "METHOD path" and its headers.
      plain: files at paths of their own.
      cdn: the address of large files, another host as to tokens.
    """

    address: str = ""
    cdn: str = ""
    plain: dict[str, bytes] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)

    def paths(self, method: str = "GET") -> list[str]:
        return [line.split(" ")[1] for line, _ in self.asked if line.startswith(method + " ")]

    def bodies(self) -> list[str]:
        """The requests for the bytes of large files."""
        return [path for path in self.paths() if path.startswith("/cdn/")]


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args):
        pass

    def _serve(self) -> None:
        self.hub.asked.append((f"{self.command} {self.path}", dict(self.headers)))
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if any(fault(self) for fault in list(self.hub.faults)):
            return
        path = unquote(self.path.partition("?")[0])
        if path in self.hub.plain:
            send(self, self.hub.plain[path], {})
            return
        for pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                answer(self, *match.groups())
                return
        self.status(404)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def status(self, code: int, headers: dict | None = None, body: bytes = b"") -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value) -> None:
        body = json.dumps(value).encode()
        self.status(200, {"Content-Type": "application/json"}, body)

    def allowed(self, name: str) -> Repo | None:
        """Return the repository; None after an answer that it may not be read."""
        repo = self.hub.repos.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token == "wrong":
            message = "Invalid credentials in Authorization header"
            self.status(401, {"X-Error-Message": message})
        elif repo is None or (repo.token and token != repo.token):
            self.status(401, {"X-Error-Code": "RepoNotFound"})
        else:
            return repo
        return None


def listing(handler: Handler, name: str, revision: str) -> None:
    repo = handler.allowed(name)
    if repo is None:
        return
    if revision not in (*repo.revisions, repo.commit):
        handler.status(404, {"X-Error-Code": "RevisionNotFound"})
        return
    siblings = []
    for file, data in repo.files.items():
        entry = {"rfilename": file, "size": len(data), "blobId": git_digest(data)}
        if len(data) >= LARGE:
            sha = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"sha256": sha, "size": len(data), "pointerSize": 134}
        siblings.append(entry if not repo.listed else {"rfilename": file, **repo.listed})
    config = {}
    if "config.json" in repo.files:
        config["model_type"] = json.loads(repo.files["config.json"]).get("model_type")
    handler.json(
        {"id": name, "sha": repo.commit, "siblings": siblings, "config": config, "tags": []}
    )


def resolve(handler: Handler, name: str, revision: str, file: str) -> None:
    repo = handler.allowed(name)
    if repo is None:
        return
    if repo.gated:
        handler.status(403, {"X-Error-Code": "GatedRepo"})
        return
    data = repo.files.get(file)
    if data is None:
        handler.status(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit})
    elif len(data) < LARGE:
        send(handler, data, {"ETag": f'"{git_digest(data)}"', "X-Repo-Commit": repo.commit})
    else:
        sha = hashlib.sha256(data).hexdigest()
        headers = {
            "Location": f"{handler.hub.cdn}/cdn/{sha}",
            "X-Linked-Etag": f'"{sha}"',
            "X-Linked-Size": len(data),
            "X-Repo-Commit": repo.commit,
        }
        handler.status(302, headers)


def cdn(handler: Handler, sha: str) -> None:
    every = (data for repo in handler.hub.repos.values() for data in repo.files.values())
    data = next(data for data in every if hashlib.sha256(data).hexdigest() == sha)
    send(handler, data, {"ETag": f'"{sha}"'})


def send(handler: Handler, data: bytes, headers: dict) -> None:
    """Send a file, or the part of it that is asked for."""
    part = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    if part is None:
        handler.status(200, headers, data)
    elif int(part[1]) >= len(data):
        handler.status(416, {"Content-Range": f"bytes */{len(data)}"})
    else:
        start = int(part[1])
        span = f"bytes {start}-{len(data) - 1}/{len(data)}"
        handler.status(206, {**headers, "Content-Range": span}, data[start:])


def create(handler: Handler) -> None:
    asked = json.loads(handler.body)
    name = (
        f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
    )
    if name in handler.hub.repos:
        handler.status(409, {}, json.dumps({"url": f"{handler.hub.address}/{name}"}).encode())
        return
    handler.hub.repos[name] = Repo({})
    handler.json({"url": f"{handler.hub.address}/{name}", "name": name})


def whoami(handler: Handler) -> None:
    if handler.headers.get("Authorization") != "Bearer secret":
        handler.status(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
    else:
        handler.json({"type": "user", "name": "me"})


def tree(handler: Handler, name: str, revision: str) -> None:
    repo = handler.allowed(name)
    if repo is not None:
        handler.json(
            [
                {"type": "file", "path": path, "size": len(data), "oid": git_digest(data)}
                for path, data in repo.files.items()
            ]
        )


def preupload(handler: Handler, name: str, revision: str) -> None:
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
            "shouldIgnore": False,
        }
        for file in json.loads(handler.body)["files"]
    ]
    handler.json({"files": files})


def batch(handler: Handler, name: str) -> None:
    objects = [
        {
            "oid": item["oid"],
            "size": item["size"],
            "actions": {"upload": {"href": f"{handler.hub.address}/store/{item['oid']}"}},
        }
        for item in json.loads(handler.body)["objects"]
    ]
    handler.json({"transfer": "basic", "objects": objects})


def store(handler: Handler, oid: str) -> None:
    handler.hub.stored[oid] = handler.body
    handler.status(200)


def commit(handler: Handler, name: str, revision: str) -> None:
    repo = handler.hub.repos[name]
    for line in handler.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "file":
            repo.files[value["path"]] = base64.b64decode(value["content"])
        if item["key"] == "lfsFile":
            repo.files[value["path"]] = handler.hub.stored[value["oid"]]
    handler.json(
        {
            "commitUrl": f"{handler.hub.address}/{name}/commit/{repo.commit}",
            "commitOid": repo.commit,
            "success": True,
        }
    )


REPO = r"/([\w.-]+(?:/[\w.-]+)?)"
ROUTES: list[tuple[str, Callable]] = [
    (rf"/api/models{REPO}/revision/(.+)", listing),
    (rf"/api/models{REPO}/preupload/(.+)", preupload),
    (rf"/api/models{REPO}/commit/(.+)", commit),
    (rf"/api/models{REPO}/tree/(.+)", tree),
    (r"/api/whoami-v2", whoami),
    (r"/api/validate-yaml", lambda handler: handler.json({"errors": [], "warnings": []})),
    (r"/api/repos/create", create),
    (rf"{REPO}\.git/info/lfs/objects/batch", batch),
    (r"/store/(\w+)", store),
    (rf"{REPO}/resolve/([^/]+)/(.+)", resolve),
    (r"/cdn/(\w+)", cdn),
]


@contextmanager
def serve() -> Iterator[Hub]:
    """Yield a hub that answers at its address until the end."""
    hub = Hub()
    handler = type("HubHandler", (Handler,), {"hub": hub})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
    hub.address, hub.cdn = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


# Faults. Each is for requests whose path matches, and for so many of them.


def fault(pattern: str, action: Callable[[Handler], None], times: int = 10**9) -> Fault:
    left = [times]

    def happens(handler: Handler) -> bool:
        if left[0] <= 0 or not re.search(pattern, f"{handler.command} {handler.path}"):
            return False
        left[0] -= 1
        action(handler)
        return True

    return happens


def answers(code: int, **headers: str) -> Callable[[Handler], None]:
    """The server answers with a code."""
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: handler.status(code, fields)


def hangs_up(handler: Handler) -> None:
    """The server closes the connection without an answer."""
    handler.close_connection = True


def sends(
    data: bytes,
    after: int,
    *,
    length: int | None = None,
    code: int = 200,
    headers: dict | None = None,
    hold: bool = False,
) -> Callable[[Handler], None]:
    """The server announces some bytes, sends the first of them, and hangs up (or only waits)."""

    def action(handler: Handler) -> None:
        handler.send_response(code)
        for name, value in (headers or {}).items():
            handler.send_header(name, str(value))
        if length != 0:
            handler.send_header("Content-Length", str(length or len(data)))
        else:
            handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write(data[:after])
        handler.wfile.flush()
        if hold:
            HOLD.wait(60)
        handler.close_connection = True

    return action
