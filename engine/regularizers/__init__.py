"""Baselines of fine-tuning: RecAdam, MARS and R3F; SupCon is one of further pre-training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from selfdistill.data.loading.samples import Keyed
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.schema import Config
from selfdistill.engine.regularizers import mars, r3f, recadam
from selfdistill.engine.training.kinds.base import Kind
from selfdistill.engine.training.objectives import ClassifyObjective
from selfdistill.engine.training.views import NoiseKeys, Together


@dataclass
class Regularized:
    """What a regularizer puts into a fine-tuning.

    Attributes:
        objective: module whose forward gives the losses.
        keyed: random numbers by stream position.
        optimizer: objective -> the optimiser; None: AdamW.
        after: engine -> what is called after every update; None: nothing.
        counted: whether a step costs what one of plain fine-tuning does.
    """

    objective: nn.Module
    keyed: Keyed | None
    optimizer: Callable[[nn.Module], Any] | None = None
    after: Callable[[Any], Callable[[], None]] | None = None
    counted: bool = True


def check(run: Run, steps: int) -> None:
    """Refuses a regularizer that cannot work as it is set.

    Args:
        run: The launch.
        steps: Of the fine-tuning.

    Raises:
        UserError: Says why, and the cure.
    """
    config, name = run.config, run.config.finetune.regularizer
    if name == "recadam":
        recadam.check(config, steps)
    elif name == "mars":
        mars.check(config)
    elif name == "r3f" and config.precision != "fp32":
        bits = {"bf16": 8, "fp16": 11}[config.precision]
        run.say_once(
            f"warning: --precision {config.precision} keeps {bits} bits: noise of"
            f" {config.r3f.eps:g} is lost in embeddings that are not as small: take fp32"
        )


def record(config: Config) -> dict[str, Any]:
    """Settings of the regularizer that is used, which must be equal at resume."""
    name = config.finetune.regularizer
    if name == "none":
        return {}
    told = getattr(config, name).model_dump(mode="json").items()
    # JSON has no infinity.
    return {f"{name}.{k}": str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in told}


def choose(run: Run, kind: Kind, model: Any, weights: Any, seed: int) -> Regularized:
    """The fine-tuning that `--finetune.regularizer` names.

    Args:
        run: The launch.
        kind: Of its inputs.
        model: The classifier (`objectives.Classifies`, `.encoder`), on `weights`.
        weights: That it starts from.
        seed: Of the fine-tuning.
    """
    config, ranks = run.config, run.ranks
    plan, keyed = config.finetune, kind.augment(seed)
    name, plain = plan.regularizer, Regularized(ClassifyObjective(model), keyed)
    if name == "r3f" and config.r3f.weight:
        views = (NoiseKeys(seed),) if keyed is None else (keyed, NoiseKeys(seed))
        return Regularized(r3f.R3FObjective(model, config.r3f), Together(views), counted=False)
    if name == "recadam" and config.recadam.c:
        # What the weights do not have (the head, a new pooler) is fresh: nothing to go back to.
        pulled = [p for n, p in model.encoder.named_parameters() if n in weights.encoder]
        plain.optimizer = lambda module: recadam.build(module, pulled, plan, config.recadam)
    if name == "mars":
        plain.after = lambda engine: mars.Projection(
            engine, weights.encoder, config.mars, ranks, config.precision
        )
    return plain
