"""The order is a function: permutations, host counts, resumption."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data.order import BatchOrder, BatchPart, Order, permutation
from clip_jax.errors import UserError

SHARDS = st.lists(st.integers(0, 30), min_size=1, max_size=9).filter(lambda s: sum(s) >= 8)


@settings(max_examples=60, deadline=None)
@given(SHARDS, st.integers(1, 8), st.integers(1, 4), st.integers(0, 2**64 - 1))
def test_every_epoch_of_every_stream_is_a_permutation_of_its_range(shards, streams, window, seed):
    order = Order(shards, seed=seed, num_streams=streams, window=window)
    owned = []
    for stream in range(streams):
        first, last = order.stream_range(stream)
        owned += range(first, last)
        assert abs((last - first) - sum(shards) / streams) < 1
        for epoch in range(3):
            ids, epochs = order.samples_at(stream, epoch * (last - first), last - first)
            assert sorted(ids) == list(range(first, last))
            assert set(epochs) == {epoch}
    assert owned == list(range(sum(shards)))


@settings(max_examples=30, deadline=None)
@given(SHARDS, st.integers(1, 4), st.integers(0, 200), st.integers(1, 90))
def test_a_run_of_positions_is_its_single_positions(shards, window, position, count):
    order = Order(shards, seed=5, num_streams=2, window=window)
    fresh = Order(shards, seed=5, num_streams=2, window=window)
    ids, epochs = order.samples_at(1, position, count)
    singles = [fresh.samples_at(1, position + k, 1) for k in reversed(range(count))][::-1]
    assert np.concatenate(singles, axis=1).tolist() == [ids.tolist(), epochs.tolist()]


def global_batch(shards, step, hosts, batch_size=24):
    parts = []
    for host in range(hosts):
        order = Order(shards, seed=3, num_streams=8, window=2)
        rows = BatchOrder(order, batch_size=batch_size, part=BatchPart(host, hosts))
        middle = rows.rows // 3
        for first, last in ((0, middle), (middle, rows.rows)):
            parts.append(np.stack(rows.rows_at(step, first, last)))
    return np.concatenate(parts, axis=1)


@settings(max_examples=10, deadline=None)
@given(SHARDS, st.integers(0, 10**6))
def test_the_global_batch_is_the_same_on_1_2_4_and_8_hosts(shards, step):
    one = global_batch(shards, step, 1)
    for hosts in (2, 4, 8):
        np.testing.assert_array_equal(global_batch(shards, step, hosts), one)


def test_an_epoch_gives_every_sample_once_though_hosts_change_in_the_middle():
    # 96 samples, 8 streams of 12, 3 of each a batch: an epoch is 4 steps.
    seen = [global_batch([50, 3, 43], step, hosts)[0] for step, hosts in enumerate((8, 4, 2, 1))]
    assert sorted(np.concatenate(seen)) == list(range(96))


def test_rows_are_stream_major_so_a_host_reads_only_its_own_shards():
    order = Order([10] * 8, seed=0, num_streams=8, window=8)
    rows = BatchOrder(order, batch_size=16, part=BatchPart(3, 4))
    ids, _ = rows.rows_at(7, 0, rows.rows)
    assert ((ids // 10) == [6, 6, 7, 7]).all()


def test_a_window_bounds_how_many_shards_are_open():
    order = Order([100] * 20, seed=1, num_streams=1, window=4)
    ids, _ = order.samples_at(0, 0, 2000)
    for start in range(0, 2000, 400):
        assert len(set(ids[start : start + 400] // 100)) == 4
    assert len(set(ids[:40] // 100)) > 1  # and inside it the shards are mixed


def test_seeds_streams_and_epochs_differ():
    order = Order([200], seed=1, num_streams=2, window=8)
    first, second = order.samples_at(0, 0, 100)[0], order.samples_at(0, 100, 100)[0]
    assert (first != second).any() and (first + 100 != order.samples_at(1, 0, 100)[0]).any()
    other = Order([200], seed=2, num_streams=2, window=8)
    assert (other.samples_at(0, 0, 100)[0] != first).any()


def test_the_permutation_is_pinned():
    """A run resumed with a newer numpy must go on with the same samples."""
    assert permutation(0, 1, 2, 3, n=8).tolist() == PINNED


PINNED = [5, 6, 7, 0, 4, 3, 2, 1]


@pytest.mark.parametrize(
    "sizes, changes, text",
    [
        ([3], {"num_streams": 4}, r"config\.data\.streams to at most 3"),
        ([], {}, "0 samples in 0 shards"),
        ([3], {"seed": -1}, r"config\.seed is -1"),
        ([3], {"window": 0}, r"config\.data\.window 0"),
    ],
)
def test_an_order_that_cannot_be_is_refused_with_the_fix(sizes, changes, text):
    with pytest.raises(UserError, match=text):
        Order(sizes, **{"seed": 0, "num_streams": 1, "window": 8} | changes)


@pytest.mark.parametrize(
    "batch_size, hosts, text",
    [
        (10, 1, r"config\.train\.batch_size is 10, .* set it to 8"),
        (8, 3, r"config\.data\.streams is 4, .* set it to 6"),
    ],
)
def test_numbers_that_do_not_divide_are_named_with_the_fix(batch_size, hosts, text):
    order = Order([9], seed=0, num_streams=4, window=8)
    with pytest.raises(UserError, match=text):
        BatchOrder(order, batch_size=batch_size, part=BatchPart(0, hosts))
