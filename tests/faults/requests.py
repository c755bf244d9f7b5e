"""Requests that nobody should send to the search page, at random."""

import dataclasses
import io
import random
import struct
import zlib
from collections.abc import Callable

from PIL import Image

CLOSED = 0
"""The status of a connection that was closed without an answer."""
NORMAL = "Host: 127.0.0.1\r\n"
PATHS = ("/", "/about", "/search?words=red+bar", "/search?row=1", "/page.js", "/thumbnails/3")
WORDS = (
    *(
        "red bar",
        "%1b%5b2J%1b%5d0;x%07",
        "%00",
        "%ff%fe",
        "%ED%A0%80",
        "%E2%80%AErab",
        "%0d%0aX: y",
    ),
    *(
        "<script>alert(1)</script>",
        "%F0%9F%A6%84",
        "';--",
        "{0.__class__}",
        "a" * 1001,
        "",
        "%",
        "+",
    ),
)
NUMBERS = ("0", "-1", "1", "201", "1e3", "NaN", "", "9" * 400, "%D9%A3", "0x10", "1.0", "true")
WORST_PATHS = (
    *("/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/..%5c..%5capp.py"),
    *("/thumbnails/../app.py", "/thumbnails/..%2f..%2fetc%2fpasswd", "/thumbnails/-1", "/app.py"),
    *(
        "/thumbnails/99999999999999999999",
        "/thumbnails/%D9%A3",
        "/thumbnails/1e1",
        "/%00",
        "/~root",
    ),
    *("/thumbnails/3/..", "/.git/config", "/style.css/..%2fapp.py", "/page.js%00.css", "/search/"),
)


@dataclasses.dataclass(frozen=True)
class Hostile:
    """A request.

    Attributes:
      name: of its kind.
      data: its bytes.
      statuses: those that it may be answered with; `CLOSED` among them.
      is_cut: the client sends no more and says so.
      stalls: the client neither sends more nor goes away; the server must let go.
      at_once: so many clients send it at a time.
    """

    name: str
    data: bytes
    statuses: frozenset[int]
    is_cut: bool = False
    stalls: bool = False
    at_once: int = 1


def request(method: str, path: str, headers: str = NORMAL, body: bytes | None = None) -> bytes:
    """Return the bytes of a request; the length of a body is told."""
    length = f"Content-Length: {len(body)}\r\n" if body is not None else ""
    head = f"{method} {path} HTTP/1.1\r\n{headers}{length}Connection: close\r\n\r\n"
    return head.encode("latin-1", "replace") + (body or b"")


def _hostile(name: str, data: bytes, *statuses: int, **how: bool | int) -> Hostile:
    return Hostile(name, data, frozenset(statuses), **how)  # type: ignore[arg-type]


def a_method(rng: random.Random) -> Hostile:
    """Return a request by a method that the path does not have."""
    names = ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "BREW", "get", "G" * 300]
    data = request(rng.choice(names), rng.choice(PATHS), body=rng.choice([None, b"x" * 100]))
    return _hostile("method", data, 400, 405)


def a_path(rng: random.Random) -> Hostile:
    """Return a request for a file that is none of the page's."""
    path = rng.choice(WORST_PATHS)
    if rng.random() < 0.3:
        path = "/" + "".join(rng.choice("./%25abc\\;:@&=+$,~") for _ in range(rng.randrange(2000)))
    return _hostile("path", request("GET", path), 400, 404, 405)


def a_host(rng: random.Random) -> Hostile:
    """Return a request under a name that is not the server's."""
    hosts = [
        "evil.example",
        "127.0.0.1.evil.example",
        "[::2]:80",
        "[::1",
        "a" * 9000,
        "127.0.0.1,x",
    ]
    lines = "".join(f"Host: {host}\r\n" for host in rng.sample(hosts, rng.choice([0, 1, 1, 1, 2])))
    return _hostile("host", request("GET", rng.choice(PATHS), lines), 400)


