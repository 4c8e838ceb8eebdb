"""Stages 1 and 2 under a probe: where its labels come from, when it is asked, what it says."""

from __future__ import annotations

import time
from typing import Any

from selfdistill.data.errors import TryAgain, UserError
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.monitoring.monitor import Monitor
from selfdistill.engine.stages.splits import labelled_splits
from selfdistill.engine.training.modalities.base import Modality, Pooled
from selfdistill.engine.training.scoring.probe import Probe
from selfdistill.engine.training.stage import Stage

#: Probes of a stage under `--probe.every auto`, beside the one at its start.
AUTO = 10


class Probed(Stage):
    """A stage whose encoder is judged on the way by the labels of train and val.

    Attributes:
        probe: None where there is none: `--probe.every 0`, or auto without labels.

    Args:
        run: the launch.
        name: see `Stage`, as the others.
        train: what it learns from, labels or not.
        modality: of the inputs.
        base: weights that it starts from.
        seed: of order, head and dropout.
        record: what its figures depend on.
    """

    judge = "probe/linear"

    def __init__(
        self,
        run: Run,
        name: str,
        train: Manifest,
        modality: Modality,
        base: Any,
        *,
        seed: int,
        record: dict[str, Any],
    ) -> None:
        settings, plan = run.config.probe, getattr(run.config, self.section)
        if plan.judged:
            record = record | {f"probe.{k}": v for k, v in settings.model_dump().items()}
        super().__init__(run, name, train, modality, base, seed=seed, record=record)
        self.probe: Probe | None = None
        if not settings.every:
            return
        splits, lacking = dict[str, Manifest](), ""
        try:
            splits = labelled_splits(run)
        except TryAgain:  # they may be there
            raise
        except UserError as error:  # every rank's
            lacking = str(error)
        lacking = lacking or lacks(splits)
        if not lacking:
            feature = probed_feature(run, modality, base)
            self.probe = Probe(run, modality, base, splits, feature)
            if plan.judged:  # what is measured otherwise is no better or worse
                hashes = {f"probe.{name}": splits[name].hash for name in ("train", "val")}
                self.record |= {"probe.feature": feature} | hashes
            self.whole_curve = True
            # No clock decides on weights that are kept.
            self.paced = settings.every == "auto" and not plan.judged
        elif settings.every == "auto" and not plan.judged:
            run.info_once(f"no probe: {lacking}")
        else:
            raise UserError(f"--probe.every {settings.every}: {lacking}: pack one, or leave it out")

    @property
    def manifests(self) -> list[Manifest]:
        """See `Stage`: also those that are probed by."""
        more = self.probe.splits.values() if self.probe else ()
        own = super().manifests
        return own + [m for m in more if m.root not in {one.root for one in own}]

    @property
    def eval_every(self) -> int:
        """See `Stage`: as asked for, or tenths of the stage."""
        every = self.config.probe.every if self.probe else 0
        return -(-self.steps // AUTO) if every == "auto" else every

    def measure(self, engine: Any, monitor: Monitor, step: int) -> dict[str, float]:
        """See `Stage`: the four figures of the probe."""
        assert self.probe is not None
        began = time.monotonic()
        found = self.probe(engine, step)
        self.run.info(
            f"{self.name}: step {step}: probe: linear {100 * found['linear']:.2f}%, k-NN"
            f" {100 * found['knn']:.2f}%, rank {found['rank']:.1f}, spread {found['spread']:.4f}"
            f" ({time.monotonic() - began:.1f} s)"
        )
        return {f"probe/{name}": value for name, value in found.items()}


def lacks(splits: dict[str, Manifest]) -> str:
    """What a probe would need and the splits have not; "" where they have it."""
    train, val = splits["train"], splits.get("val")
    if val is None:
        return f"{train.root} has no val split beside it, by whose labels the probe is scored"
    for manifest in (train, val):
        if len(manifest.classes) < (1 if manifest.several else 2):
            return f"{manifest.root} has no labels of two classes, which a probe tells apart"
        if manifest.labelled != manifest.samples:
            return f"{manifest.root} has samples without a label, and a probe needs them all"
    return ""


def probed_feature(run: Run, modality: Modality, base: Any) -> Pooled:
    """What is read of a sample: the feature that stage 2 distils, where that is one vector."""
    feature = run.config.distill.feature
    return feature if feature in ("cls", "mean") else modality.pooling(base)
