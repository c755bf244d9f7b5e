"""The server of the page on this machine."""

import ipaddress
import socket

import numpy as np

from clip_jax.data.patches import image_shape
from clip_jax.distribution import install_command
from clip_jax.embeddings.encode_query import encode_text_query
from clip_jax.embeddings.searcher import Searcher
from clip_jax.errors import UserError
from clip_jax.evaluation.encoders import Encoders
from clip_jax.search_page.thumbnails import Thumbnails

MAX_CONNECTIONS = 100
"""Connections that are open at a time; others are asked to try again."""


def serve(
    searcher: Searcher,
    encoders: Encoders,
    *,
    host: str,
    port: int,
    data: str | None,
    template: str,
) -> int:
    """Answer until Ctrl-C; return the exit code.

    Args:
      searcher: the embeddings and the search over them.
      encoders: the model that made them.
      host, port: where the page is served; port 0 is any that is free.
      data: the source of the images, where it is another than the embeddings say.
      template: of the labels, until the user types another; empty is `app.TEMPLATE`.

    Raises:
      UserError: the libraries are not installed, or the address cannot be had.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as e:
        raise UserError(f"--serve needs {e.name}: {install_command('search')}") from None
    from clip_jax.search_page.app import TEMPLATE, make_app
    from clip_jax.search_page.connection import TimedConnection
    from clip_jax.search_page.guard import bracketed

    thumbnails = Thumbnails(searcher.embeddings, data)
    hosts = ["127.0.0.1", "localhost", host] if is_local(host) else ["*"]
    app = make_app(searcher, encoders, thumbnails, template=template or TEMPLATE, hosts=hosts)
    listener = listen(host, port)
    # What the first query would wait for: the programs of both encoders.
    encode_text_query(encoders, ["warm"])
    encoders.encode_image(np.zeros((1, *image_shape(encoders.image_size)), np.uint8))
    shown_host = bracketed(host)
    if thumbnails.unavailable:
        print(f"no images will be shown: {thumbnails.unavailable}", flush=True)
    if not is_local(host):
        print(f"whoever reaches {host} can ask; there is no password", flush=True)
    print(f"http://{shown_host}:{listener.getsockname()[1]} (Ctrl-C ends)", flush=True)
    config = uvicorn.Config(
        app,
        http=TimedConnection,
        ws="none",
        log_level="warning",
        access_log=False,
        limit_concurrency=MAX_CONNECTIONS,
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def is_local(host: str) -> bool:
    """Return whether only this machine reaches the host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address; port 0 is any that is free.

    Raises:
      UserError: it is taken, or no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(MAX_CONNECTIONS)  # who reads the address may connect at once
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError) as e:
        raise UserError(f"{host}:{port} cannot be served: {e}; choose another --port") from None
    return listener
