"""Image models at work: an encoder of any type known here, and the head of its classifier."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.data.formats import depth, fitting
from selfdistill.data.formats.channels import Channels
from selfdistill.data.formats.images import Size, sides, typed
from selfdistill.data.loading.codec import Images, Pictures
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.export import PROBLEM
from selfdistill.engine.inference.found import Told
from selfdistill.engine.inference.network import Network, Pool, check_classes
from selfdistill.engine.models.images.networks import ImageEncoder, Normalize
from selfdistill.engine.models.images.vit_mae import ViTEncoder
from selfdistill.engine.models.images.weights import fingerprint, load_pretrained
from selfdistill.engine.models.source import read_folder
from selfdistill.engine.training.objectives import Feature, pick

#: transformers' classifiers -> what their heads read, as far as it is one of our summaries.
_HEADS: dict[str, Pool] = {
    "ViTForImageClassification": "cls",
    "DeiTForImageClassification": "cls",
    "Dinov2ForImageClassification": "both",
    "Dinov2WithRegistersForImageClassification": "both",
    "SiglipForImageClassification": "mean",
}
#: timm's ways to pool -> ours.
_POOLS: dict[str, Pool] = {"token": "cls", "map": "cls", "avg": "mean"}


class _Head(NamedTuple):
    weight: Tensor
    bias: Tensor
    pool: Pool
    classes: list[str]
    several: bool


class ImageNetwork(Network):
    """See `Network`; entries of a batch are `images` uint8 [B, 3, H, W]."""

    kind = "image"

    def __init__(
        self,
        path: str,
        head: _Head | None,
        told: Told,
        span: depth.Range | None,
        channels: Channels | None,
        size: Size | None = None,
    ) -> None:
        super().__init__()
        loaded = load_pretrained(path, size)
        if loaded.shape.channels != 3:
            raise UserError(
                f"{path} takes images of {loaded.shape.channels} channel(s), and pictures are read"
                " as 3: give a model for 3"
            )
        encoder = ViTEncoder(loaded.shape)
        encoder.load_state_dict(loaded.encoder)
        self.encoder = ImageEncoder(encoder, Normalize(loaded.mean, loaded.std))
        self.origin, self.shape, self.width = path, loaded.shape, loaded.shape.width
        self.pool = "cls" if head is None else head.pool
        self.classes = [] if head is None else head.classes
        self.several = head is not None and head.several
        self.notes = tuple(
            f"{path}: {note}"
            for note in loaded.notes
            if head is None or not note.startswith("left out")
        )
        if not told.image:
            other = "--size takes another" if head is None else "its makers' may differ"
            self.notes += (
                f"{path}: pictures are scaled to cover {typed(loaded.shape.image_size)} pixels and"
                f" cut to the centre ({other})",
            )
        self.head: nn.Linear | None = None
        weights: dict[str, Tensor] = {}
        if head is not None:
            weights = {"weight": head.weight.float(), "bias": head.bias.float()}
            self.head = nn.Linear(head.weight.shape[1], head.weight.shape[0])
            self.head.load_state_dict(weights)
        span, drafts = span or _span(told, path), told.image.get("stored") == "original"
        how = fitting.of(told.image)
        self.codec = Pictures(loaded.shape.image_size, span, channels, whole=not drafts, how=how)
        self.sha256 = fingerprint(loaded.encoder, weights)
        self.settings = (
            f"{self.pool} {self.classes} {self.several} {typed(loaded.shape.image_size)}"
            f" {loaded.mean} {loaded.std} {span} {channels} {drafts} {how}"
        )

    def classified(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See `Network`."""
        assert self.head is not None
        tokens, _ = self.encoder.encode(images=batch["images"], cls_only=self.pool == "cls")
        if self.pool == "both":
            features = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
        else:
            features = pick(tokens, self.pool)
        return self.head(features), features

    def encoded(
        self, batch: Mapping[str, Tensor], feature: Feature
    ) -> tuple[Tensor, Tensor | None]:
        """See `Network`; every token counts."""
        tokens, _ = self.encoder.encode(images=batch["images"], cls_only=feature == "cls")
        return pick(tokens, feature), None

    def codec_of(self, manifest: Manifest) -> Images:
        """See `Network`."""
        packed, taken = manifest.size, self.shape.image_size
        if packed is not None and packed != taken:
            raise UserError(
                f"{manifest.root} holds {typed(sides(packed))} images, {self.origin} takes"
                f" {typed(taken)}: pack with --size {typed(taken)}, or give the pictures themselves"
            )
        return Images(taken, manifest.span, fitting.of(manifest.image))


