"""How fast, how early and how steadily the loader gives batches: `python -m benchmarks.loader`.

The peers are webdataset's own pipeline on the same shards and torchvision's ImageFolder on the same
files; the bounds are Pillow and our own use of it, decoding the same bytes from memory in as many
processes and doing nothing else. Rounds alternate between them. Starting workers is not counted in
the throughput; it is in the time to the first batch, which is taken at several positions of the
stream. At the end many samples of tiny images are read, and the memory of this process and its
workers is watched.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import record
from benchmarks.loader import peers as loader_peers
from benchmarks.loader.peers import (
    AHEAD,
    BATCH,
    CONTESTANTS,
    EPOCHS,
    LIMITS,
    Pictures,
    Stored,
)
from benchmarks.loader.tables import (
    STEPS,
    TINY,
    Rate,
    endurance_rows,
    text_of,
    throughput_rows,
)
from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.data.loading.loader import Loader

_TICK = os.sysconf("SC_CLK_TCK")
_PATIENCE = 60  # seconds after which a process of the decode limit counts as dead

Tell = Callable[[str, int], None]


def _children() -> list[int]:
    return [process.pid for process in multiprocessing.active_children() if process.pid]


def processor_seconds() -> float:
    """Processor time of this process and its workers."""
    total = time.process_time()
    for pid in _children():
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / _TICK
    return total


def memory() -> tuple[float, float]:
    """MB of this process and of its workers; what they share is divided among them (PSS)."""

    def of(pid: int) -> float:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6

    return of(os.getpid()), sum(map(of, _children()))


def _timed(
    batches: loader_peers.Batches, ahead: int, seconds: float, clock: Callable[[], float]
) -> tuple[int, float, float]:
    """Images that come after `ahead` batches, their time and the processor's."""
    for _ in range(ahead):
        next(batches)
    images, used, began = 0, clock(), time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        images += len(next(batches)[0])
    return images, elapsed, clock() - used


def rate(name: str, pictures: Pictures, workers: int, seconds: float) -> Rate:
    """The rate of one contestant, its workers started and its queues running."""
    if name in LIMITS:
        return limit_rate(name, pictures, workers, seconds)
    with closing(CONTESTANTS[name](pictures, workers, EPOCHS)) as batches:
        ahead = AHEAD * max(workers, 1) + 4
        images, elapsed, used = _timed(batches, ahead, seconds, processor_seconds)
    return images / elapsed, images / used


def limit_rate(name: str, pictures: Pictures, workers: int, seconds: float) -> Rate:
    """The rate of processes that decode, put batches together and drop them."""
    context = multiprocessing.get_context("fork")
    processes = max(workers, 1)
    ready, found = context.Barrier(processes), context.Queue()

    def decode() -> None:
        with closing(CONTESTANTS[name](pictures, 0, EPOCHS)) as batches:
            next(batches)
            ready.wait(_PATIENCE)
            found.put(_timed(batches, AHEAD, seconds, time.process_time))

    started = [context.Process(target=decode, daemon=True) for _ in range(processes)]
    for process in started:
        process.start()
    results = [found.get(timeout=seconds + 2 * _PATIENCE) for _ in started]
    for process in started:
        process.join()
    return (
        sum(images / elapsed for images, elapsed, _ in results),
        sum(r[0] for r in results) / sum(r[2] for r in results),
    )


