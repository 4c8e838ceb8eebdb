"""Inputs through a model, in parts: the loop of `launcher.predict` and `launcher.embed`."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfdistill.data.cli import machine_error
from selfdistill.data.errors import UserError
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
    with _Shown(parts, enabled=ranks.main) as shown, _kept(parts, ranks):
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
            parts.wait()
    seconds = time.monotonic() - began
    return min((parts.done() - before) * BLOCK, parts.samples) / seconds if todo else 0.0


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