def open_images(
    path: str,
    told: Told,
    span: depth.Range | None,
    channels: Channels | None,
    size: Size | None = None,
) -> ImageNetwork:
    """An image model.

    Args:
        path: an export, or what `load_pretrained` reads.
        told: what the export says of itself.
        span: range of pictures of more than 8 bits; None: as the export says.
        channels: of TIFFs that have several pages.
        size: of pictures in pixels; None: as the model takes them.

    Raises:
        UserError: it is broken, or of an unknown type.
    """
    folder = Path(path).expanduser()
    if (folder / "timm" / "config.json").is_file():
        # timm's copy of a classifier has the head of every way to pool; transformers' has not.
        inner = folder / "timm"
        config = records.read_object(inner / "config.json")
        head = None if _without_attention(config) else _timm_head(inner, config, path)
        if head is not None:
            _check_copies(folder, head)
            return ImageNetwork(str(inner), head, told, span, channels, size)
    head = None
    if (folder / "config.json").is_file():
        config = records.read_object(folder / "config.json")
        read = _timm_head if "architecture" in config else _head
        head = read(folder, config, path)
    return ImageNetwork(path, head, told, span, channels, size)


def _check_copies(folder: Path, head: _Head) -> None:
    """Refuses a folder whose two models, for transformers and for timm, have other heads.

    Raises:
        UserError: a program that knows nothing of timm/ saved the one above it anew.
    """
    with suppress(OSError, SafetensorError), safe_open(folder / "model.safetensors", "pt") as file:
        names, there = ("classifier.bias", "head.bias", "timm_model.head.bias"), set(file.keys())
        bias = next((file.get_tensor(n).float() for n in names if n in there), None)
        if bias is not None and not torch.equal(bias, head.bias.float()):
            raise UserError(
                f"{folder} was saved anew by another program, and {folder / 'timm'} is of before:"
                f" remove that folder, or give {folder / 'timm'} to take the model of before"
            )


def _without_attention(config: dict[str, Any]) -> bool:
    """Whether timm's copy of a SigLIP pools by the mean: it lacks what the folder above has."""
    arguments = config.get("model_args") or {}
    return arguments.get("global_pool") == "avg" and arguments.get("class_token") is False


def _span(told: Told, path: str) -> depth.Range | None:
    """The range of the set that it was trained on."""
    given = told.image.get("range")
    if given is None:
        return None
    cure = "fetch it again"
    low, high = records.checked(tuple[records.Finite, records.Finite], tuple(given), path, cure)
    return depth.check((low, high), f"{path}: {cure}")


def _names(given: Any, number: int) -> list[str]:
    """The classes' names, or their numbers where they have none."""
    if isinstance(given, dict):  # by number, as text
        given = [given.get(str(i), i) for i in range(number)]
    names = [str(name) for name in given] if isinstance(given, list) else []
    return names if len(names) == number else [str(i) for i in range(number)]


def _checked(folder: Path, tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight [C, D] and bias [C] of a head.

    Raises:
        UserError: one is missing or has another shape.
    """
    weight, bias = (tensors.get(f"{name}.{leaf}") for leaf in ("weight", "bias"))
    if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise UserError(f"{folder} has no whole head ({name}.weight, {name}.bias): fetch it again")
    return weight, bias


def _timm_head(folder: Path, config: dict[str, Any], origin: str) -> _Head | None:
    """The head of timm's folder; None of an encoder."""
    inner = config.get("pretrained_cfg") or {}
    number = config.get("num_classes", inner.get("num_classes", 0))
    if type(number) is not int or number < 1:
        return None
    names = config.get("label_names") or inner.get("label_names")
    tuned = names or "_ft_" in str(inner.get("tag") or config.get("architecture"))
    if "_clip_" in str(config.get("architecture")) and not tuned:
        return None  # CLIP's projection, which timm calls a head
    tensors = read_folder(folder)
    if "head.weight" not in tensors or "head_dist.weight" in tensors:
        return None
    weight, bias = _checked(folder, tensors, "head")
    check_classes(len(bias), config.get("problem_type"), origin)
    pool = (config.get("model_args") or {}).get("global_pool") or config.get("global_pool")
    if pool is None:
        pool = "map" if any(name.startswith("attn_pool.") for name in tensors) else "token"
    if pool not in _POOLS:
        raise UserError(
            f"{origin}: its head pools by {str(pool)[:40]!r}, which is not known here: take a model"
            f" that pools by one of {', '.join(_POOLS)}"
        )
    several = config.get("problem_type") == PROBLEM
    return _Head(weight, bias, _POOLS[pool], _names(names, len(bias)), several)


def _head(folder: Path, config: dict[str, Any], origin: str) -> _Head | None:
    """The head of transformers' folder; None of an encoder, or of a head not known here."""
    kinds = [str(one) for one in config.get("architectures") or ()]
    pool = next((_HEADS[kind] for kind in kinds if kind in _HEADS), None)
    if pool is None:
        return None
    weight, bias = _checked(folder, read_folder(folder), "classifier")
    check_classes(len(bias), config.get("problem_type"), origin)
    if pool == "both":
        halves = weight.chunk(2, dim=1)
        if not halves[1].any():
            weight, pool = halves[0].contiguous(), "cls"
        elif not halves[0].any():
            weight, pool = halves[1].contiguous(), "mean"
    several = config.get("problem_type") == PROBLEM
    return _Head(weight, bias, pool, _names(config.get("id2label"), len(bias)), several)
