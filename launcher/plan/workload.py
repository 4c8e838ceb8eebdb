"""What a plan must know of a model: parameters, FLOPs and activations. No weights are read."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfdistill.data.errors import UserError
from selfdistill.data.formats.images import typed
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.models import adapters
from selfdistill.engine.models.images import formats
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types.base import IMAGENET_MEAN, IMAGENET_STD
from selfdistill.engine.models.images.vit_mae import ViTClassifier, ViTEncoder, ViTMAE
from selfdistill.engine.models.images.weights import Pretrained
from selfdistill.engine.monitoring.flops import Part, Stage, TeacherMode
from selfdistill.engine.training.modalities.base import Modality
from selfdistill.engine.training.modalities.image import ImageModality
from selfdistill.engine.training.objectives import Feature
from selfdistill.launcher.plan.activations import (
    decoder_blocks,
    encoder_blocks,
    masked_images,
    peak,
    whole_images,
)
from selfdistill.launcher.plan.known import BARE, IMAGES, TEXTS


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters.

    Attributes:
        trained: those with a gradient.
        frozen: the others (a ViT-MAE's fixed position embeddings).
        largest: of the module with most of its own, which ZeRO-3 gathers at once.
        sizes: values of each parameter; empty where they are not known.
    """

    trained: int
    frozen: int
    largest: int
    sizes: tuple[int, ...] = ()

    @property
    def all(self) -> int:
        """Trained and frozen ones."""
        return self.trained + self.frozen

    def persistent(self, threshold: int) -> list[int]:
        """Sizes of those that ZeRO-3 keeps whole, of at most so many values each."""
        return [values for values in self.sizes if values <= threshold]


class Workload(ABC):
    """A model at work on samples of one modality.

    Attributes:
        samples: what a sample is called, in the plural.
        origin: the model's name or folder, and its shape in words.
        modality: the engine's own, which counts FLOPs.
        base: weights of which only the shape is known.
        whole: whether the model has a decoder; else stage 0 trains one.
    """

    samples: str
    origin: str
    modality: Modality
    base: Any
    whole: bool

    @abstractmethod
    def network(self, stage: Stage, classes: int) -> nn.Module:
        """The network that a stage trains."""

    @abstractmethod
    def encoder(self) -> nn.Module:
        """The frozen encoder of a teacher."""

    @abstractmethod
    def flops(self, stage: Stage, mode: TeacherMode, classes: int) -> float:
        """FLOPs of a sample in one step: the engine's own count."""

    @abstractmethod
    def activations(self, stage: Stage, size: int) -> float:
        """Bytes that a sample's forward leaves for its backward; size: bytes of a value, 4 or 2."""

    @abstractmethod
    def input_bytes(self) -> int:
        """Bytes of a sample as it goes to the device."""

    def parameters(self, stage: Stage, classes: int) -> Parameters:
        """Of the network that a stage trains."""
        return count(lambda: self.network(stage, classes))

    def teacher(self) -> int:
        """Parameters of the frozen encoder."""
        return count(self.encoder).all

    def updates(self) -> int:
        """Values of the encoder's low-rank updates; 0 without."""
        with torch.device("meta"):
            network: Any = self.network("distill", 0)
        return sum(a.numel() + b.numel() for a, b, _ in adapters.updates(network.encoder))

    def encode_flops(self) -> float:
        """FLOPs of one forward of the encoder on an unmasked sample."""
        return self.flops("distill", "replicated", 0) - self.flops("distill", "cached", 0)

    def feature(self, feature: Feature) -> tuple[int, ...] | None:
        """Shape of a sample's distilled feature; None where it differs between samples."""
        return self.modality.feature_shape(self.base, feature)


def count(build: Callable[[], nn.Module]) -> Parameters:
    """Counts a network's parameters on the meta device: no memory, tied ones once."""
    with torch.device("meta"):
        network = build()
    own = [sum(p.numel() for p in m.parameters(recurse=False)) for m in network.modules()]
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    sizes = tuple(p.numel() for p in network.parameters())
    return Parameters(trained, sum(sizes) - trained, max(own), sizes)


