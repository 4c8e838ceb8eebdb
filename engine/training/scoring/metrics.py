"""Figures of a classifier, scikit-learn's own, from counts and from probabilities.

Two kinds of labels: one class a sample (`labels` int64 [n]), and several, or none, a sample
(`labels` bool [n, C], functions named `..._of_sets`). Probabilities are float [n, C]. A figure that
the samples do not define, such as AUROC where all are of one class, is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

#: How an F1 is taken over classes.
Average = Literal["macro", "micro"]
#: Bins of confidence, of equal width, in which calibration is looked at (Guo et al., 2017: 15).
BINS = 15
#: A class of a set of labels is predicted from this probability on.
THRESHOLD = 0.5


@dataclass(frozen=True)
class OfClass:
    """One class: shares in 0..1, None where no sample defines it.

    Attributes:
        precision: of what was predicted as it, what is it.
        recall: of what is it, what was predicted as it.
        f1: harmonic mean of both.
        support: samples that are it.
        predicted: samples that were predicted as it.
    """

    precision: float | None
    recall: float | None
    f1: float | None
    support: int
    predicted: int


@dataclass(frozen=True)
class Bin:
    """Samples whose confidence lies in (low, high]: its mean, and the share that is right."""

    low: float
    high: float
    samples: int
    confidence: float
    right: float


def of_confusion(confusion: np.ndarray) -> dict[str, float]:
    """Accuracy, its mean over the classes, and F1.

    Args:
        confusion: int64 [C, C], rows true, columns predicted; one sample at least.

    Returns:
        accuracy; balanced_accuracy, the mean recall of the classes that have samples; macro_f1 over
        the classes that occur, as label or prediction; micro_f1, of all decisions together.
    """
    from sklearn.metrics import f1_score, recall_score  # a second to import

    true, predicted = np.nonzero(confusion)
    weight = confusion[true, predicted]
    macro, micro = (
        float(f1_score(true, predicted, sample_weight=weight, average=average, zero_division=0))
        for average in ("macro", "micro")
    )
    recalls = recall_score(
        true,
        predicted,
        sample_weight=weight,
        labels=np.unique(true),
        average="macro",
        zero_division=0,
    )
    return {
        "accuracy": float(np.trace(confusion)) / int(confusion.sum()),
        "balanced_accuracy": float(recalls),
        "macro_f1": macro,
        "micro_f1": micro,
    }


def of_probabilities(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """What the order and the size of the probabilities are worth.

    Args:
        labels: int64 [n].
        probabilities: float [n, C], rows that sum to 1.

    Returns:
        auroc and average_precision: with two classes of the second one, else the mean over the
        classes, each against the rest, that the samples define. ece: expected calibration error of
        the likeliest class, in `BINS` bins.
    """
    found = _ranking(against_rest(labels, probabilities))
    right, confidence = top(labels, probabilities)
    return found | {"ece": calibration_error(reliability(right, confidence))}


def of_sets(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """Figures of samples with several labels, or none.

    Args:
        labels: bool [n, C].
        probabilities: float [n, C], of each class by itself.

    Returns:
        accuracy: share of samples all of whose classes are right (subset accuracy). macro_f1 (over
        the classes that occur, as label or prediction), micro_f1: at `THRESHOLD`.
        average_precision: its mean over the classes that have samples (mAP). auroc: likewise. ece:
        of all decisions.
    """
    from sklearn.metrics import accuracy_score

    labels = np.asarray(labels, bool)
    predicted = probabilities >= THRESHOLD
    found = {"accuracy": float(accuracy_score(labels, predicted))}
    for average in get_args(Average):
        found[f"{average}_f1"] = f1_of_sets(labels, predicted, average)
    found |= _ranking(zip(labels.T, probabilities.T, strict=True))
    bins = reliability(labels.ravel(), probabilities.ravel())
    return found | {"ece": calibration_error(bins)}


def f1_of_sets(labels: np.ndarray, predicted: np.ndarray, average: Average) -> float:
    """F1 over the classes that occur, as label or prediction; 0 where none does.

    Args:
        labels: bool [n, C].
        predicted: bool [n, C].
        average: macro, the mean of the classes'; micro, of all decisions together.
    """
    from sklearn.metrics import f1_score

    occurs = labels.any(0) | predicted.any(0)
    if not occurs.any():
        return 0.0
    labels, predicted, how = labels[:, occurs], predicted[:, occurs], str(average)
    if occurs.sum() == 1:  # of one column scikit-learn makes two classes, yes and no
        labels, predicted, how = labels.ravel(), predicted.ravel(), "binary"
    return float(f1_score(labels, predicted, average=how, zero_division=0))


def by_class(confusion: np.ndarray) -> list[OfClass]:
    """Precision, recall, F1 and support of each class.

    Args:
        confusion: int64 [C, C], rows true, columns predicted.
    """
    from sklearn.metrics import precision_recall_fscore_support

    true, predicted = np.nonzero(confusion)
    columns = precision_recall_fscore_support(
        true,
        predicted,
        sample_weight=confusion[true, predicted],
        labels=np.arange(len(confusion)),
        zero_division=np.nan,
    )
    return _classes(columns, confusion.sum(0))


def by_class_of_sets(labels: np.ndarray, probabilities: np.ndarray) -> list[OfClass]:
    """The same for bool labels [n, C] and each class's probability, at `THRESHOLD`."""
    from sklearn.metrics import precision_recall_fscore_support

    labels, predicted = np.asarray(labels, bool), probabilities >= THRESHOLD
    counts, only = predicted.sum(0), None
    if len(counts) == 1:  # of one column scikit-learn makes two classes, yes and no
        labels, predicted, only = labels.ravel(), predicted.ravel(), [True]
    columns = precision_recall_fscore_support(
        labels, predicted, labels=only, average=None, zero_division=np.nan
    )
    return _classes(columns, counts)


