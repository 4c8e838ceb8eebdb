"""An order in which each class comes equally often: `Order` for sets with few samples of some."""

import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfdistill.data import rng
from selfdistill.data.loading.order import Ints, Order
from selfdistill.data.loading.reader import Reader
from selfdistill.data.shards.manifest import Manifest


class Balanced(Order):
    """The endless stream of sample ids, one of each class in every C positions.

    Position p lies in round p // C. A round is a permutation of the C classes. The r-th round takes
    the r-th sample of each class's own stream, which is one permutation of its samples after the
    other. So a position is entered at once, as in `Order`, and no sample of a class comes again
    before all others of that class came.

    Args:
        counts: [S] samples in each shard.
        labels: int64 [N], class of each sample; every class below the greatest has samples.
        seed: Another seed, another order.
    """

    def __init__(self, counts: Ints, labels: Ints, seed: int) -> None:
        super().__init__(counts, seed)
        self.labels = labels
        by_class = np.argsort(labels, kind="stable")
        self._members = np.split(by_class, np.cumsum(np.bincount(labels))[:-1])
        classes = len(self._members)
        self._round = functools.lru_cache(maxsize=256)(self._make_round)
        self._pass = functools.lru_cache(maxsize=2 * classes)(self._make_pass)

    def __reduce__(self) -> tuple[type["Balanced"], tuple[Any, ...]]:
        """Pickled by its arguments: the caches are made anew."""
        return Balanced, (self.counts, self.labels, self.seed)

    def _make_round(self, number: int) -> Ints:
        return rng.permutation(self.seed, "classes", number, len(self._members))

    def _make_pass(self, label: int, number: int) -> Ints:
        mine = self._members[label]
        return mine[rng.permutation(self.seed, f"class {label}", number, len(mine))]

    def ids(self, positions: Ints) -> Ints:
        """See `Order`."""
        positions = np.asarray(positions, dtype=np.int64)
        out = np.empty_like(positions)
        for row, (number, place) in enumerate(
            zip(*np.divmod(positions, len(self._members)), strict=True)
        ):
            label = int(self._round(int(number))[place])
            again, at = divmod(int(number), len(self._members[label]))
            out[row] = self._pass(label, again)[at]
        return out

    def shards_ahead(self, position: int, windows: int = 2) -> list[list[int]]:
        """See `Order`: any shard may come next."""
        return [[int(shard) for shard in np.flatnonzero(self.counts)]] * windows


def classes_of(manifest: Manifest, cache_dir: str | None, cache_gb: float) -> NDArray[np.int64]:
    """The class of every sample, int64 [N], read from the shards: some microseconds each.

    Args:
        manifest: The split; every sample has one label.
        cache_dir: See `Reader`.
        cache_gb: See `Reader`.

    Raises:
        BrokenData: Names shard, sample and cure.
    """
    reader = Reader(manifest, cache_dir, cache_gb)
    try:
        return np.array([reader.label(i) for i in range(manifest.samples)], dtype=np.int64)
    finally:
        reader.close()
