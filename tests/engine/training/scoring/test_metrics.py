"""Figures and their intervals against scikit-learn and torchmetrics, and in a simulation."""

import warnings

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from scipy.stats import binomtest
from sklearn import metrics as sk
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_auroc,
    multiclass_average_precision,
    multiclass_calibration_error,
    multilabel_auroc,
    multilabel_average_precision,
)

from selfdistill.engine.training.scoring import intervals, metrics

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray]


def single(n: int, classes: int, *, without: int = 0, skill: float = 2.0, seed: int = 0) -> Arrays:
    """Labels, probabilities and their confusion matrix; the last classes have no sample."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes - without, n)
    logits = rng.normal(size=(n, classes)).astype(np.float32)
    logits[np.arange(n), labels] += skill
    logits = logits.round(1)  # some are alike
    matrix = sk.confusion_matrix(labels, logits.argmax(1), labels=range(classes))
    return labels, softmax(logits.astype(np.float64), axis=1), matrix


def several(n: int, classes: int, *, without: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    labels = rng.random((n, classes)) < 0.3
    labels[:, classes - without :] = False
    return labels, expit((rng.normal(size=(n, classes)) + 2 * labels - 1).round(1))


@pytest.mark.parametrize(
    ("n", "classes", "without"), [(203, 7, 2), (1000, 30, 0), (57, 2, 0), (9, 2, 0), (31, 40, 25)]
)
def test_figures_of_one_class_a_sample(n: int, classes: int, without: int) -> None:
    labels, probabilities, matrix = single(n, classes, without=without)
    predicted = probabilities.argmax(1)
    found = metrics.of_confusion(matrix) | metrics.of_probabilities(labels, probabilities)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that were predicted and have no sample
        wanted = {
            "accuracy": sk.accuracy_score(labels, predicted),
            "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
            "macro_f1": sk.f1_score(labels, predicted, average="macro"),
            "micro_f1": sk.f1_score(labels, predicted, average="micro"),
        }
    own, there = torch.from_numpy(probabilities), np.unique(labels)
    target = torch.from_numpy(labels)
    error = multiclass_calibration_error(own, target, classes, n_bins=15, norm="l1")
    wanted["ece"] = float(error)
    if classes == 2:
        wanted["auroc"] = sk.roc_auc_score(labels, probabilities[:, 1])
        wanted["average_precision"] = sk.average_precision_score(labels, probabilities[:, 1])
    else:
        for name, function in (
            ("auroc", multiclass_auroc),
            ("average_precision", multiclass_average_precision),
        ):
            each = function(own, target, classes, average=None)
            wanted[name] = float(each[there].mean())
    assert found == pytest.approx(wanted, abs=1e-6)
    if not without and classes > 2:
        area = sk.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
        assert found["auroc"] == pytest.approx(area, abs=1e-12)

    table = metrics.by_class(matrix)
    columns = sk.precision_recall_fscore_support(
        labels, predicted, labels=range(classes), zero_division=np.nan
    )
    for number, row in enumerate(table):
        for value, column in zip((row.precision, row.recall, row.f1), columns, strict=False):
            assert (np.nan if value is None else value) == pytest.approx(
                column[number], nan_ok=True
            )
        assert row.support == columns[3][number] == (labels == number).sum()
        assert row.predicted == (predicted == number).sum()


@pytest.mark.parametrize(("n", "classes", "without"), [(203, 7, 2), (500, 20, 0), (40, 2, 1)])
def test_figures_of_several_labels_a_sample(n: int, classes: int, without: int) -> None:
    labels, probabilities = several(n, classes, without=without)
    predicted = probabilities >= 0.5
    found = metrics.of_sets(labels, probabilities)
    there = np.nonzero(labels.any(0))[0]
    own, target = torch.from_numpy(probabilities), torch.from_numpy(labels).int()
    wanted = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "macro_f1": np.nanmean(sk.f1_score(labels, predicted, average=None, zero_division=np.nan)),
        "micro_f1": sk.f1_score(labels, predicted, average="micro"),
        "auroc": multilabel_auroc(own, target, classes, average=None)[there].mean(),
        "average_precision": multilabel_average_precision(own, target, classes, average=None)[
            there
        ].mean(),
        "ece": binary_calibration_error(own.flatten(), target.flatten(), n_bins=15, norm="l1"),
    }
    assert found == pytest.approx({k: float(v) for k, v in wanted.items()}, abs=1e-6)
    rows = metrics.by_class_of_sets(labels, probabilities)
    assert [row.support for row in rows] == labels.sum(0).tolist()
    recalls = sk.recall_score(labels, predicted, average=None, zero_division=np.nan)
    for row, recall in zip(rows, recalls, strict=True):
        assert (np.nan if row.recall is None else row.recall) == pytest.approx(recall, nan_ok=True)


def test_classes_that_do_not_occur_lower_no_f1() -> None:
    """A model of many classes that is right on a set of few has 1, as with one class a sample."""
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], bool)
    found = metrics.of_sets(labels, labels.astype(float))
    assert found["macro_f1"] == found["micro_f1"] == 1
    assert intervals.of_sets(labels, labels.astype(float)).of["macro_f1"] == intervals.wilson(3, 3)
    alone = metrics.of_sets(labels[:, [0, 2]], np.array([[1.0, 0], [0, 0], [0, 0]]))
    assert alone["macro_f1"] == alone["micro_f1"] == pytest.approx(2 / 3)
    row = metrics.by_class_of_sets(labels[:, :1], np.array([[1.0], [1], [0]]))
    assert row == [metrics.OfClass(0.5, 0.5, 0.5, support=2, predicted=2)]
    none = metrics.by_class_of_sets(labels[:, 2:], np.zeros((3, 1)))
    assert none == [metrics.OfClass(None, None, None, support=0, predicted=0)]
    # One that is predicted and never there counts.
    false = labels + np.array([0.0, 0, 1])
    assert metrics.of_sets(labels, false)["macro_f1"] == pytest.approx(2 / 3)


def test_what_the_samples_do_not_define_is_left_out() -> None:
    probabilities = softmax(np.random.default_rng(0).normal(size=(5, 2)), axis=1)
    assert set(metrics.of_probabilities(np.zeros(5, int), probabilities)) == {"ece"}
    of_one = metrics.of_probabilities(np.ones(5, int), probabilities)
    assert set(of_one) == {"average_precision", "ece"}
    assert of_one["average_precision"] == 1
    matrix = np.array([[5, 0], [0, 0]])
    found = intervals.of_classes(matrix, np.zeros(5, int), probabilities)
    assert set(found.of) == {"accuracy", "balanced_accuracy", "macro_f1", "micro_f1", "ece", "loss"}
    nothing = metrics.of_sets(np.zeros((5, 2), bool), probabilities)
    assert set(nothing) == {"accuracy", "macro_f1", "micro_f1", "ece"}


def test_draws_weigh_samples_as_scikit_learn_does() -> None:
    """The draws' own code, which is written for speed, in the samples as they are and drawn."""
    labels, probabilities, matrix = single(150, 5, without=1)
    rng = np.random.default_rng(3)
    for weights in intervals._weights(150, 20, rng):
        assert (weights[:, 0] == 1).all()
        assert (weights.sum(0) == 150).all()
        for positive, probability in metrics.against_rest(labels, probabilities):
            areas, precisions = intervals._ranked(positive, probability, weights)
            for column in range(20) if positive.any() else ():
                weight = weights[:, column]
                area = sk.roc_auc_score(positive, probability, sample_weight=weight)
                precision = sk.average_precision_score(positive, probability, sample_weight=weight)
                assert areas[column] == pytest.approx(area, abs=1e-6)
                assert precisions[column] == pytest.approx(precision, abs=1e-6)
    values = intervals._of_counts(matrix, rng)
    first = {name: float(column[0]) for name, column in values.items()}
    wanted = metrics.of_confusion(matrix)
    assert first == pytest.approx({name: wanted[name] for name in first}, abs=1e-12)
    assert all(len(column) == intervals.DRAWS + 1 for column in values.values())
    assert values["accuracy"][1:].std() == pytest.approx(
        (wanted["accuracy"] * (1 - wanted["accuracy"]) / 150) ** 0.5, rel=0.1
    )


