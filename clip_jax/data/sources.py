"""Tar shards of image-text pairs, indexed once and then read by offset.

The format is WebDataset's: the members of one sample lie next to each other and share a key, the
part of the name before the first dot of the base name; what follows the dot, in lower case, is
the suffix (`000.jpg`, `000.txt`, `000.json`, `000.cls`).

A shard is indexed from its headers alone, see `clip_jax.data.tar`; nothing is extracted.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt32

from clip_jax.data import tar
from clip_jax.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
SUFFIXES = (*IMAGE_SUFFIXES, "txt", "json", "cls")
INDEX_ENDING = ".index.json"

_MAX_MEMBER_BYTES = 2**32 - 1
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def expand(pattern: str) -> list[str]:
    """The local tar files a pattern names, in order.

    Args:
      pattern: parts joined by `::`, each a path, a brace range (`{00000..00041}.tar`), a brace
        list (`{train,extra}.tar`), a glob, or a folder whose `.tar` files are taken in name order.

    Raises:
      UserError: a part names no file, a file that is missing, a compressed archive or a URL; or
        one file is named twice.
    """
    paths: list[str] = []
    for part in pattern.split("::"):
        paths.extend(_expand_part(part.strip(), pattern))
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise UserError(f"data pattern {pattern!r} names {path} twice: name every shard once")
        seen.add(path)
    return paths


def _expand_part(part: str, pattern: str) -> list[str]:
    if not part:
        raise UserError(f"data pattern {pattern!r} has an empty part: give a path of .tar shards")
    if re.match(r"[a-z][a-z0-9+.-]*:", part):
        raise UserError(
            f"data pattern {part!r} is a URL or a pipe, and shards are read from local disks only:"
            " copy them here first"
        )
    part = os.path.expanduser(part)
    if os.path.isdir(part):
        found = sorted(glob.glob(os.path.join(glob.escape(part), "*.tar")))
        if not found:
            raise UserError(f"folder {part} holds no .tar file: name the folder of the shards")
        return found
    paths: list[str] = []
    missing: list[str] = []
    for name in expand_braces(part):
        found = [name] if os.path.isfile(name) else sorted(glob.glob(name))
        paths.extend(found)
        if not found:
            missing.append(name)
    if missing:
        raise UserError(
            f"data pattern {part!r}: no file {missing[0]}"
            + (f" and {len(missing) - 1} more are missing" if len(missing) > 1 else "")
            + f" ({len(paths)} found); check the path and the range (folder of the run: "
            + f"{os.getcwd()})"
        )
    for path in paths:
        if not path.lower().endswith(".tar"):
            raise UserError(
                f"{path} is not a .tar file. Shards are read by offset, which a compressed archive"
                " does not allow: unpack it first (gunzip keeps the .tar)"
            )
    return paths


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


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Where every sample's members lie in one tar file: 8 bytes a member, and the key.

    Attributes:
      path: the file.
      size: its length in bytes.
      key_bytes: all keys, in UTF-8, one after the other.
      key_ends: uint32 [samples], where each key ends in `key_bytes`.
      members: suffix -> uint32 [samples, 2]: the 512-byte block where the data starts, and its
        length in bytes. Block 0 (always a header) says that the sample has no such member.
      ignored: members that belong to no sample or have a suffix this reader has no use for.
    """

    path: str
    size: int
    key_bytes: bytes
    key_ends: UInt32[np.ndarray, " samples"]
    members: dict[str, UInt32[np.ndarray, "samples 2"]]
    ignored: int

    def __len__(self) -> int:
        return len(self.key_ends)

    @property
    def name(self) -> str:
        """The shard's file name without its folder."""
        return os.path.basename(self.path)

    def key(self, i: int) -> str:
        """The key of sample `i`, in this shard."""
        start = int(self.key_ends[i - 1]) if i else 0
        return self.key_bytes[start : int(self.key_ends[i])].decode("utf-8", "replace")

    def member(self, i: int, suffix: str) -> tuple[int, int] | None:
        """(byte offset, bytes) of one member of sample `i`, or None when it has none."""
        table = self.members.get(suffix)
        if table is None or not table[i, 0]:
            return None
        return int(table[i, 0]) * tar.BLOCK, int(table[i, 1])

    def image(self, i: int) -> tuple[int, int] | None:
        """(byte offset, bytes) of sample `i`'s picture, or None."""
        return next(filter(None, (self.member(i, s) for s in IMAGE_SUFFIXES)), None)

    def digest(self) -> str:
        """A hash of the member table: keys, offsets and lengths, not the members' contents."""
        state = hashlib.blake2b(self.key_bytes, digest_size=16)
        state.update(self.key_ends.astype("<u4").tobytes())
        for suffix in sorted(self.members):
            state.update(suffix.encode() + b"\0")
            state.update(self.members[suffix].astype("<u4").tobytes())
        return state.hexdigest()


