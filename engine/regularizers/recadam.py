"""RecAdam (Chen et al. 2020, arXiv 2004.12651): Adam with an annealed pull to the start."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.training_state import MOMENTS
from selfdistill.engine.config.schema import Config
from selfdistill.engine.config.sections import RecAdamSection
from selfdistill.engine.config.stages import FinetuneSection
from selfdistill.engine.regularizers.base import Regularizer
from selfdistill.engine.runtime import zero
from selfdistill.engine.training import optimizer as optim

ANCHOR = "anchor"


def annealing(step: int, k: float, t0: float) -> float:
    """lambda(t) = 1 / (1 + exp(-k (t - t0))) of step t, from 1; no number overflows."""
    x = k * (step - t0)
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    small = math.exp(x)  # 0 far below
    return small / (1 + small)


class RecAdam(torch.optim.AdamW):
    """torch's AdamW whose pulled groups go back to where they came from.

    A step of a pulled group: decoupled weight decay, p -= lr wd p; Adam's step at the rate
    lr lambda(t); then p -= lr (1 - lambda(t)) c (p - anchor), which no second moment divides. The
    anchor, the weights before the first step, is state beside Adam's moments, and so it is cut with
    them under ZeRO and saved in checkpoints. Groups that are not pulled take plain AdamW's steps.

    Args:
        groups: parameter groups, each with `pulled`.
        plan: lr, betas and eps.
        settings: c, k, t0.
    """

    def __init__(
        self, groups: list[dict[str, Any]], plan: FinetuneSection, settings: RecAdamSection
    ) -> None:
        super().__init__(groups, lr=plan.lr, betas=plan.betas, eps=plan.eps, fused=True)
        self.settings = settings
        # The module's own parameters: later DeepSpeed puts flat parts into the groups.
        self._pulled = {p for group in groups if group["pulled"] for p in group["params"]}
        self._taken: dict[Tensor, int] = {}

    def keeps(self, parameter: Tensor) -> tuple[str, ...]:
        """Names of the state of one of the module's parameters, for checkpoints."""
        return (*MOMENTS, ANCHOR) if parameter in self._pulled and self.settings.c else MOMENTS

    @torch.no_grad()
    # torch declares a second form, which returns a closure's loss; DeepSpeed never gives a closure.
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of the groups that are there (DeepSpeed shows one group at a time)."""
        assert closure is None
        groups = self.param_groups
        try:
            for group in groups:
                self.param_groups = [group]
                if group["pulled"] and self.settings.c:
                    self._pull(group)
                else:
                    super().step()
        finally:
            self.param_groups = groups

    def _pull(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        lr, decay = group["lr"], group["weight_decay"]
        share = annealing(self._time(params), self.settings.k, self.settings.t0)
        anchors = [self._anchor(p) for p in params]
        torch._foreach_mul_(params, 1 - lr * decay)
        group["lr"], group["weight_decay"] = lr * share, 0.0
        super().step()
        group["lr"], group["weight_decay"] = lr, decay
        for p, anchor in zip(params, anchors, strict=True):
            # AdamW fills a state that is empty: the anchor comes after.
            self.state[p][ANCHOR] = anchor
        away = torch._foreach_sub(params, anchors)
        torch._foreach_add_(params, away, alpha=-lr * (1 - share) * self.settings.c)

    def _anchor(self, p: Tensor) -> Tensor:
        kept: Tensor | None = self.state[p].get(ANCHOR)
        return p.detach().clone() if kept is None else kept

    def _time(self, params: list[Tensor]) -> int:
        """Number of the step that comes, from 1. The device is asked once, and counted on."""
        first = params[0]
        if first not in self._taken:
            self._taken[first] = int(self.state[first].get("step", 0))
        self._taken[first] += 1
        return self._taken[first]


def build(
    module: torch.nn.Module,
    pulled: Iterable[Tensor],
    plan: FinetuneSection,
    settings: RecAdamSection,
) -> RecAdam:
    """RecAdam over a module's parameters, those in `pulled` held to their values."""
    held = set(pulled)
    groups = [
        group | {"params": [p for p in group["params"] if (p in held) == pull], "pulled": pull}
        for group in optim.parameter_groups(module, "finetune", plan)
        for pull in (True, False)
    ]
    return RecAdam([g for g in groups if g["params"]], plan, settings)


def check(config: Config, steps: int) -> None:
    """Refuses what cannot work.

    A pulled weight's distance from its anchor is multiplied by 1 - lr (1 - lambda) c in a step: it
    grows for ever where that is below -1.

    Raises:
        UserError: unstable settings, or offload.
    """
    plan, settings = config.finetune, config.recadam
    if zero.offloads(zero.read(config.zero)):
        raise UserError(
            f"--finetune.regularizer recadam: --zero {config.zero} keeps the optimiser's state in"
            " host memory, where DeepSpeed's own Adam steps: take zero0, zero1, zero2 or zero3"
        )
    pull = max(
        optim.learning_rate(step, steps, plan) * (1 - annealing(step + 1, settings.k, settings.t0))
        for step in range(steps)
    )
    if pull * settings.c >= 2:
        raise UserError(
            f"--recadam.c {settings.c:g}: lr (1 - lambda) c reaches {pull * settings.c:.3g}, and"
            f" from 2 on the pull overshoots for ever: give at most --recadam.c {_below(2 / pull)},"
            f" or --finetune.lr {_below(plan.lr * 2 / (pull * settings.c))}"
        )


def _below(value: float) -> str:
    """A short number a little below a value."""
    return f"{value * 0.994:.0f}" if value >= 100 else f"{value * 0.994:.3g}"


class Pull(Regularizer):
    """`--finetune.regularizer recadam`."""

    section = "recadam"

    def check(self, steps: int) -> None:
        """See `Regularizer`."""
        check(self.config, steps)

    def optimizer(self, objective: nn.Module) -> RecAdam | None:
        """See `Regularizer`: what the weights lack (head, new pooler) has nothing to go back to."""
        plan, settings = self.config.finetune, self.config.recadam
        if not settings.c:
            return None
        encoder = cast(Any, objective).model.encoder
        pulled = [p for name, p in encoder.named_parameters() if name in self.weights.encoder]
        return build(objective, pulled, plan, settings)