def an_origin(rng: random.Random) -> Hostile:
    """Return a request that another page makes a browser send."""
    lines = ["Origin: http://evil.example", "Origin: null", "Sec-Fetch-Site: cross-site"]
    lines += ["Sec-Fetch-Site: same-site", "Origin: http://[", "Origin: http://127.0.0.1:1"]
    method, path = rng.choice([("GET", "/search?words=a"), ("POST", "/search"), ("GET", "/about")])
    body = an_image(rng) if method == "POST" else None
    return _hostile("origin", request(method, path, f"{NORMAL}{rng.choice(lines)}\r\n", body), 403)


def a_query(rng: random.Random) -> Hostile:
    """Return a search for words with control sequences, and numbers that are none."""
    query = [f"words={rng.choice(WORDS)}"] * rng.randint(0, 2)
    query += [f"{rng.choice(['top', 'row', '%ff', 'words'])}={rng.choice(NUMBERS)}"]
    rng.shuffle(query)
    path = f"/search?{rng.choice(['&', ';', '&&']).join(query)}".replace(" ", "%20")
    return _hostile("query", request("GET", path), 200, 400)


def labels(rng: random.Random) -> Hostile:
    """Return labels and templates with all that Python's formats know."""
    template = rng.choice(
        ["{", "}", "{}{}", "{0.__class__}", "{x}", "{!r:>9999999}", "%00{}", "a {}"]
    )
    some = [f"label={rng.choice(WORDS)}" for _ in range(rng.choice([0, 1, 3, 40, 201]))]
    path = f"/classify?row=1&template={template}&{'&'.join(some)}".replace(" ", "%20")
    return _hostile("labels", request("POST", path, body=b""), 200, 400)


def an_image(rng: random.Random) -> bytes:
    """Return a good image."""
    out, size = io.BytesIO(), (rng.randint(1, 300), rng.randint(1, 300))
    Image.effect_noise(size, 50).convert("RGB").save(out, rng.choice(["PNG", "JPEG", "WEBP"]))
    return out.getvalue()


