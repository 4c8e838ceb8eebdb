"""A trained model at work: `load("runs/mine")` gives logits and features of pictures or texts."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from selfdistill.data.errors import BrokenData, UserError
from selfdistill.data.formats.channels import Channels
from selfdistill.data.formats.depth import Range
from selfdistill.data.formats.images import Size, typed
from selfdistill.data.formats.texts import Text, store
from selfdistill.data.loading.codec import Codec
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.export import TOLD
from selfdistill.engine.inference import Asked, Precision, found
from selfdistill.engine.inference.network import Network, Pool
from selfdistill.engine.runtime import devices, precision, rendezvous

#: Inputs of a batch of those that are given as a list.
TOGETHER = 64

#: Files of an export on the hub beside its weights: what it says of itself, and its heads.
_OF_HUB = (TOLD, "timm/*", "2_Dense/model.safetensors", "attn_pool.safetensors")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Loaded:
    """A model with what belongs to it, in eval mode on its device.

    Attributes:
        kind: of its inputs.
        classes: names, in the order of the logits; empty for an encoder.
        pool: what its head reads, or its makers: the CLS token, the mean of the patches (of texts,
            of all tokens), or both beside each other.
        several: of a classifier, whether a sample may have several classes.
        width: of a token's vector, D.
        codec: decodes inputs as people have them: exactly what packing and training made of them.
        origin: what the user named.
        sha256: of the weights and of all that changes a result: another hash, other results.
        precision: of the matrix products, fp32 or bf16.
        device: where it computes.
        notes: what the user should be told, a line each.
        network: of `engine.inference.images` or `texts`.
        normalizes: whether the feature `own` has length 1.
    """

    kind: Literal["image", "text"]
    classes: list[str]
    pool: Pool
    several: bool
    width: int
    codec: Codec
    origin: str
    sha256: str
    precision: str
    device: torch.device
    notes: tuple[str, ...]
    network: Network = field(repr=False)
    normalizes: bool = False

    @torch.no_grad()
    def forward(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the model says of a batch.

        A classifier gives the logits that fine-tuning's evaluation scored: the same bits for the
        same batch in the same precision.

        Args:
            batch: what `codec.collate` gives, or a loader's batch; other entries are passed over.

        Returns:
            `features` fp32 [B, D] as the head reads them ([B, 2 D] where it reads both), and of a
            classifier `logits` fp32 [B, C].
        """
        if not self.classes:
            return {"features": self.encode(batch)}
        with precision.autocast(self.device, _DTYPES[self.precision]):
            logits, features = self.network.classified(self._sent(batch))
        return {"logits": logits.float(), "features": features.float()}

    @torch.no_grad()
    def encode(self, batch: Mapping[str, Any], feature: Asked = "own") -> Tensor:
        """Features alone, fp32 [B, D]; of `tokens` see `tokens`.

        Args:
            batch: see `forward`.
            feature: which.
        """
        assert feature != "tokens"
        one: Any = self.pool if feature == "own" else feature
        entries = self._sent(batch)
        with precision.autocast(self.device, _DTYPES[self.precision]):
            if one == "both":
                parts = [self.network.encoded(entries, half)[0] for half in ("cls", "mean")]
                features = torch.cat(parts, dim=1)
            else:
                features = self.network.encoded(entries, one)[0]
        if feature == "own" and self.normalizes:
            return nn.functional.normalize(features.float(), dim=-1)
        return features.float()

    @torch.no_grad()
    def tokens(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """Every token's vector, of each sample fp32 [T, D].

        Of images the CLS token first, then the patches row by row; of texts the tokens without
        padding, special ones among them.
        """
        with precision.autocast(self.device, _DTYPES[self.precision]):
            tokens, counts = self.network.encoded(self._sent(batch), "tokens")
        tokens = tokens.float()
        if counts is None:
            return list(tokens)
        return [row[there.bool()] for row, there in zip(tokens, counts, strict=True)]

    def decode(self, content: bytes | Text, name: str) -> NDArray[Any]:
        """One input as the codec's array.

        Args:
            content: a picture's file, or a text.
            name: of it, for messages.

        Raises:
            BrokenData: it cannot be read; says why.
        """
        if isinstance(content, Text):
            try:
                content = store(content.text, content.pair, "json")
            except ValueError as error:
                raise BrokenData(str(error)) from None
        return self.codec.decode(content, name)

    def __call__(self, inputs: Iterable[str | os.PathLike[str]]) -> NDArray[np.float32]:
        """What the model says of pictures or texts.

        Args:
            inputs: paths of pictures, or texts.

        Returns:
            Of a classifier the probabilities fp32 [n, C], each class's own where a sample may have
            several; of an encoder the features fp32 [n, D].

        Raises:
            UserError: one cannot be read, or there is none.
        """
        try:  # a notebook shows every frame that an error came through
            return self._answers(inputs)
        except UserError as error:
            raise error.with_traceback(None) from None

    def _answers(self, inputs: Iterable[str | os.PathLike[str]]) -> NDArray[np.float32]:
        if isinstance(inputs, str | os.PathLike):
            raise UserError("give a list of paths or texts, also for one")
        rest, found = iter(inputs), []
        while taken := list(itertools.islice(rest, TOGETHER)):
            names = [os.fspath(one) for one in taken]
            arrays = [self.decode(self._content(name), name) for name in names]
            came = self.forward(self.codec.collate(arrays, names))
            if not self.classes:
                made = came["features"]
            elif self.several:
                made = came["logits"].sigmoid()
            else:
                made = came["logits"].softmax(dim=1)
            found.append(made[: len(taken)].cpu().numpy())
        if not found:
            raise UserError("there are no inputs: give a list of paths or texts")
        return np.concatenate(found)

    def _content(self, name: str) -> bytes | Text:
        if self.kind == "text":
            return Text(name, None)
        try:
            return Path(name).read_bytes()
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror}): correct the path") from None

    def codec_of(self, manifest: Manifest) -> Codec:
        """Decodes the samples of a packed set, as the engine's evaluation does.

        Raises:
            UserError: they are of the other kind, or of another size.
        """
        if manifest.kind != self.kind:
            raise UserError(
                f"{manifest.root} holds {manifest.kind}s, {self.origin} takes {self.kind}s: give"
                f" {self.kind}s, or another model"
            )
        return self.network.codec_of(manifest)

    def _sent(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        return {
            name: tensor.to(self.device, non_blocking=True)
            for name, tensor in batch.items()
            if isinstance(tensor, Tensor)
        }


def load(
    path: str | Path,
    *,
    precision: Precision = "auto",
    span: Range | None = None,
    channels: Channels | None = None,
    size: Size | None = None,
    device: torch.device | None = None,
) -> Loaded:
    """A run's, a stage's or an export's model, or one from elsewhere of a type known here.

    Args:
        path: A run's folder (its fine-tuning; of several seeds the one with the best score on val),
            a stage's, an export, or what --model takes: a folder of transformers, timm or
            sentence-transformers, a file of weights, a hub name.
        precision: See `Precision`.
        span: Range of pictures of more than 8 bits; by default that of the set it was trained on.
        channels: Of TIFFs with several pages, as `data.pack --channels`.
        size: Of the pictures, in pixels; by default the model's own.
        device: To compute on; by default this process's GPU, else the processor.

    Raises:
        UserError: There is none, it is not complete, broken, or of an unknown type.
    """
    place = found.locate(str(path))
    own = _here(place.path)
    if device is None:
        device = devices.take(rendezvous.resolve())
    told = found.told(own) if own.is_dir() else found.Told()
    dtype, note = _precision(precision, told.precision, device)
    network: Network
    if _kind(own, str(path)) == "text":
        from selfdistill.engine.inference.texts import open_texts

        if size is not None:
            raise UserError(f"--size {typed(size)} is of pictures, and {path} takes texts")
        network = open_texts(str(own), told)
    else:
        from selfdistill.engine.inference.images import open_images

        network = open_images(str(own), told, span, channels, size)
    settings = f"{network.settings} {dtype}"
    return Loaded(
        kind=network.kind,
        classes=network.classes,
        pool=network.pool,
        several=network.several,
        width=network.width,
        codec=network.codec,
        origin=str(path),
        sha256=hashlib.sha256(f"{network.sha256} {settings}".encode()).hexdigest(),
        precision=dtype,
        device=device,
        notes=(*place.notes, *(n.replace(str(own), place.path) for n in network.notes), *note),
        network=network.to(device).eval().requires_grad_(False),
        normalizes=network.normalizes,
    )


def kind_of(path: str | Path) -> Literal["image", "text"]:
    """What a model takes; see `load`.

    Raises:
        UserError: there is no model.
    """
    return _kind(_here(found.locate(str(path)).path), str(path))


def _precision(asked: str, trained: str | None, device: torch.device) -> tuple[str, list[str]]:
    """Precision to compute in, and what to say of it."""
    if asked != "auto":
        return asked, []
    if trained in (None, "fp32"):
        return "fp32", []
    if trained == "bf16" and precision.fast_bf16(device):
        return "bf16", []
    return "fp32", [f"precision fp32: it was scored in {trained}, few results will differ"]


def _kind(own: Path, source: str) -> Literal["image", "text"]:
    """Whether a model takes images or texts, by its files.

    Raises:
        UserError: There is no model.
    """
    if own.is_dir() and (own / "modules.json").is_file():
        return "text"  # sentence-transformers'
    if own.is_dir():
        from selfdistill.data import records

        for path in (own / "config.json", own / "timm" / "config.json"):
            if path.is_file():
                config = records.read_object(path)
                kind = str(config.get("model_type"))
                return "text" if "architecture" not in config and _is_text(kind) else "image"
        raise found.no_model(source)
    return "image"  # a file of weights


def _is_text(model_type: str) -> bool:
    from selfdistill.engine.models.images.types import TYPES

    return not any(model_type in one.model_types for one in TYPES)


def _here(source: str) -> Path:
    """The folder or file that a model lies in; what a hub's name means is fetched, whole.

    Raises:
        UserError: it is no such name, or cannot be fetched.
    """
    from selfdistill.engine.models import source as sources

    own = Path(source).expanduser()
    if own.exists():
        return sources.locate(source)  # of a model's file the folder
    from selfdistill.engine.models.texts import sentences
    from selfdistill.engine.models.texts.weights import TOKENIZER_FILES

    local = own.is_absolute() or source.startswith(("./", "../", "~"))
    file = own.name.endswith((*sources.TORCH_FILES, ".safetensors"))
    if local or file or "/" not in source:
        raise found.no_model(source)
    wanted = (*_OF_HUB, *TOKENIZER_FILES, *sentences.FILES)
    return sources.locate(source, patterns=wanted, bare=True)
