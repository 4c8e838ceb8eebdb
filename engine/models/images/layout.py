"""Names of a ViT-MAE's tensors in Hugging Face's and FAIR's checkpoints, and in ours.

Ours are timm's for the encoder (``blocks.0.attn.qkv.weight``), and the same scheme for the decoder
(``mask_token``, ``embed.*``, ``pos_embed``, ``blocks.*``, ``norm.*``, ``pred.*``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

#: Hugging Face name, without "vit.", -> ours. Identical in transformers 4 and 5.
_ENCODER = {
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
#: Name in Hugging Face's and FAIR's decoder, without Hugging Face's "decoder.", -> ours.
_DECODER = {
    "mask_token": "mask_token",
    "decoder_pos_embed": "pos_embed",
    "decoder_embed.weight": "embed.weight",
    "decoder_embed.bias": "embed.bias",
    "decoder_norm.weight": "norm.weight",
    "decoder_norm.bias": "norm.bias",
    "decoder_pred.weight": "pred.weight",
    "decoder_pred.bias": "pred.bias",
}
#: Hugging Face's name inside a block (transformers 4, transformers 5) -> ours. q, k, v are parts
#: of ours: rows of the fused attn.qkv in that order.
_BLOCK = (
    ("attention.attention.query", "attention.q_proj", "attn.q"),
    ("attention.attention.key", "attention.k_proj", "attn.k"),
    ("attention.attention.value", "attention.v_proj", "attn.v"),
    ("attention.output.dense", "attention.o_proj", "attn.proj"),
    ("norm1", "norm1", "norm1"),  # DINOv2's
    ("norm2", "norm2", "norm2"),
    ("layernorm_before", "layernorm_before", "norm1"),
    ("layernorm_after", "layernorm_after", "norm2"),
    ("intermediate.dense", "mlp.fc1", "mlp.fc1"),
    ("output.dense", "mlp.fc2", "mlp.fc2"),
)
_FROM_BLOCK = {name: ours for old, new, ours in _BLOCK for name in (old, new)}
_TO_BLOCK = {ours: old for old, _, ours in _BLOCK}

#: Blocks: "encoder.layer.N" and "layers.N" (transformers 4, 5); in the decoder "decoder_layers.N"
#: (4, 5) and "decoder_encoder.layer.N", which `save_pretrained` of transformers 5.23 writes.
_HF_ENCODER_BLOCK = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
#: DINOv2's factors of what a block adds.
_HF_SCALE = re.compile(r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1")
_OUR_SCALE = re.compile(r"blocks\.(\d+)\.ls([12])\.gamma")
#: What classes with a head put before the names of their encoder.
_PREFIXES = ("vit.", "dinov2.", "dinov2_with_registers.")
_HF_DECODER_BLOCK = re.compile(
    r"decoder\.(?:decoder_layers|decoder_encoder\.layer)\.(\d+)\.(.+)\.(weight|bias)"
)
_OUR_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")


def from_hugging_face(tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors, list[str]]:
    """Renames a ViTMAE's or ViT's tensors, and fuses queries, keys and values.

    Takes names of transformers 4 and 5, with and without the leading ``vit.``.

    Returns:
        encoder: ours; what the checkpoint lacks is absent.
        decoder: ours; empty if the checkpoint has none.
        unknown: names that no part of encoder or decoder has.
    """
    encoder: Tensors = {}
    decoder: Tensors = {}
    unknown = []
    for name, tensor in tensors.items():
        prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
        bare = name.removeprefix(prefix)
        in_decoder = bare.startswith("decoder.")
        part = decoder if in_decoder else encoder
        block = (_HF_DECODER_BLOCK if in_decoder else _HF_ENCODER_BLOCK).fullmatch(bare)
        plain = _DECODER.get(bare.removeprefix("decoder.")) if in_decoder else _ENCODER.get(bare)
        scale = _HF_SCALE.fullmatch(bare)
        if scale is not None:
            part[f"blocks.{scale[1]}.ls{scale[2]}.gamma"] = tensor
        elif block is not None and block[2] in _FROM_BLOCK:
            part[f"blocks.{block[1]}.{_FROM_BLOCK[block[2]]}.{block[3]}"] = tensor
        elif plain is not None:
            part[plain] = tensor
        else:
            unknown.append(name)
    return _fuse(encoder), _fuse(decoder), unknown


def _fuse(tensors: Tensors) -> Tensors:
    """Joins the q, k, v of each block that has all three; an incomplete one is left out."""
    fused = {}
    for name, tensor in tensors.items():
        if ".attn.q." in name:
            parts = [tensors.get(name.replace(".attn.q.", f".attn.{p}.")) for p in "qkv"]
            whole = [p for p in parts if p is not None]
            if len(whole) == 3:
                fused[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(whole)
        elif ".attn.k." not in name and ".attn.v." not in name:
            fused[name] = tensor
    return fused


def to_hugging_face(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor] | None) -> Tensors:
    """Renames ours to transformers 4's names, which transformers 4 and 5 both load."""
    named = _to_hugging_face(encoder, _ENCODER, "vit.", "vit.encoder.layer")
    if decoder is not None:
        named |= _to_hugging_face(decoder, _DECODER, "decoder.", "decoder.decoder_layers")
    return named


def to_dinov2(encoder: Mapping[str, Tensor], prefix: str = "") -> Tensors:
    """Renames ours to the names of transformers' Dinov2 classes (`prefix` of those with a head)."""
    named = _to_hugging_face(encoder, _ENCODER, prefix, f"{prefix}encoder.layer")
    for old, new in (("layernorm_before", "norm1"), ("layernorm_after", "norm2")):
        named = {name.replace(old, new): tensor for name, tensor in named.items()}
    for old, new in (("intermediate.dense", "mlp.fc1"), (".output.dense", ".mlp.fc2")):
        named = {
            name if ".attention." in name else name.replace(old, new): tensor
            for name, tensor in named.items()
        }
    return named


def _to_hugging_face(
    tensors: Mapping[str, Tensor], plain: Mapping[str, str], prefix: str, blocks: str
) -> Tensors:
    theirs = {ours: name for name, ours in plain.items()}
    named = {}
    for name, tensor in tensors.items():
        block, scale = _OUR_BLOCK.fullmatch(name), _OUR_SCALE.fullmatch(name)
        if scale is not None:
            named[f"{blocks}.{scale[1]}.layer_scale{scale[2]}.lambda1"] = tensor
        elif block is None:
            named[prefix + theirs[name]] = tensor
        elif block[2] == "attn.qkv":
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                inside = _TO_BLOCK[f"attn.{letter}"]
                named[f"{blocks}.{block[1]}.{inside}.{block[3]}"] = part
        else:
            named[f"{blocks}.{block[1]}.{_TO_BLOCK[block[2]]}.{block[3]}"] = tensor
    return named


def from_fair(tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """Sorts FAIR's MAE names, or timm's, into encoder and decoder; unknown names stay in encoder.

    FAIR's encoder has timm's names, and its decoder the same ones with ``decoder_`` before.
    """
    encoder: Tensors = {}
    decoder: Tensors = {}
    for name, tensor in tensors.items():
        if name in _DECODER:
            decoder[_DECODER[name]] = tensor
        elif name.startswith("decoder_blocks."):
            decoder[name.removeprefix("decoder_")] = tensor
        else:
            encoder[name] = tensor
    return encoder, decoder
