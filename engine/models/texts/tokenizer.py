"""Tokenizers of transformers, read with care, and told apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from selfdistill.data.cli import format_error
from selfdistill.data.errors import UserError
from selfdistill.data.records import read_object

#: Times that a tokenizer's replacements may lengthen a text.
_GROWTH = 100


@contextmanager
def foreign(what: str, cure: str) -> Iterator[None]:
    """Turns what transformers and its tokenizers raise on folders that they did not write.

    Those in Rust raise bare exceptions, and panic beside `Exception`.

    Raises:
        UserError: in place of it.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {format_error(error)[:200]}: {cure}") from error


def _check_growth(path: Path, source: str) -> None:
    """Refuses a tokenizer whose replacements make much of little: a word could fill the memory.

    Raises:
        UserError: a text may grow more than `_GROWTH` times.
    """
    if not path.is_file():
        return
    content = read_object(path)
    growth, steps = 1.0, [content.get("normalizer")]
    while steps:
        step = steps.pop()
        inner = step.get("normalizers") if isinstance(step, dict) else None
        steps += inner if isinstance(inner, list) else []
        if isinstance(step, dict) and isinstance(step.get("content"), str):
            pattern = step.get("pattern")
            found = pattern.get("String") if isinstance(pattern, dict) else None
            length = len(found) if isinstance(found, str) and found else 1
            growth *= max(1.0, len(step["content"]) / length)
    if growth > _GROWTH:
        raise UserError(
            f"the tokenizer of {source} replaces letters by up to {growth:.0g} others: take the one"
            " that the model was trained with"
        )


def load_tokenizer(folder: str, source: str) -> Any:
    """The tokenizer of a folder.

    Raises:
        UserError: it has none, or one without padding.
    """
    if not Path(folder).is_dir():
        raise UserError(f"there is no tokenizer at {source}: give its folder")
    cure = "put tokenizer.json, or vocab.json and merges.txt, beside its weights"
    _check_growth(Path(folder) / "tokenizer.json", source)
    with foreign(f"{source} has no tokenizer that can be read", cure):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        pad = tokenizer.pad_token_id
    if pad is None:  # the others stand where its template puts them, under any name
        raise UserError(
            f"the tokenizer of {source} has no pad token: take the one that the model was trained"
            " with"
        )
    with foreign(f"the tokenizer of {source} is broken", cure):
        tokenizer(["a b", "a"], padding=True)  # some fail at their first text alone
        longest = int(min(tokenizer.model_max_length, 2**31))
        _ = max(tokenizer.get_vocab().values())
    if longest < 3:
        raise UserError(f"the tokenizer of {source} takes {longest} tokens: correct its config")
    return tokenizer


def lowered(tokenizer: Any) -> Any:
    """A tokenizer that makes letters small first, as sentence-transformers does by itself.

    In the tokenizer, so that all that is exported with it reads texts alike. transformers makes
    tokenizers of its own classes anew when it loads them, without what was added: a plain one it
    takes as it is.
    """
    backend = tokenizer.backend_tokenizer
    old, first = backend.normalizer, normalizers.Lowercase()
    text = "A B" if old is None else old.normalize_str("A B")
    if text == text.lower():
        return tokenizer
    backend.normalizer = first if old is None else normalizers.Sequence([first, old])
    names = ("model_max_length", "model_input_names", "padding_side", "truncation_side")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: getattr(tokenizer, name) for name in names},
        **tokenizer.special_tokens_map,
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of what a tokenizer does with a text."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content = {k: v for k, v in content.items() if k not in ("truncation", "padding")}
    else:
        content = tokenizer.get_vocab()
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
