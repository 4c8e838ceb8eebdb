"""A sample's class number, as it stands in its label member (.cls, .txt or .json), or its name.

Of samples with several labels the member is `.labels.json`, a list of their numbers.
"""

import json
import re

from selfdistill.data.errors import UserError, printable
from selfdistill.data.records import from_json

# Names under which the number may stand in a JSON object.
JSON_KEYS = ("label", "cls", "class", "target")
#: Bytes of a label's member at most.
LARGEST = 2**20
#: A number from here on means something else: an id, a date, a hash.
MAX_CLASSES = 2**20
#: Extension of the member that holds several labels. WebDataset decodes it as JSON.
SEVERAL = "labels.json"
_LONGEST = 1000  # characters of a name

#: A class number, or those of a sample that may have none, one or several, in order.
Label = int | tuple[int, ...]


def numbers(label: Label | None) -> tuple[int, ...]:
    """The classes of a sample: none, one or several."""
    return label if isinstance(label, tuple) else () if label is None else (label,)


# "3", and "3.0" as tables write it where a column has gaps.
_NUMBER = re.compile(rb"(\d+)(?:\.0*)?")


def parse(text: bytes) -> int:
    """Reads a class number.

    Args:
        text: A decimal number, or a JSON object that has one under a name of `JSON_KEYS`. "3.0" is
            3; nothing else with a point, an exponent or a sign is a class.

    Returns:
        The number, at least 0 and below `MAX_CLASSES`.

    Raises:
        ValueError: There is none; says what stands there.
    """
    value: object = text.strip()
    if isinstance(value, bytes) and value.startswith(b"{"):
        value = _from_json(value)
        if type(value) is float and value.is_integer():
            value = int(value)
        number = value if type(value) is int and value >= 0 else None
    else:
        match = _NUMBER.fullmatch(text.strip())
        # Python refuses to read thousands of digits.
        number = None if match is None else int(match[1].lstrip(b"0")[:20] or b"0")
    if number is None:
        raise ValueError(f"its label {_shown(value)} is no class number")
    if number >= MAX_CLASSES:
        raise ValueError(f"its label {_shown(value)} is hardly the number of a class")
    return number


def parse_several(text: bytes) -> tuple[int, ...]:
    """Reads several class numbers.

    Args:
        text: A JSON list of numbers in rising order, such as ``[0, 3]``; ``[]`` for no class.

    Returns:
        The numbers, each at least 0 and below `MAX_CLASSES`.

    Raises:
        ValueError: It is none; says what stands there.
    """
    try:
        found = from_json(text, "its labels")
    except UserError:
        raise ValueError(f"its labels {_shown(text)} are no valid JSON") from None
    whole = isinstance(found, list) and all(type(n) is int for n in found)
    if not whole or not all(0 <= n < MAX_CLASSES for n in found):
        raise ValueError(f"its labels {_shown(found)} are no list of class numbers")
    if found != sorted(set(found)):
        raise ValueError(f"its labels {_shown(found)} are not in rising order, each once")
    return tuple(found)


def several(numbers: tuple[int, ...]) -> bytes:
    """The member of several class numbers; see `parse_several`."""
    return json.dumps(sorted(numbers)).encode()


def by_name(text: bytes, field: str) -> str:
    """Reads a class's name.

    Args:
        text: A JSON object.
        field: The name under which it stands there.

    Returns:
        The name; of a whole number its digits.

    Raises:
        ValueError: There is none; says what stands there.
    """
    try:
        found = from_json(text, "its label")
    except UserError:
        raise ValueError(f"its label {_shown(text)} is no valid JSON") from None
    if not isinstance(found, dict) or field not in found:
        there = ", ".join(map(printable, list(found)[:6])) if isinstance(found, dict) else ""
        raise ValueError(f"its JSON has no field {field!r}, only {there or 'nothing'}")
    value = found[field]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_CLASSES:
        return str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"its {field} {_shown(value)} is no class")
    if len(value) > _LONGEST:
        raise ValueError(f"its {field} {_shown(value)} is too long for a class's name")
    return value.strip()


def _shown(value: object) -> str:
    try:
        shown = repr(value)
    except ValueError:  # an integer of thousands of digits
        shown = "with thousands of digits"
    return shown if len(shown) <= 40 else f"{shown[:40]}..."


def _from_json(text: bytes) -> object:
    """What stands under the one name, or under several that agree."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"its label {_shown(text)} is no valid JSON") from None
    names = [name for name in JSON_KEYS if name in found]
    if not names:
        raise ValueError(
            f"its JSON label has none of the names {', '.join(JSON_KEYS)}, only"
            f" {', '.join(map(str, list(found)[:6])) or 'nothing'}"
        )
    numbers = {name: found[name] for name in names if type(found[name]) in (int, float)}
    if len(set(numbers.values())) > 1:
        differing = " and ".join(f"{name} {value}" for name, value in numbers.items())
        raise ValueError(f"its JSON label has several numbers, {differing}")
    return next(iter(numbers.values()), found[names[0]])
