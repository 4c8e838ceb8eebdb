"""The one training loop, around one DeepSpeed engine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from selfdistill.data import keyed
from selfdistill.data.loading.loader import Loader
from selfdistill.engine.checkpoints.checkpoint import Checkpoints, State
from selfdistill.engine.checkpoints.files import write_text
from selfdistill.engine.config.schema import StageSection
from selfdistill.engine.monitoring.audit import SampleLog
from selfdistill.engine.monitoring.monitor import Meter, Monitor
from selfdistill.engine.runtime.distributed import Ranks, main_only, mean, sent, total
from selfdistill.engine.training import optimizer as optim
from selfdistill.engine.training.objectives import EXTRAS, LOSSES

Batch = dict[str, Tensor]


class Skipped:
    """The broken samples that the ranks left out, together: each counts once, whoever met it.

    In another epoch another rank meets the same sample, so the ranks' counts do not add up. The
    ids are exchanged on those log steps on which the sum of the counts shows that there are more.

    Attributes:
        count: distinct samples, as of the last log step.

    Args:
        loader: of this rank.
        file: where rank 0 lists them, id -> what is wrong.
        ranks: who takes part; every one makes it, and calls `share` at the same steps.
        resumed: whether an earlier launch's list goes on.
    """

    def __init__(self, loader: Loader, file: Path, ranks: Ranks, *, resumed: bool) -> None:
        self.loader, self.file, self.ranks = loader, file, ranks

        def listed() -> dict[str, str]:
            if not resumed:
                file.unlink(missing_ok=True)
            if not file.exists():
                return {}
            with contextlib.suppress(ValueError):  # a list that was cut off begins anew
                return dict(json.loads(file.read_text(encoding="utf-8")))
            return {}

        loader.broken |= {int(k): v for k, v in main_only(ranks, listed).items()}
        self.count = len(loader.broken)

    @property
    def new(self) -> int:
        """Those that this rank met since the last log step."""
        return len(self.loader.broken) - self.count

    def share(self, new: int) -> None:
        """Tells all ranks of all samples.

        Args:
            new: sum of `new` over the ranks.

        Raises:
            UserError: they are more than the loader tolerates.
        """
        if not new:
            return
        # A dict keeps its order: behind those that all ranks know come this rank's own.
        mine = dict(list(self.loader.broken.items())[self.count :])
        parts: list[Any] = [mine]
        if self.ranks.world > 1:
            parts = [None] * self.ranks.world
            dist.all_gather_object(parts, mine)
        for part in parts:
            self.loader.broken |= part
        self.count = len(self.loader.broken)
        self.loader.tolerate(self.count)
        if self.ranks.main:
            table = {str(k): self.loader.broken[k] for k in sorted(self.loader.broken)}
            write_text(self.file, json.dumps(table, indent=1) + "\n")


@dataclass
class Loop:
    """What a stage gives to `train`.

    Attributes:
        engine: the DeepSpeed engine around the objective.
        batches: endless iterator of micro-batches, `plan.accumulation` a step.
        inputs: a loader's batch -> arguments of the objective, on the device.
        plan: the stage's settings.
        steps: optimiser steps of the whole stage.
        seed: seed of the dropout masks.
        state: where the stage stands; `step` is the next one to take.
        boundary: called between steps; raises `Preempted` when the ranks leave.
        log_every: steps between log lines.
        save_every: steps between checkpoints, 0 for none.
        count: a batch -> the units by whose number in the global batch the loss is divided; None:
            the objective's loss is a mean already, over as many units in each batch.
        measure: a batch -> units and FLOPs of this rank, for the rates.
        watch: extra scalars of a log step (named tensors; every rank calls it).
        draw: (step, batch, outputs) -> None, called every `draw_every` steps on rank 0.
        draw_every: steps between pictures, 0 for none.
        evaluate: step -> None, called every `evaluate_every` steps on every rank.
        evaluate_every: steps between evaluations, 0 for none.
        skipped: the broken samples that were left out; None where they are an error.
        spent: seconds that the stage took so far, over all launches.
        samples: the log of the steps' samples, if one is kept.
        after: called after every update, on every rank.
    """

    engine: Any
    batches: Iterator[Batch]
    inputs: Callable[[Batch], dict[str, Tensor]]
    plan: StageSection
    steps: int
    seed: int
    state: State
    boundary: Callable[[str], None] = lambda _: None
    log_every: int = 50
    save_every: int = 0
    count: Callable[[Batch], int | None] = lambda _: None
    measure: Callable[[Batch], tuple[float, float]] = lambda _: (0.0, 0.0)
    watch: Callable[[], dict[str, Tensor]] | None = None
    draw: Callable[[int, Batch, dict[str, Tensor]], None] | None = None
    draw_every: int = 0
    evaluate: Callable[[int], None] | None = None
    evaluate_every: int = 0
    skipped: Skipped | None = None
    spent: Callable[[], float] = lambda: 0.0
    samples: SampleLog | None = None
    after: Callable[[], None] | None = None


def train(
    loop: Loop, monitor: Monitor, meter: Meter, checkpoints: Checkpoints, ranks: Ranks
) -> dict[str, float]:
    """Runs a stage from `loop.state.step` to its end, and saves there.

    At every step the order is: train, log, draw, evaluate, save. A resumed stage enters where it
    left: an evaluation that was not finished is done again, and nothing else.

    Returns:
        The scalars of the last log step (means over ranks and micro-batches).

    Raises:
        FloatingPointError: the loss is no longer finite (looked at on log steps).
        Preempted: the ranks leave; `save` must follow.
    """
    engine, plan, state = loop.engine, loop.plan, loop.state
    engine.train()
    meter.reset()
    while True:
        done = state.step == loop.steps
        due = loop.evaluate_every and state.step % loop.evaluate_every == 0
        # The stage evaluates at its end in any case.
        if loop.evaluate and due and not done and state.step > state.scored:
            with meter.paused():
                loop.evaluate(state.step)
                engine.train()
            state.scored = state.step
        if loop.save_every and (done or state.step % loop.save_every == 0):
            with meter.paused():
                save(loop, monitor, checkpoints)
        if done:
            return state.last
        loop.boundary(f"step {state.step + 1}")
        step = state.step
        optim.set_learning_rate(
            engine.optimizer, optim.learning_rate(step, loop.steps, plan.warmup, plan.lr)
        )
        last = step + 1 == loop.steps
        due = (step + 1) % loop.log_every == 0 or step == 0 or last
        drawn = bool(loop.draw and loop.draw_every)
        drawn = drawn and (last or (step + 1) % loop.draw_every == 0)
        losses, batch, out, norm = take_step(loop, meter, ranks, measure=due, draw=drawn)
        state.step += 1
        state.position += plan.batch
        if due:
            state.last = _log(loop, losses, norm, monitor, meter, ranks)
        else:
            monitor.progress(state.step)
        if loop.draw and drawn:
            with meter.paused():
                loop.draw(state.step, batch, out)


def save(loop: Loop, monitor: Monitor, checkpoints: Checkpoints) -> None:
    """Saves where the stage stands. Every rank calls it, between two steps."""
    monitor.sync()
    if loop.samples:
        loop.samples.sync()
    if loop.skipped:
        loop.skipped.share(int(total(torch.tensor(loop.skipped.new, device=loop.engine.device))))
    loop.state.seconds = loop.spent()
    checkpoints.save(loop.engine, loop.state)


def take_step(
    loop: Loop, meter: Meter, ranks: Ranks, *, measure: bool, draw: bool = False
) -> tuple[dict[str, Tensor], Batch, Batch, Tensor | None]:
    """One optimiser step.

    Args:
        loop: of the stage.
        meter: of its speed.
        ranks: this process.
        measure: whether the gradient's norm is wanted.
        draw: whether what a picture shows is wanted.

    Returns:
        Losses summed over the micro-batches, the last micro-batch and its outputs, and the
        gradient's norm where `measure` asks for it and DeepSpeed knows none.
    """
    norm: Tensor | None = None
    engine, accumulation = loop.engine, loop.plan.accumulation
    sums: dict[str, Tensor] = {}
    with meter.waiting():
        batches = [next(loop.batches) for _ in range(accumulation)]
    units, flops = (sum(part) for part in zip(*map(loop.measure, batches), strict=True))
    meter.step(units * ranks.world, flops * ranks.world)
    more: dict[str, Any] = _weight(loop, batches, ranks)
    if loop.draw and (draw or engine.is_compiled):  # compiled, every step is one and the same
        more["shown"] = True
    for micro, batch in enumerate(batches):
        # Dropout's generator is keyed by step and rank: a resumed run draws the same masks.
        bits = keyed.bits(
            loop.seed, f"dropout {ranks.rank}", loop.state.step * accumulation + micro
        )
        torch.manual_seed(int(bits.random_raw()) >> 1)
        if engine.is_compiled:
            torch.compiler.cudagraph_mark_step_begin()  # what a CUDA graph gave before may go
        out = engine(**loop.inputs(batch), **more)
        engine.backward(out["loss"])
        if micro == accumulation - 1:
            norm = _norm(engine, loop.plan, wanted=measure)
        engine.step()
        for name, value in out.items():
            if name not in EXTRAS:
                # A CUDA graph's next replay writes over its results.
                value = value.detach().clone() if engine.is_compiled else value.detach()
                sums[name] = sums[name] + value if name in sums else value
    if loop.after:
        loop.after()
    if loop.samples:
        loop.samples.write(loop.state.step + 1, batches)
    return sums, batch, out, norm


def _norm(engine: Any, plan: StageSection, *, wanted: bool) -> Tensor | None:
    """The gradient's norm before an update, where DeepSpeed's `step` does not compute it.

    ZeRO 1 and 2 compute it at every step, a hundred operations and a wait for the device that only
    clipping needs: they are asked for it when it is logged. Plain data parallelism keeps none.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage in (1, 2) and not (plan.clip or engine.fp16_enabled() or optimizer.cpu_offload):
        optimizer.compute_grad_norm = wanted
    if stage or not wanted:
        return None
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients)


