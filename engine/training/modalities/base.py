"""What a modality (images, texts) brings to the stages: models, views, codec, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor

from selfdistill.data.loading.codec import Codec
from selfdistill.data.loading.datasets import Keyed
from selfdistill.data.loading.windows import Windows
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.config.schema import Config
from selfdistill.engine.monitoring.monitor import Monitor
from selfdistill.engine.training.objectives import Feature

Batch = dict[str, Tensor]
#: A stage's section of the configuration.
Section = Literal["decoder", "pretrain", "distill", "finetune"]
#: What a vector of a sample is read from: its first token, or the mean of them.
Pooled = Literal["cls", "mean"]
#: Options of fine-tuning that change pictures, and no texts.
PICTURED = ("drop_path", "crop", "augment", "mixup", "cutmix")
TeacherMode = Literal["replicated", "sharded", "cached"]


class Modality(Protocol):
    """What differs between images and text; `Any` stands for its own weights and modules.

    Weights have `encoder` and `decoder` (name -> fp32 tensor of f_theta and g_phi; the
    decoder None where the source has none), `origin` (what the user named), `sha256` (of all
    tensors' names, shapes and values), `settings` (the hash of what the encoder computes with
    beside them) and `told` (what of them must be equal at resume).

    Attributes:
        samples: what a sample is called, in the plural.
        units: what the rate counts: images, tokens.
        full: entries of a batch that make the unmasked view.
        masked: entries that make the masked view.
        labelled: entries that fine-tuning takes beside the labels, where the batch has them.
    """

    samples: str
    units: str
    full: tuple[str, ...]
    masked: tuple[str, ...]
    labelled: tuple[str, ...]

    def load(self, source: str | None = None) -> Any:
        """The weights of `source`, or of --model; "scratch" makes fresh ones.

        Raises:
            UserError: no model is named, or it cannot be loaded.
        """
        ...

    def check(self, manifest: Manifest, base: Any) -> None:
        """Refuses data that the model cannot read, with a UserError."""
        ...

    def windows(self, manifest: Manifest, base: Any) -> Windows | None:
        """The samples of a split without labels; None where each text or image is one.

        Every rank calls it.
        """
        ...

    def same_architecture(self, taught: Any, base: Any) -> None:
        """Refuses a teacher whose features are not the student's, with a UserError."""
        ...

    def codec(self, base: Any, manifest: Manifest) -> Codec:
        """Decodes the samples for this model."""
        ...

    def mask(self, base: Any) -> Keyed:
        """The random numbers, keyed by position, of the masked view."""
        ...

    def augment(self, seed: int) -> Keyed | None:
        """The random numbers of fine-tuning's view."""
        ...

    def varied(self, seed: int) -> Keyed | None:
        """The random numbers of the view by which samples are told apart (`--diet.augment`)."""
        ...

    def pairs(self, seed: int) -> Keyed | None:
        """The random numbers of two views of each sample."""
        ...

    def paired(self, batch: Batch) -> Batch:
        """Entries of two views of each sample: all first ones, then all second ones."""
        ...

    def some(self, batch: Batch, rows: Tensor) -> Batch:
        """Entries of the unmasked view of some samples, those in the rows int64 [r]."""
        ...

    def autoencoder(self, base: Any, dropout: float | None = None) -> Any:
        """Encoder and decoder with the base's weights (`objectives.Reconstructs`, `.encoder`).

        Args:
            base: The weights.
            dropout: Rate in the encoder; None as the configuration says.
        """
        ...

    def encoder(self, base: Any) -> Any:
        """The encoder alone, as a teacher (`objectives.Encodes`)."""
        ...

    def classifier(self, base: Any, classes: list[str], seed: int) -> Any:
        """A fresh head on the base's encoder (`objectives.Classifies`, `.encoder`)."""
        ...

    def recompute(self, model: Any) -> None:
        """Has a network of this modality keep its layers' inputs alone for the backward.

        Raises:
            UserError: its class cannot.
        """
        ...

    def pooling(self, base: Any) -> Pooled:
        """What the base's makers read of its tokens: the first, or the mean of the others."""
        ...

    def feature_shape(self, base: Any, feature: Feature) -> tuple[int, ...] | None:
        """Shape of one sample's feature; None where it differs between samples."""
        ...

    def view(self, base: Any) -> str:
        """All that the unmasked view depends on beside the data, as text."""
        ...

    def record(self, base: Any) -> dict[str, Any]:
        """Settings of the masked view and of a new decoder, which must be equal at resume."""
        ...

    def count(self, batch: Batch) -> int | None:
        """Masked units by whose number in the global batch the loss is divided; None: its own."""
        ...

    def size(self, batch: Batch) -> int:
        """Units in a batch, for the rate."""
        ...

    def flops(
        self, base: Any, section: Section, mode: TeacherMode, classes: int, batch: Batch
    ) -> float:
        """FLOPs of a batch in one step, forward and backward."""
        ...

    def draw(self, monitor: Monitor, step: int, batch: Batch, out: Batch, base: Any) -> None:
        """Shows what the masked auto-encoder makes of a batch."""
        ...

    def export_autoencoder(self, folder: Path, model: Any, base: Any) -> None:
        """Writes encoder and decoder for other libraries. Every rank calls it."""
        ...

    def export_classifier(self, folder: Path, model: Any, base: Any, classes: list[str]) -> None:
        """Writes the classifier for other libraries. Every rank calls it."""
        ...


def settle_pooling(config: Config, modality: Modality, base: Any) -> str:
    """Puts the model's own way of pooling where the configuration says auto; says which, a line."""
    own = modality.pooling(base)
    if config.distill.feature == "auto":
        config.distill.feature = own
    if config.finetune.pool == "auto":
        config.finetune.pool = own
    return (
        f"feature: --distill.feature {config.distill.feature}, --finetune.pool"
        f" {config.finetune.pool} (the model's own is {own})"
    )
