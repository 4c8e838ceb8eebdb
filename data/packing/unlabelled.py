"""The split `unlabelled`: the inputs of train and more, all without labels, for stages 1 and 2."""

from dataclasses import replace

import numpy as np

from selfdistill.data.packing.writer import Packed
from selfdistill.data.shards import manifest
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.shards.store import Store
from selfdistill.data.splits import DIVIDED, UNLABELLED


def join_train(store: Store, extra: Packed) -> Packed:
    """Puts train's shards before those of the split `unlabelled`, and writes its index anew.

    The tars of train are linked, not written twice. Their label members stay in them; the index
    knows of none.

    Args:
        store: Its folder has train/ and unlabelled/, which holds the extra.
        extra: What was written of the extra.

    Returns:
        What the split then is.
    """
    folder = store.folder
    train = Manifest.load(str(folder / DIVIDED[0]))
    added = Manifest.load(str(folder / UNLABELLED))
    assert train.kind == added.kind
    for shard in train.shards:
        store.link(shard.name, DIVIDED[0], UNLABELLED)
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
