"""Starts the page's server on this machine."""

import ipaddress
import socket

import numpy as np

from clip_jax.embeddings.encode_query import encode_words
from clip_jax.embeddings.searcher import Finder
from clip_jax.errors import UserError
from clip_jax.evaluation.encoders import Encoders
from clip_jax.search_page.app import TEMPLATE, make_app
from clip_jax.search_page.thumbnails import Pictures


def serve(
    finder: Finder, encoders: Encoders, host: str, port: int, data: str | None, template: str = ""
) -> int:
    """Answer until Ctrl-C; the exit code.

    Raises:
      UserError: the libraries are not installed, or the address cannot be had.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as e:
        raise UserError(f"--serve needs {e.name}: pip install 'clip_jax[search]'") from None
    pictures = Pictures(finder.embeddings, data)
    hosts = ["127.0.0.1", "localhost", host] if is_local(host) else ["*"]
    app = make_app(finder, encoders, pictures, template=template or TEMPLATE, hosts=hosts)
    listening = listen(host, port)
    # What the first question would wait for: the programs of both encoders.
    encode_words(encoders, ["warm"])
    encoders.encode_image(np.zeros((1, encoders.image_size, encoders.image_size, 3), np.uint8))
    shown = f"[{host}]" if ":" in host else host
    if pictures.why_none:
        print(f"no images will be shown: {pictures.why_none}", flush=True)
    if not is_local(host):
        print(f"whoever reaches {host} can ask; there is no password", flush=True)
    print(f"http://{shown}:{listening.getsockname()[1]} (Ctrl-C ends)", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def is_local(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is any that is free.

    Raises:
      UserError: it is taken, or no address of this machine.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        return listening
    except (OSError, OverflowError) as e:
        listening.close()
        raise UserError(f"{host}:{port} cannot be served: {e}; choose another --port") from None
