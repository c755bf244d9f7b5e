"""What a command line names, by paths that are good in any current folder."""

import os
import re
from collections.abc import Mapping
from typing import Any

from clip_jax.files import absolute_model


def absolute_source(source: str) -> str:
    """Return a source or path with absolute local parts, good in any current folder."""

    def absolute(part: str) -> str:
        is_local = not re.match(r"[a-z][a-z0-9+.-]+:", part)
        return os.path.abspath(os.path.expanduser(part)) if is_local else part

    return "::".join(absolute(part.strip()) for part in source.split("::"))


def absolute_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `api.load_encoders` with absolute paths."""
    tokenizer = checkpoint.get("tokenizer")
    return {
        **checkpoint,
        "model": absolute_model(checkpoint["model"]),
        **({"tokenizer": absolute_source(tokenizer)} if tokenizer else {}),
    }