def _weight(loop: Loop, batches: list[Batch], ranks: Ranks) -> dict[str, Tensor]:
    """What makes the mean over ranks and micro-batches of sums a mean over the global batch."""
    counts = [loop.count(batch) for batch in batches]
    known = [count for count in counts if count is not None]
    if not known:
        return {}
    units = total(sent(torch.tensor(float(sum(known))), ranks.device))
    return {"scale": ranks.world * len(batches) / units.clamp(min=1)}


def _log(
    loop: Loop,
    losses: dict[str, Tensor],
    norm: Tensor | None,
    monitor: Monitor,
    meter: Meter,
    ranks: Ranks,
) -> dict[str, float]:
    step, accumulation = loop.state.step, loop.plan.accumulation
    means = {k: v / accumulation for k, v in losses.items()}
    if loop.skipped:
        means["skipped"] = torch.tensor(float(loop.skipped.new), device=ranks.device)
    values = mean(means, ranks.device)
    if loop.skipped:
        loop.skipped.share(round(values.pop("skipped") * ranks.world))
    if not all(abs(v) < float("inf") for v in values.values()):
        # fp16 skips a step whose gradient overflows; a loss that is not finite never comes back.
        worst = ", ".join(f"{k} = {v}" for k, v in values.items())
        raise FloatingPointError(f"step {step}: {worst}")
    scalars = {f"loss/{k}" if k in LOSSES else f"feature/{k}": v for k, v in values.items()}
    scalars["optimizer/learning_rate"] = optim.learning_rate(
        step - 1, loop.steps, loop.plan.warmup, loop.plan.lr
    )
    known = loop.engine.get_global_grad_norm() if norm is None else norm
    if known is not None:
        scalars["optimizer/gradient_norm"] = float(known)
    scale = getattr(loop.engine.optimizer, "cur_scale", None)
    if scale is not None and loop.engine.fp16_enabled():
        scalars["optimizer/loss_scale"] = float(scale)
    if loop.skipped:
        scalars["data/skipped"] = float(loop.skipped.count)
    if loop.watch:
        scalars |= {k: float(v) for k, v in loop.watch().items()}
    scalars |= meter.rates()
    monitor.log(step, scalars)
    monitor.progress(step, {k: v for k, v in values.items() if k in LOSSES})
    return scalars
