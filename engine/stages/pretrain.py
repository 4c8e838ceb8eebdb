"""Stage 1: further pre-training, which leaves the teacher."""

from __future__ import annotations

from typing import Any

from torch import nn

from selfdistill.data.errors import UserError
from selfdistill.data.loading.datasets import Keyed
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.models import adapters
from selfdistill.engine.regularizers import diet, supcon
from selfdistill.engine.stages.probed import Probed, probed_feature
from selfdistill.engine.stages.shared import keep_updates
from selfdistill.engine.stages.splits import train_split, unlabelled_split
from selfdistill.engine.training.modalities import modality_of
from selfdistill.engine.training.modalities.base import Batch, Modality
from selfdistill.engine.training.objectives import MaskedObjective
from selfdistill.engine.training.stage import Stage
from selfdistill.engine.training.teacher import view

#: Stage 0, and its folder.
DECODER = "decoder"


class Masked(Stage):
    """What learns from masked views, and leaves encoder and decoder."""

    def keyed(self) -> Keyed | None:
        """See `Stage`: the masks."""
        return self.modality.mask(self.base)

    def inputs(self, batch: Batch) -> Batch:
        """See `Stage`: the masked view."""
        return view(batch, self.modality.masked, self.ranks.device)

    def finish(self, engine: Any) -> dict[str, Any]:
        """See `Stage`."""
        return export_autoencoder(self.run, self.modality, self.name, engine, self.base)


class Pretrain(Probed, Masked):
    """L_MAE from theta_init, phi_init (Algorithm 2)."""

    section = "pretrain"

    def __init__(self, run: Run) -> None:
        train = self.split(run)
        modality = modality_of(run, train)
        base = initial(run, modality)
        record = {"model": base.sha256} | modality.record(base) | self.settings(run)
        record |= adapters.record(run.config)
        super().__init__(
            run, "pretrain", train, modality, base, seed=run.config.seed, record=record
        )

    def split(self, run: Run) -> Manifest:
        """What it learns from."""
        return unlabelled_split(run)

    def settings(self, run: Run) -> dict[str, Any]:
        """More settings that its figures depend on."""
        return {}

    def check(self) -> None:
        """See `Stage`: also what stage 2, which learns from the same, would refuse after this."""
        super().check()
        if self.config.stage == "all" and not self.labelled:
            later = self.config.distill
            later.check_warmup("distill", later.length(self.epoch))

    def build(self) -> nn.Module:
        """See `Stage`."""
        self.model = self.modality.autoencoder(self.base)
        adapters.adapt(self.model.encoder, self.config)
        return MaskedObjective(self.model)


class Contrast(Pretrain):
    """Stage 1 as a baseline has it: the supervised contrastive loss, on the labelled train split.

    Leaves what stage 1 leaves, the decoder as it was.
    """

    labelled = True
    reconstructs = False
    counted = False

    def split(self, run: Run) -> Manifest:
        """See `Pretrain`."""
        train = train_split(run)
        supcon.check(run.config, train)
        return train

    def settings(self, run: Run) -> dict[str, Any]:
        """See `Pretrain`."""
        return {f"supcon.{k}": v for k, v in run.config.supcon.model_dump().items()}

    def build(self) -> nn.Module:
        """See `Stage`."""
        settings = self.config.supcon
        self.model = self.modality.autoencoder(self.base, settings.dropout)
        adapters.adapt(self.model.encoder, self.config)
        (width,) = self.modality.feature_shape(self.base, "cls") or (0,)
        return supcon.SupConObjective(self.model, width, settings)

    def keyed(self) -> Keyed | None:
        """See `Stage`: of two views of each sample."""
        return self.modality.pairs(self.seed)

    def inputs(self, batch: Batch) -> Batch:
        """See `Stage`: all first views, then all second ones."""
        entries = self.modality.paired(batch) | {"labels": batch["labels"]}
        return view(entries, tuple(entries), self.ranks.device)


class Instances(Pretrain):
    """Stage 1 as a rival has it: each sample is told from all others, without labels.

    Leaves what stage 1 leaves, the decoder as it was.
    """

    reconstructs = False
    counted = False

    def settings(self, run: Run) -> dict[str, Any]:
        """See `Pretrain`."""
        found = {f"diet.{k}": v for k, v in run.config.diet.model_dump().items()}
        return found | {"distill.feature": run.config.distill.feature}

    def check(self) -> None:
        """See `Stage`: also how many samples there are."""
        super().check()
        diet.check(self.samples, self.train.root)

    def build(self) -> nn.Module:
        """See `Stage`."""
        self.model = self.modality.autoencoder(self.base)
        adapters.adapt(self.model.encoder, self.config)
        feature = probed_feature(self.run, self.modality, self.base)
        (width,) = self.modality.feature_shape(self.base, feature) or (0,)
        smoothing = self.config.diet.smoothing
        return diet.DietObjective(self.model, feature, width, self.samples, smoothing)

    def keyed(self) -> Keyed | None:
        """See `Stage`: of a view of each sample."""
        return self.modality.varied(self.seed)

    def inputs(self, batch: Batch) -> Batch:
        """See `Stage`: the view, and which sample it is of."""
        return view(batch, (*self.modality.labelled, "ids"), self.ranks.device)


def pretraining(run: Run) -> Pretrain:
    """Stage 1 with the objective that `--pretrain.objective` names."""
    return {"mae": Pretrain, "supcon": Contrast, "diet": Instances}[run.config.pretrain.objective](
        run
    )


def initial(run: Run, modality: Modality) -> Any:
    """theta_init and phi_init: --model, with the decoder of stage 0 where it has none of its own.

    Raises:
        UserError: the run's decoder was trained for another encoder.
    """
    base = modality.load()
    if base.decoder is not None:
        return base
    made = run.shared_result(DECODER)
    if made is None:
        run.info_once(
            f"warning: {base.origin} has no decoder: a new, random one takes its place, which"
            " spoils the encoder in its first steps; --stage decoder trains one before"
        )
        return base
    record = made.get("record") or {}
    settings = record.get("model_settings", base.settings)  # it is not known of former ones
    if (record.get("model"), settings) != (base.sha256, base.settings):
        raise UserError(
            f"{run.folder / DECODER} is the decoder of another encoder than {base.origin}: give the"
            " model that it was trained for, or another --output"
        )
    return modality.load(str(run.folder / DECODER / "export"))


def export_autoencoder(
    run: Run, modality: Modality, stage: str, engine: Any, base: Any
) -> dict[str, Any]:
    """Exports encoder and decoder; says where, for result.json. Every rank calls it."""
    folder, model = run.folder / stage / "export", engine.module.model
    modality.export_autoencoder(folder, model, base)
    keep_updates(run, stage, model.encoder)
    return {"export": str(folder)}
