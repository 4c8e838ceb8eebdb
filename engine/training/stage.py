"""What a stage is: an object that builds the model and says what each part of the loop needs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor, nn

from selfdistill.data.loading.batches import Options
from selfdistill.data.loading.codec import Codec
from selfdistill.data.loading.datasets import Keyed
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.stages import StageSection
from selfdistill.engine.monitoring.monitor import Monitor
from selfdistill.engine.training.modalities.base import Batch, Modality, Section
from selfdistill.engine.training.record import record_of


class Stage:
    """One training of a run. `training.loop` calls the methods in the order that they stand here.

    A subclass must have `build`, `keyed`, `inputs` and `finish`, which raise NotImplementedError
    here, and `measure` where `eval_every` is not 0; the others do what most stages want.

    Attributes:
        section: its section of the configuration.
        labelled: whether every sample must have a label.
        reconstructs: whether the objective reconstructs a masked view, which pictures show.
        counted: whether `Modality.flops` says what a step costs.
        judge: of what `measure` gives, the figure by which weights are kept; the higher the better.
        paced: whether measurements are left out that would take too much time.
        whole_curve: whether `measure` is also called before the first step and after the last.
        windows: which samples are windows of long texts; None where each text or image is one.
        samples: number of the samples.
        model: the network in the objective, made by `build`; its `encoder` is watched.

    Args:
        run: the launch.
        name: of the stage's folder.
        train: manifest of the samples that it learns from.
        modality: of the inputs.
        base: weights that it starts from.
        seed: of order, head and dropout.
        record: what its figures depend on beside the configuration: hashes, settings of a view.
    """

    section: ClassVar[Section]
    labelled = False
    reconstructs = True
    counted = True
    judge = ""
    paced = False
    whole_curve = False
    model: Any

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
        self.began = time.monotonic()
        self.run, self.config, self.ranks = run, run.config, run.ranks
        self.name, self.train, self.modality, self.base, self.seed = (
            name,
            train,
            modality,
            base,
            seed,
        )
        self.plan: StageSection = getattr(run.config, self.section)
        # A label is that of the whole text.
        self.windows = None if self.labelled else modality.windows(train, base)
        self.samples = (self.windows or train).samples
        self.epoch = train.epoch((self.windows or train).counts)
        self.steps = self.plan.length(self.epoch)
        record = record | base.told
        if self.windows is not None:
            overlap = run.config.text.overlap
            record = record | {"text.windows": self.samples, "text.overlap": overlap}
        self.record = record_of(run, self.section, self.plan, self.epoch, record, seed)

    def check(self) -> None:
        """Refuses data that the model cannot read, and a warm-up that is too long."""
        for manifest in self.manifests:
            if self.windows is None or manifest is not self.train:  # else it was told of windows
                self.modality.check(manifest, self.base)
        self.plan.check_warmup(self.section, self.steps)

    @property
    def manifests(self) -> list[Manifest]:
        """The splits that the stage reads."""
        return [self.train]

    @property
    def eval_every(self) -> int:
        """Steps between calls of `measure`; 0 for none."""
        return 0

    @property
    def reference(self) -> Mapping[str, Tensor]:
        """The encoder's weights from which its distance is logged: theta_init."""
        weights: Mapping[str, Tensor] = self.base.encoder
        return weights

    def build(self) -> nn.Module:
        """Makes `model`, and returns the objective: a module whose forward gives the losses."""
        raise NotImplementedError

    def optimizer(self, objective: nn.Module) -> Any | None:
        """An optimiser of the stage's own; None: AdamW."""
        return None

    def keyed(self) -> Keyed | None:
        """The random numbers of the stage's view of a sample, keyed by position in the stream."""
        raise NotImplementedError

    def reading(self, codec: Codec) -> Options:
        """How the loader of the training samples reads, with their codec. Every rank calls it."""
        return self.run.reading(codec, self.windows, require_labels=self.labelled)

    def start(self, engine: Any) -> None:
        """Called once, when the engine is ready for its next step."""

    def flops(self, batch: Batch) -> float:
        """FLOPs of a batch in one step, forward and backward; 0 where they are not known."""
        if not self.counted:
            return 0.0
        classes = len(self.train.classes)
        return self.modality.flops(self.base, self.section, self.teacher_mode, classes, batch)

    @property
    def teacher_mode(self) -> Any:
        """Of the teacher, which costs FLOPs in a step unless it is cached."""
        return "cached"

    def units(self, batch: Batch) -> float | None:
        """Masked units by whose number in the global batch the loss is divided, or weights.

        None where the objective's loss is a mean already, over as many units in each batch.
        """
        return self.modality.count(batch) if self.reconstructs else None

    def inputs(self, batch: Batch) -> Batch:
        """A loader's batch -> the objective's arguments, on the device."""
        raise NotImplementedError

    def after_update(self) -> None:
        """Called after each update of the weights."""

    def scored(self) -> AbstractContextManager[None]:
        """Within, the engine has the weights that are scored and exported. Every rank calls it."""
        return nullcontext()

    def measure(self, engine: Any, monitor: Monitor, step: int) -> dict[str, float]:
        """How the model does after a step: scalars, tag -> value. Every rank calls it.

        The engine may be left in the mode of evaluation.
        """
        raise NotImplementedError

    def draw(self, monitor: Monitor, step: int, batch: Batch, outputs: Batch) -> None:
        """Shows what the model makes of a batch; on rank 0 alone, where `reconstructs`."""
        self.modality.draw(monitor, step, batch, outputs, self.base)

    def finish(self, engine: Any) -> dict[str, Any]:
        """Exports, and scores; returns entries of result.json. Every rank calls it.

        `scores` (split -> Scores) are logged and left out of result.json.
        """
        raise NotImplementedError

    def told(self) -> dict[str, Any]:
        """What result.json says of the stage itself."""
        return {
            "stage": self.name,
            "steps": self.steps,
            "samples": self.samples,
            "seed": self.seed,
            "manifest": self.train.hash,
            "record": self.record,
        }

    def close(self) -> None:
        """Gives back what the stage holds beside the engine."""
