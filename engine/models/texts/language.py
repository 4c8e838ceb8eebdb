"""Language models with a masked-language-modelling head, on transformers' own classes.

The encoder is the model's `base_model`; the decoder, phi of the paper, is its MLM head. Embeddings
that the head shares with the encoder stay one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForMaskedLM,
    PreTrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


def _distilbert_head(lm: Any, hidden: Tensor) -> Tensor:
    hidden = lm.activation(lm.vocab_transform(hidden))
    logits: Tensor = lm.vocab_projector(lm.vocab_layer_norm(hidden))
    return logits


def _electra_head(lm: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = lm.generator_lm_head(lm.generator_predictions(hidden))
    return logits


def _deberta_head(lm: Any, hidden: Tensor) -> Tensor:
    """The head of "legacy": false multiplies by the embeddings, which it is given."""
    logits: Tensor = (
        lm.cls(hidden)
        if lm.legacy
        else lm.lm_predictions(hidden, lm.base_model.get_input_embeddings())
    )
    return logits


def _modernbert_head(lm: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = lm.decoder(lm.head(hidden))
    return logits


def _attribute(name: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda lm, hidden: getattr(lm, name)(hidden)


#: model_type of config.json -> the MLM head: (model, hidden states [n, D]) -> logits [n, V].
HEADS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "roberta": _attribute("lm_head"),
    "xlm-roberta": _attribute("lm_head"),
    "camembert": _attribute("lm_head"),
    "mpnet": _attribute("lm_head"),
    "bert": _attribute("cls"),
    "deberta-v2": _deberta_head,
    "distilbert": _distilbert_head,
    "electra": _electra_head,
    "modernbert": _modernbert_head,
    "eurobert": _attribute("lm_head"),
}

#: Names under which configs hold their dropout rates.
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "pooler_dropout",
    "seq_classif_dropout",
    "classifier_dropout",
    "cls_dropout",
    "summary_last_dropout",
    "embedding_dropout",
    "mlp_dropout",
)


def with_dropout(config: PreTrainedConfig, rate: float | None) -> PreTrainedConfig:
    """A copy of a config with every dropout at this rate; None keeps the model's own."""
    copied = type(config).from_dict(config.to_dict())
    if rate is not None:
        for name in _DROPOUTS:
            if hasattr(copied, name):
                setattr(copied, name, rate)
    return copied


