"""A run in a bucket, to be read: `clip_jax.load("s3://bucket/run")`.

What is needed of it is copied to the user's cache folder once: the newest whole checkpoint, and the
files beside the checkpoints, which are fetched anew each time. Nothing is written to the bucket and
no lock is taken, so that a run can be read while it goes on.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from clip_jax.data.formats.remote import is_url
from clip_jax.errors import UserError
from clip_jax.files import make_folder
from clip_jax.pretrained.work_folder import CHECKPOINT_DIRNAME
from clip_jax.training.bucket import (
    Bucket,
    Files,
    manifest_bytes,
    read_manifest,
)
from clip_jax.training.bucket_workdir import fetch, place_name, scratch_folder


def local_copy(path: str | Path, *, weights: bool = True, last: int | None = None) -> str:
    """Return a folder with what a run in a bucket holds; a path that is no URL is its own.

    Of another folder, such as a converted model, all of it is copied.

    Args:
      path: a local path, or the URL of a work folder or of its `best`.
      weights: False leaves the checkpoints out.
      last: the step that the newest checkpoint is sought up to; None is any.

    Raises:
      UserError: there is no run, or it cannot be fetched.
    """
    if not is_url(str(path)):
        return str(path)
    url = str(path).rstrip("/")
    bucket, committed = Bucket(url), _whole_checkpoints(url)
    if committed is not None:
        committed = newest_of(committed, last) if weights else {}
    elif not bucket.patiently(bucket.sizes):
        raise UserError(f"{url} holds nothing: give the folder of a run")
    place = scratch_folder(url) / "copies"
    make_folder(place, flag="the cache folder")
    fetched = Path(tempfile.mkdtemp(prefix="fetching-", dir=place))
    try:
        return str(_copy(bucket, fetched / place_name(url), place, committed))
    finally:
        shutil.rmtree(fetched, ignore_errors=True)


def _copy(bucket: Bucket, fetched: Path, place: Path, committed: dict[str, Files] | None) -> Path:
    """Fetch what an earlier copy has not got; return the copy."""
    if committed is None:
        known = json.dumps(bucket.patiently(bucket.versions)).encode()
    else:
        known = manifest_bytes(committed)
    copy = place / hashlib.sha256(known).hexdigest()[:16] / fetched.name
    if not copy.is_dir():
        fetch(bucket, fetched, committed)
        for old in place.iterdir() if committed != {} else ():  # of earlier checkpoints
            if not old.name.startswith("fetching-"):
                shutil.rmtree(old, ignore_errors=True)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            fetched.rename(copy)
        except OSError:
            if not copy.is_dir():  # made by another process meanwhile
                raise
        return copy
    if committed is None:
        return copy
    fetch(bucket, fetched, {})
    for parent, _, files in os.walk(fetched):
        for name in files:
            file = Path(parent) / name
            target = copy / file.relative_to(fetched)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
    return copy


def _whole_checkpoints(url: str) -> dict[str, Files] | None:
    """Return the whole checkpoints below a URL; None where no manifest speaks of it.

    That of a run speaks of its `best` too.
    """
    committed = read_manifest(Bucket(url))
    above, _, name = url.rpartition("/")
    if committed is not None or above.endswith((":/", "/")) or "://" not in above:
        return committed
    committed = read_manifest(Bucket(above))
    if committed is None:
        return None
    prefix = f"{name}/"
    return {n.removeprefix(prefix): f for n, f in committed.items() if n.startswith(prefix)}


def newest_of(committed: Mapping[str, Files], last: int | None = None) -> dict[str, Files]:
    """Return the checkpoint of the highest step up to `last`, if there is one."""
    steps = {
        int(name.rpartition("/")[2]): name
        for name in committed
        if name.startswith(f"{CHECKPOINT_DIRNAME}/")
    }
    newest = max((step for step in steps if last is None or step <= last), default=None)
    return {} if newest is None else {steps[newest]: committed[steps[newest]]}
