"""The page's server: words or an image in, results as JSON out."""

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from clip_jax.embeddings.encode_query import (
    class_probabilities,
    encode_image_query,
    encode_text_query,
)
from clip_jax.embeddings.searcher import Hit, Searcher
from clip_jax.errors import UserError
from clip_jax.evaluation.encoders import Encoders
from clip_jax.search_page.guard import Guard
from clip_jax.search_page.thumbnails import Thumbnails

T = TypeVar("T")

MAX_UPLOAD = 20 << 20
"""Bytes of an uploaded image."""
MAX_UPLOADS = 4
"""Uploads that are in memory at a time; others are asked to try again."""
UPLOAD_SECONDS = 60.0
"""How long one may take to arrive."""
STALL_SECONDS = 10.0
"""How long nothing of it may arrive."""
MAX_DROPPED = 200 << 20
"""Bytes of a body that are read after the answer, so that the answer reaches who still sends it."""
DROP_SECONDS = 10.0
"""How long they may take."""
DEFAULT_TOP = 20
MAX_TOP = 200
MAX_TEXT = 1_000
"""Characters of a query, a label or a template."""
MAX_LABELS = 200
TEMPLATE = "a photo of a {}."
FOLDER = Path(__file__).parent
FILES = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/style.css": ("style.css", "text/css"),
}
HEADERS = {
    # All that the page needs comes from here; nothing may put it into a frame or run in it.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Endpoints:
    """The answers of the server.

    Args:
      searcher: the embeddings and the search over them.
      encoders: the model that made them.
      thumbnails: the images of their rows.
      template: of the labels, until the user types another.
      max_upload: bytes of an uploaded image.
    """

    def __init__(
        self,
        searcher: Searcher,
        encoders: Encoders,
        thumbnails: Thumbnails,
        *,
        template: str,
        max_upload: int,
    ):
        self._searcher = searcher
        self._encoders = encoders
        self._thumbnails = thumbnails
        self._template = template
        self._max_upload = max_upload
        self._lock = threading.Lock()
        self._uploads = 0

    async def about(self, request: Request) -> Response:
        """Answer what is searched, and how."""
        return JSONResponse(
            {
                "count": len(self._searcher.embeddings),
                "model": self._encoders.name,
                "method": self._searcher.method,
                "template": self._template,
                "no_images": self._thumbnails.unavailable,
            }
        )

    async def search(self, request: Request) -> Response:
        """Answer the nearest rows to words, to a row, or to an uploaded image."""
        top = whole_number(request, "top", DEFAULT_TOP, 1, MAX_TOP)
        if request.method == "POST" or "row" in request.query_params:
            query_1D = await self._image_feature(request)
        else:
            words = bounded_text(request.query_params.get("words", ""), "words")
            query_1D = await self._compute(encode_text_query, self._encoders, [words])
        (hits,) = await self._compute(self._searcher.search, query_1D, top)
        return JSONResponse({"hits": [hit_json(hit) for hit in hits]})

    async def classify(self, request: Request) -> Response:
        """Answer the probabilities of labels for a row or an uploaded image."""
        query = request.query_params
        labels = [bounded_text(label, "label") for label in query.getlist("label")]
        if not 0 < len(labels) <= MAX_LABELS:
            raise UserError(f"there are {len(labels)} labels; give 1 to {MAX_LABELS}")
        template = bounded_text(query.get("template", self._template), "template")
        z_1D = await self._image_feature(request)
        p_M = await self._compute(class_probabilities, self._encoders, z_1D, labels, template)
        return JSONResponse({"probabilities": [float(p) for p in p_M]})

    async def thumbnail(self, request: Request) -> Response:
        """Answer the small image of a row."""
        text = request.path_params["row"]
        row = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else -1
        encoded = None
        if 0 <= row < len(self._searcher.embeddings):
            encoded = await run_in_threadpool(self._thumbnails.thumbnail, row)
        if encoded is None:
            raise HTTPException(404, "no such image")
        data, media_type = encoded
        return Response(data, media_type=media_type)

    async def _image_feature(self, request: Request) -> np.ndarray:
        """Return the feature [1, D] of a row that the address names, or else of the upload."""
        if "row" in request.query_params:
            row = whole_number(request, "row", 0, 0, len(self._searcher.embeddings) - 1)
            return self._searcher.embeddings.rows(np.array([row]))
        with self._upload():
            try:
                upload = read_upload(request, self._max_upload)
                data = await asyncio.wait_for(upload, UPLOAD_SECONDS)
            except (TimeoutError, ClientDisconnect):
                raise HTTPException(408, "the image did not arrive; try again") from None
            return await self._compute(encode_image_query, self._encoders, data)

    @contextlib.contextmanager
    def _upload(self) -> Iterator[None]:
        """Count an upload while it is in memory.

        Raises:
          HTTPException: there are `MAX_UPLOADS` already.
        """
        if self._uploads >= MAX_UPLOADS:
            raise HTTPException(503, "too many images at once; try again")
        self._uploads += 1
        try:
            yield
        finally:
            self._uploads -= 1

    async def _compute(self, function: Callable[..., T], *args: Any) -> T:
        """Call in a thread, so that the server goes on; the model has one query at a time."""

        def locked() -> T:
            with self._lock:
                return function(*args)

        return await run_in_threadpool(locked)


def make_app(
    searcher: Searcher,
    encoders: Encoders,
    thumbnails: Thumbnails,
    *,
    template: str = TEMPLATE,
    hosts: Sequence[str] = ("127.0.0.1", "localhost"),
    max_upload: int = MAX_UPLOAD,
) -> Starlette:
    """Return the application.

    Args:
      searcher, encoders, thumbnails, template, max_upload: see `Endpoints`.
      hosts: names under which it answers; other pages must not reach it by a name of theirs.
    """
    endpoints = Endpoints(searcher, encoders, thumbnails, template=template, max_upload=max_upload)
    app = Starlette(
        routes=[
            *(file_route(path, *file) for path, file in FILES.items()),
            Route("/about", endpoints.about),
            Route("/search", endpoints.search, methods=["GET", "POST"]),
            Route("/classify", endpoints.classify, methods=["POST"]),
            Route("/thumbnails/{row}", endpoints.thumbnail),
        ],
        middleware=[
            Middleware(WithHeaders),
            Middleware(DropBody),
            Middleware(Guard, hosts=hosts, public=list(FILES)),
        ],
        exception_handlers={UserError: error_response, HTTPException: error_response},
    )
    app.router.redirect_slashes = False
    return app


def file_route(path: str, filename: str, media_type: str) -> Route:
    """Return the route of a file of the page."""

    async def read(request: Request) -> Response:
        return Response((FOLDER / filename).read_bytes(), media_type=media_type)

    return Route(path, read)


async def error_response(request: Request, error: Exception) -> Response:
    """Return an error as JSON, which the page shows as it is."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)
    return JSONResponse({"error": str(error)}, 400)


class WithHeaders:
    """Middleware that adds `HEADERS` to every response."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self.app(scope, receive, send_with_headers)


class DropBody:
    """Middleware that reads the rest of a refused body before it ends an answer.

    A connection that is closed while its client still sends is reset, and the answer is lost.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        is_read = scope["type"] != "http"

        async def receive_noted() -> Any:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body", False)
            return message

        async def drop() -> None:
            size = 0
            while not is_read and size < MAX_DROPPED:
                size += len((await receive_noted()).get("body", b""))

        async def send_and_drop(message: Any) -> None:
            is_last = message["type"] == "http.response.body" and not message.get("more_body")
            if is_last and not is_read:
                await send({**message, "more_body": True})
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(drop(), DROP_SECONDS)
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self.app(scope, receive_noted, send_and_drop)


async def read_upload(request: Request, max_bytes: int) -> bytes:
    """Return the body, refused with status 413 as soon as it is larger than an image may be.

    Raises:
      TimeoutError: nothing came for `STALL_SECONDS`.
    """
    chunks, size = [], 0
    stream = request.stream()
    while (chunk := await asyncio.wait_for(anext(stream, None), STALL_SECONDS)) is not None:
        size += len(chunk)
        if size > max_bytes:
            raise HTTPException(413, f"the image is larger than {max_bytes >> 20} MiB")
        chunks.append(chunk)
    return b"".join(chunks)


def whole_number(request: Request, name: str, default: int, low: int, high: int) -> int:
    """Return a number of the address.

    Raises:
      UserError: it is no whole number from `low` to `high`.
    """
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 16 and low <= int(text) <= high):
        raise UserError(f"{name} is {text[:20]!r}; it must be a number from {low} to {high}")
    return int(text)


def bounded_text(text: str, name: str) -> str:
    """Return a text of the address.

    Raises:
      UserError: it is empty or too long.
    """
    if not text.strip():
        raise UserError(f"{name} is empty; type something")
    if len(text) > MAX_TEXT:
        raise UserError(f"{name} has {len(text)} characters; at most {MAX_TEXT}")
    return text


def hit_json(hit: Hit) -> dict[str, Any]:
    """Return a result as the page takes it."""
    caption, path = hit.metadata.get("caption") or "", hit.metadata.get("image_path") or ""
    # JSON has no numbers that are not finite; rows may be anybody's.
    score = round(hit.score, 4) if math.isfinite(hit.score) else None
    return {"row": hit.row, "score": score, "caption": str(caption), "path": str(path)}
