"""DINOv3's ViTs (Simeoni et al. 2025): rotary positions, registers, keys without a bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from selfdistill.data.errors import UserError
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types.base import ModelType, Names, Tensors, activation_of

_PLAIN = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.bias": "patch_embed.proj.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
_INSIDE = {
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "norm1": "norm1",
    "norm2": "norm2",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
    "mlp.up_proj": "mlp.fc1",
    "mlp.down_proj": "mlp.fc2",
}
#: timm's gated MLP has gate and value in one, the gate first.
_GATE = "mlp.gate_proj"


class DINOv3(ModelType):
    """See `ModelType`.

    transformers stretches positions at random in training; here they stand as in evaluation.
    """

    title = "DINOv3"
    model_types = ("dinov3_vit",)
    names = Names("layer", _PLAIN, _INSIDE, {_GATE: _GATE}, biased=False)
    defaults: ClassVar = {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_attention_heads": 6,
        "layer_norm_eps": 1e-5,
        "rope_theta": 100.0,
    }
    silent = ("embeddings.mask_token",)

    def fits(self, shape: Shape) -> bool:
        """See `ModelType`."""
        return bool(shape.class_token and shape.rope and shape.layer_scale and not shape.pre_norm)

    def head(self, shape: Shape, pool: str) -> str | None:
        """See `ModelType`: transformers has none."""
        return None

    def settings(self, config: dict[str, Any], origin: str) -> dict[str, Any]:
        """See `ModelType`."""
        odd = [k for k in ("proj_bias", "mlp_bias") if not config.get(k, True)]
        if odd or config.get("key_bias"):
            raise UserError(
                f"{origin} has {odd[0] if odd else 'key_bias'} {bool(not odd)}, as no published"
                " DINOv3: take one of these"
            )
        theta = config["rope_theta"]
        if type(theta) not in (int, float) or not 1 < theta < 1e9:
            raise UserError(
                f"{origin}: rope_theta is {theta!r} in config.json: fetch the file again"
            )
        if config.get("use_gated_mlp") and config["hidden_act"] != "silu":
            raise UserError(
                f"{origin} has use_gated_mlp with hidden_act {str(config['hidden_act'])[:40]!r}:"
                " only silu is known here behind a gate, as published DINOv3 have it: take one of"
                " these"
            )
        return {
            "layer_scale": True,
            "gated": bool(config.get("use_gated_mlp")),
            "registers": config.get("num_register_tokens", 0),
            "rope": float(theta),
        }

    def incoming(self, encoder: Tensors, origin: str) -> Tensors:
        """See `ModelType`: gate and value in one."""
        joined = dict(encoder)
        for name in [k for k in encoder if f".{_GATE}." in k]:
            own = name.replace(_GATE, "mlp.fc1")
            if own in encoder:
                joined[own] = torch.cat([joined.pop(name), encoder[own]])
        return joined

    def outgoing(self, encoder: Mapping[str, Tensor], shape: Shape) -> Mapping[str, Tensor]:
        """See `ModelType`."""
        parted = dict(encoder)
        for name in encoder:
            if shape.gated and ".mlp.fc1." in name:
                gate, value = encoder[name].chunk(2)
                parted |= {name: value, name.replace("mlp.fc1", _GATE): gate}
        return parted

    def tensors(self, encoder: Mapping[str, Tensor], shape: Shape, prefix: str = "") -> Tensors:
        """See `ModelType`: keys have no bias."""
        names = Names("layer", _PLAIN, _INSIDE | {_GATE: _GATE})
        named = names.theirs(self.outgoing(encoder, shape), prefix)
        return {k: v for k, v in named.items() if not k.endswith("k_proj.bias")}

    def model_class(self, shape: Shape) -> str:
        """See `ModelType`."""
        return "DINOv3ViTModel"

    def config(self, shape: Shape) -> dict[str, Any]:
        """See `ModelType`."""
        return super().config(shape) | {
            "attention_dropout": 0.0,
            "hidden_act": activation_of(shape),
            "key_bias": False,
            "layerscale_value": 1.0,
            "mlp_bias": True,
            "num_register_tokens": shape.registers,
            "proj_bias": True,
            "query_bias": True,
            "rope_theta": shape.rope,
            "use_gated_mlp": shape.gated,
            "value_bias": True,
        }