def test_intervals_hold_their_figure_and_repeat() -> None:
    labels, probabilities, matrix = single(400, 6)
    found = intervals.of_classes(matrix, labels, probabilities, seed=1)
    assert found == intervals.of_classes(matrix, labels, probabilities, seed=1)
    assert found != intervals.of_classes(matrix, labels, probabilities, seed=2)
    point = metrics.of_confusion(matrix) | metrics.of_probabilities(labels, probabilities)
    point["loss"] = sk.log_loss(labels, probabilities)
    assert set(found.of) == set(point)
    for name, (low, high) in found.of.items():
        assert low < point[name] < high, name
        assert high - low < 0.2, name
    sets, chances = several(400, 6)
    several_found = intervals.of_sets(sets, chances)
    several_point = metrics.of_sets(sets, chances)
    assert set(several_found.of) == set(several_point)
    for name, (low, high) in several_found.of.items():
        assert low < several_point[name] < high, name
    # More work than is allowed: the ranked figures alone are left out.
    cheap = intervals.of_classes(matrix, labels, probabilities, seed=1, work=100)
    assert set(found.of) - set(cheap.of) == {"auroc", "average_precision"}
    few = intervals.of_classes(matrix, labels, probabilities, seed=1, work=400 * 6 * 70)
    assert few.draws["auroc"] == intervals.FEWEST < few.draws["macro_f1"] == intervals.DRAWS


