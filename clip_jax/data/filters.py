"""A shard seen through a filter, without its repeated keys, or with its captions in sentences."""

import hashlib
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

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
        """False too where the field is absent or of another type."""
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
    """`width>=200,similarity>0.3` as conditions that must all hold; empty gives none.

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
      shard: what is seen.
      keep: places in the shard, in order; None keeps all.
      templates: sentences with `{}`.
    """

    def __init__(
        self,
        shard: Shard,
        *,
        keep: Int64[np.ndarray, " kept"] | None = None,
        templates: tuple[str, ...] = ("{}",),
    ):
        self.shard, self.size = shard, shard.size
        self._keep = keep
        self._templates = templates

    @property
    def name(self) -> str:
        return self.shard.name

    def __len__(self) -> int:
        return len(self.shard) if self._keep is None else len(self._keep)

    def _place(self, i: int) -> int:
        return i if self._keep is None else int(self._keep[i])

    def key(self, i: int) -> str:
        """The key in the shard."""
        return self.shard.key(self._place(i))

    def image(self, i: int, handles: Handles) -> bytes:
        return self.shard.image(self._place(i), handles)

    def captions(self, i: int, handles: Handles) -> list[str]:
        return with_templates(self.shard.captions(self._place(i), handles), self._templates)

    def label(self, i: int, handles: Handles) -> int:
        return self.shard.label(self._place(i), handles)

    def record(self, i: int, handles: Handles) -> dict[str, Any]:
        return self.shard.record(self._place(i), handles)

    def incomplete(self) -> dict[str, list[str]]:
        """What the shard lacks, as far as it is kept."""
        found = self.shard.incomplete()
        if self._keep is None or not any(found.values()):
            return found
        kept = {self.key(i) for i in range(len(self))}
        return {cause: [key for key in keys if key in kept] for cause, keys in found.items()}


def filtered(shard: Shard, conditions: Sequence[Condition]) -> Shard:
    """The samples whose record meets every condition; one that cannot be read does not."""
    keep = []
    with Handles() as handles:
        for i in range(len(shard)):
            try:
                record = shard.record(i, handles)
            except (BadSampleError, OSError):
                continue
            if all(condition.holds(record) for condition in conditions):
                keep.append(i)
    return FilteredShard(shard, keep=np.array(keep, np.int64))


def first_of_key(shards: Sequence[Shard]) -> Bool[np.ndarray, " samples"]:
    """For each sample of the shards in line, whether its key did not come before."""
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
    line = np.concatenate([*hashes, np.empty(0, np.uint64)])
    first = np.zeros(len(line), bool)
    first[np.unique(line, return_index=True)[1]] = True
    return first


def without_repeats(
    shards: Sequence[Shard], on_repeat: Callable[[str], None] = lambda name: None
) -> list[Shard]:
    """The shards without the samples whose key came before, in any of them.

    Args:
      on_repeat: called with "shard/key" of every sample that is left out.
    """
    first = first_of_key(shards)
    starts = np.cumsum([0, *map(len, shards)])
    out: list[Shard] = []
    for shard, start in zip(shards, starts[:-1], strict=True):
        is_first = first[start : start + len(shard)]
        keep = np.flatnonzero(is_first)
        for i in np.flatnonzero(~is_first):
            on_repeat(f"{shard.name}/{shard.key(int(i))}")
        out.append(
            shard if len(keep) == len(shard) else FilteredShard(shard, keep=keep.astype(np.int64))
        )
    return out
