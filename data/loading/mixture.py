"""An order over several sets at given shares: the `Order` of data that others are mixed into."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from selfdistill.data import rng
from selfdistill.data.loading.order import Ints, Order

# Positions of a partition whose sets are drawn together.
_BLOCK = 1024
# Shares are counted in millionths, in integers: so the same on every machine, up to 10^12 samples.
_UNIT = 10**6


class Mixture(Order):
    """The endless stream over several sets, each in an order of its own.

    A partition's positions are cut into blocks of 1,024. In each, every set has as many as its
    share, up to one, in an order drawn anew; the rest of a fraction comes in a later block. So the
    share is met within one sample at the end of any block, and which sample of its set a position
    takes is known without those before it.

    Args:
        counts: [S] samples in each shard, of one set after the other.
        seed: Another seed, another order.
        partitions: See `Order`.
        window: See `Order`, of each set.
        sizes: Shards of each set.
        shares: Of each set, which add up to 1.
    """

    def __init__(
        self,
        counts: Sequence[int] | Ints,
        seed: int,
        partitions: int = 1,
        window: int = 0,
        *,
        sizes: Sequence[int],
        shares: Sequence[float],
    ) -> None:
        super().__init__(counts, seed, partitions, window)
        self.sizes, self.shares, self._asked = list(sizes), list(shares), window
        first = [0, *np.cumsum(self.sizes).tolist()]
        self._first = first[:-1]
        self._orders = [
            Order(self.counts[a:b], seed, partitions, window) for a, b in itertools.pairwise(first)
        ]
        edges = np.rint(np.cumsum(self.shares) * _UNIT).astype(np.int64)
        self._edges = np.concatenate([np.zeros(1, np.int64), edges[:-1], np.full(1, _UNIT)])
        self._drawn = functools.lru_cache(maxsize=max(4, 2 * partitions))(self._draw)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled by its arguments: the caches are made anew."""
        make = functools.partial(Mixture, sizes=self.sizes, shares=self.shares)
        return make, (self.counts, self.seed, self.partitions, self._asked)

    def _before(self, block: int) -> Ints:
        """[sets], how many of a partition's positions before a block each set has."""
        return np.diff(block * _BLOCK * self._edges // _UNIT)

    def _draw(self, partition: int, block: int) -> tuple[Ints, Ints]:
        """Of each position in a block its set, and how many of the same come before it there."""
        own = self._before(block + 1) - self._before(block)
        sets = np.repeat(np.arange(len(own)), own)
        sets = sets[rng.permutation(self.seed, f"mixture {partition}", block, _BLOCK)]
        earlier = np.empty(_BLOCK, np.int64)
        for number, count in enumerate(own):
            earlier[sets == number] = np.arange(count)
        return sets, earlier

    def placed(self, positions: Ints) -> tuple[Ints, Ints]:
        """The set of each position, and its position in that set's own stream."""
        positions = np.asarray(positions, dtype=np.int64)
        owners = positions % self.partitions
        blocks, rows = np.divmod(positions // self.partitions, _BLOCK)
        sets, own = np.empty_like(positions), np.empty_like(positions)
        for partition, block in sorted({*zip(owners.tolist(), blocks.tolist(), strict=True)}):
            mine = (owners == partition) & (blocks == block)
            drawn, earlier = self._drawn(partition, block)
            sets[mine] = drawn[rows[mine]]
            own[mine] = self._before(block)[sets[mine]] + earlier[rows[mine]]
        return sets, own * self.partitions + owners

    def ids(self, positions: Ints) -> Ints:
        """See `Order`."""
        sets, own = self.placed(positions)
        out = np.empty_like(own)
        for number, order in enumerate(self._orders):
            mine = sets == number
            out[mine] = self.starts[self._first[number]] + order.ids(own[mine])
        return out

    def shards_ahead(self, position: int, windows: int = 2) -> list[list[int]]:
        """See `Order`: of each set those of its next sample, all of one window together."""
        partition = position % self.partitions
        block, row = divmod(position // self.partitions, _BLOCK)
        drawn = self._drawn(partition, block)[0][:row]
        found: list[list[int]] = [[] for _ in range(windows)]
        for number, order in enumerate(self._orders):
            before = int(self._before(block)[number]) + int((drawn == number).sum())
            ahead = order.shards_ahead(before * self.partitions + partition, windows)
            for window, shards in zip(found, ahead, strict=True):
                window += [self._first[number] + shard for shard in shards]
        return found
