"""The three stages: which model, objective and view of the data, and what each leaves behind."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from data.cache import NotThere
from data.errors import UserError
from data.manifest import Manifest, is_remote
from engine.distributed import main_only
from engine.evaluation import Scores
from engine.fit import Fit, check_shards, evaluate, fit, record_of
from engine.folder import Run, open_stage, write_result
from engine.kinds import kind_of
from engine.kinds.base import Batch, Kind
from engine.objectives import (
    ClassifyObjective,
    DistillObjective,
    FeatureExtractor,
    MaskedObjective,
)
from engine.teacher import (
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
        starts = ["model", "pretrain", "auto"] if config.compare else [config.finetune.start]
        for start in starts:
            finetune(run, start)


def pretrain(run: Run) -> None:
    """Stage 1: L_MAE from theta_init, phi_init (Algorithm 2). Leaves the teacher."""
    began = time.time()
    config = run.config
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


def distill(run: Run, number: int) -> None:
    """Stage 2, one round: a fresh student from theta_init against the frozen teacher (Eq. 3)."""
    began = time.time()
    name = f"distill-{number}"
    config, ranks, plan = run.config, run.ranks, run.config.distill
    source = main_only(ranks, lambda: teacher_source(run, number))
    train = unlabelled(run)
    kind = kind_of(run, train)
    base, taught = kind.load(), kind.load(source)
    kind.same_architecture(taught, base)
    _same_origin(run, number, base)
    more = {"model": base.sha256, "teacher": taught.sha256} | kind.record()
    record = record_of(run, "distill", plan, train, more, config.seed)
    if not open_stage(run, name, record, train.hash):
        return
    check_shards(run, train, labels=False)
    model = kind.autoencoder(base)
    teacher = _teacher(run, kind, name, taught, train)

    def inputs(batch: Batch) -> Batch:
        return view(batch, kind.masked, ranks.device) | {"target": teacher(batch)}

    def finish(engine: Any) -> dict[str, Any]:
        told = {"path": source, "sha256": taught.sha256, "mode": teacher.mode}
        return _export(run, kind, name, engine, base) | {"teacher": told}

    fit(
        run,
        Fit(
            name=name,
            stage="distill",
            plan=plan,
            objective=DistillObjective(model, plan.feature, plan.weight, plan.mae_weight),
            keyed=kind.mask(base),
            inputs=inputs,
            data=kind,
            base=base,
            train=train,
            encoder=model.encoder,
            record=record,
            began=began,
            finish=finish,
            mode=teacher.mode,
        ),
    )


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
        return Sharded(extractor, kind.full, ranks, run.dtype)
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
    name, source = main_only(run.ranks, lambda: finetune_source(run, start))
    _check_seeds(run, name)
    seeds = range(config.seed, config.seed + config.finetune.seeds)
    results = []
    for seed in seeds:
        stage = name if config.finetune.seeds == 1 else f"{name}/seed-{seed}"
        run.boundary(stage, wait=True)
        _finetune_once(run, stage, source, seed)
        results.append(run.shared_result(stage))
    if config.finetune.seeds > 1:
        write_result(run, name, _summary(name, source, [r for r in results if r]))
    final = run.shared_result(name)
    assert final is not None
    for split in ("val", "test"):
        key = f"{split}_{final['metric']}"
        if key in final["metrics"]:
            value = final["metrics"][key]
            spread = final.get("std", {}).get(key)
            more = f" ± {100 * spread:.2f} ({len(seeds)} seeds)" if spread is not None else ""
            run.say(f"{name}: {key} {100 * value:.2f}%{more}")


def _check_seeds(run: Run, name: str) -> None:
    """One fine-tuning lies in its folder, several in folders below it: no mixture."""
    done, asked = run.shared_result(name), run.config.finetune.seeds
    if done is None or ("n" not in done) == (asked == 1):
        return
    folder = run.folder / name
    if not run.config.overwrite:
        raise UserError(
            f"{folder} is complete with {done.get('n', 1)} seed(s), now they are {asked}: take"
            " another --output, or --stage finetune --overwrite true"
        )
    run.say(f"{name}: deleting {folder} (--overwrite)")
    main_only(run.ranks, lambda: shutil.rmtree(folder))


def _summary(name: str, source: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    keys = results[0]["metrics"]
    columns = {k: [r["metrics"][k] for r in results] for k in keys}
    return {
        "stage": name,
        "start": source,
        "n": len(results),
        "metric": results[0]["metric"],
        "metrics": {k: statistics.fmean(v) for k, v in columns.items()},
        # Sample standard deviation (n - 1), as papers report it.
        "std": {k: statistics.stdev(v) for k, v in columns.items()},
        "seeds": [r["seed"] for r in results],
        "each": columns,
        "seconds": sum(r["seconds"] for r in results),
    }


def _finetune_once(run: Run, name: str, source: str, seed: int) -> None:
    began = time.time()
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
            f"{train.root}: class {empty!r} has no training sample: add some, or pack without it"
        )
    kind = kind_of(run, train)
    weights = kind.load(source)
    more = {"start": weights.sha256}
    record = record_of(run, "finetune", config.finetune, train, more, seed)
    if not open_stage(run, name, record, train.hash):
        return
    check_shards(run, *splits.values(), labels=True)
    # theta_init, from which the distance is measured.
    known = config.model.path not in (None, "scratch")
    reference = (kind.load() if known else weights).encoder
    model = kind.classifier(weights, train.classes, seed)

    def inputs(batch: Batch) -> Batch:
        return view(batch, (*kind.labelled, "labels"), ranks.device)

    def finish(engine: Any) -> dict[str, Any]:
        metrics: dict[str, float] = {}
        scores: dict[str, Scores] = {}
        for split in ("val", "test"):
            if split in splits:
                scores[split] = evaluate(run, engine, kind, weights, splits[split])
                metrics |= scores[split].as_dict(split)
        folder = run.folder / name / "export"
        kind.export_classifier(folder, engine.module.model, weights, train.classes)
        return {
            "metric": train.text.get("metric") or "accuracy",
            "metrics": metrics,
            "scores": scores,
            "export": str(folder),
            "start": source,
        }

    fit(
        run,
        Fit(
            name=name,
            stage="finetune",
            plan=config.finetune,
            objective=ClassifyObjective(model),
            keyed=kind.augment(seed),
            inputs=inputs,
            data=kind,
            base=weights,
            train=train,
            encoder=model.encoder,
            reference=reference,
            seed=seed,
            record=record,
            began=began,
            validate=splits.get("val"),
            finish=finish,
        ),
    )


def unlabelled(run: Run) -> Manifest:
    """What stages 1 and 2 learn from: the split `unlabelled` where there is one, else train."""
    path, split, cache = _data(run), run.config.data.split, run.config.data.cache_dir
    if split == "auto":
        there = not is_remote(path) and (Path(path) / "unlabelled").is_dir()
        split = "unlabelled" if there else "train"
    # One rank looks, or a server that fails for another one would leave this one waiting.
    found: Manifest = main_only(run.ranks, lambda: Manifest.load_split(path, split, cache))
    return found


def _data(run: Run) -> str:
    path = run.config.data.path
    if path is None:
        raise UserError("--data is missing: name a folder made by python -m data.pack")
    return path


def _splits(run: Run) -> dict[str, Manifest]:
    """Manifests of the splits that are there; their classes must agree.

    Raises:
        UserError: a split is broken, or its server does not say whether it is there.
    """
    data, cache = _data(run), run.config.data.cache_dir

    def load() -> dict[str, Manifest]:
        there = {"train": Manifest.load_split(data, "train", cache)}
        for split in ("val", "test"):
            if not is_remote(data) and not (Path(data) / split).exists():
                continue
            try:
                there[split] = Manifest.load_split(data, split, cache)
            except NotThere as error:
                run.say(f"no {split} split, nothing is scored on it: {str(error).split(': ')[0]}")
        return there

    # One rank decides, or they might disagree on what to score, and wait for each other.
    found: dict[str, Manifest] = main_only(run.ranks, load)
    for manifest in found.values():
        if manifest.classes != found["train"].classes:
            raise UserError(
                f"{manifest.root}: its classes are not those of the train split: pack both together"
            )
    if len(found) == 1:
        run.say(f"{data}: neither val nor test split: nothing will be scored")
    return found
