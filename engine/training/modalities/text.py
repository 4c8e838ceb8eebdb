"""Text: a masked language model of transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from selfdistill.data.errors import BrokenData, UserError
from selfdistill.data.formats.texts import Text, Texts, parse
from selfdistill.data.loading.reader import Reader
from selfdistill.data.loading.windows import Windows
from selfdistill.data.shards.manifest import Manifest, is_remote
from selfdistill.engine.checkpoints.export import PROBLEM, export_transformers
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.models.adapters import merged
from selfdistill.engine.models.texts.classifier import TextClassifier
from selfdistill.engine.models.texts.fresh import small_config
from selfdistill.engine.models.texts.language import (
    MaskedLanguageModel,
    TextEncoder,
    cuts,
    with_dropout,
)
from selfdistill.engine.models.texts.sentences import Sentences
from selfdistill.engine.models.texts.tokenizer import load_tokenizer
from selfdistill.engine.models.texts.weights import (
    Language,
    fresh_language,
    load_encoder,
    load_language,
)
from selfdistill.engine.monitoring import flops, texts
from selfdistill.engine.monitoring.monitor import Monitor
from selfdistill.engine.runtime.zero import full_state
from selfdistill.engine.training.modalities.base import (
    PICTURED,
    Batch,
    Modality,
    Pooled,
    Section,
    TeacherMode,
    settle_pooling,
)
from selfdistill.engine.training.modalities.tokens import Encoder, number_of_tokens
from selfdistill.engine.training.modalities.windows import windows_of
from selfdistill.engine.training.objectives import Feature
from selfdistill.engine.training.views import MaskTokens

#: Texts by which the share of those that are too long is estimated.
LOOKED_AT = 256

#: Texts by which a model from scratch learns how frequent its tokens are.
COUNTED = 20_000


class TextModality(Modality):
    """See `engine.training.modalities.base.Modality`."""

    samples, units = "texts", "tokens"
    rows: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids", "unpadded")
    full: tuple[str, ...] = (*rows, "packed_at", "packed_to")
    masked: tuple[str, ...] = (
        *full,
        "masked_ids",
        "masked_at",
        "originals",
    )
    labelled: tuple[str, ...] = full

    def __init__(self, run: Run, manifest: Manifest) -> None:
        self.run, self.config, self.manifest = run, run.config, manifest
        for name in PICTURED if run.config.stage in ("finetune", "all") else ():
            if getattr(run.config.finetune, name) not in (None, 0, "none"):
                raise UserError(f"--finetune.{name} is for images, these are texts: leave it out")

    def load(self, source: str | None = None) -> Language:
        """See `Modality`."""
        config = self.config
        path = source or config.model.path
        if path is None:
            raise UserError(
                "--model is missing: a hub name (FacebookAI/roberta-base), a folder, or scratch"
            )
        if path != "scratch":
            loaded = load_language(path, config.text.max_length)
            for note in loaded.sentences.notes if loaded.sentences else ():
                self.run.info_once(f"{path}: {note}")
            return loaded
        if config.model.tokenizer is None:
            raise UserError(
                "--model scratch needs --model.tokenizer: a folder made by python -m data.tokenizer"
            )
        tokenizer = load_tokenizer(config.model.tokenizer, config.model.tokenizer)
        sizes, longest = config.model.shape, config.text.max_length or 512
        shape = small_config(tokenizer, sizes.width, sizes.depth, sizes.heads, longest)
        torch.manual_seed(config.seed)
        return fresh_language(shape, tokenizer, longest, self._counts(tokenizer))

    def _counts(self, tokenizer: Any) -> NDArray[np.int64]:
        """How often each token stands in the texts, int64 [vocabulary]."""
        texts = self._some(self.manifest, COUNTED)
        ids = [i for text in texts for i in tokenizer(*text, verbose=False)["input_ids"]]
        counts = np.bincount(np.array(ids, dtype=np.int64), minlength=len(tokenizer))
        counts[tokenizer.all_special_ids] = 0
        return counts

    def _some(self, manifest: Manifest, number: int) -> Iterator[Text]:
        """So many texts from all over a set; those that are broken are the loader's to report."""
        reader = Reader(manifest, self.config.data.cache_dir, self.config.data.cache_gb)
        last = manifest.samples - 1
        for sample in np.unique(np.linspace(0, last, number).astype(np.int64)).tolist():
            try:
                record = reader.record(sample)
                yield parse(record.input, record.name, manifest.text["stored"])
            except BrokenData:
                continue
        reader.close()

    def check(self, manifest: Manifest, base: Language) -> None:
        """See `Modality`; says how many texts, or pairs, are longer than what is read of them."""
        remote = is_remote(manifest.root) or any(is_remote(s.name) for s in manifest.shards)
        if not self.run.ranks.main or remote:  # shards would be fetched for this alone
            return
        texts = list(self._some(manifest, LOOKED_AT))
        longer = sum(number_of_tokens(base.tokenizer, text) > base.max_length for text in texts)
        if longer:
            share = f"about {100 * longer / len(texts):.1f}% (looked at {len(texts)})"
            count = f"{longer}" if len(texts) == manifest.samples else share
            self.run.info_once(
                f"{manifest.root}: of {manifest.samples} texts {count} are longer than"
                f" {base.max_length} tokens: only their beginnings are read"
            )

    def windows(self, manifest: Manifest, base: Language) -> Windows | None:
        """See `Modality`."""
        special = base.tokenizer.num_special_tokens_to_add()
        return windows_of(self.run, manifest, base.tokenizer, base.max_length, special)

    def same_architecture(self, taught: Language, base: Language) -> None:
        """See `Modality`."""
        for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
            theirs, ours = getattr(taught.config, name), getattr(base.config, name)
            if theirs != ours:
                raise UserError(
                    f"teacher {taught.origin} has another architecture ({name} {theirs}) than"
                    f" model {base.origin} ({ours}): give the --model that the teacher was trained"
                    " from"
                )
        if taught.tokenizer.get_vocab() != base.tokenizer.get_vocab():
            raise UserError(
                f"teacher {taught.origin} has another vocabulary than model {base.origin}: give the"
                " --model that the teacher was trained from"
            )

    def codec(self, base: Language, manifest: Manifest) -> Texts:
        """See `Modality`."""
        tokenizer, overlap = base.tokenizer, self.config.text.overlap
        encoder = Encoder(
            tokenizer,
            base.max_length,
            getattr(base.config, "type_vocab_size", None) or 0,
            words=self.config.mlm.whole_word,
            overlap=overlap,
            origin=base.origin,
        )
        return Texts(
            encoder,
            pad_id=tokenizer.pad_token_id,
            special_ids=frozenset(tokenizer.all_special_ids),
            max_length=base.max_length,
            bucket=self.config.text.bucket,
            packed=self._packs(base),
            stored=manifest.text.get("stored"),
            overlapping=encoder.overlapping if overlap else None,
        )

    def mask(self, base: Language) -> MaskTokens:
        """See `Modality`."""
        mask_id = base.tokenizer.mask_token_id
        if mask_id is None:
            raise UserError(
                f"the tokenizer of {base.origin} has no mask token: masked language modelling needs"
                " one; take the tokenizer of a masked language model"
            )
        settings = self.config.mlm
        return MaskTokens(
            self.config.seed, settings.ratio, settings.policy, int(mask_id), len(base.tokenizer)
        )

    def augment(self, seed: int) -> None:
        """See `Modality`: none."""
        return

    def varied(self, seed: int) -> None:
        """See `Modality`: dropout alone."""
        return

    def pairs(self, seed: int) -> None:
        """See `Modality`: dropout alone makes views differ."""
        return

    def paired(self, batch: Batch) -> Batch:
        """See `Modality`."""
        return {name: torch.cat([batch[name]] * 2) for name in self.rows if name in batch}

    def some(self, batch: Batch, rows: Tensor) -> Batch:
        """See `Modality`."""
        return {name: batch[name][rows] for name in self.rows if name in batch}

    def _packs(self, base: Language) -> bool:
        """Whether texts share rows: where padding costs, and the model can be told of it."""
        asked, possible = self.config.text.packed, cuts(base.config)
        if asked and not possible:
            raise UserError(
                f"--text.packed true: {base.origin} is a {base.config.model_type}, and BERT,"
                " RoBERTa and their like alone know of texts that share rows: leave it out"
            )
        if asked is None:
            # Rows come in other numbers at every step, for which a compiled step compiles again.
            return possible and self.run.ranks.device.type == "cuda" and not self.config.compile
        return asked

    def autoencoder(self, base: Language, dropout: float | None = None) -> MaskedLanguageModel:
        """See `Modality`; a missing MLM head is new."""
        torch.manual_seed(self.config.seed)
        rate = self.config.mlm.dropout if dropout is None else dropout
        model = MaskedLanguageModel(with_dropout(base.config, rate))
        load_encoder(model.encoder, base.encoder, base.origin)
        if base.decoder is not None:
            model.network.load_state_dict(base.decoder, strict=False)
        return model

    def encoder(self, base: Language) -> TextEncoder:
        """See `Modality`."""
        model = MaskedLanguageModel(base.config)
        load_encoder(model.encoder, base.encoder, base.origin)
        return TextEncoder(model.encoder, base.config)

    def classifier(self, base: Language, classes: list[str], seed: int) -> TextClassifier:
        """See `Modality`."""
        settle_pooling(self.config, self, base)
        torch.manual_seed(seed)
        config = with_dropout(base.config, self.config.finetune.dropout)
        config.num_labels = len(classes)
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}
        # transformers' own word, by which its loss and pipelines take sigmoids; never the base's.
        several = self.manifest and self.manifest.several
        config.problem_type = PROBLEM if several else None
        model = TextClassifier(config, self.config.finetune.settled)
        load_encoder(model.encoder, base.encoder, base.origin)
        return model

    def recompute(self, model: MaskedLanguageModel | TextClassifier) -> None:
        """See `Modality`."""
        encoder = model.encoder
        if not encoder.supports_gradient_checkpointing:
            raise UserError(
                f"--checkpoint_activations true: transformers cannot for"
                f" {type(model.network).__name__}: leave it out"
            )
        # transformers 5.17 knows the old name alone, and 6 will know the new one.
        name = "activation_checkpointing_enable"
        name = name if hasattr(encoder, name) else "gradient_checkpointing_enable"
        getattr(encoder, name)({"use_reentrant": False})
        if model.rows.cuts:  # what rows are read is known in the forward, and no more behind it
            encoder.encoder.layer[-1].gradient_checkpointing = False

    def pooling(self, base: Language) -> Pooled:
        """See `Modality`."""
        return base.pooling

    def feature_shape(self, base: Language, feature: Feature) -> tuple[int, ...] | None:
        """See `Modality`; texts differ in length."""
        return None if feature == "tokens" else (base.config.hidden_size,)

    def view(self, base: Language) -> str:
        """See `Modality`."""
        return f"first {base.max_length} tokens"

    def record(self, base: Language) -> dict[str, Any]:
        """See `Modality`."""
        mlm, text = self.config.mlm, self.config.text
        words = {"mlm.whole_word": True} if mlm.whole_word else {}
        # How texts lie in rows changes no figure; a stage tells of its windows, if it has some.
        return {
            "mlm": mlm.model_dump(exclude={"whole_word"}),
            "text": text.model_dump(exclude={"packed", "split", "overlap"}),
            **words,
        }

    def count(self, batch: Batch) -> int:
        """See `Modality`."""
        return len(batch["masked_at"])

    def size(self, batch: Batch) -> int:
        """See `Modality`; padding does not count."""
        return int(batch["attention_mask"].sum())

    def flops(
        self, base: Language, section: Section, mode: TeacherMode, classes: int, batch: Batch
    ) -> float:
        """See `Modality`; padding does not count."""
        config = base.config
        width = int(config.hidden_size)
        mlp = int(getattr(config, "intermediate_size", 0) or config.hidden_dim)
        lengths = batch["attention_mask"].sum(1).tolist()

        def encoder(rows: float | None) -> float:
            """With so many rows of a text read after the last layer; None: all."""
            whole = sum(flops.block_flops(length, width, mlp) for length in lengths)
            if rows is None or not cuts(config):
                return int(config.num_hidden_layers) * whole
            last = sum(flops.rows_block_flops(length, rows, width, mlp) for length in lengths)
            return (int(config.num_hidden_layers) - 1) * whole + last

        part = flops.Part(self.config.adapt, self.config.lora.rank)

        def trained(rows: float | None) -> float:
            """Forward and backward of what --adapt trains of the encoder."""
            if part.adapt == "full":
                return 3 * encoder(rows)
            found, sizes = 0.0, (width, mlp, part)
            for length in lengths:
                last = length if rows is None or not cuts(config) else rows
                whole, first, cut = (
                    flops.adapted_block(length, length, read, *sizes, first=begins)
                    for read, begins in ((length, False), (length, True), (last, False))
                )
                found += (int(config.num_hidden_layers) - 2) * whole + first + cut
            return found

        if section == "finetune":
            if self.config.finetune.settled == "mean":
                return 3 * (encoder(None) + len(lengths) * 2 * width * classes)
            return 3 * (encoder(1) + len(lengths) * 2 * width * (width + classes))
        masked = len(batch["masked_at"])
        head = masked * 2 * width * (width + int(config.vocab_size))
        read = masked / len(lengths)
        if section == "decoder":  # the encoder is frozen, and has no backward
            return encoder(read) + 3 * head
        mlm = trained(read) + 3 * head
        if part.adapt != "full" and config.tie_word_embeddings:  # the head's matrix is frozen, too
            mlm -= masked * 2 * width * int(config.vocab_size)
        if section == "pretrain":
            return mlm
        rows = 1 if self.config.distill.settled == "cls" else None
        return mlm + trained(rows) + (0 if mode == "cached" else encoder(rows))

    def draw(self, monitor: Monitor, step: int, batch: Batch, out: Batch, base: Language) -> None:
        """See `Modality`: some texts, and what is predicted for their masked tokens."""
        monitor.text(
            "reconstruction", texts.shown(batch, out["prediction"].cpu(), base.tokenizer), step
        )

    def export_autoencoder(self, folder: Path, model: MaskedLanguageModel, base: Language) -> None:
        """See `Modality`: a folder for transformers, with its tokenizer.

        Of a sentence encoder it is one for sentence-transformers, too.
        """
        network, decoder = model.network, base.decoder or {}
        encoder = {f"{network.base_model_prefix}.{k}": v for k, v in base.encoder.items()}
        self._export(folder, network, base, told=base.sentences, frozen=encoder | decoder)

    def export_classifier(
        self, folder: Path, model: TextClassifier, base: Language, classes: list[str]
    ) -> None:
        """See `Modality`: a folder for transformers, with its tokenizer, which cuts as here.

        One that pools by the mean is for sentence-transformers, whose ``encode`` gives the logits.
        """
        told = Sentences() if model.mean else None
        self._export(folder, model.network, base, base.max_length, told=told)

    def _export(
        self,
        folder: Path,
        network: Any,
        base: Language,
        max_length: int | None = None,
        *,
        told: Sentences | None,
        frozen: dict[str, Tensor] | None = None,
    ) -> None:
        main, lora = self.run.ranks.main, self.config.lora
        tensors = merged(full_state(network, keep=main, frozen=frozen), lora)
        if main:
            tokenizer = base.tokenizer
            if max_length is not None:
                tokenizer = copy.deepcopy(tokenizer)
                tokenizer.model_max_length = max_length
            own = {"bucket": self.config.text.bucket, "precision": self.config.precision}
            export_transformers(folder, network, tensors, tokenizer, base.config, told, own)
