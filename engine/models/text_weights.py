"""Pre-trained language models: weights, configuration and tokenizer, read into one record."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    RobertaConfig,
)

from selfdistill.data.cli import format_error
from selfdistill.data.errors import UserError
from selfdistill.engine.models.fresh import fresh_roberta
from selfdistill.engine.models.language import HEADS
from selfdistill.engine.models.source import locate, read_json
from selfdistill.engine.models.weights import fingerprint

#: Files that a model's folder on the hub may have beside its weights.
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model")

#: What transformers raises on folders that are not as it wrote them.
_BROKEN = (
    *(OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, IndexError),
    *(AssertionError, pickle.UnpicklingError, SafetensorError, StrictDataclassError),
)
#: Models that number positions from pad_token_id + 1.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")


@dataclass(frozen=True)
class Language:
    """A pre-trained masked language model, theta_init and phi_init of the paper.

    Attributes:
        config: transformers' configuration.
        tokenizer: transformers' tokenizer.
        max_length: longest input in tokens, special ones among them.
        encoder: fp32 tensors of the model's `base_model`.
        decoder: fp32 tensors of its MLM head, tied ones left out; None if the source has no head.
        origin: what the user named.
        sha256: of the tensors' names, shapes and fp32 bytes.
    """

    config: PreTrainedConfig
    tokenizer: Any
    max_length: int
    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor] | None
    origin: str
    sha256: str


def load_language(source: str, max_length: int | None = None) -> Language:
    """Reads a model and its tokenizer.

    Args:
        source: a Hugging Face folder or hub name with tokenizer, safetensors or
            pytorch_model.bin (which is read as plain tensors: nothing is unpickled).
        max_length: longest input in tokens; None takes the model's own limit.

    Raises:
        UserError: unknown or unreadable source, a model without an MLM head that is known here,
            missing weights, a tokenizer that does not fit.
    """
    folder = locate(source, example="FacebookAI/roberta-base", patterns=TOKENIZER_FILES, bare=True)
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise UserError(f"{source} is no model's folder: a language model comes with config.json")
    kind = str(read_json(folder / "config.json").get("model_type"))
    if kind not in HEADS:
        raise UserError(
            f"{source} is a model of type {kind!r}, of which masked language modelling is not known"
            f" here: take one of {', '.join(HEADS)}"
        )
    tokenizer = load_tokenizer(str(folder), source)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.pad_token_id is None:  # by which positions are counted, and embeddings left out
            config.pad_token_id = tokenizer.pad_token_id
        model, info = AutoModelForMaskedLM.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
        )
    except _BROKEN as error:
        raise UserError(f"{source} cannot be loaded: {format_error(error)[:200]}") from error
    prefix = model.base_model_prefix + "."
    missing = sorted(info["missing_keys"])
    wrong = [*(k for k in missing if k.startswith(prefix)), *map(str, info["mismatched_keys"])]
    if wrong:
        raise UserError(
            f"{source}: {wrong[0]} is missing or of another shape than config.json says: fetch the"
            " model again"
        )
    return _record(config, tokenizer, model, max_length, source, headless=bool(missing))


def fresh_language(
    config: RobertaConfig, tokenizer: Any, max_length: int | None, counts: NDArray[np.int64]
) -> Language:
    """A model with random weights (torch's generator decides).

    Args:
        config: of the model.
        tokenizer: its tokenizer.
        max_length: longest input in tokens.
        counts: int64 [vocabulary], see `engine.models.fresh`.
    """
    model = fresh_roberta(config, tokenizer.mask_token_id, counts)
    return _record(config, tokenizer, model, max_length, "scratch", headless=False)


def load_tokenizer(folder: str, source: str) -> Any:
    """The tokenizer of a folder.

    Raises:
        UserError: it has none, or one without padding or a first token.
    """
    if not Path(folder).is_dir():
        raise UserError(f"there is no tokenizer at {source}: give its folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except _BROKEN as error:
        raise UserError(
            f"{source} has no tokenizer that can be read ({format_error(error)[:120]}): put"
            " tokenizer.json, or vocab.json and merges.txt, beside its weights"
        ) from error
    for name in ("pad", "cls", "sep"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise UserError(
                f"the tokenizer of {source} has no {name} token: take the one that the model was"
                " trained with"
            )
    return tokenizer


def _record(
    config: PreTrainedConfig,
    tokenizer: Any,
    model: Any,
    max_length: int | None,
    origin: str,
    *,
    headless: bool,
) -> Language:
    prefix = model.base_model_prefix + "."
    encoder = {k: v.detach().float().clone() for k, v in model.base_model.state_dict().items()}
    decoder = {
        k: v.detach().float().clone()
        for k, v in model.named_parameters()
        if not k.startswith(prefix)
    }
    for name, tensor in (encoder | decoder).items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{origin}: {name} holds NaN or infinite values: take another checkpoint"
            )
    _fit(config, tokenizer, origin)
    limit = _limit(config, tokenizer, origin)
    if max_length is not None and max_length > limit:
        raise UserError(
            f"--text.max_length {max_length}: {origin} takes {limit} tokens at most: give that or"
            " less"
        )
    kept = None if headless else decoder
    return Language(
        config,
        tokenizer,
        max_length or limit,
        encoder,
        kept,
        origin,
        fingerprint(encoder, kept),
    )


def _limit(config: PreTrainedConfig, tokenizer: Any, origin: str) -> int:
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        raise UserError(
            f"{origin}: max_position_embeddings is {positions} in config.json: write the number of"
            " positions that the model was trained with"
        )
    if config.model_type in _OFFSET_POSITIONS:
        positions -= int(config.pad_token_id) + 1
    return min(positions, int(min(tokenizer.model_max_length, 2**31)))


def _fit(config: PreTrainedConfig, tokenizer: Any, origin: str) -> None:
    """Refuses a tokenizer of another model."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise UserError(
            f"the tokenizer of {origin} has ids up to {largest}, the model {config.vocab_size}"
            " embeddings: take the tokenizer that the model was trained with"
        )
    if config.pad_token_id is not None and tokenizer.pad_token_id != config.pad_token_id:
        raise UserError(
            f"the tokenizer of {origin} pads with id {tokenizer.pad_token_id}, the model with"
            f" {config.pad_token_id}: take the tokenizer that the model was trained with"
        )
    # Vocabularies are rounded up to multiples of up to 1,024; beyond, they are different ones.
    if config.vocab_size - largest > 1024:
        raise UserError(
            f"the tokenizer of {origin} has {largest + 1} entries, the model {config.vocab_size}"
            " embeddings: take the tokenizer that the model was trained with"
        )
