"""The three stages: which model, objective and view of the data, and what each leaves behind."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from selfdistill.data.errors import UserError
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run, open_stage
from selfdistill.engine.regularizers import matching, supcon
from selfdistill.engine.regularizers.matching import (
    PredictionObjective,
    Predictor,
    WeightsObjective,
)
from selfdistill.engine.runtime.distributed import main_only
from selfdistill.engine.stages.finetuning import finetune
from selfdistill.engine.stages.splits import contrasted, unlabelled
from selfdistill.engine.training.fit import Fit, check_shards, fit
from selfdistill.engine.training.kinds import kind_of
from selfdistill.engine.training.kinds.base import Batch, Kind
from selfdistill.engine.training.objectives import (
    DistillObjective,
    FeatureExtractor,
    MaskedObjective,
)
from selfdistill.engine.training.record import record_of
from selfdistill.engine.training.teacher import (
    Replicated,
    Sharded,
    Teacher,
    build_table,
    choose,
    table_bytes,
    view,
)


def run_stages(run: Run) -> None:
    """Runs what `--stage` names, in order; complete stages are skipped."""
    config = run.config
    if config.stage in ("pretrain", "all"):
        run.boundary("pretrain", wait=True)
        pretrain(run)
    if config.stage in ("distill", "all"):
        for number in range(1, config.rounds + 1):
            run.boundary(f"distill-{number}", wait=True)
            distill(run, number)
    if config.stage == "finetune":
        finetune(run, config.finetune.start)
    if config.stage == "all":
        starts = [config.finetune.start]
        if config.compare:
            rounds = [f"distill-{number}" for number in range(1, config.rounds)]
            starts = ["model", "pretrain", *rounds, "auto"]
        for start in starts:
            finetune(run, start)


def pretrain(run: Run) -> None:
    """Stage 1: L_MAE from theta_init, phi_init (Algorithm 2). Leaves the teacher."""
    began = time.time()
    config = run.config
    if config.pretrain.objective == "supcon":
        _contrast(run, began)
        return
    train = unlabelled(run)
    kind = kind_of(run, train)
    base = kind.load()
    more = {"model": base.sha256} | kind.record()
    record = record_of(run, "pretrain", config.pretrain, train, more, config.seed)
    if not open_stage(run, "pretrain", record, train.hash):
        return
    check_shards(run, train, labels=False)
    model = kind.autoencoder(base)

    def finish(engine: Any) -> dict[str, Any]:
        return _export(run, kind, "pretrain", engine, base)

    fit(
        run,
        Fit(
            name="pretrain",
            stage="pretrain",
            plan=config.pretrain,
            objective=MaskedObjective(model),
            keyed=kind.mask(base),
            inputs=lambda batch: view(batch, kind.masked, run.ranks.device),
            data=kind,
            base=base,
            train=train,
            encoder=model.encoder,
            record=record,
            began=began,
            finish=finish,
        ),
    )


def _contrast(run: Run, began: float) -> None:
    """Stage 1 as a baseline has it: the supervised contrastive loss, on the labelled train split.

    Leaves what stage 1 leaves, the decoder as it was.
    """
    config, ranks, told = run.config, run.ranks, run.config.supcon
    train = contrasted(run)
    supcon.check(config, train)
    kind = kind_of(run, train)
    base = kind.load()
    more = {"model": base.sha256} | kind.record()
    more |= {f"supcon.{k}": v for k, v in told.model_dump().items()}
    record = record_of(run, "pretrain", config.pretrain, train, more, config.seed)
    if not open_stage(run, "pretrain", record, train.hash):
        return
    check_shards(run, train, labels=True)
    model = kind.autoencoder(base, told.dropout)
    (width,) = kind.feature_shape(base, "cls") or (0,)

    def inputs(batch: Batch) -> Batch:
        entries = kind.paired(batch) | {"labels": batch["labels"]}
        return view(entries, tuple(entries), ranks.device)

    def finish(engine: Any) -> dict[str, Any]:
        return _export(run, kind, "pretrain", engine, base)

    fit(
        run,
        Fit(
            name="pretrain",
            stage="pretrain",
            plan=config.pretrain,
            objective=supcon.SupConObjective(model, width, told),
            keyed=kind.pairs(config.seed),
            inputs=inputs,
            data=kind,
            base=base,
            train=train,
            encoder=model.encoder,
            record=record,
            began=began,
            finish=finish,
            labelled=True,
            reconstructs=False,
            counted=False,
        ),
    )


def distill(run: Run, number: int) -> None:
    """Stage 2, one round: a fresh student from theta_init against the frozen teacher (Eq. 3)."""
    began = time.time()
    name = f"distill-{number}"
    config, ranks, plan = run.config, run.ranks, run.config.distill
    matching.check(config)
    # Without its term the teacher is not asked for anything.
    source = main_only(ranks, lambda: teacher_source(run, number) if plan.weight else None)
    train = unlabelled(run)
    kind = kind_of(run, train)
    base = kind.load()
    more = {"model": base.sha256}
    taught = None
    if source is not None:
        taught = kind.load(source)
        kind.same_architecture(taught, base)
        _same_origin(run, number, base)
        more["teacher"] = taught.sha256
    record = record_of(run, "distill", plan, train, more | kind.record(), config.seed)
    if not open_stage(run, name, record, train.hash):
        return
    check_shards(run, train, labels=False)
    model = kind.autoencoder(base)
    objective, teacher, mode = _matched(run, kind, name, model, taught, train)

    def inputs(batch: Batch) -> Batch:
        target = {} if teacher is None else {"target": teacher(batch)}
        return view(batch, kind.masked, ranks.device) | target

    def finish(engine: Any) -> dict[str, Any]:
        left = _export(run, kind, name, engine, base)
        if taught is None:
            return left
        return left | {"teacher": {"path": source, "sha256": taught.sha256, "mode": mode}}

    fit(
        run,
        Fit(
            name=name,
            stage="distill",
            plan=plan,
            objective=objective,
            keyed=kind.mask(base),
            inputs=inputs,
            data=kind,
            base=base,
            train=train,
            encoder=model.encoder,
            record=record,
            began=began,
            finish=finish,
            mode="cached" if teacher is None else teacher.mode,
            reconstructs=plan.mae_weight > 0 or (plan.match == "prediction" and plan.weight > 0),
            counted=plan.match == "feature" and plan.weight > 0 and plan.mae_weight > 0,
        ),
    )
    if teacher is not None:
        teacher.close()


def _matched(
    run: Run, kind: Kind, name: str, model: Any, taught: Any, train: Manifest
) -> tuple[nn.Module, Teacher | Predictor | None, str]:
    """The objective that `--distill.match` names, its teacher where it has one, and its mode."""
    plan, ranks = run.config.distill, run.ranks
    weights = plan.weight, plan.mae_weight
    if taught is None:
        return DistillObjective(model, plan.feature, *weights), None, "none"
    if plan.match == "feature":
        teacher = _teacher(run, kind, name, taught, train)
        return DistillObjective(model, plan.feature, *weights), teacher, teacher.mode
    if plan.match == "prediction":
        if taught.decoder is None:
            raise UserError(
                f"teacher {taught.origin} has no decoder, and --distill.match prediction compares"
                " what decoders predict: give one that stage 1 left, or --distill.match feature"
            )
        predictor = Predictor(kind.autoencoder(taught), kind.masked, ranks, run.dtype)
        return PredictionObjective(model, *weights), predictor, predictor.mode
    reference = {k: v.float().to(ranks.device) for k, v in taught.encoder.items()}
    match: Any = plan.match.removeprefix("weights_")
    return WeightsObjective(model, reference, match, *weights), None, "weights"


def _teaching_stage(run: Run, number: int) -> str | None:
    """The run's stage that leaves the teacher of a round; None where --teacher names another."""
    if number == 1 and run.config.teacher.path:
        return None
    return "pretrain" if number == 1 else f"distill-{number - 1}"


