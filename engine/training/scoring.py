"""A pass over a split that scores a classifier, the split's samples dealt over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from selfdistill.data.loading.loader import sequential, tell
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.runtime.distributed import sent, total
from selfdistill.engine.training.evaluation import Scores, Tally
from selfdistill.engine.training.kinds.base import Kind
from selfdistill.engine.training.teacher import view


def scored_batch(run: Run) -> int:
    """Samples that a rank scores together: on a GPU what keeps it busy, without a backward."""
    if run.ranks.device.type == "cuda":
        return 256
    return max(1, min(256, 4 * run.config.finetune.batch) // run.ranks.world)


@torch.no_grad()
def evaluate(
    run: Run,
    engine: Any,
    data: Kind,
    base: Any,
    manifest: Manifest,
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    seen: Callable[[dict[str, Tensor]], None] = lambda _: None,
) -> Scores:
    """Scores a split once, its samples dealt over the ranks; padded and skipped ones do not count.

    Args:
        run: The launch.
        engine: Of a classifier.
        data: The kind of the inputs.
        base: Weights that the classifier started from.
        manifest: The split.
        spans: Ids [first, last) that this rank scores, as many batches as every other's; None:
            its share of all.
        seen: Told each batch after its forward pass.

    Raises:
        UserError: broken data, more than may be skipped.
    """
    config, ranks = run.config, run.ranks
    engine.eval()
    tally = Tally(len(manifest.classes))
    batches = sequential(
        manifest,
        batch=scored_batch(run),
        rank=ranks.rank,
        world=ranks.world,
        workers=run.workers,
        cache_dir=config.data.cache_dir,
        cache_gb=config.data.cache_gb,
        skip_broken=config.data.skip_broken,
        report=tell,
        codec=data.codec(base, manifest),
        require_labels=True,
        pin=ranks.device.type == "cuda",
        spans=spans,
    )
    for batch in batches:
        run.boundary(f"scoring {manifest.root}")
        labels = sent(batch["labels"], ranks.device)
        # Padding and skipped samples bear -1, which no cross-entropy takes; the tally skips them.
        out = engine(labels=labels.clamp(min=0), **view(batch, data.full, ranks.device))
        valid, ids = (sent(batch[name], ranks.device) for name in ("valid", "ids"))
        tally.add(out["logits"], labels, valid, ids)
        seen(batch)
    broken = int(total(torch.tensor(len(batches.broken), device=ranks.device)))
    batches.tolerate(broken)
    if broken and ranks.main:
        tell(f"{manifest.root}: scored without {broken} broken of {manifest.samples} samples")
    return tally.gather()
