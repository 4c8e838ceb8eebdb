"""How fast, how early and how steadily the loader gives batches: `python -m benchmarks.loader`.

The peers are webdataset's own pipeline on the same shards and torchvision's ImageFolder on the same
files; the bound is Pillow, decoding the same bytes from memory in as many processes and doing
nothing else. Rounds alternate between them. Starting workers is not counted in the throughput; it
is in the time to the first batch, which is taken at several positions of the stream. At the end
many samples of tiny images are read, and the memory of this process and its workers is watched.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import loader_peers, record
from benchmarks.loader_peers import (
    AHEAD,
    BATCH,
    CARRIED,
    CONTESTANTS,
    EPOCHS,
    LIMIT,
    OURS,
    Pictures,
    Stored,
)
from data import cli
from data.errors import UserError
from data.loader import Loader

PEERS = (loader_peers.WEBDATASET, loader_peers.FOLDER)
#: Pixels of the images of the long run: 10**6 of them take a few minutes.
TINY = 16
#: At which memory is looked at, on the way through them.
STEPS = 20
_TICK = os.sysconf("SC_CLK_TCK")
_PATIENCE = 60  # seconds after which a process of the decode limit counts as dead

Tell = Callable[[str, int], None]
Rate = tuple[float, float]  # images a second, images a second of processor time


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
    if name == LIMIT:
        return limit_rate(pictures, workers, seconds)
    with closing(CONTESTANTS[name](pictures, workers, EPOCHS)) as batches:
        ahead = AHEAD * max(workers, 1) + 4
        images, elapsed, used = _timed(batches, ahead, seconds, processor_seconds)
    return images / elapsed, images / used


def limit_rate(pictures: Pictures, workers: int, seconds: float) -> Rate:
    """The rate of processes that decode, put batches together and drop them."""
    context = multiprocessing.get_context("fork")
    processes = max(workers, 1)
    ready, found = context.Barrier(processes), context.Queue()

    def decode() -> None:
        with closing(CONTESTANTS[LIMIT](pictures, 0, EPOCHS)) as batches:
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


def throughput_rows(found: dict[str, list[Rate]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The figures of each contestant, and the ratios of ours, round by round."""
    rows = [
        {
            "contestant": name,
            "images_per_s": record.spread([r[0] for r in rates]),
            "images_per_core_s": record.spread([r[1] for r in rates]),
        }
        for name, rates in found.items()
    ]
    best = max(PEERS, key=lambda peer: statistics.median(r[0] for r in found[peer]))

    def ratio(other: str, kind: int) -> dict[str, float]:
        pairs = zip(found[OURS], found[other], strict=True)
        return record.spread([mine[kind] / theirs[kind] for mine, theirs in pairs])

    others = {"decode_limit": LIMIT, "decode_limit_carried": CARRIED, "best_peer": best}
    return rows, {
        key: {"other": name, "images_per_s": ratio(name, 0), "images_per_core_s": ratio(name, 1)}
        for key, name in others.items()
    }


def endurance_rows(found: list[tuple[int, float, float]]) -> list[dict[str, Any]]:
    """MB at 10, 50 and 100 %, and the slope from 10 % on, of this process, the workers, both."""
    tenth = STEPS // 10 - 1
    read = np.array([f[0] for f in found[tenth:]])
    rows = []
    for name, parts in (("this process", [1]), ("workers", [2]), ("together", [1, 2])):
        used = np.array([sum(f[part] for part in parts) for f in found[tenth:]])
        slope = np.polyfit(read / 1e6, used, 1)[0]
        rows.append(
            {
                "processes": name,
                "mb_at_10": used[0],
                "mb_at_50": used[STEPS // 2 - 1 - tenth],
                "mb_at_100": used[-1],
                "mb_per_million": float(slope),
            }
        )
    return rows


def _cells(spread: dict[str, float], form: str, unit: float = 1) -> list[str]:
    middle, low, high = (format(spread[k] * unit, form) for k in ("median", "min", "max"))
    return [middle, f"{low} to {high}", str(int(spread["n"]))]


def text_of(figures: dict[str, Any]) -> str:
    """The figures as tables in Markdown."""
    s = figures["settings"]
    rates = record.markdown(
        ["", "images/s, median", "min to max", "n", "images per core-second"],
        [
            [
                row["contestant"],
                *_cells(row["images_per_s"], ",.0f"),
                format(row["images_per_core_s"]["median"], ",.0f"),
            ]
            for row in figures["throughput"]
        ],
    )
    ratios = record.markdown(
        ["ours /", "by the clock, median", "min to max", "n", "by processor time, median"],
        [
            [
                ratio["other"] + (" (the best peer)" if key == "best_peer" else ""),
                *_cells(ratio["images_per_s"], ".2f"),
                format(ratio["images_per_core_s"]["median"], ".2f"),
            ]
            for key, ratio in figures["ratios"].items()
        ],
    )
    first = record.markdown(
        ["workers", "first step", "ms to its batch, median", "min to max", "n"],
        [
            [str(row["workers"]), f"{row['step']:,}", *_cells(row["seconds"], ".0f", 1000)]
            for row in figures["start"]
        ],
    )
    memory_table = record.markdown(
        ["", "MB at 10 %", "at 50 %", "at 100 %", "MB per 10^6 samples"],
        [
            [
                row["processes"],
                *(format(row[f"mb_at_{percent}"], ".1f") for percent in (10, 50, 100)),
                format(row["mb_per_million"], "+.2f"),
            ]
            for row in figures["endurance"]["rows"]
        ],
    )
    size = s["size"]
    return f"""## Loader

{s["images"]:,} images of {size} x {size} pixels stored as {s["stored"]},
{s["bytes_per_image"]:,.0f} bytes each; batches of {BATCH}; workers: {s["workers"]}; cores:
{record.machine()["cores"]}. Each contestant gave each image once in an epoch, with the pixels and
the label that are stored. A core-second is one of processor time, of the workers and of the
process that takes the batches.

{rates}

{ratios}

### Start and resume

From making the loader to its first batch.

{first}

### Endurance

{figures["endurance"]["samples"]:,} samples of {TINY} x {TINY} pixels; workers: {s["workers"]}.
Memory is the sum of PSS, the slope that of a line through the figures from 10 % on.

{memory_table}
"""


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
