"""Ablations of the distillation term: predictions or weights matched in place of features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfdistill.data.errors import UserError
from selfdistill.engine.config.schema import Config
from selfdistill.engine.regularizers.mars import matrices
from selfdistill.engine.runtime import zero
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.runtime.precision import autocast
from selfdistill.engine.training.objectives import Reconstructs, freeze_decoder
from selfdistill.engine.training.teacher import frozen, view


def check(config: Config) -> None:
    """Refuses layouts and teachers that a match cannot work with.

    Raises:
        UserError: says which, and the cure.
    """
    match, mode = config.distill.match, config.teacher.mode
    if match == "prediction" and mode in ("cached", "sharded"):
        why = (
            "predictions are of masked views, which are new at every step, and make no table"
            if mode == "cached"
            else "the teacher of predictions is a whole auto-encoder on each rank"
        )
        raise UserError(
            f"--teacher.mode {mode} with --distill.match prediction: {why}: take --teacher.mode"
            " replicated"
        )
    if match.startswith("weights") and config.adapt != "full":
        raise UserError(
            f"--distill.match {match} compares all weights, and --adapt {config.adapt} trains a"
            " part of them: take --distill.match feature or prediction, or --adapt full"
        )
    if match.startswith("weights") and zero.stage_of(zero.read(config.zero)) == 3:
        raise UserError(
            f"--distill.match {match}: --zero {config.zero} cuts the weights that are compared:"
            " take zero0, zero1 or zero2"
        )


class Predictor:
    """The teacher of predictions: the whole frozen auto-encoder, a copy on each rank."""

    mode: Literal["replicated"] = "replicated"

    def __init__(
        self, model: Any, names: tuple[str, ...], ranks: Ranks, dtype: torch.dtype
    ) -> None:
        self.model = frozen(model, ranks.device, dtype)
        self.names, self.device, self.dtype = names, ranks.device, dtype

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Its predictions on a loader's batch: patches [B, K, P], or logits [n, V]."""
        scale = torch.ones((), device=self.device)  # of a loss that is not used
        prediction: Tensor
        with autocast(self.device, self.dtype):
            _, prediction = self.model.reconstructed(
                **view(batch, self.names, self.device), scale=scale
            )
        return prediction

    def close(self) -> None:
        """See `teacher.Teacher`: it goes with its last reference."""


def prediction_distance(student: Tensor, teacher: Tensor, samples: int) -> Tensor:
    """How far predictions are apart, summed within a sample, the mean over samples, in fp32.

    Args:
        student: patches [B, K, P]: the squared error of all of them; or logits [n, V] of a batch's
            masked tokens: KL(p_teacher || p_student).
        teacher: the same shape.
        samples: B.
    """
    student, teacher = student.float(), teacher.float()
    if student.ndim == 3:
        return (student - teacher).pow(2).sum() / samples
    p, q = F.log_softmax(teacher, -1), F.log_softmax(student, -1)
    return (p.exp() * (p - q)).sum() / samples


class PredictionObjective(nn.Module):
    """mae_weight * L_MAE + weight * the distance of the predictions on the same masked view.

    The gradient of both goes into encoder and decoder.
    """

    def __init__(self, model: Reconstructs, weight: float, mae_weight: float) -> None:
        super().__init__()
        self.model, self.weight, self.mae_weight = model, weight, mae_weight

    def forward(self, target: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        """Losses, and extras for pictures.

        Args:
            target: the teacher's predictions.
            batch: the masked view's entries.
        """
        out, prediction = self.model.reconstructed(**batch)
        entry = batch["images"] if "images" in batch else batch["attention_mask"]
        distill = prediction_distance(prediction, target, len(entry))
        return out | {
            "loss": self.mae_weight * out["loss"] + self.weight * distill,
            self.model.loss_name: out["loss"].detach(),
            "distill": distill.detach(),
        }


def weight_distance(
    encoder: nn.Module, reference: Mapping[str, Tensor], match: Literal["l2", "mars"]
) -> Tensor:
    """How far an encoder's weights are from others, in fp32.

    Args:
        encoder: whose parameters are compared, those that the reference has.
        reference: name -> tensor.
        match: `l2`, the sum of all squared differences; `mars`, the sum over the weight matrices of
            linear and convolutional layers of the largest absolute row sum of the difference.
    """
    named = encoder.named_parameters() if match == "l2" else matrices(encoder)
    away = [p.float() - reference[name] for name, p in named if name in reference]
    if match == "l2":
        return torch.stack([a.pow(2).sum() for a in away]).sum()
    return torch.stack([a.flatten(1).abs().sum(1).amax() for a in away]).sum()


class WeightsObjective(nn.Module):
    """mae_weight * L_MAE + weight * the distance of the encoder's weights from the teacher's.

    Args:
        model: the student, whole on each rank.
        reference: the teacher's encoder, name -> fp32 tensor on the device.
        match: see `weight_distance`.
        weight: of the distance.
        mae_weight: of L_MAE; at 0 there is no pass, and the decoder stays as it was.
    """

    def __init__(
        self,
        model: Reconstructs,
        reference: Mapping[str, Tensor],
        match: Literal["l2", "mars"],
        weight: float,
        mae_weight: float,
    ) -> None:
        super().__init__()
        self.model, self.match, self.reference = model, match, reference
        self.weight, self.mae_weight = weight, mae_weight
        if not mae_weight:
            freeze_decoder(model)

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Losses, and extras for pictures.

        Args:
            batch: the masked view's entries.
        """
        distill = weight_distance(self.model.encoder, self.reference, self.match)
        out = {"loss": self.weight * distill, "distill": distill.detach()}
        if not self.mae_weight:
            return out
        masked = self.model.reconstruct(**batch)
        loss = self.mae_weight * masked["loss"] + out["loss"]
        return masked | out | {"loss": loss, self.model.loss_name: masked["loss"].detach()}