def a_damaged_image(rng: random.Random) -> Hostile:
    """Return an image with bytes changed, cut, emptied, or no image at all."""
    data = bytearray(an_image(rng))
    for _ in range(rng.randint(0, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < 0.4:
        del data[rng.randrange(len(data)) :]
    others = [
        b"",
        b"<svg xmlns='x'/>",
        b"<html>",
        b"%PDF-1.4",
        rng.randbytes(1000),
        b"P6 9 9 255\n",
    ]
    body = bytes(data) if rng.random() < 0.7 else rng.choice(others)
    return _hostile("damaged image", request("POST", "/search", body=body), 200, 400)


def a_costly_image(rng: random.Random) -> Hostile:
    """Return few bytes that say that they are very many pixels, or are."""
    side = rng.choice([5_000, 7_000, 20_000, 65_000, 2**31 - 1])
    rows = side if side < 10_000 else 100
    pixels = zlib.compress(bytes((side // 8 + 2) * rows), 9) if side < 100_000 else b""
    data = b"\x89PNG\r\n\x1a\n" + _chunk(
        b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    )
    data += _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")
    return _hostile("costly image", request("POST", "/search", body=data), 200, 400)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def a_large_body(rng: random.Random) -> Hostile:
    """Return more bytes than an image may have."""
    return _hostile("large body", request("POST", "/search", body=bytes(21 << 20)), 413)


def a_cut_body(rng: random.Random) -> Hostile:
    """Return a body that is shorter than it says, from a client that goes away."""
    length = rng.choice([100_000, 10**9, 10**18])
    head = f"POST /search HTTP/1.1\r\n{NORMAL}Content-Length: {length}\r\n\r\n".encode()
    body = bytes(rng.choice([0, 1, 90_000]))
    return _hostile("cut body", head + body, CLOSED, 400, 408, 413, is_cut=True)


def a_chunked_body(rng: random.Random) -> Hostile:
    """Return chunks of wrong sizes, or lengths that contradict each other."""
    lines = ["Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Content-Length: -1"]
    lines += ["Transfer-Encoding: chunked\r\nContent-Length: 4", "Content-Length: 4, 5"]
    chunks = [
        b"4\r\nabcd\r\n0\r\n\r\n",
        b"zz\r\nabcd\r\n",
        b"ffffffffffffffffff\r\nx",
        b"4\r\nabcdef",
    ]
    head = f"POST {rng.choice(['/search', '/about', '/'])} HTTP/1.1\r\n{NORMAL}{rng.choice(lines)}"
    data = f"{head}\r\n\r\n".encode() + rng.choice(chunks)
    return _hostile("chunked body", data, CLOSED, 400, 405, 408, 413, 501, is_cut=True)


def headers(rng: random.Random) -> Hostile:
    """Return headers that are too long, too many, folded or no headers."""
    lines = [f"X: {'a' * 70_000}\r\n", "X: a\r\n" * 900, "X: a\r\n b\r\n", "X : a\r\n", "X\r\n"]
    lines += [
        ": a\r\n",
        "X: \x00\r\n",
        "X: \xff\xfe\r\n",
        "Range: bytes=0-,9-1\r\n",
        "Expect: 1\r\n",
    ]
    lines += ["Expect: 100-continue\r\n", "Upgrade: h2c\r\nConnection: Upgrade\r\n"]
    lines += ["Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\n"]
    lines += ["Cookie: " + "a=b; " * 2000 + "\r\n", "X-Forwarded-For: 1\r\nX-Forwarded-Host: x\r\n"]
    data = request("GET", rng.choice(PATHS), NORMAL + rng.choice(lines))
    return _hostile("headers", data, 200, 400, 431)


def no_http(rng: random.Random) -> Hostile:
    """Return bytes of another protocol, or of none."""
    some = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\r\n\r\n",
    ]
    some += [
        b"GET /\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET  / HTTP/1.1\r\n\r\n",
        b"",
    ]
    some += [
        rng.randbytes(rng.randint(1, 3000)) + b"\r\n\r\n",
        b"GET \xff\xfe HTTP/1.1\r\n\r\n",
        b"A" * 99_999,
    ]
    return _hostile("no HTTP", rng.choice(some), CLOSED, 200, 400, 404, 505, is_cut=True)


def many_in_one(rng: random.Random) -> Hostile:
    """Return several requests behind each other, the last of them none."""
    one = f"GET /about HTTP/1.1\r\n{NORMAL}\r\n".encode()
    two = f"POST /about HTTP/1.1\r\n{NORMAL}Transfer-Encoding: chunked\r\n\r\nzz\r\n".encode()
    rest = rng.choice([b"", two, b"\x00\x01\r\n\r\n", b"GET / HT"])
    return _hostile("several in one", one * rng.randint(1, 50) + rest, CLOSED, 200, is_cut=True)


def a_slow_one(rng: random.Random) -> Hostile:
    """Return the beginning of a request whose rest never comes."""
    post = f"POST /search HTTP/1.1\r\n{NORMAL}Content-Length: 99999\r\n\r\nabc".encode()
    some = [b"", b"G", b"GET /about HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ", post]
    return _hostile("slow", rng.choice(some), CLOSED, 408, stalls=True)


def many_at_once(rng: random.Random) -> Hostile:
    """Return what 20 clients send at a time: images up to the most that is taken."""
    body = an_image(rng) + bytes(rng.choice([0, 10 << 20, 19 << 20]))
    return _hostile(
        "many at once", request("POST", "/search", body=body), 200, 400, 503, at_once=20
    )


KINDS: dict[Callable[[random.Random], Hostile], float] = {
    a_method: 4, a_path: 5, a_host: 4, an_origin: 4, a_query: 7, labels: 4, a_damaged_image: 7,
    a_costly_image: 4, a_large_body: 1, a_cut_body: 3, a_chunked_body: 4, headers: 5, no_http: 4,
    many_in_one: 2, a_slow_one: 2, many_at_once: 0.25,
}  # fmt: skip
"""By the kind, how often it comes."""


def draw(rng: random.Random) -> Hostile:
    """Return a request of any kind."""
    (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
    return kind(rng)
