"""Several sets at given shares: a pure function of the position, and each set in its own order."""

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from selfdistill.data.errors import UserError
from selfdistill.data.loading.loader import Loader
from selfdistill.data.loading.mixture import Mixture
from selfdistill.data.loading.order import Order
from selfdistill.data.loading.reader import Reader
from selfdistill.data.pack import pack
from selfdistill.data.shards.joined import Joined, parse
from selfdistill.data.shards.manifest import Manifest
from tests.kit.shards import class_folders, number_of, uneven

SHARES = st.lists(st.floats(0.01, 1), min_size=2, max_size=4)


def mixture(shares: list[float], seed: int = 0, partitions: int = 1) -> Mixture:
    """Sets of 1 + 3, 2, 3, ... shards, normalised shares."""
    sizes = [2, *range(1, len(shares))]
    counts = np.random.default_rng(1).integers(1, 9, sum(sizes))
    total = sum(shares)
    return Mixture(
        counts, seed, partitions, sizes=sizes, shares=[share / total for share in shares]
    )


@settings(deadline=None, max_examples=30)
@given(SHARES, st.integers(0, 2**40), st.sampled_from([1, 2, 3]))
def test_it_is_the_plain_loop(shares: list[float], seed: int, partitions: int) -> None:
    """Position by position: the set drawn, and the next of that set's own stream."""
    made = mixture(shares, seed, partitions)
    positions = np.arange(3000 * partitions)
    sets, ids = made.placed(positions)[0], made.ids(positions)
    firsts = [0, *np.cumsum(made.sizes).tolist()]
    orders = [Order(made.counts[a:b], seed, partitions) for a, b in itertools.pairwise(firsts)]
    taken: dict[tuple[int, int], int] = {}
    for position in positions.tolist():
        number, owner = int(sets[position]), position % partitions
        count = taken.get((number, owner), 0)
        taken[number, owner] = count + 1
        own = int(orders[number].ids(np.array([count * partitions + owner]))[0])
        assert ids[position] == made.starts[firsts[number]] + own
    # Entered anywhere, in any order, by another process, it is the same.
    some = np.random.default_rng(seed % 2**32).permutation(positions)[:50]
    assert pickle.loads(pickle.dumps(made)).ids(some).tolist() == ids[some].tolist()


@pytest.mark.parametrize("shares", [[0.7, 0.3], [0.9, 0.0999, 0.0001], [1 / 3, 1 / 3, 1 / 3]])
def test_shares_are_met(shares: list[float]) -> None:
    draws = 10**6
    sets, _ = mixture(shares).placed(np.arange(draws))
    for number, share in enumerate(shares):
        found = int((sets == number).sum())
        low, high = binom.interval(0.95, draws, share)
        assert low <= found <= high
        assert abs(found - share * draws) < 1024  # and far closer
    # Far into the stream as well, where numbers are large.
    sets, _ = mixture(shares).placed(np.arange(10**12, 10**12 + 10**5))
    assert abs(int((sets == 0).sum()) - shares[0] * 10**5) < 2048


def test_the_sets_are_not_taken_in_turn() -> None:
    """Neighbours are drawn: the number of changes is that of a random order."""
    sets, _ = mixture([0.5, 0.5]).placed(np.arange(10**5))
    changes = int((np.diff(sets) != 0).sum())
    assert abs(changes - 50_000) < 700  # four and a half standard deviations
    assert (mixture([0.5, 0.5], seed=1).placed(np.arange(100))[0] != sets[:100]).any()


def test_what_is_fetched_ahead_is_read_next() -> None:
    made = mixture([0.5, 0.3, 0.2], partitions=2)
    edges = made.starts
    for position in (0, 1, 777, 50_001):
        now, following = made.shards_ahead(position)
        near = made.ids(position + 2 * np.arange(6))
        shards = np.searchsorted(edges, near, side="right") - 1
        assert {*shards.tolist()} <= {*now, *following}


