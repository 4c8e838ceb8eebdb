"""What fine-tuning does with labels: which options they allow, weights of classes, their order."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfdistill.data.errors import UserError
from selfdistill.data.loading.balanced import classes_of
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.schema import Config
from selfdistill.engine.runtime.distributed import main_only


def check_labels(train: Manifest, config: Config | None = None) -> None:
    """Refuses a training split without labels, or with a class that none of its samples has.

    Args:
        train: the split.
        config: refused, too, are options that its labels do not allow.

    Raises:
        UserError: says which.
    """
    if not train.classes:
        raise UserError(
            f"{train.root} has no labels: fine-tuning needs a set packed with its classes; stages 1"
            " and 2 run alone (--stage pretrain, --stage distill)"
        )
    if 0 in train.class_counts:
        empty = train.classes[train.class_counts.index(0)]
        raise UserError(
            f"{train.root}: class {empty!r} has no training sample: add some, or pack without it"
        )
    if config is not None:
        _check_options(train, config)


def _check_options(train: Manifest, config: Config) -> None:
    plan = config.finetune
    single = {
        "class_weights balanced": plan.class_weights != "none",
        "sampler balanced": plan.sampler != "none",
        f"label_smoothing {plan.label_smoothing:g}": plan.label_smoothing > 0,
        "regularizer r3f": plan.regularizer == "r3f",
        "metric balanced_accuracy": plan.metric == "balanced_accuracy",
    }
    for option, given in single.items():
        if given and train.several:
            raise UserError(
                f"--finetune.{option} is for one label a sample, those of {train.root} may have"
                " several: leave it out"
            )
    if plan.sampler != "none" and config.data.partitions > 1:
        raise UserError(
            f"--finetune.sampler balanced takes samples from all shards, and --data.partitions"
            f" {config.data.partitions} divides them: take 1"
        )


def check_pairs(config: Config, world: int) -> None:
    """Refuses to mix the neighbours of a batch where a rank has an odd number of them.

    Raises:
        UserError: names a batch that fits.
    """
    plan = config.finetune
    unit = 2 * world * plan.accumulation
    if (plan.mixup or plan.cutmix) and plan.batch % unit:
        name = "mixup" if plan.mixup else "cutmix"
        raise UserError(
            f"--finetune.{name} mixes neighbours of a batch, and --finetune.batch {plan.batch} on"
            f" {world} ranks x {plan.accumulation} micro-batches leaves one alone: give"
            f" {-(-plan.batch // unit) * unit}"
        )


def class_weights(train: Manifest, config: Config) -> Tensor | None:
    """Weights of the classes in the loss, fp32 [C]; None where all are equal.

    `balanced`: n / (C n_c), scikit-learn's, times what makes the smallest 1. The weighted mean does
    not depend on that factor, and a batch never weighs less than its samples.
    """
    if config.finetune.class_weights == "none":
        return None
    rare = 1 / torch.tensor(train.class_counts, dtype=torch.float64)
    return (rare / rare.min()).float()


def balanced(run: Run, train: Manifest) -> NDArray[np.int64] | None:
    """The class of every sample, int64 [N], by which each comes equally often; None: as they are.

    Every rank calls it; one reads.
    """
    if run.config.finetune.sampler == "none":
        return None
    data = run.config.data
    found: NDArray[np.int64] | None = main_only(
        run.ranks, lambda: classes_of(train, data.cache_dir, data.cache_gb)
    )
    return found
