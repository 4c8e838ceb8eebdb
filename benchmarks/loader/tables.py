"""The tables of `benchmarks.loader`."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.loader import peers as loader_peers
from benchmarks.loader.peers import BATCH, CARRIED, LIMIT, OURS, OWN

PEERS = (loader_peers.WEBDATASET, loader_peers.FOLDER)
#: Pixels of the images of the long run: 10**6 of them take a few minutes.
TINY = 16
#: At which memory is looked at, on the way through them.
STEPS = 20

Rate = tuple[float, float]  # images a second, images a second of processor time


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

    others = {"decode_limit": LIMIT, "decode_limit_own": OWN, "decode_limit_carried": CARRIED}
    others["best_peer"] = best
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