def test_shares_have_the_interval_of_wilson() -> None:
    """As scipy has it; a model without a mistake has no interval of no width."""
    for right, n in ((0, 5), (3, 5), (20, 20), (49, 50), (961, 1000)):
        low, high = binomtest(right, n).proportion_ci(method="wilson")
        assert intervals.wilson(right, n) == pytest.approx((low, high), abs=1e-12)
    found = intervals.of_classes(np.diag([12, 8]))
    assert found.of["accuracy"] == found.of["macro_f1"] == (pytest.approx(0.8389, abs=1e-4), 1)
    few = [np.random.default_rng(seed).binomial(50, 0.97) for seed in range(1000)]
    covered = [low <= 0.97 <= high for low, high in (intervals.wilson(one, 50) for one in few)]
    assert 0.91 < np.mean(covered) < 0.97  # the bootstrap's held it in 78%


def test_intervals_cover_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets from a known distribution: about 95% of the intervals hold the true figure."""
    big, chances, matrix = single(100_000, 3, skill=1.5, seed=99)
    counted, ranked = metrics.of_confusion(matrix), metrics.of_probabilities(big, chances)
    held = dict.fromkeys((*counted, *ranked, "calibrated"), 0)
    for seed in range(300):
        found = intervals.of_classes(single(150, 3, skill=1.5, seed=seed)[2], seed=seed)
        for name, value in counted.items():
            held[name] += found.of[name][0] <= value <= found.of[name][1]
    monkeypatch.setattr(intervals, "DRAWS", 200)
    for seed in range(100):
        labels, probabilities, matrix = single(150, 3, skill=1.5, seed=seed)
        found = intervals.of_classes(matrix, labels, probabilities, seed=seed)
        for name, value in ranked.items():
            held[name] += found.of[name][0] <= value <= found.of[name][1]
        # Labels drawn from the probabilities themselves: nothing is better calibrated.
        rng = np.random.default_rng(seed)
        drawn = (rng.random((150, 1)) > probabilities.cumsum(1)).sum(1).clip(max=2)
        matrix = sk.confusion_matrix(drawn, probabilities.argmax(1), labels=range(3))
        held["calibrated"] += intervals.of_classes(matrix, drawn, probabilities).of["ece"][0] == 0
    for name in counted:
        assert 0.92 * 300 <= held[name] <= 0.98 * 300, held
    assert all(held[name] >= 85 for name in (*ranked, "calibrated")), held
