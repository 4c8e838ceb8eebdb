"""Stage 3: fine-tuning from any of a run's weights, for several seeds."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from selfdistill.data.errors import UserError
from selfdistill.data.loading.datasets import Keyed
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run, write_result
from selfdistill.engine.checkpoints.results import RESULT, numbered
from selfdistill.engine.regularizers import REGULARIZERS
from selfdistill.engine.runtime.distributed import main_only
from selfdistill.engine.stages.splits import labelled_splits
from selfdistill.engine.training.analysis import analyse
from selfdistill.engine.training.loop import run_stage
from selfdistill.engine.training.modalities import modality_of
from selfdistill.engine.training.modalities.base import Batch, settle_pooling
from selfdistill.engine.training.optimizer import Average
from selfdistill.engine.training.record import scalars
from selfdistill.engine.training.stage import Stage
from selfdistill.engine.training.teacher import view

#: Samples of a split below which its figures are warned of.
FEW = 50


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
        rounds = numbered(run.folder, "distill-")
        done = [number for number, folder in rounds.items() if (folder / RESULT).is_file()]
        number = done[-1] if done and config.stage == "finetune" else config.rounds
        stage, name = f"distill-{number}", "finetune"
    if run.result(stage) is None:
        option = (
            f" --rounds {stage.removeprefix('distill-')}" if start.startswith("distill-") else ""
        )
        raise UserError(
            f"nothing to fine-tune: {run.folder / stage} is not complete: run --stage pretrain and "
            f"--stage distill{option} first, or take --finetune.start model"
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
        run_stage(Finetune(run, stage, source, seed))
        results.append(run.shared_result(stage))
    if config.finetune.seeds > 1:
        write_result(run, name, _summary(name, source, [r for r in results if r]))
    final = run.shared_result(name)
    assert final is not None
    for split in ("val", "test"):
        key = f"{split}_{final.get('metric')}"
        if key in final["metrics"]:
            value = final["metrics"][key]
            spread = final.get("std", {}).get(key)
            spread_text = (
                f" ± {100 * spread:.2f} ({len(seeds)} seeds)" if spread is not None else ""
            )
            run.info(f"{name}: {key} {100 * value:.2f}%{spread_text}")
    _put_into_proportion(run, name, final["metrics"])


def _put_into_proportion(run: Run, name: str, metrics: dict[str, float]) -> None:
    """What accuracy alone does not say: the classes' F1, the commonest class, few samples."""
    for split, manifest in labelled_splits(run).items():
        if split == "train" or f"{split}_macro_f1" not in metrics:
            continue
        commonest = max(manifest.class_counts) / manifest.samples
        run.info(
            f"{name}: {split}: macro F1 {100 * metrics[f'{split}_macro_f1']:.2f}%; the commonest"
            f" class alone gives {100 * commonest:.2f}% accuracy; {manifest.samples} samples"
        )
        if manifest.samples < FEW:
            run.info(
                f"warning: {split} has {manifest.samples} samples: one of them is"
                f" {100 / manifest.samples:.1f} points, and differences of a few mean nothing"
            )


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
    run.info(f"{name}: deleting {folder} (--overwrite)")
    main_only(run.ranks, lambda: shutil.rmtree(folder))


