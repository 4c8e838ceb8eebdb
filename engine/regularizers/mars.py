"""MARS (Gouk et al. 2021, arXiv 2002.08253): how far each row of a weight matrix may go.

After every update the rows of W - W_init are rescaled so that the largest absolute row sum (the
maximum absolute row sum norm, MARS) is at most a radius. (`timm.optim.mars` is something else.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints import training_state
from selfdistill.engine.config.schema import Config
from selfdistill.engine.config.sections import MarsSection
from selfdistill.engine.regularizers.base import Regularizer
from selfdistill.engine.runtime import zero
from selfdistill.engine.runtime.distributed import Ranks


def project(weight: Tensor, start: Tensor | None, radius: float) -> Tensor:
    """The weight with every row of its difference from `start` held to a radius.

    Rows within it stay as they are, bit for bit.

    Args:
        weight: fp32 [out, ...]; a convolution's rows are its output channels' kernels.
        start: the same shape; None for zeros.
        radius: largest sum of absolute values of a row.
    """
    rows = weight.flatten(1)
    origin = torch.zeros_like(rows) if start is None else start.flatten(1)
    away = rows - origin
    size = away.abs().sum(1, keepdim=True)
    held = torch.where(size > radius, origin + away * (radius / size), rows)
    return held.view_as(weight)


class Projection:
    """Projects an engine's weight matrices, in the masters and in what the forward pass uses.

    Those of linear and convolutional layers: embeddings, biases and norms are no linear maps of
    activations, and are left free. Under ZeRO 1 and 2 a master is cut anywhere, through rows as
    well; but every rank has all weights for its forward pass, which are the masters' own values,
    but under fp16, where the masters are gathered one after another.

    Args:
        engine: Of a classifier's objective, under ZeRO 0, 1 or 2.
        start: Weights of the encoder that the radius is taken around; what it lacks is fresh.
        settings: The radii.
        ranks: This process.
        precision: fp32, bf16 or fp16.
    """

    def __init__(
        self,
        engine: Any,
        start: Mapping[str, Tensor],
        settings: MarsSection,
        ranks: Ranks,
        precision: str,
    ) -> None:
        self.how, self.whole = training_state.layout(engine, ranks.rank), precision != "fp16"
        dtype = torch.float32 if self.whole else torch.float16
        self.held: list[tuple[Tensor, Tensor | None, float]] = []
        known = {}
        for name, parameter in matrices(engine.module.model.encoder):
            if name in start:
                # As the engine began: DeepSpeed makes its masters from weights that it has cast.
                known[parameter] = start[name].to(ranks.device, dtype).float()
        for _, parameter in matrices(engine.module.model):
            origin = known.get(parameter)
            radius = settings.head_radius if origin is None else settings.radius
            if math.isfinite(radius) and parameter.requires_grad:
                self.held.append((parameter, origin, radius))

    @torch.no_grad()
    def __call__(self) -> None:
        """Projects, after the optimiser's step. Every rank calls it."""
        for parameter, origin, radius in self.held:
            value = parameter.data
            if not self.whole:
                value = self.how.get(parameter, training_state.WEIGHT)
            value = project(value, origin, radius)
            self.how.set(parameter, training_state.WEIGHT, value)
            parameter.data.copy_(value)


def matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of a module's linear and convolutional layers."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            yield f"{name}.weight", part.weight


def check(config: Config) -> None:
    """Refuses layouts in which no rank has a whole row.

    Raises:
        UserError: ZeRO 3, or offload.
    """
    content = zero.read(config.zero)
    offload = zero.offloads(content)
    if offload or zero.stage_of(content) == 3:
        why = "keeps the weights in host memory" if offload else "cuts each weight matrix"
        raise UserError(
            f"--finetune.regularizer mars: --zero {config.zero} {why}, and rows are projected"
            " whole: take zero0, zero1 or zero2"
        )


class Mars(Regularizer):
    """`--finetune.regularizer mars`."""

    section = "mars"

    def check(self, steps: int) -> None:
        """See `Regularizer`."""
        check(self.config)

    def start(self, engine: Any) -> None:
        """See `Regularizer`."""
        start, config = self.weights.encoder, self.config
        self.projection = Projection(engine, start, config.mars, self.run.ranks, config.precision)

    def after_update(self) -> None:
        """See `Regularizer`."""
        self.projection()
