"""Inputs through a model, in parts: the loop of `launcher.predict` and `launcher.embed`."""

from __future__ import annotations

import functools
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfdistill.data.cli import machine_error
from selfdistill.data.errors import TryAgain, UserError
from selfdistill.data.formats import images
from selfdistill.data.inputs.base import Inputs
from selfdistill.engine.inference.batches import ERRORS, NAMES, ListedBatches, workers_of
from selfdistill.engine.inference.model import Loaded
from selfdistill.engine.inference.parts import BLOCK, Parts, Row
from selfdistill.engine.runtime import devices, rendezvous
from selfdistill.engine.runtime.allocator import keep_memory
from selfdistill.engine.runtime.distributed import Ranks, cores, initialize, main_only

#: Inputs that a processor, or a GPU, takes together. Blocks are multiples of both.
ON_CPU, ON_GPU = 64, 256
#: Seconds between lines of progress where no terminal shows a bar.
_BETWEEN = 30.0
#: Seconds between two signs of life of a rank, and after which one without them is gone.
_BEAT, _GONE = 5.0, 120.0
#: Numbers of a launch's calls, the same on all ranks.
_CALLS = itertools.count()

#: From a batch and the number of its readable inputs: their rows, and their vectors if any.
Compute = Callable[[dict[str, Any], int], tuple[list[Row], NDArray[Any] | None]]


def limits(max_pixels: int) -> str:
    """What another limit than the usual adds to the settings of parts: it decides about errors."""
    return "" if max_pixels == images.MOST_PIXELS else f", pictures up to {max_pixels} pixels"


@dataclass(frozen=True)
class Done:
    """What came out.

    Attributes:
        samples: inputs.
        unreadable: how many of them could not be read.
        first: the first of those, and why.
        rate: inputs a second, of this launch.
    """

    samples: int
    unreadable: int
    first: str
    rate: float

    def line(self, out: Path) -> str:
        """For the terminal."""
        rate = f", {self.rate:,.0f} a second" if self.rate else ""
        broken = f", {self.unreadable} unreadable, such as {self.first}" if self.unreadable else ""
        return f"{out}: {self.samples} inputs{rate}{broken}"