def _summary(name: str, source: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    shared = [k for k in results[0]["metrics"] if all(k in r["metrics"] for r in results)]
    columns = {k: [r["metrics"][k] for r in results] for k in shared}
    # A stage that an earlier version completed has no analysis.
    analyses = [scalars(r.get("analysis", {})) for r in results]
    analysed = {k: [a[k] for a in analyses] for k in analyses[0] if all(k in a for a in analyses)}
    return {
        "stage": name,
        "start": source,
        "n": len(results),
        "metric": results[0].get("metric"),
        "metrics": {k: statistics.fmean(v) for k, v in columns.items()},
        # Sample standard deviation (n - 1), as papers report it.
        "std": {k: statistics.stdev(v) for k, v in columns.items()},
        "analysis": {k: statistics.fmean(v) for k, v in analysed.items()},
        "analysis_std": {k: statistics.stdev(v) for k, v in analysed.items()},
        "seeds": [r.get("seed") for r in results],
        "each": columns,
        "seconds": sum(r["seconds"] for r in results),
    }


def check_labels(train: Manifest) -> None:
    """Refuses a training split without labels, or with a class that none of its samples has.

    Raises:
        UserError: says which.
    """
    if not train.classes:
        raise UserError(
            f"{train.root} has no labels: fine-tuning needs a set packed with its classes; stages 1"
            " and 2 run alone (--stage pretrain, --stage distill)"
        )
    if 0 in train.class_counts:
        empty = train.classes[train.class_counts.index(0)]
        raise UserError(
            f"{train.root}: class {empty!r} has no training sample: add some, or pack without it"
        )


class Finetune(Stage):
    """Cross-entropy of a fresh head and the encoder, with one seed.

    Args:
        run: the launch.
        name: of the stage's folder.
        source: folder or name of the weights that it starts from.
        seed: of order, head and dropout.
    """

    section = "finetune"
    labelled = True
    reconstructs = False

    def __init__(self, run: Run, name: str, source: str, seed: int) -> None:
        self.splits, self.source = labelled_splits(run), source
        train = self.splits["train"]
        check_labels(train)
        modality = modality_of(run, train)
        base = modality.load(source)
        run.info_once(settle_pooling(run.config, modality, base))
        self.regularizer = REGULARIZERS[run.config.finetune.regularizer](run, base)
        record = {"start": base.sha256} | self.regularizer.record()
        super().__init__(run, name, train, modality, base, seed=seed, record=record)
        self.regularizer.check(self.steps)
        self.counted = self.regularizer.counted
        self.initial: Any = base  # theta_init, from which the distance is measured
        self.average: Average | None = None

    @property
    def metric(self) -> str:
        """What the set is scored by: as asked for, as its manifest says, or accuracy."""
        asked = self.config.finetune.metric
        return str(self.train.text.get("metric") or "accuracy") if asked == "auto" else asked

    @property
    def manifests(self) -> list[Manifest]:
        """See `Stage`."""
        return list(self.splits.values())

    @property
    def validation(self) -> Manifest | None:
        """See `Stage`."""
        return self.splits.get("val")

    @property
    def reference(self) -> Mapping[str, Tensor]:
        """See `Stage`."""
        weights: Mapping[str, Tensor] = self.initial.encoder
        return weights

    def build(self) -> nn.Module:
        """See `Stage`."""
        if self.config.model.path not in (None, "scratch"):
            self.initial = self.modality.load()
        self.model = self.modality.classifier(self.base, self.train.classes, self.seed)
        return self.regularizer.objective(self.model)

    def optimizer(self, objective: nn.Module) -> Any | None:
        """See `Stage`."""
        return self.regularizer.optimizer(objective)

    def start(self, engine: Any) -> None:
        """See `Stage`."""
        self.regularizer.start(engine)
        if self.config.finetune.ema:
            self.average = Average(engine, self.config.finetune.ema, self.ranks)

    def keyed(self) -> Keyed | None:
        """See `Stage`: of the augmentation, and of what the regularizer draws."""
        return self.regularizer.keyed(self.modality.augment(self.seed), self.seed)

    def inputs(self, batch: Batch) -> Batch:
        """See `Stage`."""
        entries = view(batch, (*self.modality.labelled, "labels"), self.ranks.device)
        return entries | self.regularizer.entries(batch)

    def after_update(self) -> None:
        """See `Stage`."""
        self.regularizer.after_update()
        if self.average:
            self.average.update()

    def scored(self) -> AbstractContextManager[None]:
        """See `Stage`: the weights' average, where there is one."""
        return self.average.applied() if self.average else super().scored()

    def finish(self, engine: Any) -> dict[str, Any]:
        """See `Stage`: scores val and test, looks at the features, exports the classifier."""
        run, modality, train = self.run, self.modality, self.train
        scores, analysis = analyse(run, engine, modality, self.base, self.initial, self.splits)
        metrics: dict[str, float] = {}
        for split in scores:
            metrics |= scores[split].as_dict(split)
        folder = run.folder / self.name / "export"
        modality.export_classifier(folder, engine.module.model, self.base, train.classes)
        return {
            "metric": self.metric,
            "metrics": metrics,
            "analysis": analysis,
            "scores": scores,
            "export": str(folder),
            "start": self.source,
        }
