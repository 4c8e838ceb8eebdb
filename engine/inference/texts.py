"""Text models at work: an encoder of any type known here, and the head of its classifier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification
from transformers.utils import logging

from selfdistill.data import records
from selfdistill.data.errors import BrokenData, UserError
from selfdistill.data.formats import texts
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.export import PROBLEM
from selfdistill.engine.config.sections import TextSection
from selfdistill.engine.inference.found import Told
from selfdistill.engine.inference.network import Network, check_classes
from selfdistill.engine.models.images.weights import fingerprint
from selfdistill.engine.models.source import read_safetensors
from selfdistill.engine.models.texts import sentences
from selfdistill.engine.models.texts.classifier import OWN_POOLING, TextClassifier
from selfdistill.engine.models.texts.language import TextEncoder, build
from selfdistill.engine.models.texts.tokenizer import foreign
from selfdistill.engine.models.texts.weights import (
    Language,
    load_encoder,
    load_language,
    read_network,
)
from selfdistill.engine.training.modalities.tokens import Encoder
from selfdistill.engine.training.objectives import Feature, pick

#: Where a classifier on the mean of a text's tokens has its linear layer: see `sentences.write`.
_DENSE = "2_Dense/model.safetensors"


class Given(texts.Texts):
    """Texts as people have them; the error says what is wrong alone."""

    def decode(self, content: bytes, name: str) -> NDArray[Any]:
        """See `Codec`."""
        try:
            return self._array(self.encode(*texts.read(content, self.stored)))
        except ValueError as error:
            raise BrokenData(str(error)) from None


class TextNetwork(Network):
    """See `Network`; entries of a batch are those of `data.formats.texts.Texts.collate`."""

    kind = "text"

    def __init__(self, path: str, base: Language, classifier: TextClassifier | None, told: Told):
        super().__init__()
        self.classifier, self.base, self.width = classifier, base, int(base.config.hidden_size)
        if classifier is None:
            encoder = build(AutoModelForMaskedLM, base.config).base_model
            load_encoder(encoder, base.encoder, base.origin)
            self.pool, self.classes = base.pooling, []
            self.notes = tuple(base.sentences.notes) if base.sentences else ()
            self.normalizes = base.sentences is not None and base.sentences.normalizes
            self.sha256 = base.sha256
        else:
            encoder = classifier.encoder
            config = classifier.network.config
            check_classes(config.num_labels, config.problem_type, path)
            own = OWN_POOLING.get(config.model_type)
            mean = classifier.mean or (own and config.classifier_pooling == own["mean"])
            self.pool = "mean" if mean else "cls"
            self.classes = [str(config.id2label[i]) for i in range(config.num_labels)]
            self.several = config.problem_type == PROBLEM
            state = classifier.network.state_dict()
            self.sha256 = fingerprint({k: v for k, v in state.items() if v.is_floating_point()}, {})
        if base.max_length < 10**6:
            self.notes += (f"{path}: of a text the first {base.max_length} tokens are read",)
        self.encoder = TextEncoder(encoder, base.config)
        self.bucket = told.bucket or TextSection().bucket
        self.codec = self._codec(Given, "json")
        self.settings = (
            f"{self.pool} {self.classes} {self.several} {base.max_length} {self.bucket}"
            f" {self.normalizes}"
        )

    def _codec(self, kind: type[texts.Texts], stored: texts.Stored) -> Any:
        base, tokenizer = self.base, self.base.tokenizer
        segments = getattr(base.config, "type_vocab_size", None) or 0
        return kind(
            Encoder(tokenizer, base.max_length, segments, origin=base.origin),
            pad_id=tokenizer.pad_token_id,
            special_ids=frozenset(tokenizer.all_special_ids),
            max_length=base.max_length,
            bucket=self.bucket,
            stored=stored,
        )

    def classified(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See `Network`."""
        assert self.classifier is not None
        kept: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            kept.append(output.last_hidden_state)

        hook = self.classifier.encoder.register_forward_hook(keep)
        try:
            logits = self.classifier.classify(**batch)
        finally:
            hook.remove()
        feature: Feature = "cls" if self.pool == "cls" else "mean"
        return logits, pick(kept[0], feature, batch["attention_mask"])

    def encoded(
        self, batch: Mapping[str, Tensor], feature: Feature
    ) -> tuple[Tensor, Tensor | None]:
        """See `Network`."""
        tokens, counts = self.encoder.encode(cls_only=feature == "cls", **batch)
        return pick(tokens, feature, counts), counts

    def codec_of(self, manifest: Manifest) -> texts.Texts:
        """See `Network`."""
        made: texts.Texts = self._codec(texts.Texts, manifest.text["stored"])
        return made


def open_texts(path: str, told: Told) -> TextNetwork:
    """A text model.

    Args:
        path: an export, or what `load_language` reads.
        told: what the export says of itself.

    Raises:
        UserError: it is broken, or of an unknown type.
    """
    logging.disable_progress_bar()  # of a few seconds, amid lines of ours
    base = load_language(path)
    folder = sentences.transformer(Path(path).expanduser())
    if not folder.is_dir():
        return TextNetwork(path, base, None, told)  # of the hub: an encoder
    config = records.read_object(folder / "config.json")
    kinds = [str(one) for one in config.get("architectures") or ()]
    if (folder / _DENSE).is_file():
        return TextNetwork(path, base, _mean(folder, base, path), told)
    if any(kind.endswith("ForSequenceClassification") for kind in kinds):
        return TextNetwork(path, base, _own(folder, base, path), told)
    return TextNetwork(path, base, None, told)


def _mean(folder: Path, base: Language, origin: str) -> TextClassifier | None:
    """A linear layer on the mean, as we export it; None where a Dense module is something else."""
    head = {k.removeprefix("linear."): v for k, v in read_safetensors(folder / _DENSE).items()}
    weight, bias = head.get("weight"), head.get("bias")
    shape = (base.config.num_labels, base.config.hidden_size)
    if weight is None or bias is None or tuple(weight.shape) != shape:
        return None
    model = TextClassifier(base.config, "mean")
    load_encoder(model.encoder, base.encoder, origin)
    model.network.classifier.load_state_dict(head)
    return model


def _own(folder: Path, base: Language, origin: str) -> TextClassifier:
    """A classifier of transformers' own class.

    Raises:
        UserError: weights are missing, or it pools as no model here does.
    """
    config = base.config
    own = OWN_POOLING.get(config.model_type)
    pooling = "mean" if own and getattr(config, "classifier_pooling", "") == own["mean"] else "cls"
    if own and config.classifier_pooling not in own.values():
        raise UserError(
            f"{origin}: its head pools by {config.classifier_pooling!r}, which is not known here:"
            f" take a model that pools by one of {', '.join(own.values())}"
        )
    with foreign(f"{origin} cannot be loaded", "fetch the model again"):
        model, info = read_network(AutoModelForSequenceClassification, folder, config)
    if wrong := sorted([*info["missing_keys"], *map(str, info["mismatched_keys"])]):
        raise UserError(f"{origin}: {wrong[0]} is missing or of another shape: fetch it again")
    made = TextClassifier(config, "mean" if pooling == "mean" else "cls")
    made.network.load_state_dict(model.state_dict())
    return made
