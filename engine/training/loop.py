"""The one training loop: fetch, forward, backward, update, log, draw, evaluate, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selfdistill.data import rng
from selfdistill.data.loading.loader import Loader
from selfdistill.engine.checkpoints.folder import open_stage, replacing, write_result
from selfdistill.engine.config.stages import StageSection
from selfdistill.engine.monitoring import flops as flop_counts
from selfdistill.engine.monitoring.audit import SampleLog
from selfdistill.engine.monitoring.drift import Drift
from selfdistill.engine.monitoring.monitor import Meter, Monitor
from selfdistill.engine.monitoring.stragglers import Stragglers
from selfdistill.engine.runtime.allocator import release
from selfdistill.engine.runtime.distributed import Ranks, mean, sent, total
from selfdistill.engine.runtime.preemption import Preempted
from selfdistill.engine.training import engine as engines
from selfdistill.engine.training import optimizer as optim
from selfdistill.engine.training.integrity import check_shards
from selfdistill.engine.training.keep import Keeper, due
from selfdistill.engine.training.modalities.base import Batch
from selfdistill.engine.training.objectives import EXTRAS, LOSSES
from selfdistill.engine.training.record import device_name, scalars, surroundings
from selfdistill.engine.training.skipped import Skipped
from selfdistill.engine.training.stage import Stage


def run_stage(stage: Stage) -> None:
    """Trains a stage to its end, from its checkpoint if there is one, unless it is complete."""
    run, name = stage.run, stage.name
    if not open_stage(run, name, stage.record, stage.train.hash):
        return
    with replacing(run, name):
        check_shards(run, stage.manifests, labels=stage.labelled)
        stage.check()
        trainer = Trainer(stage)
    try:
        trainer.train()
        with trainer.keeper.left():
            outputs = stage.finish(trainer.engine)
        trainer.log_final(outputs)
    except Preempted:
        trainer.save()
        raise Preempted(f"{name}, step {trainer.state.step} of {stage.steps}") from None
    finally:
        trainer.close()
    write_result(run, name, trainer.result() | outputs, stage.train)
    trainer.checkpoints.clear()
    run.info(f"{name}: done in {trainer.seconds():.0f} s -> {run.folder / name}")
    release(trainer.engine)
    stage.close()


class Trainer:
    """A stage on its DeepSpeed engine, with all that goes on around a step.

    Attributes:
        engine: the DeepSpeed engine around the stage's objective.
        state: where the stage stands; `step` is the next one to take.
        batches: the endless stream of this rank's micro-batches, `plan.accumulation` a step.
    """

    def __init__(self, stage: Stage) -> None:
        run, config, ranks, plan = stage.run, stage.config, stage.ranks, stage.plan
        self.stage, self.run, self.config, self.ranks, self.plan = stage, run, config, ranks, plan
        folder = run.folder / stage.name
        if plan.steps is None:
            run.info(
                f"{stage.name}: {plan.epochs:g} epochs x {stage.epoch} samples"
                f" / batch {plan.batch} = {stage.steps} steps"
            )
        run.boundary(f"{stage.name}: starting")
        self.engine, self.state, self.checkpoints = engines.start(stage)
        self.drift = Drift(self.engine, stage.model.encoder, stage.reference, ranks)
        if step := self.state.step:
            world = self.state.world
            layout = f", saved by {world} ranks" if world != ranks.world else ""
            run.info(f"{stage.name}: resumed at step {step} of {stage.steps}{layout}")
        self.seconds_before = self.state.seconds
        self.loader = Loader(
            stage.train,
            batch=plan.batch,
            rank=ranks.rank,
            world=ranks.world,
            accumulation=plan.accumulation,
            seed=stage.seed,
            partitions=config.data.partitions,
            window=config.data.window,
            start_step=step,
            keyed=stage.keyed(),
            **stage.reading(stage.modality.codec(stage.base, stage.train)),
        )
        self.batches = iter(self.loader)
        self.skipped = None
        if config.data.skip_broken:
            self.skipped = Skipped(self.loader, folder / "skipped.json", ranks, resumed=step > 0)
        self.monitor = Monitor(
            folder,
            enabled=ranks.main,
            stage=stage.name,
            steps=stage.steps,
            start=step,
            scored=self.state.scored,
            samples_per_step=plan.batch,
            log_every=config.log_every,
            unit=stage.modality.samples,
            loggers=config.loggers,
        )
        self.monitor.text("config", f"```toml\n{config.toml()}\n```")
        peak = flop_counts.peak_flops(device_name(ranks.device), run.dtype) or 0
        flops = peak * ranks.world if stage.counted else None
        self.meter = Meter(unit=stage.modality.units, peak_flops=flops)
        self.stragglers = Stragglers(ranks)
        self.samples = SampleLog(folder, ranks, step) if config.log_samples else None
        stage.start(self.engine)
        self.keeper = Keeper(stage, self.engine, self.state, self.monitor, self.meter, self.seconds)

    def train(self) -> None:
        """Takes the stage from its state's step to its end, and saves there.

        A resumed stage enters where it left: a measurement that was not finished is done again, and
        nothing else.

        Raises:
            FloatingPointError: the loss is no longer finite (looked at on log steps).
            Preempted: the ranks leave; `save` must follow.
        """
        stage, state, config = self.stage, self.state, self.config
        self.engine.train()
        self.meter.reset()
        while True:
            self.keeper.visit()
            done = state.step == stage.steps or self.keeper.stopped
            shared = due(config.save_every, state.step) or (done and config.save_every > 0)
            if shared or due(config.save_local_every or 0, state.step):
                with self.meter.paused():
                    self.save(shared=shared, wait=done or not self.run.background)
            if done:
                return
            number = state.step + 1  # of the step that comes, from 1
            last = number == stage.steps
            logged = last or number == 1 or due(config.log_every, number)
            pictured = stage.reconstructs and config.picture_every > 0
            drawn = pictured and (last or due(config.picture_every, number))

            self.run.boundary(f"{stage.name}: step {number}")
            optim.set_learning_rate(self.engine.optimizer, self.learning_rate(state.step))
            batches = self.fetch()
            step = take_step(
                self.engine,
                batches,
                stage.inputs,
                self.plan,
                self.ranks,
                seed=stage.seed,
                taken=state.step,
                scale=loss_scale([stage.units(batch) for batch in batches], self.ranks),
                working=self.stragglers.working,
                # Compiled, every step is one and the same.
                shown=stage.reconstructs and (drawn or self.engine.is_compiled),
                norm_wanted=logged,
            )
            stage.after_update()
            if self.samples:
                self.samples.write(number, batches)
            state.step = number
            state.position += self.plan.batch
            if logged:
                self.log(step)
            else:
                self.monitor.progress(number)
            if drawn and self.ranks.main:
                with self.meter.paused():
                    stage.draw(self.monitor, number, batches[-1], step.outputs)

    def learning_rate(self, taken: int) -> float:
        """That of the step after `taken` steps."""
        return optim.learning_rate(taken, self.stage.steps, self.plan)

    def fetch(self) -> list[Batch]:
        """The micro-batches of a step; the meter learns how long they took and what they cost."""
        with self.meter.waiting(), self.stragglers.working():
            batches = [next(self.batches) for _ in range(self.plan.accumulation)]
        world = self.ranks.world
        self.meter.step(
            world * sum(self.stage.modality.size(batch) for batch in batches),
            world * sum(self.stage.flops(batch) for batch in batches),
        )
        return batches

    def log(self, step: Step) -> None:
        """Logs a step's scalars, means over ranks and micro-batches, and keeps them in the state.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        state, engine = self.state, self.engine
        self.checkpoints.settle(wait=False)
        means = {k: v / self.plan.accumulation for k, v in step.losses.items()}
        if self.skipped:
            means["skipped"] = torch.tensor(float(self.skipped.new), device=self.ranks.device)
        values = mean(means, self.ranks.device)
        if self.skipped:
            self.skipped.share(round(values.pop("skipped") * self.ranks.world))
        if not all(abs(v) < float("inf") for v in values.values()):
            # fp16 skips a step whose gradient overflows; a loss that is not finite never comes back
            worst = ", ".join(f"{k} = {v}" for k, v in values.items())
            raise FloatingPointError(f"step {state.step}: {worst}")
        logged = {f"loss/{k}" if k in LOSSES else f"feature/{k}": v for k, v in values.items()}
        logged["optimizer/learning_rate"] = self.learning_rate(state.step - 1)
        norm = engine.get_global_grad_norm() if step.norm is None else step.norm
        if norm is not None:
            logged["optimizer/gradient_norm"] = float(norm)
        scale = getattr(engine.optimizer, "cur_scale", None)
        if scale is not None and engine.fp16_enabled():
            logged["optimizer/loss_scale"] = float(scale)
        if self.skipped:
            logged["data/skipped"] = float(self.skipped.count)
        logged["feature/distance_from_init"] = float(self.drift())
        rates, straggler = self.stragglers.rates(self.meter)
        logged |= rates
        if straggler:
            self.run.info(f"{self.stage.name}, step {state.step}: {straggler}")
            self.monitor.text("straggler", straggler, state.step)
        self.monitor.log(state.step, logged)
        self.monitor.progress(state.step, {k: v for k, v in values.items() if k in LOSSES})
        state.last = logged

    def save(self, *, shared: bool = True, wait: bool = True) -> None:
        """Saves where the stage stands. Every rank calls it, between two steps.

        Args:
            shared: on the disk that all nodes share; else on their own.
            wait: for the disk; see `Checkpoints.save`.
        """
        self.monitor.sync()
        if self.samples:
            self.samples.sync()
        if self.skipped:
            self.skipped.share_all()
        self.state.seconds = self.seconds()
        self.keeper.remember()
        kept = self.checkpoints.shared if shared else self.checkpoints
        kept.save(self.engine, self.state, wait=wait)

    def seconds(self) -> float:
        """What the stage took so far, over all launches."""
        return self.seconds_before + time.monotonic() - self.stage.began

    def log_final(self, outputs: dict[str, Any]) -> None:
        """Logs what `Stage.finish` found, and takes its `scores` out of it."""
        stage, monitor, scores = self.stage, self.monitor, outputs.pop("scores", {})
        # Scores stand at the step whose weights they are of.
        monitor.steps = steps = self.keeper.left_step if scores else self.state.step
        figures: dict[str, float] = {}
        for split, score in scores.items():
            of_split = {f"{split}/{k}": v for k, v in score.scalars().items()}
            if split == list(scores)[-1]:  # one picture at the last step: test, or val without it
                monitor.confusion(steps, score.confusion, stage.train.classes)
            monitor.log(steps, of_split)
            figures |= of_split
        if "analysis" in outputs:
            analysis = scalars(outputs["analysis"])
            monitor.log(steps, {f"analysis/{k}": v for k, v in analysis.items()})
        monitor.hparams(
            self.config.model_dump(exclude={"local_rank"}),
            figures or {"final/loss": self.state.last.get("loss/loss", float("nan"))},
        )

    def result(self) -> dict[str, Any]:
        """What result.json says of every stage."""
        stage, last = self.stage, self.state.last
        return {
            **stage.told(),
            "steps": self.state.step,
            "seconds": round(self.seconds(), 2),
            "skipped": self.skipped.count if self.skipped else 0,
            "losses": {k: v for k, v in last.items() if k.startswith(("loss/", "feature/"))},
            "model": {"path": self.config.model.path, "sha256": stage.base.sha256},
            **self.keeper.result(),
            **surroundings(self.run),
        }

    def close(self) -> None:
        """Ends the loader's processes and closes the logs."""
        self.loader.close()
        if self.samples:
            self.samples.close()
        self.monitor.close()


