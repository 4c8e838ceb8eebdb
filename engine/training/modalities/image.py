"""Images: a ViT-MAE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfdistill.data.errors import UserError
from selfdistill.data.formats import fitting
from selfdistill.data.formats.images import sides, typed
from selfdistill.data.loading.codec import Images
from selfdistill.data.loading.datasets import Keyed
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.export import export_classifier, export_mae
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.models.adapters import merged
from selfdistill.engine.models.images.networks import (
    ImageAutoencoder,
    ImageClassifier,
    ImageEncoder,
    Normalize,
)
from selfdistill.engine.models.images.rows_block import RowsBlock
from selfdistill.engine.models.images.shape import ENCODER, Shape
from selfdistill.engine.models.images.vit_mae import ViTClassifier, ViTEncoder, ViTMAE
from selfdistill.engine.models.images.weights import Pretrained, load_pretrained
from selfdistill.engine.monitoring import flops, pictures
from selfdistill.engine.monitoring.monitor import Monitor
from selfdistill.engine.runtime.zero import full_state
from selfdistill.engine.training.modalities.base import (
    Batch,
    Modality,
    Pooled,
    Section,
    TeacherMode,
    settle_pooling,
)
from selfdistill.engine.training.objectives import Feature
from selfdistill.engine.training.views import (
    Augment,
    Crops,
    Flips,
    MaskNoise,
    Mixes,
    Together,
    TwoFlips,
)

#: Images in a picture of reconstructions.
PICTURES = 8


class ImageModality(Modality):
    """See `engine.training.modalities.base.Modality`."""

    samples = units = "images"
    full: tuple[str, ...] = ("images",)
    masked: tuple[str, ...] = ("images", "noise")
    labelled: tuple[str, ...] = ("images", "flip", "share", "blend", "box")

    def __init__(self, run: Run, manifest: Manifest | None = None) -> None:
        self.run, self.config, self.manifest = run, run.config, manifest

    def load(self, source: str | None = None) -> Pretrained:
        """See `Modality`."""
        config = self.config
        path = source or config.model.path
        if path is None:
            raise UserError(
                "--model is missing: a hub name (facebook/vit-mae-base), a folder, a .pth, or"
                " scratch"
            )
        if path != "scratch":
            loaded = load_pretrained(path, config.model.image_size)
            if loaded.shape.channels != 3:
                raise UserError(
                    f"{path} takes images of {loaded.shape.channels} channel(s), and packed ones"
                    " have 3: give weights for 3"
                )
            for note in loaded.notes:
                self.run.info_once(f"{path}: {note}")
            own, told = loaded.shape.normalize_pixels, loaded.decoder is not None and loaded.target
            if told and own != config.mae.normalize_pixels:
                was, now = ("normalised", "plain") if own else ("plain", "normalised")
                self.run.info_once(
                    f"{path}: its decoder was trained to give {was} pixels, and {now} ones are"
                    f" asked for: --mae.normalize_pixels {str(own).lower()} stays with the former"
                )
            whole = loaded.decoder is not None
            if whole:
                self._refit(path, loaded.shape)
            return replace(loaded, shape=self.asked(loaded.shape, whole=whole))
        sizes = config.model.shape
        shape = Shape(
            image_size=config.model.image_size or sizes.image_size,
            patch_size=sizes.patch_size,
            width=sizes.width,
            depth=sizes.depth,
            heads=sizes.heads,
            mlp_width=4 * sizes.width,
            decoder_width=sizes.decoder_width,
            decoder_depth=sizes.decoder_depth,
            decoder_heads=sizes.decoder_heads,
            decoder_mlp_width=4 * sizes.decoder_width,
        )
        self._refit(path, shape)
        torch.manual_seed(config.seed)
        return Pretrained.fresh(ViTMAE(self.asked(shape, whole=True)))

    def asked(self, shape: Shape, *, whole: bool) -> Shape:
        """A model's shape with the task that is asked for, and with the decoder that it will get.

        Args:
            shape: as its file has it.
            whole: whether it has a decoder already, which keeps its shape.
        """
        mae, new = self.config.mae, self.config.decoder
        task = replace(shape, mask_ratio=mae.ratio, normalize_pixels=mae.normalize_pixels)
        if not whole and new.depth is not None:
            task = replace(task, decoder_depth=new.depth)
        if not whole and (width := new.width) is not None:
            # Heads of 32 values and an MLP of 4 times the width, as MAE's makers have it.
            heads, mlp = width // 32, 4 * width
            task = replace(task, decoder_width=width, decoder_heads=heads, decoder_mlp_width=mlp)
        return task

    def _refit(self, path: str, shape: Shape) -> None:
        """Says so where another shape is asked of a decoder that is there."""
        sized = self._sized()
        if self.asked(shape, whole=True) != self.asked(shape, whole=False):
            self.run.info_once(
                f"note: of no use: {', '.join(f'--{name}' for name in sized)}: {path} has a decoder"
                f" already, {shape.decoder_width} x {shape.decoder_depth}"
            )

    def _sized(self) -> dict[str, int]:
        """What is asked of a new decoder's shape, by option."""
        new = self.config.decoder
        given = {"decoder.width": new.width, "decoder.depth": new.depth}
        return {name: value for name, value in given.items() if value is not None}

    def check(self, manifest: Manifest, base: Pretrained) -> None:
        """See `Modality`."""
        packed, taken = manifest.size, base.shape.image_size
        if packed is not None and packed != taken:
            raise UserError(
                f"{manifest.root} holds {typed(sides(packed))} images, the model takes"
                f" {typed(taken)}: pack with --size {typed(taken)}, or give --model.image_size"
                f" {typed(packed)}"
            )

    def windows(self, manifest: Manifest, base: Pretrained) -> None:
        """See `Modality`: images are not cut."""
        return

    def same_architecture(self, taught: Pretrained, base: Pretrained) -> None:
        """See `Modality`."""
        for field in ENCODER:
            theirs, ours = getattr(taught.shape, field), getattr(base.shape, field)
            if theirs != ours:
                raise UserError(
                    f"teacher {taught.origin} has another architecture ({field} {theirs}) than"
                    f" model {base.origin} ({ours}): give the --model that the teacher was trained"
                    " from"
                )

    def codec(self, base: Pretrained, manifest: Manifest) -> Images:
        """See `Modality`."""
        return Images(base.shape.image_size, manifest.span, fitting.of(manifest.image))

    def mask(self, base: Pretrained) -> MaskNoise:
        """See `Modality`."""
        return MaskNoise(self.config.seed, base.shape.patches)

    def augment(self, seed: int) -> Together | None:
        """See `Modality`."""
        plan = self.config.finetune
        parts: list[Keyed] = []
        if plan.augment != "none":
            parts.append(Augment(seed, plan.augment, plan.crop))
        elif plan.crop:
            parts.append(Crops(seed, *plan.crop))
        if plan.flip:
            parts.append(Flips(seed))
        if plan.mixup or plan.cutmix:
            parts.append(Mixes(seed, plan.mixup, plan.cutmix))
        return Together(tuple(parts)) if parts else None

    def varied(self, seed: int) -> Together:
        """See `Modality`."""
        kind = self.config.diet.augment
        return Together((*([] if kind == "none" else [Augment(seed, kind)]), Flips(seed)))

    def pairs(self, seed: int) -> TwoFlips:
        """See `Modality`: each view is mirrored or not."""
        return TwoFlips(seed)

    def paired(self, batch: Batch) -> Batch:
        """See `Modality`."""
        return {
            "images": torch.cat([batch["images"]] * 2),
            "flip": torch.cat([batch["flip"], batch["other_flip"]]),
        }

    def some(self, batch: Batch, rows: Tensor) -> Batch:
        """See `Modality`."""
        return {name: batch[name][rows] for name in self.full}

    def autoencoder(self, base: Pretrained, dropout: float | None = None) -> ImageAutoencoder:
        """See `Modality`; a missing decoder is new."""
        torch.manual_seed(self.config.seed)
        model = ViTMAE(base.shape)
        if dropout:
            model.encoder = ViTEncoder(base.shape, dropout)
        model.encoder.load_state_dict(base.encoder)
        if base.decoder is not None:
            model.decoder.load_state_dict(base.decoder)
        return ImageAutoencoder(model, Normalize(base.mean, base.std))

    def encoder(self, base: Pretrained) -> ImageEncoder:
        """See `Modality`."""
        encoder = ViTEncoder(base.shape)
        encoder.load_state_dict(base.encoder)
        return ImageEncoder(encoder, Normalize(base.mean, base.std))

    def classifier(self, base: Pretrained, classes: list[str], seed: int) -> ImageClassifier:
        """See `Modality`; the position embedding is trained from here on."""
        settle_pooling(self.config, self, base)
        torch.manual_seed(seed)
        plan = self.config.finetune
        encoder = ViTEncoder(base.shape, plan.dropout, plan.drop_path)
        encoder.load_state_dict(base.encoder)
        network = ViTClassifier(encoder, len(classes), pool=plan.settled)
        return ImageClassifier(network, Normalize(base.mean, base.std))

    def recompute(self, model: torch.nn.Module) -> None:
        """See `Modality`."""
        for part in model.modules():
            if isinstance(part, RowsBlock):
                part.recomputes = True

    def pooling(self, base: Pretrained) -> Pooled:
        """See `Modality`: the CLS token, or what attention pools in its place."""
        return "cls"

    def feature_shape(self, base: Pretrained, feature: Feature) -> tuple[int, ...]:
        """See `Modality`."""
        width = base.shape.width
        return (base.shape.patches + 1, width) if feature == "tokens" else (width,)

    def view(self, base: Pretrained) -> str:
        """See `Modality`."""
        return f"full {typed(base.shape.image_size)}, mean {base.mean}, std {base.std}"

    def record(self, base: Pretrained) -> dict[str, Any]:
        """See `Modality`."""
        new = self._sized() if base.decoder is None else {}
        return {"mae": self.config.mae.model_dump()} | new

    def count(self, batch: Batch) -> None:
        """See `Modality`: every image has as many masked patches."""
        return

    def size(self, batch: Batch) -> int:
        """See `Modality`."""
        return len(batch["images"])

    def flops(
        self, base: Pretrained, section: Section, mode: TeacherMode, classes: int, batch: Batch
    ) -> float:
        """See `Modality`."""
        config = self.config
        pool = ""  # of the other stages no summary is read
        if section in ("distill", "finetune"):
            pool = config.distill.settled if section == "distill" else config.finetune.settled
        one = flops.step_flops(
            base.shape,
            section,
            teacher=mode,
            classes=classes,
            cls_only=pool == "cls",
            part=flops.Part(config.adapt, config.lora.rank),
        )
        return one * len(batch["images"])

    def draw(self, monitor: Monitor, step: int, batch: Batch, out: Batch, base: Pretrained) -> None:
        """See `Modality`: original, masked input and reconstruction."""
        picture = pictures.reconstruction(
            batch["images"][:PICTURES].cpu(),
            out["prediction"][:PICTURES].float().cpu(),
            out["mask"][:PICTURES].cpu(),
            base.shape,
            base.mean,
            base.std,
        )
        monitor.image(step, "reconstruction", picture)

    def export_autoencoder(self, folder: Path, model: ImageAutoencoder, base: Pretrained) -> None:
        """See `Modality`: a folder for transformers' ViTMAE."""
        encoder = self._whole(model.mae.encoder, base.encoder)
        decoder = self._whole(model.mae.decoder, base.decoder)
        if self.run.ranks.main:
            export_mae(folder, base.shape, encoder, decoder, base.mean, base.std, self._own())

    def export_classifier(
        self, folder: Path, model: ImageClassifier, base: Pretrained, classes: list[str]
    ) -> None:
        """See `Modality`: a folder for transformers' and timm's ViT."""
        encoder, head = (self._whole(m) for m in (model.network.encoder, model.network.head))
        if self.run.ranks.main:
            pool = self.config.finetune.settled
            scales = base.mean, base.std
            export_classifier(
                *(folder, base.shape, encoder, head, classes, pool, *scales, self._own()),
                several=self.manifest is not None and self.manifest.several,
            )

    def _own(self) -> dict[str, Any]:
        """What an export says for `engine.inference`: how its images were packed, and scored."""
        packed = {} if self.manifest is None else self.manifest.image
        return {"image": packed, "precision": self.config.precision}

    def _whole(
        self, module: torch.nn.Module, frozen: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        state = full_state(module, keep=self.run.ranks.main, frozen=frozen)
        return merged(state, self.config.lora)
