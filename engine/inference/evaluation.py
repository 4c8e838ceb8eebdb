"""A loaded classifier on a labelled set: every figure, as fine-tuning computes them, and more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from selfdistill.data.cli import nearest
from selfdistill.data.errors import UserError
from selfdistill.data.loading.batches import Options
from selfdistill.data.loading.loader import Sequential, warn_once
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.inference.found import no_classes
from selfdistill.engine.inference.model import Loaded
from selfdistill.engine.runtime.distributed import Ranks, total
from selfdistill.engine.training.scoring import intervals, metrics
from selfdistill.engine.training.scoring.evaluation import KEPT, Kept, Tally
from selfdistill.engine.training.scoring.intervals import Intervals
from selfdistill.engine.training.scoring.several import SetScores, SetTally

#: Names of classes that a message lists.
_LISTED = 12
#: Mistakes that are told.
WORST = 24


@dataclass(frozen=True)
class Mistake:
    """A sample that the model is wrong about.

    Attributes:
        sample: its id.
        labels: its classes: one, or with several labels a sample any number.
        predicted: the class that is wrongly given; or, with several, wrongly left out.
        sure: the probability that the model gives to its error.
        own: the one that it gives to the truth.
    """

    sample: int
    labels: list[int]
    predicted: int
    sure: float
    own: float

    @property
    def left_out(self) -> bool:
        """Whether `predicted` is a class of the sample, which the model did not give."""
        return self.predicted in self.labels


@dataclass(frozen=True)
class Evaluation:
    """What a set's samples, each counted once, came out as; on rank 0.

    Attributes:
        classes: names, in the model's order.
        several: whether a sample may have several of them.
        figures: by name, `loss` among them.
        intervals: of the figures.
        by_class: in the order of the classes.
        confusion: int64 [C, C], rows true, columns predicted; None with several labels a sample.
        reliability: of the likeliest class, or of all decisions; None without logits.
        mistakes: the worst; none without logits.
        n: samples.
        skipped: broken ones that were left out.
    """

    classes: list[str]
    several: bool
    figures: dict[str, float]
    intervals: Intervals
    by_class: list[metrics.OfClass]
    confusion: np.ndarray | None
    reliability: list[metrics.Bin] | None
    mistakes: list[Mistake]
    n: int
    skipped: int


def class_numbers(model: Loaded, manifest: Manifest, called: str | None = None) -> np.ndarray:
    """The model's number of each of the set's classes, which go by name: int64 [classes].

    Args:
        model: A classifier.
        manifest: The split.
        called: How messages call it; by default by its folder.

    Raises:
        UserError: the model has no classes, the set no labels, or a class that the model lacks; or
            they are of two kinds.
    """
    called = called or manifest.root
    if not model.classes:
        raise no_classes(model.origin)
    if manifest.kind != model.kind:
        raise UserError(
            f"{called} holds {manifest.kind}s, {model.origin} takes {model.kind}s: give"
            f" {model.kind}s, or another model"
        )
    if not manifest.classes:
        raise UserError(
            f"{called} has no labels, which an evaluation needs: pack it with its classes"
            " (launcher.predict labels it)"
        )
    if manifest.several != model.several:
        kinds = ("one class a sample", "several classes a sample")
        raise UserError(
            f"{called} has {kinds[manifest.several]}, {model.origin} gives {kinds[model.several]}:"
            " take a set, or a model, of the other kind"
        )
    unknown = [name for name in manifest.classes if name not in model.classes]
    if unknown:
        hint = nearest(unknown[0], model.classes, "")
        raise UserError(
            f"class {unknown[0]!r} of {called} is none of the model's.{hint} The set has"
            f" {_list(manifest.classes)}; {model.origin} has {_list(model.classes)}: rename the"
            " set's classes, or take another model"
        )
    return np.array([model.classes.index(name) for name in manifest.classes], dtype=np.int64)


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} ({', '.join(names[:_LISTED])}{more})"


@torch.no_grad()
def evaluate(
    model: Loaded,
    manifest: Manifest,
    ranks: Ranks,
    *,
    batch: int,
    shares: int = 1,
    workers: int = 0,
    skip_broken: float = 0.0,
    seed: int = 0,
    seen: Callable[[int], None] = lambda _: None,
) -> Evaluation | None:
    """Scores a packed split. Every rank calls it.

    Args:
        model: A classifier.
        manifest: The split, every sample of which has a label.
        ranks: This process among its ranks, which share the samples.
        batch: Samples that this rank computes together.
        shares: For one rank alone: go through the samples as so many ranks would, so that batches,
            and with them the last digits, are those of a fine-tuning on so many.
        workers: Processes that read and decode.
        skip_broken: Share of broken samples that may be left out.
        seed: Of the intervals' draws.
        seen: Told the samples of each batch that went through.

    Returns:
        All figures on rank 0, None on the others.

    Raises:
        UserError: See `class_numbers`; broken data.
    """
    numbers = torch.from_numpy(class_numbers(model, manifest))
    classes = len(model.classes)
    keep = manifest.samples * classes <= KEPT
    if model.several and not keep:
        raise UserError(
            f"{manifest.samples} samples of {classes} classes are more than {KEPT} probabilities:"
            " evaluate a smaller split"
        )
    tally = SetTally(classes) if model.several else Tally(classes, keep=keep)
    reading: Options = {
        "codec": model.codec_of(manifest),
        "require_labels": True,
        "workers": workers,
        "skip_broken": skip_broken,
        "report": warn_once,
        "pin": ranks.device.type == "cuda",
    }
    parts = [(rank, shares) for rank in range(shares)]
    if ranks.world > 1:
        parts = [(ranks.rank, ranks.world)]
    broken = 0
    for rank, world in parts:
        batches = Sequential(manifest, batch=batch, rank=rank, world=world, **reading)
        for found in batches:
            logits, labels, valid = model.forward(found)["logits"], found["labels"], found["valid"]
            if not logits[valid.to(logits.device)].isfinite().all():
                raise UserError(f"{model.origin} gives NaN: its training went wrong: take another")
            if model.several:
                mapped = torch.zeros(len(labels), classes, dtype=torch.bool)
                mapped[:, numbers] = labels
            else:
                mapped = numbers[labels.clamp(min=0)]
            tally.add(logits, mapped, valid, found["ids"])
            seen(int(valid.sum()))
        broken += len(batches.broken)
        batches.close()
    if ranks.world > 1:
        broken = int(total(torch.tensor(broken, device=ranks.device)))
    scores = tally.gather()
    if not ranks.main:
        return None
    if isinstance(scores, SetScores):
        return _of_sets(model.classes, scores, broken, seed)
    figures, kept = scores.scalars(), scores.kept
    some: dict[str, Any] = {}
    bins = None
    if kept:
        some = {"labels": kept.labels, "probabilities": kept.probabilities()}
        bins = metrics.reliability(*metrics.top(**some))
    return Evaluation(
        model.classes,
        several=False,
        figures=figures,
        intervals=intervals.of_classes(scores.confusion, **some, seed=seed),
        by_class=metrics.by_class(scores.confusion),
        confusion=scores.confusion,
        reliability=bins,
        mistakes=_mistakes(kept) if kept else [],
        n=scores.n,
        skipped=broken,
    )


def _of_sets(classes: list[str], scores: SetScores, broken: int, seed: int) -> Evaluation:
    """The evaluation of samples with several labels."""
    labels, probabilities = scores.labels, scores.probabilities
    return Evaluation(
        classes,
        several=True,
        figures=scores.scalars(),
        intervals=intervals.of_sets(labels, probabilities, seed=seed),
        by_class=metrics.by_class_of_sets(labels, probabilities),
        confusion=None,
        reliability=metrics.reliability(labels.ravel(), probabilities.ravel()),
        mistakes=_mistakes_of_sets(scores),
        n=scores.n,
        skipped=broken,
    )


def _mistakes(kept: Kept) -> list[Mistake]:
    """The samples that the model is wrong about, the surest first."""
    probabilities = kept.probabilities()
    predicted, rows = kept.logits.argmax(1), np.arange(len(kept.labels))
    sure = probabilities[rows, predicted]
    wrong = rows[predicted != kept.labels]
    return [
        Mistake(
            int(kept.ids[row]),
            [int(kept.labels[row])],
            int(predicted[row]),
            float(sure[row]),
            float(probabilities[row, kept.labels[row]]),
        )
        for row in wrong[np.argsort(-sure[wrong], kind="stable")][:WORST]
    ]


def _mistakes_of_sets(scores: SetScores) -> list[Mistake]:
    """Of each sample its worst wrong decision about a class, the surest first."""
    given = scores.probabilities >= metrics.THRESHOLD
    sure = np.where(given, scores.probabilities, 1 - scores.probabilities)
    sure = np.where(given == scores.labels, 0.0, sure)
    worst = sure.argmax(1)
    most = sure[np.arange(len(sure)), worst]
    order = np.argsort(-most, kind="stable")[: min(WORST, np.count_nonzero(most))]
    return [
        Mistake(
            int(scores.ids[row]),
            np.flatnonzero(scores.labels[row]).tolist(),
            int(worst[row]),
            float(most[row]),
            1 - float(most[row]),
        )
        for row in order
    ]
