"""Hashes the shards of a stage before it reads them, as `--data.check` says; opens the tables."""

from __future__ import annotations

import functools
import itertools

from selfdistill.data.shards.checking import check_hashes
from selfdistill.data.shards.manifest import Manifest, is_remote
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.runtime.distributed import main_only
from selfdistill.engine.training.tables import share_tables

#: Hashed in seconds: of a split of more bytes `--data.check auto` says that it is not checked.
_SMALL = 2 * 2**30
#: Hashed between two collectives, whose time-out the other ranks wait for.
_PORTION = 4 * 2**30


def check_shards(run: Run, manifests: list[Manifest], *, labels: bool) -> None:
    """Opens the tables of splits, and hashes their local shards, as `--data.check` says.

    PNGs carry checksums, which a loader tests; other files do not, nor do labels. Remote shards are
    hashed when they are fetched, and under `always` in the cache before their first use.

    Args:
        run: The launch.
        manifests: The splits.
        labels: Whether the stage reads labels.

    Raises:
        UserError: Names the damaged shard, or table.
    """
    share_tables(run.ranks, manifests)
    config = run.config.data
    for manifest in manifests:
        sizes = {
            number: shard.bytes
            for number, shard in enumerate(manifest.shards)
            if not is_remote(manifest.shard_place(number))
        }
        size = sum(sizes.values())
        covered = manifest.kind == "image" and manifest.image.get("stored") == "png" and not labels
        if config.check == "never" or not sizes or (config.check == "auto" and covered):
            continue
        size_line = f"{manifest.root}: {size / 2**30:.1f} GiB of shards"
        if config.check == "auto" and size > _SMALL:
            run.info(
                f"{size_line} are not checked against their sha256: --data.check always does it"
            )
            continue
        if size > _SMALL // 4:
            run.info(f"{size_line} are checked against their sha256 (--data.check)")
        ends = zip(sizes, itertools.accumulate(sizes.values()), strict=True)
        for _, group in itertools.groupby(ends, lambda end: end[1] // _PORTION):
            portion = dict(group)
            # What a loader notices it skips by itself, where it may.
            action = functools.partial(
                check_hashes, manifest, list(portion), hidden_only=config.skip_broken > 0
            )
            run.boundary("checking shards")
            main_only(run.ranks, action)
            if (done := max(portion.values())) < size:
                run.info(f"{manifest.root}: {100 * done // size}% checked")
