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
from selfdistill.engine.checkpoints import processors
from selfdistill.engine.checkpoints.processors import Pixels
from selfdistill.engine.models.images import types
from selfdistill.engine.models.images.formats.hugging_face import DECODER
from selfdistill.engine.models.images.formats.timm_folder import POOLING, to_eva
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types.vit import ViT, decoder_config, masked

if TYPE_CHECKING:  # images need none of it: a tenth of a start
    from transformers import PreTrainedConfig

    from selfdistill.engine.models.texts.sentences import Sentences


#: What an export says for this program, beside other libraries' files: how inputs were read.
TOLD = "selfdistill.json"
#: What transformers calls a classifier of samples that may have several labels.
PROBLEM = "multi_label_classification"


def export_mae(
    folder: str | Path,
    shape: Shape,
    encoder: Mapping[str, Tensor],
    decoder: Mapping[str, Tensor],
    mean: Sequence[float],
    std: Sequence[float],
    own: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder for transformers' ``ViTMAEForPreTraining``, or the encoder's own class.

    ``AutoModel`` of a ViT-MAE's is the plain encoder, not ``ViTMAEModel``, which hides patches at
    random. The encoder alone lies in it for timm (timm/), and of a ViT-MAE for ``ViTModel``
    (encoder/). Of rectangles transformers has no ViT-MAE, and of some types no encoder.

    Args:
        folder: to be made; an export that stands there is replaced.
        shape: the model's shape.
        encoder: state dict of `ViTEncoder`.
        decoder: state dict of `MAEDecoder`.
        mean: mean of each channel that the images were normalised by.
        std: standard deviation of each channel.
        own: what `TOLD` is to say of it.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    kind, pixels = types.fitting(shape, str(folder)), Pixels.of(mean, std, own)

    def write(target: Path) -> None:
        _tell(target, own)
        told = decoder_config(shape)
        plain = kind.config(shape), kind.tensors(encoder, shape, kind.within)
        if isinstance(kind, ViT) and isinstance(shape.image_size, int):
            (target / "encoder").mkdir()
            _write_hugging_face(target / "encoder", *plain, shape, pixels)
            _write_hugging_face(
                target, plain[0] | told, masked(shape, encoder, decoder)[1], shape, pixels
            )
        else:  # transformers' class has no decoder: that lies beside
            if kind.has_class(shape):
                _write_hugging_face(target, plain[0] | told, plain[1], shape, pixels)
            _write_tensors(target / DECODER, decoder)
        more = {} if kind.has_class(shape) else told
        _write_timm(target / "timm", shape, encoder, [], "cls", pixels, more)

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
    own: Mapping[str, Any] | None = None,
    several: bool = False,
) -> None:
    """Writes a classifier for transformers' class of its type, and for timm in timm/.

    Some of transformers' classes know one way of pooling or squares alone, and some types have
    none: what they cannot express is written for transformers' wrapper of timm's models.

    Args:
        folder: to be made; an export that stands there is replaced.
        shape: the model's shape.
        encoder: state dict of `ViTEncoder`.
        head: ``weight`` [classes, D] and ``bias`` [classes].
        classes: names, in order of the head's rows.
        pool: ``cls`` or ``mean``, as in `ViTClassifier`.
        mean: mean of each channel that the images were normalised by.
        std: standard deviation of each channel.
        own: what `TOLD` is to say of it.
        several: whether a sample may have several labels; both configurations then say so.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    kind, pixels = types.fitting(shape, str(folder)), Pixels.of(mean, std, own)
    problem = {"problem_type": PROBLEM} if several else {}

    def write(target: Path) -> None:
        _tell(target, own)
        if kind.head(shape, pool) is not None and kind.has_class(shape):
            config, tensors = kind.classifier(shape, encoder, head, pool)
            config |= _labels(classes) | problem
            _write_hugging_face(target, config, tensors, shape, pixels)
        tensors = dict(encoder) | {f"head.{k}": v for k, v in head.items()}
        _write_timm(target / "timm", shape, tensors, classes, pool, pixels, problem)
        if not (target / "config.json").exists():
            _wrap(target, shape, pixels)
            pooling = {k: v for k, v in encoder.items() if k.startswith("attn_pool.")}
            if pooling and pool == "mean":  # the wrapped model has none: it is for us alone
                _write_tensors(target / POOLING, pooling)

    _replace(Path(folder), write)


def _wrap(target: Path, shape: Shape, pixels: Pixels) -> None:
    """Makes the folder above a timm model's one that transformers' wrapper of such models loads."""
    config = json.loads((target / "timm" / "config.json").read_text(encoding="utf-8"))  # ours
    config |= {
        "architectures": ["TimmWrapperForImageClassification"],
        "model_type": "timm_wrapper",
        **processors.model(shape, pixels, wrapped=True),
    }
    config["model_args"].pop("num_classes")  # the wrapper gives it itself
    _write_json(target / "config.json", config)
    _write_json(target / "preprocessor_config.json", processors.hugging_face(shape, pixels))
    shutil.copyfile(target / "timm" / "model.safetensors", target / "model.safetensors")
    _sync(target / "model.safetensors")


def export_transformers(
    folder: str | Path,
    network: Any,
    tensors: Mapping[str, Tensor],
    tokenizer: Any,
    original: PreTrainedConfig,
    told: Sentences | None = None,
    own: Mapping[str, Any] | None = None,
) -> None:
    """Writes one of transformers' own models with its tokenizer.

    Args:
        folder: to be made; an export that stands there is replaced.
        network: the model; its class and configuration are written.
        tensors: its parameters, whole; of tied ones the first.
        tokenizer: transformers' tokenizer.
        original: the configuration whose dropout rates are written.
        told: of a folder for sentence-transformers; None: it is for transformers alone.
        own: what `TOLD` is to say of it.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    from selfdistill.engine.models.texts import sentences
    from selfdistill.engine.models.texts.classifier import MeanNetwork
    from selfdistill.engine.models.texts.language import restore_dropout

    def write(target: Path) -> None:
        _tell(target, own)
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
    pixels: Pixels,
    more: Mapping[str, Any] | None = None,
) -> None:
    """A folder for ``timm.create_model("local-dir:...")``; no classes: the features alone.

    ``more`` is what config.json says beside what timm reads.
    """
    target.mkdir()
    config = _timm_config(shape, classes, pool, pixels) | dict(more or {})
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


