"""CLIP's vision tower (Radford et al. 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types.base import ModelType, Names

_PLAIN = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "embeddings.position_embedding.weight": "pos_embed",
    "pre_layrnorm.weight": "norm_pre.weight",
    "pre_layrnorm.bias": "norm_pre.bias",
    "post_layernorm.weight": "norm.weight",
    "post_layernorm.bias": "norm.bias",
}
INSIDE = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.out_proj": "attn.proj",
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
#: What a whole model has beside its vision tower.
BESIDE = (
    "text_model.",
    "text_projection.",
    "visual_projection.",
    "logit_scale",
    "logit_bias",
    "classifier.",
)
_DROPPED = {"cls_token": 2, "pos_embed": 1}


class CLIP(ModelType):
    """See `ModelType`. Our last LayerNorm, which CLIP puts on CLS alone, is on every token."""

    title = "CLIP"
    model_types = ("clip_vision_model", "clip")
    names = Names("encoder.layers", _PLAIN, INSIDE, {}, ("vision_model.",), _DROPPED)
    defaults: ClassVar = {
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "patch_size": 32,
    }
    extra = BESIDE
    silent = ("embeddings.position_ids", "vision_model.embeddings.position_ids")
    mean = (0.48145466, 0.4578275, 0.40821073)
    std = (0.26862954, 0.26130258, 0.27577711)
    normalised_by = "CLIP's"
    within = "vision_model."
    squares = True

    def fits(self, shape: Shape) -> bool:
        """See `ModelType`."""
        other = shape.layer_scale or shape.registers or shape.gated or shape.rope
        return shape.class_token and shape.pre_norm and not other

    def head(self, shape: Shape, pool: str) -> str | None:
        """See `ModelType`: its class takes the mean before the last LayerNorm, as we do not."""
        return None

    def settings(self, config: dict[str, Any], origin: str) -> dict[str, Any]:
        """See `ModelType`."""
        return {"pre_norm": True}

    def antialias(self, shape: Shape) -> bool:
        """See `ModelType`: as transformers does."""
        return False

    def model_class(self, shape: Shape) -> str:
        """See `ModelType`."""
        return "CLIPVisionModel"
