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
from selfdistill.engine.config.schema import Config
from selfdistill.engine.models import adapters
from selfdistill.engine.models.images import formats
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types.base import IMAGENET_MEAN, IMAGENET_STD
from selfdistill.engine.models.images.vit_mae import ViTClassifier, ViTEncoder, ViTMAE
from selfdistill.engine.models.images.weights import Pretrained
from selfdistill.engine.monitoring.flops import WHOLE, Part, Stage, TeacherMode
from selfdistill.engine.regularizers.diet import DietObjective
from selfdistill.engine.regularizers.mars import matrices
from selfdistill.engine.regularizers.supcon import SupConObjective
from selfdistill.engine.training.modalities.base import Modality, Pooled
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
        config: of the run.
        rows: samples that stage 1 learns from, each of which DIET's head has a row for.
    """

    rows = 0
    samples: str
    config: Config
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
    def plain_flops(self, stage: Stage, mode: TeacherMode, classes: int) -> float:
        """FLOPs of a sample in one step without baselines: the engine's own count."""

    @abstractmethod
    def plain_activations(self, stage: Stage, size: int) -> float:
        """See `activations`: without baselines."""

    @abstractmethod
    def classified(self, size: int) -> tuple[float, float]:
        """Bytes that a sample of fine-tuning leaves for its backward: by its end, at the peak."""

    @abstractmethod
    def viewed(self, size: int, dropout: float | None, cls_only: bool) -> tuple[float, float]:
        """The same of a whole view in stage 1.

        Args:
            size: bytes of a value.
            dropout: of the encoder; None: what it has in stage 1.
            cls_only: whether the CLS vector alone is read.
        """

    @abstractmethod
    def input_bytes(self) -> int:
        """Bytes of a sample as it goes to the device."""

    @property
    def told(self) -> Pooled:
        """What DIET tells samples from: see `engine.stages.probed.probed_feature`."""
        feature = self.config.distill.feature
        return feature if feature in ("cls", "mean") else self.modality.pooling(self.base)

    def objective(self, stage: Stage) -> str:
        """`--pretrain.objective` or `--finetune.regularizer`, where it is of the stage."""
        if stage == "pretrain":
            return self.config.pretrain.objective
        return self.config.finetune.regularizer if stage == "finetune" else ""

    def reconstructs(self, stage: Stage) -> bool:
        """Whether the decoder of a stage takes part in it."""
        return self.objective(stage) not in ("supcon", "diet")

    def parameters(self, stage: Stage, classes: int) -> Parameters:
        """Of all that a stage trains: its network, and the head of a baseline."""
        return count(lambda: self._trained(stage, classes))

    def exported(self, stage: Stage, classes: int) -> int:
        """Parameters that a stage leaves: a baseline's head is thrown away."""
        return count(lambda: self.network(stage, classes)).all

    def _trained(self, stage: Stage, classes: int) -> nn.Module:
        network = self.network(stage, classes)
        model: Any = network  # which has an encoder
        if self.objective(stage) == "supcon":
            (width,) = self.feature("cls") or (0,)
            return SupConObjective(model, width, self.config.supcon)
        if self.objective(stage) == "diet":
            (width,) = self.feature(self.told) or (0,)
            smoothing = self.config.diet.smoothing
            return DietObjective(model, self.told, width, self.rows, smoothing)
        return network

    def start(self, stage: Stage, classes: int) -> float:
        """Bytes of the encoder's weights as it began, which each rank of MARS keeps whole."""
        if self.objective(stage) != "mars" or math.isinf(self.config.mars.radius):
            return 0.0
        with torch.device("meta"):
            network: Any = self.network(stage, classes)
        return 4.0 * sum(w.numel() for _, w in matrices(network.encoder) if w.requires_grad)

    def flops(self, stage: Stage, mode: TeacherMode, classes: int) -> float:
        """FLOPs of a sample in one step; a backward counts twice its forward."""
        asked = self.objective(stage)
        if asked == "supcon":
            return 2 * 3 * self.encode_flops()
        if asked == "diet":
            (width,) = self.feature(self.told) or (0,)
            return 3 * (self.encode_flops() + 2.0 * width * self.rows)
        passes = 2 if asked == "r3f" and self.config.r3f.weight else 1
        return passes * self.plain_flops(stage, mode, classes)

    def activations(self, stage: Stage, size: int) -> float:
        """Bytes that a sample's forward leaves for its backward; size: bytes of a value, 4 or 2."""
        asked = self.objective(stage)
        if asked == "supcon":  # two views in one pass
            return 2 * self.viewed(size, self.config.supcon.dropout, True)[1]
        if asked == "diet":
            # As of a language model's head: logits, and their logarithms or their gradient.
            logits = self.rows * (8 + (size if size < 4 else 0))
            saved, most = self.viewed(size, None, self.told == "cls")
            return max(saved + logits, most)
        if asked == "r3f" and self.config.r3f.weight:
            return sum(self.classified(size))  # the second pass's backward comes first
        return self.plain_activations(stage, size)

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
        teacher = self.plain_flops("distill", "replicated", 0)
        return teacher - self.plain_flops("distill", "cached", 0)

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
        shape = self.modality.asked(base.shape, whole=self.whole)
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

    def plain_flops(self, stage: Stage, mode: TeacherMode, classes: int) -> float:
        """See `Workload`."""
        one = {"images": torch.empty(1, device="meta")}
        return self.modality.flops(self.base, stage, mode, classes, one)

    def classified(self, size: int) -> tuple[float, float]:
        """See `Workload`."""
        plan = self.config.finetune
        return self._whole(size, WHOLE, int(plan.dropout > 0), plan.settled == "cls")

    def viewed(self, size: int, dropout: float | None, cls_only: bool) -> tuple[float, float]:
        """See `Workload`; without `dropout` there is none."""
        return self._whole(size, self.part, int(bool(dropout)), cls_only)

    def _whole(self, size: int, part: Part, mask: int, cls_only: bool) -> tuple[float, float]:
        shape, again = self.shape, self.config.checkpoint_activations
        settings: Any = {"mask": mask, "cls_only": cls_only, "part": part, "recompute": again}
        saved = whole_images(shape, size, **settings)
        stacks = [(encoder_blocks(shape, part, again), shape.prefix + shape.patches)]
        return saved, peak(saved, stacks, size, mask=mask)

    def plain_activations(self, stage: Stage, size: int) -> float:
        """See `Workload`."""
        shape, config, again = self.shape, self.config, self.config.checkpoint_activations
        if stage == "finetune":
            return self.classified(size)[1]
        if stage == "decoder":
            parts = [(decoder_blocks(shape, again), 1 + shape.patches)]
            return peak(masked_images(shape, size, recompute=again, frozen=True), parts, size)
        part = self.part
        masked = masked_images(shape, size, part, again)
        if stage == "pretrain":
            parts = [(encoder_blocks(shape, part, again), shape.prefix + shape.kept)]
            parts.append((decoder_blocks(shape, again), 1 + shape.patches))
            return peak(masked, parts, size)
        # Whose backward comes first.
        return masked + self._whole(size, part, 0, config.distill.settled == "cls")[1]

    def input_bytes(self) -> int:
        """See `Workload`: uint8 pixels."""
        return self.shape.channels * math.prod(self.shape.sides)


def _weightless(shape: Shape, origin: str) -> Pretrained:
    """A record of a model of which only the shape is known."""
    return Pretrained(shape, {}, None, IMAGENET_MEAN, IMAGENET_STD, origin, sha256="")
