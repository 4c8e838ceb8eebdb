"""Beside step 1, number of a sample -> one of the windows of a long text.

A language model takes a few hundred tokens; a longer text makes several samples. How many each text
makes stands in a table before the first step, so that order, resume and the number of ranks need to
know nothing of windows. The table holds the long texts alone. The loader tokenizes one window, not
its text.

Up to 256 MiB of shards every text is tokenized, once a run, at a megabyte or two a second: windows
are whole sentences, full, and nothing is left out. Beyond, that would take hours. There the number
of windows follows from a text's bytes, by a budget that 95 of 100 texts of a sample keep, and the
loader cuts the text into so many parts of nearly equal length. A part that has too many tokens
nonetheless is cut off, and it is said how many that are. To cut texts when they are packed would
need no table, but packing does not know the tokenizer; and a budget of bytes alone that loses
nothing of any text makes half-empty windows of most, since texts differ in bytes per token.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfdistill.data.errors import UserError
from selfdistill.data.formats.sentences import cut, divide
from selfdistill.data.shards.manifest import Manifest

Ints = NDArray[np.int64]
#: Of a text: where each of its tokens begins, in characters.
Starts = Callable[[str], Sequence[int]]

#: Bytes of shards up to which every text is tokenized to find its windows.
EXACT = 2**28
# Share of texts with fewer bytes a token than the budget; what `cut` may make longer by 1.1.
_DENSE, _SLACK = 0.05, 0.9
# Rows of the members' table that are looked at together.
_ROWS = 2**20


class Window(NamedTuple):
    """What a sample is: window `part` (from 0) of the `parts` of a text.

    Attributes:
        text: Number of the text.
        part: See above.
        parts: See above.
        places: Where the windows before, this and the next begin, in characters, as far as there
            are such; None where they follow from `part` and `parts`.
    """

    text: int
    part: int
    parts: int
    places: tuple[int, int, int | None] | None

    def pieces(self, text: str) -> tuple[str, str]:
        """The window before this one, empty for the first, and this."""
        if self.places is None:
            before, begin, end = (
                cut(text, min(max(0, self.part + i), self.parts), self.parts) for i in (-1, 0, 1)
            )
            return text[before:begin], text[begin:end]
        return text[self.places[0] : self.places[1]], text[self.places[1] : self.places[2]]


class Windows:
    """The samples of a split, of which some are windows of long texts.

    Args:
        table: int64 [3 M + P], see `table_of`; may be memory-mapped.
        long: M.
        manifest: The split, of N texts.

    Attributes:
        samples: Windows, a text of one among them.
        long: M, texts of more than one.
        counts: int64 [S], windows in each shard.
        starts: int64 [S + 1], the first window of each shard, and their number.

    Raises:
        ValueError: The table is not one of this split.
    """

    def __init__(self, table: Ints, long: int, manifest: Manifest) -> None:
        self._texts, self._firsts, self._parts = np.asarray(table[: 3 * long]).reshape(3, long)
        self._places = np.asarray(table[3 * long :])
        self.long = long
        if long and not (
            self._texts[0] == self._firsts[0] >= 0
            and self._texts[-1] < manifest.samples
            and (np.diff(self._texts) > 0).all()
            and (self._parts > 1).all()
            and (np.diff(self._firsts - self._texts) == self._parts[:-1] - 1).all()
            and len(self._places) in (0, self._parts.sum())
            and (self._places >= 0).all()
        ):
            raise ValueError("it does not number the windows of this split")
        self.starts = np.array([self._first(int(text)) for text in manifest.starts], np.int64)
        self.counts = np.diff(self.starts)
        self.samples = int(self.starts[-1])

    def _first(self, text: int) -> int:
        """The first window of a text."""
        before = int(np.searchsorted(self._texts, text)) - 1
        if before < 0:
            return text
        more = self._firsts[before] + self._parts[before] - 1 - self._texts[before]
        return text + int(more)

    def window(self, sample: int) -> Window:
        """Which window of which text a sample is."""
        row = int(np.searchsorted(self._firsts, sample, side="right")) - 1
        if row < 0:
            return Window(sample, 0, 1, None)
        text, first, parts = (
            int(column[row]) for column in (self._texts, self._firsts, self._parts)
        )
        part = sample - first
        if part >= parts:
            return Window(text + part - parts + 1, 0, 1, None)
        if not len(self._places):
            return Window(text, part, parts, None)
        at = first - text + row + part  # windows of long texts before this one
        before = int(self._places[at - 1 if part else at])
        end = int(self._places[at + 1]) if part + 1 < parts else None
        return Window(text, part, parts, (before, int(self._places[at]), end))


def table_of(texts: Ints, parts: Ints, places: Sequence[int] = ()) -> Ints:
    """The table of long texts.

    Args:
        texts: int64 [M], their numbers, ascending.
        parts: int64 [M], the windows of each, 2 or more.
        places: Where each of their windows begins in its text, P in all, or none.

    Returns:
        int64 [3 M + P]: numbers of the texts, of their first windows, how many these are, places.
    """
    more = np.cumsum(parts - 1) - (parts - 1)  # before each
    return np.concatenate([texts, texts + more, parts, np.array(places, np.int64)])


def fitting(text: str, starts: Starts, room: int) -> tuple[list[int], int]:
    """Cuts a text into windows, each of which has room for its tokens when it stands alone.

    Args:
        text: The text.
        starts: See `Starts`.
        room: Tokens of a window at most.

    Returns:
        Where the windows begin; and how many tokens do not fit in, which is none unless one
        character has more than a window.
    """
    whole = np.maximum.accumulate(np.array(starts(text), np.int64)).tolist()
    if len(whole) <= room:
        return [0], 0
    size = room
    while True:
        places = divide(text, whole, size)
        ends = [*places[1:], None]
        numbers = [len(starts(text[a:b])) for a, b in zip(places, ends, strict=True)]
        over = max(numbers) - room
        # Some tokenizers begin every text with a token more.
        if over <= 0 or size == 1:
            return places, sum(max(0, number - room) for number in numbers)
        size = max(1, size - over)


def budget(sizes: Sequence[int], tokens: Sequence[int], room: int) -> float:
    """Bytes of a window, of which nearly all hold at most `room` tokens.

    Args:
        sizes: Bytes of the texts of a sample.
        tokens: Of each.
        room: Tokens of a window at most.
    """
    known = [size / number for size, number in zip(sizes, tokens, strict=True) if number]
    if not known:
        raise UserError("none of the texts looked at has a token: take another tokenizer")
    dense = float(np.quantile(known, _DENSE, method="lower"))
    return max(4.0, _SLACK * dense * room)  # a character may have four bytes


def by_bytes(manifest: Manifest, bytes_each: float) -> tuple[Ints, int]:
    """The table of a split whose texts are cut by their bytes, and M.

    Args:
        manifest: The split.
        bytes_each: Of a window, see `budget`.
    """
    texts, parts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for first in range(0, manifest.samples, _ROWS):
        number = parts_of(manifest.members[first : first + _ROWS, 1], bytes_each)
        long = np.flatnonzero(number > 1)
        texts.append(first + long)
        parts.append(number[long])
    return table_of(np.concatenate(texts), np.concatenate(parts)), sum(map(len, texts))


def parts_of(sizes: NDArray[np.int64], bytes_each: float) -> Ints:
    """Windows of texts of so many bytes."""
    return np.ceil(np.asarray(sizes) / bytes_each).astype(np.int64)
