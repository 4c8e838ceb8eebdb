"""Stage 2: self-distillation, a fresh student against the frozen teacher."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from selfdistill.data.errors import UserError
from selfdistill.data.loading.datasets import Keyed
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.models import adapters
from selfdistill.engine.regularizers import matching
from selfdistill.engine.runtime.distributed import main_only
from selfdistill.engine.stages.pretrain import export_autoencoder, initial
from selfdistill.engine.stages.probed import Probed
from selfdistill.engine.stages.shared import Shared, updates_of
from selfdistill.engine.stages.splits import unlabelled_split
from selfdistill.engine.training.modalities import modality_of
from selfdistill.engine.training.modalities.base import Batch, settle_pooling
from selfdistill.engine.training.objectives import DistillObjective, FeatureExtractor
from selfdistill.engine.training.teacher import (
    Replicated,
    Sharded,
    Teacher,
    build_table,
    choose,
    table_bytes,
    view,
)


class Distill(Probed):
    """One round: the student starts from theta_init, L_MAE plus the distance of features (Eq. 3).

    Attributes:
        teacher: gives the targets of a batch; None where the objective asks for none.
        teacher_weights: those of the teacher; None at `--distill.weight 0`.

    Args:
        run: the launch.
        number: of the round, from 1.
    """

    section = "distill"

    def __init__(self, run: Run, number: int) -> None:
        plan = run.config.distill
        matching.check(run.config)
        # Without its term the teacher is not asked for anything.
        self.source: str | None = main_only(
            run.ranks, lambda: teacher_source(run, number) if plan.weight else None
        )
        train = unlabelled_split(run)
        modality = modality_of(run, train)
        base = initial(run, modality)
        run.info_once(settle_pooling(run.config, modality, base))
        record = {"model": base.sha256}
        self.teacher_weights = None
        if self.source is not None:
            self.teacher_weights = modality.load(self.source)
            modality.same_architecture(self.teacher_weights, base)
            _same_origin(run, number, base)
            record["teacher"] = self.teacher_weights.sha256
        self.teacher: Teacher | matching.Predictor | None = None
        self.mode = "none"  # how the teacher's weights are used, for result.json
        self.reconstructs = plan.mae_weight > 0 or (plan.match == "prediction" and plan.weight > 0)
        self.counted = plan.match == "feature" and plan.weight > 0 and plan.mae_weight > 0
        name = f"distill-{number}"
        record |= modality.record(base) | adapters.record(run.config)
        super().__init__(run, name, train, modality, base, seed=run.config.seed, record=record)

    @property
    def teacher_mode(self) -> Any:
        """See `Stage`."""
        return "cached" if self.teacher is None else self.teacher.mode

    def build(self) -> nn.Module:
        """See `Stage`: also makes the teacher, as `--distill.match` and `--teacher.mode` say."""
        plan, modality, run = self.config.distill, self.modality, self.run
        self.model = model = modality.autoencoder(self.base)
        adapters.adapt(model.encoder, self.config)
        weights, teacher = (plan.weight, plan.mae_weight), self.teacher_weights
        if teacher is None:
            return DistillObjective(model, plan.settled, *weights)
        if plan.match == "feature":
            self.teacher = self._teacher(teacher)
            self.mode = "shared" if isinstance(self.teacher, Shared) else self.teacher.mode
            return DistillObjective(model, plan.settled, *weights)
        if plan.match == "prediction":
            if teacher.decoder is None:
                raise UserError(
                    f"teacher {teacher.origin} has no decoder, and --distill.match prediction"
                    " compares what decoders predict: give one that stage 1 left, or"
                    " --distill.match feature"
                )
            network = modality.autoencoder(teacher)
            self.teacher = matching.Predictor(network, modality.masked, run.ranks, run.dtype)
            self.mode = self.teacher.mode
            return matching.PredictionObjective(model, *weights)
        reference = {k: v.float().to(run.ranks.device) for k, v in teacher.encoder.items()}
        match: Any = plan.match.removeprefix("weights_")
        self.mode = "weights"
        return matching.WeightsObjective(model, reference, match, *weights)

    def _teacher(self, weights: Any) -> Teacher:
        """The teacher of features: cached, replicated or sharded."""
        run, modality, config, ranks = self.run, self.modality, self.config, self.ranks
        feature = config.distill.settled
        shape = modality.feature_shape(weights, feature)
        folder = run.folder / self.name / "teacher"
        size = None if shape is None else table_bytes(self.samples, shape)
        mode = main_only(ranks, lambda: choose(config.teacher.mode, size, config, folder))
        table = "" if size is None else f" (its features as a table: {size / 2**20:.1f} MiB)"
        run.info(f"{self.name}: teacher {mode}{table}")
        if mode == "replicated" and (updates := self._updates()) is not None:
            return Shared(self.model, updates, feature, modality.full, run)
        extractor = FeatureExtractor(modality.encoder(weights), feature).eval()
        if mode == "sharded":
            return Sharded(extractor, modality.full, ranks, config.precision)
        whole = Replicated(extractor, modality.full, ranks, run.dtype)
        if mode == "replicated":
            return whole
        assert shape is not None
        parts = f", {self.samples} windows" if self.windows else ""
        if self.windows and config.text.overlap:
            parts += f" that overlap by {config.text.overlap} tokens"
        key = {
            "manifest": self.train.hash,
            "teacher": weights.sha256,
            "view": f"{modality.view(weights)}{parts}, {feature}, {config.precision}",
        }
        codec = modality.codec(weights, self.train)
        return build_table(run, folder, key, self.train, self.windows, codec, whole, shape)

    def _updates(self) -> dict[str, Tensor] | None:
        """The teacher's updates of the weights that the student has too, or None."""
        run, taught = self.run, self.teacher_weights
        found = updates_of(run, str(self.source), self.model.encoder, taught, self.base)
        if found is not None:
            run.info(f"{self.name}: the teacher shares the student's frozen weights")
        return found

    def keyed(self) -> Keyed | None:
        """See `Stage`: the masks."""
        return self.modality.mask(self.base)

    def inputs(self, batch: Batch) -> Batch:
        """See `Stage`: both views, and the teacher's features."""
        target = {} if self.teacher is None else {"target": self.teacher(batch)}
        return view(batch, self.modality.masked, self.ranks.device) | target

    def finish(self, engine: Any) -> dict[str, Any]:
        """See `Stage`."""
        entries = export_autoencoder(self.run, self.modality, self.name, engine, self.base)
        if self.teacher_weights is None:
            return entries
        sha256 = self.teacher_weights.sha256
        return entries | {"teacher": {"path": self.source, "sha256": sha256, "mode": self.mode}}

    def close(self) -> None:
        """See `Stage`."""
        if self.teacher is not None:
            self.teacher.close()


def _teaching_stage(run: Run, number: int) -> str | None:
    """The run's stage that leaves the teacher of a round; None where --teacher names another."""
    if number == 1 and run.config.teacher.path:
        return None
    return "pretrain" if number == 1 else f"distill-{number - 1}"


def _same_origin(run: Run, number: int, base: Any) -> None:
    """Refuses to distil into another theta_init than the run's teacher started from."""
    stage = _teaching_stage(run, number)
    origin = stage and (run.shared_result(stage) or {}).get("model")
    if origin and origin["sha256"] != base.sha256:
        raise UserError(
            f"{run.folder / str(stage)}, the teacher, started from {origin.get('path')}, --model"
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
