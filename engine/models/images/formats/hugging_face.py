"""Folders of transformers' image encoders, of every type in `types`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import pydantic
from torch import Tensor

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.data.formats.images import sides
from selfdistill.engine.models.images import types
from selfdistill.engine.models.images.found import Found, normalise, shape_of, whole
from selfdistill.engine.models.images.shape import ACTIVATIONS
from selfdistill.engine.models.images.types.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ModelType,
    our_activation,
)
from selfdistill.engine.models.images.types.clip import CLIP
from selfdistill.engine.models.images.types.vit import split_decoder
from selfdistill.engine.models.source import read_folder, read_safetensors

#: Shape's field -> key in transformers' config.json, and the default where it is silent.
_NUMBERS: dict[str, tuple[str, float]] = {
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
#: The decoder's file in an export whose encoder is of a class that has none.
DECODER = "decoder.safetensors"


#: How names of processors begin whose own mean and standard deviation are not 0.5; a file that
#: names none is of the type's own.
_CONSTANTS = {
    ("CLIP", "Bit", "DINOv2"): (CLIP.mean, CLIP.std),
    ("DINOv3",): (IMAGENET_MEAN, IMAGENET_STD),
}


class _Processor(records.Record):
    """What is used of preprocessor_config.json."""

    image_processor_type: str | None = None
    feature_extractor_type: str | None = None
    do_rescale: bool = True
    rescale_factor: Annotated[records.Finite, pydantic.Field(gt=0)] = 1 / 255
    do_normalize: bool = True
    image_mean: list[records.Finite] | records.Finite | None = None
    image_std: list[records.Finite] | records.Finite | None = None


def read(folder: Path, config: dict[str, Any], origin: str) -> Found:
    """Reads a folder by its type.

    Raises:
        UserError: The type is unknown, or has parts that are not known here.
    """
    kind = types.named(config.get("model_type"), origin)
    inner = config.get("vision_config")  # of a model with two towers
    if isinstance(inner, dict):
        config = inner | {"model_type": config["model_type"]}
    values: dict[str, Any] = {"hidden_act": "gelu", "qkv_bias": True, **kind.defaults} | config
    if not values["qkv_bias"]:
        raise UserError(
            f"{origin} has qkv_bias {values['qkv_bias']}: only models with biases are supported"
        )
    own = kind.settings(values, origin)
    normalized = values.get("norm_pix_loss", values["model_type"] != "vit_mae")
    size, patch = _size(values, "image_size", 224, origin), _size(values, "patch_size", 16, origin)
    notes: list[str] = []
    tensors: dict[str, Tensor] | None = None
    if patch > 0 and any(side % patch for side in sides(size)):
        tensors = read_folder(folder)
        size, notes = whole(size, patch, _rows(kind, tensors))
    shape = shape_of(
        origin,
        image_size=size,
        patch_size=patch,
        normalize_pixels=records.checked(bool, normalized, f"{origin}: norm_pix_loss"),
        # DINOv2's gated MLP has SiLU whatever its configuration says; DINOv3's is checked.
        activation=ACTIVATIONS[0] if own.get("gated") else our_activation(values),
        **_numbers(values, origin),
        **own,
    )
    decoder, rest = split_decoder(tensors or read_folder(folder))
    # A model with 0 registers keeps an empty table of them.
    encoder, unknown = kind.names.ours({k: v for k, v in rest.items() if v.numel()})
    if (folder / DECODER).exists():  # beside an encoder whose class has none
        decoder = read_safetensors(folder / DECODER)
    found = Found(shape, kind.incoming(encoder, origin), decoder, origin, notes=notes)
    found.mean, found.std = kind.mean, kind.std
    _leave_out(found, kind, unknown, values["model_type"])
    _read_processor(folder, found, kind)
    return found


def _rows(kind: ModelType, tensors: Mapping[str, Tensor]) -> int:
    """Rows of the table of positions that are patches'; 0 where there is none."""
    encoder = kind.incoming(kind.names.ours(tensors)[0], "")
    table = encoder.get("pos_embed")
    if table is None or table.ndim != 3:
        return 0
    return table.shape[1] - ("cls_token" in encoder)


