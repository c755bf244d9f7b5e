"""What is trained, and how fast: one table from a parameter's path to its factor of the rate.

A factor of 0 freezes a parameter: it has no gradient and no state of the optimizer. All fields of
`TrainSection` that say what is trained come together here, and everything else asks for the result.
Where blocks are stacked for a loop, a parameter has a factor for each block, and a stack of which
the first blocks are frozen is cut in two behind them.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp

from clip_jax.errors import UserError
from clip_jax.models.lora import LORA
from clip_jax.models.projection import PROJECTIONS
from clip_jax.models.stack import FROZEN_STACK, STACK
from clip_jax.sections import TrainSection
from clip_jax.typing import Params, leaves_by_path

FROZEN = {"": (), "image": ("visual",), "text": ("text",)}
"""The choices of `freeze`, and the top names of the parameters that each leaves as they are."""

NAMED = {
    "image": r"^visual/",
    "text": r"^text/",
    "norms": r"(^|/)(ln|bn|norm)\w*/(scale|bias)$",
    "biases": r"/bias$",
}
"""Words that stand for a pattern in `config.train.rates`."""

FIELDS = (
    *("freeze", "rates"),
    *("image_layer_decay", "text_layer_decay"),
    *("image_last_blocks", "text_last_blocks"),
    "lora_rank",
)
"""The fields of `TrainSection` that say what is trained, and how fast."""

_TOWERS = {"visual": "image", "text": "text"}
_STACKED = f"/{STACK}/"
_BLOCK = re.compile(r"/resblocks_(\d+)/|/layer(\d+)_(\d+)/|/stages_(\d+)/(?:blocks_(\d+)/)?")
_BEHIND_BLOCKS = re.compile(
    r"^(visual|text)/(ln_post|ln_final|proj|text_proj|attn_?pool|head|final_|post)"
)

Rates = dict[str, tuple[float, ...]]
"""Factors by path: one, or one a block of a stack."""


@dataclasses.dataclass(frozen=True)
class RateRow:
    """The parameters that have one factor of the learning rate; 0 is frozen."""

    factor: float
    image: int
    text: int
    other: int

    @property
    def total(self) -> int:
        """Return the number of parameters."""
        return self.image + self.text + self.other


def trains_all(section: TrainSection) -> bool:
    """Return whether every parameter is trained at the learning rate itself."""
    default = TrainSection()
    return all(getattr(section, name) == getattr(default, name) for name in FIELDS)


def parse_rates(rates: Iterable[str]) -> list[tuple[re.Pattern[str], float]]:
    """Return the patterns and factors of `config.train.rates`.

    Raises:
      UserError: an item is not PATTERN=FACTOR.
    """
    rows = []
    for item in rates:
        pattern, equals, factor = item.rpartition("=")
        with suppress(re.error, ValueError):
            row = re.compile(NAMED.get(pattern, pattern)), float(factor)
            if equals and 0 <= row[1] <= 1000:
                rows.append(row)
                continue
        raise UserError(
            f"config.train.rates has {item!r}; it takes PATTERN=FACTOR with a factor of 0 to "
            f"1000, the pattern a regular expression or one of {', '.join(NAMED)}"
        )
    return rows


def parameter_rates(names: Iterable[str], section: TrainSection) -> Rates:
    """Return the factor of the learning rate of every parameter, by path.

    It is the product of what the first pattern of `rates` that is found in the path says, and of
    the tower's `layer_decay` to the power of the blocks above. What `freeze` and `last_blocks` name
    has 0. Adapters have what their kernels would have, and the towers themselves then have 0.

    Raises:
      UserError: a tower has not so many blocks, nothing is left to train, or of a stack others than
        the first blocks would be frozen.
    """
    names = list(names)
    single = [one for name in names for one in _unstacked(name, names)]
    blocks = _blocks_of_towers(single)
    _check_blocks(blocks, section)
    rows = parse_rates(section.rates)
    rates = {
        name: tuple(_factor(one, rows, blocks, section) for one in _unstacked(name, names))
        for name in names
    }
    if not any(any(factors) for factors in rates.values()):
        raise UserError(
            "config.train.freeze, rates and last_blocks leave no parameter to train; leave one out"
        )
    for name, factors in rates.items():
        _check_stack(name, factors, rates)
    return rates


def _factor(
    name: str,
    rows: list[tuple[re.Pattern[str], float]],
    blocks: Mapping[str, list[tuple[int, ...]]],
    section: TrainSection,
) -> float:
    """Return the factor of one parameter of a model whose blocks stand by themselves."""
    is_adapter = name.startswith(f"{LORA}/")
    name = name.removeprefix(f"{LORA}/")
    top = name.split("/")[0]
    if top == PROJECTIONS:
        return 1.0
    if top in FROZEN[section.freeze] or (section.lora_rank and top in _TOWERS and not is_adapter):
        return 0.0
    factor = next((factor for pattern, factor in rows if pattern.search(name)), 1.0)
    tower = _TOWERS.get(top)
    if tower is None or not blocks[tower]:
        return factor
    above = _blocks_above(name, blocks[tower])
    last = getattr(section, f"{tower}_last_blocks")
    if last >= 0 and above > last:
        return 0.0
    return factor * getattr(section, f"{tower}_layer_decay") ** above


def _blocks_above(name: str, blocks: list[tuple[int, ...]]) -> int:
    """Count the blocks from a parameter's own one on, it included; 0 behind all blocks.

    What lies before the blocks has one more than the first of them.
    """
    block = _block_of(name)
    if block is not None:
        return len(blocks) - blocks.index(block)
    return 0 if _BEHIND_BLOCKS.search(name) else len(blocks) + 1


def _tower_of(name: str) -> str | None:
    """Return the tower of a parameter or of its adapter; None of the rest."""
    return _TOWERS.get(name.removeprefix(f"{LORA}/").split("/")[0])


def _block_of(name: str) -> tuple[int, ...] | None:
    """Return the place of a parameter's block in its tower; None outside the blocks.

    What stands at the beginning of a stage belongs to its first block.
    """
    match = _BLOCK.search(name)
    if match is None:
        return None
    numbers = [int(number) for number in match.groups() if number is not None]
    return (*numbers, 0) if "/stages_" in name and len(numbers) == 1 else tuple(numbers)


def _blocks_of_towers(names: Iterable[str]) -> dict[str, list[tuple[int, ...]]]:
    """Return the places of all blocks of each tower, in their order."""
    found: dict[str, set[tuple[int, ...]]] = {tower: set() for tower in _TOWERS.values()}
    for name in names:
        tower, block = _tower_of(name), _block_of(name)
        if tower is not None and block is not None:
            found[tower].add(block)
    return {tower: sorted(blocks) for tower, blocks in found.items()}


def _check_blocks(blocks: Mapping[str, list[tuple[int, ...]]], section: TrainSection) -> None:
    for tower, places in blocks.items():
        last = getattr(section, f"{tower}_last_blocks")
        decay = getattr(section, f"{tower}_layer_decay")
        if not places and (last >= 0 or decay != 1):
            field = "layer_decay" if decay != 1 else "last_blocks"
            raise UserError(
                f"config.train.{tower}_{field} is set and the {tower} tower has no numbered blocks;"
                f" give config.train.rates a row instead, such as {tower}=0.1"
            )
        if last > len(places):
            raise UserError(
                f"config.train.{tower}_last_blocks is {last} and the {tower} tower has "
                f"{len(places)} blocks; take -1 to train all of it"
            )


def _unstacked(name: str, names: Iterable[str]) -> list[str]:
    """Return a parameter's names as it has them where blocks stand by themselves."""
    before, stack, after = name.partition(_STACKED)
    if not stack:
        return [name]
    prefix = f"{before}/{STACK}_"
    own = prefix.removeprefix(f"{LORA}/")  # the last block may have no adapter
    last = next(int(n[len(own) :].split("/")[0]) for n in names if n.startswith(own))
    return [f"{prefix}{i}/{after}" for i in range(last)]


