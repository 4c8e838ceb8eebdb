"""Sections of the configuration, one a stage: length, batch, optimiser, what is peculiar to it."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from selfdistill.data.errors import UserError
from selfdistill.engine.config.sections import Section


class StageSection(Section):
    """What every stage has: length, batch, optimiser (AdamW, decay to 0)."""

    steps: int | None = Field(None, ge=1, description="optimiser steps")
    epochs: float | None = Field(None, gt=0, description="length in passes over the train split")
    batch: int = Field(64, ge=1, description="global batch")
    accumulation: int = Field(1, ge=1, description="micro-batches per step and rank")
    lr: float = Field(1.5e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW, such as 0.9,0.95")
    eps: float = Field(1e-8, gt=0)
    warmup: float = Field(
        0, ge=0, description="linear warm-up: steps, or below 1 the share of the stage's"
    )
    schedule: Literal["linear", "cosine"] = Field(
        "linear", description="how the rate falls to 0 after the warm-up"
    )
    clip: float = Field(0.0, ge=0, description="gradient norm limit (0 = none)")

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("betas")
    @classmethod
    def _below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both must be at least 0 and below 1")
        return value

    @field_validator("warmup")
    @classmethod
    def _steps_or_share(cls, value: float) -> float:
        if value >= 1 and not value.is_integer():
            raise ValueError("give whole steps, or a share below 1")
        return int(value) if value.is_integer() else value

    @model_validator(mode="after")
    def _one_length(self) -> StageSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give steps or epochs, one of the two")
        return self

    def length(self, samples: int) -> int:
        """Number of optimiser steps for a train split of `samples`."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * samples / self.batch))

    def warmup_steps(self, steps: int) -> int:
        """Steps of warm-up of a stage of `steps`."""
        return int(self.warmup) if self.warmup >= 1 else round(self.warmup * steps)

    def check_warmup(self, stage: str, steps: int) -> None:
        """Refuses a warm-up that is as long as the stage.

        Raises:
            UserError: names the option, and a value that fits.
        """
        if self.warmup_steps(steps) >= steps:
            raise UserError(
                f"--{stage}.warmup {self.warmup}: the stage has {steps} steps, and the rate would"
                f" never be reached: give fewer, such as {steps // 10}"
            )


class KeptSection(StageSection):
    """A stage whose model is measured on the way: which weights it leaves, and when it stops."""

    keep: Literal["last", "best"] = Field(
        "last", description="the weights that are left: the last, or those that measured best"
    )
    patience: int = Field(
        0, ge=0, description="stop after so many measurements without a better one (0 = never)"
    )

    @property
    def judged(self) -> bool:
        """Whether the stage's weights, or its length, depend on what is measured."""
        return self.keep == "best" or self.patience > 0


class DecoderSection(StageSection):
    """Stage 0: a decoder, on the frozen encoder, for models that come without."""

    steps: int | None = Field(1000, ge=1, description="optimiser steps")
    lr: float = Field(1e-3, gt=0)
    data: str | None = Field(
        None, description="packed data set to learn from (left out: the target's own)"
    )
    auto: bool = Field(True, description="with --stage all, where the model has no decoder")
    width: int | None = Field(
        None, gt=0, multiple_of=32, description="of a new decoder for images (left out: 512)"
    )
    depth: int | None = Field(None, gt=0, le=1024, description="its blocks (left out: 8)")


class PretrainSection(KeptSection):
    """Stage 1: further pre-training (Algorithm 2)."""

    steps: int | None = Field(20_000, ge=1, description="optimiser steps")
    objective: Literal["mae", "supcon", "diet"] = Field(
        "mae",
        description="masked auto-encoding; as baselines the supervised contrastive loss on labels,"
        " or telling samples apart",
    )


