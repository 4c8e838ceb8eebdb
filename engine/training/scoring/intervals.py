"""How far the samples that there are bear a figure: Wilson's and bootstrap intervals.

Accuracy is a share of the samples, whose interval is Wilson's (1927): it holds where a model makes
few mistakes, or none, of which a bootstrap would draw none either. Of all else the samples are
drawn anew, as many as there are, with replacement; a figure's interval holds the
middle 95% of its values, less what they are off in the mean, the bias of a draw: a mean over many
classes is, and average precision, which samples that come twice lift.

The calibration error is a mean of distances, which chance lifts in the samples themselves too. Its
interval begins where the reflected one ("basic" bootstrap) does, which takes that lift off as well,
and at 0 where a perfectly calibrated model would show as much (Bröcker & Smith, 2007).

What depends on counts alone is drawn from the confusion matrix. Ranked figures cost samples times
classes for each draw, so that large sets get fewer draws.

Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from selfdistill.engine.training.scoring import metrics

LEVEL = 0.95
#: Draws, where they cost little.
DRAWS = 1000
#: The fewest draws that give an interval of ranked figures.
FEWEST = 100
#: Numbers that are looked at for the ranked figures: seconds.
WORK = 2 * 10**8
#: Numbers held at a time.
HELD = 10**7
#: Sums over samples, whose draws have no bias.
SUMS = ("accuracy", "loss")


@dataclass(frozen=True)
class Intervals:
    """How well the samples bear the figures.

    Attributes:
        of: name -> (low, high).
        draws: name -> number of draws that its interval is made of; none of accuracy's.
        calibrated: the `ece` that a perfectly calibrated model would have on so many samples, in
            the mean; None without probabilities.
    """

    of: dict[str, tuple[float, float]]
    draws: dict[str, int]
    calibrated: float | None = None


def of_classes(
    confusion: np.ndarray,
    labels: np.ndarray | None = None,
    probabilities: np.ndarray | None = None,
    *,
    seed: int = 0,
    work: int = WORK,
    fewest: int = FEWEST,
) -> Intervals:
    """Intervals of one class a sample.

    Args:
        confusion: int64 [C, C], rows true, columns predicted.
        labels: int64 [n]; None: of the counts' figures alone.
        probabilities: float [n, C].
        seed: of the draws.
        work: numbers that may be looked at for `auroc` and `average_precision`.
        fewest: draws; where `work` does not suffice for half of them, the two are left out.
    """
    rng = np.random.default_rng(seed)
    values, by_chance = _of_counts(confusion, rng), None
    if labels is not None and probabilities is not None:
        ranked = list(metrics.against_rest(labels, probabilities))
        right, confidence = metrics.top(labels, probabilities)
        own = probabilities[np.arange(len(labels)), labels]
        losses = -np.log(np.maximum(own, np.finfo(np.float64).tiny))
        means = {"loss": losses}
        values |= _of_samples(ranked, right, confidence, means, rng, work, fewest)
        by_chance = _calibrated(confidence, rng)
    found = _intervals(values, by_chance)
    _count(found, int(np.trace(confusion)), int(confusion.sum()))
    found.of["micro_f1"] = found.of["accuracy"]  # one and the same, where each sample has one class
    return found


def of_sets(
    labels: np.ndarray,
    probabilities: np.ndarray,
    *,
    seed: int = 0,
    work: int = WORK,
    fewest: int = FEWEST,
) -> Intervals:
    """Intervals of several labels a sample; see `of_classes`.

    Args:
        labels: bool [n, C].
        probabilities: float [n, C].
        seed: of the draws.
        work: numbers that may be looked at.
        fewest: draws.
    """
    rng = np.random.default_rng(seed)
    labels = np.asarray(labels, bool)
    n, classes = labels.shape
    predicted = probabilities >= metrics.THRESHOLD
    macro, micro = [], []
    draws = min(DRAWS, max(FEWEST, work // (n * classes)))
    columns = [part.T.astype(np.float32) for part in (labels & predicted, labels, predicted)]
    for weights in _weights(n, draws, rng):
        both, true, said = (column @ weights for column in columns)
        occurs = np.maximum(1, (true + said > 0).sum(0))
        macro.append(_ratio(2 * both, true + said).sum(0) / occurs)
        micro.append(_ratio(2 * both.sum(0), true.sum(0) + said.sum(0)))
    values = {"macro_f1": np.concatenate(macro), "micro_f1": np.concatenate(micro)}
    ranked = list(zip(labels.T, probabilities.T, strict=True))
    means = {"accuracy": (labels == predicted).all(1).astype(np.float64)}
    # A decision each, which are drawn with their sample.
    values |= _of_samples(ranked, labels, probabilities, means, rng, work, fewest)
    found = _intervals(values, _calibrated(probabilities.ravel(), rng))
    _count(found, int(means["accuracy"].sum()), n)
    return found


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's interval of a share, `right` of `n`."""
    z2, share = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2, right / n
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    # All or none: 1 and 0 are bounds, but for rounding.
    return 0.0 if right == 0 else middle - half, 1.0 if right == n else middle + half


