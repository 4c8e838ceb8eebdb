"""What a loaded model asks of a network of images or of texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from selfdistill.data.loading.codec import Codec
from selfdistill.data.shards.manifest import Manifest
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
