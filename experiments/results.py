"""What the cells of a sweep came out as."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.results import read_result
from selfdistill.experiments import state
from selfdistill.experiments.jobs import PIPELINE, Job
from selfdistill.experiments.plan import Cell
from selfdistill.experiments.state import Status


def varied(mean: float, spread: float) -> bool:
    """Whether figures have an interval: they vary by more than rounding.

    Scores are counts over few samples, so that two or three differences are easily equal, or 0;
    Student's t would be sure of them.
    """
    return spread > 1e-9 * abs(mean)


@dataclass(frozen=True)
class Sample:
    """Figures of one quantity over seeds, of one pipeline or several.

    Several pipelines have stages 1 and 2 of their own: their means are what varies independently,
    and mean, deviation and interval are those of the means.

    Attributes:
        values: seed -> figure.
    """

    values: dict[int, float] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Seeds."""
        return len(self.values)

    @property
    def pipelines(self) -> list[list[float]]:
        """Figures of each pipeline."""
        found: dict[int, list[float]] = {}
        for seed, value in self.values.items():
            found.setdefault(seed // PIPELINE, []).append(value)
        return list(found.values())

    @property
    def units(self) -> list[float]:
        """What mean, deviation and interval are taken over: seeds, or pipelines' means."""
        groups = self.pipelines
        if len(groups) > 1:
            return [statistics.fmean(one) for one in groups]
        return list(self.values.values())

    @property
    def mean(self) -> float:
        """Their mean; NaN for none."""
        return statistics.fmean(self.units) if self.values else float("nan")

    @property
    def std(self) -> float:
        """Their sample standard deviation (n - 1); NaN for fewer than two."""
        return statistics.stdev(self.units) if self.n > 1 else float("nan")

    @property
    def within(self) -> float:
        """Standard deviation over the seeds of a pipeline, their variances pooled; NaN for one."""
        groups = [one for one in self.pipelines if len(one) > 1]
        if not groups:
            return float("nan")
        freedom = sum(len(one) - 1 for one in groups)
        return float((sum((len(g) - 1) * statistics.variance(g) for g in groups) / freedom) ** 0.5)

    @property
    def count(self) -> str:
        """How many seeds, or pipelines and seeds of each."""
        sizes = [len(one) for one in self.pipelines]
        if len(sizes) < 2:
            return str(self.n)
        each = str(sizes[0]) if len(set(sizes)) == 1 else "/".join(map(str, sizes))
        return f"{len(sizes)} × {each}"

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student's confidence interval of the mean; NaN where there is none (`varied`)."""
        n = len(self.units)
        if n < 2 or not varied(self.mean, self.std):
            return float("nan"), float("nan")
        half = float(stats.t.ppf((1 + level) / 2, n - 1)) * self.std / n**0.5
        return self.mean - half, self.mean + half

    def minus(self, other: Sample) -> Sample:
        """Differences, seed by seed, over the seeds that both have."""
        return Sample({s: v - other.values[s] for s, v in self.values.items() if s in other.values})

    @property
    def sign(self) -> int:
        """1 or -1 where the 95% interval of the mean lies above or below 0, else 0."""
        low, high = self.interval()
        return int(low > 0) - int(high < 0)


@dataclass(frozen=True)
class Outcome:
    """A cell and what is known of it.

    Attributes:
        cell: which.
        status: of its jobs: failed where one failed, done where all are.
        results: result.json of each seed that is complete.
        message: why it failed, or what it waits for.
        before: seconds of the stages that its fine-tuning starts from, mean over pipelines.
        begun: its record says that it runs: it does, or was interrupted.
    """

    cell: Cell
    status: Status
    results: dict[int, dict[str, Any]]
    message: str
    before: float
    begun: bool = False

    @property
    def metric(self) -> str:
        """What the set is scored by."""
        return next((str(r.get("metric") or "accuracy") for r in self.results.values()), "accuracy")

    def sample(self, key: str) -> Sample:
        """A quantity of each seed.

        Args:
            key: score (in %), seconds (of all its stages, with one fine-tuning), or analysis.NAME.
        """
        found: dict[int, float] = {}
        for seed, result in self.results.items():
            value = _quantity(result, key, self.before)
            if value is not None:
                found[seed] = value
        return Sample(found)


def _quantity(result: dict[str, Any], key: str, before: float) -> float | None:
    if key == "score":
        score = result["metrics"].get(f"test_{result.get('metric') or 'accuracy'}")
        return None if score is None else 100 * float(score)
    if key == "seconds":
        return before + float(result["seconds"])
    node: Any = result
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return float(node) if isinstance(node, int | float) else None


def outcome(root: Path, cell: Cell) -> Outcome:
    """Reads a cell's results, whole or in part."""
    results: dict[int, dict[str, Any]] = {}
    for job in cell.jobs:
        stage = root / job.leaves
        # One fine-tuning lies in its folder, several lie in folders below it: their mean has no
        # seed.
        for path in (stage / "result.json", *stage.glob("seed-*/result.json")):
            try:
                found = read_result(path)
                results[found["seed"]] = found
            except (FileNotFoundError, UserError, KeyError):
                continue
    results = dict(sorted(results.items()))
    stands = {job.name: state.status(root, job) for job in cell.jobs}
    # What hinders a cell first; done, where nothing else is.
    order: tuple[Status, ...] = ("failed", "blocked", "open", "done")
    where = next(status for status in order if status in stands.values())
    job = next(job for job in cell.jobs if stands[job.name] == where)
    record = state.read(root, job)
    message = str(record.get("message", ""))
    if where == "blocked":
        failed = next(j for j in ancestors(job) if state.status(root, j) == "failed")
        message = (
            f"waits for {failed.name}, which failed: {state.read(root, failed).get('message')}"
        )
    begun = where == "open" and any(
        status == "done" or state.read(root, job).get("status") == "running"
        for job, status in zip(cell.jobs, stands.values(), strict=True)
    )
    before = statistics.fmean(_seconds_before(root, job) for job in cell.jobs)
    return Outcome(cell, where, results, message, before, begun)


def ancestors(job: Job) -> list[Job]:
    """All jobs that a job waits for, the first of them first."""
    found: dict[str, Job] = {}
    for one in job.before:
        found |= {a.name: a for a in ancestors(one)} | {one.name: one}
    return list(found.values())


def _seconds_before(root: Path, job: Job) -> float:
    """Time of the stages that a fine-tuning starts from."""
    seconds, todo, seen = 0.0, list(job.needs), set()
    while todo:
        one = todo.pop()
        if one.name in seen:
            continue
        seen.add(one.name)
        seconds += float((one.result(root) or {}).get("seconds", 0.0))
        todo += one.needs
    return seconds


@dataclass(frozen=True)
class Comparison:
    """Two methods on several data sets, seed by seed.

    Attributes:
        each: data set -> paired differences.
        over: data sets that are pooled.
    """

    each: dict[str, Sample]
    over: frozenset[str]

    @property
    def pooled(self) -> Sample:
        """The data sets' mean differences, numbered: their interval speaks of data sets."""
        means = [s.mean for name, s in self.each.items() if name in self.over]
        return Sample(dict(enumerate(means)))


def compare(
    outcomes: Sequence[Outcome],
    method: str,
    against: str,
    key: str = "score",
    over: Iterable[str] | None = None,
) -> Comparison:
    """Differences of a method, as its file has it, from another, per data set.

    Args:
        outcomes: of any tables; rows with options of their own are passed over.
        method: name of the method.
        against: name of the one that is subtracted.
        key: of the quantity.
        over: data sets that are pooled (default: all).
    """
    by = {(o.cell.dataset.name, o.cell.method.name): o for o in outcomes if usual(o.cell)}
    names = list(dict.fromkeys(o.cell.dataset.name for o in outcomes))
    each = {
        name: by[name, method].sample(key).minus(by[name, against].sample(key))
        for name in names
        if (name, method) in by and (name, against) in by
    }
    pooled = frozenset(names if over is None else over)
    return Comparison({name: sample for name, sample in each.items() if sample.n}, pooled)


def usual(cell: Cell) -> bool:
    """Whether a row is its method as the method's file has it."""
    row = cell.row
    return not (row.options or row.lengthen) and row.rounds in (None, cell.method.rounds)


def finite(value: float) -> bool:
    """Whether a figure is one."""
    return bool(np.isfinite(value))