def index_shard(path: str) -> ShardIndex:
    """Reads a shard's headers and proves that they are all there.

    The walk must end at the archive's closing zeros, no member may run past the end of the file,
    and where a side file `<path>.index.json` exists its count and hash must agree.

    Raises:
      UserError: the file cannot be read, is compressed, is cut or damaged, or disagrees with its
        side file.
    """
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            _refuse_compressed(path, file.read(8))
            index = _collect(path, size, tar.members(path, file, size))
    except OSError as e:
        raise UserError(f"shard {path} cannot be read: {e.strerror or e}") from e
    _check_side_file(index)
    return index


def index_shards(paths: Sequence[str], threads: int = 8) -> list[ShardIndex]:
    """`index_shard` for every path, in order; the threads hide the latency of a remote disk."""
    with ThreadPoolExecutor(threads, thread_name_prefix="index") as pool:
        futures = [pool.submit(index_shard, path) for path in paths]
        try:
            return [future.result() for future in futures]
        finally:
            # After an error or Ctrl-C, do not read the other shards first.
            pool.shutdown(wait=True, cancel_futures=True)


def _refuse_compressed(path: str, head: bytes) -> None:
    for magic, kind in _COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(
                f"shard {path} is compressed with {kind}. Shards are read by offset, which a"
                " compressed archive does not allow: unpack it first"
            )


def _collect(path: str, size: int, found: Sequence[tar.Member]) -> ShardIndex:
    keys: list[bytes] = []
    rows: list[dict[str, tuple[int, int]]] = []
    ignored = 0
    current = None
    for member in found:
        key, suffix = split_name(member.name)
        known = suffix in SUFFIXES
        ignored += not member.is_folder and not (key and member.is_file and known)
        if not key or not member.is_file:
            continue
        # A sample of which nothing is known keeps its place, to be named and not dropped.
        if key != current or (known and suffix in rows[-1]):
            keys.append(key.encode("utf-8", "surrogateescape"))
            rows.append({})
            current = key
        if known:
            if member.size > _MAX_MEMBER_BYTES:
                reason = f"member {member.name!r} has {member.size} bytes"
                raise tar.damaged(path, member.offset, reason)
            rows[-1][suffix] = (member.data // tar.BLOCK, member.size)
    tables = {
        suffix: np.array([row.get(suffix, (0, 0)) for row in rows], np.uint32)
        for suffix in sorted({suffix for row in rows for suffix in row})
    }
    ends = np.cumsum([len(key) for key in keys], dtype=np.uint32)
    return ShardIndex(path, size, b"".join(keys), ends, tables, ignored)


def split_name(name: str) -> tuple[str, str]:
    """(key, suffix) of a member: cut at the first dot of the base name, suffix in lower case.

    Names without a key or a suffix (`README`, `.DS_Store`, `._000.jpg`) give ("", "").
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or not suffix:
        return "", ""
    return folder + slash + stem, suffix.lower()


def side_file(index: ShardIndex) -> str:
    """The text of `<shard>.index.json`: what `index_shard` will hold the shard to."""
    record = {"samples": len(index), "bytes": index.size, "members": index.digest()}
    return json.dumps(record) + "\n"


def _check_side_file(index: ShardIndex) -> None:
    side = index.path + INDEX_ENDING
    if not os.path.exists(side):
        return
    try:
        with open(side, encoding="utf-8") as file:
            want = json.loads(file.read(65536))
        samples, size, members = want["samples"], want["bytes"], want["members"]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise UserError(
            f"{side} is damaged ({type(e).__name__}): delete it or write it anew"
        ) from e
    for what, expected, found in (
        ("samples", samples, len(index)),
        ("bytes", size, index.size),
        ("members (hash)", members, index.digest()),
    ):
        if expected != found:
            raise UserError(
                f"shard {index.path} is damaged or was replaced: {what} {found}, and its side file"
                f" says {expected}. Fetch it again, or delete {side} if the change was meant"
            )


def fingerprint(indexes: Sequence[ShardIndex]) -> str:
    """A hash of shard names, sizes and sample counts: two runs on the same data agree on it."""
    state = hashlib.blake2b(digest_size=16)
    for index in indexes:
        state.update(json.dumps([index.name, index.size, len(index)]).encode())
    return state.hexdigest()


def incomplete(indexes: Sequence[ShardIndex]) -> dict[str, list[str]]:
    """Samples without a picture or a caption: cause -> "shard/key" of each.

    They keep their place in the order and come out of the loader with `ok=False`; this list is
    for telling the user before the first step.
    """
    found: dict[str, list[str]] = {"no_image": [], "no_caption": []}
    for index in indexes:
        has = {suffix: table[:, 0] > 0 for suffix, table in index.members.items()}
        nothing = np.zeros(len(index), bool)
        image = np.logical_or.reduce([nothing, *(has.get(s, nothing) for s in IMAGE_SUFFIXES)])
        caption = has.get("txt", nothing) | has.get("json", nothing)
        for cause, present in (("no_image", image), ("no_caption", caption)):
            found[cause] += [f"{index.name}/{index.key(int(i))}" for i in np.flatnonzero(~present)]
    return {cause: names for cause, names in found.items() if names}
