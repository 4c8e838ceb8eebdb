"""A masked language model at work on texts, for a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from selfdistill.data.cli import format_error
from selfdistill.data.errors import UserError
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.models import adapters
from selfdistill.engine.models.texts.classifier import TextClassifier
from selfdistill.engine.models.texts.fresh import small_config
from selfdistill.engine.models.texts.language import (
    HEADS,
    MaskedLanguageModel,
    cuts,
)
from selfdistill.engine.models.texts.tokenizer import load_tokenizer
from selfdistill.engine.models.texts.weights import Language
from selfdistill.engine.monitoring.flops import Part, Stage, TeacherMode
from selfdistill.engine.training.modalities.text import TextModality
from selfdistill.launcher.plan.activations import (
    CLS_ROW,
    Blocks,
    masked_texts,
    peak,
    whole_texts,
)
from selfdistill.launcher.plan.known import BARE, TEXTS
from selfdistill.launcher.plan.workload import Workload, unknown

#: Bytes of English that make one token of RoBERTa's, roughly; special tokens of a text.
BYTES_PER_TOKEN, SPECIAL = 4.2, 2


class TextWork(Workload):
    """See `launcher.plan.workload.Workload`.

    Attributes:
        longest: tokens to which a text is cut, padded: memory is planned for batches of such.
        tokens: mean tokens of a text, padding left out: FLOPs are counted for these.

    Args:
        run: the configuration.
        tokens: as the attribute; None derives it from the data.
        manifest: of the data, or None.

    Raises:
        UserError: an unknown model, or neither tokens nor data.
    """

    samples = "texts"

    def __init__(self, run: Run, tokens: float | None, manifest: Manifest | None) -> None:
        self.config = run.config
        path = run.config.model.path
        if path is None:
            raise UserError(
                "--model is missing: a hub name (FacebookAI/roberta-base), a folder, or scratch"
            )
        config = _read(path, run)
        self.whole = _whole(path, config)
        self.limit = _limit(config)
        limit = run.config.text.max_length
        if limit is not None and limit > self.limit:
            raise UserError(
                f"--text.max_length {limit}: {path} takes {self.limit} tokens at most: give that or"
                " less"
            )
        longest, bucket = limit or self.limit, run.config.text.bucket
        self.longest = min(longest, -(-longest // bucket) * bucket)
        self.tokens = min(float(longest), _mean(manifest) if tokens is None else tokens)
        self.base = Language(config, None, longest, {}, None, path, "")
        # There may be no data: TextModality looks at them to load weights, which a plan never does.
        self.modality = TextModality(run, manifest)  # type: ignore[arg-type]
        mlp = int(getattr(config, "intermediate_size", 0) or config.hidden_dim)
        self.blocks = Blocks(
            int(config.num_hidden_layers),
            int(config.hidden_size),
            mlp,
            int(config.num_attention_heads),
            recomputed=run.config.checkpoint_activations,
        )
        self.origin = (
            f"{path}: {config.model_type} {self.blocks.width} x {self.blocks.depth},"
            f" {config.vocab_size} entries, up to {longest} tokens, {self.tokens:.0f} on average"
        )

    def network(self, stage: Stage, classes: int) -> nn.Module:
        """See `Workload`."""
        config = type(self.base.config).from_dict(self.base.config.to_dict())
        if stage == "finetune":
            config.num_labels = classes
            return TextClassifier(config, self.config.finetune.settled)
        network = MaskedLanguageModel(config)
        if stage == "decoder":
            network.encoder.requires_grad_(False)
            return network
        adapters.adapt(network.encoder, self.config)
        return network

    def encoder(self) -> nn.Module:
        """See `Workload`."""
        encoder: nn.Module = MaskedLanguageModel(self.base.config).encoder
        return encoder

    def plain_flops(self, stage: Stage, mode: TeacherMode, classes: int) -> float:
        """See `Workload`: of a text of mean length."""
        texts, length = 100, max(1, round(self.tokens))
        batch = {
            "attention_mask": torch.ones(texts, length, dtype=torch.int64),
            "masked_at": torch.zeros(round(texts * self._masked(length)), dtype=torch.int64),
        }
        return self.modality.flops(self.base, stage, mode, classes, batch) / texts

    def _masked(self, tokens: float) -> float:
        """Masked tokens of a text; special ones never are."""
        return self.config.mlm.ratio * max(0.0, tokens - SPECIAL)

    def classified(self, size: int) -> tuple[float, float]:
        """See `Workload`: of a text of the greatest length."""
        return self._whole(self.blocks, size, self.config.finetune.dropout, True)

    def viewed(self, size: int, dropout: float | None, cls_only: bool) -> tuple[float, float]:
        """See `Workload`: of a text of the greatest length."""
        rate = self._dropout() if dropout is None else dropout
        return self._whole(self._adapted(), size, rate, cls_only)

    def _whole(self, blocks: Blocks, size: int, rate: float, first: bool) -> tuple[float, float]:
        cut, mask = CLS_ROW if first and cuts(self.base.config) else None, int(rate > 0)
        saved = whole_texts(blocks, self.longest, size, mask=mask, cut=cut)
        return saved, peak(saved, [(blocks, self.longest)], size, mask=mask)

    def _adapted(self) -> Blocks:
        """The blocks as stages 1 and 2 train them."""
        part = Part(self.config.adapt, self.config.lora.rank)
        return self.blocks._replace(part=part, layers=6)

    def _dropout(self) -> float:
        """The encoder's in stages 1 and 2."""
        config = self.base.config
        own = float(getattr(config, "hidden_dropout_prob", getattr(config, "dropout", 0.1)))
        return own if self.config.mlm.dropout is None else self.config.mlm.dropout

    def plain_activations(self, stage: Stage, size: int) -> float:
        """See `Workload`: of a text of the greatest length."""
        config, length = self.base.config, self.longest
        if stage == "finetune":
            return self.classified(size)[1]
        blocks, rate = self._adapted(), self._dropout()
        masked = masked_texts(
            blocks,
            length,
            self._masked(length),
            int(config.vocab_size),
            size,
            mask=int(rate > 0),
            cuts=cuts(config),
            frozen=stage == "decoder",
        )
        if stage == "decoder":
            return masked
        if stage == "pretrain":
            return peak(masked, [(blocks, length)], size, mask=int(rate > 0))
        # Whose backward comes first.
        return masked + self._whole(blocks, size, rate, self.config.distill.settled == "cls")[1]

    def input_bytes(self) -> int:
        """See `Workload`: int64 ids and attention mask of a text of mean length."""
        return 2 * 8 * max(1, round(self.tokens))


