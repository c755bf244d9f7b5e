"""The page's server: words or an image in, results as JSON out."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clip_jax.embeddings.encode_query import class_shares, encode_picture, encode_words
from clip_jax.embeddings.searcher import Finder, Hit
from clip_jax.errors import UserError
from clip_jax.evaluation.encoders import Encoders
from clip_jax.search_page.thumbnails import Pictures

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

MAX_UPLOAD = 20 << 20
MAX_TOP = 200
MAX_WORDS = 1_000
MAX_LABELS = 200
TEMPLATE = "a photo of a {}."
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


def make_app(
    finder: Finder,
    encoders: Encoders,
    pictures: Pictures,
    *,
    template: str = TEMPLATE,
    hosts: Sequence[str] = ("127.0.0.1", "localhost"),
) -> "Starlette":
    """The application.

    Args:
      template: of the labels, until the user types another.
      hosts: names under which it answers; other pages must not reach it by a name of theirs.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    one_at_a_time = threading.Lock()
    folder = Path(__file__).parent

    async def compute(work: Callable[..., Any], *args: Any) -> Any:
        """`work` in a thread, so that the server goes on; the model has one question at a time."""

        def locked() -> Any:
            with one_at_a_time:
                return work(*args)

        return await run_in_threadpool(locked)

    def file_route(path: str) -> Route:
        name, kind = FILES[path]

        async def read(request: "Request") -> "Response":
            return Response((folder / name).read_bytes(), media_type=kind)

        return Route(path, read)

    async def about(request: "Request") -> "Response":
        told = {
            "count": len(finder.embeddings),
            "model": encoders.name,
            "way": finder.way,
            "template": template,
            "no_pictures": pictures.why_none,
        }
        return JSONResponse(told)

    async def search(request: "Request") -> "Response":
        top = whole_number(request, "top", 20, 1, MAX_TOP)
        if request.method == "POST":
            upload = await read_upload(request)
            query_1D = await compute(encode_picture, encoders, upload)
        elif "row" in request.query_params:
            row = whole_number(request, "row", 0, 0, len(finder.embeddings) - 1)
            query_1D = finder.embeddings.rows(np.array([row]))
        else:
            words = text_of(request.query_params.get("words", ""), "words")
            query_1D = await compute(encode_words, encoders, [words])
        (hits,) = await compute(finder.search, query_1D, top)
        return JSONResponse({"hits": [hit_json(hit) for hit in hits]})

    async def classify(request: "Request") -> "Response":
        labels = [text_of(label, "label") for label in request.query_params.getlist("label")]
        if not 0 < len(labels) <= MAX_LABELS:
            raise UserError(f"there are {len(labels)} labels; give 1 to {MAX_LABELS}")
        asked = text_of(request.query_params.get("template", template), "template")
        if "row" in request.query_params:
            row = whole_number(request, "row", 0, 0, len(finder.embeddings) - 1)
            z_1D = finder.embeddings.rows(np.array([row]))
        else:
            z_1D = await compute(encode_picture, encoders, await read_upload(request))
        share_M = await compute(class_shares, encoders, z_1D, labels, asked)
        return JSONResponse({"shares": [float(share) for share in share_M]})

    async def picture(request: "Request") -> "Response":
        row = request.path_params["row"]
        small = None
        if row < len(finder.embeddings):
            small = await run_in_threadpool(pictures.small, row)
        if small is None:
            raise HTTPException(404, "no such image")
        return Response(small[0], media_type=small[1])

    async def wrong(request: "Request", error: Exception) -> "Response":
        code = error.status_code if isinstance(error, HTTPException) else 400
        told = error.detail if isinstance(error, HTTPException) else str(error)
        return JSONResponse({"error": told}, code)

    app = Starlette(
        routes=[
            *map(file_route, FILES),
            Route("/about", about),
            Route("/search", search, methods=["GET", "POST"]),
            Route("/classify", classify, methods=["POST"]),
            Route("/picture/{row:int}", picture),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts)),
            Middleware(WithHeaders),
        ],
        exception_handlers={UserError: wrong, HTTPException: wrong},
    )
    return app


class WithHeaders:
    """Every response with `HEADERS`."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self.app(scope, receive, with_headers)


async def read_upload(request: "Request") -> bytes:
    """The body, refused as soon as it is more than an image may be."""
    from starlette.exceptions import HTTPException

    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_UPLOAD:
            raise HTTPException(413, f"the image is larger than {MAX_UPLOAD >> 20} MiB")
        chunks.append(chunk)
    return b"".join(chunks)


def whole_number(request: "Request", name: str, otherwise: int, low: int, high: int) -> int:
    """A number of the address."""
    text = request.query_params.get(name, str(otherwise))
    if not (text.isascii() and text.isdigit() and len(text) < 16 and low <= int(text) <= high):
        raise UserError(f"{name} is {text[:20]!r}; it must be a number from {low} to {high}")
    return int(text)


def text_of(text: str, name: str) -> str:
    """Words of the address, not too many."""
    if not text.strip():
        raise UserError(f"{name} is empty; type something")
    if len(text) > MAX_WORDS:
        raise UserError(f"{name} has {len(text)} characters; at most {MAX_WORDS}")
    return text


def hit_json(hit: Hit) -> dict[str, Any]:
    """A result as the page takes it."""
    caption, path = hit.about.get("caption") or "", hit.about.get("image_path") or ""
    return {"row": hit.row, "score": round(hit.score, 4), "caption": caption, "path": str(path)}
