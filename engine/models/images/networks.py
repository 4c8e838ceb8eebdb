"""The image networks as stages take them: uint8 images in, losses, features and logits out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from selfdistill.engine.models.images.vit_mae import ViTClassifier, ViTEncoder, ViTMAE


class Normalize(nn.Module):
    """uint8 images to normalised fp32, on the device.

    Its constants follow it to its device, and stay fp32: `module.half()` would round them, and so
    the pixel target.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        # Buffers: a constant that is made in the first forward has torch.compile compile again.
        self.register_buffer("shift", self._constant(mean), persistent=False)
        self.register_buffer("scale", self._constant(std), persistent=False)

    @staticmethod
    def _constant(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) * 255

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.shift = self._constant(self.mean).to(self.shift.device)
        self.scale = self._constant(self.std).to(self.scale.device)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Normalises uint8 [B, 3, H, W] to fp32 (x / 255 - mean) / std."""
        return (images.float() - self.shift) / self.scale


def mirror(images: Tensor, flip: Tensor | None) -> Tensor:
    """Images [B, 3, H, W], mirrored where `flip`, bool [B], says so; None: none."""
    if flip is None:
        return images
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)


def mix(images: Tensor, blend: Tensor | None, box: Tensor | None) -> Tensor:
    """Images fp32 [B, 3, H, W], each mixed with its neighbour; see `training.views.Mixes`.

    Args:
        images: B is even; 0 and 1 are neighbours, 2 and 3, and so on.
        blend: fp32 [B], share of an image's own pixels; None: nothing is mixed.
        box: int64 [B, 4], top, left, bottom and right of what is the neighbour's alone.
    """
    if blend is None or box is None:
        return images
    pairs = images.view(-1, 2, *images.shape[1:])
    other = pairs.flip(1).view(images.shape)
    mixed = images.lerp(other, 1 - blend.view(-1, 1, 1, 1))
    top, left, bottom, right = box.view(-1, 4, 1, 1, 1).unbind(1)
    rows = torch.arange(images.shape[-2], device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(images.shape[-1], device=images.device).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return torch.where(inside, other, mixed)


class ImageEncoder(nn.Module):
    """A ViT encoder on uint8 images."""

    def __init__(self, encoder: ViTEncoder, normalize: Normalize) -> None:
        super().__init__()
        self.encoder, self.normalize = encoder, normalize

    def encode(
        self, *, images: Tensor, cls_only: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See `objectives.Encodes`; uint8 images [B, 3, H, W], whose tokens all count."""
        return self.encoder(self.normalize(images), cls_only=cls_only), None


class ImageAutoencoder(nn.Module):
    """A ViT-MAE on uint8 images."""

    loss_name = "mae"

    def __init__(self, mae: ViTMAE, normalize: Normalize) -> None:
        super().__init__()
        self.mae, self.normalize = mae, normalize

    @property
    def encoder(self) -> ViTEncoder:
        """f_theta."""
        return self.mae.encoder

    def encode(
        self, *, images: Tensor, flip: Tensor | None = None, cls_only: bool = False, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See `objectives.Encodes`; uint8 images [B, 3, H, W], mirrored or not."""
        return self.mae.encoder(self.normalize(mirror(images, flip)), cls_only=cls_only), None

    def reconstruct(self, images: Tensor, noise: Tensor, **_: Any) -> dict[str, Tensor]:
        """The loss, and for pictures the mask and the masked patches' prediction.

        Args:
            images: uint8 [B, 3, H, W].
            noise: fp32 [B, K], whose ranks choose the visible patches.
        """
        out: dict[str, Tensor] = self.mae(self.normalize(images), noise)
        return out | {"prediction": out["prediction"].detach()}

    def reconstructed(
        self, images: Tensor, noise: Tensor, **_: Any
    ) -> tuple[dict[str, Tensor], Tensor]:
        """See `objectives.Reconstructs`."""
        out: dict[str, Tensor] = self.mae(self.normalize(images), noise, whole=True)
        return out | {"prediction": out["prediction"].detach()}, out["prediction"]


class ImageClassifier(nn.Module):
    """A ViT with a head, on uint8 images."""

    def __init__(self, network: ViTClassifier, normalize: Normalize) -> None:
        super().__init__()
        self.network, self.normalize = network, normalize

    @property
    def encoder(self) -> ViTEncoder:
        """f_theta."""
        return self.network.encoder

    @property
    def embedding(self) -> nn.Module:
        """See `objectives.Classifies`."""
        layer: nn.Module = self.network.encoder.patch_embed
        return layer

    def classify(
        self,
        images: Tensor,
        flip: Tensor | None = None,
        blend: Tensor | None = None,
        box: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Logits [B, C].

        Args:
            images: uint8 [B, 3, H, W].
            flip: bool [B], images to mirror, or None.
            blend: fp32 [B], how neighbours are mixed, see `mix`; None for not at all.
            box: int64 [B, 4], likewise.
        """
        logits: Tensor = self.network(mix(self.normalize(mirror(images, flip)), blend, box))
        return logits
