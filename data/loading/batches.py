"""Step 5, a dataset -> batches in worker processes: torch's DataLoader, errors, skipped samples."""

import atexit
import os
import weakref
from collections.abc import Callable, Iterator
from multiprocessing import get_start_method
from typing import Any, TypedDict

import psutil
import torch
from torch.utils.data import DataLoader

from selfdistill.data.errors import TryAgain, UserError
from selfdistill.data.loading.codec import Codec
from selfdistill.data.loading.datasets import Samples
from selfdistill.data.loading.order import Ints
from selfdistill.data.loading.shared_memory import Ring, received
from selfdistill.data.loading.windows import Windows
from selfdistill.data.loading.workers import awaiting, ignore_signals, stop
from selfdistill.data.remote.cache import Report, as_python_warning
from selfdistill.data.shards.manifest import Manifest

Batch = dict[str, torch.Tensor]

_AHEAD = 4  # batches that a worker is asked for ahead
# Bytes, and a share of the memory that is free. The ring's memory stays in use; beyond it batches
# come and go as files in shared memory.
_RING_LIMIT, _RING_SHARE = 2**32, 1 / 16


def _as_it_is(batch: Any) -> Any:
    """In place of torch's default, which would make tensors of arrays again."""
    return batch


class Options(TypedDict, total=False):
    """What both loaders take alike.

    Attributes:
        workers: Processes that read and decode; 0 does it in this one.
        cache_dir: Folder of fetched shards on this node.
        cache_gb: Its limit in GB (1e9 bytes).
        verify: Hash what that folder holds before its first use in a process.
        skip_broken: Tolerated share of broken samples; 0 makes the first one an error.
        report: Told of each skipped sample, and of a cache that is too small, in a line; by default
            a Python warning.
        codec: Decodes the samples; by default `Images` in the size they were packed in.
        windows: The samples, where some are windows of long texts; else each text is one.
        require_labels: Refuse data of which a sample has no label.
        balanced: Class of every sample, int64 [N]: a training stream has one of each class in turn.
        pin: Batches in page-locked memory.
    """

    workers: int
    cache_dir: str | None
    cache_gb: float | None
    verify: bool
    skip_broken: float
    report: Report | None
    codec: Codec | None
    windows: Windows | None
    require_labels: bool
    balanced: Ints | None
    pin: bool


class Batches:
    """The part that `Loader` and `Sequential` share: workers, errors, what was skipped.

    Attributes:
        manifest: The split.
        count: Its samples, windows of long texts each counted.
        samples: What the workers run.
        broken: Samples skipped so far by this rank: id -> what is wrong. What the others skipped
            may be added: it is then counted, and not reported again.
    """

    def __init__(self, manifest: Manifest, samples: Samples, options: Options) -> None:
        workers, skip_broken = options.get("workers", 0), options.get("skip_broken", 0.0)
        if workers < 0:
            raise UserError(f"workers is {workers}: give 0 or more")
        if not 0 <= skip_broken < 1:
            raise UserError(f"skip_broken is {skip_broken}: give the tolerated share, 0 to below 1")
        self.manifest = manifest
        self.count = (options.get("windows") or manifest).samples
        self.broken: dict[int, str] = {}
        self._noted = False
        self.samples = samples
        self._workers = workers
        self._pin = options.get("pin", False)
        self._skip_broken = skip_broken
        self._report = options.get("report") or as_python_warning
        self._pid = os.getpid()
        self._live: weakref.WeakSet[Any] = weakref.WeakSet()
        # Workers ignore SIGTERM, with which Python would end them at exit and then wait for ever.
        close = weakref.WeakMethod(self.close)
        atexit.register(lambda: (method := close()) and method())

    def close(self) -> None:
        """Ends the workers."""
        # A worker forked later holds a copy of this object: it must not stop its siblings.
        if os.getpid() != self._pid:
            return
        for iterator in list(self._live):
            stop(iterator)

    def _run(self, arrays: Callable[[], Iterator[Ints]]) -> Iterator[Batch]:
        """Yields the batch of each array."""

        class Numbered:
            def __iter__(self) -> Iterator[tuple[int, Ints]]:
                return enumerate(arrays())

        # Held here too: another iterator of the same loader has a ring of its own.
        ring = self.samples.ring = self._ring(len(next(arrays(), ())))
        loader = DataLoader(
            self.samples,
            sampler=Numbered(),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self._workers,
            pin_memory=self._pin,
            prefetch_factor=_AHEAD if self._workers else None,
            worker_init_fn=ignore_signals if self._workers else None,
        )
        iterator = iter(loader)
        self._live.add(iterator)
        try:
            while True:
                with awaiting(iterator):
                    batch = next(iterator, None)
                if batch is None:
                    return
                if "error" in batch:
                    raise (TryAgain if batch["passing"] else UserError)(batch["error"])
                self._count(batch.pop("broken"))
                self._note(batch.pop("noted"))
                yield received(batch)
        finally:
            self._live.discard(iterator)
            if os.getpid() == self._pid:
                stop(iterator)
            if self.samples.ring is ring:
                self.samples.ring = None

    def _ring(self, rows: int) -> Ring | None:
        """The memory in which forked workers leave batches, where their size is known."""
        nbytes = self.samples.codec.nbytes(rows) if rows and self._workers else None
        if not nbytes or get_start_method() != "fork":
            return None
        # One more than are asked for: the next is asked for before the first is taken out.
        slots = self._workers * _AHEAD + 1
        limit = min(_RING_LIMIT, int(_RING_SHARE * psutil.virtual_memory().available))
        try:
            return Ring(slots, nbytes) if slots * nbytes <= limit else None
        except OSError:  # the system gives no more; the other way may do with less
            return None

    def _count(self, broken: dict[int, str]) -> None:
        """Notes skipped samples; too many are an error."""
        for sample in sorted(broken.keys() - self.broken.keys()):
            self.broken[sample] = broken[sample]
            self._report(f"skipped: {broken[sample]}")
            self.tolerate(len(self.broken))

    def _note(self, noted: list[str]) -> None:
        """Says once that images are read of which only the pixels can be."""
        if noted and not self._noted:
            self._noted = True
            self._report(
                f"{noted[0]}: its profile, text or EXIF cannot be read; its pixels are whole, and"
                " are taken as they lie (said once; python -m data.verify --decode counts such)"
            )

    def tolerate(self, count: int) -> None:
        """Refuses too many broken samples; a rank by itself sees no more than its own.

        Args:
            count: Of distinct samples, on all ranks together.

        Raises:
            UserError: They are more than the tolerated share of the whole split.
        """
        if count > self._skip_broken * self.count:
            last = f"; the last: {list(self.broken.values())[-1]}" if self.broken else ""
            raise UserError(
                f"{self.manifest.root}: {count} broken samples are more than the tolerated share"
                f" {self._skip_broken:g} of {self.count}: mend the data"
                " (python -m data.verify names what is broken), or tolerate more"
                f" (--data.skip_broken){last}"
            )
