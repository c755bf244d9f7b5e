"""Sources of pairs, whatever their format: from what a user writes to open shards.

A source is one string: a path, a brace range, a glob, a folder, a URL or `tfds:NAME`, several
joined by `::`, each with options behind a `#` (`pairs.csv#image=file&caption=title`). `expand`
turns it into the names of single shards, which `open_shards` opens. The table `FORMATS` says which
module reads what.
"""

import contextlib
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
from clip_jax.data.shards import OPEN_THREADS, BadSampleError, Handles, Shard
from clip_jax.errors import UserError, note
from clip_jax.files import check_fetched


@dataclass(frozen=True)
class Format:
    """A format of shards.

    Attributes:
      name: for a table.
      pattern: of a shard's whole name, in lower case.
      open: opens one shard.
      lazy: its sets are made of many files, each of which can be read when it is needed.
    """

    name: str
    pattern: str
    open: Callable[[str, Options], Shard]
    lazy: bool = False


FORMATS = (
    Format("tfds", r"tfds:.*", tfds.open_tfds),
    Format(
        "tar",
        r".*\.tar",
        lambda path, o: webdataset.open_shard(path, o.caption or "caption", whole_txt=o.whole_txt),
        True,
    ),
    Format("csv", r".*\.(csv|tsv)", tables.open_csv),
    Format("jsonl", r".*\.(jsonl|ndjson)", tables.open_jsonl),
    Format("parquet", r".*\.parquet", tables.open_parquet, True),
    Format("tfrecord", r".*\.tfrecords?(-\d+-of-\d+)?", records.open_tfrecord, True),
    Format("array_record", r".*\.array_?record(-\d+-of-\d+)?", records.open_array_record, True),
)
FOLDER_FORMAT = Format("folder", r"", folders.open_folder)
# What a folder is taken for: the first of these formats of which it holds a file.
_FOLDER_ORDER = ("tar", "parquet", "tfrecord", "array_record")
_MANY_NAMES = 64
_MANY_ROWS = 1_000_000
_METADATA = ("metadata.jsonl", "metadata.csv")


def format_of(path: str) -> Format:
    """Return the format of one shard.

    Raises:
      UserError: no format has a name like that.
    """
    for candidate in FORMATS:
        if re.fullmatch(candidate.pattern, path.lower(), re.DOTALL):
            return candidate
    if os.path.isdir(path):
        return FOLDER_FORMAT
    if re.search(r"\.(tar|tgz|tbz2?|txz)(\.\w+)?$", path.lower()):
        raise UserError(
            f"{path} is not a .tar file. Shards are read by offset, which a compressed archive"
            " does not allow: unpack it first (gunzip keeps the .tar)"
        )
    if path.lower().endswith(".json"):
        raise UserError(
            f"{path} is one JSON value: write a .jsonl with an object a line, such as "
            '{"file_name": "0.jpg", "text": "a caption"}'
        )
    names = ".tar, .csv, .tsv, .jsonl, .parquet, .tfrecord and .array_record"
    raise UserError(f"{path} is no data that can be read: it takes {names} files, or folders")


def is_lazy(shard: str) -> bool:
    """Return whether a shard, as `expand` names it, can be counted now and read later."""
    return format_of(split_options(shard)[0]).lazy


def expand(
    pattern: str,
    *,
    missing: list[str] | None = None,
    listed: Callable[[str], bool] = lambda path: False,
) -> list[str]:
    """Return the shards that a source names, in order, each with the source's options.

    Args:
      pattern: parts joined by `::`, each a path or URL, a brace range (`{00000..00041}.tar`), a
        brace list (`{train,extra}.tar`), a glob, a folder, or `tfds:NAME`.
      missing: takes the files of a brace range that are not there; without it they are an error.
      listed: whether a manifest names a file, which then counts as there.

    Raises:
      UserError: a part names no file, a file that is missing or of no known format; or one file
        is named twice.
    """
    shards: list[str] = []
    for part in pattern.split("::"):
        shards.extend(_expand_part(part.strip(), pattern, missing, listed))
    seen: set[str] = set()
    for shard in shards:
        if shard in seen:
            raise UserError(f"data pattern {pattern!r} names {shard} twice: name every shard once")
        seen.add(shard)
    return shards


def _expand_part(
    part: str, pattern: str, missing: list[str] | None, listed: Callable[[str], bool]
) -> list[str]:
    """Return the shards that one part of a source names; `pattern` is for messages."""
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
    exists = _make_listing_check() if len(names) > _MANY_NAMES else os.path.exists
    for name in names:
        matches = [name] if listed(name) or exists(name) else sorted(glob.glob(name))
        paths.extend(matches)
        if not matches:
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
        format_of(name)
    return [name + tail for name in paths]


def _make_listing_check() -> Callable[[str], bool]:
    """Return a function that looks for a file in one listing of its folder.

    A metadata server that all hosts ask for each of 100,000 files takes minutes.
    """
    contents: dict[str, set[str]] = {}

    def exists(name: str) -> bool:
        folder, base = os.path.split(name)
        if folder not in contents:
            is_there = os.path.isdir(folder or ".")
            contents[folder] = set(os.listdir(folder or ".")) if is_there else set()
        return base in contents[folder]

    return exists


def _expand_url(url: str) -> list[str]:
    """Return the shards of a brace range, a glob or a folder of a file system of fsspec."""
    names = expand_braces(url)
    if len(names) == 1 and (url.endswith("/") or any(c in url for c in "*?[")):
        urls = list_urls(url)
        names = _of_one_format(urls) if url.endswith("/") else urls
        if not names:
            raise UserError(f"{url} holds no .tar, .parquet or record file: check the address")
    for name in names:
        format_of(name)
    return names


