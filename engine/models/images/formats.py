"""The published formats of ViT and ViT-MAE checkpoints, each read into the same record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import Attention, Block, LayerScale, Mlp, VisionTransformer
from torch import Tensor, nn

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.data.files import regular
from selfdistill.engine.models.images.found import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Found,
    depth_of,
    normalise,
    shape_of,
)
from selfdistill.engine.models.images.layout import from_fair, from_hugging_face
from selfdistill.engine.models.source import (
    TORCH_FILES,
    read_folder,
    read_safetensors,
    read_torch,
)

#: Heads of FAIR's MAE encoders by width; a file of tensors does not tell them.
_FAIR_HEADS = {768: 12, 1024: 16, 1280: 16}
#: Shape's field -> key in transformers' config.json, and the default where it is silent.
_HF_NUMBERS: dict[str, tuple[str, float]] = {
    "width": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "mlp_width": ("intermediate_size", 3072),
    "decoder_width": ("decoder_hidden_size", 512),
    "decoder_depth": ("decoder_num_hidden_layers", 8),
    "decoder_heads": ("decoder_num_attention_heads", 16),
    "decoder_mlp_width": ("decoder_intermediate_size", 2048),
    "channels": ("num_channels", 3),
    "norm_eps": ("layer_norm_eps", 1e-12),
    "mask_ratio": ("mask_ratio", 0.75),
}
#: transformers' model_type of DINOv2, without and with registers.
_DINO = ("dinov2", "dinov2_with_registers")
#: The decoder's file in an export whose encoder is of a class that has none.
DECODER = "decoder.safetensors"
#: What fine-tuned and other checkpoints have beside the encoder.
_HF_EXTRA = ("pooler.", "vit.pooler.", "classifier.")
_HF_MASK = tuple(
    f"{prefix}embeddings.mask_token" for prefix in ("", "vit.", "dinov2.", "dinov2_with_registers.")
)
_TIMM_EXTRA = ("head.",)


class _Processor(records.Record):
    """What is used of preprocessor_config.json."""

    do_normalize: bool = True
    image_mean: list[records.Finite] | records.Finite | None = None
    image_std: list[records.Finite] | records.Finite | None = None


def read(path: Path, origin: str) -> Found:
    """Reads a folder or file of any known format.

    Raises:
        UserError: none of the known formats, or another architecture.
    """
    if path.is_file():
        if path.suffix == ".safetensors":
            return _bare(read_safetensors(path), {}, origin)
        if path.name.endswith(TORCH_FILES):
            return _bare(*read_torch(path), origin)
        raise UserError(
            f"{origin} is neither {', '.join(TORCH_FILES)} nor .safetensors: give one of them"
        )
    regular(path if not path.is_dir() else path / "config.json", "give another")
    # A classifier that pools by the mean is exported for timm alone.
    folder = path if (path / "config.json").exists() else path / "timm"
    if not (folder / "config.json").exists():
        raise UserError(
            f"{origin} has no config.json: give a model's folder as transformers or timm save it"
        )
    config = records.read_object(folder / "config.json")
    if "architecture" in config:
        return _timm(folder, config, origin)
    return _hugging_face(folder, config, origin)


def _hugging_face(folder: Path, config: dict[str, Any], origin: str) -> Found:
    """Reads the ViTMAE and ViT classes of transformers."""
    kind = config.get("model_type")
    if kind not in (*_DINO, "vit_mae", "vit"):
        raise UserError(
            f"{origin} is a {kind or 'model of unknown type'}, not a ViT, ViT-MAE or DINOv2: give"
            " image weights such as facebook/vit-mae-base or facebook/dinov2-base"
        )
    values: dict[str, Any] = {"hidden_act": "gelu", "qkv_bias": True} | config
    if kind in _DINO:
        values = _dino(values, kind, origin)
    if values["hidden_act"] != "gelu" or not values["qkv_bias"]:
        raise UserError(
            f"{origin} has activation {values['hidden_act']} and qkv_bias {values['qkv_bias']}:"
            " only gelu with biases is supported, as in every published ViT-MAE"
        )
    numbers = {name: values.get(key, default) for name, (key, default) in _HF_NUMBERS.items()}
    for name, value in numbers.items():
        kinds = (int,) if isinstance(_HF_NUMBERS[name][1], int) else (int, float)
        if type(value) not in kinds or not 0 < value < records.BOUND:
            raise UserError(
                f"{origin}: {_HF_NUMBERS[name][0]} is {value!r} in config.json, not a positive "
                "number: fetch the file again"
            )
    normalized = values.get("norm_pix_loss", False) if kind == "vit_mae" else True
    if kind in _DINO:
        normalized = values.get("norm_pix_loss", True)
    shape = shape_of(
        origin,
        image_size=_square(values, "image_size", 224, origin),
        patch_size=_square(values, "patch_size", 16, origin),
        normalize_pixels=records.checked(bool, normalized, f"{origin}: norm_pix_loss"),
        layer_scale=kind in _DINO,
        registers=values.get("num_register_tokens", 4) if kind == _DINO[1] else 0,
        **numbers,
    )
    encoder, decoder, unknown = from_hugging_face(read_folder(folder))
    if (folder / DECODER).exists():  # beside an encoder whose class has none
        decoder = read_safetensors(folder / DECODER)
    # ViTForMaskedImageModeling's decoder, one convolution, is no MAE's.
    known = (*_HF_EXTRA, "decoder.") if kind == "vit" else _HF_EXTRA
    strange = [k for k in unknown if not k.startswith(known) and k not in _HF_MASK]
    if strange:
        raise UserError(
            f"{origin} has {strange[0]}, which no plain ViT-MAE has: take an unmodified checkpoint"
        )
    found = Found(shape, encoder, decoder, origin, antialias=kind != "dinov2")
    others = [k for k in unknown if k not in _HF_MASK]
    dropped = sorted({k.removeprefix("vit.").split(".")[0] for k in others})
    if dropped:
        found.notes.append(f"left out {', '.join(dropped)}: only the encoder is used")
    _read_processor(folder, found)
    return found


def _dino(values: dict[str, Any], kind: str, origin: str) -> dict[str, Any]:
    """DINOv2's configuration as a ViT's: the MLP's width from its ratio; what we have not refused.

    Raises:
        UserError: It has SwiGLU.
    """
    if values.get("use_swiglu_ffn"):
        raise UserError(
            f"{origin} has SwiGLU layers (DINOv2 giant), which are not known here: take small, base"
            " or large"
        )
    width, ratio = values.get("hidden_size", 768), values.get("mlp_ratio", 4)
    if type(width) is not int or type(ratio) not in (int, float) or not 0 < ratio < 64:
        raise UserError(f"{origin}: mlp_ratio is {ratio!r} in config.json: fetch the file again")
    return (
        {"layer_norm_eps": 1e-6, "patch_size": 14}
        | values
        | {"intermediate_size": int(width * ratio)}
    )


def _square(config: Mapping[str, Any], key: str, default: int, origin: str) -> int:
    value = config.get(key, default)
    sides = value if isinstance(value, list) else [value]
    if not sides or any(type(side) is not int or side != sides[0] for side in sides):
        raise UserError(f"{origin}: {key} {value} is not square: only square images are supported")
    side: int = sides[0]
    return side


def _read_processor(folder: Path, found: Found) -> None:
    """Mean and standard deviation, which the weights were trained with."""
    path = folder / "preprocessor_config.json"
    if not path.exists():
        found.notes.append(
            "no preprocessor_config.json: images are normalised by ImageNet's "
            "mean and standard deviation"
        )
        return
    processor: _Processor = records.checked(_Processor, records.read_object(path), path)
    # ViTImageProcessor's own defaults are 0.5.
    mean = 0.5 if processor.image_mean is None else processor.image_mean
    std = 0.5 if processor.image_std is None else processor.image_std
    if not processor.do_normalize:
        mean, std = 0.0, 1.0
    normalise(found, mean, std, path)


def _bare(tensors: dict[str, Tensor], args: dict[str, Any], origin: str) -> Found:
    """A file of tensors alone under FAIR's or timm's names; the shape is read off the tensors."""
    encoder, decoder = from_fair(tensors)
    if "register_tokens" in encoder:
        encoder["reg_token"] = encoder.pop("register_tokens")
    if decoder.keys() == {"mask_token"}:  # DINOv2's own, of its training
        decoder = {}
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    absent = [k for k in needed if k not in encoder]
    if absent:
        hint = "give the folder with its config.json" if "vit." in " ".join(tensors) else ""
        raise UserError(
            f"{origin} has no {absent[0]}, so it is no ViT or MAE under FAIR's or timm's names: "
            + (hint or "give such a checkpoint, or a folder with its config.json")
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
    grid = round((encoder["pos_embed"].shape[1] - 1) ** 0.5)
    heads = _FAIR_HEADS.get(width) or max(1, width // 64)
    if width not in _FAIR_HEADS:
        notes.append(f"the file does not tell its heads: took {heads} of width 64")
    dropout: dict[str, Any] = {}
    if decoder.keys() >= {"mask_token", "blocks.0.mlp.fc1.weight"}:
        decoder_width = decoder["mask_token"].shape[2]
        dropout = {
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
        mlp_width=encoder["blocks.0.mlp.fc1.weight"].shape[0],
        channels=channels,
        norm_eps=1e-6,
        layer_scale="blocks.0.ls1.gamma" in encoder,
        registers=encoder["reg_token"].shape[1] if "reg_token" in encoder else 0,
        mask_ratio=args.get("mask_ratio", 0.75),
        normalize_pixels=records.checked(
            bool, args.get("norm_pix_loss", True), f"{origin}: norm_pix_loss"
        ),
        **dropout,
    )
    found = Found(shape, encoder, decoder, origin, notes=notes)
    _join_positions(found)
    _drop_head(found)
    return found


def _join_positions(found: Found) -> None:
    """Timm's models with registers keep no position for CLS: it is in the token already."""
    table = found.encoder.get("pos_embed")
    if table is not None and found.shape.registers and table.shape[1] == found.shape.patches:
        found.encoder["pos_embed"] = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)


