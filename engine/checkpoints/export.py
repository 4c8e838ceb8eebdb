"""Leaves trained weights as folders that transformers and timm load as they are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from selfdistill.data.errors import UserError
from selfdistill.engine.models.images import types
from selfdistill.engine.models.images.formats.hugging_face import DECODER
from selfdistill.engine.models.images.formats.timm_folder import to_eva
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types.vit import ViT, decoder_config, masked

if TYPE_CHECKING:  # images need none of it: a tenth of a start
    from transformers import PreTrainedConfig

    from selfdistill.engine.models.texts.sentences import Sentences


def export_mae(
    folder: str | Path,
    shape: Shape,
    encoder: Mapping[str, Tensor],
    decoder: Mapping[str, Tensor],
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Writes a folder for transformers' ``ViTMAEForPreTraining``, or the encoder's own class.

    The encoder alone lies in it for timm (timm/), and of a ViT-MAE for ``ViTModel`` (encoder/).
    Of rectangles transformers has no ViT-MAE, and of some types no encoder.

    Args:
        folder: to be made; an export that stands there is replaced.
        shape: the model's shape.
        encoder: state dict of `ViTEncoder`.
        decoder: state dict of `MAEDecoder`.
        mean: mean of each channel that the images were normalised by.
        std: standard deviation of each channel.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    kind = types.fitting(shape, str(folder))

    def write(target: Path) -> None:
        plain = kind.config(shape), kind.tensors(encoder, shape, kind.within)
        square = isinstance(shape.image_size, int)
        if isinstance(kind, ViT) and square:  # AutoModel loads the masked one, which hides patches
            (target / "encoder").mkdir()
            _write_hugging_face(target / "encoder", *plain, shape, mean, std)
            _write_hugging_face(target, *masked(shape, encoder, decoder), shape, mean, std)
        else:  # transformers' class has no decoder: that lies beside
            if kind.has_class(shape):
                config = plain[0] | decoder_config(shape)
                _write_hugging_face(target, config, plain[1], shape, mean, std)
            _write_tensors(target / DECODER, decoder)
        more = {} if kind.has_class(shape) else decoder_config(shape)
        _write_timm(target / "timm", shape, encoder, [], "cls", mean, std, more)

    _replace(Path(folder), write)


def export_classifier(
    folder: str | Path,
    shape: Shape,
    encoder: Mapping[str, Tensor],
    head: Mapping[str, Tensor],
    classes: Sequence[str],
    pool: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Writes a classifier for transformers' class of its type, and for timm in timm/.

    Some of transformers' classes know one way of pooling or squares alone, and some types have
    none: what they cannot express is written for timm only.

    Args:
        folder: to be made; an export that stands there is replaced.
        shape: the model's shape.
        encoder: state dict of `ViTEncoder`.
        head: ``weight`` [classes, D] and ``bias`` [classes].
        classes: names, in order of the head's rows.
        pool: ``cls`` or ``mean``, as in `ViTClassifier`.
        mean: mean of each channel that the images were normalised by.
        std: standard deviation of each channel.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    kind = types.fitting(shape, str(folder))

    def write(target: Path) -> None:
        if kind.head(shape, pool) is not None and kind.has_class(shape):
            config, tensors = kind.classifier(shape, encoder, head, pool)
            _write_hugging_face(target, config | _labels(classes), tensors, shape, mean, std)
        tensors = dict(encoder) | {f"head.{k}": v for k, v in head.items()}
        _write_timm(target / "timm", shape, tensors, classes, pool, mean, std)

    _replace(Path(folder), write)


def export_transformers(
    folder: str | Path,
    network: Any,
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    original: PreTrainedConfig,
    told: Sentences | None = None,
) -> None:
    """Writes one of transformers' own models with its tokenizer.

    Args:
        folder: to be made; an export that stands there is replaced.
        network: the model; its class and configuration are written.
        tensors: its parameters, whole; of tied ones the first.
        tokenizer: transformers' tokenizer.
        original: the configuration whose dropout rates are written.
        told: of a folder for sentence-transformers; None: it is for transformers alone.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    from selfdistill.engine.models.texts import sentences
    from selfdistill.engine.models.texts.classifier import MeanNetwork
    from selfdistill.engine.models.texts.language import restore_dropout

    def write(target: Path) -> None:
        config = restore_dropout(network.config, original)
        head = None
        if isinstance(network, MeanNetwork):
            head = {k: tensors[f"classifier.{k}"] for k in ("weight", "bias")}
            prefix = "base_model."
            named = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            _save_whole(network.base_model, config, named, target)
        else:
            _save_whole(network, config, tensors, target)
        tokenizer.save_pretrained(target)
        if told is not None:
            sentences.write(target, told, int(config.hidden_size), head)
        for path in target.rglob("*"):
            if path.is_file():
                _sync(path)

    _replace(Path(folder), write)


def _save_whole(
    network: Any, config: PreTrainedConfig, tensors: Mapping[str, Tensor], target: Path
) -> None:
    """Saves a model of transformers with these weights; of tied ones the first is enough."""
    whole = type(network)(config, **({"add_pooling_layer": False} if _poolless(network) else {}))
    missing, strange = whole.load_state_dict(tensors, strict=False)
    named = dict(whole.named_parameters(remove_duplicate=False))
    given = {id(named[name]) for name in tensors}
    absent = [name for name in missing if id(named.get(name)) not in given]  # but tied ones
    assert not strange, strange
    assert not absent, absent
    whole.save_pretrained(target)


