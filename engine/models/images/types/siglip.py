"""SigLIP's vision tower, and SigLIP 2's of fixed size (Zhai et al. 2023; Tschannen et al. 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from selfdistill.data.errors import UserError
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types.base import ModelType, Names, Tensors
from selfdistill.engine.models.images.types.clip import BESIDE, INSIDE

_PLAIN = {
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "embeddings.patch_embedding.bias": "patch_embed.proj.bias",
    "embeddings.position_embedding.weight": "pos_embed",
    "post_layernorm.weight": "norm.weight",
    "post_layernorm.bias": "norm.bias",
    "head.probe": "attn_pool.latent",
    "head.attention.in_proj_weight": "attn_pool.qkv.weight",
    "head.attention.in_proj_bias": "attn_pool.qkv.bias",
    "head.attention.out_proj.weight": "attn_pool.proj.weight",
    "head.attention.out_proj.bias": "attn_pool.proj.bias",
    "head.layernorm.weight": "attn_pool.norm.weight",
    "head.layernorm.bias": "attn_pool.norm.bias",
    "head.mlp.fc1.weight": "attn_pool.mlp.fc1.weight",
    "head.mlp.fc1.bias": "attn_pool.mlp.fc1.bias",
    "head.mlp.fc2.weight": "attn_pool.mlp.fc2.weight",
    "head.mlp.fc2.bias": "attn_pool.mlp.fc2.bias",
}
_JOINED = "attn_pool.qkv."


class SigLIP(ModelType):
    """See `ModelType`. Its own summary of an image is what its head's attention pools."""

    title = "SigLIP"
    model_types = ("siglip_vision_model", "siglip")
    names = Names("encoder.layers", _PLAIN, INSIDE, {}, ("vision_model.",), {"pos_embed": 1})
    defaults: ClassVar = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
    extra = BESIDE
    silent = ("embeddings.position_ids", "vision_model.embeddings.position_ids")
    mean = std = (0.5, 0.5, 0.5)
    normalised_by = "SigLIP's"
    within = "vision_model."
    squares = True

    def fits(self, shape: Shape) -> bool:
        """See `ModelType`."""
        other = shape.layer_scale or shape.registers or shape.gated or shape.pre_norm or shape.rope
        return not (shape.class_token or other)

    def head(self, shape: Shape, pool: str) -> str | None:
        """See `ModelType`: its class takes the mean of the patches."""
        return "SiglipForImageClassification" if pool == "mean" else None

    def settings(self, config: dict[str, Any], origin: str) -> dict[str, Any]:
        """See `ModelType`."""
        if not config.get("vision_use_head", True):
            raise UserError(f"{origin} has no head that pools (vision_use_head): take one with it")
        return {"class_token": False}

    def incoming(self, encoder: Tensors, origin: str) -> Tensors:
        """See `ModelType`: timm's pooling has the query by itself."""
        own = {k: v for k, v in encoder.items() if not k.startswith(_JOINED)}
        for name in encoder.keys() - own.keys():
            leaf, width = name.removeprefix(_JOINED), len(encoder[name]) // 3
            own[f"attn_pool.q.{leaf}"] = encoder[name][:width]
            own[f"attn_pool.kv.{leaf}"] = encoder[name][width:]
        return own

    def outgoing(self, encoder: Mapping[str, Tensor], shape: Shape) -> Mapping[str, Tensor]:
        """See `ModelType`."""
        named = dict(encoder)
        for leaf in ("weight", "bias"):
            parts = [named.pop(f"attn_pool.{part}.{leaf}") for part in ("q", "kv")]
            named[f"{_JOINED}{leaf}"] = torch.cat(parts)
        return named

    def antialias(self, shape: Shape) -> bool:
        """See `ModelType`: as transformers does."""
        return False

    def model_class(self, shape: Shape) -> str:
        """See `ModelType`."""
        return "SiglipVisionModel"

    def classifier(
        self,
        shape: Shape,
        encoder: Mapping[str, Tensor],
        head: Mapping[str, Tensor],
        pool: str,
    ) -> tuple[dict[str, Any], Tensors]:
        """See `ModelType`: the class wants a whole model's configuration."""
        config, tensors = super().classifier(shape, encoder, head, pool)
        told = {"architectures": config.pop("architectures"), "model_type": "siglip"}
        return told | {"vision_config": config}, tensors
