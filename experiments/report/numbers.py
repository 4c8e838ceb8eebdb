"""Numbers as a report prints them.

No pandas: cells are texts with a spread, a mark and a style, which a frame would hold as objects,
and grouping takes one dictionary. It would add 84 MB and a second of import.
"""

from __future__ import annotations

import math
from typing import Protocol

from selfdistill.experiments.results import Sample

#: Quantities whose best is marked: 1: the highest, -1: the lowest.
BETTER = {"score": 1, "analysis.test_loss": -1, "analysis.gap": -1}

#: Between a number and what belongs to it no line is broken.
TIED = "\N{NO-BREAK SPACE}"

#: What stands where there is no number.
NONE = "–"


class Interval(Protocol):
    """A number with a 95% interval: a sample's mean, or an estimate."""

    @property
    def mean(self) -> float:
        """The number."""

    @property
    def n(self) -> int:
        """Of how many; one has no interval."""

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies above or below 0, else 0."""

    def interval(self) -> tuple[float, float]:
        """Its ends."""


def plain(value: float, digits: int) -> str:
    """A number with so many decimals and a true minus sign."""
    if not math.isfinite(value):
        return NONE
    # What rounds to zero has no sign.
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def signed(value: float, digits: int = 2) -> str:
    """A difference, its sign always told."""
    text = plain(value, digits)
    return f"+{text}" if round(value, digits) > 0 else text


def decimals(value: float) -> int:
    """Decimals that leave three digits of a number which count, or two of a small one."""
    if not math.isfinite(value) or value == 0:
        return 2
    digits = 2 - math.floor(math.log10(abs(value)))
    return max(0, digits if digits <= 4 else digits - 1)


def spread(sample: Sample, key: str) -> str:
    """Mean ± standard deviation, in the quantity's own unit."""
    if not sample.n:
        return NONE
    if key == "seconds":
        text = clock(sample.mean)
        return text if sample.n < 2 else f"{text} ±{TIED}{sample.std:.0f}{TIED}s"
    digits = 2 if key == "score" else decimals(sample.mean)
    if key != "score" and 0 < abs(sample.mean) < 1e-5:
        mean, std = (f"{v:.1e}".replace("-", "−") for v in (sample.mean, sample.std))
    else:
        mean, std = plain(sample.mean, digits), plain(sample.std, digits)
    if len(sample.pipelines) > 1 and math.isfinite(sample.within):
        within = f"{sample.within:.1e}" if "e" in std else plain(sample.within, digits)
        return f"{mean} ±{TIED}{std}, within {within}"
    return mean if sample.n < 2 else f"{mean} ±{TIED}{std}"


def interval(sample: Interval, digits: int = 2) -> str:
    """The 95% interval of a mean in brackets; nothing where there is none."""
    if sample.n < 2:
        return ""
    low, high = sample.interval()
    if math.isnan(low):
        return "no interval: all equal"
    return f"[{plain(low, digits)},{TIED}{plain(high, digits)}]"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:32:18; seconds alone below one minute."""
    if not math.isfinite(seconds):
        return NONE
    if seconds < 60:
        return f"{seconds:.1f}{TIED}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def seconds_of(text: str) -> float:
    """Seconds of a clock's hours, minutes and seconds."""
    hours, minutes, seconds = (float(part) for part in text.split(":"))
    return 3600 * hours + 60 * minutes + seconds


def setting(value: object) -> str:
    """An option's value as one types it."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