def _read(path: str, run: Run) -> PreTrainedConfig:
    """Configuration of a model in transformers' form; its weights are not read."""
    if path == "scratch":
        place = run.config.model.tokenizer
        if place is None:
            raise UserError(
                "--model scratch needs --model.tokenizer: a folder made by python -m data.tokenizer"
            )
        sizes = run.config.model.shape
        longest = run.config.text.max_length or 512
        tokenizer = load_tokenizer(place, place)
        return small_config(tokenizer, sizes.width, sizes.depth, sizes.heads, longest)
    if not Path(path).exists():
        if path not in TEXTS:
            raise unknown(path)
        return TEXTS[path]
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be loaded: {format_error(error)[:200]}") from error
    if config.model_type not in HEADS:
        raise UserError(
            f"{path} is a model of type {config.model_type!r}, of which masked language modelling"
            f" is not known here: take one of {', '.join(HEADS)}"
        )
    return config


def _whole(path: str, config: PreTrainedConfig) -> bool:
    """Whether a model has its MLM head, by its name or by the class that config.json tells."""
    if path == "scratch" or not Path(path).exists():
        return path not in BARE
    classes = config.architectures
    return classes is None or any(
        name.endswith(("ForMaskedLM", "ForPreTraining")) for name in classes
    )


def _limit(config: PreTrainedConfig) -> int:
    """Longest input in tokens: RoBERTa and its like number positions from padding's id + 1."""
    with torch.device("meta"):
        network: Any = MaskedLanguageModel(config).encoder
    table = getattr(network.embeddings, "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return int(config.max_position_embeddings) - (0 if padding is None else int(padding) + 1)


def _mean(manifest: Manifest | None) -> float:
    """Mean tokens of a text, from its bytes."""
    if manifest is None:
        raise UserError("--tokens is missing: the mean length of a text, or give --data")
    return float(manifest.members[:, 1].mean()) / BYTES_PER_TOKEN + SPECIAL
