"""Real servers of buckets on loopback, behind a proxy that fails as it is told.

S3's is moto's, Google's is gcp-storage-emulator's:
`pip install "moto[server]" s3fs gcp-storage-emulator gcsfs`.
"""

import dataclasses
import http.client
import importlib.util
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import fsspec
from run_tiny import free_port

from faults.trials import started

BUCKET = "runs"
ANSWER = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>told to</Message></Error>"


class Proxy:
    """What stands between a run and the server.

    Attributes:
      mode: "ok", "down" (connections are dropped), "error" (answers 500 and 503), "slow", or "lost"
        (a request is done and its answer is lost).
      share: of the requests that the mode is for.
      uploading: whether files of a checkpoint arrived that no manifest names yet.
    """

    def __init__(self, port: int, seed: int) -> None:
        self.mode, self.share, self.uploading = "ok", 1.0, False
        self.faults = 0
        self._rng = random.Random(seed)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self):
                with suppress(ConnectionError, TimeoutError):
                    super().handle_one_request()

            def forward(self):
                proxy.handle(self, port)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def handle(self, request: BaseHTTPRequestHandler, port: int) -> None:
        """Answer a request, or fail as the mode says."""
        size = int(request.headers.get("Content-Length") or 0)
        body = request.rfile.read(size)
        if len(body) < size:  # whoever sent it was killed: a server takes no half of an object
            request.close_connection = True
            return
        mode = self.mode if self._rng.random() < self.share else "ok"
        self.faults += mode != "ok"
        request.close_connection = mode in ("down", "lost", "error")
        if mode == "down":
            return
        if mode == "error":
            request.send_response(self._rng.choice([500, 503]))
            request.send_header("Content-Length", str(len(ANSWER)))
            request.send_header("Connection", "close")
            request.end_headers()
            if request.command != "HEAD":
                request.wfile.write(ANSWER)
            return
        if mode == "slow":
            time.sleep(self._rng.uniform(0.1, 1.0))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request(request.command, request.path, body, dict(request.headers))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if request.command in ("PUT", "POST"):
            # Google's has the name in the head of the body.
            name = unquote(request.path).encode() + body[:1000]
            self.uploading = b"/checkpoints/" in name or (
                self.uploading and b"/bucket.json" not in name
            )
        if mode == "lost":
            return
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "server", "date"):
                request.send_header(name, value)
        if answer.getheader("Content-Length") is None:
            request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content)


@dataclasses.dataclass(frozen=True)
class Store:
    """A kind of bucket.

    Attributes:
      protocol: of its URLs.
      packages: that its server and its file system need.
      server: the arguments of Python that start the server on a port.
      environment: what names the server's address, and what else a client wants.
      make: path and body of the request that makes the bucket.
    """

    protocol: str
    packages: tuple[str, ...]
    server: tuple[str, ...]
    environment: dict[str, str]
    make: tuple[str, str, str]

    def is_missing(self) -> bool:
        """Return whether a package is not there, and say so."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            print(f"runs in {self.protocol}:// are left out, without {', '.join(missing)}")
        return bool(missing)


S3 = Store(
    "s3",
    ("moto", "flask", "s3fs"),
    ("-m", "moto.server", "-H", "127.0.0.1", "-p", "PORT"),
    {
        "AWS_ENDPOINT_URL": "ADDRESS",
        "AWS_ACCESS_KEY_ID": "of",
        "AWS_SECRET_ACCESS_KEY": "nobody",
        "AWS_DEFAULT_REGION": "us-east-1",
    },
    ("PUT", f"/{BUCKET}", ""),
)
GCS = Store(
    "gs",
    ("gcp_storage_emulator", "gcsfs"),
    (
        *("-m", "gcp_storage_emulator", "start", "--host=127.0.0.1", "--port=PORT", "--in-memory"),
        f"--default-bucket={BUCKET}",
    ),
    {"STORAGE_EMULATOR_HOST": "ADDRESS", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"},
    ("GET", f"/storage/v1/b/{BUCKET}", ""),
)


@contextmanager
def server_of(store: Store, seed: int) -> Iterator[Proxy]:
    """Start a server and its proxy; the environment names it until the block ends."""
    fsspec.get_filesystem_class(store.protocol).clear_instance_cache()  # of a server before
    port = free_port()
    line = [sys.executable, *(word.replace("PORT", str(port)) for word in store.server)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = started(subprocess.Popen(line, text=True, **quiet))
    proxy = Proxy(port, seed)
    thread = threading.Thread(target=proxy.server.serve_forever)
    thread.start()
    os.environ |= {
        name: value.replace("ADDRESS", proxy.address) for name, value in store.environment.items()
    }
    try:
        _make_bucket(store, port)
        yield proxy
    finally:
        proxy.server.shutdown()
        thread.join()
        proxy.server.server_close()
        server.kill()
        server.wait()


def _make_bucket(store: Store, port: int) -> None:
    end = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request(*store.make)
            if connection.getresponse().status == 200:
                return
        except OSError:
            if time.monotonic() > end:
                raise
        finally:
            connection.close()
        time.sleep(0.2)