def _poolless(network: Any) -> bool:
    """Whether a class makes a pooler unless told not to, and this model has none."""
    return hasattr(network, "pooler") and network.pooler is None


def _write_timm(
    target: Path,
    shape: Shape,
    tensors: Mapping[str, Tensor],
    classes: Sequence[str],
    pool: str,
    mean: Sequence[float],
    std: Sequence[float],
    more: Mapping[str, Any] | None = None,
) -> None:
    """A folder for ``timm.create_model("local-dir:...")``; no classes: the features alone.

    ``more`` is what config.json says beside what timm reads.
    """
    target.mkdir()
    config = _timm_config(shape, classes, pool, mean, std) | dict(more or {})
    _write_json(target / "config.json", config)
    tensors = dict(tensors)
    if not shape.class_token and pool == "mean":
        tensors = {k: v for k, v in tensors.items() if not k.startswith("attn_pool.")}
    if shape.rope:
        tensors = to_eva(tensors)
    elif shape.registers:  # timm has no position of CLS then
        table = tensors["pos_embed"]
        tensors["cls_token"] = tensors["cls_token"] + table[:, :1]
        tensors["pos_embed"] = table[:, 1:]
    _write_tensors(target / "model.safetensors", tensors)


def _labels(classes: Sequence[str]) -> dict[str, Any]:
    return {
        "id2label": {str(i): name for i, name in enumerate(classes)},
        "label2id": {name: i for i, name in enumerate(classes)},
    }


def _timm_config(
    shape: Shape, classes: Sequence[str], pool: str, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
    """What ``timm.create_model("local-dir:...")`` reads: an architecture with all it overrides."""
    pooled = "token" if shape.class_token else "map"
    arguments: dict[str, Any] = {
        "img_size": shape.image_size,
        "patch_size": shape.patch_size,
        "in_chans": shape.channels,
        "num_classes": len(classes),
        "embed_dim": shape.width,
        "depth": shape.depth,
        "num_heads": shape.heads,
        # timm takes int(width * ratio): the half keeps rounding from losing a unit.
        "mlp_ratio": ((1 + shape.gated) * shape.mlp_width + 0.5) / shape.width,
        "global_pool": pooled if pool == "cls" else "avg",
    }
    architecture = "vit_base_patch16_224"
    if shape.rope:
        architecture = "vit_small_patch16_dinov3_qkvb"
        arguments |= {
            "dynamic_img_size": False,
            "init_values": 1.0,
            "mlp_ratio": (shape.mlp_width + 0.5) / shape.width,
            "num_reg_tokens": shape.registers,
            "rope_temperature": shape.rope,
            "swiglu_align_to": 1,  # gate and value apart, as in timm's larger ones
            "swiglu_mlp": shape.gated,
        }
    else:
        arguments |= {
            "fc_norm": False,
            **({"init_values": 1.0} if shape.layer_scale else {}),
            **({"reg_tokens": shape.registers, "no_embed_class": True} if shape.registers else {}),
            **({"act_layer": shape.activation} if shape.activation != "gelu" else {}),
            **({"pre_norm": True} if shape.pre_norm else {}),
            **({} if shape.class_token else {"class_token": False}),
        }
        if shape.gated:  # an argument that JSON cannot tell: the architecture has it
            architecture = "vit_giant_patch14_dinov2"
    return {
        "architecture": architecture,
        "num_classes": len(classes),
        "num_features": shape.width,
        "label_names": list(classes),
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [shape.channels, *shape.sides],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(mean),
            "std": list(std),
            "num_classes": len(classes),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "norm_eps": shape.norm_eps,
        "norm_eps_note": "timm's LayerNorm takes 1e-6 unless told: for the exact outputs give "
        f"create_model norm_layer=functools.partial(torch.nn.LayerNorm, eps={shape.norm_eps})",
    }


def _write_hugging_face(
    target: Path,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    shape: Shape,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    _write_json(target / "config.json", config)
    height, width = shape.sides
    square = height == width
    size = {"height": height, "width": width}
    _write_json(
        target / "preprocessor_config.json",
        {
            # As data/formats/images.py fits: short side, bicubic, centre square. ViTImageProcessor
            # of transformers 4 has no crop and squashes; Bit's does the same work in all versions.
            # None covers a rectangle: images of another ratio are squashed, and not padded.
            "image_processor_type": "BitImageProcessor",
            "do_center_crop": square,
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": list(mean),
            "image_std": list(std),
            "resample": 3,  # bicubic
            "rescale_factor": 1 / 255,
            "size": {"shortest_edge": height} if square else size,
            "crop_size": size,
        },
    )
    _write_tensors(target / "model.safetensors", tensors)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Rows of a fused qkv share its memory, which safetensors refuses: each is made whole.
    whole = {k: v.detach().float().cpu().clone().contiguous() for k, v in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})
    _sync(path)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _replace(folder: Path, write: Callable[[Path], None]) -> None:
    """Writes into a temporary folder beside `folder` and renames it, so none is ever half there."""
    ours = ("config.json", "timm")
    if folder.exists() and any(folder.iterdir()) and not any((folder / n).exists() for n in ours):
        raise UserError(f"{folder} holds something else than an export: name another folder")
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write {folder} ({error}): free some space, or mend its permissions, and start "
            "again with the same command"
        ) from error
