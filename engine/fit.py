"""What every stage does around its objective: engine, loader, resume, monitor, result."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.checking import check_hashes
from data.cli import one_line
from data.errors import UserError
from data.loader import Loader, sequential, tell
from data.manifest import Manifest, is_remote
from data.samples import Keyed
from engine import flops as flop_counts
from engine import optim, training_state, zero
from engine.allocator import release
from engine.audit import SampleLog
from engine.checkpoint import Checkpoints, Reader, State
from engine.config import StageSection
from engine.distributed import main_only, sent, total
from engine.drift import Drift
from engine.evaluation import Scores, Tally
from engine.folder import Run, write_result
from engine.kinds.base import Kind, Stage, TeacherMode
from engine.monitor import Meter, Monitor
from engine.preemption import Preempted
from engine.teacher import view
from engine.trainer import Loop, Skipped, save, train


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
    peak = flop_counts.peak_flops(_device_name(ranks.device), run.dtype) if task.counted else None
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
            "device": _device_name(ranks.device),
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


def record_of(
    run: Run, stage: Stage, plan: StageSection, train: Manifest, more: dict[str, Any], seed: int
) -> dict[str, Any]:
    """What the figures of a stage depend on: equal when it is resumed, or skipped as complete.

    Args:
        run: The launch.
        stage: pretrain | distill | finetune.
        plan: Its settings.
        train: What it learns from.
        more: Hashes of the weights it starts from, settings of its view.
        seed: Of order, head and dropout.
    """
    config = run.config
    elsewhere = {"seeds", "eval_every", "start", "weights", "epochs"}
    settings, mode = plan.model_dump(mode="json", exclude=elsewhere), config.compile_mode
    return {
        **{f"{stage}.{k}": v for k, v in settings.items()},
        f"{stage}.steps": plan.length(train.samples),
        "seed": seed,
        "precision": config.precision,
        "zero": config.zero,
        # Another order of sums, or other products.
        **({"compile": True} if config.compile else {}),
        **({"compile_mode": mode} if config.compile and mode != "default" else {}),
        **({"deterministic": True} if config.deterministic else {}),
        **({} if config.tf32 else {"tf32": False}),
        "data.partitions": config.data.partitions,
        "data.window": config.data.window,
        **more,
    }


def scalars(analysis: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers of an analysis."""
    return {k: float(v) for k, v in analysis.items() if isinstance(v, int | float)}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def scored_batch(run: Run) -> int:
    """Samples that a rank scores together: on a GPU what keeps it busy, without a backward."""
    if run.ranks.device.type == "cuda":
        return 256
    return max(1, min(256, 4 * run.config.finetune.batch) // run.ranks.world)


@torch.no_grad()
def evaluate(
    run: Run,
    engine: Any,
    data: Kind,
    base: Any,
    manifest: Manifest,
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    seen: Callable[[dict[str, Tensor]], None] = lambda _: None,
) -> Scores:
    """Scores a split once, its samples dealt over the ranks; padded and skipped ones do not count.

    Args:
        run: The launch.
        engine: Of a classifier.
        data: The kind of the inputs.
        base: Weights that the classifier started from.
        manifest: The split.
        spans: Ids [first, last) that this rank scores, as many batches as every other's; None:
            its share of all.
        seen: Told each batch after its forward pass.

    Raises:
        UserError: broken data, more than may be skipped.
    """
    config, ranks = run.config, run.ranks
    engine.eval()
    tally = Tally(len(manifest.classes))
    batches = sequential(
        manifest,
        batch=scored_batch(run),
        rank=ranks.rank,
        world=ranks.world,
        workers=run.workers,
        cache_dir=config.data.cache_dir,
        cache_gb=config.data.cache_gb,
        skip_broken=config.data.skip_broken,
        report=tell,
        codec=data.codec(base, manifest),
        require_labels=True,
        pin=ranks.device.type == "cuda",
        spans=spans,
    )
    for batch in batches:
        run.boundary(f"scoring {manifest.root}")
        labels = sent(batch["labels"], ranks.device)
        # Padding and skipped samples bear -1, which no cross-entropy takes; the tally skips them.
        out = engine(labels=labels.clamp(min=0), **view(batch, data.full, ranks.device))
        valid, ids = (sent(batch[name], ranks.device) for name in ("valid", "ids"))
        tally.add(out["logits"], labels, valid, ids)
        seen(batch)
    broken = int(total(torch.tensor(len(batches.broken), device=ranks.device)))
    batches.tolerate(broken)
    if broken and ranks.main:
        tell(f"{manifest.root}: scored without {broken} broken of {manifest.samples} samples")
    return tally.gather()
