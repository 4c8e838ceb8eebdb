"""A sample's class number, as it stands in its label member (.cls, .txt or .json)."""

import json

# Names under which the number may stand in a JSON object.
JSON_KEYS = ("label", "cls", "class", "target")


def parse(text: bytes) -> int:
    """Reads a class number.

    Args:
        text: A decimal number, or a JSON object that has one under a name of `JSON_KEYS`.

    Returns:
        The number, at least 0.

    Raises:
        ValueError: There is none; says what stands there.
    """
    value: object = text.strip()
    if isinstance(value, bytes) and value.startswith(b"{"):
        try:
            found = json.loads(value)
        except ValueError:
            raise ValueError(f"its label {text[:40]!r} is no valid JSON") from None
        names = [name for name in JSON_KEYS if name in found]
        if not names:
            raise ValueError(
                f"its JSON label has none of the names {', '.join(JSON_KEYS)}, only"
                f" {', '.join(map(str, list(found)[:6])) or 'nothing'}"
            )
        value = found[names[0]]
        if type(value) is int and value >= 0:
            return value
    elif isinstance(value, bytes) and value.isdigit():
        return int(value)
    shown = text[:20] if isinstance(value, bytes) else value
    raise ValueError(f"its label {shown!r} is no class number")
