"""The order in which each class comes equally often."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdistill.data.errors import UserError
from selfdistill.data.index import index
from selfdistill.data.loading.balanced import Balanced, classes_of
from selfdistill.data.loading.loader import Loader
from selfdistill.data.loading.reader import Reader
from selfdistill.data.shards.manifest import Manifest
from tests.kit.shards import uneven

#: Samples of each class: a common one, and one of a single sample perhaps.
CLASSES = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def order(sizes: list[int], seed: int = 0) -> Balanced:
    labels = np.random.default_rng(3).permutation(np.repeat(np.arange(len(sizes)), sizes))
    return Balanced(np.array([len(labels) - 1, 0, 1]), labels, seed)


@settings(deadline=None)
@given(CLASSES, st.integers(0, 2**40), st.integers(0, 300))
def test_classes_and_their_samples_come_equally_often(
    sizes: list[int], seed: int, begin: int
) -> None:
    made, classes = order(sizes, seed), len(sizes)
    # From any whole round on each class comes once in every round.
    positions = np.arange(begin * classes, (begin + 40) * classes)
    ids = made.ids(positions)
    labels = made.labels[ids].reshape(-1, classes)
    assert (np.sort(labels, axis=1) == np.arange(classes)).all()
    # And no sample of a class comes twice before the others came.
    for label, size in enumerate(sizes):
        every = made.ids(np.arange(0, 6 * size * classes))
        mine = every[made.labels[every] == label]
        assert len(mine) == 6 * size
        for i in range(0, len(mine), size):
            assert len(set(mine[i : i + size].tolist())) == size


@settings(deadline=None)
@given(CLASSES, st.integers(0, 200), st.integers(1, 4))
def test_any_position_may_be_entered_by_any_rank(sizes: list[int], step: int, world: int) -> None:
    whole = order(sizes)
    batch = 2 * world
    entered = pickle.loads(pickle.dumps(whole))
    parts = [entered.ids(entered.slice(step, batch, rank, world)) for rank in range(world)]
    assert np.concatenate(parts).tolist() == whole.ids(whole.batch(step, batch)).tolist()
    backwards = whole.ids(np.arange(50, -1, -1))
    assert backwards[::-1].tolist() == [int(whole.ids(np.array([p]))[0]) for p in range(51)]


def test_rounds_differ_and_so_do_seeds() -> None:
    first, other = order([20, 20, 5]), order([20, 20, 5], seed=1)
    labels = first.labels[first.ids(np.arange(300))].reshape(-1, 3)
    assert len({tuple(row) for row in labels.tolist()}) == 6
    assert first.ids(np.arange(60)).tolist() != other.ids(np.arange(60)).tolist()
    mine = first.ids(np.arange(120))[first.labels[first.ids(np.arange(120))] == 0]
    assert mine[:20].tolist() != mine[20:40].tolist()


def test_a_loader_gives_it(tmp_path: Path) -> None:
    file = uneven(tmp_path / "train", [5, 0, 4, 2])
    labels = classes_of(file, None, 1.0)
    records = Reader(file).read(np.arange(file.samples))
    assert labels.tolist() == [record.label for record in records]
    assert Balanced(file.counts, labels, 0).shards_ahead(7) == [[0, 2, 3]] * 2
    expected = Balanced(file.counts, labels, 4).ids(np.arange(18)).reshape(3, 6)
    for workers in (0, 2):
        loader = Loader(file, batch=6, seed=4, balanced=labels, workers=workers, start_step=1)
        for ids, batch in zip(expected[1:], loader, strict=False):
            assert batch["ids"].tolist() == ids.tolist()
            assert sorted(batch["labels"].tolist()) == [0, 0, 1, 1, 2, 2]
        loader.close()


def test_labels_in_the_table_and_broken_ones(tmp_path: Path) -> None:
    file = uneven(tmp_path / "train", [6])
    content = (tmp_path / "train" / file.shards[0].name).read_bytes()
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    index(str(tmp_path / "train"), classes=str(tmp_path / "names.txt"), overwrite=True)
    again = Manifest.load(str(tmp_path / "train"))
    assert classes_of(again, None, 1.0).tolist() == [0, 1, 2, 0, 1, 2]
    at = int(again.members[4, 2])
    (tmp_path / "train" / file.shards[0].name).write_bytes(content[:at] + b"7" + content[at + 1 :])
    with pytest.raises(UserError, match=r"k00004.cls|k00004|sample 4.*its label 7 is outside"):
        classes_of(again, None, 1.0)
