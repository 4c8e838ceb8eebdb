"""Classifiers of texts: transformers' own, and a linear layer on the mean of a text's tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from selfdistill.engine.models.texts.language import Inputs, LastRows, build
from selfdistill.engine.models.texts.sentences import Pooling

#: Types whose classifier pools as its configuration says, under these names.
OWN_POOLING: dict[str, dict[Pooling, str]] = {
    "modernbert": {"cls": "cls", "mean": "mean"},
    "eurobert": {"cls": "bos", "mean": "mean"},
}
#: Names of the rate before a classifier, the first that is told; DistilBERT's is the second.
_DROPOUTS = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob")


class MeanNetwork(nn.Module):
    """An encoder, and a linear layer on the mean of a text's tokens, special ones among them.

    Attributes:
        config: transformers', of the encoder.
        base_model: the encoder.
        classifier: the linear layer.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        """Fresh weights for a config with `num_labels`."""
        super().__init__()
        self.config = config
        self.base_model: Any = build(AutoModelForMaskedLM, config).base_model
        rates = [getattr(config, name, None) for name in _DROPOUTS]
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.0))
        self.classifier = nn.Linear(int(config.hidden_size), int(config.num_labels))
        nn.init.normal_(
            self.classifier.weight, std=float(getattr(config, "initializer_range", 0.02))
        )
        nn.init.zeros_(self.classifier.bias)

    def head(self, hidden: Tensor, counts: Tensor) -> Tensor:
        """Logits [B, C] of the encoder's output [B, T, D], by its tokens that count [B, T]."""
        weight = counts[:, :, None].to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        logits: Tensor = self.classifier(self.dropout(mean))
        return logits


class TextClassifier(nn.Module):
    """transformers' own sequence classifier: RoBERTa's has a dense layer and tanh on `<s>`.

    With ``pool="mean"`` the one that sentence-transformers has, `MeanNetwork`, but of the types
    that have one of their own.
    """

    def __init__(self, config: PreTrainedConfig, pool: Pooling = "cls") -> None:
        """Fresh weights for a config with `num_labels`."""
        super().__init__()
        own = OWN_POOLING.get(config.model_type)
        if own is not None:
            config.classifier_pooling = own[pool]
        self.mean = pool == "mean" and own is None
        factory = AutoModelForSequenceClassification
        self.network = MeanNetwork(config) if self.mean else build(factory, config)
        self.inputs = Inputs(self.encoder, config)
        # A mean counts with the mask, and so does EuroBERT whatever it pools by.
        self.inputs.ready = self.inputs.ready and (own is None or own[pool] == "cls")
        self.rows = LastRows(self.encoder, config)

    @property
    def encoder(self) -> Any:
        """f_theta."""
        return self.network.base_model

    @property
    def embedding(self) -> Any:
        """See `objectives.Classifies`."""
        return self.encoder.get_input_embeddings()

    def classify(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        unpadded: Tensor | None = None,
        packed_at: Tensor | None = None,
        packed_to: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        **_: Tensor,
    ) -> Tensor:
        """Logits [B, C] of int64 [B, T] ids and attention mask."""
        inputs = self.inputs(input_ids, attention_mask, unpadded, packed_at, token_type_ids)
        if self.mean:
            hidden = self.encoder(**inputs).last_hidden_state
            if packed_to is not None:
                hidden = hidden.flatten(0, 1)[packed_to]
            mean: Tensor = self.network.head(hidden, attention_mask)
            return mean
        with self.rows.cls(packed_to):  # all that heads and poolers of models that cut ever read
            logits: Tensor = self.network(**inputs).logits
        return logits
