"""Files of tensors alone, under FAIR's or timm's names: the shape is read off the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.engine.models.images.found import Found, depth_of, shape_of
from selfdistill.engine.models.images.types.base import Tensors
from selfdistill.engine.models.images.types.vit import DECODER

#: Heads of FAIR's MAE encoders by width; a file of tensors does not tell them.
_FAIR_HEADS = {768: 12, 1024: 16, 1280: 16}
#: Base of the rotary positions of every DINOv3.
_DINOV3_ROPE = 100.0
_EXTRA = ("head.", "head_dist.")


def read(tensors: dict[str, Tensor], args: dict[str, Any], origin: str) -> Found:
    """A file of tensors alone under FAIR's or timm's names; the shape is read off the tensors."""
    encoder, decoder = from_fair(tensors)
    periods, encoder = _dinov3(encoder), _with_gates(encoder)
    rotary = periods is not None
    if "register_tokens" in encoder:
        encoder["reg_token"] = encoder.pop("register_tokens")
    if decoder.keys() == {"mask_token"}:  # DINOv2's own, of its training
        decoder = {}
    needed = ["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"]
    if rotary:
        needed.remove("pos_embed")
    absent = [k for k in needed if k not in encoder]
    if absent:
        hint = "give the folder with its config.json" if "vit." in " ".join(tensors) else ""
        raise UserError(
            f"{origin} has no {absent[0]}, so it is no ViT or MAE under FAIR's or timm's names: "
            + (hint or "give such a checkpoint, or a folder with its config.json")
        )
    if "norm_pre.weight" in encoder:
        raise UserError(
            f"{origin} is a CLIP tower, whose activation a file of tensors does not tell: give"
            " timm's or transformers' folder, or hub name"
        )
    notes = []
    dimensions = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4, "mask_token": 3}
    for part in (encoder, decoder):
        for name, tensor in part.items():
            wanted = 2 if name.endswith("mlp.fc1.weight") else dimensions.get(name, tensor.ndim)
            if tensor.ndim != wanted:
                raise UserError(
                    f"{origin}: {name} is {list(tensor.shape)}, where {wanted} dimensions are"
                    " wanted: it is no ViT or MAE under FAIR's or timm's names"
                )
    width, channels, patch = encoder["patch_embed.proj.weight"].shape[:3]
    grid = 224 // patch if rotary else round((encoder["pos_embed"].shape[1] - 1) ** 0.5)
    mlp_width = encoder["blocks.0.mlp.fc1.weight"].shape[0]
    taken = encoder.get("blocks.0.mlp.fc2.weight")
    gated = taken is not None and taken.ndim == 2 and 2 * taken.shape[1] == mlp_width
    if periods is not None:  # of one head, which has four numbers of each
        heads = width // (4 * periods) if periods else 0
        if not heads or width % (4 * periods):
            raise UserError(
                f"{origin}: rope_embed.periods has {periods} entries, of which width {width} gives"
                " no whole number of heads: fetch the file again"
            )
    elif (known := _FAIR_HEADS.get(width)) is not None:
        heads = known
    else:
        heads = max(1, width // 64)
        notes.append(f"the file does not tell its heads: took {heads} of width 64")
    notes.append(
        "the file does not tell how images are normalised: took ImageNet's mean and standard"
        " deviation"
    )
    sizes: dict[str, Any] = {}
    if decoder.keys() >= {"mask_token", "blocks.0.mlp.fc1.weight"}:
        decoder_width = decoder["mask_token"].shape[2]
        sizes = {
            "decoder_width": decoder_width,
            "decoder_depth": depth_of(decoder),
            # FAIR's decoders have 16 heads at width 512, whatever the encoder.
            "decoder_heads": max(1, decoder_width // 32),
            "decoder_mlp_width": decoder["blocks.0.mlp.fc1.weight"].shape[0],
        }
    shape = shape_of(
        origin,
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        depth=depth_of(encoder),
        heads=heads,
        mlp_width=mlp_width // 2 if gated else mlp_width,
        gated=gated,
        channels=channels,
        norm_eps=1e-5 if rotary else 1e-6,
        rope=_DINOV3_ROPE if rotary else 0.0,
        layer_scale="blocks.0.ls1.gamma" in encoder,
        registers=encoder["reg_token"].shape[1] if "reg_token" in encoder else 0,
        mask_ratio=args.get("mask_ratio", 0.75),
        normalize_pixels=records.checked(
            bool, args.get("norm_pix_loss", True), f"{origin}: norm_pix_loss"
        ),
        **sizes,
    )
    found = Found(shape, encoder, decoder, origin, notes=notes)
    if sizes and "norm_pix_loss" not in args:
        found.target = False
        notes.append(
            "the file does not tell what pixels its decoder gives: of FAIR's, mae_visualize_* gives"
            " plain ones, *_full normalised ones (--mae.normalize_pixels)"
        )
    join_positions(found)
    drop_head(found)
    return found


def join_positions(found: Found) -> None:
    """Timm's models with registers keep no position for CLS: it is in the token already."""
    table = found.encoder.get("pos_embed")
    if table is not None and found.shape.registers and table.shape[1] == found.shape.patches:
        found.encoder["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)


def drop_head(found: Found) -> None:
    """Leaves a classifier's head out, and notes it."""
    kept = {k: v for k, v in found.encoder.items() if not k.startswith(_EXTRA)}
    if len(kept) < len(found.encoder):
        found.notes.append("left out head: only the encoder is used")
    found.encoder = kept


def _with_gates(encoder: Tensors) -> Tensors:
    """Gives the SwiGLU of DINOv2 and DINOv3 timm's names: gate and value in one, the gate first."""
    ours = dict(encoder)
    for name in [k for k in encoder if ".mlp.w1" in k]:
        value = ours.pop(name.replace(".w1.", ".w2."), None) if ".w1." in name else None
        own = name.replace(".w12.", ".fc1.").replace(".w1.", ".fc1.")
        tensor = ours.pop(name)
        ours[own] = tensor if value is None else torch.cat([tensor, value])
    return {k.replace(".mlp.w3.", ".mlp.fc2."): v for k, v in ours.items()}


def _dinov3(encoder: Tensors) -> int | None:
    """The rotary periods of a DINOv3 of its makers, None of others; gives its tensors our names."""
    if "rope_embed.periods" not in encoder or "storage_tokens" not in encoder:
        return None
    periods = encoder["rope_embed.periods"].numel()
    encoder["reg_token"] = encoder.pop("storage_tokens")
    for name in [k for k in encoder if k in ("rope_embed.periods", "mask_token")]:
        del encoder[name]
    for name in [k for k in encoder if k.startswith("local_cls_norm.")]:  # of its training
        del encoder[name]
    for name in [k for k in encoder if k.endswith("attn.qkv.bias_mask")]:
        own, mask = name.removesuffix("_mask"), encoder.pop(name)
        if own in encoder and mask.shape == encoder[own].shape:  # NaN where none is wanted
            encoder[own] = torch.where(mask.nan_to_num() > 0, encoder[own], 0.0)
    return periods


def from_fair(tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """Sorts FAIR's MAE names, or timm's, into encoder and decoder; unknown names stay in encoder.

    FAIR's encoder has timm's names, and its decoder the same ones with ``decoder_`` before.
    """
    encoder: Tensors = {}
    decoder: Tensors = {}
    for name, tensor in tensors.items():
        if name in DECODER:
            decoder[DECODER[name]] = tensor
        elif name.startswith("decoder_blocks."):
            decoder[name.removeprefix("decoder_")] = tensor
        else:
            encoder[name] = tensor
    return encoder, decoder