def _timm_config(shape: Shape, classes: Sequence[str], pool: str, pixels: Pixels) -> dict[str, Any]:
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
        # Arguments that JSON cannot tell, the gate and the norms' epsilon: the architecture has it.
        if shape.gated:
            architecture = "vit_giant_patch14_dinov2"
        elif shape.pre_norm:
            architecture = "vit_base_patch16_clip_224"
    return {
        "architecture": architecture,
        "num_classes": len(classes),
        "num_features": shape.width,
        "label_names": list(classes),
        "model_args": arguments,
        "pretrained_cfg": processors.timm(shape, pixels, len(classes)),
        "norm_eps": shape.norm_eps,
        "norm_eps_note": "timm's LayerNorm has its architecture's epsilon unless told: for the"
        " exact outputs give create_model"
        f" norm_layer=functools.partial(torch.nn.LayerNorm, eps={shape.norm_eps})",
    }


def _write_hugging_face(
    target: Path,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor],
    shape: Shape,
    pixels: Pixels,
) -> None:
    _write_json(target / "config.json", config | processors.model(shape, pixels))
    _write_json(target / "preprocessor_config.json", processors.hugging_face(shape, pixels))
    _write_tensors(target / "model.safetensors", tensors)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # Rows of a fused qkv share its memory, which safetensors refuses: each is made whole.
    whole = {k: v.detach().float().cpu().clone().contiguous() for k, v in tensors.items()}
    save_file(whole, path, metadata={"format": "pt"})
    _sync(path)


def _tell(target: Path, own: Mapping[str, Any] | None) -> None:
    if own is not None:
        _write_json(target / TOLD, dict(own))


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
