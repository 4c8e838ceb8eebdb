"""A text -> token ids with the special tokens: whole texts, pairs, windows of long texts."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Any

from selfdistill.data.errors import UserError
from selfdistill.data.formats.texts import Text, Tokens


class Encoder:
    """The tokens of a text as `data.formats.texts.Texts` takes them.

    Args:
        tokenizer: of transformers.
        max_length: of the result.
        segments: that the model tells apart (BERT: 2). Where the tokenizer numbers them, and there
            is more than one in a text, they come beside the ids.
        words: whether each token's word is told, for masks of whole words.
        overlap: tokens at the end of a window that the next one begins with.
        origin: of the tokenizer, for messages.

    Raises:
        UserError: the tokenizer cannot tell words apart.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        segments: int,
        *,
        words: bool = False,
        overlap: int = 0,
        origin: str = "",
    ) -> None:
        self.tokenizer, self.max_length, self.segments = tokenizer, max_length, segments
        self.words, self.overlap = words, overlap
        # Special tokens before a text.
        special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        self.head = special.index(0) if 0 in special else 0
        if words and (not tokenizer.is_fast or len(set(tokenizer("a b").word_ids()) - {None}) < 2):
            raise UserError(
                f"--mlm.whole_word true: the tokenizer of {origin} does not tell words apart: take"
                " a model with a fast tokenizer (tokenizer.json), or leave it out"
            )

    def __call__(self, text: str, pair: str | None = None) -> Tokens:
        """Tokens of a text or a pair."""
        found = self.tokenizer(text, pair, truncation=True, max_length=self.max_length)
        kinds: list[int] = found.get("token_type_ids", []) if self.segments > 1 else []
        return self._rows(found["input_ids"], kinds, self._places(found) if self.words else [])

    def overlapping(self, before: str, text: str) -> Tokens:
        """Tokens of a window of a text.

        Args:
            before: what comes before it; the window begins with its last `overlap` tokens, with
                all where it has fewer.
            text: its own part.
        """
        last = self.tokenizer(before, add_special_tokens=False, verbose=False)
        shared: list[int] = last["input_ids"][-self.overlap :]
        room = self.max_length - len(shared)
        found = self.tokenizer(text, truncation=True, max_length=room)
        ids: list[int] = found["input_ids"]
        places: list[Hashable] = []
        if self.words:
            own = self._places(found)
            there = [("before", place) for place in self._places(last)[-self.overlap :]]
            places = [*own[: self.head], *there, *own[self.head :]]
        return self._rows([*ids[: self.head], *shared, *ids[self.head :]], [], places)

    @staticmethod
    def _places(found: Any) -> list[Hashable]:
        """Of each token the word in which sequence; a special one has none."""
        return list(zip(found.sequence_ids(), found.word_ids(), strict=True))

    def _rows(self, ids: list[int], kinds: list[int], places: Sequence[Hashable]) -> Tokens:
        if self.words:
            runs = [len(list(run)) for _, run in itertools.groupby(places)]
            words = [number for number, length in enumerate(runs) for _ in range(length)]
            return [ids, kinds or [0] * len(ids), words]
        return [ids, kinds] if any(kinds) else ids


def number_of_tokens(tokenizer: Any, text: Text) -> int:
    """Those of a whole text, with the special ones."""
    return len(tokenizer(*text, verbose=False)["input_ids"])
