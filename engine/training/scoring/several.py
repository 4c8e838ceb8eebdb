"""Scores of samples that may have several labels, over a split that is dealt over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from selfdistill.engine.training.scoring import metrics


@dataclass(frozen=True)
class SetScores:
    """What a split's samples, each counted once, came out as; `Scores` of one label a sample.

    Attributes:
        figures: by name, see `metrics.of_sets`: `accuracy` (all of a sample's classes right),
            `macro_f1`, `micro_f1`, `average_precision` (mAP) and so on.
        loss: mean binary cross-entropy of samples and classes, in nats.
        recalls: of each class, the share of its samples that were found; NaN without one.
        n: samples.
        ids: int64 [n], ascending.
        labels: bool [n, C], in order of the ids.
        probabilities: float64 [n, C], of each class by itself.
    """

    figures: dict[str, float]
    loss: float
    recalls: np.ndarray
    n: int
    ids: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray
    confusion: ClassVar[None] = None

    @property
    def accuracy(self) -> float:
        """Share of samples all of whose classes are right."""
        return self.figures["accuracy"]

    def scalars(self) -> dict[str, float]:
        """The figures by name."""
        return self.figures | {"loss": self.loss}

    def as_dict(self, split: str) -> dict[str, float]:
        """Figures and number of samples as `SPLIT_accuracy` and so on, for `result.json`."""
        return {f"{split}_{k}": v for k, v in (self.scalars() | {"samples": self.n}).items()}


class SetTally:
    """Collects logits on each rank, then scores them together; see `Tally`.

    A rank keeps 5 C + 8 bytes a sample, and all ranks hold all of them at the end.

    Args:
        classes: C.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, valid: Tensor, ids: Tensor) -> None:
        """Takes in a batch; nothing is read back from the device.

        Args:
            logits: [B, C].
            labels: bool [B, C]; in padded rows anything.
            valid: bool [B], False in padded rows.
            ids: int64 [B], the samples' ids.
        """
        labels, valid, ids = (t.to(logits.device) for t in (labels, valid, ids))
        self._parts.append((ids.where(valid, -1), labels, logits.float().clone()))

    def gather(self) -> SetScores:
        """Scores of all ranks' samples; every rank of the process group, if there is one, calls it.

        Raises:
            ValueError: no sample was counted.
        """
        from scipy.special import expit
        from sklearn.metrics import log_loss

        ids, labels, logits = (
            _everywhere(torch.cat(column)).cpu().numpy()
            for column in zip(*self._parts, strict=True)
        )
        # In order of the ids, so that sums do not depend on how samples were dealt.
        numbers, first = np.unique(ids, return_index=True)
        rows = first[numbers >= 0]
        if not len(rows):
            raise ValueError("no labelled sample to score")
        labels, probabilities = labels[rows], expit(logits[rows].astype(np.float64))
        found = (labels & (probabilities >= metrics.THRESHOLD)).sum(0)
        with np.errstate(invalid="ignore"):
            recalls = found / labels.sum(0)
        figures = metrics.of_sets(labels, probabilities)
        loss = float(log_loss(labels.ravel(), probabilities.ravel(), labels=[False, True]))
        numbers = numbers[numbers >= 0]
        return SetScores(figures, loss, recalls, len(rows), numbers, labels, probabilities)


def _everywhere(rows: Tensor) -> Tensor:
    """The rows of all ranks, each of which has as many."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    sent = rows.to(torch.uint8) if rows.dtype == torch.bool else rows
    parts = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, sent.contiguous())
    return torch.cat(parts).to(rows.dtype)