def quiet() -> None:
    """Keeps the terminal for what comes out; to be called before transformers is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@functools.cache
def join() -> Ranks:
    """This process among its ranks; one by itself needs no process group.

    Raises:
        UserError: the environment is incomplete, or the ranks do not find each other.
    """
    quiet()
    env = rendezvous.resolve()
    several = int(env["WORLD_SIZE"]) > 1
    ranks = initialize() if several else Ranks(0, 0, 1, devices.take(env))
    if ranks.device.type == "cpu":
        keep_memory()
    return ranks


def together(ranks: Ranks, action: Callable[[], Any]) -> Any:
    """`action()` of rank 0, and its result on all; its UserError is told once.

    Raises:
        UserError: on rank 0; on the others SystemExit, with the same code.
    """
    if ranks.world == 1:
        try:
            return action()
        except OSError as error:
            raise machine_error(error) or error from None
    try:
        return main_only(ranks, action)
    except UserError:
        if ranks.main:
            raise
        sys.exit(2)


def through(
    model: Loaded,
    inputs: Inputs,
    parts: Parts,
    compute: Compute,
    *,
    ranks: Ranks,
    batch: int,
    workers: int | None = None,
) -> float:
    """Does this rank's share of the blocks that are not done yet. Every rank calls it.

    Args:
        model: which.
        inputs: all of them.
        parts: where blocks are left.
        compute: see `Compute`.
        ranks: this process among its ranks.
        batch: inputs of a batch, which never crosses a block.
        workers: processes that read and decode; None: as many as the machine bears.

    Returns:
        Inputs a second of all ranks, as far as this one sees.
    """
    # One rank says which: where the others saw parts that are gone, it would wait for these.
    todo = together(ranks, parts.left)[ranks.rank :: ranks.world]
    order = [(block, places) for block in todo for places in parts.places(block, batch)]
    if workers is None:
        workers = workers_of(model, cores())
    places_of = [places for _, places in order]
    loader = ListedBatches(inputs, model, places_of, workers) if order else ()
    rows: list[Row] = []
    vectors: list[NDArray[Any]] = []
    began, before = time.monotonic(), parts.done()
    with _Shown(parts, enabled=ranks.main) as shown, _kept(parts, ranks), Roll.of(ranks) as roll:
        for number, found in enumerate(loader):
            block, places = order[number]
            names, errors = found.pop(NAMES), found.pop(ERRORS)
            good = errors.count("")
            made, arrays = compute(found, good) if good else ([], None)
            following = iter(made)
            rows += [
                {"name": _plain(name), "error": error} if error else _named(name, next(following))
                for name, error in zip(names, errors, strict=True)
            ]
            vectors += [] if arrays is None else [arrays]
            if number + 1 == len(order) or order[number + 1][0] != block:
                parts.write(block, rows, np.concatenate(vectors) if vectors else None)
                rows, vectors = [], []
            shown.advance(len(places), block_done=not rows)
        if ranks.main:
            parts.wait(roll.look)
    seconds = time.monotonic() - began
    return min((parts.done() - before) * BLOCK, parts.samples) / seconds if todo else 0.0


class Roll:
    """Which ranks are at work: each says so again and again, in the store of the launch.

    deepspeed and torchrun end the others of a rank that fails. srun does so under
    --kill-on-bad-exit=1 alone, and the first rank would wait without end for its blocks.

    Args:
        store: torch's, of all ranks; None: this one is alone.
        rank: this one.
        world: their number.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self.over = threading.Event()
        self.seen: dict[int, tuple[int, float]] = {}
        self.next = 0.0

    @classmethod
    def of(cls, ranks: Ranks) -> Roll:
        """That of this launch, and of this call in it."""
        if ranks.world == 1:
            return cls(None, 0, 1)
        from torch._C._distributed_c10d import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        store = PrefixStore(f"roll-{next(_CALLS)}", _get_default_store())
        return cls(store, ranks.rank, ranks.world)

    def __enter__(self) -> Roll:
        if self.world > 1:
            threading.Thread(target=self._tell, name="roll", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.over.set()
        if self.world > 1:
            with suppress(RuntimeError):  # the first rank, which keeps the store, is gone
                self.store.add(f"{'ended' if kind is None else 'failed'}/{self.rank}", 1)
                until = time.monotonic() + _BEAT
                while self.rank == 0 and kind is None and time.monotonic() < until:
                    # The store goes with this rank: the others say before that they have ended.
                    if all(self.store.add(f"ended/{rank}", 0) for rank in range(1, self.world)):
                        break
                    time.sleep(0.02)

    def _tell(self) -> None:
        with suppress(RuntimeError):  # as above
            while not self.over.wait(_BEAT):
                self.store.add(f"beat/{self.rank}", 1)

    def look(self) -> None:
        """Of the first rank: whether all others are at work, or have ended theirs.

        Raises:
            TryAgain: one has failed, or nothing was heard of it for too long.
        """
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + _BEAT
        for rank in range(1, self.world):
            if self.store.add(f"ended/{rank}", 0):
                continue
            beat = self.store.add(f"beat/{rank}", 0)
            before, since = self.seen.get(rank, (-1, now))
            self.seen[rank] = (beat, now if beat != before else since)
            failed = self.store.add(f"failed/{rank}", 0)
            if failed or now - self.seen[rank][1] > _GONE:
                why = "has failed" if failed else f"was not heard of for {_GONE:.0f} s"
                raise TryAgain(
                    f"rank {rank} of {self.world} {why}: launch again, which goes on with the parts"
                    " that are left"
                )


@contextmanager
def _kept(parts: Parts, ranks: Ranks) -> Iterator[None]:
    """Says after Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        if ranks.main:
            line = f"{parts.done()} of {parts.blocks} parts are kept: launch again to go on"
            print(line, file=sys.stderr, flush=True)
        raise


def summary(parts: Parts, rate: float) -> Done:
    """Counts the inputs that could not be read."""
    broken = [row for rows in parts.rows() for row in rows if row["error"]]
    first = f"{broken[0]['name']} ({broken[0]['error']})" if broken else ""
    return Done(parts.samples, len(broken), first, rate)


def _plain(name: str) -> str:
    """A name that UTF-8 can hold."""
    return name.encode("utf-8", "backslashreplace").decode()


def _named(name: str, row: Row) -> Row:
    return {"name": _plain(name), "error": "", **row}


class _Shown:
    """Progress, rate and time left: a bar on a terminal, lines in a log."""

    def __init__(self, parts: Parts, *, enabled: bool) -> None:
        console = Console(stderr=True)
        self.bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (enabled and console.is_terminal),
        )
        self.lines = enabled and not console.is_terminal
        self.between = _BETWEEN if self.lines else 0.5
        self.parts, self.own, self.last = parts, 0, time.monotonic()
        self.began, self.start = self.last, self._others()
        self.task = self.bar.add_task("", total=parts.samples, completed=self.start, rate="")

    def _others(self) -> int:
        """Inputs of blocks that are done."""
        return min(self.parts.done() * BLOCK, self.parts.samples)

    def __enter__(self) -> _Shown:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, count: int, *, block_done: bool) -> None:
        """So many inputs more; `block_done`: they lie in the parts now."""
        self.own = 0 if block_done else self.own + count
        now = time.monotonic()
        if (not self.lines and self.bar.disable) or now - self.last < self.between:
            return
        self.last = now
        done = min(self._others() + self.own, self.parts.samples)
        rate = (done - self.start) / max(now - self.began, 1e-9)
        self.bar.update(self.task, completed=done, rate=f"{rate:,.0f}/s")
        if self.lines:
            left = (self.parts.samples - done) / max(rate, 1e-9)
            line = f"{done:,} of {self.parts.samples:,}, {rate:,.0f}/s, {left:,.0f} s left"
            print(line, file=sys.stderr, flush=True)
