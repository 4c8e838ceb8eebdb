"""Pre-trained language models: weights, configuration and tokenizer, read into one record."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    RobertaConfig,
)

from selfdistill.data.errors import UserError
from selfdistill.data.files import regular
from selfdistill.data.records import read_object
from selfdistill.engine.models.images.weights import fingerprint
from selfdistill.engine.models.source import locate
from selfdistill.engine.models.texts import sentences
from selfdistill.engine.models.texts.fresh import fresh_roberta
from selfdistill.engine.models.texts.language import HEADS
from selfdistill.engine.models.texts.sentences import Pooling, Sentences
from selfdistill.engine.models.texts.tokenizer import (
    foreign,
    load_tokenizer,
    lowered,
    tokenizer_hash,
)

#: Files that a model's folder on the hub may have beside its weights.
TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model"),
    *("bpe.codes", "added_tokens.json"),  # PhoBERT's and BERTweet's
)

#: Models that number positions from pad_token_id + 1.
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")
#: Models that had relative positions in transformers 4 (`position_embedding_type`): 5 passes the
#: entry over, and computes absolute ones.
_ABSOLUTE_POSITIONS = ("bert", "roberta", "xlm-roberta", "camembert", "electra")

#: Of a configuration, what changes nothing of the encoder: names, versions, the last head.
_APART = (
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "use_cache",
)


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
        pooling: how it pools a text's tokens.
        sentences: what sentence-transformers' files say; None where there are none.
    """

    config: PreTrainedConfig
    tokenizer: Any
    max_length: int
    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor] | None
    origin: str
    sha256: str
    pooling: Pooling = "cls"
    sentences: Sentences | None = None

    @property
    def settings(self) -> str:
        """sha256 of what the encoder computes with beside its tensors, its tokenizer among them."""
        told = {k: v for k, v in self.config.to_diff_dict().items() if k not in _APART}
        content = json.dumps(
            [told, tokenizer_hash(self.tokenizer), self.pooling], sort_keys=True, default=str
        )
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def told(self) -> dict[str, Any]:
        """What a record says of it beside the tensors' hash."""
        return {"model_settings": self.settings, "text.max_length": self.max_length}


