"""Statistics of claims against scipy, closed forms and simulations."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from selfdistill.experiments.report.claims.statistics import (
    Design,
    Estimate,
    Units,
    contrast,
    holm,
    slope_weights,
    slopes,
)

TOLD = np.random.default_rng(7)


def numbered(values: Sequence[float], first: int = 0) -> Units:
    return Units({first + n: float(v) for n, v in enumerate(values)})


def estimate(*cells: tuple[float, Units]) -> Estimate:
    found = contrast(cells)
    assert found is not None
    return found


def test_the_same_seeds_are_a_paired_t_test_and_others_welchs() -> None:
    a, b = TOLD.normal(70, 2, 5), TOLD.normal(69, 1, 5)
    for ours, known in (
        (estimate((1, numbered(a)), (-1, numbered(b))), stats.ttest_rel(a, b)),
        (
            estimate((1, numbered(a)), (-1, numbered(b[:3], first=8))),
            stats.ttest_ind(a, b[:3], equal_var=False),
        ),
    ):
        assert ours.interval() == pytest.approx(tuple(known.confidence_interval(0.95)))
        assert (ours.p(), ours.df) == pytest.approx((known.pvalue, known.df))
    # A pipeline's mean has the seeds' numbers, and is no seed.
    other = Units(numbered(b).values, "pipeline")
    assert not estimate((1, numbered(a)), (-1, other)).paired
    assert contrast([(1, numbered(a)), (-1, numbered(b[:1]))]) is None


def test_slopes_are_least_squares() -> None:
    x = [1.0, 2.0, 3.0, 5.0]
    y = TOLD.normal(size=(4, 6)) + np.array(x)[:, None]
    weights = slope_weights(x)
    each = [stats.linregress(x, y[:, seed]).slope for seed in range(6)]
    known = stats.ttest_1samp(each, 0)
    ours = estimate(*((w, numbered(row)) for w, row in zip(weights, y, strict=True)))
    assert (ours.mean, ours.p()) == pytest.approx((np.mean(each), known.pvalue))
    both = slopes([(numbered([place] * 6), numbered(row)) for place, row in zip(x, y, strict=True)])
    assert list(both.values.values()) == pytest.approx(each)
    apart = estimate(*((w, numbered(y[n], 10 * n)) for n, w in enumerate(weights)))
    assert apart.mean == pytest.approx(np.mean(each))
    assert not apart.paired


@pytest.mark.parametrize("paired", [True, False])
def test_intervals_hold_the_truth_as_often_as_they_say(paired: bool) -> None:
    hit, draws = 0, 2000
    for _ in range(draws):
        common = TOLD.normal(0, 3, 4) if paired else np.zeros(4)
        a, b = common + TOLD.normal(1.5, 2, 4), common + TOLD.normal(0, 1, 4)
        cells = (1, numbered(a)), (-1, numbered(b, 0 if paired else 9))
        low, high = estimate(*cells).interval()
        hit += low <= 1.5 <= high
    assert hit / draws == pytest.approx(0.95, abs=0.015)


def test_holm_is_the_closed_test_of_bonferronis() -> None:
    for size, missing in ((1, 0), (3, 0), (4, 2)):
        values = list(TOLD.random(size) ** 3)
        family = [*values, *[1.0] * missing]
        for index, ours in enumerate(holm(values, len(family))):
            subsets = (
                s
                for n in range(1, len(family) + 1)
                for s in itertools.combinations(range(len(family)), n)
                if index in s
            )
            known = max(min(1.0, len(s) * min(family[i] for i in s)) for s in subsets)
            assert ours == pytest.approx(known)


def test_power_is_that_of_cohens_tables() -> None:
    two = Design((1.0, -1.0), 64, False, 1.0)
    assert two.detects() == pytest.approx(0.5, abs=0.002)
    assert (two.needs(0.5), two.needs(0.8)) == (64, 26)
    one = Design((1.0,), 34, True, 1.0)
    assert one.needs(0.5) == 34
    assert two.needs(0.01) is None
    # Two one-sided tests, each of which leaves half of what may be missed.
    level = Design((1.0, -1.0), 1, True, 1.0).needs(1.0, power=0.9)
    assert level is not None
    x = TOLD.normal(0, np.sqrt(2), (20_000, level))
    half = stats.t.ppf(0.975, level - 1) * x.std(1, ddof=1) / np.sqrt(level)
    assert 0.8 < np.mean(np.abs(x.mean(1)) + half < 1) < 0.85
    # With many repetitions it is the normal distribution's.
    many = Design((1.0, -1.0), 100_000, False, 2.0)
    wide = stats.norm.ppf(0.9975) + stats.norm.ppf(0.8)
    assert many.detects(0.005) == pytest.approx(wide * 2 * np.sqrt(2 / 100_000), rel=1e-4)
    # By simulation, for the five seeds that tables have.
    few = Design((1.0, -1.0), 5, True, 1.0)
    x = TOLD.normal(few.detects(), np.sqrt(2), (20_000, 5))
    seen = stats.ttest_1samp(x, 0, axis=1)
    assert np.mean((seen.pvalue < 0.05) & (seen.statistic > 0)) == pytest.approx(0.8, abs=0.01)
