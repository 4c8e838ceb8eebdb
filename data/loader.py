"""Batches: what rank r sees at step s, whatever the number of ranks and workers.

`Loader` is the endless training stream, `Sequential` one pass for evaluation. Both run on torch's
DataLoader over arrays of positions: a worker is told which samples to read, so the number of
workers changes nothing, and a rank is told its slice of the global batch, so neither does the
number of ranks.
"""

import atexit
import functools
import math
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_start_method
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.cache import Report, as_python_warning
from data.codec import Codec, Images
from data.errors import UserError, WorkerLost
from data.manifest import Manifest
from data.order import Ints, Order
from data.reader import Reader
from data.samples import Keyed, Rows, Samples, Stream
from data.transport import Ring, received

Batch = dict[str, torch.Tensor]

_AHEAD = 4  # batches that a worker is asked for ahead


@functools.cache  # an evaluation meets the same broken samples every time
def tell(line: str) -> None:
    """A report for programs with a terminal: each line once, on stderr."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def _ignore_signals(_: int) -> None:
    """A worker leaves SIGTERM, SIGUSR2 and Ctrl-C to the trainer, which saves and then ends it."""
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    """In place of torch's default, which would make tensors of arrays again."""
    return batch


_DEATHS = {
    -signal.SIGKILL: "was killed by the system (SIGKILL), most likely for lack of memory",
    -signal.SIGBUS: "died (SIGBUS), most likely for lack of shared memory (/dev/shm)",
}
_awaited: Any = None  # the iterator for whose batch the main thread waits


def _lost(iterator: Any) -> WorkerLost | None:
    """What to say of the workers of a DataLoader's iterator, if one of them died."""
    for worker in getattr(iterator, "_workers", ()):
        if code := worker.exitcode:  # 0: at its end; None: alive
            how = _DEATHS.get(code, f"died (exit {code})")
            return WorkerLost(
                f"a data loader worker (pid {worker.pid}) {how}: launch again and the stage goes on"
                " from its checkpoint; take fewer --data.workers, or a --data.cache_dir that is not"
                " in memory, if it happens again"
            )
    return None


@functools.cache
def _watch() -> None:
    """Lets the death of a worker end the wait for a batch at once, and nothing else.

    torch's handler of SIGCHLD raises wherever the program stands, in the midst of a step or of a
    checkpoint. Without one torch sees the death within 5 s, or never if the worker was writing.
    """
    torchs = signal.getsignal(signal.SIGCHLD)

    def handle(number: int, frame: Any) -> None:
        with suppress(RuntimeError):
            if callable(torchs):
                torchs(number, frame)
        if lost := _lost(_awaited):
            raise lost

    signal.signal(signal.SIGCHLD, handle)


@contextmanager
def _awaiting(iterator: Any) -> Iterator[None]:
    """Raises WorkerLost when a worker of the iterator is dead, or dies within."""
    global _awaited
    if hasattr(iterator, "_workers") and threading.current_thread() is threading.main_thread():
        _watch()
        _awaited = iterator
    try:
        if lost := _lost(iterator):
            raise lost
        yield
    except Exception as error:
        # torch makes its own errors of a death, and of what is raised within its queue. The
        # connections of a process that dies break a moment before it is dead.
        end = time.monotonic() + (2 if isinstance(error, (EOFError, OSError)) else 0)
        while not (lost := _lost(iterator)) and time.monotonic() < end:
            time.sleep(0.01)
        if lost:
            raise lost from None
        raise
    finally:
        _awaited = None


def _stop(iterator: Any) -> None:
    """Ends the workers of a DataLoader's iterator.

    They are asked first. Where that does not reach them (Python has collected the queue to them
    before the iterator) torch sends SIGTERM, which they ignore, and the program would wait for them
    at its end for ever: so they are killed. When one of them died nothing is asked: it may have
    held a lock that all share, which nobody gives back.
    """
    if not hasattr(iterator, "_shutdown_workers"):
        return
    with suppress(WorkerLost), _awaiting(iterator):
        iterator._shutdown_workers()
    if _lost(iterator):
        iterator._shutdown = True  # or it asks when it is collected
        if iterator._worker_pids_set:  # torch refuses the next iterator that has its id
            torch._C._remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
        for queue in (*iterator._index_queues, iterator._worker_result_queue):
            queue.cancel_join_thread()
        if iterator._pin_memory:
            iterator._pin_memory_thread_done_event.set()
    for worker in iterator._workers:
        if worker.is_alive():
            worker.kill()
            worker.join()