def _classes(columns: tuple[np.ndarray, ...], predicted: np.ndarray) -> list[OfClass]:
    shares = [[None if np.isnan(v) else float(v) for v in column] for column in columns[:3]]
    counts = [[int(v) for v in column] for column in (columns[3], predicted)]
    rows: Iterable[tuple[Any, ...]] = zip(*shares, *counts, strict=True)
    return [OfClass(*row) for row in rows]


def top(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each sample's likeliest class is right, bool [n], and its probability [n]."""
    return probabilities.argmax(1) == labels, probabilities.max(1)


def reliability(right: np.ndarray, confidence: np.ndarray) -> list[Bin]:
    """Confidence and truth, bin by bin; bins without samples are left out.

    Args:
        right: bool [n].
        confidence: float [n], in 0..1.
    """
    from sklearn.calibration import calibration_curve

    confidence = np.clip(confidence, 0, 1)
    shares, means = calibration_curve(right, confidence, pos_label=True, n_bins=BINS)
    counts = np.bincount(bin_of(confidence), minlength=BINS)
    return [
        Bin(number / BINS, (number + 1) / BINS, int(counts[number]), float(mean), float(share))
        for number, mean, share in zip(np.nonzero(counts)[0].tolist(), means, shares, strict=True)
    ]


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """The bin of each confidence, as scikit-learn's `calibration_curve` deals them."""
    return np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], confidence)


def calibration_error(bins: list[Bin]) -> float:
    """Mean distance of confidence and truth over the samples (expected calibration error)."""
    n = sum(one.samples for one in bins)
    return float(sum(one.samples * abs(one.confidence - one.right) for one in bins) / n)


def against_rest(
    labels: np.ndarray, probabilities: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each class that is ranked: which samples are it, and its probabilities."""
    classes = probabilities.shape[1]
    for number in [1] if classes == 2 else range(classes):
        yield labels == number, probabilities[:, number]


def _ranking(classes: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Means over the classes that have what a figure needs: samples, and for AUROC others too."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    areas, precisions = [], []
    for positive, probability in classes:
        if not positive.any():
            continue
        precisions.append(average_precision_score(positive, probability))
        if not positive.all():
            areas.append(roc_auc_score(positive, probability))
    found = {"auroc": areas, "average_precision": precisions}
    return {name: float(np.mean(values)) for name, values in found.items() if values}
