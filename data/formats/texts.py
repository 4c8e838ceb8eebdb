"""Texts as they are stored in shards, and token ids as a batch of them.

A single text is the UTF-8 bytes of ``KEY.txt``; a pair is a JSON object in ``KEY.json``, with the
names "text" and "text_pair". Which of the two a split has stands in its manifest (`Manifest.text`,
"stored").
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfdistill.data.errors import BrokenData

if TYPE_CHECKING:  # packing and checking parse texts and need no torch: seconds to import
    import torch

#: The extension of the stored member.
Stored = Literal["txt", "json"]
# Names in the JSON object.
TEXT, PAIR = "text", "text_pair"


#: Token ids; or rows of ids, of the segment of each token, and where asked for of its word.
Tokens = list[int] | list[list[int]]


class Text(NamedTuple):
    """A text, and the second of a pair (None for a single text)."""

    text: str
    pair: str | None


def store(text: str, pair: str | None, stored: Stored) -> bytes:
    """The bytes of a text's member; the inverse of `read`.

    Args:
        text: The text.
        pair: The second of a pair; None for a single text.
        stored: Extension of the member; a pair needs "json".

    Returns:
        The member's bytes.

    Raises:
        ValueError: The text has half a surrogate pair, which UTF-8 cannot hold.
    """
    assert pair is None or stored == "json"
    try:
        if stored == "txt":
            return text.encode()
        found = {TEXT: text} if pair is None else {TEXT: text, PAIR: pair}
        return json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair (\\ud800 to \\udfff)") from None


def read(content: bytes, stored: Stored = "txt") -> Text:
    """A stored member as text.

    Args:
        content: The member's bytes.
        stored: Its extension; a "json" without "text_pair" is a single text.

    Returns:
        The text.

    Raises:
        ValueError: It is not UTF-8, not such JSON, or empty; one line that says which.
    """
    try:
        decoded = content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from None
    found = Text(decoded, None)
    if stored == "json":
        try:
            value = json.loads(decoded)
        except (ValueError, RecursionError):
            raise ValueError("it is no valid JSON") from None
        if not isinstance(value, dict) or not isinstance(value.get(TEXT), str):
            raise ValueError(f'it is no JSON object with a string "{TEXT}"')
        pair = value.get(PAIR)
        if pair is not None and not isinstance(pair, str):
            raise ValueError(f'its "{PAIR}" is no string')
        found = Text(value[TEXT], pair)
    if not found.text.strip():
        raise ValueError("it is empty")
    if found.pair is not None and not found.pair.strip():
        raise ValueError("the second of its pair is empty")
    return found


def parse(content: bytes, name: str, stored: Stored = "txt") -> Text:
    """A stored member as text, for a loader.

    Args:
        content: The member's bytes.
        name: Of the sample, for errors.
        stored: Its extension.

    Returns:
        The text.

    Raises:
        BrokenData: It is not UTF-8, not such JSON, or empty.
    """
    try:
        return read(content, stored)
    except ValueError as error:
        raise BrokenData(
            f"{name}: the text cannot be read: {error}: pack it again from a whole file, or allow"
            " some to be skipped (--data.skip_broken)"
        ) from None


class Texts:
    """A `data.loading.codec.Codec`: token ids, padded to lengths of which there are few.

    The length L of a batch is that of its longest sample, rounded up to a multiple of `bucket`, and
    at most `max_length`. A padding row of evaluation is one pad id with attention_mask 1 at its
    first position: a row that attends to nothing would be a softmax over nothing, which is NaN.

    Args:
        encode: Tokens of a text, or of a pair, with the special ones, at least one of them and at
            most `max_length`.
        pad_id: The id at padding.
        special_ids: Ids that are never masked; `pad_id` is taken as one of them.
        max_length: Tokens.
        bucket: Tokens, see above.
        packed: Also say how the texts fill fewer rows of L tokens, several in one.
        pairs: The split has pairs (`Manifest.text`, "pairs").
        stored: Extension of the members (`Manifest.text`, "stored"); by default "json" for pairs.
        overlapping: Tokens of a window, from the part before it and its own; None where windows
            share none.
    """

    def __init__(
        self,
        encode: Callable[[str, str | None], Tokens],
        *,
        pad_id: int,
        special_ids: frozenset[int],
        max_length: int,
        bucket: int = 32,
        packed: bool = False,
        pairs: bool = False,
        stored: Stored | None = None,
        overlapping: Callable[[str, str], Tokens] | None = None,
    ) -> None:
        assert max_length > 0
        assert bucket > 0
        self.encode, self.overlapping = encode, overlapping
        self.pad_id = pad_id
        self.special_ids = np.array(sorted(special_ids | {pad_id}), dtype=np.int64)
        self.max_length = max_length
        self.bucket, self.packed = bucket, packed
        self.noted: list[str] = []
        self.stored: Stored = stored or ("json" if pairs else "txt")

    def decode(self, content: bytes, name: str) -> NDArray[Any]:
        """See `Codec`; int64 [n], token ids, or [2, n] or [3, n], see `Tokens`."""
        return self._array(self.encode(*parse(content, name, self.stored)))

    def window(
        self, content: bytes, name: str, pieces: Callable[[str], tuple[str, str]]
    ) -> NDArray[Any]:
        """A window of a long text, as `decode` gives a whole one.

        Args:
            content: The text's member.
            name: Of the text, for messages.
            pieces: The window before it, which may be empty, and this, of a text.

        Raises:
            BrokenData: See `decode`.
        """
        before, text = pieces(parse(content, name, self.stored).text)
        if before and self.overlapping is not None:
            return self._array(self.overlapping(before, text))
        return self._array(self.encode(text, None))

    def _array(self, tokens: Tokens) -> NDArray[np.int64]:
        array = np.asarray(tokens, dtype=np.int64)
        assert array.ndim in (1, 2)
        assert 0 < array.shape[-1] <= self.max_length
        return array

    def blank(self, like: NDArray[Any] | None) -> NDArray[Any] | None:
        """See `Codec`; one pad id."""
        return np.array([self.pad_id], dtype=np.int64)

    def nbytes(self, rows: int) -> int:
        """See `Codec`; its six arrays of numbers, and the masked view's."""
        return rows * self.max_length * 8 * 8

    def collate(
        self, arrays: list[NDArray[Any]], names: list[str], room: NDArray[np.uint8] | None = None
    ) -> "dict[str, torch.Tensor]":
        """See `Codec`.

        Returns:
            input_ids int64 [b, L], `pad_id` at padding; attention_mask int64 [b, L], 0 at padding;
            maskable bool [b, L], True at tokens that are not special; where a text has a second
            segment token_type_ids int64 [b, L]; where words are told apart `words` int64 [b, L],
            the number of each token's word in its text, -1 at padding; and where nothing is padded
            `unpadded`, ones [b].
            If asked for, and where it spares rows, the layout of packed rows, int64: packed_at
            [r, L], places in the flattened batch, -1 at padding, and packed_to [b, L], where in the
            flattened rows each token went, 0 for padding.
        """
        import torch

        lengths = [array.shape[-1] for array in arrays]
        longest = max(lengths)
        length = min(-(-longest // self.bucket) * self.bucket, self.max_length)
        ids = np.full((len(arrays), length), self.pad_id, dtype=np.int64)
        attention = np.zeros((len(arrays), length), dtype=np.int64)
        told = any(len(array) == 3 for array in arrays if array.ndim == 2)
        words = np.full_like(ids, -1) if told else None
        second = any(array[1].any() for array in arrays if array.ndim == 2)
        kinds = np.zeros_like(ids) if second else None
        for row, array in enumerate(arrays):
            ids[row, : lengths[row]] = array if array.ndim == 1 else array[0]
            attention[row, : lengths[row]] = 1
            if kinds is not None and array.ndim == 2:
                kinds[row, : lengths[row]] = array[1]
            if words is not None and array.ndim == 2:
                words[row, : lengths[row]] = array[2]
        maskable = (attention == 1) & ~np.isin(ids, self.special_ids)
        out = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(attention),
            "maskable": torch.from_numpy(maskable),
        }
        if kinds is not None:
            out["token_type_ids"] = torch.from_numpy(kinds)
        if words is not None:
            out["words"] = torch.from_numpy(words)
        if attention.all():
            out["unpadded"] = torch.ones(len(arrays), dtype=torch.bool)
        elif self.packed:
            layout = pack_rows(lengths, length)
            if len(layout[0]) < len(arrays):
                out["packed_at"], out["packed_to"] = map(torch.from_numpy, layout)
        return out


def pack_rows(lengths: list[int], width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Lays sequences into few rows: the longest first, each into the first row with room for it.

    Args:
        lengths: Tokens of each of b sequences, at most `width`.
        width: Tokens of a row, L.

    Returns:
        [r, L], the place of each token in the padded batch [b, L], flattened, and -1 at padding;
        and [b, L], the place of each token in the rows, flattened, and 0 for padding.
    """
    rows: list[list[int]] = []
    free: list[int] = []
    for sequence in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, room in enumerate(free) if room >= lengths[sequence]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(width)
        rows[row].append(sequence)
        free[row] -= lengths[sequence]
    at = np.full((len(rows), width), -1, dtype=np.int64)
    to = np.zeros((len(lengths), width), dtype=np.int64)
    for row, sequences in enumerate(rows):
        begin = 0
        for sequence in sequences:
            end = begin + lengths[sequence]
            at[row, begin:end] = sequence * width + np.arange(lengths[sequence])
            to[sequence, : lengths[sequence]] = row * width + np.arange(begin, end)
            begin = end
    return at, to
