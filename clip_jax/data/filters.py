"""Shards with some of their samples left out, or with their captions in sentences."""

import hashlib
import operator
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from clip_jax.data.captions import captions_of_kind
from clip_jax.data.shards import BadSampleError, Handles, Shard, with_templates
from clip_jax.errors import UserError

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


class Condition(NamedTuple):
    """One comparison of a field with a number or a word."""

    field: str
    operator: str
    value: float | str

    def holds(self, record: dict[str, Any]) -> bool:
        """Return whether a record meets it: not where the field is absent or of another type."""
        value = record.get(self.field)
        if isinstance(self.value, str):
            return isinstance(value, str) and _OPERATORS[self.operator](value, self.value)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                return False
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return _OPERATORS[self.operator](value, self.value)


def parse_filter(text: str) -> list[Condition]:
    """Parse `width>=200,similarity>0.3` into conditions that must all hold; empty gives none.

    Raises:
      UserError: a part is no comparison.
    """
    conditions = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"([\w.-]+)\s*(>=|<=|==|!=|>|<)\s*(.+)", part)
        if match is None:
            raise UserError(
                f"config.data.filter: {part!r} is no comparison; write for example"
                " width>=200,similarity>0.3"
            )
        field, sign, value = match.groups()
        try:
            number: float | str = float(value)
        except ValueError:
            number = value
        if isinstance(number, str) and sign not in ("==", "!="):
            raise UserError(f"config.data.filter: {part!r} compares a word; only == and != can")
        conditions.append(Condition(field, sign, number))
    return conditions


class FilteredShard:
    """Some of a shard's samples, each caption in every template.

    Args:
      shard: the whole shard.
      rows: its samples that are there, in order; None for all.
      templates: sentences with `{}`.
    """

    def __init__(
        self,
        shard: Shard,
        *,
        rows: Int64[np.ndarray, " rows"] | None = None,
        templates: tuple[str, ...] = ("{}",),
    ):
        self.shard, self.size = shard, shard.size
        self._rows = rows
        self._templates = templates

    @property
    def name(self) -> str:
        return self.shard.name

    def __len__(self) -> int:
        return len(self.shard) if self._rows is None else len(self._rows)

    def _row(self, i: int) -> int:
        return i if self._rows is None else int(self._rows[i])

    def key(self, i: int) -> str:
        """Return the sample's key in the whole shard."""
        return self.shard.key(self._row(i))

    def image(self, i: int, handles: Handles) -> bytes:
        return self.shard.image(self._row(i), handles)

    def captions(self, i: int, handles: Handles) -> list[str]:
        return with_templates(self.shard.captions(self._row(i), handles), self._templates)

    def captions_of_kind(self, key: str, i: int, handles: Handles) -> list[str]:
        """Return the captions of a kind in every template, see `captions.captions_of_kind`."""
        captions = captions_of_kind(self.shard, key, self._row(i), handles)
        return with_templates(captions, self._templates)

    def label(self, i: int, handles: Handles) -> int:
        return self.shard.label(self._row(i), handles)

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        return self.shard.record(self._row(i), handles)

    @property
    def classes(self) -> list[str]:
        """The names of the whole shard's classes, in label order; empty where it knows none."""
        return getattr(self.shard, "classes", [])

    def image_id(self, i: int, handles: Handles) -> Hashable:
        """Return what the rows of one image have in common; None where each has its own."""
        shared = getattr(self.shard, "image_id", None)
        return None if shared is None else shared(self._row(i), handles)

    def incomplete(self) -> dict[str, list[str]]:
        """Return the keys of the incomplete samples that are there, by cause."""
        causes = self.shard.incomplete()
        if self._rows is None or not any(causes.values()):
            return causes
        present = {self.key(i) for i in range(len(self))}
        return {cause: [key for key in keys if key in present] for cause, keys in causes.items()}


def filter_shard(shard: Shard, conditions: Sequence[Condition]) -> Shard:
    """Return the samples whose record meets every condition; one that cannot be read does not."""
    rows = []
    with Handles() as handles:
        for i in range(len(shard)):
            try:
                record = shard.record(i, handles)
            except (BadSampleError, OSError):
                continue
            if all(condition.holds(record) for condition in conditions):
                rows.append(i)
    return FilteredShard(shard, rows=np.array(rows, np.int64))


def first_of_each_key(shards: Sequence[Shard]) -> Bool[np.ndarray, " samples"]:
    """Return for each sample of all shards whether its key did not come before."""
    hashes = [
        np.array(
            [
                int.from_bytes(hashlib.blake2b(shard.key(i).encode(), digest_size=8).digest())
                for i in range(len(shard))
            ],
            np.uint64,
        )
        for shard in shards
    ]
    all_hashes = np.concatenate([*hashes, np.empty(0, np.uint64)])
    first = np.zeros(len(all_hashes), bool)
    first[np.unique(all_hashes, return_index=True)[1]] = True
    return first


def drop_repeated_keys(
    shards: Sequence[Shard], on_repeat: Callable[[str], None] | None = None
) -> list[Shard]:
    """Return the shards without the samples whose key came before, in any of them.

    Args:
      on_repeat: called with "shard/key" of every sample that is left out.
    """
    first = first_of_each_key(shards)
    starts = np.cumsum([0, *map(len, shards)])
    rest: list[Shard] = []
    for shard, start in zip(shards, starts[:-1], strict=True):
        is_first = first[start : start + len(shard)]
        if on_repeat is not None:
            for i in np.flatnonzero(~is_first):
                on_repeat(f"{shard.name}/{shard.key(int(i))}")
        rows = np.flatnonzero(is_first).astype(np.int64)
        rest.append(shard if is_first.all() else FilteredShard(shard, rows=rows))
    return rest