class DistillSection(KeptSection):
    """Stage 2: self-distillation (Algorithm 1, Eq. 3)."""

    steps: int | None = Field(20_000, ge=1, description="optimiser steps")
    feature: Literal["auto", "cls", "mean", "tokens"] = Field(
        "auto", description="distilled (auto = what the model itself pools by)"
    )
    weight: float = Field(1.0, ge=0, description="weight of L_Distill")
    mae_weight: float = Field(1.0, ge=0, description="weight of L_MAE (0 freezes the decoder)")
    match: Literal["feature", "prediction", "weights_l2", "weights_mars"] = Field(
        "feature", description="what L_Distill compares; all but feature are ablations"
    )

    @property
    def settled(self) -> Literal["cls", "mean", "tokens"]:
        """The feature, once the model is known: see `modalities.base.settle_pooling`."""
        assert self.feature != "auto"
        return self.feature

    @model_validator(mode="after")
    def _something_to_learn(self) -> DistillSection:
        if not self.weight and not self.mae_weight:
            raise ValueError("weight and mae_weight are both 0: give one of them more")
        return self


class FinetuneSection(KeptSection):
    """Stage 3: supervised fine-tuning with a fresh head."""

    steps: int | None = Field(10_000, ge=1, description="optimiser steps")
    batch: int = Field(32, ge=1, description="global batch")
    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW, such as 0.9,0.999")
    warmup: float = Field(
        500, ge=0, description="linear warm-up: steps, or below 1 the share of the stage's"
    )
    clip: float = Field(1.0, ge=0, description="gradient norm limit (0 = none)")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="of the rate, from each layer to the one below (1 = none)"
    )
    dropout: float = Field(0.1, ge=0, lt=1)
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="images: stochastic depth, rate of the last block"
    )
    flip: bool = Field(True, description="random horizontal flips")
    crop: tuple[float, float] | None = Field(
        None, description="images: shares of the area that random crops have, such as 0.08,1"
    )
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of the weights' average, which is scored (0 = none)"
    )
    pool: Literal["auto", "cls", "mean"] = Field(
        "auto", description="feature under the classifier (auto = what the model itself pools by)"
    )
    start: str = Field(
        "auto",
        description="auto (the last round) | distill | distill-N (a round) | pretrain | model",
    )
    weights: str | None = Field(None, description="exported model to start from, not the run's own")
    seeds: int = Field(1, ge=1, description="repetitions, seeds seed, seed+1, ...")
    eval_every: int = Field(0, ge=0, description="validation interval in steps (0 = at the end)")
    metric: Literal[
        "auto",
        "accuracy",
        "balanced_accuracy",
        "macro_f1",
        "micro_f1",
        "auroc",
        "average_precision",
    ] = Field(
        "auto", description="in tables (auto = the data set's own, or accuracy); all are kept"
    )
    test: bool = Field(True, description="score the test split at the end (false in searches)")
    train_scored: int = Field(
        10_000, ge=0, description="samples of the train split scored at the end (0 = none)"
    )
    regularizer: Literal["none", "recadam", "mars", "r3f"] = "none"
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="of the loss (balanced = each class weighs the same in all)"
    )
    sampler: Literal["none", "balanced"] = Field(
        "none", description="balanced = each class comes equally often"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of a target that is spread over all classes"
    )
    augment: Literal["none", "light", "strong"] = Field(
        "none", description="images: crops with colours, or TrivialAugment with erasing"
    )
    mixup: float = Field(0.0, ge=0, description="images: alpha of mixup, such as 0.2 (0 = none)")
    cutmix: float = Field(0.0, ge=0, description="images: alpha of CutMix, such as 1 (0 = none)")

    @property
    def settled(self) -> Literal["cls", "mean"]:
        """The pooling, once the model is known: see `modalities.base.settle_pooling`."""
        assert self.pool != "auto"
        return self.pool

    @field_validator("crop", mode="before")
    @classmethod
    def _shares(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("crop")
    @classmethod
    def _in_order(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value and not 0 < value[0] <= value[1] <= 1:
            raise ValueError("give the smallest and the largest share, above 0, at most 1")
        return value

    @field_validator("start")
    @classmethod
    def _known_start(cls, value: str) -> str:
        if not re.fullmatch("auto|model|pretrain|distill(-[1-9][0-9]*)?", value):
            raise ValueError("must be auto, model, pretrain, distill, or distill-N (a round)")
        return value
