"""A file that says of what a folder is made, so that work in it goes on and is never mixed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clip_jax.errors import UserError, short
from clip_jax.files import atomic_write


def claim_folder(folder: Path, receipt: Mapping[str, Any], *, name: str) -> None:
    """Make the folder with its receipt, or make sure that its receipt is this one.

    Args:
      receipt: what the folder is made of, by names that the user knows.
      name: of the file.

    Raises:
      UserError: the folder holds something else; the first difference is named.
    """
    path = folder / name
    if not path.exists():
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(f"{folder} holds something else: name another folder")
        with atomic_write(path) as partial:
            partial.write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in receipt if old.get(key) != receipt[key]]
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(f"{path} cannot be read: {short(e)}; name another folder") from e
    for key in differing:
        raise UserError(
            f"{folder} was begun with another {key} ({old.get(key)!s:.60}, now"
            f" {receipt[key]!s:.60}): name another folder, or delete it"
        )
