"""What every stage does around its objective: engine, loader, resume, monitor, result."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from selfdistill.data.cli import one_line
from selfdistill.data.errors import UserError
from selfdistill.data.loading.loader import Loader, tell
from selfdistill.data.loading.samples import Keyed
from selfdistill.data.shards.checking import check_hashes
from selfdistill.data.shards.manifest import Manifest, is_remote
from selfdistill.engine.checkpoints import training_state
from selfdistill.engine.checkpoints.checkpoint import Checkpoints, Reader, State
from selfdistill.engine.checkpoints.folder import Run, write_result
from selfdistill.engine.config.schema import StageSection
from selfdistill.engine.monitoring import flops as flop_counts
from selfdistill.engine.monitoring.audit import SampleLog
from selfdistill.engine.monitoring.drift import Drift
from selfdistill.engine.monitoring.monitor import Meter, Monitor
from selfdistill.engine.runtime import zero
from selfdistill.engine.runtime.allocator import release
from selfdistill.engine.runtime.distributed import main_only
from selfdistill.engine.runtime.preemption import Preempted
from selfdistill.engine.training import optimizer as optim
from selfdistill.engine.training.kinds.base import Kind, Stage, TeacherMode
from selfdistill.engine.training.loop import Loop, Skipped, save, train
from selfdistill.engine.training.record import device_name, scalars
from selfdistill.engine.training.scoring import evaluate


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
        record: what must be equal at resume (`record_of`).
        began: when the stage began, by `time.time`.
        mode: the teacher's, for the FLOPs.
        finish: engine -> entries of result.json (export, evaluation). Every rank calls it.
        seed: seed of order, head and dropout (default: the run's).
        validate: manifest scored every `eval_every` steps.
        labelled: whether the loader must find labels.
        reconstructs: whether the objective reconstructs a masked view.
        counted: whether `data.flops` says what a step costs.
        optimizer: objective -> the optimiser; None: AdamW.
        after: engine -> what is called after every update; None: nothing.
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
    began: float
    finish: Callable[[Any], dict[str, Any]]
    reference: Mapping[str, Tensor] | None = None
    seed: int | None = None
    validate: Manifest | None = None
    labelled: bool = False
    reconstructs: bool = True
    counted: bool = True
    optimizer: Callable[[nn.Module], Any] | None = None
    after: Callable[[Any], Callable[[], None]] | None = None
    mode: TeacherMode = "cached"


#: Hashed in seconds: of a split of more bytes `--data.check auto` says that it is not checked.
_SMALL = 2 * 2**30
#: Hashed between two collectives, whose time-out the other ranks wait for.
_PORTION = 4 * 2**30


def check_shards(run: Run, *manifests: Manifest, labels: bool) -> None:
    """Hashes the local shards of splits before a stage reads them, as `--data.check` says.

    PNGs carry checksums, which a loader tests; other files do not, nor do labels. Remote shards are
    hashed when they are fetched.

    Args:
        run: The launch.
        manifests: The splits.
        labels: Whether the stage reads labels.

    Raises:
        UserError: Names the damaged shard.
    """
    config = run.config.data
    for manifest in manifests:
        sizes = {
            number: shard.bytes
            for number, shard in enumerate(manifest.shards)
            if not is_remote(manifest.shard_place(number))
        }
        size = sum(sizes.values())
        covered = manifest.kind == "image" and manifest.image.get("stored") == "png" and not labels
        if config.check == "never" or not sizes or (config.check == "auto" and covered):
            continue
        told = f"{manifest.root}: {size / 2**30:.1f} GiB of shards"
        if config.check == "auto" and size > _SMALL:
            run.say(f"{told} are not checked against their sha256: --data.check always does it")
            continue
        if size > _SMALL // 4:
            run.say(f"{told} are checked against their sha256 (--data.check)")
        ends = zip(sizes, itertools.accumulate(sizes.values()), strict=True)
        for _, group in itertools.groupby(ends, lambda end: end[1] // _PORTION):
            portion = dict(group)
            # What a loader notices it skips by itself, where it may.
            action = functools.partial(
                check_hashes, manifest, list(portion), hidden_only=config.skip_broken > 0
            )
            run.boundary("checking shards")
            main_only(run.ranks, action)
            if (done := max(portion.values())) < size:
                run.say(f"{manifest.root}: {100 * done // size}% checked")


def build_engine(
    run: Run,
    objective: nn.Module,
    stage: str,
    plan: StageSection,
    make: Callable[[nn.Module], Any] | None = None,
) -> Any:
    """The DeepSpeed engine of an objective.

    Args:
        run: The launch.
        objective: Module whose forward gives the losses.
        stage: pretrain | distill | finetune.
        plan: Its settings.
        make: objective -> optimiser; None: AdamW.

    Raises:
        UserError: batch, ZeRO setting or precision do not fit.
    """
    import deepspeed

    content = zero.training_config(run.config, plan, run.ranks.world)
    if run.config.compile and zero.stage_of(content) == 3:
        raise UserError(
            f"--compile true: --zero {run.config.zero} gathers parameters in the midst of a"
            " forward, which torch.compile cannot follow: take zero0, zero1 or zero2, or leave it"
            " out"
        )
    if make is None:
        optimizer = optim.build(objective, stage, plan, offload=zero.offloads(content))
    else:
        optimizer = make(objective)
        content["zero_allow_untested_optimizer"] = True  # DeepSpeed knows classes by their names
    try:
        engine, *_ = deepspeed.initialize(
            model=objective, optimizer=optimizer, config=content, dist_init_required=False
        )
    except (AssertionError, TypeError, ValueError) as error:
        if run.config.zero in zero.known():
            raise
        raise UserError(
            f"--zero {run.config.zero}: DeepSpeed refuses it: {one_line(error)[:200]}: correct the"
            " file, or take one of ds_configs/"
        ) from error
    if run.ranks.world == 1 and zero.stage_of(content) == 0:
        # Nobody to add up with: DeepSpeed would copy all gradients together and back all the same.
        engine.enable_backward_allreduce = False
    if run.config.compile:
        engine.compile(compile_kwargs={"mode": run.config.compile_mode})
    return engine


def fit(run: Run, task: Fit) -> None:
    """Trains one stage to its end, from its checkpoint if there is one, and writes its result."""
    config, ranks, plan = run.config, run.ranks, task.plan
    task.data.check(task.train, task.base)
    seed = config.seed if task.seed is None else task.seed
    steps = plan.length(task.train.samples)
    plan.check_warmup(task.stage, steps)
    if plan.steps is None:
        run.say(
            f"{task.name}: {plan.epochs:g} epochs x {task.train.samples} samples"
            f" / batch {plan.batch} = {steps} steps"
        )
    run.boundary(f"{task.name}: starting")
    checkpoints = Checkpoints(
        run.folder / task.name / "checkpoints", ranks, config.keep, run.watchdog.beat
    )
    engine, state = _start(run, task, checkpoints)
    drift = Drift(engine, task.encoder, task.reference or task.base.encoder, ranks)
    if state.step:
        layout = f", saved by {state.world} ranks" if state.world != ranks.world else ""
        run.say(f"{task.name}: resumed at step {state.step} of {steps}{layout}")
    before = state.seconds

    def spent() -> float:
        return before + time.time() - task.began

    loader = Loader(
        task.train,
        batch=plan.batch,
        rank=ranks.rank,
        world=ranks.world,
        accumulation=plan.accumulation,
        workers=run.workers,
        seed=seed,
        partitions=config.data.partitions,
        window=config.data.window,
        start_step=state.step,
        keyed=task.keyed,
        cache_dir=config.data.cache_dir,
        cache_gb=config.data.cache_gb,
        skip_broken=config.data.skip_broken,
        report=tell,
        codec=task.data.codec(task.base, task.train),
        require_labels=task.labelled,
        pin=ranks.device.type == "cuda",
    )
    skipped = None
    if config.data.skip_broken:
        listed = run.folder / task.name / "skipped.json"
        skipped = Skipped(loader, listed, ranks, resumed=state.step > 0)
    monitor = Monitor(
        run.folder / task.name,
        enabled=ranks.main,
        stage=task.name,
        steps=steps,
        start=state.step,
        scored=state.scored,
        samples_per_step=plan.batch,
        log_every=config.log_every,
        unit=task.data.samples,
    )
    monitor.text("config", f"```toml\n{config.toml()}\n```")
    peak = flop_counts.peak_flops(device_name(ranks.device), run.dtype) if task.counted else None
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
        if not task.counted:
            return task.data.size(batch), 0.0
        work = task.data.flops(task.base, task.stage, task.mode, classes, batch)
        return task.data.size(batch), work

    masked = task.reconstructs
    stage_folder = run.folder / task.name
    samples = SampleLog(stage_folder, ranks, state.step) if config.log_samples else None
    loop = Loop(
        engine=engine,
        batches=iter(loader),
        inputs=task.inputs,
        plan=plan,
        steps=steps,
        seed=seed,
        state=state,
        boundary=lambda where: run.boundary(f"{task.name}: {where}"),
        skipped=skipped,
        spent=spent,
        samples=samples,
        after=None if task.after is None else task.after(engine),
        log_every=config.log_every,
        save_every=config.save_every,
        count=task.data.count if masked else lambda _: None,
        measure=measure,
        watch=lambda: {"feature/distance_from_init": drift()},
        draw=draw if masked else None,
        draw_every=config.picture_every if masked else 0,
        evaluate=evaluate_now if task.validate is not None else None,
        evaluate_every=getattr(plan, "eval_every", 0),
    )
    with monitor:
        try:
            last = train(loop, monitor, meter, checkpoints, ranks)
            left = task.finish(engine)
        except Preempted:
            save(loop, monitor, checkpoints)
            raise Preempted(f"{task.name}, step {state.step} of {steps}") from None
        finally:
            loader.close()
            if samples:
                samples.close()
        scores = left.pop("scores", {})
        figures: dict[str, float] = {}
        for split, score in scores.items():
            figures |= {f"{split}/{k}": v for k, v in score.scalars().items()}
            if split == list(scores)[-1]:  # one picture at the last step: test, or val without it
                monitor.confusion(steps, score.confusion, task.train.classes)
            monitor.log(steps, {f"{split}/{k}": v for k, v in score.scalars().items()})
        if "analysis" in left:
            told = scalars(left["analysis"])
            monitor.log(steps, {f"analysis/{k}": v for k, v in told.items()})
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
            "seconds": round(spent(), 2),
            "skipped": skipped.count if skipped else 0,
            "losses": {k: v for k, v in last.items() if k.startswith(("loss/", "feature/"))},
            "model": {"path": config.model.path, "sha256": task.base.sha256},
            "manifest": task.train.hash,
            "record": task.record,
            "world": ranks.world,
            "precision": config.precision,
            "zero": config.zero,
            "device": device_name(ranks.device),
            "versions": {
                p: importlib.metadata.version(p)
                for p in ("torch", "deepspeed", "transformers", "timm", "webdataset")
            },
        }
        | left,
    )
    run.say(f"{task.name}: done in {spent():.0f} s -> {run.folder / task.name}")
    release(engine)


def _start(run: Run, task: Fit, checkpoints: Checkpoints) -> tuple[Any, State]:
    """The stage's engine and state: from its newest whole checkpoint, or new.

    The weights go into the module before DeepSpeed cuts and casts it, the rest after.
    """
    found = checkpoints.find(task.record, task.train.hash)
    if found is None:
        engine = build_engine(run, task.objective, task.stage, task.plan, task.optimizer)
        return engine, State(0, 0, task.record, task.train.hash, run.ranks.world)
    folder, state = found
    read = Reader(folder, state)
    training_state.load_weights(task.objective, read)
    engine = build_engine(run, task.objective, task.stage, task.plan, task.optimizer)
    training_state.restore(engine, run.ranks.rank, read, state.optimizer)
    state.config = task.record  # the layout of this launch
    return engine, state
