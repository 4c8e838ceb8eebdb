"""How a stage does on the way: measured when it is due, the best kept, an early end."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.state import State
from selfdistill.engine.config.stages import KeptSection
from selfdistill.engine.monitoring.monitor import Meter, Monitor
from selfdistill.engine.runtime.distributed import main_only
from selfdistill.engine.training.optimizer import Best
from selfdistill.engine.training.stage import Stage

#: Share of a stage's time that paced measurements may take.
SHARE = 0.03
#: By so much a stage's figure may fall without a word: what a few hundred labels cannot tell.
FALL = 0.02


class Keeper:
    """Measures a stage's model (`Stage.measure`), and goes by what it found.

    Attributes:
        curve: what was measured so far, in the stage's state, if it is looked back at.

    Args:
        stage: what is trained.
        engine: ready for its next step.
        state: where the stage stands.
        monitor: told of the figures.
        meter: does not count the time.
        seconds: what the stage took so far.

    Raises:
        UserError: the state's curve is of something else.
    """

    def __init__(
        self,
        stage: Stage,
        engine: Any,
        state: State,
        monitor: Monitor,
        meter: Meter,
        seconds: Callable[[], float],
    ) -> None:
        self.stage, self.engine, self.state = stage, engine, state
        self.monitor, self.meter, self.seconds = monitor, meter, seconds
        plan = stage.plan if isinstance(stage.plan, KeptSection) else None
        self.patience = plan.patience if plan else 0
        self.keeps = plan is not None and plan.keep == "best"
        self.recorded = stage.whole_curve or (plan is not None and plan.judged)
        self.curve = state.curve
        if any(name not in entry for entry in self.curve for name in ("step", stage.judge)):
            raise UserError(
                f"{stage.name}: its checkpoint measured something else than {stage.judge}:"
                " --overwrite starts the stage again"
            )
        self.best = Best(engine, stage.ranks) if self.keeps else None
        self.spent = self.latest = 0.0  # seconds of all measurements, and of the last

    def visit(self) -> None:
        """Measures, if it is due. Every rank calls it, between two steps.

        Raises:
            Preempted: the ranks leave; the measurement is done again.
            UserError: the figure by which it goes is not among those measured.
        """
        stage, state, engine = self.stage, self.state, self.engine
        if not self._due():
            return
        began = time.monotonic()
        with self.meter.paused(), stage.scored():
            found = stage.measure(engine, self.monitor, state.step)
            self.monitor.log(state.step, found)
            if self.recorded and stage.judge not in found:
                raise UserError(
                    f"{stage.name}: goes by {stage.judge}, which these samples do not define:"
                    " take another --finetune.metric"
                )
            if self.recorded:
                self.curve.append({"step": state.step, **found})
            if self.best and self.curve[self._best()]["step"] == state.step:
                self.best.take()
            engine.train()
        state.scored = state.step
        self.latest = time.monotonic() - began
        self.spent += self.latest
        if self.recorded and state.step == stage.steps:
            self._tell_fall()
        if self.stopped and state.step < stage.steps:
            at = self.curve[self._best()]
            stage.run.info(
                f"{stage.name}: stops at step {state.step} of {stage.steps}: no better"
                f" {stage.judge} since {at[stage.judge]:.4f} at step {at['step']:.0f}"
            )

    def _tell_fall(self) -> None:
        """Says that the stage left its model worse than it began, unless the best is kept."""
        stage, first, last = self.stage, self.curve[0], self.curve[-1]
        before, after = first[stage.judge], last[stage.judge]
        if not self.keeps and first["step"] == 0 and before - after >= FALL:
            stage.run.info(
                f"warning: {stage.name}: {stage.judge} fell from {before:.4f} to {after:.4f}, so"
                f" that the encoder is worse for these labels: try a lower --{stage.section}.lr or"
                f" fewer steps; --{stage.section}.keep best leaves the best weights on the way"
            )

    def _due(self) -> bool:
        stage, step = self.stage, self.state.step
        if not stage.eval_every:
            return False
        if step == 0:
            return stage.whole_curve
        if step == self.state.scored:
            return False
        if step == stage.steps:  # what is left is scored anyway, but not always by a curve
            return self.recorded
        return due(stage.eval_every, step) and (not stage.paced or self._affordable())

    def _affordable(self) -> bool:
        """Whether one more leaves all within their share of the time. Rank 0's clock decides."""

        def within() -> bool:
            return self.spent + self.latest <= SHARE * self.seconds()

        return bool(main_only(self.stage.ranks, within))

    def _best(self) -> int:
        """Place of the best of the curve, the first of several."""
        figures = [entry[self.stage.judge] for entry in self.curve]
        return figures.index(max(figures))

    @property
    def stopped(self) -> bool:
        """Whether so many measurements as `patience` says have brought nothing better."""
        if not self.patience or not self.curve:
            return False
        return len(self.curve) - 1 - self._best() >= self.patience

    def remember(self) -> None:
        """Before a checkpoint: lays the best weights where it finds them."""
        if self.best:
            self.best.remember()

    @property
    def left_step(self) -> int:
        """The step of the weights that the stage leaves."""
        kept = self.best and self.curve
        return int(self.curve[self._best()]["step"]) if kept else self.state.step

    def left(self) -> AbstractContextManager[None]:
        """Within, the engine has the weights that the stage leaves. Every rank calls it."""
        return self.best.applied() if self.best and self.curve else self.stage.scored()

    def result(self) -> dict[str, Any]:
        """What result.json says of the curve, of what was kept, and of an early end."""
        stage, found = self.stage, dict[str, Any]()
        if not self.curve:
            return found
        best, last = self.curve[self._best()], self.curve[-1]
        found["curve"] = {"by": stage.judge, "best": best, "last": last}
        if self.keeps:
            found["kept"] = {"step": best["step"], stage.judge: best[stage.judge]}
        if self.state.step < stage.steps:
            found["stopped"] = self.state.step
        return found


def due(every: int, step: int) -> bool:
    """Whether a step is one of every so many; 0: never."""
    return every > 0 and step % every == 0
