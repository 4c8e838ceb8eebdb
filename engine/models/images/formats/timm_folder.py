"""Folders as timm's hub saves them: the shape is asked of the model that timm builds from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, GluMlp, SwiGLU
from timm.layers.activations import GELUTanh, QuickGELU
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva, EvaAttention, EvaBlock
from timm.models.vision_transformer import Attention, Block, LayerScale, Mlp, VisionTransformer
from torch import Tensor, nn

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.data.formats.images import Size
from selfdistill.engine.models.images.formats.bare import drop_head, join_positions
from selfdistill.engine.models.images.formats.hugging_face import decoder_of
from selfdistill.engine.models.images.found import Found, normalise, shape_of, whole
from selfdistill.engine.models.images.types.base import IMAGENET_MEAN, IMAGENET_STD, Tensors
from selfdistill.engine.models.images.types.deit import DeiT
from selfdistill.engine.models.source import read_folder, read_safetensors

#: In an export for timm that pools without it, a SigLIP's attention that pools.
POOLING = "attn_pool.safetensors"


def read(folder: Path, config: dict[str, Any], origin: str, decoder: Path | None = None) -> Found:
    """A folder as timm's hub saves it: the shape is asked of the model that timm builds from it.

    Args:
        folder: with config.json and the weights.
        config: what config.json says.
        origin: the model's name, for messages.
        decoder: file of the decoder's tensors, of which config.json then tells the shape.
    """
    import timm

    name = records.checked(str, config["architecture"], f"{origin}: architecture")
    if not name.startswith(("vit_", "deit", "flexivit_")):
        raise UserError(
            f"{origin} is timm's {name[:80]}, which is not a plain ViT: take one, such as"
            " timm/vit_base_patch16_224.mae"
        )
    _check_arguments(config.get("model_args"), origin)
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(f"local-dir:{folder}", pretrained=False)
    except Exception as error:  # its models take any arguments, and fail by them anyhow
        raise UserError(
            f"{origin}: timm cannot build its {name} ({' '.join(str(error).split())[:80]}): check "
            "config.json, or update timm"
        ) from error
    rotary = isinstance(model, Eva)
    pooling = read_safetensors(folder / POOLING) if (folder / POOLING).is_file() else {}
    if not (_is_dinov3(model) if rotary else _is_plain(model, bool(pooling))):
        raise UserError(
            f"{origin} is timm's {name}, which is not a plain ViT as MAE's is: take one with a "
            "class token or attention pooling, learnt, fixed or DINOv3's positions and a final"
            " LayerNorm, e.g. timm/vit_base_patch16_224.mae"
        )
    block = model.blocks[0]
    gated = not isinstance(block.mlp, Mlp)
    registers = model.num_prefix_tokens - int(model.cls_token is not None)
    size: Size = tuple(model.patch_embed.img_size)
    patch = model.patch_embed.patch_size[0]
    notes: list[str] = []
    if not rotary:
        size, notes = whole(size, patch, model.patch_embed.num_patches)
    shape = shape_of(
        origin,
        image_size=size,
        patch_size=patch,
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=block.attn.num_heads,
        mlp_width=block.mlp.fc2.in_features,
        channels=model.in_chans,
        # timm's configuration cannot express it; our exports write it beside.
        norm_eps=config.get("norm_eps", block.norm1.eps),
        layer_scale=rotary or isinstance(block.ls1, LayerScale),
        registers=registers,
        activation="gelu" if gated else _activation(block.mlp.act),
        gated=gated,
        pre_norm=isinstance(model.norm_pre, nn.LayerNorm),
        class_token=model.cls_token is not None,
        rope=model.rope.temperature if rotary else 0.0,
        **({} if decoder is None else decoder_of(config, origin)),
    )
    tensors = read_folder(folder) | pooling
    if rotary:
        tensors = from_eva(tensors)
    elif isinstance(model, VisionTransformerDistilled):
        renamed = {k.replace("dist_token", "reg_token"): v for k, v in tensors.items()}
        tensors = DeiT().incoming(renamed, origin)
    decoders = {} if decoder is None else read_safetensors(decoder)
    found = Found(shape, tensors, decoders, origin, notes=notes)
    join_positions(found)
    told = model.pretrained_cfg
    normalise(found, told.get("mean", IMAGENET_MEAN), told.get("std", IMAGENET_STD), origin)
    drop_head(found)
    return found


def from_eva(tensors: Mapping[str, Tensor]) -> Tensors:
    """Renames a DINOv3's tensors of timm's Eva to those of timm's ViT; biases it lacks are 0."""
    ours: Tensors = {}
    for name, tensor in tensors.items():
        ours[name.replace(".gamma_1", ".ls1.gamma").replace(".gamma_2", ".ls2.gamma")] = tensor
    for name in [k for k in ours if k.endswith(".attn.qkv.weight")]:
        before = name.removesuffix("qkv.weight")
        none = ours[name].new_zeros(len(ours[name]) // 3)
        parts = [ours.pop(f"{before}{part}_bias", none) for part in "qkv"]
        ours[f"{before}qkv.bias"] = torch.cat(parts)
    for name in [k for k in ours if ".mlp.fc1_g." in k]:
        value = ours.pop(name.replace("fc1_g", "fc1_x"), ours[name].new_zeros(0))
        ours[name.replace("fc1_g", "fc1")] = torch.cat([ours.pop(name), value])
    return ours


def to_eva(encoder: Mapping[str, Tensor]) -> Tensors:
    """The inverse of `from_eva`."""
    theirs: Tensors = {}
    for name, tensor in encoder.items():
        if name.endswith(".attn.qkv.bias"):
            query, _, value = tensor.chunk(3)
            before = name.removesuffix("qkv.bias")
            theirs |= {f"{before}q_bias": query, f"{before}v_bias": value}
        elif ".mlp.fc1." in name and _gated(encoder, name):
            gate, value = tensor.chunk(2)
            theirs |= {name.replace("fc1", "fc1_g"): gate, name.replace("fc1", "fc1_x"): value}
        else:
            own = name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2")
            theirs[own] = tensor
    return theirs


def _gated(encoder: Mapping[str, Tensor], name: str) -> bool:
    """Whether a block's first MLP layer is twice as wide as what its second one takes."""
    block = name[: name.index(".mlp.")]
    return len(encoder[name]) == 2 * encoder[f"{block}.mlp.fc2.weight"].shape[1]


def _check_arguments(arguments: Any, origin: str) -> None:
    """Refuses what would keep timm building for ever; the weights are compared with it later."""
    values = records.checked(dict[str, Any] | None, arguments, f"{origin}: model_args") or {}
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            most = {"depth": 2**7, "num_heads": 2**10}.get(name, 2**24)
            if isinstance(one, int | float) and not -most <= one <= most:
                raise UserError(f"{origin}: {name} is {value!r} in config.json: fetch it again")


def _activation(layer: nn.Module) -> str:
    """Timm's name of an activation; its class where it is none that a shape may have."""
    if isinstance(layer, nn.GELU):
        return "gelu_tanh" if layer.approximate == "tanh" else "gelu"
    known = {GELUTanh: "gelu_tanh", QuickGELU: "quick_gelu"}
    return known.get(type(layer), type(layer).__name__)


def _is_plain(model: Any, pooling: bool) -> bool:
    """Whether our encoder computes what timm's ViT does: no other norms, pooling, or positions.

    ``pooling``: attention that pools lies beside it.
    """
    distilled = isinstance(model, VisionTransformerDistilled)
    return (
        type(model) in (VisionTransformer, VisionTransformerDistilled)
        and len(model.blocks) > 0
        and type(block := model.blocks[0]) is Block
        and type(block.attn) is Attention
        and type(block.mlp) in (Mlp, GluMlp)
        and (type(block.mlp) is Mlp or isinstance(block.mlp.act, nn.SiLU))
        and block.attn.qkv.bias is not None
        and (model.has_class_token or pooling or type(model.attn_pool) is AttentionPoolLatent)
        and (not model.has_class_token or model.attn_pool is None)
        and (distilled or model.no_embed_class == (model.num_prefix_tokens > 1))
        and model.pos_embed is not None
        and isinstance(model.norm_pre, nn.Identity | nn.LayerNorm)
        and isinstance(block.ls1, nn.Identity | LayerScale)
        and isinstance(block.attn.q_norm, nn.Identity)
        and isinstance(model.norm, nn.LayerNorm)
        and isinstance(block.norm1, nn.LayerNorm)
        and _square_patches(model)
    )


def _is_dinov3(model: Any) -> bool:
    """Whether timm's Eva is a DINOv3."""
    return (
        type(model) is Eva
        and len(model.blocks) > 0
        and type(block := model.blocks[0]) is EvaBlock
        and type(block.attn) is EvaAttention
        and block.attn.qkv is not None
        and type(block.mlp) in (Mlp, SwiGLU)
        and isinstance(model.rope, RotaryEmbeddingDinoV3)
        and model.rope.rotate_half
        and model.cls_token is not None
        and model.pos_embed is None
        and model.attn_pool is None
        and block.gamma_1 is not None
        and block.gamma_2 is not None
        and isinstance(block.attn.q_norm, nn.Identity)
        and isinstance(block.attn.norm, nn.Identity)
        and isinstance(model.norm, nn.LayerNorm)
        and isinstance(model.norm_pre, nn.Identity)
        and _square_patches(model)
    )


def _square_patches(model: Any) -> bool:
    return len(set(model.patch_embed.patch_size)) == 1