class _Batches:
    """The part that `Loader` and `Sequential` share: workers, errors, what was skipped.

    Attributes:
        manifest: The split.
        samples: What the workers run.
        broken: Samples skipped so far by this rank: id -> what is wrong. What the others skipped
            may be added: it is then counted, and not reported again.
    """

    def __init__(
        self,
        manifest: Manifest,
        samples: Samples,
        workers: int,
        pin: bool,
        skip_broken: float,
        report: Report | None,
    ) -> None:
        if workers < 0:
            raise UserError(f"workers is {workers}: give 0 or more")
        if not 0 <= skip_broken < 1:
            raise UserError(f"skip_broken is {skip_broken}: give the tolerated share, 0 to below 1")
        self.manifest = manifest
        self.broken: dict[int, str] = {}
        self.samples = samples
        self._workers = workers
        self._pin = pin
        self._skip_broken = skip_broken
        self._report = report or as_python_warning
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
            _stop(iterator)

    def _run(self, arrays: Callable[[], Iterator[Ints]]) -> Iterator[Batch]:
        """Yields the batch of each array."""

        class Numbered:
            def __iter__(self) -> Iterator[tuple[int, Ints]]:
                return enumerate(arrays())

        self.samples.ring = self._ring(len(next(arrays(), ())))
        loader = DataLoader(
            self.samples,
            sampler=Numbered(),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self._workers,
            pin_memory=self._pin,
            prefetch_factor=_AHEAD if self._workers else None,
            worker_init_fn=_ignore_signals if self._workers else None,
        )
        iterator = iter(loader)
        self._live.add(iterator)
        try:
            while True:
                with _awaiting(iterator):
                    batch = next(iterator, None)
                if batch is None:
                    return
                if "error" in batch:
                    raise UserError(batch["error"])
                self._count(batch.pop("broken"))
                yield received(batch)
        finally:
            self._live.discard(iterator)
            if os.getpid() == self._pid:
                _stop(iterator)

    def _ring(self, rows: int) -> Ring | None:
        """The memory in which forked workers leave images, where their size is known."""
        codec = self.samples.codec
        side = codec.size if isinstance(codec, Images) else None
        if not (rows and side and self._workers and get_start_method() == "fork"):
            return None
        # One more than are asked for: the next is asked for before the first is taken out.
        return Ring(self._workers * _AHEAD + 1, rows * 3 * side**2)

    def _count(self, broken: dict[int, str]) -> None:
        """Notes skipped samples; too many are an error."""
        for sample in sorted(broken.keys() - self.broken.keys()):
            self.broken[sample] = broken[sample]
            self._report(f"skipped: {broken[sample]}")
            self.tolerate(len(self.broken))

    def tolerate(self, count: int) -> None:
        """Refuses too many broken samples; a rank by itself sees no more than its own.

        Args:
            count: Of distinct samples, on all ranks together.

        Raises:
            UserError: They are more than the tolerated share of the whole split.
        """
        if count > self._skip_broken * self.manifest.samples:
            last = f"; the last: {list(self.broken.values())[-1]}" if self.broken else ""
            raise UserError(
                f"{self.manifest.root}: {count} broken samples are more than the tolerated share"
                f" {self._skip_broken:g} of {self.manifest.samples}: mend the data"
                " (python -m data.verify names what is broken), or tolerate more"
                f" (--data.skip_broken){last}"
            )


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


class Loader(_Batches):
    """The endless training stream of one rank, as micro-batches.

    Args:
        manifest: The split.
        batch: B, samples of an optimiser step over all ranks.
        rank: 0 ... world - 1.
        world: Number of ranks.
        accumulation: Micro-batches of a step on each rank.
        workers: Processes that read and decode; 0 does it in this one.
        seed: Of the order.
        partitions: P, see `data.order`; B must be a multiple of it.
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


class Sequential(_Batches):
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
