"""Pre-trained ViT-MAE weights, read from any published format into one record."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from selfdistill.data.errors import UserError
from selfdistill.data.formats.images import Sides, Size, typed
from selfdistill.engine.models.images import formats
from selfdistill.engine.models.images.formats.hugging_face import DECODER
from selfdistill.engine.models.images.formats.timm_folder import POOLING
from selfdistill.engine.models.images.found import Found, check_sizes
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types.base import IMAGENET_MEAN, IMAGENET_STD, Tensors
from selfdistill.engine.models.images.vit_mae import (
    MAEDecoder,
    ViTEncoder,
    ViTMAE,
    position_table,
)
from selfdistill.engine.models.source import locate

#: What an export has beside its model: see `engine.checkpoints.export`.
_BESIDE = (DECODER, POOLING, "selfdistill.json")
#: Of a shape's fields, those that change nothing of the encoder.
_APART = ("decoder_", "mask_ratio", "normalize_pixels")


@dataclass(frozen=True)
class Pretrained:
    """Pre-trained weights, theta_init and phi_init of the paper, and what belongs to them.

    Attributes:
        shape: the model's shape; its decoder part is MAE's default where `decoder` is None.
        encoder: fp32 tensors under timm's names; `ViTEncoder` loads them strictly.
        decoder: fp32 tensors that `MAEDecoder` loads strictly; None if the source has no decoder.
        mean: mean of each channel, of pixels in [0, 1].
        std: standard deviation of each channel.
        origin: what the user named.
        sha256: of the tensors' names, shapes and fp32 bytes, whatever file they came in.
        notes: what the user should be told of it, a line each, without its name.
        target: whether its shape's `normalize_pixels` is what the decoder was trained for.
    """

    shape: Shape
    encoder: Tensors
    decoder: Tensors | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str
    sha256: str
    notes: tuple[str, ...] = ()
    target: bool = True

    @property
    def settings(self) -> str:
        """sha256 of what the encoder computes with beside its tensors."""
        told = {
            one.name: getattr(self.shape, one.name)
            for one in fields(self.shape)
            # Those at their default are left out, so that a later field changes no hash of before.
            if not one.name.startswith(_APART) and getattr(self.shape, one.name) != one.default
        }
        content = json.dumps([told, self.mean, self.std], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def told(self) -> dict[str, Any]:
        """What a record says of it beside the tensors' hash."""
        return {"model_settings": self.settings}

    @classmethod
    def fresh(cls, model: ViTMAE) -> Pretrained:
        """A model's own weights, copied; ImageNet's mean and standard deviation."""
        encoder = {k: v.detach().float().clone() for k, v in model.encoder.state_dict().items()}
        decoder = {k: v.detach().float().clone() for k, v in model.decoder.state_dict().items()}
        digest = fingerprint(encoder, decoder)
        return cls(model.shape, encoder, decoder, IMAGENET_MEAN, IMAGENET_STD, "scratch", digest)


def load_pretrained(source: str, image_size: Size | None = None) -> Pretrained:
    """Reads weights.

    Args:
        source: a Hugging Face folder or hub name (every type in `types`; safetensors or
            pytorch_model.bin; names of transformers 4 and 5), FAIR's .pth, a timm folder or hub
            name, or a timm .safetensors file.
        image_size: of the images to train on, if other than the source's. Sine-cosine position
            embeddings are computed anew, learnt ones resampled; a note says which.

    Raises:
        UserError: unknown or unreadable source, another architecture, missing or strange tensors,
            an image size that is no multiple of the patch size.
    """
    found = formats.read(locate(source, patterns=_BESIDE), source)
    check_sizes(found)
    encoder = _complete("encoder", found, found.encoder)
    decoder = _complete("decoder", found, found.decoder) if found.decoder else None
    shape, notes = found.shape, list(found.notes)
    if image_size is not None and image_size != shape.image_size:
        old, shape = shape, replace(shape, image_size=image_size)
        how = "(rotary) follow"
        for part in (encoder, decoder):
            if part is not None and "pos_embed" in part:
                table, antialias = part["pos_embed"], found.antialias
                part["pos_embed"], how = _move(table, old.grid, shape.grid, antialias)
        before, now = typed(old.image_size), typed(image_size)
        notes.append(f"image size {before} -> {now}: position embeddings {how}")
    return Pretrained(
        shape=shape,
        encoder=encoder,
        decoder=decoder,
        mean=found.mean,
        std=found.std,
        origin=source,
        sha256=fingerprint(encoder, decoder, "" if "pos_embed" in encoder else str(shape.sides)),
        notes=tuple(notes),
        target=found.target,
    )


def fingerprint(
    encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor] | None, more: str = ""
) -> str:
    """sha256 over all tensors' names, shapes and fp32 bytes, in order of their names.

    Args:
        encoder: name -> tensor.
        decoder: likewise.
        more: that the weights do not tell, as the image's size where no table has its positions.
    """
    digest = hashlib.sha256(more.encode())
    for part, tensors in (("encoder", encoder), ("decoder", decoder or {})):
        for name in sorted(tensors):
            digest.update(f"{part}.{name} {tuple(tensors[name].shape)}\n".encode())
            digest.update(tensors[name].float().contiguous().cpu().numpy().data)
    return digest.hexdigest()


def _complete(part: str, found: Found, given: Mapping[str, Tensor]) -> Tensors:
    """Copies into NaN-filled tensors of the shape's own names, so that nothing missed is silent."""
    with torch.device("meta"):  # on which a module is slow to make: the part alone
        model: Any = {"encoder": ViTEncoder, "decoder": MAEDecoder}[part](found.shape)
    wanted = model.state_dict()  # shapes alone, until all are known to be right
    missing = sorted(wanted.keys() - given.keys())
    strange = sorted(given.keys() - wanted.keys())
    if missing or strange:
        which = f"lacks {_few(missing)}" if missing else f"has {_few(strange)}"
        raise UserError(
            f"{found.origin}: its {part} {which}, so it is no plain ViT-MAE {part} of "
            f"{len(model.blocks)} blocks: take a complete checkpoint"
        )
    for name, tensor in wanted.items():
        if given[name].shape != tensor.shape:
            theirs = "its configuration" if part == "encoder" else "its encoder's configuration"
            raise UserError(
                f"{found.origin}: {part}.{name} is {tuple(given[name].shape)}, {theirs} asks for"
                f" {tuple(tensor.shape)}: the two do not belong together"
            )
    wanted = {name: torch.full(tensor.shape, torch.nan) for name, tensor in wanted.items()}
    for name, tensor in wanted.items():
        tensor.copy_(given[name])
        if not tensor.isfinite().all():
            raise UserError(
                f"{found.origin}: {part}.{name} holds NaN or infinite values: take another "
                "checkpoint"
            )
    return wanted


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _move(table: Tensor, old: Sides, new: Sides, antialias: bool) -> tuple[Tensor, str]:
    """Position embeddings [1, K or 1 + K, D] for a grid of another K, and how they were made."""
    width, first = table.shape[2], table.shape[1] - math.prod(old)
    if torch.allclose(table, position_table(width, old)[:, 1 - first :], atol=1e-3):
        return position_table(width, new)[:, 1 - first :].clone(), "(sine-cosine) computed anew"
    moved: Tensor = resample_abs_pos_embed(
        table, list(new), list(old), num_prefix_tokens=first, antialias=antialias
    )
    return moved.contiguous(), "resampled (bicubic)"