def unknown(path: str) -> UserError:
    """What to say of a model that is neither a folder nor a known name."""
    known = [*IMAGES, *TEXTS]
    close = difflib.get_close_matches(path, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return UserError(
        f"--model {path}: no such folder or file, and plan downloads nothing: fetch the model and"
        f" give its folder, or one of {', '.join(known)}{hint}"
    )


class ImageWork(Workload):
    """A ViT-MAE on images."""

    samples = "images"

    def __init__(self, run: Run) -> None:
        self.config, self.modality = run.config, ImageModality(run)
        self.part = Part(run.config.adapt, run.config.lora.rank)
        path = run.config.model.path
        if path is None or path == "scratch":
            base, self.whole = self.modality.load(), True
        else:
            shape, self.whole = self._found(path)
            base = _weightless(shape, path)
        settings = run.config.mae
        shape = replace(
            base.shape, mask_ratio=settings.ratio, normalize_pixels=settings.normalize_pixels
        )
        self.base, self.shape = replace(base, shape=shape), shape
        self.origin = (
            f"{path}: ViT, {typed(shape.image_size)} pixels, patches of {shape.patch_size}, encoder"
            f" {shape.width} x {shape.depth}, decoder {shape.decoder_width} x"
            f" {shape.decoder_depth}"
        )

    def _found(self, path: str) -> tuple[Shape, bool]:
        """The shape, and whether there is a decoder."""
        if path in IMAGES and not Path(path).exists():
            shape, whole = IMAGES[path], path not in BARE
        elif Path(path).exists():
            found = formats.read(Path(path), path)
            shape, whole = found.shape, bool(found.decoder)
        else:
            raise unknown(path)
        return replace(shape, image_size=self.config.model.image_size or shape.image_size), whole

    def network(self, stage: Stage, classes: int) -> nn.Module:
        """See `Workload`."""
        if stage == "finetune":
            return ViTClassifier(ViTEncoder(self.shape), classes)
        network = ViTMAE(self.shape)
        if stage == "decoder":
            network.encoder.requires_grad_(False)
            return network
        adapters.adapt(network.encoder, self.config)
        return network

    def encoder(self) -> nn.Module:
        """See `Workload`."""
        return ViTEncoder(self.shape)

    def flops(self, stage: Stage, mode: TeacherMode, classes: int) -> float:
        """See `Workload`."""
        one = {"images": torch.empty(1, device="meta")}
        return self.modality.flops(self.base, stage, mode, classes, one)

    def activations(self, stage: Stage, size: int) -> float:
        """See `Workload`."""
        shape, config, again = self.shape, self.config, self.config.checkpoint_activations
        whole = [(encoder_blocks(shape, recompute=again), shape.prefix + shape.patches)]
        if stage == "finetune":
            mask, cls_only = int(config.finetune.dropout > 0), config.finetune.settled == "cls"
            saved = whole_images(shape, size, mask=mask, cls_only=cls_only, recompute=again)
            return peak(saved, whole, size, mask=mask)
        if stage == "decoder":
            parts = [(decoder_blocks(shape, again), 1 + shape.patches)]
            return peak(masked_images(shape, size, recompute=again, frozen=True), parts, size)
        part = self.part
        whole = [(encoder_blocks(shape, part, again), shape.prefix + shape.patches)]
        masked = masked_images(shape, size, part, again)
        if stage == "pretrain":
            parts = [(encoder_blocks(shape, part, again), shape.prefix + shape.kept)]
            parts.append((decoder_blocks(shape, again), 1 + shape.patches))
            return peak(masked, parts, size)
        cls_only = config.distill.settled == "cls"
        saved = whole_images(shape, size, cls_only=cls_only, part=part, recompute=again)
        return masked + peak(saved, whole, size)  # whose backward comes first

    def input_bytes(self) -> int:
        """See `Workload`: uint8 pixels."""
        return self.shape.channels * math.prod(self.shape.sides)


def _weightless(shape: Shape, origin: str) -> Pretrained:
    """A record of a model of which only the shape is known."""
    return Pretrained(shape, {}, None, IMAGENET_MEAN, IMAGENET_STD, origin, sha256="")
