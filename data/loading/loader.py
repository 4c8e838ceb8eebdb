"""Step 6, the loaders that stages use: what rank r sees at step s, on any number of ranks.

`Loader` is the endless training stream, `Sequential` one pass for evaluation. Both run on torch's
DataLoader over arrays of positions: a worker is told which samples to read, so the number of
workers changes nothing, and a rank is told its slice of the global batch, so neither does the
number of ranks.
"""

import functools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Unpack

import numpy as np

from selfdistill.data.errors import UserError, printable
from selfdistill.data.formats import fitting
from selfdistill.data.loading.balanced import Balanced
from selfdistill.data.loading.batches import Batch, Batches, Options
from selfdistill.data.loading.codec import Codec, Images
from selfdistill.data.loading.datasets import Keyed, Rows, Stream
from selfdistill.data.loading.mixture import Mixture
from selfdistill.data.loading.order import Ints, Order
from selfdistill.data.loading.reader import Reader
from selfdistill.data.shards.joined import Joined
from selfdistill.data.shards.manifest import Manifest


@functools.cache  # an evaluation meets the same broken samples every time
def warn_once(line: str) -> None:
    """A report for programs with a terminal: each line once, on stderr."""
    print(printable(f"warning: {line}"), file=sys.stderr, flush=True)


def _opened(manifest: Manifest, options: Options) -> tuple[Reader, Codec]:
    """A split's reader and codec.

    Raises:
        UserError: A sample has no label and needs one; a shard is not as the manifest says.
    """
    if options.get("require_labels") and manifest.labelled != manifest.samples:
        raise UserError(
            f"{manifest.samples - manifest.labelled} of {manifest.samples} samples in"
            f" {manifest.root} have no label: pack them with labels (class folders or a CSV)"
        )
    reader = Reader(
        manifest,
        cache_dir=options.get("cache_dir"),
        cache_gb=options.get("cache_gb"),
        report=options.get("report"),
        verify=options.get("verify", False),
    )
    if not options.get("skip_broken"):
        reader.check_shards()
    codec = options.get("codec")
    if codec is None:
        if manifest.kind != "image":
            raise UserError(f"{manifest.root} holds {manifest.kind}: an image model cannot read it")
        codec = Images(manifest.size, manifest.span, fitting.of(manifest.image))
    return reader, codec


class Loader(Batches):
    """The endless training stream of one rank, as micro-batches.

    Args:
        manifest: The split.
        batch: B, samples of an optimiser step over all ranks.
        rank: 0 ... world - 1.
        world: Number of ranks.
        accumulation: Micro-batches of a step on each rank.
        seed: Of the order.
        partitions: P, see `data.loading.order`; B must be a multiple of it.
        window: Shards shuffled together; 0 is automatic.
        start_step: The first step, for resuming.
        keyed: Makes arrays from positions int64 [b] and the batch, to which they are added.
        options: See `Options`. A skipped sample is replaced by the next of its partition, so
            batches stay full.

    Yields:
        dict: what the codec gives (images uint8 [b, 3, H, W]), labels int64 [b] (-1 for none; of a
        set with several labels a sample bool [b, C]), positions int64 [b], ids int64 [b], and what
        `keyed` gives; b = B / world / accumulation.

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
        seed: int = 0,
        partitions: int = 1,
        window: int = 0,
        start_step: int = 0,
        keyed: Keyed | None = None,
        **options: Unpack[Options],
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
        windows = options.get("windows")
        classes = options.get("balanced")
        if classes is not None:
            self.order: Order = Balanced(manifest.counts, classes, seed)
        elif isinstance(manifest, Joined):
            counts, mix = (windows or manifest).counts, (manifest.sizes, manifest.shares)
            self.order = Mixture(counts, seed, partitions, window, sizes=mix[0], shares=mix[1])
        else:
            self.order = Order((windows or manifest).counts, seed, partitions, window)
        if batch % partitions:
            raise UserError(
                f"batch {batch} does not divide by {partitions} partitions: make it a multiple"
            )
        reader, codec = _opened(manifest, options)
        skip = options.get("skip_broken", 0) > 0
        stream = Stream(reader, codec, skip, windows, self.order, keyed)
        super().__init__(manifest, stream, options)
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
        ids: Ids to visit, int64 [n], divided among the ranks in place of all.
        options: See `Options`. Skipped samples become rows with valid = False.

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
        ids: Ints | None = None,
        **options: Unpack[Options],
    ) -> None:
        if batch < 1:
            raise UserError(f"batch is {batch}: give 1 or more")
        if manifest.samples == 0:
            raise UserError(
                f"{manifest.root} has no samples: pack some first (python -m data.pack)"
            )
        reader, codec = _opened(manifest, options)
        rows = Rows(reader, codec, options.get("skip_broken", 0) > 0, options.get("windows"))
        super().__init__(manifest, rows, options)
        self.batch, self._ids = batch, ids
        if spans is None:
            count = self.count if ids is None else len(ids)
            first, last = (count * (rank + i) // world for i in (0, 1))
            batches = math.ceil(math.ceil(count / world) / batch)
            self._spans = [(first, last, batches)]
        else:
            self._spans = [(a, b, math.ceil((b - a) / batch)) for a, b in spans]
        self._workers = min(self._workers, len(self))  # others would have nothing to read

    def __len__(self) -> int:
        return sum(batches for _, _, batches in self._spans)

    def _arrays(self) -> Iterator[Ints]:
        for first, last, batches in self._spans:
            ids = np.full(batches * self.batch, -1, dtype=np.int64)
            mine = np.arange(first, last) if self._ids is None else self._ids[first:last]
            ids[: last - first] = mine
            yield from ids.reshape(batches, self.batch)

    def __iter__(self) -> Iterator[Batch]:
        return self._run(self._arrays)
