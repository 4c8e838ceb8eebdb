"""Stage 3: fine-tuning from any of a run's weights, for several seeds."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from selfdistill.data.errors import UserError
from selfdistill.data.loading.batches import Options
from selfdistill.data.loading.codec import Codec
from selfdistill.data.loading.datasets import Keyed
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run, write_result
from selfdistill.engine.checkpoints.results import RESULT, numbered
from selfdistill.engine.config.schema import Config
from selfdistill.engine.monitoring.monitor import Monitor
from selfdistill.engine.regularizers import REGULARIZERS
from selfdistill.engine.runtime.distributed import main_only
from selfdistill.engine.stages.labels import balanced, check_labels, check_pairs, class_weights
from selfdistill.engine.stages.splits import labelled_splits
from selfdistill.engine.training.loop import run_stage
from selfdistill.engine.training.modalities import modality_of
from selfdistill.engine.training.modalities.base import Batch, settle_pooling
from selfdistill.engine.training.objectives import ClassLoss
from selfdistill.engine.training.optimizer import Average
from selfdistill.engine.training.record import scalars
from selfdistill.engine.training.scoring import intervals
from selfdistill.engine.training.scoring.analysis import analyse
from selfdistill.engine.training.scoring.evaluation import Scores, evaluate
from selfdistill.engine.training.scoring.several import SetScores
from selfdistill.engine.training.stage import Stage
from selfdistill.engine.training.teacher import view

#: Samples of a split below which its figures are warned of.
FEW = 50


def starts(config: Config) -> list[str]:
    """What a launch fine-tunes from, in order."""
    if not config.compare:
        return [config.finetune.start]
    rounds = [f"distill-{number}" for number in range(1, config.rounds)]
    return ["model", "pretrain", *rounds, "auto"]


def stage_name(config: Config, start: str) -> str:
    """The folder of a fine-tuning in the run's."""
    whole = config.finetune.weights is not None or start in ("auto", "distill")
    return "finetune" if whole else f"finetune-{start}"


def finetune_source(run: Run, start: str) -> tuple[str, str]:
    """Stage folder name and weights of a fine-tuning.

    Raises:
        UserError: the stage to start from is not complete.
    """
    config, name = run.config, stage_name(run.config, start)
    if config.finetune.weights is not None:
        return name, config.finetune.weights
    if start == "model":
        if config.model.path is None:
            raise UserError("--finetune.start model needs --model")
        return name, config.model.path
    stage = start
    if name == "finetune":
        rounds = numbered(run.folder, "distill-")
        done = [number for number, folder in rounds.items() if (folder / RESULT).is_file()]
        number = done[-1] if done and config.stage == "finetune" else config.rounds
        stage = f"distill-{number}"
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
    if check_seeds(run, name):
        run.info(f"{name}: deleting {run.folder / name} (--overwrite)")
        main_only(run.ranks, lambda: shutil.rmtree(run.folder / name))
    seeds = range(config.seed, config.seed + config.finetune.seeds)
    results = []
    for seed in seeds:
        stage = name if config.finetune.seeds == 1 else f"{name}/seed-{seed}"
        run.boundary(stage, wait=True)
        run_stage(Finetune(run, stage, source, seed))
        results.append(_scored_by(run, stage))
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
            if bounds := final.get("intervals", {}).get(key):
                low, high = (100 * float(bound) for bound in bounds)
                spread_text = f" (95% interval of the sample {low:.2f} to {high:.2f})"
            run.info(f"{name}: {key} {100 * value:.2f}%{spread_text}")
    _put_into_proportion(run, name, final["metrics"])


def _scored_by(run: Run, stage: str) -> dict[str, Any] | None:
    """The result of a fine-tuning, by the figure that is asked for now; one may be complete."""
    result, asked = run.shared_result(stage), run.config.finetune.metric
    there = result is not None and any(k.endswith(f"_{asked}") for k in result["metrics"])
    if result is None or not there or asked == result.get("metric"):
        return result
    result |= {"metric": asked}
    write_result(run, stage, result)
    return result