def _count(found: Intervals, right: int, n: int) -> None:
    """Puts in Wilson's interval, which others share where all samples are right, or none is."""
    found.of["accuracy"] = wilson(right, n)
    del found.draws["accuracy"]
    for name in ("balanced_accuracy", "macro_f1", "micro_f1"):
        if name in found.of and right in (0, n):
            found.of[name] = found.of["accuracy"]


def _of_counts(confusion: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws of what a confusion matrix says: samples of a cell are alike."""
    true, predicted = np.nonzero(confusion)
    weight = confusion[true, predicted]
    n, cells, classes = int(weight.sum()), len(weight), len(confusion)
    each, shape = np.arange(cells), (classes, cells)
    of_true, of_predicted = _summed(true, each, shape), _summed(predicted, each, shape)
    diagonal = true == predicted
    found: dict[str, list[np.ndarray]] = {}
    at_once = max(1, HELD // (cells + classes))
    for begin in range(0, DRAWS, at_once):
        drawn = rng.multinomial(n, weight / n, size=min(at_once, DRAWS - begin))
        drawn = np.vstack([weight, drawn] if begin == 0 else [drawn]).T.astype(float)
        support, said = of_true @ drawn, of_predicted @ drawn
        right = of_true @ (drawn * diagonal[:, None])
        occurs = support + said > 0
        accuracy = right.sum(0) / n
        one = {
            "accuracy": accuracy,
            "balanced_accuracy": _ratio(right, support).sum(0) / (support > 0).sum(0),
            "macro_f1": _ratio(2 * right, support + said).sum(0) / occurs.sum(0),
        }
        for name, values in one.items():
            found.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _of_samples(
    ranked: list[tuple[np.ndarray, np.ndarray]],
    right: np.ndarray,
    confidence: np.ndarray,
    means: dict[str, np.ndarray],
    rng: np.random.Generator,
    work: int,
    fewest: int,
) -> dict[str, np.ndarray]:
    """Draws of what each sample's probabilities are needed for."""
    n = len(right)
    found: dict[str, list[np.ndarray]] = {}
    # Of each bin, what a sample adds to the sum of truth - confidence.
    bins = metrics.bin_of(np.clip(confidence, 0, 1)).reshape(n, -1)
    off = (right - np.clip(confidence, 0, 1)).reshape(n, -1)
    added = np.stack([(off * (bins == number)).sum(1) for number in range(metrics.BINS)])
    decisions = off.size
    afforded = work // (n * len(ranked))
    left = 1 + max(fewest, afforded) if 2 * afforded >= fewest else 0
    for weights in _weights(n, min(DRAWS, max(FEWEST, work // n)), rng):
        gap = np.abs(added @ weights).sum(0) / decisions
        found.setdefault("ece", []).append(gap)
        for name, values in means.items():
            found.setdefault(name, []).append(values @ weights / n)
        if left:
            some = weights[:, :left]
            areas, precisions = zip(*(_ranked(*one, some) for one in ranked), strict=True)
            found.setdefault("auroc", []).append(_mean(np.stack(areas)))
            found.setdefault("average_precision", []).append(_mean(np.stack(precisions)))
            left -= some.shape[1]
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _weights(n: int, draws: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each sample was drawn: float32 [n, some]; first the samples as they are."""
    at_once = max(1, HELD // n)
    for begin in range(0, draws, at_once):
        some = min(at_once, draws - begin)
        drawn = rng.integers(n, size=(some, n)) + np.arange(some)[:, None] * n
        counts = np.bincount(drawn.ravel(), minlength=some * n).reshape(some, n)
        counts = np.vstack([np.ones_like(counts[:1]), counts]) if begin == 0 else counts
        yield np.ascontiguousarray(counts.T, dtype=np.float32)


def _ranked(
    positive: np.ndarray, probability: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Area under the ROC curve and average precision of weighted samples.

    scikit-learn has both, for one set of weights at a time, which would take a thousand times as
    long.

    Args:
        positive: bool [n].
        probability: float [n].
        weights: float32 [n, B], counts.

    Returns:
        Two float64 [B]; NaN where a draw has no positive, for the area also where it has no other.
    """
    level = np.unique(-probability, return_inverse=True)[1]  # those that are alike share theirs
    mixed = np.zeros(level.max() + 1, bool)
    mixed[level[positive]] = True
    # Each level that holds a positive is a row; what lies between two of them is summed up in one.
    row = (2 * np.cumsum(mixed) - mixed)[level]
    gained, every = (
        _summed(row[some], np.nonzero(some)[0], (row.max() + 1, len(row))) @ weights
        for some in (positive, np.ones_like(positive))
    )
    true, every = np.cumsum(gained, axis=0), np.cumsum(every, axis=0)
    false = every - true
    with np.errstate(invalid="ignore", divide="ignore"):
        middle = true - gained / 2
        area = (middle * np.diff(false, axis=0, prepend=0)).sum(0, dtype=np.float64)
        area = area / (true[-1].astype(np.float64) * false[-1])
        precision = (gained * _ratio(true, every)).sum(0, dtype=np.float64) / true[-1]
    return area, precision


def _summed(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> Any:
    """The sparse matrix of ones that sums entries into rows."""
    from scipy.sparse import csr_array

    return csr_array((np.ones(len(rows), np.float32), (rows, columns)), shape=shape)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Quotients; 0 where there is nothing to divide by."""
    quotient: np.ndarray = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return quotient


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the classes [C, B] that a draw defines; NaN where it defines none."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        mean: np.ndarray = np.where(known, values, 0).sum(0) / known.sum(0)
    return mean


def _calibrated(confidence: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The calibration error where each is right as often as its confidence says, drawn anew."""
    confidence = np.clip(confidence, 0, 1)
    bins, n = metrics.bin_of(confidence), len(confidence)
    draws = min(DRAWS // 5, max(FEWEST, WORK // n))
    off = ((rng.random(n) < confidence) - confidence for _ in range(draws))
    return np.array([np.abs(np.bincount(bins, one)).sum() / n for one in off])


def _intervals(values: dict[str, np.ndarray], by_chance: np.ndarray | None) -> Intervals:
    """The middle of each figure's draws, which follow its value of the samples as they are."""
    tail = (1 - LEVEL) / 2
    found = Intervals({}, {}, None if by_chance is None else float(by_chance.mean()))
    for name, column in values.items():
        point, draws = column[0], column[1:][~np.isnan(column[1:])]
        if not len(draws):
            continue
        low, high = np.quantile(draws, (tail, 1 - tail))
        bias = 0.0 if name in SUMS else draws.mean() - point
        if name == "ece":
            chance = by_chance is not None and point <= np.quantile(by_chance, LEVEL)
            low = 0.0 if chance else 2 * point - high + bias
        low, high = low - bias, high - bias
        most = np.inf if name == "loss" else 1.0
        found.of[name] = (float(np.clip(low, 0, most)), float(np.clip(high, 0, most)))
        found.draws[name] = len(draws)
    return found