def throughput(
    pictures: Pictures, workers: int, rounds: int, seconds: float, tell: Tell
) -> dict[str, list[Rate]]:
    """The rates of all contestants; each round begins with another one."""
    names = list(CONTESTANTS)
    found: dict[str, list[Rate]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            tell(f"round {number + 1}: {name}", 1)
            found[name].append(rate(name, pictures, workers, seconds))
    return found


def first_batch(pictures: Pictures, workers: int, step: int) -> float:
    """Seconds from making a loader at a step to its first batch."""
    began = time.perf_counter()
    loader = Loader(pictures.manifest, batch=BATCH, workers=workers, start_step=step)
    next(iter(loader))
    took = time.perf_counter() - began
    loader.close()
    return took


def starts(
    pictures: Pictures, workers: int, rounds: int, tell: Tell
) -> dict[tuple[int, int], list[float]]:
    """Times to the first batch, by number of workers and step."""
    steps = (0, len(pictures.encoded) // BATCH // 2, 10**6, 10**9)
    found: dict[tuple[int, int], list[float]] = {
        (count, step): [] for count in sorted({0, workers}) for step in dict.fromkeys(steps)
    }
    for number in range(rounds + 1):
        for (count, step), times in found.items():
            tell(f"first batch at step {step:,}", 1)
            took = first_batch(pictures, count, step)
            if number:  # the first round warms up
                times.append(took)
    return found


def endure(
    pictures: Pictures, workers: int, samples: int, tell: Tell
) -> list[tuple[int, float, float]]:
    """Samples read, and MB of this process and of the workers, in 20 equal steps."""
    found = []
    loader = Loader(pictures.manifest, batch=BATCH, workers=workers)
    batches, read = iter(loader), 0
    for part in range(1, STEPS + 1):
        while read < samples * part / STEPS:
            read += len(next(batches)["ids"])
        found.append((read, *memory()))
        tell(f"memory after {read:,} samples", 1)
    loader.close()
    return found


def main(
    images: int = 4000,
    size: int = 64,
    stored: Stored = "png",
    workers: int = 2,
    rounds: int = 5,
    seconds: float = 4.0,
    endurance: int = 1_000_000,
    out: str | None = None,
) -> None:
    """Measures throughput, time to the first batch, and memory over many samples.

    Args:
        images: how many are drawn and packed.
        size: their side in pixels.
        stored: png, which data.pack makes of any file, or jpeg or webp, kept as they are.
        workers: processes of each contestant; 0 decodes in this one.
        rounds: alternating rounds.
        seconds: that each contestant is timed in a round.
        endurance: samples that are read while memory is watched.
        out: folder for loader.json and loader.md.
    """
    for name, value, least in (
        ("size", size, 8),
        ("workers", workers, 0),
        ("rounds", rounds, 1),
        ("images", images, BATCH * max(workers, 1)),
        ("endurance", endurance, STEPS * BATCH),
    ):
        if value < least:
            raise UserError(f"{name} is {value}: give {least} or more")
    if seconds <= 0:
        raise UserError(f"seconds is {seconds:g}: give more than 0")
    # No thread of its own: the workers are forked.
    bars = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    bar = Progress(*bars, console=Console(stderr=True), auto_refresh=False)
    with tempfile.TemporaryDirectory(prefix="loader-") as name:
        folder = Path(name)
        with bar as progress:
            pictures = loader_peers.make(folder / "all", images, size, stored, workers, progress)
            tiny = loader_peers.make(
                folder / "tiny", min(images, 2000), TINY, "png", workers, progress
            )
            total = len(CONTESTANTS) * (rounds + 1) + STEPS
            total += (rounds + 1) * len({0, workers}) * 4
            task = progress.add_task("", total=total)

            def tell(what: str, done: int) -> None:
                progress.update(task, description=what, advance=done, refresh=True)

            for name, contestant in CONTESTANTS.items():
                tell(f"one epoch of {name}", 1)
                loader_peers.check(pictures, name, contestant(pictures, workers, 1))
            rates = throughput(pictures, workers, rounds, seconds, tell)
            first = starts(pictures, workers, rounds, tell)
            watched = endure(tiny, workers, endurance, tell)
    rows, ratios = throughput_rows(rates)
    figures = {
        "settings": {
            "images": images,
            "size": size,
            "stored": stored,
            "bytes_per_image": statistics.mean(map(len, pictures.encoded)),
            "batch": BATCH,
            "workers": workers,
            "rounds": rounds,
            "seconds": seconds,
        },
        "throughput": rows,
        "ratios": ratios,
        "start": [
            {"workers": count, "step": step, "seconds": record.spread(times)}
            for (count, step), times in first.items()
        ],
        "endurance": {
            "samples": watched[-1][0],
            "rows": endurance_rows(watched),
            "watched": [[read, round(a, 2), round(b, 2)] for read, a, b in watched],
        },
    }
    record.write(Path(out) if out else None, "loader", figures, text_of(figures))


if __name__ == "__main__":
    cli.run(main)