def restore_dropout(config: PreTrainedConfig, original: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a config with another's dropout rates."""
    copied = type(config).from_dict(config.to_dict())
    for name in _DROPOUTS:
        if hasattr(original, name):
            setattr(copied, name, getattr(original, name))
    return copied


#: Our name, in transformers' tables, of its SDPA attention as `_attention` calls it.
_SDPA = "sdpa, on a CPU in fp32"


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """Transformers' SDPA attention; on a CPU in fp32, which is faster (see `rows_block`)."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            parts = (query.float(), key.float(), value.float())
            seen, _ = sdpa_attention_forward(module, *parts, mask, **more)
        return seen.to(query.dtype), None
    seen, _ = sdpa_attention_forward(module, query, key, value, mask, **more)
    return seen, None


AttentionInterface.register(_SDPA, _attention)
AttentionMaskInterface.register(_SDPA, sdpa_mask)


def build(factory: Any, config: PreTrainedConfig) -> Any:
    """A fresh model in fp32, with SDPA attention where its class has it (transformers chooses)."""
    model = factory.from_config(config, dtype=torch.float32)
    # On GPUs cuDNN plans anew for each shape of a batch, and those of texts are many.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_SDPA)
    return model


class Inputs:
    """What a batch's ids become as arguments of a transformers model."""

    def __init__(self, encoder: Any, config: PreTrainedConfig) -> None:
        self.pad = int(getattr(config, "pad_token_id", None) or 0)
        # RoBERTa counts positions from behind that of padding, BERT from 0.
        self.counts_from_pad = config.model_type != "bert"
        # transformers asks a mask of two dimensions whether it masks anything, and so waits for the
        # device; one that is ready it takes as it is, where attention is PyTorch's own.
        self.ready = getattr(encoder.config, "_attn_implementation", "") == _SDPA
        # ModernBERT's layers of a window would take one that is ready for theirs.
        windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        self.window = int(config.sliding_window) if windowed else None

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        unpadded: Tensor | None = None,
        packed_at: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        """The arguments.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, T], 0 at padding.
            unpadded: given where nothing is padded.
            packed_at: int64 [R, T], for several texts in a row: see `data.formats.texts.pack_rows`.
            token_type_ids: int64 [B, T], the segment of each token; None: all are of the first.
        """
        kinds = token_type_ids
        found: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self.ready:
            mask = None if unpadded is not None else attention_mask[:, None, None].bool()
            found["attention_mask"] = mask
            if self.window is not None:
                place = torch.arange(input_ids.shape[1], device=input_ids.device)
                near = (place[:, None] - place).abs() <= self.window
                found["attention_mask"] = {
                    "full_attention": mask,
                    "sliding_attention": near[None, None] if mask is None else near & mask,
                }
        if packed_at is not None:
            width, empty, at = input_ids.shape[1], packed_at < 0, packed_at.clamp(min=0)
            text = (at // width).masked_fill(empty, -1)
            found["input_ids"] = input_ids.flatten()[at].masked_fill(empty, self.pad)
            found["position_ids"] = self._positions(input_ids).flatten()[at]
            # Each text sees itself alone; padding sees padding, since nothing is not a number.
            found["attention_mask"] = (text[:, :, None] == text[:, None, :])[:, None]
            kinds = None if kinds is None else kinds.flatten()[at]
        if kinds is not None:
            found["token_type_ids"] = kinds
        return found

    def _positions(self, input_ids: Tensor) -> Tensor:
        """The position of each token, int64 [B, T], as the model itself numbers them.

        RoBERTa counts the tokens that are not padding, also where a text has "<pad>" written out.
        """
        if not self.counts_from_pad:
            return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        there = (input_ids != self.pad).long()
        return there.cumsum(1) * there + self.pad


def cuts(config: PreTrainedConfig) -> bool:
    """Whether `LastRows` spares a model's last layer anything: BERT, RoBERTa and their like."""
    return config.model_type in ("bert", "roberta", "xlm-roberta", "camembert")


class LastRows:
    """Lets an encoder's last layer compute only the rows that are read.

    Of a layer's work only attention mixes rows: output projection and MLP, two thirds of it, run on
    each by itself. Where `cuts` says no, nothing is spared and `whole` rows are returned as ever.

    Args:
        encoder: of transformers.
        config: its configuration.
    """

    def __init__(self, encoder: Any, config: PreTrainedConfig) -> None:
        self.cuts = cuts(config)
        self._choose: Callable[[Tensor], Tensor] | None = None
        if self.cuts:
            encoder.encoder.layer[-1].attention.output.register_forward_pre_hook(self._cut)

    def _cut(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return None if self._choose is None else tuple(map(self._choose, inputs))

    @contextmanager
    def first(self, wanted: bool = True) -> Iterator[None]:
        """Within, [B, T, D] becomes [B, 1, D], the CLS token's row (where the model cuts)."""
        with self._only((lambda rows: rows[:, :1]) if wanted else None):
            yield

    @contextmanager
    def at(self, places: Tensor) -> Iterator[None]:
        """Within, [B, T, D] becomes [n, 1, D], the rows at int64 [n] of the flattened batch."""
        with self._only(lambda rows: rows.flatten(0, 1).index_select(0, places)[:, None]):
            yield

    @contextmanager
    def cls(self, packed_to: Tensor | None, wanted: bool = True) -> Iterator[None]:
        """Within, [B, T, D] becomes [B, 1, D], the CLS tokens' rows, in rows of several texts, too.

        Args:
            packed_to: int64 [B, T], see `data.formats.texts.pack_rows`; None: a text a row.
            wanted: False: nothing is cut.
        """
        with self.at(packed_to[:, 0]) if wanted and packed_to is not None else self.first(wanted):
            yield

    @contextmanager
    def _only(self, choose: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
        self._choose = choose
        try:
            yield
        finally:
            self._choose = None


class _Encodes(nn.Module):
    """What encodes the unmasked view of texts; see `objectives.Encodes`."""

    encoder: Any
    inputs: Inputs
    rows: LastRows

    def encode(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor,
        unpadded: Tensor | None = None,
        packed_at: Tensor | None = None,
        packed_to: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        cls_only: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See `objectives.Encodes`.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 [B, T], 0 at padding.
            unpadded: given where nothing is padded.
            packed_at: int64 [R, T], for several texts in a row: see `data.formats.texts.pack_rows`.
            packed_to: int64 [B, T], likewise.
            token_type_ids: int64 [B, T], the segment of each token; None: all are of the first.
            cls_only: the first token's row is enough.

        Returns:
            Hidden states after the last layer, [B, T, D] or [B, 1, D]; and the attention mask.
        """
        inputs = self.inputs(input_ids, attention_mask, unpadded, packed_at, token_type_ids)
        with self.rows.cls(packed_to, cls_only):
            hidden: Tensor = self.encoder(**inputs).last_hidden_state
        if packed_to is not None and not cls_only:
            hidden = hidden.flatten(0, 1)[packed_to]
        return hidden, attention_mask


class TextEncoder(_Encodes):
    """An encoder on token ids."""

    def __init__(self, encoder: nn.Module, config: PreTrainedConfig) -> None:
        super().__init__()
        self.encoder = encoder
        self.inputs = Inputs(encoder, config)
        self.rows = LastRows(encoder, config)


class MaskedLanguageModel(_Encodes):
    """An encoder with its MLM head."""

    loss_name = "mlm"

    def __init__(self, config: PreTrainedConfig) -> None:
        """Fresh weights for a config whose model_type is among `HEADS`."""
        super().__init__()
        self.network = build(AutoModelForMaskedLM, config)
        self.inputs = Inputs(self.encoder, config)
        self.rows = LastRows(self.encoder, config)
        self.head = HEADS[config.model_type]

    @property
    def encoder(self) -> Any:
        """f_theta."""
        return self.network.base_model

    def reconstruct(self, **batch: Any) -> dict[str, Tensor]:
        """The loss, and what is predicted; the entries are those of `reconstructed`."""
        return self.reconstructed(**batch)[0]

    def reconstructed(
        self,
        masked_ids: Tensor,
        attention_mask: Tensor,
        masked_at: Tensor,
        originals: Tensor,
        scale: Tensor,
        unpadded: Tensor | None = None,
        packed_at: Tensor | None = None,
        packed_to: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        shown: bool = False,
        **_: Any,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The loss, `scale` times the sum of the masked tokens' cross-entropies, and the logits.

        With scale = ranks x micro-batches / masked tokens of the global batch, the mean over ranks
        and micro-batches is the mean over all masked tokens, however they are spread.

        Args:
            masked_ids: int64 [B, T], with mask tokens.
            attention_mask: int64 [B, T].
            masked_at: int64 [n], the masked tokens' places in the flattened batch, b T + t.
            originals: int64 [n], what stood there.
            scale: fp32 scalar.
            unpadded: given where nothing is padded.
            packed_at: int64 [R, T], for several texts in a row: see `data.formats.texts.pack_rows`.
            packed_to: int64 [B, T], likewise.
            token_type_ids: int64 [B, T], the segment of each token; None: all are of the first.
            shown: whether the prediction is asked for.

        Returns:
            `loss`, and `prediction` int64 [n] if it is asked for; logits fp32 [n, V].
        """
        if packed_to is not None:
            masked_at = packed_to.flatten()[masked_at]
        # The head, a large part of the work, runs on the masked tokens alone.
        with self.rows.at(masked_at):
            inputs = self.inputs(masked_ids, attention_mask, unpadded, packed_at, token_type_ids)
            hidden = self.encoder(**inputs).last_hidden_state
        chosen = hidden.flatten(0, 1)
        if not self.rows.cuts:
            chosen = chosen.index_select(0, masked_at)
        logits = self.head(self.network, chosen).float()
        loss = scale * F.cross_entropy(logits, originals, reduction="sum")
        extras = {"prediction": logits.detach().argmax(-1)} if shown else {}
        return {"loss": loss, **extras}, logits
