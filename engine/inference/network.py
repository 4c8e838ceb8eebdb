"""What a loaded model asks of a network of images or of texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from selfdistill.data.errors import UserError
from selfdistill.data.loading.codec import Codec
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.export import PROBLEM
from selfdistill.engine.training.objectives import Feature

#: What a head reads: the CLS token, the mean of the others (of texts, of all), both in a row.
Pool = Literal["cls", "mean", "both"]


class Network(nn.Module, ABC):
    """An encoder, and perhaps a head on it.

    Attributes:
        kind: of its inputs.
        classes: names, in the order of the logits; empty without a head.
        pool: what the head reads; without one, what the model's makers do.
        several: whether a sample may have several classes.
        width: of a token's vector, D.
        codec: decodes inputs as people have them.
        sha256: of the weights.
        settings: all else that changes a result, as text.
        notes: what the user should be told, a line each.
        normalizes: whether its makers give the pooled vector length 1.
    """

    kind: Literal["image", "text"]
    classes: list[str]
    pool: Pool
    several: bool = False
    width: int
    codec: Codec
    sha256: str
    settings: str
    notes: tuple[str, ...] = ()
    normalizes: bool = False

    @abstractmethod
    def classified(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits [B, C], and the features [B, D] that the head read."""

    @abstractmethod
    def encoded(
        self, batch: Mapping[str, Tensor], feature: Feature
    ) -> tuple[Tensor, Tensor | None]:
        """Features [B, D], or of `tokens` [B, T, D] and which of them count, [B, T] or None."""

    @abstractmethod
    def codec_of(self, manifest: Manifest) -> Codec:
        """Decodes a packed set's samples as evaluation does.

        Raises:
            UserError: they are of a size that the model does not take.
        """


def check_classes(number: int, problem: object, origin: str) -> None:
    """Refuses a head whose outputs are no classes': softmax of one number is always 1.

    Args:
        number: of its outputs.
        problem: `problem_type` of its configuration.
        origin: the model's name.

    Raises:
        UserError: it is a regression, or has one output.
    """
    if problem == "regression" or (number < 2 and problem != PROBLEM):
        raise UserError(
            f"{origin} gives {'a score' if number == 1 else 'scores'} (a regression or a reranker),"
            " and no classes' probabilities: take a classifier of two classes or more"
        )
