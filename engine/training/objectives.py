"""Training objectives: modules whose ONE forward returns a dict of named losses.

One forward and one backward a step: two backward calls lose the first loss's gradient silently at
ZeRO stages 1 and 2. They know neither images nor text: the models take a batch's entries by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Feature = Literal["cls", "mean", "tokens"]


class Encodes(Protocol):
    """A network that encodes the unmasked view of a batch."""

    def encode(self, *, cls_only: bool = False, **batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, 1+K, D], the CLS vector first; and where they count, [B, 1+K], or None.

        Args:
            cls_only: only the CLS vector is asked for; tokens may be [B, 1, D].
            batch: the entries.
        """
        ...


class Reconstructs(Encodes, Protocol):
    """A masked auto-encoder."""

    loss_name: str

    @property
    def encoder(self) -> Any:
        """f_theta."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of encoder and decoder."""
        ...

    def reconstructed(self, **batch: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What `reconstruct` gives, and the prediction with its gradient.

        Patches [B, K, P], or logits [n, V] of the masked tokens.
        """
        ...

    def reconstruct(self, **batch: Tensor) -> dict[str, Tensor]:
        """`loss` (fp32 scalar) of the masked view, and extras for pictures."""
        ...


class Classifies(Protocol):
    """A classifier."""

    @property
    def embedding(self) -> nn.Module:
        """The layer that makes vectors [B, T, D] of patches or words."""
        ...

    def classify(self, **batch: Tensor) -> Tensor:
        """Logits [B, C]."""
        ...


def pick(tokens: Tensor, feature: Feature, counts: Tensor | None = None) -> Tensor:
    """The distilled feature of encoder output [B, 1+K, D].

    `cls`: the CLS vector after the last LayerNorm [B, D] (the paper's). `mean`: of images the mean
    of the patches [B, D], of texts that of all tokens, as sentence encoders pool. `tokens`: all of
    them [B, 1+K, D].

    Args:
        tokens: the encoder's output.
        feature: which.
        counts: of texts, [B, 1+K], 0 at padding.
    """
    if feature == "cls":
        return tokens[:, 0]
    if feature == "tokens":
        return tokens
    if counts is None:
        return tokens[:, 1:].mean(1)
    weight = counts[:, :, None].to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1)


def distance(student: Tensor, teacher: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean over the batch (and tokens) of the squared L2 distance, in fp32 (Eq. 3).

    Summed over the feature's dimensions, not averaged: that is the authors' reduction.

    Args:
        student: [B, D] or [B, T, D].
        teacher: the same shape.
        counts: of features [B, T, D], where tokens count, [B, T]; each sample has the same weight.
    """
    square = (student.float() - teacher.float()).pow(2).sum(-1)
    if counts is None or square.ndim == 1:
        return square.mean()
    weight = counts.float()
    return ((square * weight).sum(1) / weight.sum(1)).mean()


def freeze_decoder(model: Reconstructs) -> None:
    """Leaves the decoder as it is; what it shares with the encoder is trained with that."""
    trained = set(model.encoder.parameters())
    for parameter in model.parameters():
        if parameter not in trained:
            parameter.requires_grad_(False)


class FeatureExtractor(nn.Module):
    """The teacher: a frozen encoder that gives the distilled feature of the unmasked view."""

    def __init__(self, encoder: Encodes, feature: Feature) -> None:
        super().__init__()
        self.encoder, self.feature = encoder, feature
        self.requires_grad_(False)

    def forward(self, **batch: Tensor) -> Tensor:
        """Features fp32 [B, D] or [B, 1+K, D] of a batch's entries."""
        tokens, counts = self.encoder.encode(cls_only=self.feature == "cls", **batch)
        return pick(tokens, self.feature, counts).float()


class MaskedObjective(nn.Module):
    """L_MAE (Algorithm 2): pixels of the masked patches, or the masked tokens."""

    def __init__(self, model: Reconstructs) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Losses, and extras for pictures.

        Args:
            batch: the masked view's entries.
        """
        out = self.model.reconstruct(**batch)
        return out | {self.model.loss_name: out["loss"].detach()}


class DistillObjective(nn.Module):
    """mae_weight * L_MAE + weight * L_Distill, the feature that of the unmasked view (Eq. 3).

    Without L_MAE there is no masked pass, and the decoder stays as it was; without L_Distill there
    is no pass of the unmasked view, and no target.
    """

    def __init__(
        self,
        model: Reconstructs,
        feature: Feature = "cls",
        weight: float = 1.0,
        mae_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.feature = model, feature
        self.weight, self.mae_weight = weight, mae_weight
        if not mae_weight:
            freeze_decoder(model)

    def forward(self, target: Tensor | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """Losses, how student and teacher agree, and extras for pictures.

        `teacher_spread` is the teacher's features' variance, summed over dimensions (the unbiased
        estimate from this micro-batch; there is none from one sample). Where it is not far above
        `distill`, the feature says little about the sample.

        Args:
            target: the teacher's features, fp32 [B, D] or [B, 1+K, D]; not at weight 0.
            batch: the entries of both views.
        """
        out: dict[str, Tensor] = {}
        terms: list[Tensor] = []
        if self.mae_weight:
            out = self.model.reconstruct(**batch)
            terms.append(self.mae_weight * out["loss"])
            out[self.model.loss_name] = out["loss"].detach()
        if self.weight:
            assert target is not None
            distill, scalars = self._distill(target, **batch)
            terms.append(self.weight * distill)
            out |= scalars
        return out | {"loss": terms[0] + terms[1] if len(terms) == 2 else terms[0]}

    def _distill(self, target: Tensor, **batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """L_Distill, and the scalars that describe it."""
        tokens, counts = self.model.encode(cls_only=self.feature == "cls", **batch)
        student = pick(tokens, self.feature, counts).float()
        target = target.float()
        distill = distance(student, target, counts)
        with torch.no_grad():
            size = len(target)
            spread = distance(target, target.mean(0, keepdim=True), counts)
            spreads = {"teacher_spread": spread * size / (size - 1)} if size > 1 else {}
            cosine = F.cosine_similarity(student, target, dim=-1)
            if counts is not None and cosine.ndim == 2:
                cosine = (cosine * counts).sum(1) / counts.sum(1)
        return distill, {"distill": distill.detach(), "cosine": cosine.mean(), **spreads}


def swapped(rows: Tensor) -> Tensor:
    """Rows [B, ...] with neighbours exchanged: 0 and 1, 2 and 3, and so on. B is even."""
    return rows.view(-1, 2, *rows.shape[1:]).flip(1).view(rows.shape)


class ClassLoss(nn.Module):
    """Cross-entropy; of samples with several labels the binary one of each class, on average.

    Args:
        weights: of the classes, [C] in fp32; the mean is then weighted, as torch's. None: no
            weights.
        smoothing: share of a target that is spread over all classes (Szegedy et al. 2016).
    """

    weights: Tensor | None

    def __init__(self, weights: Tensor | None = None, smoothing: float = 0.0) -> None:
        super().__init__()
        self.values, self.smoothing = weights, smoothing
        self.register_buffer("weights", weights, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self.weights is not None and self.values is not None:  # fp32, whatever fn makes of it
            self.weights = self.values.to(self.weights.device)
        return self

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        share: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            logits: fp32 [B, C].
            labels: int64 [B], or bool [B, C].
            share: [B], of a sample's own label; the rest is its neighbour's (`swapped`).
            scale: with weights, what makes the sum of the losses its part of the global batch's
                weighted mean; None for the mean of this batch.
        """
        if labels.dtype == torch.bool:
            target = labels.float()
            if share is not None:
                target = target.lerp(swapped(target), 1 - share[:, None])
            return F.binary_cross_entropy_with_logits(logits, target)
        entropy = functools.partial(
            F.cross_entropy, weight=self.weights, label_smoothing=self.smoothing
        )
        if share is None:
            if scale is None:
                return entropy(logits, labels)
            return entropy(logits, labels, reduction="sum") * scale
        own = entropy(logits, labels, reduction="none")
        other = entropy(logits, swapped(labels), reduction="none")
        mixed = own.lerp(other, 1 - share)
        return mixed.mean() if scale is None else mixed.sum() * scale

    def units(self, labels: Tensor, share: Tensor | None = None) -> float | None:
        """What a batch weighs in the global one; None without weights, all then weigh the same.

        Args:
            labels: int64 [B], on the CPU.
            share: see `forward`.
        """
        if self.values is None:
            return None
        own = self.values[labels]
        if share is not None:
            own = own.lerp(swapped(own), 1 - share)
        return float(own.double().sum())


class ClassifyObjective(nn.Module):
    """L_CE of a classifier on labelled samples.

    Args:
        model: the classifier.
        loss: by default plain cross-entropy.
    """

    def __init__(self, model: Classifies, loss: ClassLoss | None = None) -> None:
        super().__init__()
        self.model, self.loss = model, loss or ClassLoss()

    def forward(
        self, labels: Tensor, scale: Tensor | None = None, **batch: Tensor
    ) -> dict[str, Tensor]:
        """Cross-entropy and logits.

        Args:
            labels: int64 [B], or bool [B, C].
            scale: see `ClassLoss`.
            batch: the model's entries; `share` [B] where neighbours are mixed.
        """
        logits = self.model.classify(**batch).float()
        loss = self.loss(logits, labels, batch.get("share"), scale)
        return {"loss": loss, "cross_entropy": loss.detach(), "logits": logits.detach()}


#: Names of losses; whatever other scalar an objective returns describes features.
LOSSES = ("loss", "mae", "mlm", "distill", "cross_entropy", "r3f", "supcon", "diet")

#: What a forward returns beside scalars.
EXTRAS = ("prediction", "mask", "logits")
