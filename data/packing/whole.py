"""A whole set of shards, all of its splits: what it is made of, and one launch that writes it."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from selfdistill.data.packing.encoding import Kind
from selfdistill.data.packing.unlabelled import join_train
from selfdistill.data.packing.writer import Packed, replace, write_split
from selfdistill.data.shards import duplicates
from selfdistill.data.shards.store import Store
from selfdistill.data.sources.samples import Splits, Stream, listed
from selfdistill.data.splits import DIVIDED, UNLABELLED


@dataclass(frozen=True)
class Whole:
    """What is to be written.

    Attributes:
        out: The data set's folder.
        splits: Per split its samples and classes; the same in every launch.
        kind: How samples are stored.
        name: First part of the shards' names.
        samples_per_shard: Samples in a tar.
        skip_broken: Leave unreadable samples out.
        options: What else changes the shards, for the comparison of parts.
    """

    out: Path
    splits: Splits
    kind: Kind
    name: str
    samples_per_shard: int
    skip_broken: bool
    options: dict[str, Any]

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """What parts must agree in, as JSON keeps it."""
        return {
            **self.options,
            "kind": self.kind.name,
            "stored": json.loads(json.dumps(self.kind.entry())),
            "name": self.name,
            "samples_per_shard": self.samples_per_shard,
            "skip_broken": self.skip_broken,
            "source": {
                split: {
                    "samples": len(samples),
                    "classes": classes,
                    "listing": samples.digest()
                    if isinstance(samples, Stream)
                    else listed(samples)[1],
                }
                for split, (samples, classes) in self.splits.items()
            },
        }

    def shards(self, split: str) -> int:
        """How many shards a split has, some of them perhaps without a readable sample."""
        return -(-len(self.splits[split][0]) // self.samples_per_shard)


def write_whole(
    whole: Whole, replaced: Iterable[str], seen: duplicates.Inputs, progress: Progress
) -> list[Packed]:
    """Writes the splits beside OUT, and puts them in place once all are whole.

    Args:
        whole: What is to be written; the split `unlabelled` is joined with train.
        replaced: Splits that are taken away, if they are there.
        seen: Told of every input.
        progress: Where to show how far it is.

    Raises:
        UserError: See `write_split`.
    """
    out = whole.out
    staging = out.parent / f".{out.name}.{os.getpid()}.partial"
    shutil.rmtree(staging, ignore_errors=True)  # of a killed one: in containers all are 1
    try:
        done = [
            write_split(
                samples,
                classes,
                staging,
                split=split,
                name=whole.name,
                kind=whole.kind,
                samples_per_shard=whole.samples_per_shard,
                skip_broken=whole.skip_broken,
                progress=progress,
                seen=seen,
            )
            for split, (samples, classes) in whole.splits.items()
        ]
        if UNLABELLED in whole.splits and DIVIDED[0] in whole.splits:
            done[-1] = join_train(Store(staging), done[-1])
        out.mkdir(parents=True, exist_ok=True)
        for split in replaced:
            if split in whole.splits:
                replace(staging / split, out / split)
            elif (out / split).exists():  # of the data set that is being replaced
                shutil.rmtree(out / split)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return done