def read_network(auto: Any, folder: Path, config: PreTrainedConfig) -> tuple[Any, dict[str, Any]]:
    """A model of transformers in fp32 from a folder, which runs none of the folder's code.

    Args:
        auto: one of transformers' `Auto` classes.
        folder: with the weights.
        config: of the model.

    Returns:
        The model; which of its weights the folder lacks, or has in another shape.
    """
    found: tuple[Any, dict[str, Any]] = auto.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    return found


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
    folder = locate(
        source,
        example="FacebookAI/roberta-base",
        patterns=[*TOKENIZER_FILES, *sentences.FILES],
        bare=True,
    )
    told = sentences.read(folder)
    folder = sentences.transformer(folder)
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise UserError(f"{source} is no model's folder: a language model comes with config.json")
    settings = read_object(folder / "config.json")
    kind = str(settings.get("model_type"))
    if kind not in HEADS:
        raise UserError(
            f"{source} is a model of type {kind!r}, of which masked language modelling is not known"
            f" here: take one of {', '.join(HEADS)}"
        )
    _check_settings(settings, source)
    with foreign(f"{source} cannot be loaded", "fetch the model again"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_numbers(config, source)
    tokenizer = load_tokenizer(str(folder), source)
    if told is not None and told.lowers:
        if tokenizer.is_fast:
            tokenizer = lowered(tokenizer)
        else:
            line = "do_lower_case is left out: its tokenizer is no fast one; lower texts yourself"
            told = replace(told, notes=(*told.notes, line))
    with foreign(f"{source} cannot be loaded", "fetch the model again"):
        if config.pad_token_id is None:  # by which positions are counted, and embeddings left out
            config.pad_token_id = tokenizer.pad_token_id
        _check_size(config, folder, source)
        model, info = read_network(AutoModelForMaskedLM, folder, config)
    prefix = model.base_model_prefix + "."
    missing = sorted(info["missing_keys"])
    wrong = [*(k for k in missing if k.startswith(prefix)), *map(str, info["mismatched_keys"])]
    if wrong:
        raise UserError(
            f"{source}: {wrong[0]} is missing or of another shape than config.json says: fetch the"
            " model again"
        )
    longest = None if told is None else told.longest
    record = _record(config, tokenizer, model, max_length, source, longest, headless=bool(missing))
    own = getattr(config, "classifier_pooling", "cls")  # EuroBERT's late is a mean of logits
    pooling: Pooling = "mean" if own in ("mean", "late") else "cls"
    return replace(record, pooling=pooling if told is None else told.pooling, sentences=told)


def _check_settings(settings: dict[str, Any], source: str) -> None:
    """Refuses weights that are no plain numbers, other positions, and sizes that no model has.

    Raises:
        UserError: names the entry of config.json.
    """
    if settings.get("quantization_config") is not None:
        raise UserError(
            f"{source} is quantised (quantization_config in config.json), and is to be trained:"
            " take the weights that it was made from"
        )
    positions = settings.get("position_embedding_type")
    absolute = positions in (None, "absolute")
    if settings.get("model_type") in _ABSOLUTE_POSITIONS and not absolute:
        raise UserError(
            f"{source} has position_embedding_type {str(positions)[:40]!r}, which transformers 5"
            " does not compute any more: take a model of absolute positions"
        )
    for name, value in settings.items():
        most = 2**10 if "layers" in name or "heads" in name else 2**26
        most = 2**20 if name == "num_labels" else most  # a name is made of each
        if isinstance(value, int | float) and not -most <= value <= most:
            raise UserError(f"{source}: {name} is {value} in config.json: fetch the file again")


def _check_numbers(config: PreTrainedConfig, source: str) -> None:
    """Refuses what transformers takes as it stands in config.json."""
    for name in ("vocab_size", "hidden_size", "pad_token_id", "max_position_embeddings"):
        value = getattr(config, name, None)
        wrong = type(value) is not int or value < 0
        if value is not None and (wrong or (name.endswith("size") and value == 0)):
            raise UserError(f"{source}: {name} is {value!r} in config.json: fetch the file again")


def _check_size(config: PreTrainedConfig, folder: Path, source: str) -> None:
    """Compares the weights that config.json asks for with the files, before any are made.

    Raises:
        UserError: there are far fewer.
    """
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    for path in weights:
        regular(path, "fetch the model again")
    stored = sum(path.stat().st_size for path in weights)
    with torch.device("meta"):
        model: Any = AutoModelForMaskedLM.from_config(config, trust_remote_code=False)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    # Two bytes a number at least; the MLM head, as large as the embeddings, may be missing.
    if wanted > 2 * stored:
        raise UserError(
            f"{source}: config.json asks for {wanted:,} weights, its files have {stored:,} bytes:"
            " fetch the model again"
        )


def fresh_language(
    config: RobertaConfig, tokenizer: Any, max_length: int | None, counts: NDArray[np.int64]
) -> Language:
    """A model with random weights (torch's generator decides).

    Args:
        config: of the model.
        tokenizer: its tokenizer.
        max_length: longest input in tokens.
        counts: int64 [vocabulary], see `engine.models.texts.fresh`.
    """
    model = fresh_roberta(config, tokenizer.mask_token_id, counts)
    return _record(config, tokenizer, model, max_length, "scratch", headless=False)


def _record(
    config: PreTrainedConfig,
    tokenizer: Any,
    model: Any,
    max_length: int | None,
    origin: str,
    longest: int | None = None,
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
        max_length or min(limit, longest or limit),
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
    # Elsewhere the mask hides padding, whatever its id: encoders of BERT's kind with XLM-R's
    # tokenizer are published so. Their configuration's id keeps what transformers makes of it.
    counted = config.model_type in _OFFSET_POSITIONS and config.pad_token_id is not None
    if counted and tokenizer.pad_token_id != config.pad_token_id:
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


def load_encoder(encoder: nn.Module, weights: dict[str, Tensor], origin: str) -> list[str]:
    """Loads an encoder's weights; what they lack (BERT's pooler) stays new and is returned.

    Raises:
        UserError: anything but a pooler is missing, or does not fit.
    """
    try:
        missing, strange = encoder.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"{origin}: its weights do not fit its configuration: {error}") from error
    new = [name for name in missing if "pooler" in name]
    if len(new) < len(missing) or strange:
        which = next(iter([n for n in missing if n not in new] or strange))
        raise UserError(f"{origin}: {which} does not belong to its encoder: take whole weights")
    return new
