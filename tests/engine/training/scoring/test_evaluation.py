"""Scores against scikit-learn on the whole set, on one process and on real process groups."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch.nn import functional as F

from selfdistill.engine.training.scoring.evaluation import Scores, Tally

CLASSES, SAMPLES = 7, 203


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels; class 5 is never a label, class 6 neither a label nor predicted."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (SAMPLES,), generator=generator)
    logits = torch.randn(SAMPLES, CLASSES, generator=generator)
    logits[torch.arange(SAMPLES), labels] += 1.0
    logits[:, 6] = -10
    return logits, labels


def check(scores: Scores, counted: np.ndarray) -> None:
    """Compares with scikit-learn over the samples that count."""
    logits, labels = (t[torch.from_numpy(counted)] for t in data())
    predicted = logits.argmax(1)
    assert scores.n == len(counted)
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(labels, predicted), abs=1e-12)
    for average, value in (("macro", scores.macro_f1), ("micro", scores.micro_f1)):
        assert value == pytest.approx(
            metrics.f1_score(labels, predicted, average=average), abs=1e-12
        )
    assert scores.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    matrix = metrics.confusion_matrix(labels, predicted, labels=range(CLASSES))
    np.testing.assert_array_equal(scores.confusion, matrix)
    assert scores.confusion.dtype == np.int64
    assert scores.balanced_accuracy == pytest.approx(
        metrics.recall_score(labels, predicted, labels=labels.unique(), average="macro"), abs=1e-12
    )


def check_kept(scores: Scores, counted: np.ndarray) -> None:
    """What needs probabilities, against scikit-learn's multi-class AUROC of the classes present."""
    logits, labels = (t[torch.from_numpy(counted)] for t in data())
    shares = logits.double().softmax(1).numpy()
    areas = [
        metrics.roc_auc_score(labels == number, shares[:, number]) for number in labels.unique()
    ]
    assert scores.ranked["auroc"] == pytest.approx(np.mean(areas), abs=1e-12)
    assert set(scores.ranked) == {"auroc", "average_precision", "ece"}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        assert scores.kept is not None
        assert scores.kept.ids.tolist() == counted.tolist()
        assert scores.kept.labels.tolist() == labels.tolist()
        assert (scores.kept.logits == logits.numpy()).all()
        np.testing.assert_allclose(scores.kept.probabilities(), shares)
    else:
        assert scores.kept is None


def feed(tally: Tally, ids: np.ndarray, valid: np.ndarray, batch: int = 16) -> None:
    logits, labels = data()
    for begin in range(0, len(ids), batch):
        rows = torch.from_numpy(ids[begin : begin + batch])
        counts = torch.from_numpy(valid[begin : begin + batch])
        # Padded rows have labels and logits that would spoil every figure.
        seen = torch.where(counts, labels[rows], -1)
        guessed = torch.where(counts[:, None], logits[rows], torch.nan)
        tally.add(guessed, seen, counts, rows)


def test_whole_set_on_one_process() -> None:
    tally = Tally(CLASSES, keep=True)
    ids = np.arange(SAMPLES)
    feed(tally, ids[::-1].copy(), np.ones(SAMPLES, dtype=bool))
    scores = tally.gather()
    check(scores, ids)
    check_kept(scores, ids)


def test_padded_and_repeated_samples_count_once() -> None:
    tally = Tally(CLASSES)
    ids = np.concatenate([np.arange(100), np.arange(50), np.zeros(9, dtype=np.int64)])
    valid = np.ones(len(ids), dtype=bool)
    valid[-9:] = False
    valid[:3] = False  # id 0 to 2 first come as padding, then truly
    feed(tally, ids, valid)
    check(tally.gather(), np.arange(100))


def test_bf16_logits_and_names_for_the_result() -> None:
    logits, labels = data()
    tally = Tally(CLASSES)
    tally.add(
        logits.bfloat16(), labels, torch.ones(SAMPLES, dtype=torch.bool), torch.arange(SAMPLES)
    )
    scores = tally.gather()
    expected = float(F.cross_entropy(logits.bfloat16().float(), labels))
    assert scores.loss == pytest.approx(expected, rel=1e-6)
    record = scores.as_dict("val")
    assert set(record) == {
        "val_accuracy",
        "val_macro_f1",
        "val_micro_f1",
        "val_loss",
        "val_balanced_accuracy",
        "val_samples",
    }
    assert record["val_accuracy"] == scores.scalars()["accuracy"] == scores.accuracy
    assert record["val_samples"] == SAMPLES


def test_nothing_to_score_is_said() -> None:
    with pytest.raises(ValueError, match="no labelled sample"):
        Tally(CLASSES).gather()


def shares(world: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """What each rank holds, (ids, valid): uneven, padded, some ids on two ranks, one rank empty."""
    if world == 2:
        first = np.concatenate([np.arange(0, 131), np.zeros(13, dtype=np.int64)])
        second = np.concatenate([[60, 130, 60], np.arange(131, SAMPLES)])
        return [(first, np.arange(len(first)) < 131), (second, np.ones(len(second), dtype=bool))]
    middle = np.arange(90, SAMPLES)
    return [
        (np.arange(0, 120), np.ones(120, dtype=bool)),
        (middle, np.ones(len(middle), dtype=bool)),
        (np.empty(0, dtype=np.int64), np.empty(0, dtype=bool)),
    ]


def test_ranks_together_score_as_one(tmp_path: Path) -> None:
    """Real processes over gloo, each with its own share."""
    # Forked from one process that has imported these: they cost each rank seconds otherwise.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "sklearn.metrics"])
    for world in (2, 3):
        store = str(tmp_path / f"rendezvous-{world}")
        with ProcessPoolExecutor(world, mp_context=context) as pool:
            ranks = [pool.submit(one_rank, store, world, rank) for rank in range(world)]
            for rank in ranks:
                rank.result(timeout=600)


def one_rank(store: str, world: int, rank: int) -> None:
    """A rank of the group: its share in, the scores of all out."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    tally = Tally(CLASSES)
    feed(tally, *shares(world)[rank])
    scores = tally.gather()
    check(scores, np.arange(SAMPLES))
    assert scores.kept is None
    assert not scores.ranked
    tally = Tally(CLASSES, keep=True)
    feed(tally, *shares(world)[rank])
    scores = tally.gather()
    check(scores, np.arange(SAMPLES))
    check_kept(scores, np.arange(SAMPLES))
    torch.distributed.destroy_process_group()
