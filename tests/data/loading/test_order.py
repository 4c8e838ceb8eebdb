"""The order of samples: permutations, independence of ranks, entry at any position."""

import pickle
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdistill.data import rng
from selfdistill.data.errors import UserError
from selfdistill.data.loading.order import Order

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)
SEEDS = st.integers(0, 2**40)
PARTITIONS = st.integers(1, 5)
WINDOWS = st.integers(0, 4)


@settings(deadline=None)
@given(COUNTS, SEEDS, PARTITIONS, WINDOWS, st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(
    counts: list[int], seed: int, partitions: int, window: int, epoch: int
) -> None:
    order = Order(counts, seed, partitions, window)
    n = sum(counts)
    ids = order.ids(np.arange(epoch * n, (epoch + 1) * n))
    assert sorted(ids) == list(range(n))


@settings(deadline=None)
@given(COUNTS, SEEDS, PARTITIONS, WINDOWS, st.integers(1, 7), st.integers(1, 4), st.integers(0, 60))
def test_batches_do_not_depend_on_the_number_of_ranks(
    counts: list[int], seed: int, partitions: int, window: int, world: int, each: int, step: int
) -> None:
    batch = world * each * partitions
    whole = Order(counts, seed, partitions, window)
    ranks = [Order(counts, seed, partitions, window) for _ in range(world)]
    positions = np.concatenate([o.slice(step, batch, r, world) for r, o in enumerate(ranks)])
    assert sorted(positions) == list(range(step * batch, (step + 1) * batch))
    ids = np.concatenate([o.ids(o.slice(step, batch, r, world)) for r, o in enumerate(ranks)])
    assert np.array_equal(ids, whole.ids(whole.batch(step, batch)))
    # Each partition gives its share, one after the other.
    assert np.array_equal(positions % partitions, np.repeat(np.arange(partitions), world * each))


@settings(deadline=None)
@given(COUNTS, SEEDS, PARTITIONS, WINDOWS, st.integers(0, 200))
def test_entering_at_a_position_equals_iterating_to_it(
    counts: list[int], seed: int, partitions: int, window: int, position: int
) -> None:
    walked = Order(counts, seed, partitions, window)
    ids = [int(walked.ids(np.array([p]))[0]) for p in range(position + 1)]
    entered = pickle.loads(pickle.dumps(Order(counts, seed, partitions, window)))
    assert int(entered.ids(np.array([position]))[0]) == ids[-1]
    backwards = entered.ids(np.arange(position, -1, -1))
    assert backwards.tolist() == ids[::-1]


@settings(deadline=None)
@given(COUNTS, SEEDS, PARTITIONS, WINDOWS, st.integers(0, 5))
def test_a_partition_reads_its_own_shards(
    counts: list[int], seed: int, partitions: int, window: int, epoch: int
) -> None:
    order = Order(counts, seed, partitions, window)
    n = sum(counts)
    positions = np.arange(epoch * n, (epoch + 1) * n)
    shards = np.searchsorted(order.starts, order.ids(positions), side="right") - 1
    sets = [set(shards[positions % partitions == i]) for i in range(partitions)]
    # Ranges of the line of shards: neighbours can share the shard at the border, and nothing else.
    assert sum(map(len, sets)) <= np.count_nonzero(counts) + partitions - 1


@settings(deadline=None)
@given(COUNTS, SEEDS, PARTITIONS, st.integers(1, 4), st.integers(0, 120))
def test_shards_ahead_are_those_read_next(
    counts: list[int], seed: int, partitions: int, window: int, position: int
) -> None:
    order = Order(counts, seed, partitions, window)
    own = np.arange(position, position + 3 * partitions * max(counts), partitions)
    shards = np.searchsorted(order.starts, order.ids(own), side="right") - 1
    ahead = order.shards_ahead(position, windows=len(own) + 1)
    assert all(0 < len(w) <= window for w in ahead)
    # Read in this order, window after window, none of them left out.
    at = 0
    for i, shard in enumerate(shards):
        while shard not in ahead[at]:
            assert i > 0
            at += 1
    read = set(shards.tolist())
    assert all(set(w) <= read for w in ahead[1:at])


def test_window_bounds_the_shards_that_a_batch_touches() -> None:
    order = Order([100] * 1000, seed=3, window=4)
    for step in (0, 7, 1234):
        ids = order.ids(order.batch(step, 64))
        assert len(np.unique(ids // 100)) <= 8  # two windows at most


def test_partitions_stay_inside_their_windows_of_an_endless_stream() -> None:
    order = Order([7, 1, 12, 5, 9, 3], seed=1, partitions=4, window=1)
    ids = order.ids(order.batch(0, 8)).reshape(4, 2)
    shards = np.searchsorted(order.starts, ids, side="right") - 1
    assert len({*shards.ravel().tolist()}) > 1


def test_seeds_and_epochs_differ() -> None:
    first = Order([50] * 4, 0).ids(np.arange(400))
    assert not np.array_equal(first[:200], first[200:])
    assert not np.array_equal(first, Order([50] * 4, 1).ids(np.arange(400)))


def test_the_order_of_a_run_never_changes() -> None:
    """Written down: a resumed run must go on with the same samples under any numpy."""
    assert Order([4, 3, 5], seed=7, window=1).ids(np.arange(12)).tolist() == GOLDEN
    assert rng.uniform(7, "mask", np.array([5]), 2).tolist() == [GOLDEN_UNIFORM]


GOLDEN = [1, 3, 0, 2, 4, 5, 6, 10, 11, 7, 8, 9]
GOLDEN_UNIFORM = [0.1668795943260193, 0.4405295252799988]


def test_a_huge_stream_is_entered_at_once() -> None:
    counts = np.full(10**6, 10**4)
    position = 5 * 10**11
    begin = time.process_time()  # other tests run beside this one
    order = Order(counts, seed=1)
    ids = order.ids(order.batch(position // 64, 64))
    took = time.process_time() - begin
    assert len(np.unique(ids)) == 64
    assert took < 3.0, f"{took:.2f} s"
    tracemalloc.start()
    Order(np.full(10**6, 10**4), seed=1).ids(np.arange(position, position + 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200e6, f"{peak / 1e6:.0f} MB"


@pytest.mark.parametrize(
    ("counts", "partitions", "window"), [([], 1, 0), ([0, 0], 1, 0), ([3], 0, 0), ([3], 1, -1)]
)
def test_bad_arguments(counts: list[int], partitions: int, window: int) -> None:
    with pytest.raises(UserError):
        Order(counts, 0, partitions, window)


@settings(max_examples=30, deadline=None)
@given(SEEDS, st.lists(st.integers(0, 2**62), min_size=1, max_size=5), st.integers(1, 300))
def test_keyed_numbers_depend_on_the_position_alone(
    seed: int, positions: list[int], n: int
) -> None:
    together = rng.uniform(seed, "mask", np.array(positions), n)
    assert together.dtype == np.float32
    assert together.min() >= 0
    assert together.max() < 1
    for row, position in zip(together, positions, strict=True):
        assert np.array_equal(row, rng.uniform(seed, "mask", np.array([position]), n)[0])
        assert np.array_equal(row[:1], rng.uniform(seed, "mask", np.array([position]), 1)[0])
    other = rng.uniform(seed, "flip", np.array(positions), n)
    assert n < 4 or not np.array_equal(together, other)


def test_keyed_numbers_are_uniform() -> None:
    values = rng.uniform(0, "mask", np.arange(200), 500)
    assert abs(values.mean() - 0.5) < 0.005
    assert abs(values.var() - 1 / 12) < 0.002
    assert len(np.unique(values[:, 0])) > 190
    draws = [rng.generator(0, "x", p).random() for p in range(50)]
    assert len(set(draws)) == 50
    assert sorted(rng.permutation(0, "x", 0, 100)) == list(range(100))
    assert rng.permutation(0, "x", 0, 1).tolist() == [0]
