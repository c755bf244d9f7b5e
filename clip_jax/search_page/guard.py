"""Who may ask the page's server: requests by its own names, and from its own page."""

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

# A name or an IPv6 address in brackets, and a port.
_HOST = re.compile(r"(\[[0-9a-f:.%]*\]|[^:\[\]]*)(?::\d+)?")


class Guard:
    """Middleware that answers only requests which its own page, or no page at all, has made.

    A browser sends what any page tells it to, also to this machine, and names the page's origin.

    Args:
      app: what answers the others.
      hosts: names under which it answers; `*` is any.
      public: paths that a link from elsewhere may open.
    """

    def __init__(self, app: Any, *, hosts: Sequence[str], public: Sequence[str]):
        self.app = app
        self._hosts = frozenset(bracketed(host).lower() for host in hosts)
        self._public = frozenset(public)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            status, reason = refusal
            await JSONResponse({"error": reason}, status)(scope, receive, send)

    def _refusal(self, scope: Any) -> tuple[int, str] | None:
        """Return the status and the reason of a request that is not answered."""
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        match = _HOST.fullmatch(host)
        if "*" not in self._hosts and (match is None or match[1] not in self._hosts):
            return 400, "this server does not answer under that name"
        site = headers.get("sec-fetch-site", "")
        if site == "same-origin" or scope["path"] in self._public:
            return None
        origin = headers.get("origin")
        if site in ("cross-site", "same-site") or (origin is not None and _netloc(origin) != host):
            return 403, "another page may not ask this server"
        return None


def bracketed(host: str) -> str:
    """Return a host as it stands in an address: IPv6 in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""
