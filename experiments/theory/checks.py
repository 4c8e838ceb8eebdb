"""What the theory says, counted over random problems: where it holds, and by how much not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfdistill.experiments.theory import closed, oracles
from selfdistill.experiments.theory.problems import (
    LABELS,
    STARTS,
    TIMES,
    Array,
    Labels,
    Sizes,
    Start,
    draw,
    mean_square,
)

#: A bound counts as broken beyond this relative excess, so that rounding is no counter-example.
ROUNDING = 1e-12

#: Functions of t by the names of the record.
_VALUES: dict[str, Callable[[closed.Coefficients, int], float]] = {
    "norm_printed": closed.norm_printed,
    "zeta": closed.zeta,
    "norm": closed.norm,
    "psi": closed.psi,
    "psi_mended": closed.psi_mended,
    "distance": closed.distance,
    "cross_term": closed.cross_term,
}
#: psi and norm_printed differ by a constant, psi_mended and zeta by the same: one drop for both.
_DROPS: dict[str, Callable[[closed.Coefficients, int], float]] = {
    "psi": closed.norm_printed_drop,
    "zeta": closed.zeta_drop,
    "norm": closed.norm_drop,
    "distance": closed.distance_drop,
}


@dataclass(frozen=True)
class Case:
    """One problem at one T.

    Attributes:
        index: the problem's number; with the seed, start, labels and time it can be drawn again.
        start: how w_init and w_{0,0} lie.
        labels: whether the labels have to do with w_{0,0}.
        time: T in units of 1 / mean(s_i²).
        n: samples.
        d: features.
        p: outputs.
        ridge: n lambda in units of mean(s_i²).
        values: name -> values at t = 0..rounds.
        drops: name -> value(t) − value(t + 1) at t = 0..rounds − 1.
    """

    index: int
    start: Start
    labels: Labels
    time: float
    n: int
    d: int
    p: int
    ridge: float
    values: dict[str, Array]
    drops: dict[str, Array]

    def excess(self, name: str, bound: str) -> float:
        """The largest value / bound over t; over 1 where the bound fails."""
        return float(np.max(self.values[name] / self.values[bound]))

    def decreases(self, name: str) -> bool:
        """Whether it is strictly smaller at each t than at the one before."""
        return bool(np.all(self.drops[name] > 0))

    def drops_most_first(self, name: str) -> bool:
        """Whether t = 1 brings a drop, and one larger than any later."""
        drops = self.drops[name]
        return bool(drops[0] > 0 and np.all(drops[0] > drops[1:]))

    def record(self) -> dict[str, Any]:
        """All of it for JSON."""
        plain = {name: getattr(self, name) for name in self.__annotations__}
        for group in ("values", "drops"):
            plain[group] = {name: list(map(float, a)) for name, a in plain[group].items()}
        return plain


def cases(
    seed: int, problems: int, rounds: int, sizes: Sizes, times: Sequence[float] = TIMES
) -> list[Case]:
    """Every problem with every start and labels, at every T.

    Args:
        seed: of all problems.
        problems: how many.
        rounds: the last t, at least 2.
        sizes: of the problems.
        times: T in units of 1 / mean(s_i²).
    """
    found = []
    for index in range(problems):
        for start, labels in ((s, ys) for s in STARTS for ys in LABELS):
            problem = draw(seed, index, start, labels, times[0], sizes)
            scale = mean_square(problem.phi)
            (d, n), p = problem.phi.shape, problem.y.shape[0]
            basis = closed.coefficients(problem)
            for time in times:
                c = closed.at_time(basis, time / scale)
                values = {
                    name: np.array([value(c, t) for t in range(rounds + 1)])
                    for name, value in _VALUES.items()
                }
                drops = {
                    name: np.array([drop(c, t) for t in range(rounds)])
                    for name, drop in _DROPS.items()
                }
                ridge = n * problem.lam / scale
                found.append(Case(index, start, labels, time, n, d, p, ridge, values, drops))
    return found


def quartiles(values: Iterable[float]) -> dict[str, float]:
    """Least, lower quartile, median, upper quartile and greatest."""
    found = np.quantile(list(values), [0, 0.25, 0.5, 0.75, 1])
    return dict(zip(("min", "q1", "median", "q3", "max"), map(float, found), strict=True))


def errors(seed: int, problems: int, rounds: int, sizes: Sizes) -> dict[str, Any]:
    """Relative errors of the closed forms against the numerical solutions.

    Every problem at every T, and t = 0..rounds; starts and labels take turns.

    Args:
        seed: of all problems.
        problems: how many.
        rounds: the last t.
        sizes: of the problems.

    Returns:
        Quartiles of ||closed − numerical|| / ||numerical|| by comparison, and how many there were.
    """
    lemma, exact, steps = [], [], []
    for index in range(problems):
        start, labels = STARTS[index // 2 % 3], LABELS[index % 2]
        for time in TIMES:
            problem = draw(seed, index, start, labels, time, sizes)
            c = closed.coefficients(problem)
            distilled = oracles.rounds(problem, rounds)
            by_exp = oracles.flow_exact(problem, distilled)
            by_steps = oracles.flow_steps(problem, distilled)
            for t in range(rounds + 1):
                w = closed.weights(c, closed.finetuned(c, t)).reshape(problem.w_00.shape)
                exact.append(oracles.relative_error(w, by_exp[t]))
                steps.append(oracles.relative_error(w, by_steps[t]))
                if time == TIMES[0]:  # Lemma 1 knows no T
                    w = closed.weights(c, closed.teacher(c, t)).reshape(problem.w_00.shape)
                    lemma.append(oracles.relative_error(w, distilled[t]))
    named = {"lemma_1": lemma, "flow_exponential": exact, "flow_steps": steps}
    return {name: {"comparisons": len(e), **quartiles(e)} for name, e in named.items()}


def tally(among: Sequence[Case]) -> dict[str, Any]:
    """Counts over cases, how many problems they fall on, and quartiles of the ratios.

    Returns:
        Plain values for JSON; ratios are the largest over t.
    """
    broken = [c for c in among if c.excess("distance", "psi") > 1 + ROUNDING]
    loose = [c for c in among if c.excess("norm", "norm_printed") > 1 + ROUNDING]
    unbound = [c for c in among if c.excess("norm", "zeta") > 1 + ROUNDING]

    def count(holds: Callable[[Case], bool]) -> int:
        return sum(map(holds, among))

    return {
        "cases": len(among),
        "problems": len({c.index for c in among}),
        "psi_decreases": count(lambda c: c.decreases("psi")),
        "psi_drops_most_at_1": count(lambda c: c.drops_most_first("psi")),
        "psi_drop_below_rounding": count(lambda c: bool(np.any(np.diff(c.values["psi"]) >= 0))),
        "zeta_decreases": count(lambda c: c.decreases("zeta")),
        "zeta_drops_most_at_1": count(lambda c: c.drops_most_first("zeta")),
        "zeta_fails_to_bound_norm": len(unbound),
        "psi_fails_to_bound_distance": len(broken),
        "psi_fails_to_bound_distance_problems": len({c.index for c in broken}),
        "printed_norm_fails_to_bound_norm": len(loose),
        "printed_norm_fails_to_bound_norm_problems": len({c.index for c in loose}),
        "distance_over_psi": quartiles(c.excess("distance", "psi") for c in among),
        "norm_over_printed_norm": quartiles(c.excess("norm", "norm_printed") for c in among),
        "norm_decreases": count(lambda c: c.decreases("norm")),
        "distance_decreases": count(lambda c: c.decreases("distance")),
        "distance_drops_most_at_1": count(lambda c: c.drops_most_first("distance")),
        "distance_grows_at_1": count(lambda c: bool(c.drops["distance"][0] < 0)),
        "distance_grows_later": count(lambda c: bool(np.any(c.drops["distance"][1:] < 0))),
    }


def counter_examples(among: Sequence[Case]) -> dict[str, dict[str, Any]]:
    """The worst case against each statement; none where it holds throughout.

    Returns:
        Statement -> the case's record.
    """
    found: dict[str, Case] = {}
    worst = max(among, key=lambda c: c.excess("distance", "psi"))
    if worst.excess("distance", "psi") > 1 + ROUNDING:
        found["psi bounds the distance"] = worst
    for name in ("norm", "distance"):
        # Relative to the first value: the growth is then of one scale in all problems.
        worst = min(among, key=lambda c: float(np.min(c.drops[name]) / c.values[name][0]))
        if not worst.decreases(name):
            found[f"the exact {name} decreases"] = worst
    late = [c for c in among if c.decreases("distance") and not c.drops_most_first("distance")]
    if late:
        found["a decreasing distance drops most at t = 1"] = max(
            late, key=lambda c: float(np.max(c.drops["distance"]) - c.drops["distance"][0])
        )
    return {statement: case.record() for statement, case in found.items()}
