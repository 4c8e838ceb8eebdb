"""Stage 3: fine-tuning from any of a run's weights, for several seeds."""

from __future__ import annotations

import shutil
import statistics
import time
from typing import Any

from selfdistill.data.errors import UserError
from selfdistill.engine import regularizers
from selfdistill.engine.checkpoints.folder import Run, open_stage, write_result
from selfdistill.engine.runtime.distributed import main_only
from selfdistill.engine.stages.splits import labelled_splits
from selfdistill.engine.training.analysis import analyse
from selfdistill.engine.training.fit import Fit, check_shards, fit
from selfdistill.engine.training.kinds import kind_of
from selfdistill.engine.training.kinds.base import Batch
from selfdistill.engine.training.record import record_of, scalars
from selfdistill.engine.training.teacher import view


def finetune_source(run: Run, start: str) -> tuple[str, str]:
    """Stage folder name and weights of a fine-tuning.

    Raises:
        UserError: the stage to start from is not complete.
    """
    config = run.config
    if config.finetune.weights is not None:
        return "finetune", config.finetune.weights
    if start == "model":
        if config.model.path is None:
            raise UserError("--finetune.start model needs --model")
        return "finetune-model", config.model.path
    if start == "pretrain" or start.startswith("distill-"):
        stage, name = start, f"finetune-{start}"
    else:
        done = [p.parent.name for p in run.folder.glob("distill-*/result.json")]
        numbers = sorted(int(n.removeprefix("distill-")) for n in done)
        number = numbers[-1] if numbers and config.stage == "finetune" else config.rounds
        stage, name = f"distill-{number}", "finetune"
    if run.result(stage) is None:
        more = f" --rounds {stage.removeprefix('distill-')}" if start.startswith("distill-") else ""
        raise UserError(
            f"nothing to fine-tune: {run.folder / stage} is not complete: run --stage pretrain and "
            f"--stage distill{more} first, or take --finetune.start model"
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
    columns = {k: [r["metrics"][k] for r in results] for k in results[0]["metrics"]}
    # A stage that an earlier version completed has no analysis.
    analyses = [scalars(r.get("analysis", {})) for r in results]
    analysed = {k: [a[k] for a in analyses] for k in analyses[0] if all(k in a for a in analyses)}
    return {
        "stage": name,
        "start": source,
        "n": len(results),
        "metric": results[0]["metric"],
        "metrics": {k: statistics.fmean(v) for k, v in columns.items()},
        # Sample standard deviation (n - 1), as papers report it.
        "std": {k: statistics.stdev(v) for k, v in columns.items()},
        "analysis": {k: statistics.fmean(v) for k, v in analysed.items()},
        "analysis_std": {k: statistics.stdev(v) for k, v in analysed.items()},
        "seeds": [r["seed"] for r in results],
        "each": columns,
        "seconds": sum(r["seconds"] for r in results),
    }


def _finetune_once(run: Run, name: str, source: str, seed: int) -> None:
    began = time.time()
    config, ranks = run.config, run.ranks
    splits = labelled_splits(run)
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
    plan, steps = config.finetune, config.finetune.length(train.samples)
    more = {"start": weights.sha256} | regularizers.record(config)
    regularizers.check(run, steps)
    record = record_of(run, "finetune", config.finetune, train, more, seed)
    if not open_stage(run, name, record, train.hash):
        return
    check_shards(run, *splits.values(), labels=True)
    # theta_init, from which the distance is measured.
    known = config.model.path not in (None, "scratch")
    initial = kind.load() if known else weights
    model = kind.classifier(weights, train.classes, seed)

    how = regularizers.choose(run, kind, model, weights, seed)

    def inputs(batch: Batch) -> Batch:
        # The seeds of noise stay on the CPU, where generators take them from.
        aside = {k: batch[k] for k in ("noise_key", "noise_length") if k in batch}
        return view(batch, (*kind.labelled, "labels"), ranks.device) | aside

    def finish(engine: Any) -> dict[str, Any]:
        scores, analysis = analyse(run, engine, kind, weights, initial, splits)
        metrics: dict[str, float] = {}
        for split in scores:
            metrics |= scores[split].as_dict(split)
        folder = run.folder / name / "export"
        kind.export_classifier(folder, engine.module.model, weights, train.classes)
        return {
            "metric": train.text.get("metric") or "accuracy",
            "metrics": metrics,
            "analysis": analysis,
            "scores": scores,
            "export": str(folder),
            "start": source,
        }

    fit(
        run,
        Fit(
            name=name,
            stage="finetune",
            plan=plan,
            objective=how.objective,
            keyed=how.keyed,
            inputs=inputs,
            data=kind,
            base=weights,
            train=train,
            encoder=model.encoder,
            reference=initial.encoder,
            seed=seed,
            record=record,
            began=began,
            validate=splits.get("val"),
            finish=finish,
            labelled=True,
            reconstructs=False,
            counted=how.counted,
            optimizer=how.optimizer,
            after=how.after,
        ),
    )