def _drop_head(found: Found) -> None:
    kept = {k: v for k, v in found.encoder.items() if not k.startswith(_TIMM_EXTRA)}
    if len(kept) < len(found.encoder):
        found.notes.append("left out head: only the encoder is used")
    found.encoder = kept


def _timm(folder: Path, config: dict[str, Any], origin: str) -> Found:
    """A folder as timm's hub saves it: the shape is asked of the model that timm builds from it."""
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
    _check_plain(model, name, origin)
    block = model.blocks[0]
    shape = shape_of(
        origin,
        image_size=model.patch_embed.img_size[0],
        patch_size=model.patch_embed.patch_size[0],
        width=model.embed_dim,
        depth=len(model.blocks),
        heads=block.attn.num_heads,
        mlp_width=block.mlp.fc1.out_features,
        channels=model.in_chans,
        # timm's configuration cannot express it; our exports write it beside.
        norm_eps=config.get("norm_eps", block.norm1.eps),
        layer_scale=isinstance(block.ls1, LayerScale),
        registers=model.num_prefix_tokens - 1,
    )
    found = Found(shape, read_folder(folder), {}, origin)
    _join_positions(found)
    told = model.pretrained_cfg
    normalise(found, told.get("mean", IMAGENET_MEAN), told.get("std", IMAGENET_STD), origin)
    _drop_head(found)
    return found


