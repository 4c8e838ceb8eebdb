"""DeiT with its distillation token (Touvron et al. 2021): here a register, which no one reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types import vit
from selfdistill.engine.models.images.types.base import ModelType, Names, Tensors


class DeiT(ModelType):
    """See `ModelType`. Without the token it is a ViT, under which name it is published, too."""

    title = "DeiT"
    model_types = ("deit",)
    names = Names(
        "encoder.layer",
        vit.PLAIN | {"embeddings.distillation_token": "reg_token"},
        vit.INSIDE,
        vit.ALSO,
        ("deit.",),
    )
    defaults: ClassVar = {}
    extra = (*ModelType.extra, "cls_classifier.", "distillation_classifier.")
    silent = ("embeddings.mask_token", "deit.embeddings.mask_token")

    def fits(self, shape: Shape) -> bool:
        """See `ModelType`."""
        later = shape.layer_scale or shape.gated or shape.pre_norm or shape.rope
        return shape.class_token and shape.registers == 1 and not later

    def head(self, shape: Shape, pool: str) -> str | None:
        """See `ModelType`."""
        return "DeiTForImageClassification" if pool == "cls" else None

    def settings(self, config: dict[str, Any], origin: str) -> dict[str, Any]:
        """See `ModelType`."""
        return {"registers": 1}

    def incoming(self, encoder: Tensors, origin: str) -> Tensors:
        """See `ModelType`: the token takes its position with it, as timm's registers have none."""
        table, token = encoder.get("pos_embed"), encoder.get("reg_token")
        if table is None or token is None or table.shape[1:2] < (3,):
            return encoder
        kept = torch.cat([table[:, :1], table[:, 2:]], dim=1)
        return encoder | {"reg_token": token + table[:, 1:2], "pos_embed": kept}

    def outgoing(self, encoder: Mapping[str, Tensor], shape: Shape) -> Mapping[str, Tensor]:
        """See `ModelType`: the position that the token has taken is 0."""
        table = encoder["pos_embed"]
        parts = [table[:, :1], torch.zeros_like(table[:, :1]), table[:, 1:]]
        return dict(encoder) | {"pos_embed": torch.cat(parts, dim=1)}