def _expand_folder(folder: str) -> list[str]:
    """Return the shards in a folder, or else the folder itself as images."""
    files = sorted(entry.path for entry in os.scandir(folder) if entry.is_file())
    if tfds.is_tfds_folder(folder):
        return [f"tfds:{folder}"]
    shards = _of_one_format(files)
    if all(os.path.isdir(file.removesuffix(".parquet")) for file in shards):
        shards = []  # img2dataset's "files" layout: its lists of addresses, beside the images
    for name in _METADATA:
        if not shards and os.path.isfile(os.path.join(folder, name)):
            shards = [os.path.join(folder, name)]
            _note_unlisted(folder, shards[0])
    if not shards and not folders.holds_images(folder):
        deeper = sorted({os.path.dirname(file) for file in _shards_below(folder)})
        named = f": name the folder of the shards, such as {deeper[0]}" if deeper else ""
        raise UserError(f"folder {folder} holds no .tar file and no image{named}")
    if shards:
        _note_passed_over(folder, files, shards)
    return shards or [folder]


def _shards_below(folder: str) -> list[str]:
    """Return the shards in the folders of a folder."""
    files = glob.glob(os.path.join(glob.escape(folder), "*", "*"))
    return _of_one_format(sorted(file for file in files if os.path.isfile(file)))


def _note_unlisted(folder: str, table: str) -> None:
    """Say which images of a folder its table of captions does not list."""
    try:
        shard = open_shard(table)
    except ShardError:
        return  # told when it is read
    if not isinstance(shard, tables.TableShard | tables.JsonLinesShard) or len(shard) > _MANY_ROWS:
        return
    listed = set()
    with Handles() as handles:
        for i in range(len(shard)):
            with contextlib.suppress(BadSampleError, OSError):
                listed.add(shard.image_id(i, handles))
    unlisted = [
        image
        for image in folders.images_below(folder)
        if os.path.normpath(os.path.join(folder, image)) not in listed
    ]
    if unlisted:
        note(
            f"{table} does not list {len(unlisted)} images of its folder, which are passed over, "
            f"the first {unlisted[0]}"
        )


def _note_passed_over(folder: str, files: Sequence[str], shards: Sequence[str]) -> None:
    """Say which data in a folder is not read, because the folder is taken for other shards.

    Tables beside shards of their own names, as img2dataset leaves them, are no data of their own.
    """
    stems = {os.path.splitext(shard)[0] for shard in shards}
    endings = re.compile(r".*\.(tar|parquet|csv|tsv|jsonl|ndjson|tfrecords?|array_?record)")
    images = os.path.basename(shards[0]) not in _METADATA
    passed = [
        file
        for file in files
        if file not in shards
        and os.path.splitext(file)[0] not in stems
        and os.path.basename(file)[0] not in "._"
        and (endings.fullmatch(file.lower()) or (images and folders.is_image(file)))
    ]
    if passed:
        note(
            f"folder {folder} is read as its {len(shards)} {os.path.splitext(shards[0])[1]} files; "
            f"{len(passed)} others are passed over, the first {os.path.basename(passed[0])}"
        )


def _of_one_format(files: Sequence[str]) -> list[str]:
    """Return the files of the first format that a folder is taken for."""
    patterns = {candidate.name: candidate.pattern for candidate in FORMATS}
    for name in _FOLDER_ORDER:
        shards = [f for f in files if re.fullmatch(patterns[name], f.lower(), re.DOTALL)]
        if shards:
            return shards
    return []


def expand_braces(text: str) -> list[str]:
    """Expand `a{08..10}b` to `a08b a09b a10b`, `{x,y}` to `x y`; several multiply, left first.

    >>> expand_braces("train-{00000..00002}.tar")
    ['train-00000.tar', 'train-00001.tar', 'train-00002.tar']
    """
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
        if not is_url(path):
            check_fetched(path)
        opened = format_of(path).open(path, options)
    except ShardError:
        raise
    except UserError as e:  # a column that it lacks, a package that is not installed
        raise ShardError("shard_damaged", str(e)) from e
    return FilteredShard(opened, templates=options.templates) if options.template else opened


def open_shards(
    names: Sequence[str], *, on_error: Callable[[str, ShardError], None] | None = None
) -> list[Shard]:
    """Open every shard, in order; threads hide the latency of a remote disk.

    Args:
      names: as `expand` gives them.
      on_error: called with a shard that cannot be opened, which is then left out; without it the
        first one ends everything.

    Raises:
      ShardError: as `open_shard`, without `on_error`.
    """
    shards: list[Shard] = []
    with ThreadPoolExecutor(OPEN_THREADS, thread_name_prefix="open") as pool:
        futures = [pool.submit(open_shard, name) for name in names]
        try:
            for name, future in zip(names, futures, strict=True):
                try:
                    shards.append(future.result())
                except ShardError as e:
                    if on_error is None:
                        raise
                    on_error(name, e)
        finally:
            # After an error or Ctrl-C, do not read the other shards first.
            pool.shutdown(wait=True, cancel_futures=True)
    return shards


def fingerprint(shards: Sequence[Shard]) -> str:
    """Hash shard names, sizes and sample counts: two runs on the same data agree on it."""
    state = hashlib.blake2b(digest_size=16)
    for shard in shards:
        state.update(json.dumps([shard.name, shard.size, len(shard)]).encode())
    return state.hexdigest()