@pytest.fixture
def sets(tmp_path: Path) -> list[Manifest]:
    return [uneven(tmp_path / "target", [5, 7]), uneven(tmp_path / "general", [4, 3, 6])]


def numbers(manifest: Manifest, world: int, steps: range, workers: int = 0) -> list[list[int]]:
    """Id of each sample, step by step, and what its picture says."""
    found = []
    ranks = [
        Loader(manifest, batch=12, rank=rank, world=world, start_step=steps.start, workers=workers)
        for rank in range(world)
    ]
    streams = [iter(one) for one in ranks]
    for _ in steps:
        batches = [next(stream) for stream in streams]
        ids = torch.cat([batch["ids"] for batch in batches]).tolist()
        pictures = torch.cat([batch["images"] for batch in batches])
        starts = 12
        for one, picture in zip(ids, pictures, strict=True):
            assert number_of(picture.numpy()) == one - (starts if one >= starts else 0)
        assert all((batch["labels"] == -1).all() for batch in batches)
        found.append(ids)
    for one in ranks:
        one.close()
    return found


def test_ranks_and_resume_change_nothing(sets: list[Manifest]) -> None:
    joined = Joined(sets, [0.3])
    whole = numbers(joined, 1, range(0, 30))
    share = np.mean(np.array(whole) >= 12)
    assert share == pytest.approx(0.3, abs=0.05)
    for world in (2, 3):
        assert numbers(joined, world, range(0, 30), workers=1) == whole
        assert numbers(joined, world, range(17, 30)) == whole[17:]


def test_the_joined_split(sets: list[Manifest], tmp_path: Path) -> None:
    joined = Joined(sets, [0.25])
    assert (joined.samples, joined.labelled, joined.classes) == (25, 0, [])
    assert joined.epoch(joined.counts) == 16  # 12 of the target are three quarters
    assert joined.hash != Joined(sets, [0.26]).hash != Joined(sets[::-1], [0.26]).hash
    table = joined.members
    assert len(table) == 25
    rows = np.concatenate([one.members for one in sets])
    assert table[3:20, 1].tolist() == rows[3:20, 1].tolist()
    assert [table[i].tolist() for i in (0, 11, 12, 24)] == [
        [*rows[i, :2].tolist(), -1, -1] for i in (0, 11, 12, 24)
    ]
    again: Joined = pickle.loads(pickle.dumps(joined))
    records = Reader(again).read(np.array([0, 12, 24]))
    assert ["target" in records[0].name, "general" in records[1].name] == [True, True]
    with pytest.raises(UserError, match=r"general is given twice"):
        Joined([*sets, sets[1]], [0.1, 0.1])
    with pytest.raises(UserError, match=r"holds images of 8x8, .*target images of 4x4: pack both"):
        Joined([sets[0], uneven(tmp_path / "big", [3], size=8)], [0.1])


def test_kept_originals_are_fitted_alike(tmp_path: Path) -> None:
    """All are fitted as they are read, in the target's way."""
    class_folders(tmp_path / "in", {"ant": 3, "bee": 3})
    found = []
    for fit in ("crop", "pad", "pad"):
        out = tmp_path / f"{len(found)}"
        pack(str(tmp_path / "in"), str(out), keep_original=True, fit=fit, splits="1", name=out.name)
        found.append(Manifest.load_split(str(out), "train"))
    with pytest.raises(UserError, match=r"own sizes, fit crop, .*own sizes, fit pad: pack both"):
        Joined([found[1], found[0]], [0.1])
    assert Joined(found[1:], [0.1]).samples == 12


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("general", "give each set its share"),
        ("general:0", "between 0 and 1"),
        ("general:-0.1", "between 0 and 1"),
        ("general:nan", "between 0 and 1"),
        ("a:0.5,b:0.5", "add up to 1, which leaves nothing for the target"),
        (":0.5", "give each set its share"),
    ],
)
def test_mistakes(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse(text)
    assert parse("s3://x/y:0.25,b:1e-3") == [("s3://x/y", 0.25), ("b", 0.001)]
