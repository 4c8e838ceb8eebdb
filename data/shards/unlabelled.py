"""The split `unlabelled`: the inputs of train and more, all without labels, for stages 1 and 2."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from selfdistill.data.shards import manifest
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.shards.writer import Packed
from selfdistill.data.splits import DIVIDED, UNLABELLED


def _link(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def join_train(folder: Path, extra: Packed) -> Packed:
    """Puts train's shards before those of the split `unlabelled`, and writes its index anew.

    The tars of train are linked, not written twice. Their label members stay in them; the index
    knows of none.

    Args:
        folder: The data set's folder, with train/ and with unlabelled/, which holds the extra.
        extra: What was written of the extra.

    Returns:
        What the split then is.
    """
    train = Manifest.load(str(folder / DIVIDED[0]))
    added = Manifest.load(str(folder / UNLABELLED))
    assert train.kind == added.kind
    for shard in train.shards:
        _link(folder / DIVIDED[0] / shard.name, folder / UNLABELLED / shard.name)
    members = np.concatenate([train.members, added.members])
    members[:, 2:] = -1
    shards = [*train.shards, *added.shards]
    manifest.write(
        folder / UNLABELLED,
        split=UNLABELLED,
        classes=[],
        class_counts=[],
        shards=shards,
        members=members,
        kind=train.kind,
        image=train.image,
        text=train.text,
    )
    size = sum(shard.bytes for shard in shards)
    return replace(extra, samples=len(members), shards=len(shards), bytes=size)
