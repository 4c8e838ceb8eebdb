"""Masked texts beside what is predicted for them, as Markdown for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

#: Texts shown with their masked tokens, and tokens shown of each.
SHOWN, LENGTH = 4, 64


def shown(batch: Mapping[str, Tensor], predicted: Tensor, tokenizer: Any) -> str:
    """A table in Markdown: each text with what stood at its masked places and what is predicted.

    Texts with a masked token among the tokens shown come first. Tokens that only frame a text are
    left out; "|" stands between the texts of a pair.
    """
    length = batch["input_ids"].shape[1]
    guess = dict(zip(batch["masked_at"].tolist(), predicted.tolist(), strict=True))
    frame = {
        tokenizer.convert_tokens_to_ids(token)
        for name, token in tokenizer.special_tokens_map.items()
        if name in ("bos_token", "eos_token", "cls_token", "sep_token", "pad_token")
    }
    lines = batch["input_ids"].tolist()
    masked = [{at % length for at in guess if at // length == row} for row in range(len(lines))]
    order = sorted(range(len(lines)), key=lambda row: min(masked[row], default=LENGTH) >= LENGTH)
    rows = ["| masked text: original → prediction |", "|---|"]
    for row in order[:SHOWN]:
        parts: list[str] = []
        words = ""
        run: list[int] = []  # unmasked tokens that are decoded together
        before: list[int] = []  # the token before them, which says whether a space is between
        for column, token in enumerate(lines[row][:LENGTH]):
            if column not in masked[row] and token not in frame:
                run.append(token)
                continue
            words += _plain(_continued(tokenizer, before, run))
            before, run = run[-1:] or before, []
            if column in masked[row]:
                old, new = (
                    _continued(tokenizer, before, [one])
                    for one in (token, guess[row * length + column])
                )
                space = " " if old[:1].isspace() else ""
                words += f"{space}<strong>[{_named(old)} → {_named(new)}]</strong>"
                before = [token]
            else:
                parts, words, before = [*parts, words], "", []
        parts.append(words + _plain(_continued(tokenizer, before, run)))
        texts = (" ".join(part.split()) for part in parts)
        rows.append("| " + " &#124; ".join(text for text in texts if text) + " |")
    return "\n".join(rows)


def _continued(tokenizer: Any, before: list[int], ids: list[int]) -> str:
    """The text of some tokens that follow another, with the space between if there is one."""
    head: str = tokenizer.decode(before)
    both: str = tokenizer.decode(before + ids)
    return both.removeprefix(head) if both.startswith(head) else str(tokenizer.decode(ids))


def _named(token: str) -> str:
    """A token's text, or a sign where that is white space or a part of a character."""
    return _plain(token.strip() or ("␣" if token else "�"))


def _plain(text: str) -> str:
    """A text in which neither Markdown nor HTML finds a sign of its own."""
    return "".join(c if c.isalnum() or c.isspace() else f"&#{ord(c)};" for c in text)
