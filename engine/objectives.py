"""Training objectives: modules whose ONE forward returns a dict of named losses.

One forward and one backward a step: two backward calls lose the first loss's gradient silently at
ZeRO stages 1 and 2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.models.vit_mae import ViTClassifier, ViTEncoder, ViTMAE

Feature = Literal["cls", "mean", "tokens"]


class Normalize(nn.Module):
    """uint8 images to normalised fp32, on the device.

    Its constants are no buffers: `module.bfloat16()` would round them, and so the pixel target.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self._constants: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Normalises uint8 [B, 3, H, W] to fp32 (x / 255 - mean) / std."""
        if images.device not in self._constants:
            shift = torch.tensor(self.mean, device=images.device).view(-1, 1, 1) * 255
            scale = torch.tensor(self.std, device=images.device).view(-1, 1, 1) * 255
            self._constants[images.device] = (shift, scale)
        shift, scale = self._constants[images.device]
        return (images.float() - shift) / scale


def pick(tokens: Tensor, feature: Feature) -> Tensor:
    """The distilled feature of encoder output [B, 1+K, D].

    `cls`: the CLS vector after the last LayerNorm [B, D] (the paper's). `mean`: mean of the patch
    tokens [B, D]. `tokens`: all of them [B, 1+K, D].
    """
    if feature == "cls":
        return tokens[:, 0]
    if feature == "mean":
        return tokens[:, 1:].mean(1)
    return tokens


def distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the batch (and tokens) of the squared L2 distance, in fp32 (Eq. 3).

    Summed over the feature's dimensions, not averaged: that is the authors' reduction.
    """
    return (student.float() - teacher.float()).pow(2).sum(-1).mean()


class FeatureExtractor(nn.Module):
    """The teacher: a frozen encoder that gives the distilled feature of uint8 images."""

    def __init__(self, encoder: ViTEncoder, normalize: Normalize, feature: Feature) -> None:
        super().__init__()
        self.encoder, self.normalize, self.feature = encoder, normalize, feature
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features fp32 of uint8 images [B, 3, H, W]."""
        tokens = self.encoder(self.normalize(images))
        return pick(tokens, self.feature).float()


class MAEObjective(nn.Module):
    """L_MAE: squared error of the masked patches' pixels (Algorithm 2)."""

    def __init__(self, model: ViTMAE, normalize: Normalize) -> None:
        super().__init__()
        self.model, self.normalize = model, normalize

    def forward(self, images: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """Losses, and the prediction for pictures.

        Args:
            images: uint8 [B, 3, H, W].
            noise: fp32 [B, K], whose ranks choose the visible patches.
        """
        out = self.model(self.normalize(images), noise)
        return {
            "loss": out["loss"],
            "mae": out["loss"].detach(),
            "prediction": out["prediction"].detach(),
            "mask": out["mask"],
        }


class DistillObjective(nn.Module):
    """L_MAE + weight * L_Distill, the feature taken from the unmasked view (Eq. 3)."""

    def __init__(
        self,
        model: ViTMAE,
        normalize: Normalize,
        feature: Feature = "cls",
        weight: float = 1.0,
        mae_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.normalize, self.feature = model, normalize, feature
        self.weight, self.mae_weight = weight, mae_weight

    def forward(self, images: Tensor, noise: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Losses, how student and teacher agree, and the prediction for pictures.

        `teacher_spread` is the mean squared distance of the teacher's features from their mean.
        Where it is not far above `distill`, the feature says little about the image.

        Args:
            images: uint8 [B, 3, H, W].
            noise: fp32 [B, K].
            target: the teacher's features, fp32 [B, D] or [B, 1+K, D].
        """
        pixels = self.normalize(images)
        out = self.model(pixels, noise)
        student = pick(self.model.encoder(pixels), self.feature).float()
        target = target.float()
        distill = distance(student, target)
        with torch.no_grad():
            spread = distance(target, target.mean(0, keepdim=True))
            cosine = F.cosine_similarity(student, target, dim=-1).mean()
        return {
            "loss": self.mae_weight * out["loss"] + self.weight * distill,
            "mae": out["loss"].detach(),
            "distill": distill.detach(),
            "teacher_spread": spread,
            "cosine": cosine,
            "prediction": out["prediction"].detach(),
            "mask": out["mask"],
        }


class ClassifyObjective(nn.Module):
    """L_CE of a classifier on labelled images."""

    def __init__(self, model: ViTClassifier, normalize: Normalize) -> None:
        super().__init__()
        self.model, self.normalize = model, normalize

    def forward(
        self, images: Tensor, labels: Tensor, flip: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Cross-entropy and logits.

        Args:
            images: uint8 [B, 3, H, W].
            labels: int64 [B].
            flip: bool [B], images to mirror, or None.
        """
        if flip is not None:
            images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
        logits = self.model(self.normalize(images)).float()
        loss = F.cross_entropy(logits, labels)
        return {"loss": loss, "cross_entropy": loss.detach(), "logits": logits.detach()}


#: What a forward returns beside its scalar losses.
EXTRAS = ("prediction", "mask", "logits")
