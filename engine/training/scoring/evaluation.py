"""Scores of a classifier over a split whose samples are dealt over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from selfdistill.data.errors import redacted
from selfdistill.data.loading.loader import Sequential, warn_once
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.runtime.distributed import broadcast, sent, total
from selfdistill.engine.training.modalities.base import Batch, Modality
from selfdistill.engine.training.scoring import metrics
from selfdistill.engine.training.scoring.several import SetScores, SetTally
from selfdistill.engine.training.teacher import view

#: Samples times classes up to which logits are kept, for the figures that need probabilities.
KEPT = 10**7


class Kept(NamedTuple):
    """Every sample that counts, in the order of the ids.

    Attributes:
        ids: int64 [n].
        labels: int64 [n]; of several labels a sample [n, C], 0 or 1.
        logits: fp32 [n, C].
    """

    ids: np.ndarray
    labels: np.ndarray
    logits: np.ndarray

    def probabilities(self) -> np.ndarray:
        """float64 [n, C], rows that sum to 1."""
        from scipy.special import softmax

        found: np.ndarray = softmax(self.logits.astype(np.float64), axis=1)
        return found


@dataclass(frozen=True)
class Scores:
    """What a split's samples, each counted once, came out as.

    Attributes:
        accuracy: share of samples whose largest logit is the label's.
        macro_f1: mean over the classes that occur (as label or prediction) of each one's F1.
        micro_f1: F1 of all decisions together.
        loss: mean cross-entropy, in nats.
        confusion: int64 [C, C], rows true, columns predicted.
        n: samples.
        balanced_accuracy: mean over the classes that have samples of each one's recall.
        ranked: auroc, average_precision and ece (`metrics.of_probabilities`), those that are
            defined, if the logits were kept.
        kept: what these were computed from; on rank 0 alone.
    """

    accuracy: float
    macro_f1: float
    micro_f1: float
    loss: float
    confusion: np.ndarray
    n: int
    balanced_accuracy: float = float("nan")
    ranked: dict[str, float] = field(default_factory=dict)
    kept: Kept | None = None

    def scalars(self) -> dict[str, float]:
        """The figures by name."""
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "micro_f1": self.micro_f1,
            "loss": self.loss,
            "balanced_accuracy": self.balanced_accuracy,
            **self.ranked,
        }

    def as_dict(self, split: str) -> dict[str, float]:
        """Figures and number of samples as `SPLIT_accuracy` and so on, for `result.json`."""
        return {f"{split}_{k}": v for k, v in (self.scalars() | {"samples": self.n}).items()}


class Tally:
    """Collects predictions on each rank, then scores them together.

    A sample's id decides: however often it was padded in or met again, on one rank or on several,
    it counts once. A rank keeps 25 bytes a sample; between ranks go the ids, the confusion matrix
    and the sum of the losses. Logits are kept, and sent to rank 0, where that is asked for.

    Args:
        classes: C.
        keep: whether the logits are kept.
    """

    def __init__(self, classes: int, *, keep: bool = False) -> None:
        self.classes, self.keep = classes, keep
        self._parts: list[tuple[Tensor, ...]] = []

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, valid: Tensor, ids: Tensor) -> None:
        """Takes in a batch; nothing is read back from the device.

        Args:
            logits: [B, C].
            labels: int64 [B]; in padded rows anything.
            valid: bool [B], False in padded rows.
            ids: int64 [B], the samples' ids.
        """
        labels, valid, ids = (t.to(logits.device) for t in (labels, valid, ids))
        labels = labels.where(valid, 0)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        predicted = logits.argmax(dim=1)
        # In padded rows the label is 0 and the loss is not used.
        kept = (logits.float().clone(),) if self.keep else ()
        self._parts.append((ids, labels.int(), predicted.int(), losses.double(), valid, *kept))

    def gather(self) -> Scores:
        """Scores of all ranks' samples; every rank of the process group, if there is one, calls it.

        Raises:
            ValueError: no sample was counted.
        """
        device = self._device()
        columns: list[Tensor] = [
            torch.cat([part[i] for part in self._parts]).to(device)
            if self._parts
            else torch.empty(0, dtype=dtype, device=device)
            for i, dtype in enumerate(
                (torch.int64, torch.int32, torch.int32, torch.float64, torch.bool)
            )
        ]
        valid = columns[4]
        ids, labels, predicted, losses = (column[valid] for column in columns[:4])
        mine = _first(ids)
        mine[mine.clone()] = ~torch.isin(ids[mine], _of_lower_ranks(ids[mine]))

        cells = labels[mine].long() * self.classes + predicted[mine].long()
        confusion = torch.bincount(cells, minlength=self.classes**2)
        loss = losses[mine].sum()
        if _world() > 1:
            dist.all_reduce(confusion)
            dist.all_reduce(loss)
        matrix = confusion.view(self.classes, self.classes).cpu().numpy()
        found = scores(matrix, float(loss))
        if not self.keep:
            return found
        logits = torch.empty(0, self.classes, device=device)
        if self._parts:
            logits = torch.cat([part[5] for part in self._parts])[valid]
        kept = collected(ids[mine], labels[mine], logits[mine])
        ranked = metrics.of_probabilities(kept.labels, kept.probabilities()) if kept else {}
        if _world() > 1:
            ranked = broadcast(ranked)
        return replace(found, ranked=ranked, kept=kept)

    def _device(self) -> torch.device:
        """Where the collectives work: where the logits were, if any came."""
        if self._parts:
            return self._parts[0][0].device
        if _world() > 1 and "nccl" in dist.get_backend():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def scores(confusion: np.ndarray, loss: float) -> Scores:
    """Scores from a confusion matrix.

    Args:
        confusion: int64 [C, C], rows true, columns predicted.
        loss: sum of the samples' losses.

    Raises:
        ValueError: the matrix is empty.
    """
    n = int(confusion.sum())
    if n == 0:
        raise ValueError("no labelled sample to score")
    found = metrics.of_confusion(confusion)
    return Scores(
        found["accuracy"],
        found["macro_f1"],
        found["micro_f1"],
        loss / n,
        confusion,
        n,
        balanced_accuracy=found["balanced_accuracy"],
    )


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _first(ids: Tensor) -> Tensor:
    """Where an id stands for the first time, bool [n]."""
    order = torch.argsort(ids, stable=True)
    ranked = ids[order]
    new = torch.ones_like(ranked, dtype=torch.bool)
    new[1:] = ranked[1:] != ranked[:-1]
    return torch.empty_like(new).scatter_(0, order, new)


def _of_lower_ranks(ids: Tensor) -> Tensor:
    """The ids that ranks before this one hold."""
    if _world() == 1:
        return ids[:0]
    counts = ids.new_zeros(_world())
    counts[dist.get_rank()] = len(ids)
    dist.all_reduce(counts)
    # Collectives want equal sizes.
    padded = ids.new_zeros(int(counts.max()))
    padded[: len(ids)] = ids
    everyone = [torch.empty_like(padded) for _ in range(_world())]
    dist.all_gather(everyone, padded)
    lower = [row[: int(counts[rank])] for rank, row in enumerate(everyone[: dist.get_rank()])]
    return torch.cat([ids[:0], *lower])


def collected(ids: Tensor, labels: Tensor, logits: Tensor) -> Kept | None:
    """All ranks' samples in the order of their ids, on rank 0; None on the others.

    Args:
        ids: int64 [n] of this rank; no other has one of them.
        labels: [n], or of several labels a sample [n, C].
        logits: fp32 [n, C].
    """
    columns = [ids, labels.long(), logits]
    if _world() > 1:
        first = dist.get_rank() == 0
        counts = ids.new_zeros(_world())
        counts[dist.get_rank()] = len(ids)
        dist.all_reduce(counts)
        most = int(counts.max())
        for i, column in enumerate(columns):
            # Collectives want equal sizes.
            padded = column.new_zeros(most, *column.shape[1:])
            padded[: len(column)] = column
            everyone = [torch.empty_like(padded) for _ in range(_world())] if first else None
            dist.gather(padded, everyone)
            if everyone:
                columns[i] = torch.cat(
                    [row[:n] for row, n in zip(everyone, counts.tolist(), strict=True)]
                )
        if not first:
            return None
    order = torch.argsort(columns[0])
    return Kept(*(column[order].cpu().numpy() for column in columns))


def scored_batch(run: Run) -> int:
    """Samples that a rank scores together: on a GPU what keeps it busy, without a backward."""
    if run.ranks.device.type == "cuda":
        return 256
    return max(1, min(256, 4 * run.config.finetune.batch) // run.ranks.world)


@torch.no_grad()
def evaluate(
    run: Run,
    engine: Any,
    modality: Modality,
    base: Any,
    manifest: Manifest,
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    seen: Callable[[Batch], None] = lambda _: None,
    ranked: bool = True,
) -> Scores | SetScores:
    """Scores a split once, its samples dealt over the ranks; padded and skipped ones do not count.

    Args:
        run: The launch.
        engine: Of a classifier.
        modality: Of the inputs.
        base: Weights that the classifier started from.
        manifest: The split.
        spans: Ids [first, last) that this rank scores, as many batches as every other's; None:
            its share of all.
        seen: Told each batch after its forward pass.
        ranked: Whether the figures that need probabilities are wanted too; above `KEPT` numbers
            they are left out.

    Raises:
        UserError: broken data, more than may be skipped.
    """
    ranks = run.ranks
    engine.eval()
    classes = len(manifest.classes)
    keep = ranked and manifest.samples * classes <= KEPT
    tally = SetTally(classes) if manifest.several else Tally(classes, keep=keep)
    batches = Sequential(
        manifest,
        batch=scored_batch(run),
        rank=ranks.rank,
        world=ranks.world,
        spans=spans,
        **run.reading(modality.codec(base, manifest), require_labels=True),
    )
    where = f"scoring {redacted(manifest.root)}"  # in .pulse files and messages
    for batch in batches:
        run.boundary(where)
        labels = sent(batch["labels"], ranks.device)
        # Padding and skipped samples bear -1, which no cross-entropy takes; the tally skips them.
        known = labels if manifest.several else labels.clamp(min=0)
        out = engine(labels=known, **view(batch, modality.full, ranks.device))
        valid, ids = (sent(batch[name], ranks.device) for name in ("valid", "ids"))
        tally.add(out["logits"], labels, valid, ids)
        seen(batch)
    broken = int(total(torch.tensor(len(batches.broken), device=ranks.device)))
    batches.tolerate(broken)
    if broken and ranks.main:
        warn_once(f"{manifest.root}: scored without {broken} broken of {manifest.samples} samples")
    return tally.gather()
