"""ViT and ViT-MAE (Dosovitskiy et al. 2021; He et al. 2022), with MAE's decoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types.base import ModelType, Names, Tensors, fused

#: transformers 4's names; 5 reads them, too.
INSIDE = {
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
#: What transformers 5 calls some of them.
ALSO = {
    "attention.q_proj": "attn.q",
    "attention.k_proj": "attn.k",
    "attention.v_proj": "attn.v",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
PLAIN = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
#: Name in Hugging Face's and FAIR's decoder, without Hugging Face's "decoder.", -> ours.
DECODER = {
    "mask_token": "mask_token",
    "decoder_pos_embed": "pos_embed",
    "decoder_embed.weight": "embed.weight",
    "decoder_embed.bias": "embed.bias",
    "decoder_norm.weight": "norm.weight",
    "decoder_norm.bias": "norm.bias",
    "decoder_pred.weight": "pred.weight",
    "decoder_pred.bias": "pred.bias",
}
#: "decoder_layers.N" (transformers 4, 5) and "decoder_encoder.layer.N", which `save_pretrained` of
#: transformers 5.23 writes.
_DECODER_BLOCK = re.compile(
    r"decoder\.(?:decoder_layers|decoder_encoder\.layer)\.(\d+)\.(.+)\.(weight|bias)"
)


class ViT(ModelType):
    """See `ModelType`."""

    title = "ViT and ViT-MAE"
    model_types = ("vit", "vit_mae")
    names = Names("encoder.layer", PLAIN, INSIDE, ALSO, ("vit.",))
    defaults: ClassVar = {}
    silent = ("embeddings.mask_token", "vit.embeddings.mask_token")

    def fits(self, shape: Shape) -> bool:
        """See `ModelType`: none of the later parts."""
        later = shape.layer_scale or shape.registers or shape.gated or shape.pre_norm or shape.rope
        return shape.class_token and not later

    def head(self, shape: Shape, pool: str) -> str | None:
        """See `ModelType`: its class knows the CLS vector alone."""
        return "ViTForImageClassification" if pool == "cls" else None


def split_decoder(tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """A ViT-MAE's decoder under our names, and all that is left."""
    decoder: Tensors = {}
    rest: Tensors = {}
    inside = {**INSIDE, **ALSO}
    for name, tensor in tensors.items():
        block = _DECODER_BLOCK.fullmatch(name)
        if block is not None and block[2] in inside:
            decoder[f"blocks.{block[1]}.{inside[block[2]]}.{block[3]}"] = tensor
        elif name.startswith("decoder.") and name.removeprefix("decoder.") in DECODER:
            decoder[DECODER[name.removeprefix("decoder.")]] = tensor
        else:
            rest[name] = tensor
    return fused(decoder), rest


def masked(
    shape: Shape, encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]
) -> tuple[dict[str, Any], Tensors]:
    """config.json and tensors of ``ViTMAEForPreTraining``."""
    config = ViT().config(shape) | {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        **decoder_config(shape),
    }
    names = Names("decoder_layers", DECODER, INSIDE)
    return config, ViT().tensors(encoder, shape, "vit.") | names.theirs(decoder, "decoder.")


def decoder_config(shape: Shape) -> dict[str, Any]:
    """What config.json says of the decoder and of its task."""
    return {
        "decoder_hidden_size": shape.decoder_width,
        "decoder_num_hidden_layers": shape.decoder_depth,
        "decoder_num_attention_heads": shape.decoder_heads,
        "decoder_intermediate_size": shape.decoder_mlp_width,
        "mask_ratio": shape.mask_ratio,
        "norm_pix_loss": shape.normalize_pixels,
    }