def _same_origin(run: Run, number: int, base: Any) -> None:
    """Refuses to distil into another theta_init than the run's teacher started from."""
    stage = _teaching_stage(run, number)
    made = stage and (run.shared_result(stage) or {}).get("model", {})
    if made and made["sha256"] != base.sha256:
        raise UserError(
            f"{run.folder / str(stage)}, the teacher, started from {made['path']}, --model"
            f" {base.origin} has other weights: give the first, or another --output"
        )


def teacher_source(run: Run, number: int) -> str:
    """Folder of the teacher of a round: --teacher, stage 1, or the student of the round before.

    Raises:
        UserError: there is none yet.
    """
    stage = _teaching_stage(run, number)
    if stage is None:
        return str(run.config.teacher.path)
    if run.result(stage) is None:
        raise UserError(
            f"distill-{number} needs a teacher and {run.folder / stage} is not complete: "
            f"run --stage pretrain first, or give --teacher FOLDER"
        )
    return str(run.folder / stage / "export")


def _teacher(run: Run, kind: Kind, name: str, taught: Any, train: Manifest) -> Teacher:
    config, ranks = run.config, run.ranks
    feature = config.distill.feature
    extractor = FeatureExtractor(kind.encoder(taught), feature).eval()
    shape = kind.feature_shape(taught, feature)
    folder = run.folder / name / "teacher"
    size = None if shape is None else table_bytes(train.samples, shape)
    mode = main_only(ranks, lambda: choose(config.teacher.mode, size, config, folder))
    table = "" if size is None else f" (its features as a table: {size / 2**20:.1f} MiB)"
    run.say(f"{name}: teacher {mode}{table}")
    if mode == "sharded":
        return Sharded(extractor, kind.full, ranks, config.precision)
    whole = Replicated(extractor, kind.full, ranks, run.dtype)
    if mode == "replicated":
        return whole
    assert shape is not None
    key = {
        "manifest": train.hash,
        "teacher": taught.sha256,
        "view": f"{kind.view(taught)}, {feature}, {config.precision}",
    }
    return build_table(run, folder, key, train, kind.codec(taught, train), whole, shape)


def _export(run: Run, kind: Kind, stage: str, engine: Any, base: Any) -> dict[str, Any]:
    folder = run.folder / stage / "export"
    kind.export_autoencoder(folder, engine.module.model, base)
    return {"export": str(folder)}
