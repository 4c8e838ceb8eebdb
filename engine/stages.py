"""The three stages: which model, objective and view of the data, and what each leaves behind."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from data.codec import Images
from data.errors import UserError
from data.manifest import Manifest
from engine import flops
from engine.evaluation import Scores
from engine.export import export_classifier, export_mae
from engine.fit import Fit, base_encoder, classifier, evaluate, fit, mae_model, pretrained
from engine.folder import Run, open_stage, write_result
from engine.models.vit_mae import ViTEncoder
from engine.models.weights import Pretrained
from engine.objectives import (
    ClassifyObjective,
    DistillObjective,
    FeatureExtractor,
    MAEObjective,
    Normalize,
)
from engine.teacher import (
    Replicated,
    Sharded,
    Teacher,
    build_table,
    choose,
    feature_shape,
    table_bytes,
)
from engine.views import Flips, MaskNoise
from engine.zero import full_state


def run_stages(run: Run) -> None:
    """Runs what `--stage` names, in order; complete stages are skipped."""
    config = run.config
    if config.stage in ("pretrain", "all"):
        pretrain(run)
    if config.stage in ("distill", "all"):
        for number in range(1, config.rounds + 1):
            distill(run, number)
    if config.stage == "finetune":
        finetune(run, config.finetune.start)
    if config.stage == "all":
        starts = ["model", "pretrain", "auto"] if config.compare else [config.finetune.start]
        for start in starts:
            finetune(run, start)


def pretrain(run: Run) -> None:
    """Stage 1: L_MAE from theta_init, phi_init (Algorithm 2). Leaves the teacher."""
    if not open_stage(run, "pretrain"):
        return
    config = run.config
    base = pretrained(run)
    train = Manifest.load_split(_data(run), "train")
    model = mae_model(run, base)
    objective = MAEObjective(model, Normalize(base.mean, base.std))
    device = run.ranks.device

    def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: batch[k].to(device, non_blocking=True) for k in ("images", "noise")}

    fit(
        run,
        Fit(
            name="pretrain",
            kind="pretrain",
            plan=config.pretrain,
            objective=objective,
            keyed=MaskNoise(config.seed, model.shape.patches),
            inputs=inputs,
            base=base,
            train=train,
            encoder=model.encoder,
            record={"model": base.sha256, "mae": config.mae.model_dump()},
            flops=flops.step_flops(model.shape, "pretrain", teacher="cached"),
            finish=lambda engine: _export_mae(run, "pretrain", engine, base),
        ),
    )


def distill(run: Run, number: int) -> None:
    """Stage 2, one round: a fresh student from theta_init against the frozen teacher (Eq. 3)."""
    name = f"distill-{number}"
    config, ranks = run.config, run.ranks
    source = teacher_source(run, number)
    if not open_stage(run, name):
        return
    base = pretrained(run)
    train = Manifest.load_split(_data(run), "train")
    taught = pretrained(run, source)
    _same_architecture(taught, base)
    model = mae_model(run, base)
    normalize = Normalize(base.mean, base.std)
    teacher = _teacher(run, name, taught, train, normalize)
    objective = DistillObjective(
        model, normalize, config.distill.feature, config.distill.weight, config.distill.mae_weight
    )
    device = ranks.device

    def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {k: batch[k].to(device, non_blocking=True) for k in ("images", "noise")}
        return tensors | {"target": teacher(batch)}

    fit(
        run,
        Fit(
            name=name,
            kind="distill",
            plan=config.distill,
            objective=objective,
            keyed=MaskNoise(config.seed, model.shape.patches),
            inputs=inputs,
            base=base,
            train=train,
            encoder=model.encoder,
            record={
                "model": base.sha256,
                "teacher": taught.sha256,
                "mae": config.mae.model_dump(),
            },
            flops=flops.step_flops(model.shape, "distill", teacher=teacher.mode),
            finish=lambda engine: (
                _export_mae(run, name, engine, base)
                | {"teacher": {"path": source, "sha256": taught.sha256, "mode": teacher.mode}}
            ),
        ),
    )


def teacher_source(run: Run, number: int) -> str:
    """Folder of the teacher of a round: --teacher, stage 1, or the student of the round before.

    Raises:
        UserError: there is none yet.
    """
    if number == 1 and run.config.teacher.path:
        return run.config.teacher.path
    stage = "pretrain" if number == 1 else f"distill-{number - 1}"
    if run.result(stage) is None:
        raise UserError(
            f"distill-{number} needs a teacher and {run.folder / stage} is not complete: "
            f"run --stage pretrain first, or give --teacher FOLDER"
        )
    return str(run.folder / stage / "export")


def _same_architecture(taught: Pretrained, base: Pretrained) -> None:
    for field in ("image_size", "patch_size", "width", "depth", "heads", "mlp_width"):
        theirs, ours = getattr(taught.shape, field), getattr(base.shape, field)
        if theirs != ours:
            raise UserError(
                f"teacher {taught.origin} has another architecture ({field} {theirs}) than model "
                f"{base.origin} ({ours}): give the --model that the teacher was trained from"
            )


def _teacher(
    run: Run, name: str, taught: Pretrained, train: Manifest, normalize: Normalize
) -> Teacher:
    config, ranks = run.config, run.ranks
    encoder = ViTEncoder(taught.shape)
    encoder.load_state_dict(taught.encoder)
    extractor = FeatureExtractor(encoder, normalize, config.distill.feature).eval()
    shape = feature_shape(extractor, taught.shape.patches + 1, taught.shape.width)
    folder = run.folder / name / "teacher"
    size = table_bytes(train.samples, shape)
    mode = choose(config.teacher.mode, size, config, folder)
    run.say(f"{name}: teacher {mode} (its features as a table: {size / 2**20:.1f} MiB)")
    if mode == "replicated":
        return Replicated(extractor, ranks, run.dtype)
    if mode == "sharded":
        return Sharded(extractor, ranks, run.dtype)
    key = {
        "manifest": train.hash,
        "teacher": taught.sha256,
        "view": f"full {taught.shape.image_size}, mean {taught.mean}, std {taught.std}, "
        f"{config.distill.feature}, {config.precision}",
    }
    every = max(1, train.samples // ranks.world // 10)
    told = [0]

    def progress(done: int, of: int) -> None:
        if done // every > told[0] // every:
            run.say(f"{name}: teacher features {100 * done // of}%")
        told[0] = done

    return build_table(
        folder,
        key,
        train,
        Images(taught.shape.image_size),
        Replicated(extractor, ranks, run.dtype),
        shape,
        config,
        ranks,
        progress,
    )


def _export_mae(run: Run, stage: str, engine: Any, base: Pretrained) -> dict[str, Any]:
    model = engine.module.model
    encoder = full_state(model.encoder, keep=run.ranks.main)
    decoder = full_state(model.decoder, keep=run.ranks.main)
    folder = run.folder / stage / "export"
    if run.ranks.main:
        export_mae(folder, model.shape, encoder, decoder, base.mean, base.std)
    return {"export": str(folder)}


def finetune_source(run: Run, start: str) -> tuple[str, str]:
    """Stage folder name and weights of a fine-tuning.

    Raises:
        UserError: the stage to start from is not complete.
    """
    config = run.config
    if start == "model":
        if config.model.path is None:
            raise UserError("--finetune.start model needs --model")
        return "finetune-model", config.model.path
    if start == "pretrain":
        stage, name = "pretrain", "finetune-pretrain"
    else:
        done = [p.parent.name for p in run.folder.glob("distill-*/result.json")]
        numbers = sorted(int(n.removeprefix("distill-")) for n in done)
        number = numbers[-1] if numbers and config.stage == "finetune" else config.rounds
        stage, name = f"distill-{number}", "finetune"
    if run.result(stage) is None:
        raise UserError(
            f"nothing to fine-tune: {run.folder / stage} is not complete: run --stage pretrain and "
            "--stage distill first, or take --finetune.start model"
        )
    return name, str(run.folder / stage / "export")


def finetune(run: Run, start: str) -> None:
    """Stage 3: cross-entropy with a fresh head, once for each seed; test data are scored once."""
    config = run.config
    name, source = finetune_source(run, start)
    if run.result(name) is not None and not config.overwrite:
        open_stage(run, name)
        return
    seeds = range(config.seed, config.seed + config.finetune.seeds)
    results = []
    for seed in seeds:
        stage = name if config.finetune.seeds == 1 else f"{name}/seed-{seed}"
        _finetune_once(run, stage, source, seed)
        results.append(run.result(stage))
    if config.finetune.seeds > 1:
        write_result(run, name, _summary(name, source, [r for r in results if r]))
    final = run.result(name)
    assert final is not None
    for key, value in final["metrics"].items():
        if key.endswith("accuracy"):
            spread = final.get("std", {}).get(key)
            more = f" ± {100 * spread:.2f} ({len(seeds)} seeds)" if spread is not None else ""
            run.say(f"{name}: {key} {100 * value:.2f}%{more}")


def _summary(name: str, source: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    keys = results[0]["metrics"]
    columns = {k: [r["metrics"][k] for r in results] for k in keys}
    return {
        "stage": name,
        "start": source,
        "n": len(results),
        "metrics": {k: statistics.fmean(v) for k, v in columns.items()},
        # Sample standard deviation (n - 1), as papers report it.
        "std": {k: statistics.stdev(v) for k, v in columns.items()},
        "seeds": [r["seed"] for r in results],
        "each": columns,
        "seconds": sum(r["seconds"] for r in results),
    }


def _finetune_once(run: Run, name: str, source: str, seed: int) -> None:
    if not open_stage(run, name):
        return
    config, ranks = run.config, run.ranks
    splits = _splits(run)
    train = splits["train"]
    if not train.classes:
        raise UserError(
            f"{train.root} has no labels: fine-tuning needs a set packed with its classes"
        )
    if 0 in train.class_counts:
        empty = train.classes[train.class_counts.index(0)]
        raise UserError(
            f"{train.root}: class {empty!r} has no training image: add some, or pack without it"
        )
    weights = pretrained(run, source)
    reference = base_encoder(run, weights)
    model = classifier(run, weights, len(train.classes), seed)
    objective = ClassifyObjective(model, Normalize(weights.mean, weights.std))
    device = ranks.device
    keys = ("images", "labels", "flip") if config.finetune.flip else ("images", "labels")

    def inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: batch[k].to(device, non_blocking=True) for k in keys}

    def finish(engine: Any) -> dict[str, Any]:
        metrics: dict[str, float] = {}
        scores: dict[str, Scores] = {}
        for split in ("val", "test"):
            if split in splits:
                scores[split] = evaluate(run, engine, splits[split])
                metrics |= scores[split].as_dict(split)
        encoder = full_state(engine.module.model.encoder, keep=ranks.main)
        head = full_state(engine.module.model.head, keep=ranks.main)
        folder = run.folder / name / "export"
        if ranks.main:
            export_classifier(
                folder,
                weights.shape,
                encoder,
                head,
                train.classes,
                config.finetune.pool,
                weights.mean,
                weights.std,
            )
        return {"metrics": metrics, "scores": scores, "export": str(folder), "start": source}

    fit(
        run,
        Fit(
            name=name,
            kind="finetune",
            plan=config.finetune,
            objective=objective,
            keyed=Flips(seed) if config.finetune.flip else None,
            inputs=inputs,
            base=weights,
            train=train,
            encoder=model.encoder,
            reference=reference,
            seed=seed,
            record={"start": weights.sha256},
            flops=flops.step_flops(
                weights.shape, "finetune", teacher="cached", classes=len(train.classes)
            ),
            validate=splits.get("val"),
            finish=finish,
        ),
    )


def _data(run: Run) -> str:
    path = run.config.data.path
    if path is None:
        raise UserError("--data is missing: name a folder made by python -m data.pack")
    return path


def _splits(run: Run) -> dict[str, Manifest]:
    """Manifests of the splits that are there; their classes must agree."""
    found = {"train": Manifest.load_split(_data(run), "train")}
    for split in ("val", "test"):
        try:
            found[split] = Manifest.load_split(_data(run), split)
        except UserError:
            if (Path(_data(run)) / split).exists():
                raise
    for manifest in found.values():
        if manifest.classes != found["train"].classes:
            raise UserError(
                f"{manifest.root}: its classes are not those of the train split: pack both together"
            )
    if len(found) == 1:
        run.say(f"{_data(run)}: neither val nor test split: nothing will be scored")
    return found
