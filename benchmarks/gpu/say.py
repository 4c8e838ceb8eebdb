"""How a part tells the driver a figure: a line of JSON behind a mark."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

MARK = "@@figure "


def say(name: str, unit: str, values: float | Sequence[float], **more: Any) -> None:
    """Tells a figure.

    Args:
        name: what was measured, one of its kind in the part.
        unit: of the values.
        values: one, or those of the rounds: their median, least and greatest, and number.
        more: figures beside it; `base` names the record ("PART: NAME") that it is set against.
    """
    found = [float(values)] if isinstance(values, int | float) else [float(v) for v in values]
    record = {
        "name": name,
        "unit": unit,
        "value": statistics.median(found),
        "min": min(found),
        "max": max(found),
        "n": len(found),
    }
    print(MARK + json.dumps(record | more), flush=True)


def failed(name: str, error: Exception) -> None:
    """Tells that a figure could not be taken, and why."""
    words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    print(MARK + json.dumps({"name": name, "unit": "", "failed": words}), flush=True)