def _check_stack(name: str, factors: tuple[float, ...], rates: Rates) -> None:
    """Raise UserError if of a stack others than the first blocks would be frozen."""
    before, stack, after = name.partition(_STACKED)
    if not stack or all(factors) or not any(factors):
        return
    last = rates.get(f"{before}/{STACK}_{len(factors)}/{after}", (1.0,))
    trained = [factor > 0 for factor in (*factors, *last)]
    if trained != sorted(trained):
        raise UserError(
            f"config.train.rates freezes blocks of {name} above blocks that are trained; with "
            "config.model.scan only the first ones can be frozen: set it to False"
        )


def rate_table(params: Params, section: TrainSection) -> list[RateRow]:
    """Return how many parameters have each factor, the fastest first and the frozen ones last.

    Args:
      params: arrays, or their shapes.
      section: says what is trained.
    """
    leaves = leaves_by_path(params)
    counts: dict[float, dict[str, int]] = {}
    for name, factors in parameter_rates(leaves, section).items():
        tower = _tower_of(name) or "other"
        for factor in factors:
            row = counts.setdefault(factor, {"image": 0, "text": 0, "other": 0})
            row[tower] += leaves[name].size // len(factors)
    return [RateRow(factor, **counts[factor]) for factor in sorted(counts, reverse=True)]