def decoder_of(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """A shape's fields that config.json says of the decoder and of its task."""
    ours = {k: v for k, v in _numbers(config, origin).items() if k.startswith("decoder_")}
    ratio, normalized = config.get("mask_ratio", 0.75), config.get("norm_pix_loss", True)
    records.checked(bool, normalized, f"{origin}: norm_pix_loss")
    return ours | {"mask_ratio": ratio, "normalize_pixels": normalized}


def _numbers(values: Mapping[str, Any], origin: str) -> dict[str, float]:
    numbers = {name: values.get(key, default) for name, (key, default) in _NUMBERS.items()}
    for name, value in numbers.items():
        kinds = (int,) if isinstance(_NUMBERS[name][1], int) else (int, float)
        if type(value) not in kinds or not 0 < value < records.BOUND:
            raise UserError(
                f"{origin}: {_NUMBERS[name][0]} is {value!r} in config.json, not a positive "
                "number: fetch the file again"
            )
    return numbers


def _leave_out(found: Found, kind: ModelType, unknown: list[str], model_type: str) -> None:
    """Notes what the checkpoint has beside the encoder; refuses what no such model has."""
    # The decoder of ViT's and DeiT's ForMaskedImageModeling, one convolution, is no MAE's.
    known = (*kind.extra, "decoder.") if model_type in ("vit", "deit") else kind.extra
    bare = {name: _bare(name, kind) for name in unknown if name not in kind.silent}
    strange = [name for name, own in bare.items() if not own.startswith(known)]
    if strange:
        raise UserError(
            f"{found.origin} has {strange[0]}, which no plain {kind.title} has: take an unmodified"
            " checkpoint"
        )
    dropped = sorted({own.split(".")[0] for own in bare.values()})
    if dropped:
        found.notes.append(f"left out {', '.join(dropped)}: only the encoder is used")


def _bare(name: str, kind: ModelType) -> str:
    prefix = next((p for p in kind.names.prefixes if name.startswith(p)), "")
    return name.removeprefix(prefix)


def _size(config: Mapping[str, Any], key: str, default: int, origin: str) -> Any:
    """A number, or for images two; `Shape` bounds them."""
    value = config.get(key, default)
    sides = value if isinstance(value, list) else [value]
    square = all(side == sides[0] for side in sides)
    pair = key == "image_size" and len(sides) == 2
    if not sides or any(type(side) is not int for side in sides) or not (square or pair):
        most = "one or two whole numbers" if key == "image_size" else "a whole number"
        raise UserError(f"{origin}: {key} is {value} in config.json, not {most}: fetch it again")
    return sides[0] if square else tuple(sides)


def _read_processor(folder: Path, found: Found, kind: ModelType) -> None:
    """Mean and standard deviation, which the weights were trained with."""
    path, told = _processor(folder)
    timms = records.read_object(folder / "config.json").get("pretrained_cfg")
    if told is None and isinstance(timms, dict) and "mean" in timms and "std" in timms:
        # A rectangle's, of ours: transformers' wrapper of timm's transform reads it there.
        normalise(found, timms["mean"], timms["std"], folder / "config.json")
        return
    if told is None:
        found.notes.append(
            f"no preprocessor_config.json: images are normalised by {kind.normalised_by} mean and"
            " standard deviation"
        )
        return
    processor: _Processor = records.checked(_Processor, told, path)
    name = processor.image_processor_type or processor.feature_extractor_type or kind.title
    own = [values for names, values in _CONSTANTS.items() if name.startswith(names)]
    default: tuple[Any, Any] = own[0] if own else (0.5, 0.5)
    mean = default[0] if processor.image_mean is None else processor.image_mean
    std = default[1] if processor.image_std is None else processor.image_std
    if not processor.do_normalize:
        mean, std = 0.0, 1.0
    # Its numbers are of levels times this, ours of levels / 255.
    scale = 255 * (processor.rescale_factor if processor.do_rescale else 1.0)
    if not math.isclose(scale, 1, rel_tol=1e-6):
        mean, std = _divided(mean, scale), _divided(std, scale)
    normalise(found, mean, std, path)


def _processor(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """The file that tells of the processor, and its entries, as transformers chooses them."""
    nested = folder / "processor_config.json"  # of transformers 5
    if nested.exists():
        told = records.read_object(nested).get("image_processor")
        if told is not None:
            place = f"{nested}: image_processor"
            return nested, records.checked(dict[str, Any], told, place)
    path = folder / "preprocessor_config.json"
    return path, records.read_object(path) if path.exists() else None


def _divided(values: Any, scale: float) -> Any:
    return [v / scale for v in values] if isinstance(values, list | tuple) else values / scale
