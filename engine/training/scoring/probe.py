"""What a frozen encoder's features are worth: k-NN, a linear probe, effective rank, spread.

The labels of some train and val samples judge an encoder that is trained without them: the paper's
Figure 1 (further pre-training helps, and from some step on hurts) on one's own data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfdistill.data.loading.loader import Sequential
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.runtime.distributed import main_only, sent, total
from selfdistill.engine.training.modalities.base import Modality, Pooled
from selfdistill.engine.training.objectives import pick
from selfdistill.engine.training.scoring.evaluation import scored_batch
from selfdistill.engine.training.scoring.metrics import f1_of_sets
from selfdistill.engine.training.teacher import view

#: Neighbours that vote, where the classes have as many samples.
NEIGHBOURS = 20
#: Weight, for each sample, of the linear probe's squared norm. On the digits of scikit-learn it is
#: as good as a logistic regression at C = 1, and takes an eighth of the time.
RIDGE = 0.1

Features = NDArray[np.float32]


class Probe:
    """Judges the encoder of an engine by the labels of a fixed part of train and val.

    Args:
        run: the launch.
        modality: of the inputs.
        base: weights that the stage starts from.
        splits: train and val, all of whose samples have labels.
        feature: what is read of a sample's tokens.
    """

    def __init__(
        self,
        run: Run,
        modality: Modality,
        base: Any,
        splits: Mapping[str, Manifest],
        feature: Pooled,
    ) -> None:
        self.run, self.modality, self.base, self.feature = run, modality, base, feature
        self.splits = {split: splits[split] for split in ("train", "val")}
        most = run.config.probe.samples
        self.chosen = {
            "train": spread_out(self.splits["train"].samples, most),
            "val": spread_out(self.splits["val"].samples, -(-most // 2)),
        }
        self.width = (modality.feature_shape(base, feature) or (0,))[0]

    def __call__(self, engine: Any, step: int) -> dict[str, float]:
        """`knn`, `linear`, `rank` and `spread` of the weights of now. Every rank calls it.

        Args:
            engine: of the stage; it is left in the mode of evaluation.
            step: that was taken last, for messages.

        Raises:
            FloatingPointError: a feature is not finite.
            Preempted: the ranks leave.
        """
        engine.eval()
        train, val = (self.features(engine, split, step) for split in ("train", "val"))
        if not all(np.isfinite(features).all() for features, _ in (train, val)):
            raise FloatingPointError(f"step {step}: the encoder's features")
        own = "macro_f1" if self.splits["train"].several else "accuracy"
        metric = str(self.splits["train"].text.get("metric") or own)
        found: dict[str, float] = main_only(self.run.ranks, lambda: judge(*train, *val, metric))
        return found

    @torch.no_grad()
    def features(self, engine: Any, split: str, step: int) -> tuple[Features, NDArray[np.int64]]:
        """Features fp32 [n, D] and labels int64 [n] of a split's chosen samples, in their order.

        Of several labels a sample [n, C], 0 or 1.

        Every rank calls it, and gets all of them; broken samples that may be skipped are left out.
        """
        run, manifest, chosen = self.run, self.splits[split], self.chosen[split]
        ranks = run.ranks
        batches = Sequential(
            manifest,
            batch=scored_batch(run),
            rank=ranks.rank,
            world=ranks.world,
            ids=chosen,
            **run.reading(self.modality.codec(self.base, manifest), require_labels=True),
        )
        # Each row is one rank's, and zero on the others: their sum is exact. The last column says
        # that it is there.
        table = torch.zeros(len(chosen), self.width + 1, device=ranks.device)
        sizes = (len(chosen), *([len(manifest.classes)] if manifest.several else []))
        labels = torch.zeros(sizes, dtype=torch.int64, device=ranks.device)
        with reading(engine.module, self.feature):
            for batch in batches:
                run.boundary(f"probing {split} at step {step}")
                found = engine(**view(batch, self.modality.full, ranks.device))
                here = batch["valid"].nonzero()[:, 0]
                rows = torch.from_numpy(np.searchsorted(chosen, batch["ids"][here].numpy()))
                here, rows, known = (
                    sent(t, ranks.device) for t in (here, rows, batch["labels"][here])
                )
                table[rows, :-1], table[rows, -1], labels[rows] = found[here], 1, known.long()
        whole, named = total(table).cpu().numpy(), total(labels).cpu().numpy()
        there = whole[:, -1] > 0
        return whole[there, :-1], named[there]


def spread_out(samples: int, most: int) -> NDArray[np.int64]:
    """Ids of so many samples at most, from all over a split, lowest first."""
    return np.unique(np.linspace(0, samples - 1, min(samples, most)).astype(np.int64))


@contextmanager
def reading(objective: Any, feature: Pooled) -> Iterator[None]:
    """Within, an objective's forward gives the features [B, D], fp32, of the unmasked view.

    So the engine's own pass serves: ZeRO-3 gathers weights in that alone. A compiled objective is
    run as it was written.
    """
    model, compiled = objective.model, objective._compiled_call_impl

    def forward(**batch: Tensor) -> Tensor:
        tokens, counts = model.encode(cls_only=feature == "cls", **batch)
        return pick(tokens, feature, counts).float()

    objective.forward, objective._compiled_call_impl = forward, None
    try:
        yield
    finally:
        del objective.forward
        objective._compiled_call_impl = compiled


def judge(
    train: Features,
    train_labels: NDArray[np.int64],
    val: Features,
    val_labels: NDArray[np.int64],
    metric: str = "accuracy",
) -> dict[str, float]:
    """What features are worth.

    Args:
        train: fp32 [n, D].
        train_labels: int64 [n]; of several labels a sample [n, C], 0 or 1.
        val: fp32 [m, D].
        val_labels: int64 [m], or [m, C].
        metric: accuracy, macro_f1 or micro_f1.

    Returns:
        `knn`: the metric on val of a vote of the nearest of train, by cosine; `linear`: that of a
        ridge classifier on standardised features; `rank`: RankMe (Garrido et al. 2023), the
        exponential of the entropy of train's singular values; `spread`: the standard deviation of
        train's features of length 1, mean over the dimensions (Chen and He 2021), 0 where all are
        one, 1 / sqrt(D) where they fill the sphere.
    """
    from scipy.stats import entropy
    from sklearn.linear_model import RidgeClassifier
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler, normalize

    classes = train_labels.shape[1] if train_labels.ndim > 1 else len(np.unique(train_labels))
    each = max(1, len(train_labels) // classes)
    models = {
        "knn": KNeighborsClassifier(min(NEIGHBOURS, each), metric="cosine"),
        "linear": make_pipeline(StandardScaler(), RidgeClassifier(RIDGE * len(train))),
    }
    figures: dict[str, float] = {}
    for name, model in models.items():
        found = model.fit(train, train_labels).predict(val)
        if metric == "accuracy":
            figures[name] = float(accuracy_score(val_labels, found))
        else:
            average: Any = metric.removesuffix("_f1")
            figures[name] = (
                f1_of_sets(val_labels, found.astype(bool), average)
                if val_labels.ndim > 1
                else float(f1_score(val_labels, found, average=average, zero_division=0))
            )
    figures["rank"] = float(np.exp(entropy(np.linalg.svd(train, compute_uv=False))))
    figures["spread"] = float(normalize(train).std(axis=0).mean())
    return figures