def rate_lines(table: Sequence[RateRow], learning_rate: float) -> list[str]:
    """Return a line on what is trained, and one on each factor where they differ."""
    total, frozen = (sum(r.total for r in table if f(r)) for f in (bool, lambda r: not r.factor))
    lines = [f"trained     {total - frozen:,} parameters, frozen {frozen:,}"]
    if len(table) == 1:
        return lines
    for row in table:
        rate = f"rate {learning_rate * row.factor:.3g} (x {row.factor:.3g})"
        lines.append(
            f"            {rate if row.factor else 'frozen'}: {row.total:,}, of them image tower "
            f"{row.image:,}, text tower {row.text:,}, other {row.other:,}"
        )
    return lines


def frozen_towers(params: Params, section: TrainSection) -> tuple[str, ...]:
    """Return the towers of which nothing is trained: "image", "text"."""
    if trains_all(section):
        return ()
    table = parameter_rates(leaves_by_path(params), section)
    trained = {_tower_of(name) for name, factors in table.items() if any(factors)}
    return tuple(tower for tower in _TOWERS.values() if tower not in trained)


def split_frozen(params: Params, section: TrainSection) -> tuple[Params, Params]:
    """Return the parameters that are trained, and those that stay; `join_frozen` undoes it.

    A stack of which the first blocks are frozen is in both, cut. The tree may also be one of
    shardings, which are the same for both parts.
    """
    if trains_all(section):
        return params, {}
    rates = parameter_rates(leaves_by_path(params), section)

    def part(name: str, x: Any, trained: bool) -> Any:
        frozen = sum(not factor for factor in rates[name])
        if frozen in (0, len(rates[name])):
            return x if trained == (frozen == 0) else None
        if not hasattr(x, "shape"):
            return x
        rows = slice(frozen, None) if trained else slice(frozen)
        return x[rows]

    return (
        _pick(params, "", lambda name, x: part(name, x, True)),
        _pick(params, "", lambda name, x: part(name, x, False)),
    )


def _pick(tree: Params, prefix: str, function: Callable[[str, Any], Any]) -> Params:
    """Return the tree of what a function of path and leaf returns, without its Nones."""
    picked: Params = {}
    for key, value in tree.items():
        path = prefix + key
        if isinstance(value, dict):
            inner = _pick(value, f"{path}/", function)
            picked |= {key: inner} if inner else {}
        elif (leaf := function(path, value)) is not None:
            picked[key] = leaf
    return picked


def join_frozen(trained: Params, frozen: Params) -> Params:
    """Return all parameters of what `split_frozen` returned."""
    joined = dict(trained)
    for key, value in frozen.items():
        if key not in joined:
            joined[key] = value
        elif isinstance(value, dict):
            joined[key] = join_frozen(joined[key], value)
        else:
            joined[key] = jnp.concatenate([value, joined[key]])
    return joined


def join_for_model(trained: Params, frozen: Params) -> Params:
    """Return all parameters as the model takes them: blocks of a stack that stay by themselves.

    So the loop over them is another one, which has no backward pass.
    """
    joined = dict(trained)
    for key, value in frozen.items():
        if key not in joined:
            joined[key] = value
        elif key == LORA:
            joined[key] = join_frozen(joined[key], value)
        elif key == STACK:
            joined |= _cut_stack(joined[key], value)
        elif isinstance(value, dict):
            joined[key] = join_for_model(joined[key], value)
    return joined


def _cut_stack(trained: Params, frozen: Params) -> dict[str, Params]:
    """Return a stack as the blocks of which nothing is trained, and those above them."""
    stays, learns = leaves_by_path(frozen), leaves_by_path(trained)
    cut = min(stays[name].shape[0] if name in stays else 0 for name in learns)
    if cut == 0:
        return {STACK: join_frozen(trained, frozen)}
    above = jax.tree.map(lambda x: x[cut:] if x.shape[0] > cut else None, frozen)
    return {
        FROZEN_STACK: jax.tree.map(lambda x: x[:cut], frozen),
        STACK: join_frozen(trained, _pick(above, "", lambda _, x: x)),
    }
