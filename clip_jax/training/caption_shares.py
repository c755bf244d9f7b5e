"""The lengths of a run's captions, counted once, so that they can be packed."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from clip_jax.data.caption_packing import (
    AUTO,
    MIN_CAPTIONS,
    OFF,
    choose_packing,
    format_shares,
    measured_shares,
    trimmed_tokens,
)
from clip_jax.data.captions import choose_caption, parse_captions
from clip_jax.data.dataset import LazyShard, TrainingData
from clip_jax.data.decode_processes import decode_threads
from clip_jax.data.loader import caption_lengths, make_order
from clip_jax.data.order import BatchOrder, BatchPart
from clip_jax.data.shards import PROGRAMMING_ERRORS, ConcatShards, Handles
from clip_jax.parallel import distributed
from clip_jax.parallel.mesh import batch_part
from clip_jax.sections import Config
from clip_jax.training.fingerprint import saved_value
from clip_jax.training.setup import RunComponents, rows_of_device
from clip_jax.training.warm_start import has_checkpoints

SAMPLES = 4096
"""Captions that all processes together count."""
WORTH = 0.9
"""Captions are packed where that leaves at most this share of the tokens that trimming leaves."""
_ROWS_PER_PART = 64
GOLDEN = 0.6180339887498949


def with_caption_packing(run: RunComponents, data: TrainingData, folder: Path) -> RunComponents:
    """Return the run with `config.data.caption_packing` settled, where it is "auto".

    A resumed run takes what its work folder says; one that was made before captions were packed
    goes on without. All processes have to call it.
    """
    if run.config.data.caption_packing != AUTO:
        return run
    if has_own_rows(run.config):
        value = OFF
    elif distributed.from_first(has_checkpoints(folder)):
        value = saved_value(folder, "config.data.caption_packing", OFF)
    else:
        value = settled_shares(run, data) if may_pack(run) else OFF
    section = dataclasses.replace(run.config.data, caption_packing=value)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, data=section))


def has_own_rows(config: Config) -> bool:
    """Return whether each caption needs a row: for factors of branches, or a negative beside it."""
    return bool(config.model.text_drop_path or config.data.negatives)


def may_pack(run: RunComponents) -> bool:
    """Return whether "auto" considers packing: on accelerators, for many pairs a device."""
    return (
        run.model.config.text.supports_trimming
        and run.model.target.platform != "cpu"
        and rows_of_device(run.config, run.mesh) >= MIN_CAPTIONS
    )


def settled_shares(run: RunComponents, data: TrainingData) -> str:
    """Return the shares of the lengths of the run's first captions; "off" if it does not pay."""
    context, size = run.model.config.text.context_length, run.config.train.batch_size
    counts = count_lengths(run, data)
    everywhere = np.sum(distributed.gather(counts.tolist()), axis=0)
    shares = measured_shares(everywhere, context)
    packing = choose_packing(shares, rows_of_device(run.config, run.mesh), context)
    worth = packing.rows_per_caption <= WORTH * trimmed_tokens(shares, size, context)
    return format_shares(shares) if worth else OFF


def count_lengths(run: RunComponents, data: TrainingData) -> np.ndarray:
    """Count the captions of each length among the run's first, of this process's part of a batch.

    The shards that they are in are those that the first batches need anyway.
    """
    config, context = run.config, run.model.config.text.context_length
    part = BatchPart(*batch_part(run.mesh))
    order, _ = make_order(data.sources, config.data, config.seed)
    rows = BatchOrder(order, batch_size=config.train.batch_size, part=part)
    wanted = -(-SAMPLES // part.count)
    steps = range(math.ceil(wanted / rows.rows))
    ids = np.concatenate([rows.rows_at(step, 0, rows.rows)[0] for step in steps])
    ids = ids[np.arange(min(wanted, len(ids))) * len(ids) // min(wanted, len(ids))]
    samples, kinds = ConcatShards(data.shards), parse_captions(config.data.captions)

    def count(first: int) -> np.ndarray:
        captions: list[str] = []
        with Handles() as handles:
            for row in ids[first : first + _ROWS_PER_PART].tolist():
                shard, i = samples.at(row)
                try:
                    if kinds:
                        chance = row * GOLDEN % 1.0  # even, by the kinds' weights
                        whole = shard.load() if isinstance(shard, LazyShard) else shard
                        captions.append(choose_caption(whole, kinds, i, handles, chance))
                    else:
                        captions += shard.captions(i, handles)
                except PROGRAMMING_ERRORS:
                    raise
                except Exception:  # counted where the row is read as a whole
                    continue
        if not captions:
            return np.zeros(context + 1, np.int64)
        lengths = caption_lengths(run.tokenizer(captions, context), run.tokenizer.eot_id)
        return np.bincount(lengths, minlength=context + 1)

    threads = decode_threads(config.data)
    with ThreadPoolExecutor(threads, thread_name_prefix="captions") as pool:
        return sum(pool.map(count, range(0, len(ids), _ROWS_PER_PART)), np.zeros(context + 1, int))