def _put_into_proportion(run: Run, name: str, metrics: dict[str, float]) -> None:
    """What accuracy alone does not say: the classes' F1, the commonest class, few samples."""
    for split, manifest in labelled_splits(run).items():
        if split == "train" or f"{split}_macro_f1" not in metrics:
            continue
        commonest = max(manifest.class_counts) / manifest.samples
        beside = f"the commonest class alone gives {100 * commonest:.2f}% accuracy"
        if manifest.several:
            right = metrics[f"{split}_accuracy"]
            beside = f"all labels of a sample are right in {100 * right:.2f}%"
        run.info(
            f"{name}: {split}: macro F1 {100 * metrics[f'{split}_macro_f1']:.2f}%; {beside};"
            f" {manifest.samples} samples"
        )
        if manifest.labelled and f"{split}_auroc" in metrics and len(manifest.classes) == 2:
            run.info(f"{name}: {split}: AUROC {100 * metrics[f'{split}_auroc']:.2f}%")
        if manifest.samples < FEW:
            run.info_once(
                f"warning: {split} has {manifest.samples} samples: one of them is"
                f" {100 / manifest.samples:.1f} points, and differences of a few mean nothing"
            )


def bounds_of(scores: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """The 95% bootstrap intervals of the last split's figures, by their names in result.json.

    Those of AUROC and average precision are left out where they would take more than seconds.

    Args:
        scores: by split; on rank 0, where the logits are.
    """
    if not scores:
        return {}
    split, score = list(scores.items())[-1]
    work = intervals.WORK // 4
    if isinstance(score, SetScores):
        found = intervals.of_sets(score.labels, score.probabilities, work=work)
        return {f"{split}_{name}": bounds for name, bounds in found.of.items()}
    if not isinstance(score, Scores):
        return {}
    some: dict[str, Any] = {}
    if score.kept:
        some = {"labels": score.kept.labels, "probabilities": score.kept.probabilities()}
    found = intervals.of_classes(score.confusion, **some, work=work)
    return {f"{split}_{name}": bounds for name, bounds in found.of.items()}


def check_seeds(run: Run, name: str) -> bool:
    """One fine-tuning lies in its folder, several in folders below it: no mixture.

    Returns:
        Whether the other form lies there, and `--overwrite` allows to delete it.

    Raises:
        UserError: it does not.
    """
    folder, asked = run.folder / name, run.config.finetune.seeds

    def count() -> int:
        done, below = run.result(name), len(list(folder.glob("seed-*")))
        if done is not None:
            return int(done.get("n", 1))
        return max(2, below) if below else int((folder / "checkpoints").exists())

    found = main_only(run.ranks, count)
    if not found or (found == 1) == (asked == 1):
        return False
    if not run.config.overwrite:
        raise UserError(
            f"{folder} has {found} seed(s), now they are {asked}: take another --output, or delete"
            " that folder, which is then done anew"
        )
    return True


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


def check_judge(config: Config, splits: Mapping[str, Manifest]) -> None:
    """Refuses to keep weights, or to stop, by a validation split that is not there.

    Raises:
        UserError: says so.
    """
    plan = config.finetune
    if plan.judged and "val" not in splits:
        asked = "keep best" if plan.keep == "best" else f"patience {plan.patience}"
        raise UserError(
            f"--finetune.{asked}: {splits['train'].root} has no val split beside it, by whose"
            " scores it goes: pack one (python -m data.pack --val_fraction), or leave it out"
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
        check_labels(train, run.config)
        check_pairs(run.config, run.ranks.world)
        modality = modality_of(run, train)
        base = modality.load(source)
        run.info_once(settle_pooling(run.config, modality, base))
        self.regularizer = REGULARIZERS[run.config.finetune.regularizer](run, base)
        plan = run.config.finetune
        record = {"start": base.sha256} | self.regularizer.record()
        scored = ("val", "test") if plan.test else ("val",)
        record |= {f"{k} split": self.splits[k].hash for k in scored if k in self.splits}
        if plan.judged:
            check_judge(run.config, self.splits)
            record["finetune.eval_every"] = plan.eval_every
        super().__init__(run, name, train, modality, base, seed=seed, record=record)
        self.regularizer.check(self.steps)
        self.counted = self.regularizer.counted
        self.initial: Any = base  # theta_init, from which the distance is measured
        self.average: Average | None = None
        self.judge = f"val/{self.metric}"
        if plan.judged:
            self.record["finetune.metric"] = self.metric

    @property
    def metric(self) -> str:
        """What the set is scored by: as asked for, as its manifest says, accuracy, or mAP."""
        asked = self.config.finetune.metric
        own = "average_precision" if self.train.several else "accuracy"
        return str(self.train.text.get("metric") or own) if asked == "auto" else asked

    @property
    def manifests(self) -> list[Manifest]:
        """See `Stage`."""
        return list(self.splits.values())

    @property
    def eval_every(self) -> int:
        """See `Stage`: val is scored, where there is one."""
        return self.config.finetune.eval_every if "val" in self.splits else 0

    @property
    def reference(self) -> Mapping[str, Tensor]:
        """See `Stage`."""
        weights: Mapping[str, Tensor] = self.initial.encoder
        return weights

    loss: ClassLoss

    def build(self) -> nn.Module:
        """See `Stage`."""
        if self.config.model.path not in (None, "scratch"):
            self.initial = self._origin(self.modality.load())
        self.model = self.modality.classifier(self.base, self.train.classes, self.seed)
        smoothing = self.config.finetune.label_smoothing
        self.loss = ClassLoss(class_weights(self.train, self.config), smoothing)
        return self.regularizer.objective(self.model, self.loss)

    def _origin(self, model: Any) -> Any:
        """--model, if what is fine-tuned can come of it: a recipe may name any model."""
        before = model.encoder
        alike = all(
            before[name].shape == value.shape
            for name, value in self.base.encoder.items()
            if name in before
        )
        try:
            self.modality.same_architecture(self.base, model)
        except UserError:
            alike = False
        if alike:
            return model
        self.run.info_once(
            f"note: {self.base.origin} has another architecture than --model {model.origin}:"
            " distances are from the first"
        )
        return self.base

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

    def reading(self, codec: Codec) -> Options:
        """See `Stage`."""
        return {**super().reading(codec), "balanced": balanced(self.run, self.train)}

    def units(self, batch: Batch) -> float | None:
        """See `Stage`: the weights of its classes."""
        return self.loss.units(batch["labels"], batch.get("share"))

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

    def measure(self, engine: Any, monitor: Monitor, step: int) -> dict[str, float]:
        """See `Stage`: the scores of val."""
        val = self.splits["val"]
        scores = evaluate(self.run, engine, self.modality, self.base, val)
        monitor.confusion(step, scores.confusion, val.classes)
        return {f"val/{name}": value for name, value in scores.scalars().items()}

    def finish(self, engine: Any) -> dict[str, Any]:
        """See `Stage`: scores val and test, looks at the features, exports the classifier."""
        run, modality, train = self.run, self.modality, self.train
        scores, analysis = analyse(run, engine, modality, self.base, self.initial, self.splits)
        metrics: dict[str, float] = {}
        for split in scores:
            metrics |= scores[split].as_dict(split)
        bounds = main_only(self.ranks, lambda: bounds_of(scores))
        folder = run.folder / self.name / "export"
        modality.export_classifier(folder, engine.module.model, self.base, train.classes)
        return {
            "metric": self.metric,
            "metrics": metrics,
            "intervals": bounds,
            "analysis": analysis,
            "scores": scores,
            "export": str(folder),
            "start": self.source,
        }
