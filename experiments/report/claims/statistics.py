"""Contrasts of cells with their intervals, Holm's correction, and what a design would see."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, stats

from selfdistill.experiments.results import varied

ALPHA, POWER = 0.05, 0.8
#: Beyond so many units a design is not looked at.
MOST = 200


@dataclass(frozen=True)
class Units:
    """Figures of one cell, one for each independent repetition.

    Attributes:
        values: number of the repetition -> figure.
        kind: what is repeated: fine-tuning alone, or all stages (then each is a mean).
    """

    values: Mapping[int, float]
    kind: Literal["seed", "pipeline"] = "seed"

    @property
    def n(self) -> int:
        """How many."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Their mean; NaN for none."""
        return float(np.mean(list(self.values.values()))) if self.values else math.nan

    @property
    def variance(self) -> float:
        """Their sample variance (n - 1); NaN for fewer than two."""
        return float(np.var(list(self.values.values()), ddof=1)) if self.n > 1 else math.nan


@dataclass(frozen=True)
class Estimate:
    """A number with its uncertainty, by Student's t.

    Attributes:
        mean: the number.
        error: its standard error.
        df: degrees of freedom.
        n: repetitions: pairs, or those of the smallest cell.
        paired: whether it is over differences of the same repetition.
    """

    mean: float
    error: float
    df: float
    n: int
    paired: bool

    @property
    def varied(self) -> bool:
        """Whether there is an interval; see `results.varied`."""
        return varied(self.mean, self.error)

    def interval(self, level: float = 1 - ALPHA) -> tuple[float, float]:
        """Student's confidence interval; NaN where there is none."""
        if not self.varied:
            return math.nan, math.nan
        half = float(stats.t.ppf((1 + level) / 2, self.df)) * self.error
        return self.mean - half, self.mean + half

    def p(self, bound: float = 0.0) -> float:
        """Two-sided p-value of the number being `bound`; 1 without an interval."""
        if not self.varied:
            return 1.0
        return float(2 * stats.t.sf(abs(self.mean - bound) / self.error, self.df))

    @property
    def sign(self) -> int:
        """1 or -1 where the 95% interval lies above or below 0, else 0."""
        low, high = self.interval()
        return int(low > 0) - int(high < 0)

    def __neg__(self) -> Estimate:
        return Estimate(-self.mean, self.error, self.df, self.n, self.paired)


Weighted = Sequence[tuple[float, Units]]


def pairs(cells: Weighted) -> bool:
    """Whether all cells have the same repetitions: those are compared with themselves."""
    first = cells[0][1]
    return all((u.kind, u.values.keys()) == (first.kind, first.values.keys()) for _, u in cells)


def contrast(cells: Weighted) -> Estimate | None:
    """The sum of the cells' means, each times its weight; None for fewer than two repetitions.

    Over the same repetitions it is Student's t of each one's own sum (for two cells the paired
    t-test); otherwise cells are independent, with Welch's and Satterthwaite's degrees of freedom.
    """
    if not cells or min(u.n for _, u in cells) < 2:
        return None
    mean = sum(w * u.mean for w, u in cells)
    n = min(u.n for _, u in cells)
    if pairs(cells):
        sums = Units({k: sum(w * u.values[k] for w, u in cells) for k in cells[0][1].values})
        return Estimate(mean, math.sqrt(sums.variance / n), n - 1, n, True)
    parts = [(w**2 * u.variance / u.n, u.n - 1) for w, u in cells]
    total = sum(v for v, _ in parts)
    # Cells without any spread: the fewest degrees that there can be.
    df = total**2 / sum(v**2 / d for v, d in parts) if total else min(d for _, d in parts)
    return Estimate(mean, math.sqrt(total), df, n, False)


def slopes(points: Sequence[tuple[Units, Units]]) -> Units:
    """Least-squares slope of y against x in each repetition that all points have.

    Args:
        points: (x, y), both measured.
    """
    shared = set.intersection(*(set(u.values) for point in points for u in point))
    found = {}
    for one in sorted(shared):
        x, y = (np.array([point[axis].values[one] for point in points]) for axis in (0, 1))
        away = x - x.mean()
        if away.any():
            found[one] = float(away @ y / (away @ away))
    return Units(found, points[0][0].kind)


def slope_weights(places: Sequence[float]) -> list[float]:
    """Weights with which means at these places sum up to their least-squares slope."""
    away = np.asarray(places, float) - np.mean(places)
    return [float(a) for a in away / (away @ away)]


def holm(values: Sequence[float], family: int) -> list[float]:
    """Holm's (1979) adjusted p-values.

    Args:
        values: p-values.
        family: comparisons in all: those that are not there yet count as the largest.
    """
    adjusted = [1.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (family - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


# --- power


@dataclass(frozen=True)
class Design:
    """What will be repeated, and how much the baseline's repetitions differ.

    Attributes:
        weights: of the cells.
        n: repetitions of each.
        paired: whether they are the same ones.
        spread: standard deviation of the baseline's, above 0.
    """

    weights: tuple[float, ...]
    n: int
    paired: bool
    spread: float

    def _power(self, effect: float, n: int, alpha: float) -> float:
        """Of a two-sided t-test. That pairing makes differences smaller is not counted on."""
        df = (n - 1) * (1 if self.paired else len(self.weights))
        error = self.spread * math.sqrt(sum(w**2 for w in self.weights) / n)
        limit = float(stats.t.ppf(1 - alpha / 2, df))
        # The other tail is less than alpha / 2, and speaks for the opposite.
        return float(stats.nct.sf(limit, df, effect / error))

    def detects(self, alpha: float = ALPHA) -> float:
        """The smallest effect that is seen with 80% power; NaN where nobody can tell."""
        if self.n < 2:
            return math.nan
        unit = self.spread * math.sqrt(sum(w**2 for w in self.weights) / self.n)
        high = unit
        while self._power(high, self.n, alpha) < POWER:
            high *= 2

        def beyond(effect: float) -> float:
            return self._power(effect, self.n, alpha) - POWER

        return float(optimize.brentq(beyond, 0.0, high, xtol=1e-9 * high))

    def needs(self, effect: float, alpha: float = ALPHA, power: float = POWER) -> int | None:
        """Repetitions that see an effect with so much power; None for more than `MOST`."""
        return next((n for n in range(2, MOST + 1) if self._power(effect, n, alpha) >= power), None)
