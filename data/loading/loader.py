"""Batches: what rank r sees at step s, whatever the number of ranks and workers.

`Loader` is the endless training stream, `Sequential` one pass for evaluation. Both run on torch's
DataLoader over arrays of positions: a worker is told which samples to read, so the number of
workers changes nothing, and a rank is told its slice of the global batch, so neither does the
number of ranks.
"""

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from selfdistill.data.errors import UserError
from selfdistill.data.loading.batches import Batch, Batches
from selfdistill.data.loading.codec import Codec, Images
from selfdistill.data.loading.order import Ints, Order
from selfdistill.data.loading.reader import Reader
from selfdistill.data.loading.samples import Keyed, Rows, Stream
from selfdistill.data.remote.cache import Report
from selfdistill.data.shards.manifest import Manifest


@functools.cache  # an evaluation meets the same broken samples every time
def tell(line: str) -> None:
    """A report for programs with a terminal: each line once, on stderr."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def _check_labels(manifest: Manifest, require_labels: bool) -> None:
    if require_labels and manifest.labelled != manifest.samples:
        raise UserError(
            f"{manifest.samples - manifest.labelled} of {manifest.samples} samples in"
            f" {manifest.root} have no label: pack them with labels (class folders or a CSV)"
        )


def _codec(manifest: Manifest) -> Codec:
    if manifest.kind != "image":
        raise UserError(f"{manifest.root} holds {manifest.kind}: an image model cannot read it")
    return Images(manifest.image.get("size"))


class Loader(Batches):
    """The endless training stream of one rank, as micro-batches.

    Args:
        manifest: The split.
        batch: B, samples of an optimiser step over all ranks.
        rank: 0 ... world - 1.
        world: Number of ranks.
        accumulation: Micro-batches of a step on each rank.
        workers: Processes that read and decode; 0 does it in this one.
        seed: Of the order.
        partitions: P, see `data.loading.order`; B must be a multiple of it.
        window: Shards shuffled together; 0 is automatic.
        start_step: The first step, for resuming.
        keyed: Makes arrays from positions int64 [b] and the batch, to which they are added.
        cache_dir: Folder of fetched shards on this node.
        cache_gb: Its limit in GB (1e9 bytes).
        skip_broken: Tolerated share of broken samples; 0 makes the first one an error. A skipped
            sample is replaced by the next of its partition, so batches stay full.
        report: Told of each skipped sample, and of a cache that is too small, in a line; by default
            a Python warning.
        codec: Decodes the samples; by default `Images` in the size they were packed in.
        require_labels: Refuse data of which a sample has no label.
        pin: Batches in page-locked memory.

    Yields:
        dict: what the codec gives (images uint8 [b, 3, H, W]), labels int64 [b] (-1 for none),
        positions int64 [b], ids int64 [b], and what `keyed` gives; b = B / world / accumulation.

    Raises:
        UserError: Sizes that do not divide; broken data.
        WorkerLost: A worker was killed.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        batch: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        workers: int = 0,
        seed: int = 0,
        partitions: int = 1,
        window: int = 0,
        start_step: int = 0,
        keyed: Keyed | None = None,
        cache_dir: str | None = None,
        cache_gb: float | None = None,
        skip_broken: float = 0.0,
        report: Report | None = None,
        codec: Codec | None = None,
        require_labels: bool = False,
        pin: bool = False,
    ) -> None:
        if batch < 1 or accumulation < 1:
            raise UserError(f"batch is {batch}, accumulation {accumulation}: give 1 or more")
        unit = world * accumulation
        if batch % unit:
            below = batch // unit * unit
            near = f"{below} or {below + unit}" if below else str(unit)
            raise UserError(
                f"batch {batch} does not divide by {world} ranks x {accumulation} micro-batches:"
                f" give {near}"
            )
        self.order = Order(manifest.counts, seed, partitions, window)
        if batch % partitions:
            raise UserError(
                f"batch {batch} does not divide by {partitions} partitions: make it a multiple"
            )
        _check_labels(manifest, require_labels)
        reader = Reader(manifest, cache_dir=cache_dir, cache_gb=cache_gb, report=report)
        if not skip_broken:
            reader.check_shards()
        stream = Stream(reader, codec or _codec(manifest), skip_broken > 0, self.order, keyed)
        super().__init__(manifest, stream, workers, pin, skip_broken, report)
        self.batch, self.rank, self.world = batch, rank, world
        self.accumulation, self.start_step = accumulation, start_step

    def _arrays(self) -> Iterator[Ints]:
        step = self.start_step
        while True:
            mine = self.order.slice(step, self.batch, self.rank, self.world)
            yield from np.split(mine, self.accumulation)
            step += 1

    def __iter__(self) -> Iterator[Batch]:
        return self._run(self._arrays)


