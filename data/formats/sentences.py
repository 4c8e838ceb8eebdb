"""Where a long text is cut: at sentence ends, else between words.

The rule needs no language: a mark such as . ! ? before white space, its full-width forms anywhere,
an Arabic or Indian one before white space, the end of a line. Quotes and brackets that close behind
a mark stay with it. White space belongs to what follows a cut, since tokenizers join a space to the
word behind it: so the tokens of the pieces are those of the whole text.
"""

import bisect
import re
from collections.abc import Sequence

_SENTENCE = re.compile(
    r"(?<=[.!?…؟۔।॥])[\"'”’»)\]]{0,4}(?=\s)"
    r"|(?<=[。！？｡．])[」』”’）]{0,4}(?![。！？｡．」』”’）])"
    r"|(?<=\S)(?=[^\S\n]*\n)"
)
_WORD = re.compile(r"(?<=\S)(?=\s)")


def divide(text: str, starts: Sequence[int], room: int) -> list[int]:
    """Cuts a text into as few windows of whole sentences as hold it, and these as equal as can be.

    A sentence that is longer than a window is cut between words, a word that is longer anywhere.

    Args:
        text: The text.
        starts: Where each of its tokens begins, in characters, ascending.
        room: Tokens of a window at most.

    Returns:
        Where each window begins, in characters; the first is 0.
    """
    sentences = [match.end() for match in _SENTENCE.finditer(text)]
    found = _filled(text, sentences, starts, room)
    ends = {0, *sentences}
    broken = len(set(found) - ends)  # sentences
    least, most = -(-len(starts) // len(found)), room
    while least < most:  # the smallest windows of which no more are needed
        middle = (least + most) // 2
        tried = _filled(text, sentences, starts, middle)
        if len(tried) == len(found) and len(set(tried) - ends) == broken:
            found, most = tried, middle
        else:
            least = middle + 1
    return found


def _filled(text: str, sentences: list[int], starts: Sequence[int], room: int) -> list[int]:
    """Where windows begin that are filled one after the other."""
    places, first = [0], 0
    while len(starts) - first > room:
        # The next token has no room. One character is in a window however many tokens it has.
        limit = max(starts[first + room], places[-1] + 1)
        if limit >= len(text):
            break
        last = bisect.bisect_right(sentences, limit) - 1
        if last >= 0 and sentences[last] > places[-1]:
            place = sentences[last]
        else:
            words = [match.end() for match in _WORD.finditer(text, places[-1] + 1, limit + 1)]
            place = next((end for end in reversed(words) if end <= limit), limit)
        places.append(place)
        first = bisect.bisect_left(starts, place, first)
    return places


def cut(text: str, number: int, parts: int) -> int:
    """Where one of the cuts lies that divide a text into parts of nearly equal length.

    It is the sentence end that is nearest to the place of equal distance, at most a twentieth of a
    part away, or the end of a word, or that place. So no part is longer than 1.1 of an equal one.
    It takes no tokens to find, and no more time in a long text than in a short one.

    Args:
        text: The text.
        number: 0 to `parts`: 0 is the beginning of the text, `parts` its end.
        parts: At most as many as the text has characters.

    Returns:
        The place, in characters; it grows with `number`.
    """
    place = number * len(text) // parts
    if number in (0, parts):
        return place
    margin = len(text) // (20 * parts)
    for pattern in (_SENTENCE, _WORD):
        # One character more than a cut may lie at: it must be seen whether that is a space.
        found = pattern.finditer(text, place - margin, place + margin + 1)
        ends = [end for match in found if (end := match.end()) <= place + margin]
        if ends:
            return min(ends, key=lambda end: abs(end - place))
    return place