def _check_arguments(arguments: Any, origin: str) -> None:
    """Refuses what would keep timm building for ever; the weights are compared with it later."""
    values = records.checked(dict[str, Any] | None, arguments, f"{origin}: model_args") or {}
    for name, value in values.items():
        for one in value if isinstance(value, list) else [value]:
            most = {"depth": 2**7, "num_heads": 2**10}.get(name, 2**24)
            if isinstance(one, int | float) and not -most <= one <= most:
                raise UserError(f"{origin}: {name} is {value!r} in config.json: fetch it again")


def _check_plain(model: Any, name: str, origin: str) -> None:
    """Refuses what our encoder would compute otherwise: other norms, SwiGLU, no CLS token..."""
    plain = (
        type(model) is VisionTransformer
        and len(model.blocks) > 0
        and type(block := model.blocks[0]) is Block
        and type(block.attn) is Attention
        and type(block.mlp) is Mlp
        and isinstance(block.mlp.act, nn.GELU)
        and block.mlp.act.approximate == "none"
        and block.attn.qkv.bias is not None
        and model.has_class_token
        and model.no_embed_class == (model.num_prefix_tokens > 1)
        and model.pos_embed is not None
        and isinstance(model.norm_pre, nn.Identity)
        and isinstance(block.ls1, nn.Identity | LayerScale)
        and isinstance(block.attn.q_norm, nn.Identity)
        and isinstance(model.norm, nn.LayerNorm)
        and isinstance(block.norm1, nn.LayerNorm)
        and len(set(model.patch_embed.img_size)) == len(set(model.patch_embed.patch_size)) == 1
    )
    if not plain:
        raise UserError(
            f"{origin} is timm's {name}, which is not a plain ViT as MAE's is: take one with a "
            "class token, learnt or fixed positions and a final LayerNorm, e.g. "
            "timm/vit_base_patch16_224.mae"
        )
