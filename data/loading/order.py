"""Step 1, position -> number of a sample: the order, a pure function of the seed.

The stream is endless. Position p lies in epoch e = p // N and belongs to partition p % P. In epoch
e

1. the shards are permuted, which strings all N samples on one line;
2. the line is cut into P contiguous ranges, one a partition, as long as the partition has positions
in
   this epoch (so they differ by at most one);
3. inside a range the samples are permuted within windows of `window` shards;
4. the k-th position of partition i gets the k-th sample of range i.

Each epoch is therefore a permutation of all samples, a partition reads only its own run of shards,
and any position can be entered at once: nothing of length N is ever built, only arrays as long as
the list of shards and as one window.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfdistill.data import rng
from selfdistill.data.errors import UserError

Ints = NDArray[np.int64]

# Up to so many samples the window is the whole range: a full shuffle for 8 MB of memory.
FULL_SHUFFLE = 2**20
# Above it, as many shards as hold about so many samples.
WINDOW_SAMPLES = 2**17


class Order:
    """The endless stream of sample ids over shards of given sizes.

    Args:
        counts: [S] samples in each shard; ids number the samples of all shards in this order.
        seed: Another seed, another order.
        partitions: P. Partition i owns the positions p with p % P == i and, in each epoch, its own
            run of shards.
        window: Shards that are shuffled together; 0 takes the whole range when there are at most
            2**20 samples, else as many shards as hold about 2**17.

    Raises:
        UserError: No samples, or a partition number or window out of range.
    """

    def __init__(
        self, counts: Sequence[int] | Ints, seed: int, partitions: int = 1, window: int = 0
    ) -> None:
        self.counts: Ints = np.asarray(counts, dtype=np.int64)
        self.seed = seed
        self.partitions = partitions
        self.starts: Ints = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.counts)])
        self.samples = int(self.starts[-1])
        shards = len(self.counts)
        if self.samples == 0:
            raise UserError("the data set has no samples: pack some first (python -m data.pack)")
        if partitions < 1:
            raise UserError(f"partitions is {partitions}: give 1 or more")
        if window < 0:
            raise UserError(f"the shuffle window is {window} shards: give 0 (automatic) or more")
        if window == 0:
            small = self.samples <= FULL_SHUFFLE
            window = shards if small else max(1, round(WINDOW_SAMPLES * shards / self.samples))
        self.window = window
        # Instance-bound caches: a batch touches one epoch, or two at its end, and a few windows.
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)
        self._window = functools.lru_cache(maxsize=max(4, 2 * partitions))(self._make_window)

    def __reduce__(self) -> tuple[type["Order"], tuple[Any, ...]]:
        """Pickled by its arguments: the caches are made anew."""
        return Order, (self.counts, self.seed, self.partitions, self.window)

    def _make_epoch(self, epoch: int) -> tuple[Ints, Ints]:
        """The epoch's shards in order [S], and where each starts on the line [S + 1]."""
        shards = rng.permutation(self.seed, "shards", epoch, len(self.counts))
        line = np.zeros(len(shards) + 1, np.int64)
        np.cumsum(self.counts[shards], out=line[1:])
        return shards, line

    def _make_window(self, epoch: int, partition: int, window: int, size: int) -> Ints:
        return rng.permutation(self.seed, f"window {partition} {window}", epoch, size)

    def _range(self, epoch: int, partition: int) -> tuple[int, int, int]:
        """First position, and start and end on the line, of a partition in an epoch."""
        n, p = self.samples, self.partitions
        begin = epoch * n
        # Partition i's positions in the epoch: first, first + P, ... below begin + n.
        offset = (partition - begin) % p
        size = max(0, -((offset - n) // p))
        # Partitions before this one: each has n // P positions, those met early in the epoch one
        # more.
        longer = sum(1 for i in range(partition) if (i - begin) % p < n % p)
        start = partition * (n // p) + longer
        return begin + offset, start, start + size

    def _bounds(self, line: Ints, start: int, end: int, window: int) -> tuple[int, int]:
        """Where a window of the range [start, end) begins and ends on the line."""
        first = int(np.searchsorted(line, start, side="right")) - 1
        low = min(first + window * self.window, len(line) - 1)
        high = min(low + self.window, len(line) - 1)
        return max(start, int(line[low])), min(end, int(line[high]))

    def ids(self, positions: Ints) -> Ints:
        """The samples at given positions.

        Args:
            positions: int64 [b], any positions of the stream, in any order.

        Returns:
            int64 [b], sample ids in 0..N-1.
        """
        positions = np.asarray(positions, dtype=np.int64)
        out = np.empty_like(positions)
        epochs, owners = positions // self.samples, positions % self.partitions
        for epoch in np.unique(epochs):
            shards, line = self._epoch(int(epoch))
            for partition in np.unique(owners[epochs == epoch]):
                mine = np.flatnonzero((epochs == epoch) & (owners == partition))
                first, start, end = self._range(int(epoch), int(partition))
                # Their places on the line, before shuffling within windows.
                places = start + (positions[mine] - first) // self.partitions
                head = int(np.searchsorted(line, start, side="right")) - 1
                windows = (np.searchsorted(line, places, side="right") - 1 - head) // self.window
                for window in np.unique(windows):
                    inside = windows == window
                    low, high = self._bounds(line, start, end, int(window))
                    shuffle = self._window(int(epoch), int(partition), int(window), high - low)
                    places[inside] = low + shuffle[places[inside] - low]
                shard = np.searchsorted(line, places, side="right") - 1
                out[mine] = self.starts[shards[shard]] + places - line[shard]
        return out

    def shards_ahead(self, position: int, windows: int = 2) -> list[list[int]]:
        """The shards that a position's partition reads now and next.

        Args:
            position: A position of the stream; its partition is position % P.
            windows: How many windows to name, the current one first.

        Returns:
            For each window the shard numbers, in the order of the epoch; the list goes on into the
            next epoch where this one ends.
        """
        found: list[list[int]] = []
        partition = position % self.partitions
        epoch = position // self.samples
        while len(found) < windows:
            shards, line = self._epoch(epoch)
            first, start, end = self._range(epoch, partition)
            if end > start:
                head = int(np.searchsorted(line, start, side="right")) - 1
                place = start + max(0, position - first) // self.partitions
                shard = int(np.searchsorted(line, place, side="right")) - 1
                window = (shard - head) // self.window
                while len(found) < windows:
                    low, high = self._bounds(line, start, end, window)
                    if low >= end:
                        break
                    window += 1
                    if high <= low:  # shards without samples
                        continue
                    a = int(np.searchsorted(line, low, side="right")) - 1
                    b = int(np.searchsorted(line, high, side="left"))
                    found.append([int(s) for s in shards[a:b] if self.counts[s]])
            epoch += 1
        return found

    def batch(self, step: int, batch: int) -> Ints:
        """The positions of one global batch.

        Args:
            step: Number of the optimiser step, from 0.
            batch: B, samples of a step over all ranks.

        Returns:
            int64 [B], positions step * B ... step * B + B - 1, all of partition 0 first, then of 1,
            ...
        """
        positions = np.arange(step * batch, (step + 1) * batch, dtype=np.int64)
        return positions[np.argsort(positions % self.partitions, kind="stable")]

    def slice(self, step: int, batch: int, rank: int, world: int) -> Ints:
        """One rank's equal share of a global batch.

        Args:
            step: Number of the optimiser step, from 0.
            batch: B, a multiple of `world`.
            rank: 0 ... world - 1.
            world: Number of ranks.

        Returns:
            int64 [B / world], the rank's contiguous part of `batch(step, batch)`.
        """
        share = batch // world
        return self.batch(step, batch)[rank * share : (rank + 1) * share]