class Sequential(Batches):
    """One pass over a split, its samples divided among the ranks without overlap.

    Rank r owns ids N r // W ... N (r+1) // W - 1. All ranks give the same number of batches of the
    same size, because under ZeRO-3 every forward is collective; padding rows have valid = False.

    Args:
        manifest: The split.
        batch: Samples of a batch of this rank.
        rank: 0 ... world - 1.
        world: Number of ranks.
        spans: Ids [first, last) to visit instead of the rank's part; each is padded by itself to
            whole batches.
        workers: Processes that read and decode; 0 does it in this one.
        cache_dir: Folder of fetched shards on this node.
        cache_gb: Its limit in GB (1e9 bytes).
        skip_broken: Tolerated share of broken samples, which become rows with valid = False.
        report: See `Loader`.
        codec: Decodes the samples; by default `Images` in the size they were packed in.
        require_labels: Refuse data of which a sample has no label.
        pin: Batches in page-locked memory.

    Yields:
        dict: as `Loader`, without keyed numbers; also valid bool [batch]. Padding has id -1, label
            -1.

    Raises:
        UserError: Broken data; no samples.
        WorkerLost: A worker was killed.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        batch: int,
        rank: int = 0,
        world: int = 1,
        spans: Sequence[tuple[int, int]] | None = None,
        workers: int = 0,
        cache_dir: str | None = None,
        cache_gb: float | None = None,
        skip_broken: float = 0.0,
        report: Report | None = None,
        codec: Codec | None = None,
        require_labels: bool = False,
        pin: bool = False,
    ) -> None:
        if batch < 1:
            raise UserError(f"batch is {batch}: give 1 or more")
        if manifest.samples == 0:
            raise UserError(
                f"{manifest.root} has no samples: pack some first (python -m data.pack)"
            )
        _check_labels(manifest, require_labels)
        reader = Reader(manifest, cache_dir=cache_dir, cache_gb=cache_gb, report=report)
        if not skip_broken:
            reader.check_shards()
        rows = Rows(reader, codec or _codec(manifest), skip_broken > 0)
        super().__init__(manifest, rows, workers, pin, skip_broken, report)
        self.batch = batch
        if spans is None:
            first, last = (manifest.samples * (rank + i) // world for i in (0, 1))
            batches = math.ceil(math.ceil(manifest.samples / world) / batch)
            self._spans = [(first, last, batches)]
        else:
            self._spans = [(a, b, math.ceil((b - a) / batch)) for a, b in spans]

    def __len__(self) -> int:
        return sum(batches for _, _, batches in self._spans)

    def _arrays(self) -> Iterator[Ints]:
        for first, last, batches in self._spans:
            ids = np.full(batches * self.batch, -1, dtype=np.int64)
            ids[: last - first] = np.arange(first, last)
            yield from ids.reshape(batches, self.batch)

    def __iter__(self) -> Iterator[Batch]:
        return self._run(self._arrays)


def sequential(manifest: Manifest, **options: Any) -> Sequential:
    """One pass over a split; see `Sequential`."""
    return Sequential(manifest, **options)