@dataclass
class Step:
    """What an optimiser step gave.

    Attributes:
        losses: scalars of the objective, summed over the micro-batches.
        outputs: of the last micro-batch's forward.
        norm: of the gradient, where it was wanted and DeepSpeed knows none.
    """

    losses: dict[str, Tensor]
    outputs: Batch
    norm: Tensor | None


def take_step(
    engine: Any,
    batches: Sequence[Batch],
    inputs: Callable[[Batch], Batch],
    plan: StageSection,
    ranks: Ranks,
    *,
    seed: int,
    taken: int,
    scale: Tensor | None = None,
    working: Callable[[], AbstractContextManager[None]] = nullcontext,
    shown: bool = False,
    norm_wanted: bool = False,
) -> Step:
    """One optimiser step: forward and backward of each micro-batch, then the update.

    Args:
        engine: the DeepSpeed engine around the objective.
        batches: micro-batches, `plan.accumulation` of them.
        inputs: a batch -> the objective's arguments, on the device.
        plan: the stage's settings.
        ranks: this process.
        seed: of the dropout masks.
        taken: steps taken before this one.
        scale: see `loss_scale`.
        working: around each forward, which other ranks have no part in.
        shown: whether the objective returns what a picture shows.
        norm_wanted: whether the gradient's norm is.
    """
    losses: dict[str, Tensor] = {}
    norm: Tensor | None = None
    options: dict[str, Any] = {} if scale is None else {"scale": scale}
    if shown:
        options["shown"] = True
    for micro, batch in enumerate(batches):
        # Dropout's generator is keyed by step and rank: a resumed run draws the same masks.
        position = taken * plan.accumulation + micro
        bits = rng.bits(seed, f"dropout {ranks.rank}", position)
        torch.manual_seed(int(bits.random_raw()) >> 1)
        if engine.is_compiled:
            torch.compiler.cudagraph_mark_step_begin()  # what a CUDA graph gave before may go
        with working():
            outputs = engine(**inputs(batch), **options)
        engine.backward(outputs["loss"])
        if micro == plan.accumulation - 1:
            norm = _norm(engine, plan, wanted=norm_wanted)
        engine.step()
        for name, value in outputs.items():
            if name not in EXTRAS:
                # A CUDA graph's next replay writes over its results.
                value = value.detach().clone() if engine.is_compiled else value.detach()
                losses[name] = losses[name] + value if name in losses else value
    return Step(losses, outputs, norm)


def loss_scale(units: Sequence[float | None], ranks: Ranks) -> Tensor | None:
    """What makes a mean over ranks and micro-batches of sums a mean over the global batch.

    Args:
        units: of each micro-batch, by which its loss is a mean; None where they are as many in all.
        ranks: this process. Every rank calls it.

    Returns:
        The factor, a scalar on the device; None where the loss needs none.
    """
    known = [number for number in units if number is not None]
    if not known:
        return None
    everywhere = total(sent(torch.tensor(float(sum(known))), ranks.device))
    return ranks.world * len(units) / everywhere.clamp(min=1)


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
