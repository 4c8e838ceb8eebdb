"""What every stage does around its objective: engine, loader, resume, monitor, result."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.loader import Loader, sequential
from data.manifest import Manifest
from data.samples import Keyed
from engine import flops as flop_counts
from engine import optim, zero
from engine.checkpoint import Checkpoints, State
from engine.config import StageSection
from engine.drift import Drift
from engine.evaluation import Scores, Tally
from engine.folder import Run, write_result
from engine.kinds.base import Kind, Stage, TeacherMode
from engine.monitor import Meter, Monitor
from engine.teacher import view
from engine.trainer import Loop, train


@dataclass
class Fit:
    """What tells one stage from another.

    Attributes:
        name: its folder.
        stage: pretrain | distill | finetune.
        plan: its settings.
        objective: module whose forward gives the losses.
        keyed: random numbers by stream position.
        inputs: a loader's batch -> the objective's arguments, on the device.
        data: the kind of the inputs.
        base: weights that it starts from.
        train: manifest of the train split.
        encoder: the trained encoder, watched for its distance from `reference`.
        reference: theta_init (default: `base.encoder`).
        record: what must be equal at resume, beside plan and seed.
        mode: the teacher's, for the FLOPs.
        finish: engine -> entries of result.json (export, evaluation). Every rank calls it.
        seed: seed of order, head and dropout (default: the run's).
        validate: manifest scored every `eval_every` steps.
    """

    name: str
    stage: Stage
    plan: StageSection
    objective: nn.Module
    keyed: Keyed | None
    inputs: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    data: Kind
    base: Any
    train: Manifest
    encoder: nn.Module
    record: dict[str, Any]
    finish: Callable[[Any], dict[str, Any]]
    reference: Mapping[str, Tensor] | None = None
    seed: int | None = None
    validate: Manifest | None = None
    mode: TeacherMode = "cached"


def build_engine(run: Run, objective: nn.Module, stage: str, plan: StageSection) -> Any:
    """The DeepSpeed engine of an objective.

    Raises:
        UserError: batch, ZeRO setting or precision do not fit.
    """
    import deepspeed

    content = zero.training_config(run.config, plan, run.ranks.world)
    optimizer = optim.build(objective, stage, plan, offload=zero.offloads(content))
    engine, *_ = deepspeed.initialize(
        model=objective, optimizer=optimizer, config=content, dist_init_required=False
    )
    return engine


def fit(run: Run, task: Fit) -> None:
    """Trains one stage to its end, from its checkpoint if there is one, and writes its result."""
    config, ranks, plan = run.config, run.ranks, task.plan
    began = time.time()
    task.data.check(task.train, task.base)
    seed = config.seed if task.seed is None else task.seed
    steps = plan.length(task.train.samples)
    if plan.steps is None:
        run.say(
            f"{task.name}: {plan.epochs:g} epochs x {task.train.samples} samples"
            f" / batch {plan.batch} = {steps} steps"
        )
    engine = build_engine(run, task.objective, task.stage, plan)
    drift = Drift(task.encoder, task.reference or task.base.encoder, ranks)
    checkpoints = Checkpoints(run.folder / task.name / "checkpoints", ranks, config.keep)
    record = _record(run, task, steps, seed)
    state = checkpoints.load(engine, record, task.train.hash)
    if state is None:
        state = State(0, 0, record, task.train.hash, ranks.world)
    else:
        run.say(f"{task.name}: resumed at step {state.step} of {steps}")

    loader = Loader(
        task.train,
        batch=plan.batch,
        rank=ranks.rank,
        world=ranks.world,
        accumulation=plan.accumulation,
        workers=config.data.workers,
        seed=seed,
        partitions=config.data.partitions,
        window=config.data.window,
        start_step=state.step,
        keyed=task.keyed,
        cache_dir=config.data.cache_dir,
        cache_gb=config.data.cache_gb,
        skip_broken=config.data.skip_broken,
        codec=task.data.codec(task.base, task.train),
        require_labels=task.stage == "finetune",
    )
    monitor = Monitor(
        run.folder / task.name,
        enabled=ranks.main,
        stage=task.name,
        steps=steps,
        start=state.step,
        samples_per_step=plan.batch,
        log_every=config.log_every,
        unit=task.data.samples,
    )
    monitor.text("config", f"```toml\n{config.toml()}\n```")
    peak = flop_counts.peak_flops(_device_name(ranks.device), run.dtype)
    meter = Meter(unit=task.data.units, peak_flops=None if peak is None else peak * ranks.world)

    def evaluate_now(step: int) -> None:
        assert task.validate is not None
        scores = evaluate(run, engine, task.data, task.base, task.validate)
        monitor.log(step, {f"val/{k}": v for k, v in scores.scalars().items()})
        monitor.confusion(step, scores.confusion, task.validate.classes)

    def draw(step: int, batch: dict[str, Tensor], out: dict[str, Tensor]) -> None:
        if ranks.main:
            task.data.draw(monitor, step, batch, out, task.base)

    def measure(batch: dict[str, Tensor]) -> tuple[float, float]:
        classes = len(task.train.classes)
        work = task.data.flops(task.base, task.stage, task.mode, classes, batch)
        return task.data.size(batch), work

    masked = task.stage != "finetune"
    with monitor:
        last = train(
            Loop(
                engine=engine,
                batches=iter(loader),
                inputs=task.inputs,
                plan=plan,
                steps=steps,
                seed=seed,
                state=state,
                log_every=config.log_every,
                save_every=config.save_every,
                count=task.data.count if masked else lambda _: None,
                measure=measure,
                watch=lambda: {"feature/distance_from_init": drift()},
                draw=draw if masked else None,
                draw_every=config.picture_every if masked else 0,
                evaluate=evaluate_now if task.validate is not None else None,
                evaluate_every=getattr(plan, "eval_every", 0),
            ),
            monitor,
            meter,
            checkpoints,
            ranks,
        )
        if config.save_every:
            checkpoints.save(engine, state)
        left = task.finish(engine)
        scores = left.pop("scores", {})
        figures: dict[str, float] = {}
        for split, score in scores.items():
            figures |= {f"{split}/{k}": v for k, v in score.scalars().items()}
            if split == list(scores)[-1]:  # one picture at the last step: test, or val without it
                monitor.confusion(steps, score.confusion, task.train.classes)
            monitor.log(steps, {f"{split}/{k}": v for k, v in score.scalars().items()})
        monitor.hparams(
            config.model_dump(exclude={"local_rank"}),
            figures or {"final/loss": last.get("loss/loss", float("nan"))},
        )
    write_result(
        run,
        task.name,
        {
            "stage": task.name,
            "steps": steps,
            "seed": seed,
            "seconds": round(time.time() - began, 2),
            "losses": {k: v for k, v in last.items() if k.startswith(("loss/", "feature/"))},
            "model": {"path": config.model.path, "sha256": task.base.sha256},
            "manifest": task.train.hash,
            "world": ranks.world,
            "precision": config.precision,
            "zero": config.zero,
            "device": _device_name(ranks.device),
            "versions": {
                p: importlib.metadata.version(p)
                for p in ("torch", "deepspeed", "transformers", "timm", "webdataset")
            },
        }
        | left,
    )
    run.say(f"{task.name}: done in {time.time() - began:.0f} s -> {run.folder / task.name}")
    engine.destroy()


def _record(run: Run, task: Fit, steps: int, seed: int) -> dict[str, Any]:
    """What a checkpoint's and a resumed stage's settings must share."""
    config = run.config
    plan = task.plan.model_dump(mode="json", exclude={"seeds", "eval_every", "start", "epochs"})
    return {
        **{f"{task.stage}.{k}": v for k, v in plan.items()},
        f"{task.stage}.steps": steps,
        "seed": seed,
        "precision": config.precision,
        "zero": config.zero,
        "data.partitions": config.data.partitions,
        "data.window": config.data.window,
        **task.record,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


@torch.no_grad()
def evaluate(run: Run, engine: Any, data: Kind, base: Any, manifest: Manifest) -> Scores:
    """Scores a split once, its samples dealt over the ranks; padded samples do not count."""
    config, ranks = run.config, run.ranks
    engine.eval()
    tally = Tally(len(manifest.classes))
    batches = sequential(
        manifest,
        batch=max(1, min(256, 4 * config.finetune.batch) // ranks.world),
        rank=ranks.rank,
        world=ranks.world,
        workers=config.data.workers,
        cache_dir=config.data.cache_dir,
        cache_gb=config.data.cache_gb,
        codec=data.codec(base, manifest),
        require_labels=True,
    )
    for batch in batches:
        labels = batch["labels"].to(ranks.device)
        # Padding bears label -1, which no cross-entropy takes; the tally leaves it out.
        out = engine(labels=labels.clamp(min=0), **view(batch, data.full, ranks.device))
        tally.add(out["logits"], labels, batch["valid"].to(ranks.device), batch["ids"])
    return tally.gather()
