"""Sources of pairs, whatever their format: from what a user writes to indexed shards.

A source is one string: a path, a brace range, a glob, a folder, a URL or `tfds:NAME`, several
joined by `::`, each with options behind a `#` (`pairs.csv#image=file&caption=title`). `expand`
turns it into the names of single shards, `open_shards` into their indexes. The table `KINDS`
says which module reads what.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from clip_jax.data.filters import FilteredShard
from clip_jax.data.formats import folders, records, tables, tfds, webdataset
from clip_jax.data.formats.errors import ShardError
from clip_jax.data.formats.options import Options, split_options
from clip_jax.data.formats.remote import is_url, list_urls
from clip_jax.data.shards import Shard
from clip_jax.errors import UserError


@dataclass(frozen=True)
class Kind:
    """A format: the names it goes by, and what indexes one shard of it."""

    name: str
    pattern: str  # of the whole name, in lower case
    index: Callable[[str, Options], Shard]
    lazy: bool = False  # made of many files, each of which can be read when it is needed


KINDS = (
    Kind("tfds", r"tfds:.*", tfds.open_tfds),
    Kind(
        "tar",
        r".*\.tar",
        lambda path, o: webdataset.open_shard(path, o.caption or "caption"),
        True,
    ),
    Kind("csv", r".*\.(csv|tsv)", tables.open_csv),
    Kind("jsonl", r".*\.(jsonl|ndjson)", tables.open_jsonl),
    Kind("parquet", r".*\.parquet", tables.open_parquet, True),
    Kind("tfrecord", r".*\.tfrecords?(-\d+-of-\d+)?", records.open_tfrecord, True),
    Kind("array_record", r".*\.array_?record(-\d+-of-\d+)?", records.open_array_record, True),
)
FOLDER = Kind("folder", r"", folders.open_folder)
# What a folder is taken for: the first kind of file it holds.
_FOLDER_ORDER = ("tar", "parquet", "tfrecord", "array_record")
_MANY = 64
_METADATA = ("metadata.jsonl", "metadata.csv")


def kind_of(path: str) -> Kind:
    """The kind of one shard.

    Raises:
      UserError: no kind has a name like that.
    """
    for kind in KINDS:
        if re.fullmatch(kind.pattern, path.lower(), re.DOTALL):
            return kind
    if os.path.isdir(path):
        return FOLDER
    if re.search(r"\.(tar|tgz|tbz2?|txz)(\.\w+)?$", path.lower()):
        raise UserError(
            f"{path} is not a .tar file. Shards are read by offset, which a compressed archive"
            " does not allow: unpack it first (gunzip keeps the .tar)"
        )
    names = ".tar, .csv, .tsv, .jsonl, .parquet, .tfrecord and .array_record"
    raise UserError(f"{path} is no data that can be read: it takes {names} files, or folders")


def is_lazy(shard: str) -> bool:
    """Whether a shard, as `expand` names it, can be counted now and read later."""
    return kind_of(split_options(shard)[0]).lazy


def expand(
    pattern: str,
    *,
    missing: list[str] | None = None,
    promised: Callable[[str], bool] = lambda path: False,
) -> list[str]:
    """The shards that a source names, in order, each with the source's options.

    Args:
      pattern: parts joined by `::`, each a path or URL, a brace range (`{00000..00041}.tar`), a
        brace list (`{train,extra}.tar`), a glob, a folder, or `tfds:NAME`.
      missing: takes the files of a brace range that are not there; without it they are an error.
      promised: files that count as there, whether they are or not.

    Raises:
      UserError: a part names no file, a file that is missing or of no known kind; or one file is
        named twice.
    """
    shards: list[str] = []
    for part in pattern.split("::"):
        shards.extend(_expand_part(part.strip(), pattern, missing, promised))
    seen: set[str] = set()
    for shard in shards:
        if shard in seen:
            raise UserError(f"data pattern {pattern!r} names {shard} twice: name every shard once")
        seen.add(shard)
    return shards


def _expand_part(
    part: str, pattern: str, missing: list[str] | None, promised: Callable[[str], bool]
) -> list[str]:
    path = split_options(part)[0]
    tail = part[len(path) :]
    if not path:
        raise UserError(f"data pattern {pattern!r} has an empty part: give a path of .tar shards")
    if path.startswith("tfds:"):
        return [part]
    if is_url(path):
        return [name + tail for name in _expand_url(path)]
    if re.match(r"[a-z][a-z0-9+.-]+:", path):
        raise UserError(
            f"data pattern {path!r} is a pipe or an unknown address: give a path, gs://, s3:// or"
            " https://"
        )
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return [name + tail for name in _expand_folder(path)]
    paths: list[str] = []
    absent: list[str] = []
    names = expand_braces(path)
    exists = _in_listing() if len(names) > _MANY else os.path.exists
    for name in names:
        found = [name] if promised(name) or exists(name) else sorted(glob.glob(name))
        paths.extend(found)
        if not found:
            absent.append(name)
    if missing is not None and paths:
        missing.extend(absent)
    elif absent:
        raise UserError(
            f"data pattern {path!r}: no file {absent[0]}"
            + (f" and {len(absent) - 1} more are missing" if len(absent) > 1 else "")
            + f" ({len(paths)} found); check the path and the range (folder of the run: "
            + f"{os.getcwd()})"
        )
    for name in paths:
        kind_of(name)
    return [name + tail for name in paths]


def _in_listing() -> Callable[[str], bool]:
    """Whether a file is there, by one listing of its folder: a metadata server that all hosts ask
    for each of 100,000 files takes minutes."""
    listed: dict[str, set[str]] = {}

    def exists(name: str) -> bool:
        folder, base = os.path.split(name)
        if folder not in listed:
            is_there = os.path.isdir(folder or ".")
            listed[folder] = set(os.listdir(folder or ".")) if is_there else set()
        return base in listed[folder]

    return exists


def _expand_url(url: str) -> list[str]:
    names = expand_braces(url)
    if len(names) == 1 and (url.endswith("/") or any(c in url for c in "*?[")):
        listed = list_urls(url)
        names = _of_one_kind(listed) if url.endswith("/") else listed
        if not names:
            raise UserError(f"{url} holds no .tar, .parquet or record file: check the address")
    for name in names:
        kind_of(name)
    return names


def _expand_folder(folder: str) -> list[str]:
    """The shards in a folder, or else the folder itself as images."""
    files = sorted(entry.path for entry in os.scandir(folder) if entry.is_file())
    if tfds.is_tfds_folder(folder):
        return [f"tfds:{folder}"]
    found = _of_one_kind(files)
    if all(os.path.isdir(file.removesuffix(".parquet")) for file in found):
        found = []  # img2dataset's "files" layout: its lists of addresses, beside the images
    for name in _METADATA:
        if not found and os.path.isfile(os.path.join(folder, name)):
            found = [os.path.join(folder, name)]
    if not found and not folders.holds_images(folder):
        raise UserError(
            f"folder {folder} holds no .tar file and no image: name the folder of the shards"
        )
    return found or [folder]


def _of_one_kind(files: Sequence[str]) -> list[str]:
    for name in _FOLDER_ORDER:
        kind = next(kind for kind in KINDS if kind.name == name)
        found = [f for f in files if re.fullmatch(kind.pattern, f.lower(), re.DOTALL)]
        if found:
            return found
    return []


def expand_braces(text: str) -> list[str]:
    """`a{08..10}b` -> `a08b a09b a10b`, `{x,y}` -> `x y`; several braces multiply, left first."""
    match = re.search(r"\{([^{}]*)\}", text)
    if match is None:
        return [text]
    head, body, tail = text[: match.start()], match.group(1), text[match.end() :]
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if bounds is None:
        if "," not in body:
            raise UserError(
                f"{{{body}}} in data pattern {text!r} is neither a range like {{00000..00041}}"
                " nor a list like {a,b}"
            )
        items = body.split(",")
    else:
        first, last = bounds.groups()
        if int(first) > int(last):
            raise UserError(f"range {{{body}}} in data pattern {text!r} runs backwards: swap it")
        # As in the shell: zeros in front of either bound fix the width.
        padded = any(len(bound) > 1 and bound[0] == "0" for bound in (first, last))
        width = max(len(first), len(last)) if padded else 0
        items = [str(i).zfill(width) for i in range(int(first), int(last) + 1)]
    tails = expand_braces(tail)
    return [head + item + rest for item in items for rest in tails]


def open_shard(shard: str) -> Shard:
    """Open one shard, as `expand` names it.

    Raises:
      ShardError: it cannot be read, is damaged, or its options do not fit.
    """
    path, options = split_options(shard)
    try:
        index = kind_of(path).index(path, options)
    except ShardError:
        raise
    except UserError as e:  # a column that it lacks, a package that is not installed
        raise ShardError("shard_damaged", str(e)) from e
    return FilteredShard(index, templates=options.templates) if options.template else index


def open_shards(
    shards: Sequence[str],
    threads: int = 8,
    *,
    on_error: Callable[[str, ShardError], None] | None = None,
) -> list[Shard]:
    """`open_shard` for every shard, in order; the threads hide the latency of a remote disk.

    Args:
      on_error: called with a shard that cannot be indexed, which is then left out; without it the
        first one ends everything.
    """
    found: list[Shard] = []
    with ThreadPoolExecutor(threads, thread_name_prefix="index") as pool:
        futures = [pool.submit(open_shard, shard) for shard in shards]
        try:
            for shard, future in zip(shards, futures, strict=True):
                try:
                    found.append(future.result())
                except ShardError as e:
                    if on_error is None:
                        raise
                    on_error(shard, e)
        finally:
            # After an error or Ctrl-C, do not read the other shards first.
            pool.shutdown(wait=True, cancel_futures=True)
    return found


def fingerprint(indexes: Sequence[Shard]) -> str:
    """A hash of shard names, sizes and sample counts: two runs on the same data agree on it."""
    state = hashlib.blake2b(digest_size=16)
    for index in indexes:
        state.update(json.dumps([index.name, index.size, len(index)]).encode())
    return state.hexdigest()


def incomplete(indexes: Sequence[Shard]) -> dict[str, list[str]]:
    """Samples without an image or a caption: cause -> "shard/key" of each.

    They keep their place in the order and come out of the loader with `valid=False`; this list is
    for telling the user before the first step.
    """
    found: dict[str, list[str]] = {}
    for index in indexes:
        for cause, keys in index.incomplete().items():
            if keys:
                found.setdefault(cause, []).extend(f"{index.name}/{key}" for key in keys)
    return found
